"""Code that changes: what is executed is always what memory holds (Intel SDM 3A 8.1.3; no jump is needed)."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import CODE, DATA, TSS, Make
from trivisor.machine.exits import PortOut
from trivisor.translation.block_tables import Block

FAR = 0x400000
"""Code in another page."""
ALIAS = 0x10_0000_0000
"""A second linear address of it."""


@pytest.mark.parametrize("store", ["mov byte [next+1], 9", "mov [rbx], cl", "mov dword [next+1], 9", "xchg [rbx], cl",
                                   "add byte [next+1], 8", "lock or byte [rbx], 8"])  # fmt: skip
def test_a_store_into_the_next_instruction(machine: Make, store: str) -> None:
    m = machine(f"xor edx, edx\n {store}\n next: mov eax, 1\n inc edx\n hlt")
    m.halt(rbx=m.labels["next"] + 1, rcx=9)
    assert m["rax"] in (9,), m["rax"]
    assert m["rdx"] == 1


def test_a_store_into_the_block_before(machine: Make) -> None:
    m = machine("mov ecx, 10\n xor edx, edx\n top: add edx, 1\n inc byte [top+2]\n dec ecx\n jnz top\n hlt")
    m.halt()
    assert m["rdx"] == sum(range(1, 11))


def test_a_store_into_the_storing_instruction_itself(machine: Make) -> None:
    """The instruction that has begun is carried out as it was; the next time round it is the new one."""
    m = machine("mov ecx, 2\n top: mov byte [top+7], 0x55\n mov al, [top+7]\n dec ecx\n jnz top\n hlt")
    raw = m.memory.read(m.labels["top"], 16)
    assert raw[7] == 0x55  # the immediate
    m = machine("mov ecx, 2\n top: mov byte [top+7], 0x66\n dec ecx\n jnz top\n hlt")
    m.memory.write_u8(m.labels["top"] + 7, 0x77)
    m.halt()
    assert m.memory.read_u8(m.labels["top"] + 7) == 0x77


def test_a_loop_that_writes_the_immediate_of_a_call_s_target_in_another_page(machine: Make) -> None:
    m = machine(
        f"mov ecx, 100\n xor ebx, ebx\n top: mov [{FAR}+1], ecx\n mov edx, {FAR}\n call rdx\n add ebx, eax\n"
        "dec ecx\n jnz top\n hlt"
    )
    m.put("mov eax, 0\n ret", FAR)
    m.halt()
    assert m["rbx"] == 5050


def test_data_beside_code_in_a_page_is_written_without_forgetting_the_code(machine: Make) -> None:
    m = machine("mov ecx, 1000\n top: inc dword [counter]\n dec ecx\n jnz top\n hlt\n align 64\n counter: dd 0")
    m.halt()
    assert m.memory.read_u32(m.labels["counter"]) == 1000
    assert m.vcpu.statistics()["translation"]["invalidated"] == 0


def test_data_in_the_line_of_the_code(machine: Make) -> None:
    m = machine("mov ecx, 300\n top: inc dword [counter]\n dec ecx\n jnz top\n hlt\n counter: dd 0")
    m.halt()
    assert m.memory.read_u32(m.labels["counter"]) == 300


@pytest.mark.parametrize("move", ["rep movsb", "mov ecx, 8\n rep movsd", "mov ecx, 4\n rep movsq"])
def test_a_repeated_move_over_code(machine: Make, move: str) -> None:
    m = machine(
        f"mov edi, {FAR}\n call rdi\n mov ebx, eax\n mov esi, new\n mov edi, {FAR}\n mov ecx, 32\n {move}\n"
        f"mov edi, {FAR}\n call rdi\n hlt\n new: mov eax, 2\n ret\n times 40 nop"
    )
    m.put("mov eax, 1\n ret", FAR)
    m.halt()
    assert (m["rbx"], m["rax"]) == (1, 2)


def test_a_repeated_store_over_its_own_page(machine: Make) -> None:
    m = machine("call there\n mov edi, there\n mov al, 0x90\n mov ecx, 5\n rep stosb\n mov eax, 7\n call there\n hlt\n"
                "align 128\n there: mov eax, 1\n ret")  # fmt: skip
    m.halt()
    assert m["rax"] == 7


def test_a_repeated_store_over_the_next_instruction(machine: Make) -> None:
    m = machine("mov edi, next\n mov al, 0x90\n mov ecx, 2\n rep stosb\n next: ud2\n hlt")
    m.halt()


def test_a_repeated_store_over_itself(machine: Make) -> None:
    """It goes on to its end, as one instruction."""
    m = machine("mov edi, there\n mov al, 0x90\n mov ecx, 4\n there: rep stosb\n nop\n nop\n hlt")
    m.halt()
    assert m["rcx"] in (0, 2, 3)  # a processor may refetch between iterations
    assert m.memory.read(m.labels["there"], 1) == b"\x90"


def test_a_code_page_with_two_linear_addresses(machine: Make) -> None:
    m = machine(
        f"mov r8, {ALIAS}\n mov r9d, {FAR}\n call r8\n mov ebx, eax\n mov dword [r9+1], 2\n call r8\n mov ecx, eax\n"
        "mov dword [r8+1], 3\n call r9\n mov edx, eax\n call r8\n hlt"
    )
    m.map(ALIAS, FAR)
    m.put("mov eax, 1\n ret", FAR)
    m.halt()
    assert (m["rbx"], m["rcx"], m["rdx"], m["rax"]) == (1, 2, 3, 3)


def test_a_writable_address_that_was_in_the_tlb_before_the_page_had_code(machine: Make) -> None:
    """Both views of the TLB have the page writable, then its code is translated: the writes must be seen."""
    m = machine(
        f"mov r8, {ALIAS}\n mov r9d, {FAR}\n mov byte [r8+0x800], 1\n mov byte [r9+0x800], 1\n call r9\n mov ebx, eax\n"
        "mov dword [r8+1], 5\n call r9\n mov ecx, eax\n mov dword [r9+1], 6\n call r9\n hlt"
    )
    m.map(ALIAS, FAR)
    m.put("mov eax, 1\n ret", FAR)
    m.halt()
    assert (m["rbx"], m["rcx"], m["rax"]) == (1, 5, 6)


@pytest.mark.parametrize("split", range(1, 5))
@pytest.mark.parametrize("access", ["dword", "byte"])
def test_an_instruction_across_pages_with_either_page_rewritten(machine: Make, split: int, access: str) -> None:
    at = FAR + 0x1000 - split
    m = machine(
        f"mov edi, {at}\n call rdi\n mov ebx, eax\n mov byte [rdi+1], 2\n call rdi\n mov ecx, eax\n"
        "mov byte [rdi+4], 4\n call rdi\n mov edx, eax\n mov byte [rdi+2], 5\n call rdi\n hlt"
        if access == "byte"
        else f"mov edi, {at}\n call rdi\n mov ebx, eax\n mov dword [rdi+1], 2\n call rdi\n mov ecx, eax\n"
        "mov dword [rdi+1], 0x04000002\n call rdi\n mov edx, eax\n mov dword [rdi+1], 0x04000502\n call rdi\n hlt"
    )
    m.put("mov eax, 1\n ret", at)
    m.halt()
    assert (m["rbx"], m["rcx"], m["rdx"], m["rax"]) == (1, 2, 0x04000002, 0x04000502)


def test_a_store_across_two_code_pages(machine: Make) -> None:
    m = machine(f"mov edi, {FAR}+0xffa\n call rdi\n mov rax, 0xc300000007b89090\n mov [rdi], rax\n call rdi\n hlt")
    m.put("nop\n mov eax, 1\n nop\n ret", FAR + 0xFFA)
    m.halt()
    assert m["rax"] == 7


def test_memory_written_from_outside(machine: Make) -> None:
    m = machine(f"mov edi, {FAR}\n call rdi\n hlt")
    m.put("mov eax, 1\n ret", FAR)
    m.halt()
    assert m["rax"] == 1
    m.memory.write_u32(FAR + 1, 2)
    m.vcpu.memory_written(FAR + 1, 4)
    m.halt(CODE)
    assert m["rax"] == 2
    m.memory.write(FAR - 0x1000, bytes(0x1001) + b"\x03")
    m.memory.write(FAR, b"\xb8\x04\0\0\0\xc3")
    m.vcpu.memory_written(FAR - 0x1000, 0x1010)
    m.halt(CODE)
    assert m["rax"] == 4


def test_a_device_writes_code_while_the_guest_runs(machine: Make) -> None:
    m = machine(f"mov edi, {FAR}\n mov ecx, 5\n xor ebx, ebx\n top: out 0x80, al\n call rdi\n add ebx, eax\n"
                "dec ecx\n jnz top\n hlt")  # fmt: skip
    m.put("mov eax, 0\n ret", FAR)
    values = iter(range(1, 6))

    def change(_: PortOut) -> None:
        m.memory.write_u32(FAR + 1, next(values))
        m.vcpu.memory_written(FAR + 1, 4)

    m.on_port(change)
    m.halt()
    assert m["rbx"] == 15


def test_code_read_by_a_device_in_its_own_block(machine: Make) -> None:
    """INS writes the very next instruction."""
    m = machine("mov edi, next+1\n mov dx, 0x3f9\n cld\n insb\n next: mov al, 0x55\n hlt")
    m.halt()
    assert m["rax"] & 0xFF == m.memory.read_u8(m.labels["next"] + 1) != 0x55


@pytest.mark.parametrize("event", ["int 0x80", "mov eax, [r8]"])
def test_the_frame_of_an_exception_over_code(machine: Make, event: str) -> None:
    """The words that delivery writes are code of a block known before; they become `mov eax, 5; ret`."""
    m = machine(
        f"mov edi, {FAR}-16\n call rdi\n mov ebx, eax\n mov rax, 0xc300000005b8\n mov r8, {ALIAS}\n mov rsp, rax\n"
        f"{event}\n handler: mov rsp, STACK\n call rdi\n hlt"
    )
    m.put("mov eax, 1\n ret", FAR - 16)  # where the frame has RSP
    m.gate(0x80, "handler", ist=1)
    m.gate(14, "handler", ist=1)
    m.memory.write_u64(TSS + 36, FAR)
    m.halt()
    assert (m["rbx"], m["rax"]) == (1, 5)


def test_pushes_over_code(machine: Make) -> None:
    m = machine(f"mov edi, {FAR}\n call rdi\n mov ebx, eax\n mov rbp, rsp\n mov rsp, {FAR}+8\n mov rax, 0xc300000009b8\n"
                "push rax\n mov rsp, rbp\n call rdi\n hlt")  # fmt: skip
    m.put("mov eax, 1\n ret", FAR)
    m.memory.write(FAR, b"\xb8\x01\0\0\0\xc3")
    m.halt()
    assert (m["rbx"], m["rax"]) == (1, 9)


def test_a_chain_of_jumps_within_a_page_to_code_that_changes(machine: Make) -> None:
    m = machine(
        "mov ecx, 4\n xor ebx, ebx\n top: jmp there\n back: add ebx, eax\n inc byte [there+1]\n dec ecx\n jnz top\n hlt\n"
        "align 256\n there: mov eax, 1\n jmp back"
    )
    m.halt()
    assert m["rbx"] == 1 + 2 + 3 + 4


@pytest.mark.parametrize("bits", [32, 64])
def test_code_made_anew_again_and_again(machine: Make, bits: int) -> None:
    """What a just-in-time compiler does; the list of a page's blocks does not grow with it."""
    m = machine(f"mov ecx, 200\n top: mov edi, {DATA}\n mov byte [edi], 0xb8\n mov [edi+1], ecx\n mov byte [edi+5], 0xc3\n"
                f"call {'edi' if bits == 32 else 'rdi'}\n cmp eax, ecx\n jne bad\n dec ecx\n jnz top\n hlt\n bad: ud2", bits)  # fmt: skip
    m.halt()
    assert (m["rcx"], m["rax"]) == (0, 1)
    tables = m.vcpu.blocks.tables
    blocks, number = 0, tables.page_blocks[DATA >> 12]
    while number:
        blocks, number = blocks + 1, Block(tables, number).next
    assert blocks <= 1


def test_a_page_freed_of_code_is_fast_to_write_again(machine: Make) -> None:
    m = machine(f"mov edi, {FAR}\n call rdi\n mov ecx, 4096/8\n xor eax, eax\n rep stosq\n mov edi, {FAR}\n mov ecx, 1000\n"
                "top: mov [rdi], rcx\n dec ecx\n jnz top\n hlt")  # fmt: skip
    m.put("mov eax, 1\n ret", FAR)
    m.halt()
    exits = m.vcpu.statistics()["exits"]
    assert "slow_access" not in exits
