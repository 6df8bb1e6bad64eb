"""Where guest registers live while translated code runs (see layout.py)."""

from __future__ import annotations

from iced_x86 import Register

from trivisor.translation.layout import OFFSETS
from trivisor.x86.iced_types import RegisterNumber

_NAMES8 = ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil")
_NAMES16 = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")


def _register(name: str) -> RegisterNumber:
    number: RegisterNumber = getattr(Register, name.upper())
    return number


BY_SIZE: dict[int, list[RegisterNumber]] = {
    1: [_register(n) for n in _NAMES8] + [_register(f"r{i}l") for i in range(8, 16)],
    2: [_register(n) for n in _NAMES16] + [_register(f"r{i}w") for i in range(8, 16)],
    4: [_register(f"e{n}") for n in _NAMES16] + [_register(f"r{i}d") for i in range(8, 16)],
    8: [_register(f"r{n}") for n in _NAMES16] + [_register(f"r{i}") for i in range(8, 16)],
}
"""iced's registers by size in bytes and encoding number."""

GPR: dict[int, tuple[int, int]] = {
    register: (number, size) for size, registers in BY_SIZE.items() for number, register in enumerate(registers)
}
"""(number, size) of every general register but AH, CH, DH and BH."""

HIGH_BYTES = {_register(n): i for i, n in enumerate(("ah", "ch", "dh", "bh"))}
"""AH, CH, DH, BH and the number of the register they are part of."""

SEGMENTS = {_register(n): n.upper() for n in ("es", "cs", "ss", "ds", "fs", "gs")}

S1, S2, STACK = 10, 11, 15
"""Host registers: scratch, scratch, and the guest's rsp."""
RSP = 4
DISPLACED = frozenset((S1, S2, STACK))
"""Guest registers that live in their slots."""

SLOT = OFFSETS["SLOT"]
"""Offset in the state block of a place for an operand on its way."""
SLOT_ADDRESS = OFFSETS["SLOT_ADDRESS"]

_LOW = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")


def name(number: int, size: int) -> str:
    """The host's name of general register `number` at a size in bytes."""
    if number >= 8:
        return f"r{number}" + {1: "b", 2: "w", 4: "d", 8: ""}[size]
    return {1: ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil")[number],
            2: _LOW[number], 4: "e" + _LOW[number], 8: "r" + _LOW[number]}[size]  # fmt: skip


WORD = {1: "byte", 2: "word", 4: "dword", 8: "qword"}
