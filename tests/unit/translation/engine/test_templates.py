"""Templates: translated code that is put elsewhere, on the host and in the guest, instead of being translated again."""

from __future__ import annotations

import random

import pytest

from tests.unit.translation.engine.guest import DATA, Machine, Make
from tests.unit.translation.engine.test_random_code import random_code
from trivisor.translation.block_tables import Block, template_bucket
from trivisor.translation.layout import BLOCK_TABLE_ENTRIES
from trivisor.x86.assembler import assemble

FAR = 0x400000
NEAR_ALIAS, HIGH_ALIAS = 0x5000_3000, 0x10_0000_5000
"""Second linear addresses of the page: one where code is named in 32 bits, and one where it is not."""


def taken_up(m: Machine) -> int:
    """Blocks made of templates so far."""
    return int(m.vcpu.statistics()["native helpers"]["taken_up"])


def translated(m: Machine) -> int:
    """Blocks translated so far."""
    return int(m.vcpu.statistics()["translation"]["blocks"])


def code_of(m: Machine, block: Block, numbers: list[int]) -> bytes:
    """A block's host code without the numbers of its links, which stand at `numbers`."""
    code = bytearray(m.vcpu.blocks.cache.writable[block.start : block.start + block.size])
    for at in numbers:
        code[at : at + 4] = bytes(4)
    return bytes(code)


@pytest.mark.parametrize("linear, alias", [(FAR, NEAR_ALIAS), (HIGH_ALIAS, HIGH_ALIAS + 0x7654_3000)])
def test_a_template_put_elsewhere_is_what_translating_there_gives(machine: Make, linear: int, alias: int) -> None:
    """Every byte: whatever the translator makes of an address has to be noted as a relocation."""
    rng = random.Random(linear)
    m = machine("hlt")
    for address in (linear, alias):
        m.map(address, FAR)
    m.flush()
    store, mode = m.vcpu.blocks, m.vcpu.mode
    compared = 0
    for number in range(400):
        offset = 16 * (number % 240)
        code = random_code(rng, 64)
        m.memory.write(FAR + offset, code)
        m.vcpu.memory_written(FAR + offset, len(code))
        before = taken_up(m)
        first = store.block(mode, linear + offset)
        second = store.block(mode, alias + offset)
        assert first.number != second.number
        assert second.rip == alias + offset
        if taken_up(m) == before:
            continue  # an address that 32 bits hold in one place only
        used, store.cache.used = store.cache.used, second.start
        made = store.translator.translate(mode, alias + offset, m.memory.read(FAR + offset, 0x1000 - offset))
        store.cache.used = used
        numbers = [link.number for link in made.links]
        assert code_of(m, second, numbers) == bytes(made.code), code.hex()
        compared += 1
    assert compared > 250


@pytest.mark.parametrize("first", [b"\x0f\x1f\x44\x00\x00", b"\x48\xc7\xc0\x00\x10\x20\x30", b"\x90"])
def test_a_template_is_found_anywhere_in_its_page(machine: Make, first: bytes) -> None:
    m = machine("hlt")
    for address in (FAR, NEAR_ALIAS):
        m.map(address, FAR)
    m.flush()
    store, mode = m.vcpu.blocks, m.vcpu.mode
    code = first + b"\xeb\xfe"
    for offset in (0, 0x123, *range(0x1000 - 12, 0x1000 - len(code) + 1)):
        m.memory.write(FAR + offset, code)
        m.vcpu.memory_written(FAR + offset, len(code))
        store.block(mode, FAR + offset)
        before, made = taken_up(m), translated(m)
        assert store.block(mode, NEAR_ALIAS + offset).rip == NEAR_ALIAS + offset
        assert (taken_up(m), translated(m)) == (before + 1, made), hex(offset)


@pytest.mark.parametrize("linear, alias", [(FAR, NEAR_ALIAS), (HIGH_ALIAS, HIGH_ALIAS + 0x7654_3000)])
def test_an_instruction_across_pages_is_taken_up(machine: Make, linear: int, alias: int) -> None:
    """At every split, with constants and without, and moved as it would be translated there."""
    m = machine("hlt")
    for at in (0, 0x1000):
        for address in (linear, alias):
            m.map(address + at, FAR + at)
    m.flush()
    store, mode = m.vcpu.blocks, m.vcpu.mode
    for source in (
        "mov rax, 0x123456789abc", "add dword [rbx+rcx*8+0x12345678], 0x1020304", "jmp $+0x1234", "lea rax, [rel $]",
    ):  # fmt: skip
        code = assemble(source, bits=64).code
        for split in range(1, len(code)):
            offset = 0x1000 - split
            m.memory.write(FAR + offset, code)
            m.vcpu.memory_written(FAR + offset, len(code))
            first = store.block(mode, linear + offset)
            before, made = taken_up(m), translated(m)
            second = store.block(mode, alias + offset)
            assert (taken_up(m), translated(m)) == (before + 1, made), (source, split)
            assert first.second == second.second == FAR + 0x1000 | 1
            used, store.cache.used = store.cache.used, second.start
            there = store.translator.translate(mode, alias + offset, store.code_at(mode, alias + offset, FAR)[0])
            store.cache.used = used
            assert code_of(m, second, []) == bytes(there.code), (source, split)


@pytest.mark.parametrize("what", ["other bytes", "another page", "no page", "not RAM"])
def test_an_instruction_across_pages_with_another_second_page(machine: Make, what: str) -> None:
    """The template is of the whole instruction, wherever its second page lies."""
    m = machine(
        f"mov esi, 3\n mov edi, 4\n mov r8d, {FAR + 0xFFF}\n call r8\n mov ebx, eax\n"
        f"mov r8d, {NEAR_ALIAS + 0xFFF}\n call r8\n hlt"
    )
    other = FAR + 0x5000
    m.put("mov rax, rsi\n ret", FAR + 0xFFF)
    m.map(NEAR_ALIAS, FAR)
    m.memory.write(other, m.memory.read(FAR + 0x1000, 16))
    if what == "other bytes":
        m.memory.write(other, b"\x89\xf8")  # mov rax, rdi
    if what == "not RAM":
        m.map(NEAR_ALIAS + 0x1000, 0xC0000000)
    elif what != "no page":
        m.map(NEAR_ALIAS + 0x1000, other)
    m.flush()
    m.run()
    assert m["rbx"] == 3
    if what in ("other bytes", "another page"):
        assert m["rax"] == (4 if what == "other bytes" else 3)
        assert m.vcpu.blocks.block(m.vcpu.mode, NEAR_ALIAS + 0xFFF).second == other | 1
    else:
        frame = m.frame()
        assert (frame.vector, frame.rip) == (14 if what == "no page" else 6, NEAR_ALIAS + 0xFFF)
        assert what != "no page" or m.core.cr2 == NEAR_ALIAS + 0x1000
    # the return in the second page is one block more
    assert taken_up(m) == {"another page": 2, "other bytes": 1}.get(what, 0)


def test_a_template_serves_its_own_place_in_a_page_alone(machine: Make) -> None:
    m = machine("hlt")
    code = b"\x90\x90\xeb\xfe"
    for offset in (0, 0x100):
        m.memory.write(FAR + offset, code)
    store, mode, tables = m.vcpu.blocks, m.vcpu.mode, m.vcpu.blocks.tables
    first = store.block(mode, FAR)
    tables.heads[template_bucket(FAR + 0x100, mode.key, code)] = first.template
    second = store.block(mode, FAR + 0x100)
    assert taken_up(m) == 0 and second.template != first.template


def test_blocks_that_displace_each_other_in_the_table_by_address_are_found(machine: Make) -> None:
    m = machine("hlt")
    places = [0x400000, 0x440004, 0x480008]
    assert len({(at ^ at >> 16) % BLOCK_TABLE_ENTRIES for at in places}) == 1
    for number, at in enumerate(places):
        m.map(at & ~0xFFF, FAR + number * 0x1000)
        m.memory.write(FAR + number * 0x1000 + (at & 0xFFF), b"\x90" * (number + 1) + b"\xeb\xfe")
    m.flush()
    store, mode = m.vcpu.blocks, m.vcpu.mode
    numbers = [store.block(mode, at).number for at in places]
    made = translated(m)
    for _ in range(3):
        assert [store.block(mode, at).number for at in places] == numbers
    assert translated(m) == made and taken_up(m) == 0


def test_a_page_with_two_linear_addresses_is_translated_once(machine: Make) -> None:
    m = machine(
        f"mov r8, {HIGH_ALIAS}\n mov r9, {HIGH_ALIAS + 0x3000}\n call r8\n mov ebx, eax\n call r9\n mov ecx, eax\n hlt"
    )
    for address in (HIGH_ALIAS, HIGH_ALIAS + 0x3000):
        m.map(address, FAR)
    m.put(f"lea rax, [rel {FAR}]\n cmp rax, [DATA]\n jne other\n xor eax, eax\n ret\n other: shr rax, 12\n ret", FAR)
    m.halt()
    assert m["rbx"] == HIGH_ALIAS >> 12 & 0xFFFFFFFF
    assert m["rcx"] == HIGH_ALIAS + 0x3000 >> 12 & 0xFFFFFFFF
    assert taken_up(m) == 2


@pytest.mark.parametrize("bits", [32, 64])
def test_code_that_becomes_what_it_was_before(machine: Make, bits: int) -> None:
    m = machine(
        f"mov ecx, 20\n xor ebx, ebx\n mov edi, {FAR}\n top: xor byte [edi+1], 3\n call {'edi' if bits == 32 else 'rdi'}\n"
        "add ebx, eax\n dec ecx\n jnz top\n hlt", bits)  # fmt: skip
    m.put("mov eax, 1\n ret", FAR)
    m.halt()
    assert m["rbx"] == 10 * (2 + 1)
    assert taken_up(m) == 18
    assert translated(m) <= 6


def test_a_write_into_taken_up_code_is_seen(machine: Make) -> None:
    m = machine(f"mov rdi, {HIGH_ALIAS}\n call rdi\n mov ebx, eax\n mov byte [{FAR}+1], 7\n call rdi\n hlt")
    m.map(HIGH_ALIAS, FAR)
    m.put("mov eax, 1\n ret", FAR)
    m.halt()
    assert (m["rbx"], m["rax"]) == (1, 7)
    m.memory.write_u8(FAR + 1, 1)
    m.vcpu.memory_written(FAR + 1, 1)
    before = taken_up(m)
    m.restart()
    m.halt()
    assert (m["rbx"], m["rax"]) == (1, 7)
    assert taken_up(m) == before + 2


def test_links_of_taken_up_blocks_lead_to_blocks_of_their_own_page(machine: Make) -> None:
    """Two pages with the same code, mapped in turn at the same linear address; only their data differ."""
    m = machine(
        f"mov rdi, {HIGH_ALIAS}\n call rdi\n mov ebx, eax\n hlt\n again: mov rdi, {HIGH_ALIAS}\n call rdi\n hlt"
    )
    entry = m.map(HIGH_ALIAS, FAR)
    for at, value in ((FAR, 5), (FAR + 0x2000, 9)):
        m.put(f"mov ecx, 3\n xor eax, eax\n top: add eax, [rel value]\n dec ecx\n jnz top\n jmp out\n align 64\n"
              f"out: ret\n align 512\n value: dd {value}", at)  # fmt: skip
    m.halt()
    assert m["rbx"] == 15
    before = translated(m)
    m.memory.write_u64(entry, m.memory.read_u64(entry) + 0x2000)
    m.flush()
    m.halt("again")
    assert m["rax"] == 27
    assert translated(m) <= before + 2  # the caller's
    m.memory.write_u8(FAR + 0x2000 + 1, 2)
    m.vcpu.memory_written(FAR + 0x2000 + 1, 1)
    m.halt("again")
    assert m["rax"] == 18
    m.memory.write_u64(entry, m.memory.read_u64(entry) - 0x2000)
    m.flush()
    m.halt("again")
    assert m["rax"] == 15


def test_a_block_that_jumps_to_one_that_was_forgotten_and_taken_up_again(machine: Make) -> None:
    m = machine("mov ecx, 30\n xor ebx, ebx\n top: jmp there\n back: add ebx, eax\n xor byte [there+1], 3\n dec ecx\n"
                "jnz top\n hlt\n align 256\n there: mov eax, 1\n jmp back")  # fmt: skip
    m.halt()
    assert m["rbx"] == 15 * (1 + 2)
    assert m["rcx"] == 0
    assert taken_up(m) == 28


CONSTANTS = """
    mov rax, {0}
    add rax, [rax+8]
    mov rbx, [{0}+rcx*8+16]
    mov dword [rax+rdx+4088], {1}
    add dword [DATA], {0}
    movabs rdi, {0}
    cmp rbx, {0}
    lea rsi, [r10+{1}]
    mov r11d, {0}
    test [{1}+rcx], al
    sete dl
"""


def test_code_with_other_addresses_in_it(machine: Make) -> None:
    """Kernels relocate themselves: the same code with other constants, byte for byte as translated there."""
    m = machine("hlt")
    m.map(NEAR_ALIAS, FAR)
    m.flush()
    store, mode = m.vcpu.blocks, m.vcpu.mode
    for offset in (0, 0x400):
        for first, second in ((-0x7F000000, -0x7E123456), (-0x7C000000, -0x70000010), (-0x41234567, -0x7F000000)):
            m.put(CONSTANTS.format(first, second).replace("movabs", "mov"), FAR + offset)
            before = taken_up(m), translated(m)
            block = store.block(mode, FAR + offset)
            if (first, second) != (-0x7F000000, -0x7E123456):
                assert (taken_up(m), translated(m)) == (before[0] + 1, before[1])
                used, store.cache.used = store.cache.used, block.start
                made = store.translator.translate(mode, FAR + offset, m.memory.read(FAR + offset, 0x400))
                store.cache.used = used
                assert made.constants
                assert code_of(m, block, [link.number for link in made.links]) == bytes(made.code)
    m.put(CONSTANTS.format(-0x7F000000, -2).replace("movabs", "mov"), FAR)
    before = taken_up(m), translated(m)
    store.block(mode, FAR)
    assert (taken_up(m), translated(m)) == (before[0], before[1] + 1)


def test_the_last_page_of_ram(machine: Make) -> None:
    last = (64 << 20) - 0x1000
    m = machine(f"mov edi, {last}\n call rdi\n mov rdi, {HIGH_ALIAS}\n call rdi\n hlt")
    m.map(HIGH_ALIAS, last)
    m.put("inc ebx\n ret", last)
    m.memory.write(last + 0xFFC, b"\xff\xc3\xc3\xc3")
    m.halt(rbx=0)
    assert m["rbx"] == 2


def test_blocks_in_the_place_of_forgotten_ones_do_not_run_out(machine: Make) -> None:
    """Code is toggled until the code cache is full, and on."""
    m = machine(f"mov edi, {FAR}\n xor ebx, ebx\n top: xor byte [rdi+1], 3\n call rdi\n add rbx, rax\n dec ecx\n"
                "jnz top\n hlt")  # fmt: skip
    m.put("mov eax, 1\n" + "add dword [DATA], 1\n" * 40 + "ret", FAR)
    m.memory.write_u32(DATA, 0)
    m.halt(rcx=40_000)
    assert m["rbx"] == 20_000 * 3
    assert m.memory.read_u32(DATA) == 40 * 40_000
    assert m.vcpu.statistics()["translation"]["code cache flushes"] > 0
