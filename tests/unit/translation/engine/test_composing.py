"""The native composer makes of known instructions what Python makes of them, byte for byte (natives/compose.py)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from struct import unpack_from

import pytest
from iced_x86 import Decoder

from tests.golden.corpus import SAMPLES
from tests.unit.translation.engine.guest import CODE, Machine
from trivisor.insight.differential.generator import Generator
from trivisor.translation import instruction_lengths as lengths
from trivisor.translation.block_tables import LINK_DESCRIPTION, TEMPLATE, TEMPLATE_SIZE, template_bucket
from trivisor.translation.layout import OFFSETS
from trivisor.translation.modes import Mode
from trivisor.translation.translator.translator import fits
from trivisor.x86.assembler import assemble

HIGH = 0xFFFFFFFF81000000
FAR = 0x7F1234560000
_COMPOSED = OFFSETS["COUNT_COMPOSED"] // 8


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = Machine("hlt")
    yield made
    made.close()


def _image_and_record(m: Machine, template: int) -> tuple[bytes, bytes]:
    """A template as it is kept, without what its block or its list has put into it."""
    tables = m.vcpu.blocks.tables
    record = bytearray(tables.templates[template * TEMPLATE_SIZE : (template + 1) * TEMPLATE_SIZE])
    for field in ("T_NEXT", "T_USES"):
        record[TEMPLATE[field] : TEMPLATE[field] + 4] = bytes(4)
    record[TEMPLATE["T_LASTING"]] = 0
    record[TEMPLATE["T_BUCKET"] : TEMPLATE["T_BUCKET"] + 2] = bytes(2)
    return bytes(_without_numbers(m.vcpu.blocks.image(template), record)), bytes(record)


def _without_numbers(image: bytes, record: bytes) -> bytearray:
    """An image whose links are not numbered yet."""
    out = bytearray(image)
    (code,) = unpack_from("<I", record, TEMPLATE["T_CODE"])
    (relocations,) = unpack_from("<H", record, TEMPLATE["T_RELOCATIONS"])
    at = (code + 3 & ~3) + 4 * relocations
    for link in range(record[TEMPLATE["T_LINKS"]]):
        _, _, number, _, _ = LINK_DESCRIPTION.unpack_from(image, at + link * LINK_DESCRIPTION.size)
        out[number : number + 4] = bytes(4)
    return out


def _compare(m: Machine, mode: Mode, rip: int, page: int) -> bool:
    """Whether the block at `rip`, in physical `page`, can be composed; then it is as Python makes it."""
    blocks = m.vcpu.blocks
    code = m.memory.read(page | rip & 0xFFF, 0x1000 - (rip & 0xFFF))
    tables = blocks.tables
    tables.heads[template_bucket(rip, mode.key, code)] = 0
    composed = m.core.words[_COMPOSED]
    number = blocks._find(rip, page | mode.key) or blocks._compose(mode, rip, page | mode.key, code)
    if not number:
        return False
    assert m.core.words[_COMPOSED] == composed + 1
    template = tables.block_words[number * 16 + 8]
    (bucket,) = unpack_from("<H", tables.templates, template * TEMPLATE_SIZE + TEMPLATE["T_BUCKET"])
    assert bucket == template_bucket(rip, mode.key, code)
    image, record = _image_and_record(m, template)
    used = blocks.cache.used
    blocks.cache.used = start = tables.template_image(template)
    made = blocks.translator.translate(mode, rip, code)
    expected, expected_image = made.keep(mode.key, start, code[: made.length])
    blocks.cache.used = used
    blocks.native.forget_block(number)
    (length,) = unpack_from("<H", record, TEMPLATE["T_LENGTH"])
    if length != made.length:
        # Before the end of a page one need not see that an instruction is none.
        *_, last = Decoder(64, code[: made.length])
        assert last.is_invalid
        assert length == made.length - last.len
        return True
    plain = bytearray(expected)
    plain[TEMPLATE["T_LASTING"]] = 0
    assert record == bytes(plain), code[: made.length].hex()
    assert image == bytes(_without_numbers(expected_image, plain)), code[: made.length].hex()
    return True


@pytest.mark.parametrize("base", [0x400000, HIGH, FAR])
@pytest.mark.parametrize("user", [False, True])
def test_the_golden_corpus_is_composed_as_python_lays_it_out(machine: Machine, base: int, user: bool) -> None:
    composed = 0
    for number, sample in enumerate(SAMPLES):
        rip = base + 0x1000 + (number * 17) % 2000
        program = assemble(sample.source, bits=64, origin=rip)
        machine.memory.write(CODE | rip & 0xFFF, program.code.ljust(64, b"\x90"))
        composed += _compare(machine, Mode(user=user), rip, CODE)
    assert composed > len(SAMPLES) // 2


def test_random_instructions_are_composed_as_python_lays_them_out(machine: Machine) -> None:
    """Blocks of every unprivileged instruction there is, up to the end of the page."""
    generator = Generator(machine.vcpu.blocks.translator.features, 64)
    composed = tried = 0
    for number in range(600):
        code = generator.case(f"compose {number}").layout().code
        chance = random.Random(number)
        rip = chance.choice((0x400000, HIGH, FAR)) + chance.choice((0, 0x123, 0x1000 - len(code) - 3, 0xFC0))
        at = rip & 0xFFF
        machine.memory.write(CODE | at, (code * 20)[: 0x1000 - at])
        for instruction in Decoder(64, code[: 0xFE0 - at], ip=rip):
            tried += 1
            composed += _compare(machine, Mode(user=bool(number & 1)), instruction.ip, CODE)
    assert tried > 2000
    assert composed > tried // 2


@pytest.mark.parametrize("table", [lengths.ONE_BYTE, lengths.TWO_BYTES])
def test_tables_of_lengths_agree_with_the_decoder(table: bytes) -> None:
    """With every operand size, every ModRM form and every group's member."""
    escape = b"\x0f" if table is lengths.TWO_BYTES else b""
    for opcode, form in enumerate(table):
        if form >= lengths.UNKNOWN:
            continue
        for prefix in (b"", b"\x66", b"\x48", b"\xf3"):
            for modrm in range(256) if form & lengths.MODRM else (0,):
                code = prefix + escape + bytes((opcode, modrm)) + b"\x25" + b"\x11" * 12
                decoder = Decoder(64, code)
                instruction = decoder.decode()
                if instruction.is_invalid or (form & lengths.NEAR_BRANCH and prefix == b"\x66"):
                    continue
                offsets = decoder.get_constant_offsets(instruction)
                displacement, immediate = _constants(form, prefix, modrm)
                assert (offsets.displacement_size, offsets.immediate_size) == (displacement, immediate), code.hex()


def _constants(form: int, prefix: bytes, modrm: int) -> tuple[int, int]:
    displacement = 0
    if form & lengths.MODRM and modrm < 0xC0:
        displacement = {0: 4 if modrm & 7 in (4, 5) else 0, 1: 1, 2: 4}[modrm >> 6]
    if form & lengths.TEST_GROUP and modrm & 0x30:
        return displacement, 0
    if form & lengths.IMMEDIATE_8:
        return displacement, 1
    if form & lengths.IMMEDIATE_16:
        return displacement, 2
    if form & lengths.NEAR_BRANCH:
        return displacement, 4
    if form & lengths.IMMEDIATE_V and prefix == b"\x48":
        return displacement, 8
    if form & (lengths.IMMEDIATE_Z | lengths.IMMEDIATE_V):
        return displacement, 2 if prefix == b"\x66" else 4
    return displacement, 0


def test_what_does_not_fit_32_bits_any_more_is_not_composed(machine: Machine) -> None:
    """A rip-relative operand beyond the near code's reach is for Python."""
    near, far = HIGH, 0x7EFFF000
    assert fits(near)
    assert fits(far)
    load = bytes.fromhex("488b05f0ffff07c3")  # mov rax, [rip+0x7fffff0]; ret
    machine.memory.write(CODE, load)
    assert _compare(machine, Mode(), near, CODE)
    assert not _compare(machine, Mode(), far, CODE)


FAMILY_OPERATIONS = (
    "mov {a}, [{b}+8]", "mov [{b}+{c}*4], {a}", "add {a}, [{b}+{c}*8+0x12345]", "lea {a}, [{b}+{c}+5]", "lea {a}, [{b}]",
    "cmp {a}, {b}", "xor {a}, {a}", "imul {a}, {b}, 100", "imul {a}, [{b}], 5", "movzx {a}, byte [{b}-1]",
    "movzx {a}, word [{c}*2+{b}]", "lock cmpxchg [{b}+16], {c}", "xchg {a}, [{b}]", "xadd [{b}+4], {a}", "cmovne {a}, [{b}]",
    "sete [{b}+{c}]", "inc qword [{b}+8]", "shl dword [{b}], 1", "test {a}, {b}", "bt {a}, {b}", "mov [gs:{b}+8], {a}",
    "popcnt {a}, [{b}]", "movsxd {a}, [{b}+8]", "shld [{b}], {a}, 5", "call {a}", "call [{b}+8]", "push qword [{b}]",
    "div qword [{b}]", "div {a}", "mul {a}", "bts [{b}], {a}", "mov byte [{b}], 5", "mov word [{b}+{c}*2+300], 5", "mov {a}, [rsp+8]", "mov [rsp+{c}], {a}", "mov {a}, [rel 0x400100]",
    "mov {a}, [{c}*8+0x601000]", "mov {a}, [0x601000]", "mov r10, [{b}+{c}]", "add [{b}+8], r11", "lea r15, [{b}+{c}*4]",
    "shl {a}, 5", "rol dword [{b}+8], 3", "sar qword [{b}+{c}], 63", "lea {a}, [rsp+16]", "mov {a}, [gs:rel 0x400100]", "lea {a}, [rel 0x400200]",
)  # fmt: skip


def test_families_with_every_register_are_composed_as_python_lays_them_out(machine: Machine) -> None:
    """Each operation with sixteen registers in each place: one of the first teaches the others."""
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
    chance = random.Random(5)
    told = composed = 0
    for operation in FAMILY_OPERATIONS:
        combinations = [(a, b, c) for a in names for b in names for c in names if c != "rsp"]
        for a, b, c in chance.sample(combinations, 60):
            source = operation.format(a=a, b=b, c=c)
            if "movsxd" in operation:
                source = source.replace(", [", ", dword [")
            code = assemble(source + "\n jmp rax", bits=64).code
            machine.memory.write(CODE, code.ljust(32, b"\x90"))
            before = len(machine.vcpu.blocks.shapes._recipes)
            composed += _compare(machine, Mode(), 0x400000, CODE)
            told += len(machine.vcpu.blocks.shapes._recipes) - before
    assert composed == 60 * len(FAMILY_OPERATIONS)
    assert told < composed * 0.8
