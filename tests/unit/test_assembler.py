"""The assembler's language: labels, expressions, directives, branch sizes, errors.

What instructions encode to is in test_assembler_encodings.py.
"""

import random
import re

import pytest
from iced_x86 import Decoder

from trivisor.x86.assembler import AssemblyError, assemble


def data(source: str, **options: int) -> list[int]:
    """The dwords that a source text assembles to."""
    code = assemble(source, **options).code  # type: ignore[arg-type]
    return [int.from_bytes(code[i : i + 4], "little") for i in range(0, len(code), 4)]


# Labels and names


def test_labels_are_absolute_addresses() -> None:
    program = assemble("first: nop\nsecond:\n nop\nend:", origin=0x7C00)
    assert program.labels == {"first": 0x7C00, "second": 0x7C01, "end": 0x7C02}
    assert (program.code, program.origin) == (b"\x90\x90", 0x7C00)


def test_local_labels_belong_to_the_label_before_them() -> None:
    program = assemble("a: nop\n.x: jmp .x\nb: nop\n.x: jmp .x\njmp a.x\ndd .x")
    assert program.labels == {"a": 0, "a.x": 1, "b": 3, "b.x": 4}
    assert program.code == bytes.fromhex("90 ebfe 90 ebfe ebf9 04000000")


def test_local_labels_can_be_used_before_they_are_defined() -> None:
    assert assemble("a: jmp .x\n.x: nop\nb: jmp .x\nnop\n.x:").code == bytes.fromhex("eb00 90 eb01 90")


def test_names_are_case_sensitive_and_instructions_are_not() -> None:
    program = assemble("Loop1: NOP\nloop1: JMP Loop1")
    assert program.labels == {"Loop1": 0, "loop1": 1}


def test_symbols_are_constants() -> None:
    code = assemble("mov [rsp + FIELD], rax\nmov rcx, TABLE", symbols={"FIELD": 16, "TABLE": 1 << 40}).code
    assert code == bytes.fromhex("4889442410 48b90000000000010000")


def test_equ_with_constants_labels_and_forward_references() -> None:
    source = "dd A, SIZE, LATER\nA equ B * 2\nB equ 5\nstart: dd 1\nend:\nSIZE equ end - start\nLATER: equ 9"
    assert data(source, origin=1 << 40) == [10, 4, 9, 1]


def test_equ_can_name_an_address() -> None:
    assert data("nop\nalign 4, 0\nHERE equ $\ndd HERE, $, $$", origin=0x100)[1:] == [0x104, 0x104, 0x100]


def test_local_constants() -> None:
    assert data("f: dd .n\n.n equ 7\ng: dd .n, f.n\n.n equ 8") == [7, 8, 7]


# Expressions


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("1 << 4 + 1", 32),
        ("0xf0 | 1 ^ 3 & 2", 0xF3),
        ("100 / 7 - 100 % 7", 12),
        ("~5 & 0xff", 0xFA),
        ("- -3", 3),
        ("0x10 + 0b11 + 010", 29),
        ("1_000", 1000),
        ("'a'", 0x61),
        ("'ab'", 0x6261),
        ('"d" - \'a\'', 3),
        ("0x80000000 >> 31", 1),
        ("10 - 4 - 3", 3),
        ("-1", 0xFFFFFFFF),
    ],
)
def test_expressions(expression: str, value: int) -> None:
    assert data(f"dd {expression}") == [value]


def test_expressions_in_operands() -> None:
    code = assemble("mov eax, [rbx + (N - 1) * 8 - 4 + rcx * SCALE]", symbols={"N": 3, "SCALE": 4}).code
    assert code == assemble("mov eax, [rbx + rcx*4 + 12]").code


# Directives


def test_data() -> None:
    code = assemble("db 1, -1, 'a', \"bc;,\", 255\ndw 0x1234, 'x', 'abc'\ndd -2\ndq 1 << 63, -1").code
    assert code == (
        b"\x01\xffabc;,\xff" + b"\x34\x12x\0abc\0" + b"\xfe\xff\xff\xff" + bytes(7) + b"\x80" + b"\xff" * 8
    )


def test_comments_and_quotes() -> None:
    assert assemble("db ';' ; it's a comment; really\n; db 1\n db \"'\" ; \"").code == b";'"


@pytest.mark.parametrize(
    ("source", "length"),
    [("nop\nalign 8", 8), ("align 8", 0), ("times 9 nop\nalign 8", 16), ("nop\nalign 1", 1)],
)
def test_align(source: str, length: int) -> None:
    assert assemble(source).code == b"\x90" * length


def test_align_is_of_the_address_and_fills_with_the_byte_given() -> None:
    assert assemble("align 16, 0xcc\ndb 1", origin=0x1006).code == b"\xcc" * 10 + b"\x01"


def test_times() -> None:
    source = "N equ 2\ntimes N + 1 db 1, 2\ntimes 2 rep movsb\ntimes 0 hlt\ntimes 2 dd $"
    assert assemble(source).code == bytes.fromhex("010201020102 f3a4f3a4 0a000000 0e000000")


def test_boot_sector() -> None:
    source = "bits 16\nstart: cli\n.halt: hlt\njmp .halt\ntimes 510 - ($ - $$) db 0\ndw 0xaa55"
    code = assemble(source, origin=0x7C00).code
    assert (len(code), code[:4], code[-2:]) == (512, bytes.fromhex("fa f4 ebfd"), b"\x55\xaa")


def test_bits_switches_the_mode() -> None:
    source = """
        mov eax, cr0
        or al, 1
        mov cr0, eax
        jmp dword 8:protected
        bits 32
    protected:
        mov eax, 1
        jmp 0x10:long
        bits 64
    long: mov rax, cr0
    """
    program = assemble(source, bits=16, origin=0x1000)
    assert program.code == bytes.fromhex(
        "0f20c0 0c01 0f22c0 66ea101000000800 b801000000 ea1c1000001000 0f20c0"
    )


# Branches


def branches(code: bytes) -> list[tuple[int, int]]:
    """Length and target of all branches in 64-bit code."""
    return [(i.len, i.near_branch_target) for i in Decoder(64, code) if i.near_branch_target]


@pytest.mark.parametrize(("gap", "length"), [(0, 2), (127, 2), (128, 5), (129, 5)])
def test_forward_jump_is_short_where_it_reaches(gap: int, length: int) -> None:
    program = assemble(f"jmp target\ntimes {gap} nop\ntarget: nop")
    assert branches(program.code) == [(length, program.labels["target"])] == [(length, length + gap)]


@pytest.mark.parametrize(("gap", "length"), [(125, 2), (126, 2), (127, 6)])
def test_backward_jump_is_short_where_it_reaches(gap: int, length: int) -> None:
    program = assemble(f"nop\ntarget: times {gap} nop\njne target")
    assert branches(program.code) == [(length, 1)]


def test_one_branch_that_grows_pushes_another_out_of_reach() -> None:
    source = "jmp a\njmp b\ntimes 124 nop\na: nop\ntimes 3 nop\nb: nop"
    program = assemble(source)
    assert branches(program.code) == [(5, program.labels["a"]), (5, program.labels["b"])]


def test_any_white_space_separates_words() -> None:
    assert assemble("a:\tlock\tadd\tdword\t[rax],1\n\tjmp\tshort\ta").code == bytes.fromhex("f0830001 ebfa")


def test_near_and_short_are_obeyed() -> None:
    code = assemble("a: jmp near a\njne near a\njmp short a\ncall a").code
    assert code == bytes.fromhex("e9fbffffff 0f85f5ffffff ebf3 e8eeffffff")


def test_branch_to_a_constant_address_depends_on_where_it_stands() -> None:
    source = "call HELPER\ncall HELPER\nmov eax, [rel HELPER]\nmov eax, [rel HELPER]"
    code = assemble(source, origin=0x10000, symbols={"HELPER": 0x20000}).code
    instructions = list(Decoder(64, code, ip=0x10000))
    assert [i.near_branch_target or i.ip_rel_memory_address for i in instructions] == [0x20000] * 4


def test_code_high_in_the_address_space() -> None:
    origin = 0xFFFF_FFFF_8000_0000
    program = assemble("a: lea rax, [rel b]\njmp b\ntimes 200 nop\nb: jmp a\ndq b", origin=origin)
    assert program.labels["b"] == origin + 7 + 5 + 200
    assert program.code[-8:] == program.labels["b"].to_bytes(8, "little")


def test_16_bit_branches_stay_in_their_segment() -> None:
    assert assemble("jmp 0xfff0", bits=16, origin=0xF_0010).code == bytes.fromhex("ebde")


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_come_to_rest_with_all_targets_right(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(2, 60)
    targets, lines = [], []
    for number in range(count):
        lines.append(f"l{number}:")
        for _ in range(rng.randrange(3)):
            targets.append(rng.randrange(count))
            lines.append(f"{rng.choice(['jmp', 'jne', 'call'])} l{targets[-1]}")
        lines.append(f"times {rng.randrange(60)} nop\nalign {1 << rng.randrange(5)}")
    program = assemble("\n".join(lines), origin=0x1000)
    decoded = [i for i in Decoder(64, program.code, ip=0x1000) if i.near_branch_target]
    assert [i.near_branch_target for i in decoded] == [program.labels[f"l{target}"] for target in targets]
    too_long = [i for i in decoded if i.len > 5 and -0x7C <= i.near_branch_target - i.next_ip <= 0x7B]
    assert not too_long


# Values that labels decide


def test_immediate_takes_the_size_that_labels_ask_for() -> None:
    small = assemble("add eax, end - start\nstart: times 100 nop\nend:").code
    large = assemble("add eax, end - start\nstart: times 200 nop\nend:").code
    assert (small[:3], large[:5]) == (bytes.fromhex("83c064"), bytes.fromhex("05c8000000"))


def test_displacement_takes_the_size_that_labels_ask_for() -> None:
    small = assemble("mov eax, [rbx + end - start]\nstart: times 100 nop\nend:").code
    large = assemble("mov eax, [rbx + end - start]\nstart: times 200 nop\nend:").code
    assert (small[:3], large[:6]) == (bytes.fromhex("8b4364"), bytes.fromhex("8b83c8000000"))


def test_rip_relative_label_with_an_immediate_behind_it() -> None:
    program = assemble("mov dword [rel value], 0x11223344\ncmp byte [rel value], 5\nvalue: dd 0")
    addresses = [i.ip_rel_memory_address for i in list(Decoder(64, program.code))[:2]]
    assert addresses == [program.labels["value"]] * 2


# Errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nop\n\n frob eax ; no such thing", "line 3: no instruction 'frob': frob eax ; no such thing"),
        ("nop\njmp nowhere", "line 2: undefined symbol 'nowhere': jmp nowhere"),
        ("mov eax, [rel nowhere]", "line 1: undefined symbol 'nowhere'"),
        ("dq A\nA equ B", "line 2: undefined symbol 'B'"),
        ("a:\na:", "line 2: 'a' is defined twice"),
        ("a:\n.b:\n.b:", "line 3: 'a.b' is defined twice"),
        ("A equ 1\nA equ 2", "line 2: 'A' is defined twice"),
        ("eax: nop", "line 1: 'eax' is a register"),
        ("jmp short a\ntimes 200 nop\na:", "line 1: branch target 0xca is out of reach"),
        ("loop a\ntimes 200 nop\na:", "line 1: branch target 0xca is out of reach"),
        ("jmp 0x100000000000", "line 1: branch target 0x100000000000 is out of reach"),
        ("bits 48", "line 1: code has 16, 32 or 64 bits"),
        ("align 3", "line 1: align takes a power of two"),
        ("times -1 nop", "line 1: cannot repeat -1 times"),
        ("times 3", "line 1: times takes a count and an instruction or directive"),
        ("times 0x1000000 dq 0", "line 1: cannot repeat 8 bytes 16777216 times"),
        ("db 256", "line 1: 0x100 does not fit in 8 bits"),
        ("db 'a", "line 1:"),
        ("db", "line 1: expression expected"),
        ("mov ecx, [a]\na: nop", "line 1: address does not fit in 32 bits; use [rel ...] or a register"),
    ],
)
def test_errors_name_the_line(source: str, message: str) -> None:
    with pytest.raises(AssemblyError, match="^" + re.escape(message)):
        assemble(source, origin=0 if "reach" in message else 1 << 40)


def test_bits_and_symbols_are_checked() -> None:
    with pytest.raises(AssemblyError):
        assemble("nop", bits=8)
    with pytest.raises(AssemblyError, match="'a' is defined twice"):
        assemble("a: nop", symbols={"a": 1})


def test_labels_that_never_come_to_rest_are_an_error() -> None:
    with pytest.raises(AssemblyError, match="come to rest"):
        assemble("a: times 1 - (b - a) nop\nb:")
