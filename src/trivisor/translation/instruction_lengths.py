"""Where an instruction of 64-bit code ends, as tables of opcodes: Intel SDM 2A 2.1 and 2D appendix A.

For the native composer, which must find an instruction's constants before it can look the instruction up.  An opcode
that is not here is not wrong: Python translates it.
"""

from __future__ import annotations

MODRM = 1
"""A ModRM byte follows, with its SIB byte and displacement."""
IMMEDIATE_8 = 2
IMMEDIATE_16 = 4
IMMEDIATE_Z = 8
"""An immediate of 32 bits, or of 16 with the operand-size prefix."""
IMMEDIATE_V = 16
"""The same, or of 64 bits with REX.W."""
TEST_GROUP = 32
"""F6 and F7: the immediate is there for the first two of the eight instructions only."""
NEAR_BRANCH = 64
"""A distance of 32 bits, whatever the prefixes."""
UNKNOWN = 128
PREFIX, OPERAND_SIZE, REX, ESCAPE, VEX_2, VEX_3 = range(129, 135)
"""What may stand before the opcode: other prefixes; 66; REX; 0F; the two forms of VEX."""


def _table(parts: dict[int, list[int | range]]) -> bytes:
    table = bytearray((UNKNOWN,)) * 256
    for form, opcodes in parts.items():
        for part in opcodes:
            for opcode in (part,) if isinstance(part, int) else part:
                assert table[opcode] == UNKNOWN
                table[opcode] = form
    return bytes(table)


_ARITHMETIC = range(0, 0x40, 8)

ONE_BYTE = _table(
    {
        PREFIX: [0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0xF0, 0xF2, 0xF3],
        OPERAND_SIZE: [0x66],
        REX: [range(0x40, 0x50)],
        ESCAPE: [0x0F],
        VEX_2: [0xC5],
        VEX_3: [0xC4],
        MODRM: [
            *(range(at, at + 4) for at in _ARITHMETIC), 0x63, range(0x84, 0x8F), range(0xD0, 0xD4),
            range(0xD8, 0xE0), 0xFE, 0xFF,
        ],
        MODRM | IMMEDIATE_8: [0x6B, 0x80, 0x83, 0xC0, 0xC1, 0xC6],
        MODRM | IMMEDIATE_Z: [0x69, 0x81, 0xC7],
        MODRM | TEST_GROUP | IMMEDIATE_8: [0xF6],
        MODRM | TEST_GROUP | IMMEDIATE_Z: [0xF7],
        IMMEDIATE_8: [
            *(at + 4 for at in _ARITHMETIC), 0x6A, range(0x70, 0x80), 0xA8, range(0xB0, 0xB8), 0xCD, 0xEB,
            range(0xE4, 0xE8),
        ],
        IMMEDIATE_16: [0xC2],
        IMMEDIATE_Z: [*(at + 5 for at in _ARITHMETIC), 0x68, 0xA9],
        IMMEDIATE_V: [range(0xB8, 0xC0)],
        NEAR_BRANCH: [0xE8, 0xE9],
        0: [
            range(0x50, 0x60), range(0x6C, 0x70), range(0x90, 0x9A), range(0x9B, 0xA0), range(0xA4, 0xA8),
            range(0xAA, 0xB0), 0xC3, 0xC9, 0xCB, 0xCC, 0xCF, 0xD7, range(0xEC, 0xF0), 0xF1, 0xF4, 0xF5,
            range(0xF8, 0xFE),
        ],
    }
)  # fmt: skip
"""Opcodes of one byte, and what may stand before them."""

TWO_BYTES = _table(
    {
        MODRM: [
            range(0x04), 0x0D, range(0x10, 0x20), range(0x28, 0x30), range(0x40, 0x70),
            range(0x74, 0x77), range(0x7C, 0x80), range(0x90, 0xA0), 0xA3, 0xA5, 0xAB, range(0xAD, 0xB8), 0xB8,
            range(0xBB, 0xC2), 0xC3, 0xC7, range(0xD0, 0xFF),
        ],
        MODRM | IMMEDIATE_8: [range(0x70, 0x74), 0xA4, 0xAC, 0xBA, 0xC2, range(0xC4, 0xC7)],
        NEAR_BRANCH: [range(0x80, 0x90)],
        0: [range(0x05, 0x0A), 0x0B, range(0x30, 0x36), 0x77, range(0xA0, 0xA3), range(0xA8, 0xAB), range(0xC8, 0xD0)],
    }
)  # fmt: skip
"""Opcodes after 0F, but for 0F 38 and 0F 3A, which all have a ModRM byte, and the latter an immediate byte."""
