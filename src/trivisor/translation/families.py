"""Families: instructions that differ in nothing but ordinary registers and constants (see shapes.py).

`mov rax, [rbx+8]` and `mov rcx, [rdi+16]` become the same code but for the register numbers in it, and these stand in
the guest's bytes.  So the composer knows such instructions by their bytes with the register numbers blanked too, and
puts the numbers into their places.  Registers are ordinary if they are in the host's register of the same name and
need no form of their own: all but rsp, r10, r11 and r15.  Where the operand or the address has another, that is part
of what the family has in common.

The encoding is Intel SDM 2A 2.1 and 2.2.1.
"""

from __future__ import annotations

from typing import NamedTuple

from trivisor.translation import instruction_lengths as lengths
from trivisor.translation.translator.recipe import Recipe

REG = 1
"""ModRM.reg is a general register."""
GROUP = 2
"""... part of the opcode."""
BYTE = 4
"""... a register of a byte, which may be AH to BH if there is no REX."""
COUNT = 8
"""The immediate decides which flags change, and is part of the opcode like GROUP."""

FIELD_RAW, FIELD_ADDRESS, FIELD_OPERAND, FIELD_TARGET = range(4)
"""What of a variant's code is to be filled in:

the instruction itself; REX, ModRM and SIB of a LEA with its memory operand; REX.R and ModRM.reg, which are at this
distance from one another; REX.B and ModRM.rm from the guest's REX.R and ModRM.reg."""

SPECIAL = 1 << 4 | 1 << 10 | 1 << 11 | 1 << 15
"""Registers by number that are not ordinary."""


def _forms(parts: dict[int, list[int | range]]) -> bytes:
    table = bytearray(256)
    for form, opcodes in parts.items():
        for part in opcodes:
            for opcode in (part,) if isinstance(part, int) else part:
                table[opcode] = form
    return bytes(table)


_ARITHMETIC = range(0, 0x40, 8)
ONE_BYTE = _forms(
    {
        REG | BYTE: [
            *(at for at in _ARITHMETIC), *(at + 2 for at in _ARITHMETIC), 0x84, 0x86, 0x88, 0x8A,
        ],
        REG: [
            *(at + 1 for at in _ARITHMETIC), *(at + 3 for at in _ARITHMETIC), 0x63, 0x69, 0x6B, 0x85, 0x87, 0x89,
            0x8B, 0x8D,
        ],
        GROUP | COUNT: [0xC0, 0xC1],
        GROUP: [0x80, 0x81, 0x83, 0xC6, 0xC7, range(0xD0, 0xD4), 0xF6, 0xF7, 0xFE, 0xFF],
    }
)  # fmt: skip
"""Of opcodes of one byte; 0: no family."""
TWO_BYTES = _forms(
    {
        REG: [
            range(0x40, 0x50), 0xA3, 0xA4, 0xA5, 0xAB, 0xAC, 0xAD, 0xAF, 0xB1, 0xB3, 0xB6, 0xB7, 0xB8, 0xBB, 0xBC, 0xBD,
            0xBE, 0xBF, 0xC1,
        ],
        REG | BYTE: [0xB0, 0xC0],
        GROUP: [range(0x90, 0xA0), 0xBA],
    }
)  # fmt: skip


def counts(raw: bytes) -> bool:
    """Whether the instruction is one of `COUNT`."""
    return bool(_form(raw)[0] & COUNT)


def _form(raw: bytes) -> tuple[int, int, int]:
    """(its form, the offset of what follows the opcode, that of REX or -1) of an instruction."""
    at = 0
    while lengths.ONE_BYTE[raw[at]] in (lengths.PREFIX, lengths.OPERAND_SIZE):
        at += 1
    rex_at = -1
    if lengths.ONE_BYTE[raw[at]] == lengths.REX:
        rex_at = at
        at += 1
    if raw[at] == 0x0F:
        return TWO_BYTES[raw[at + 1]], at + 2, rex_at
    return ONE_BYTE[raw[at]], at + 1, rex_at


class Registers(NamedTuple):
    """Where an instruction has register numbers that its family leaves open."""

    rex_at: int
    """-1 if it has no REX."""
    modrm_at: int
    operand: bool
    """ModRM.reg is open."""
    address: bool
    """The registers of the memory operand are."""
    blanked: bytes
    """The instruction with zeros in place of the open numbers."""


def registers_of(raw: bytes) -> Registers | None:
    """The register numbers of an instruction; None if it is of no family."""
    form, at, rex_at = _form(raw)
    if not form:
        return None
    rex = raw[rex_at] if rex_at >= 0 else 0
    modrm = raw[at]
    memory = modrm < 0xC0
    number = modrm >> 3 & 7 | (rex & 4) << 1
    high = form & BYTE and memory and rex_at < 0 and number >= 4
    operand = bool(form & REG) and not (SPECIAL >> number & 1 or high)
    rm = _open_address(modrm, raw[at + 1 :], rex)
    if not memory and not (rm and (operand or not form & REG)):
        return None
    if not operand and not rm:
        return None
    blanked = bytearray(raw)
    if operand:
        blanked[at] &= 0xC7
        rex &= ~4
    if rm:
        rex &= ~3
        if memory and modrm & 7 == 4:
            blanked[at + 1] &= 0xC0
        else:
            blanked[at] &= 0xF8
    if rex_at >= 0:
        blanked[rex_at] = rex
    return Registers(rex_at, at, operand, memory and rm, bytes(blanked))


def _open_address(modrm: int, after: bytes, rex: int) -> bool:
    """Whether ModRM.rm, or base and index of a SIB byte, name ordinary registers."""
    if modrm < 0xC0 and modrm & 7 == 4:
        base, index = after[0] & 7, after[0] >> 3 & 7 | (rex & 2) << 2
        numbers = 1 << (base | (rex & 1) << 3) | 1 << index
    else:
        base, numbers = modrm & 7, 1 << (modrm & 7 | (rex & 1) << 3)
        if rex & 2:
            return False
    return not numbers & SPECIAL and not (modrm < 0x40 and base == 5)


Fields = dict[int, tuple[tuple[int, int, int], ...]]
"""`Item.fields` by the numbers of a recipe's items."""


def find_fields(recipe: Recipe, raw: bytes, registers: Registers) -> Fields | None:
    """In which of a recipe's items the open numbers stand; None: it is not known."""
    items = recipe.items
    modrm = raw[registers.modrm_at]
    if modrm >= 0xC0:
        if len(items) == 1 and items[0].is_op and items[0].code == raw:
            return {0: ((0, FIELD_RAW, 0),)}
        return None
    if len(items) < 2 or not items[-1].is_op or any(item.is_op for item in items[:-1]):
        return None
    rex = raw[registers.rex_at] if registers.rex_at >= 0 else 0
    found: Fields = {}
    if registers.address:
        if not _is_lea(items[0].code, rex, modrm, raw[registers.modrm_at + 1 :]):
            return None
        found[0] = ((0, FIELD_ADDRESS, 0),)
    if registers.operand:
        number = modrm >> 3 & 7 | (rex & 4) << 1
        field = _operand(items[-1].code, number, is_lea=raw[registers.modrm_at - 1] == 0x8D)
        if field is None:
            return None
        found[len(items) - 1] = (field,)
    return found


def _is_lea(code: bytes, rex: int, modrm: int, after: bytes) -> bool:
    """Whether it is LEA of r10 with the guest's operand, whose ModRM byte `after` follows."""
    return (
        len(code) > 2
        and code[0] & 0xF7 == 0x44 | rex & 3
        and code[1] == 0x8D
        and code[2] == modrm & 0xC7 | 0x10
        and (modrm & 7 != 4 or code[3] == after[0])
    )


def _operand(code: bytes, number: int, *, is_lea: bool) -> tuple[int, int, int] | None:
    """The field of a general register `number` in an instruction of the host's whose other operand is [r10]."""
    at = 0
    while code[at] in (0x66, 0xF0, 0xF2, 0xF3):
        at += 1
    rex_at, rex = at, code[at]
    if rex & 0xF0 != 0x40:
        return None
    at += 2 if code[at + 1] != 0x0F else 3
    modrm = code[at]
    if is_lea:
        # mov target, r10
        if code[at - 1] != 0x89 or modrm < 0xC0 or modrm & 7 | (rex & 1) << 3 != number:
            return None
        return rex_at, FIELD_TARGET, at - rex_at
    if modrm & 0xC7 != 2 or not rex & 1 or modrm >> 3 & 7 | (rex & 4) << 1 != number:
        return None
    return rex_at, FIELD_OPERAND, at - rex_at
