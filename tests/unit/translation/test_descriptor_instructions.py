"""Descriptor tables, selectors and port I/O, against the Intel SDM's operation sections (volume 2)."""

from __future__ import annotations

from typing import Any

import pytest

from trivisor.machine.exits import PortIn, PortOut
from trivisor.translation.core import ES, RAX, RBX, RCX, RDI, RDX, RSI, RSP, TR
from trivisor.x86.exceptions import GuestException

GP0, UD = (13, 0), (6, None)
ZF, DF = 1 << 6, 1 << 10
KERNEL_TEXT = 0xFFFFFFFF81000000


def test_descriptor_table_registers(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RBX] = 0x10000
    cpu.put(0x10000, 2, 0x7F)
    cpu.put(0x10002, 8, KERNEL_TEXT)
    cpu.advanced("lidt [rbx]")
    assert (core.idtr_base, core.idtr_limit) == (KERNEL_TEXT, 0x7F)
    cpu.advanced("sidt [rbx+16]")
    assert cpu.memory.read(0x10010, 10) == cpu.memory.read(0x10000, 10)
    cpu.put(0x10002, 8, 1 << 50)
    assert cpu.fault("lgdt [rbx]") == GP0
    cpu.protected()
    cpu.put(0x10002, 4, 0x89ABCDEF)
    cpu.advanced(bytes.fromhex("660f0113"))  # o16 lgdt [ebx]: 24 bits of base
    assert core.gdtr_base == 0xABCDEF


def test_umip_hides_the_tables(cpu: Any) -> None:
    cpu.long_mode(3)
    cpu.core.regs[RBX] = 0x10000
    for source in ("sgdt [rbx]", "sidt [rbx]", "sldt eax", "str eax"):
        cpu.core.cr4 = 0x20
        cpu.advanced(source)
        cpu.core.cr4 = 0x820
        assert cpu.fault(source) == GP0


def test_selector_moves(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RAX] = (1 << 40) + layout.USER_DS
    cpu.advanced("mov ds, eax")
    cpu.advanced("mov rbx, ds")
    assert core.regs[RBX] == layout.USER_DS
    core.regs[RCX] = 0xFFFFFFFF
    cpu.advanced("mov cx, ds")
    assert core.regs[RCX] == 0xFFFF0000 + layout.USER_DS
    core.regs[RAX] = layout.KERNEL_DS
    cpu.advanced("mov ss, eax")
    assert core.interrupt_shadow
    cpu.advanced("clts")
    assert not core.interrupt_shadow
    assert cpu.fault(bytes.fromhex("8ec8")) == UD  # mov cs, eax


def test_selectors_on_the_stack(cpu: Any, layout: Any) -> None:
    core = cpu.protected().core
    cpu.advanced("push ds")
    assert (core.regs[RSP], cpu.get(layout.STACK - 4, 4, 1)) == (layout.STACK - 4, [layout.KERNEL_DS])
    cpu.advanced("pop es")
    assert core.regs[RSP] == layout.STACK
    cpu.advanced("push ds")
    cpu.advanced("pop ss")
    assert core.interrupt_shadow
    cpu.put(layout.STACK, 4, 0x1F8)
    assert cpu.fault("pop fs") == (13, 0x1F8)
    cpu.long_mode()
    cpu.advanced("push gs")
    assert core.regs[RSP] == layout.STACK - 8


def test_far_pointer_loads(cpu: Any, layout: Any) -> None:
    core = cpu.protected().core
    core.regs[RBX] = 0x10000
    cpu.put(0x10000, 4, 0x12345678, layout.USER_DS)
    cpu.advanced("les eax, [ebx]")
    assert (core.regs[RAX], core.segments[ES].selector) == (0x12345678, layout.USER_DS)
    cpu.put(0x10004, 4, layout.USER_DS)
    assert cpu.fault("lss eax, [ebx]") == (13, layout.USER_DS)


@pytest.mark.parametrize(
    ("name", "readable", "writable", "rights"),
    [
        ("USER_DS", True, True, 0xC0F200),
        ("KERNEL_DS", False, False, None),
        ("CONFORMING_CS", True, False, 0xC09E00),
        ("HIDDEN_CS", False, False, None),
        ("USER_CS32", True, False, 0xC0FA00),
    ],
)
def test_selector_queries(
    cpu: Any, layout: Any, name: str, readable: bool, writable: bool, rights: int | None
) -> None:
    core = cpu.protected(3).core
    core.regs[RAX] = getattr(layout, name) | 3
    for source, expected in (("verr ax", readable), ("verw ax", writable)):
        cpu.advanced(source)
        assert bool(core.rflags & ZF) == expected
    core.regs[RBX] = 0x55
    cpu.advanced("lar ebx, eax")
    assert bool(core.rflags & ZF) == (rights is not None)
    assert core.regs[RBX] == (0x55 if rights is None else rights)
    cpu.advanced("lsl ebx, eax")
    assert bool(core.rflags & ZF) == (rights is not None)
    assert core.regs[RBX] == (0x55 if rights is None else 0xFFFFFFFF)


def test_selector_queries_of_nothing(cpu: Any) -> None:
    core = cpu.protected().core
    for selector in (0, 3, 0x1F8, 0xC):
        core.regs[RAX] = selector
        core.rflags = 2 | ZF
        cpu.advanced("lar ebx, eax")
        assert not core.rflags & ZF
    cpu.real()
    assert cpu.fault("verr ax") == UD


def test_arpl(cpu: Any) -> None:
    core = cpu.protected(3).core
    core.regs[RAX], core.regs[RBX] = 0xABCD0008, 3
    cpu.advanced("arpl ax, bx")
    assert core.regs[RAX] == 0xABCD000B
    assert core.rflags & ZF
    cpu.advanced("arpl ax, bx")
    assert not core.rflags & ZF


# ports


def test_port_instructions(cpu: Any) -> None:
    seen: list[Any] = []
    core = cpu.long_mode().core
    cpu.observed[PortIn] = cpu.observed[PortOut] = [seen.append]
    core.regs[RAX], core.regs[RDX] = 0x11223344_55667788, 0xFFFF0060
    cpu.advanced("out dx, ax")
    cpu.advanced("out 0x64, al")
    cpu.advanced("in al, dx")
    assert core.regs[RAX] == 0x11223344_55667701
    cpu.advanced("in eax, 0x60")
    assert core.regs[RAX] == 2
    assert cpu.port.written == [(0, 2, 0x7788), (4, 1, 0x88)]
    assert seen == [PortOut(0x60, 2, 0x7788), PortOut(0x64, 1, 0x88), PortIn(0x60, 1, 1), PortIn(0x60, 4, 2)]


def test_io_permission_bitmap(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode(3).core
    core.segments[TR].set(layout.TSS_SELECTOR, layout.TSS, 0x68 + 0x10, 0x8B)
    cpu.put(layout.TSS + 102, 2, 0x68)
    cpu.put(layout.TSS + 0x68 + 0xC, 1, 0xFE)  # port 0x60 only
    core.regs[RDX] = 0x60
    cpu.advanced("in al, dx")
    assert cpu.fault("in ax, dx") == GP0
    core.regs[RDX] = 0x80
    assert cpu.fault("in al, dx") == GP0  # beyond the TSS limit
    core.rflags |= 3 << 12
    cpu.advanced("in al, dx")


def test_repeated_input(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RDI], core.regs[RCX], core.regs[RDX] = 0x10FFC, 3, 0x60
    cpu.absent_pages.add(0x11)
    rep_insw = bytes.fromhex("f3666d")
    with pytest.raises(GuestException):
        cpu.do(rep_insw)
    assert (core.regs[RDI], core.regs[RCX], core.rip) == (0x11000, 1, 0x8000)
    assert cpu.port.reads == 2  # the third was not read before the fault
    cpu.absent_pages.clear()
    cpu.advanced(rep_insw)
    assert cpu.get(0x10FFC, 2, 3) == [1, 2, 3]
    assert core.regs[RCX] == 0


def test_long_repetitions_come_back_in_between(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RSI], core.regs[RCX], core.regs[RDX] = 0x10000, 4097, 0x60
    outsb = bytes.fromhex("f36e")
    assert cpu.do(outsb) is None
    assert (core.rip, core.regs[RCX]) == (0x8000, 1)
    cpu.advanced(outsb)
    assert len(cpu.port.written) == 4097
    cpu.advanced(outsb)  # a count of zero does nothing
    assert core.regs[RSI] == 0x10000 + 4097


def test_backward_16bit_output(cpu: Any) -> None:
    core = cpu.real().core
    core.rflags |= DF
    core.regs[RSI], core.regs[RCX], core.regs[RDX] = 0xABCD0000, 2, 0x60
    cpu.put(0x10000, 1, 7)
    cpu.advanced("rep outsb")
    assert core.regs[RSI] == 0xABCDFFFE
    assert cpu.port.written[0] == (0, 1, 7)
