"""Exception and interrupt delivery (Intel SDM 3A chapter 6; 2A, INT n)."""

from __future__ import annotations

from typing import Any

import pytest

from trivisor.machine.exits import ExceptionExit, Shutdown
from trivisor.translation.core import CS, RSP, SS, TR
from trivisor.translation.emulator.events import deliver, raise_exception
from trivisor.x86.exceptions import GuestException

HANDLER = 0xFFFF8000_00112233
RF, IF, TF, NT = 1 << 16, 1 << 9, 1 << 8, 1 << 14


def fault(cpu: Any, vector: int, **options: Any) -> tuple[int, int | None]:
    before = cpu.snapshot()
    with pytest.raises(GuestException) as caught:
        deliver(cpu, vector, **options)
    assert cpu.snapshot() == before
    return caught.value.vector, caught.value.error_code


def test_long_mode_fault_from_user_switches_to_rsp0(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode(3).core
    core.rflags = 0x202 | TF | NT
    cpu.gate(14, layout.KERNEL_CS64, HANDLER)
    deliver(cpu, 14, error_code=6)
    assert core.rip == HANDLER
    assert (core.cpl, core.segments[CS].selector, core.segments[SS].selector) == (0, 8, 0)
    assert core.regs[RSP] == layout.KERNEL_STACK - 48
    frame = cpu.get(core.regs[RSP], 8, 6)
    flags = 0x202 | TF | NT | RF
    assert frame == [6, layout.CODE, layout.USER_CS64 | 3, flags, layout.STACK, layout.USER_DS | 3]
    assert core.rflags == 2
    assert ("store", layout.KERNEL_STACK - 48, 48, True) in cpu.accesses
    assert "mode" in cpu.calls


def test_long_mode_interrupt_in_the_kernel_aligns_the_stack(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    core.rflags = 0x202
    core.regs[RSP] = layout.STACK + 5
    cpu.gate(0x30, layout.KERNEL_CS64, HANDLER, 0xF)
    deliver(cpu, 0x30, external=True)
    assert core.regs[RSP] == layout.STACK - 40
    assert cpu.get(core.regs[RSP], 8, 5) == [
        layout.CODE, layout.KERNEL_CS64, 0x202, layout.STACK + 5, layout.KERNEL_DS,
    ]  # fmt: skip
    assert core.rflags == 0x202  # a trap gate leaves IF
    assert core.segments[SS].selector == layout.KERNEL_DS


def test_interrupt_stack_table(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    cpu.gate(2, layout.KERNEL_CS64, HANDLER, ist=1)
    deliver(cpu, 2, external=True)
    assert core.regs[RSP] == layout.IST_STACK - 40
    assert core.nmi_blocked
    core.segments[TR].set(0x40, layout.TSS, 42, 0x8B)
    assert fault(cpu, 2, external=True) == (10, 0x41)


@pytest.mark.parametrize("options", [{"software": True}, {"external": True}, {}])
def test_error_codes_tell_who_it_was(cpu: Any, layout: Any, options: dict[str, bool]) -> None:
    extern = 0 if "software" in options else 1
    cpu.long_mode()
    cpu.core.idtr_limit = 0x40 * 16 - 1
    assert fault(cpu, 0x40, **options) == (13, 0x40 << 3 | 2 | extern)  # beyond the IDT
    assert fault(cpu, 0x3F, **options) == (13, 0x3F << 3 | 2 | extern)  # no gate
    cpu.gate(0x20, layout.KERNEL_CS64, HANDLER)
    cpu.memory.write_u8(layout.IDT + 0x20 * 16 + 5, 0x0E)
    assert fault(cpu, 0x20, **options) == (11, 0x20 << 3 | 2 | extern)  # absent
    cpu.gate(0x21, 0, HANDLER)
    assert fault(cpu, 0x21, **options) == (13, extern)
    cpu.gate(0x22, layout.KERNEL_DS, HANDLER)
    assert fault(cpu, 0x22, **options) == (13, layout.KERNEL_DS | extern)
    cpu.gate(0x23, layout.KERNEL_CS32, HANDLER)
    assert fault(cpu, 0x23, **options) == (13, layout.KERNEL_CS32 | extern)  # not 64-bit code
    cpu.gate(0x24, 0x1F8, HANDLER)
    assert fault(cpu, 0x24, **options) == (13, 0x1F8 | extern)


def test_gate_privilege_counts_for_software_only(cpu: Any, layout: Any) -> None:
    cpu.long_mode(3)
    cpu.gate(0x80, layout.KERNEL_CS64, HANDLER)
    assert fault(cpu, 0x80, software=True) == (13, 0x80 << 3 | 2)
    deliver(cpu, 0x80, external=True)
    assert cpu.core.rip == HANDLER


@pytest.mark.parametrize(
    ("vector", "options", "rf"),
    [(13, {"error_code": 0}, RF), (6, {}, RF), (3, {"software": True, "return_rip": 0x8001}, 0),
     (1, {}, RF), (0x40, {"external": True}, RF), (0x80, {"software": True, "return_rip": 0x8002}, 0)],
)  # fmt: skip
def test_resume_flag_in_the_frame(
    cpu: Any, layout: Any, vector: int, options: dict[str, Any], rf: int
) -> None:
    cpu.long_mode()
    cpu.core.rflags = 2 | RF  # left over from an IRET
    cpu.gate(vector, layout.KERNEL_CS64, HANDLER)
    deliver(cpu, vector, **options)
    frame = cpu.get(cpu.core.regs[RSP] + (8 if "error_code" in options else 0), 8, 3)
    assert frame == [options.get("return_rip", layout.CODE), layout.KERNEL_CS64, 2 | rf]
    assert not cpu.core.rflags & RF


def test_protected_mode_same_level(cpu: Any, layout: Any) -> None:
    core = cpu.protected().core
    core.rflags = 0x202
    cpu.gate(13, layout.KERNEL_CS32, 0x112233)
    deliver(cpu, 13, error_code=0x18)
    assert core.regs[RSP] == layout.STACK - 16
    assert cpu.get(core.regs[RSP], 4, 4) == [0x18, layout.CODE, layout.KERNEL_CS32, 0x202 | RF]
    assert core.rip == 0x112233
    assert core.rflags == 2


def test_protected_mode_stack_switch(cpu: Any, layout: Any) -> None:
    core = cpu.protected(3).core
    cpu.gate(0x80, layout.KERNEL_CS32, 0x112233, 0xF, dpl=3)
    deliver(cpu, 0x80, software=True, return_rip=layout.CODE + 2)
    assert (core.cpl, core.segments[SS].selector) == (0, layout.KERNEL_DS)
    assert core.regs[RSP] == layout.KERNEL_STACK - 20
    assert cpu.get(core.regs[RSP], 4, 5) == [
        layout.CODE + 2, layout.USER_CS32 | 3, 2, layout.STACK, layout.USER_DS | 3,
    ]  # fmt: skip


def test_protected_mode_stack_switch_checks(cpu: Any, layout: Any) -> None:
    cpu.protected(3)
    cpu.gate(0x20, layout.KERNEL_CS32, 0x112233)
    for selector, expected in (
        (0, (10, 1)),
        (layout.USER_DS | 3, (10, 0x21)),
        (layout.READ_ONLY_DS, (10, 0x69)),
        (0x1F8, (10, 0x1F9)),
        (layout.ABSENT_DS, (12, 0x61)),
    ):
        cpu.memory.write_u32(layout.TSS + 8, selector)
        assert fault(cpu, 0x20, external=True) == expected
    cpu.core.segments[TR].set(0x40, layout.TSS, 8, 0x8B)
    assert fault(cpu, 0x20, external=True) == (10, 0x41)


def test_16bit_gate_pushes_words(cpu: Any, layout: Any) -> None:
    core = cpu.protected().core
    cpu.gate(0x20, layout.KERNEL_CS32, 0x9876, 0x6)
    deliver(cpu, 0x20, external=True)
    assert core.regs[RSP] == layout.STACK - 6
    assert cpu.get(core.regs[RSP], 2, 3) == [layout.CODE, layout.KERNEL_CS32, 2]
    assert core.rip == 0x9876


def test_real_mode(cpu: Any) -> None:
    core = cpu.real().core
    core.rflags = 0x302
    core.rip = 0x123
    cpu.put(0x21 * 4, 2, 0x4567, 0xF000)
    deliver(cpu, 0x21, software=True, return_rip=0x125)
    assert (core.segments[CS].selector, core.segments[CS].base, core.rip) == (0xF000, 0xF0000, 0x4567)
    assert cpu.get(0x10000 + 0x8000 - 6, 2, 3) == [0x125, 0x800, 0x302]
    assert core.rflags == 2
    assert core.regs[RSP] == 0x8000 - 6


def test_page_fault_sets_cr2_and_tells_subscribers(cpu: Any, layout: Any) -> None:
    seen: list[ExceptionExit] = []
    cpu.observed[ExceptionExit] = [seen.append]
    cpu.long_mode()
    cpu.gate(14, layout.KERNEL_CS64, HANDLER)
    assert raise_exception(cpu, GuestException(14, 2, 0xDEAD000)) is None
    assert cpu.core.cr2 == 0xDEAD000
    assert seen == [ExceptionExit(14, 2, 0xDEAD000)]


def test_a_fault_while_delivering_is_a_double_fault(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode(3).core
    cpu.gate(8, layout.KERNEL_CS64, HANDLER, ist=1)
    cpu.gate(14, layout.KERNEL_CS64, HANDLER + 1)
    cpu.absent_pages.add(layout.KERNEL_STACK - 48 >> 12)
    assert raise_exception(cpu, GuestException(14, 4, 0x1234)) is None
    assert core.rip == HANDLER
    assert core.cr2 == layout.KERNEL_STACK - 48
    assert cpu.get(layout.IST_STACK - 48, 8, 2) == [0, layout.CODE]


def test_a_benign_exception_gives_way_to_the_second(cpu: Any, layout: Any) -> None:
    cpu.long_mode(3)
    cpu.gate(13, layout.KERNEL_CS64, HANDLER)
    assert raise_exception(cpu, GuestException(6)) is None  # no gate for #UD: #GP
    assert cpu.core.rip == HANDLER
    assert cpu.get(cpu.core.regs[RSP], 8, 1) == [6 << 3 | 2 | 1]


def test_triple_fault(cpu: Any) -> None:
    cpu.long_mode()
    before = cpu.snapshot()
    assert raise_exception(cpu, GuestException(13, 0)) == Shutdown(13)
    assert cpu.snapshot() == before


def test_debug_exception_clears_the_general_detect_bit(cpu: Any, layout: Any) -> None:
    cpu.long_mode()
    cpu.core.dr[7] |= 1 << 13
    cpu.gate(1, layout.KERNEL_CS64, HANDLER)
    deliver(cpu, 1)
    assert cpu.core.dr[7] == 0x400
