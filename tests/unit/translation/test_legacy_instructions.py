"""Instructions that 64-bit mode lacks or that are rare (Intel SDM 2A to 2D)."""

from __future__ import annotations

from typing import Any

import pytest

from trivisor.translation.core import RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP

CF, ZF, OF = 1, 1 << 6, 1 << 11


def test_push_and_pop_all(cpu: Any, layout: Any) -> None:
    core = cpu.protected().core
    values = [0x10 + i for i in range(8)]
    values[RSP] = layout.STACK
    for i, value in enumerate(values):
        core.regs[i] = value
    cpu.advanced(bytes.fromhex("60"))
    assert cpu.get(layout.STACK - 32, 4, 8) == values[::-1]
    for i in (RAX, RBX, RCX, RDX, RBP, RSI, RDI):
        core.regs[i] = 0
    cpu.advanced(bytes.fromhex("61"))
    assert list(core.regs[:8]) == values


def test_stack_pointer_wraps_at_64k(cpu: Any) -> None:
    core = cpu.real().core
    core.regs[RSP] = 4
    core.regs[RDI], core.regs[RAX] = 0xDDDD, 0xAAAA
    cpu.advanced(bytes.fromhex("60"))
    assert core.regs[RSP] == 0xFFF4
    assert cpu.get(0x10002, 2, 1) == [0xAAAA]
    assert cpu.get(0x1FFF4, 2, 1) == [0xDDDD]
    core.regs[RAX] = 0
    cpu.advanced(bytes.fromhex("61"))
    assert (core.regs[RSP], core.regs[RAX]) == (4, 0xAAAA)


@pytest.mark.parametrize(
    ("code", "ax", "flags", "result", "carry"),
    [
        ("37", 0x000F, 0, 0x0105, True),  # AAA
        ("37", 0x0005, 0, 0x0005, False),
        ("3f", 0x0205, 0x10, 0x000F, True),  # AAS with AF: AX - 6 borrows from AH, too
        ("27", 0x00AE, 0, 0x0014, True),  # DAA: SDM's own example
        ("27", 0x0079, 0x10, 0x007F, False),
        ("2f", 0x0002, 0x11, 0x009C, True),  # DAS with CF and AF
        ("d40a", 0x003F, 0, 0x0603, False),  # AAM
        ("d50a", 0x0603, 0, 0x003F, False),  # AAD
        ("d6", 0x1200, 1, 0x12FF, True),  # SALC
    ],
)
def test_decimal_arithmetic(cpu: Any, code: str, ax: int, flags: int, result: int, carry: bool) -> None:
    core = cpu.protected().core
    core.regs[RAX], core.rflags = 0xABCD0000 | ax, 2 | flags
    cpu.advanced(bytes.fromhex(code))
    assert core.regs[RAX] == 0xABCD0000 | result
    assert bool(core.rflags & CF) == carry


def test_aam_by_zero(cpu: Any) -> None:
    cpu.protected()
    assert cpu.fault(bytes.fromhex("d400")) == (0, None)


def test_flags_through_ah(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.rflags = 2 | CF | ZF | OF
    cpu.advanced("lahf")
    assert core.regs[RAX] == 0x4300
    core.regs[RAX] = 0x8000
    cpu.advanced("sahf")
    assert core.rflags == 2 | 0x80 | OF


def test_enter_with_nested_frames(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RBP] = 0x11000
    cpu.put(0x10FF8, 8, 0xF1)
    cpu.advanced("enter 0x20, 2")
    assert core.regs[RBP] == layout.STACK - 8
    assert core.regs[RSP] == layout.STACK - 24 - 0x20
    assert cpu.get(layout.STACK - 24, 8, 3) == [layout.STACK - 8, 0xF1, 0x11000]
    cpu.absent_pages.add(0x1F)
    core.regs[RSP] = layout.STACK
    assert cpu.fault("enter 8, 0") == (14, 2)
