"""Hardware task switches by every way that leads to one (Intel SDM 3A chapter 7)."""

from __future__ import annotations

from typing import Any

import pytest

from trivisor.translation.core import CS, DS, ES, FS, GS, LDTR, RAX, RSP, SS, TR
from trivisor.translation.emulator.events import deliver, raise_exception
from trivisor.x86.descriptors import build_segment
from trivisor.x86.exceptions import GuestException
from trivisor.x86.flags import NT, RF, VM

OLD, NEW, NEW16 = 0x40000, 0x41000, 0x42000
OLD_TSS, NEW_TSS, NEW_TSS16, NEW_LDT = 0xC0, 0xC8, 0xD0, 0xD8
"""Selectors; and the tables' addresses above."""
WIDE, NARROW = (NEW_TSS, NEW, 0x20, 4), (NEW_TSS16, NEW16, 0x0E, 2)
_LINK = 0


@pytest.fixture
def tasks(cpu: Any, layout: Any) -> Any:
    """Protected mode with the current task in OLD, and two that may be switched to."""
    cpu.protected()
    memory, core = cpu.memory, cpu.core
    memory.write_u64(layout.GDT + OLD_TSS, build_segment(OLD, 0x67, 0x8B))
    memory.write_u64(layout.GDT + NEW_TSS, build_segment(NEW, 0x67, 0x89))
    memory.write_u64(layout.GDT + NEW_TSS16, build_segment(NEW16, 0x2B, 0x81))
    memory.write_u64(layout.GDT + NEW_LDT, build_segment(0x43000, 0xFF, 0x82))
    core.segments[TR].set(OLD_TSS, OLD, 0x67, 0x8B)
    wide = (0x1000, 2, *range(0x10, 0x14), 0x5000, *range(0x15, 0x18))
    cpu.put(NEW + 0x1C, 4, 0x7000, *wide)
    kernel, data = layout.KERNEL_CS32, layout.KERNEL_DS
    cpu.put(NEW + 0x48, 4, data, kernel, data, data, 0, data, NEW_LDT)
    cpu.put(NEW16 + 0x0E, 2, *wide, data, kernel, data, data, NEW_LDT)
    core.regs[RAX] = 0xAAAA
    return cpu


def busy(cpu: Any, layout: Any, selector: int) -> bool:
    return bool(cpu.memory.read_u8(layout.GDT + selector + 5) & 2)


@pytest.mark.parametrize("new", [WIDE, NARROW])
def test_a_jump_saves_and_loads_everything(tasks: Any, layout: Any, new: tuple[int, int, int, int]) -> None:
    selector, _, _, size = new
    core = tasks.core
    core.rflags = 0x246
    assert tasks.do(f"jmp {selector}:0x1234") is None
    assert tasks.get(OLD + 0x20, 4, 3) == [0x8007, 0x246, 0xAAAA]
    assert tasks.memory.read_u32(OLD + 0x38) == layout.STACK
    assert tasks.get(OLD + 0x48, 4, 6) == [core.segments[DS].selector, layout.KERNEL_CS32, *[layout.KERNEL_DS] * 4]
    assert (core.rip, core.regs[RAX] & 0xFFFF, core.regs[RSP] & 0xFFFF, core.rflags) == (0x1000, 0x10, 0x5000, 2)
    assert core.regs[RAX] >> 16 == (0 if size == 4 else 0xFFFF)
    assert [core.segments[i].selector for i in (CS, SS, ES, LDTR, TR)] == [
        layout.KERNEL_CS32, layout.KERNEL_DS, layout.KERNEL_DS, NEW_LDT, selector,
    ]  # fmt: skip
    assert core.segments[FS].attributes == 0
    assert core.segments[GS].attributes == (0xC093 if size == 4 else 0)
    assert core.segments[LDTR].base == 0x43000
    assert core.cr0 & 8
    assert (busy(tasks, layout, OLD_TSS), busy(tasks, layout, selector)) == (False, True)
    assert tasks.calls[-1] == "mode"


@pytest.mark.parametrize("new", [WIDE, NARROW])
def test_a_call_nests_and_iret_comes_back(tasks: Any, layout: Any, new: tuple[int, int, int, int]) -> None:
    selector, base, _, _ = new
    core = tasks.core
    tasks.do(f"call {selector}:0")
    assert tasks.memory.read_u16(base + _LINK) == OLD_TSS
    assert core.rflags & NT
    assert busy(tasks, layout, OLD_TSS) and busy(tasks, layout, selector)
    core.regs[RAX] = 0x77
    tasks.do("iretd")
    assert (core.rip, core.regs[RAX], core.rflags & NT) == (0x8007, 0xAAAA, 0)
    assert core.segments[TR].selector == OLD_TSS
    assert (busy(tasks, layout, OLD_TSS), busy(tasks, layout, selector)) == (True, False)
    flags = tasks.memory.read_u16(base + (0x24 if base == NEW else 0x10))
    assert not flags & NT


def test_cr3_is_loaded_with_paging_on_alone(tasks: Any) -> None:
    core = tasks.core
    tasks.do(f"jmp {NEW_TSS}:0")
    assert core.cr3 == 0
    assert ("flush", False) not in tasks.calls
    core.cr0 |= 1 << 31
    tasks.memory.write_u32(OLD + 0x1C, 0x9000)
    tasks.do(f"jmp {OLD_TSS}:0")
    assert core.cr3 == 0x9000
    assert ("flush", False) in tasks.calls


def test_events_through_a_task_gate(tasks: Any, layout: Any) -> None:
    core = tasks.core
    tasks.gate(13, NEW_TSS, 0, 0x5)
    assert raise_exception(tasks, GuestException(13, 0x58)) is None
    assert (core.rip, core.regs[RSP]) == (0x1000, 0x5000 - 4)
    assert tasks.memory.read_u32(0x5000 - 4) == 0x58
    assert core.rflags & NT
    assert tasks.get(OLD + 0x20, 4, 2) == [0x8000, 2 | RF]
    tasks.do("iretd")
    assert core.rip == 0x8000


def test_int_through_a_task_gate_returns_behind_it(tasks: Any) -> None:
    core = tasks.core
    tasks.gate(0x40, NEW_TSS16, 0, 0x5)
    deliver(tasks, 0x40, software=True, return_rip=0x8002)
    assert core.segments[TR].selector == NEW_TSS16
    assert tasks.memory.read_u32(OLD + 0x20) == 0x8002


def test_a_task_gate_in_the_gdt(tasks: Any, layout: Any) -> None:
    tasks.memory.write_u64(layout.GDT + 0xE0, 0x8500 << 32 | NEW_TSS << 16)
    tasks.do("jmp 0xe0:0")
    assert tasks.core.segments[TR].selector == NEW_TSS


@pytest.mark.parametrize("gate", [False, True])
def test_tasks_that_may_not_be_switched_to(tasks: Any, layout: Any, gate: bool) -> None:
    memory = tasks.memory
    for selector, descriptor, expected in (
        (NEW_TSS, build_segment(NEW, 0x67, 0x8B), (13, NEW_TSS)),  # busy
        (NEW_TSS, build_segment(NEW, 0x67, 0x09), (11, NEW_TSS)),  # absent
        (NEW_TSS, build_segment(NEW, 0x66, 0x89), (10, NEW_TSS)),  # too small
        (NEW_TSS16, build_segment(NEW, 0x2A, 0x81), (10, NEW_TSS16)),
        (OLD_TSS, build_segment(OLD, 0x67, 0x8B), (13, OLD_TSS)),  # the one that runs
    ):
        memory.write_u64(layout.GDT + selector, descriptor)
        if gate:
            memory.write_u64(layout.GDT + 0xE0, 0x8500 << 32 | selector << 16)
        assert tasks.fault(f"call {0xE0 if gate else selector}:0") == expected
    if gate:
        memory.write_u64(layout.GDT + 0xE0, 0x0500 << 32 | NEW_TSS << 16)
        assert tasks.fault("call 0xe0:0") == (11, 0xE0)
        memory.write_u64(layout.GDT + 0xE0, 0x8500 << 32 | (NEW_TSS | 4) << 16)
        assert tasks.fault("call 0xe0:0") == (13, NEW_TSS | 4)


def test_privileges(tasks: Any, layout: Any) -> None:
    memory, core = tasks.memory, tasks.core
    assert tasks.fault(f"jmp {NEW_TSS | 3}:0") == (13, NEW_TSS)
    memory.write_u64(layout.GDT + 0xE0, 0xE500 << 32 | NEW_TSS << 16)  # a gate for everybody leads there
    core.segments[CS].set(layout.USER_CS32 | 3, 0, 0xFFFFFFFF, 0xC0FB)
    core.segments[SS].set(layout.USER_DS | 3, 0, 0xFFFFFFFF, 0xC0F3)
    core.cpl = 3
    assert tasks.fault(f"jmp {NEW_TSS | 3}:0") == (13, NEW_TSS)
    tasks.do(f"jmp {0xE0 | 3}:0")
    assert (core.cpl, core.segments[TR].selector) == (0, NEW_TSS)


def test_iret_to_a_task_that_is_not_busy(tasks: Any) -> None:
    core = tasks.core
    core.rflags |= NT
    for link, expected in ((NEW_TSS, NEW_TSS), (NEW_TSS | 4, NEW_TSS | 4), (0x1F8, 0x1F8), (0, 0)):
        tasks.memory.write_u16(OLD, link)
        assert tasks.fault("iretd") == (10, expected)


def test_a_tss_that_is_not_mapped_changes_nothing(tasks: Any) -> None:
    tasks.absent_pages.add(NEW >> 12)
    assert tasks.fault(f"jmp {NEW_TSS}:0")[0] == 14
    tasks.absent_pages = {OLD >> 12}
    assert tasks.fault(f"jmp {NEW_TSS}:0")[0] == 14
    assert tasks.memory.read_u16(NEW) == 0


@pytest.mark.parametrize(
    ("offset", "selector", "expected"),
    [
        (0x60, 0x1F0, (10, 0x1F0)),  # LDT
        (0x4C, 0, (10, 0)),  # CS
        (0x4C, 0x1F0, (10, 0x1F0)),
        (0x50, 0, (10, 0)),  # SS
        (0x54, 0x1F0, (10, 0x1F0)),  # DS
        (0x5C, OLD_TSS, (10, OLD_TSS)),  # GS
    ],
)
def test_segments_are_the_new_tasks_own(tasks: Any, offset: int, selector: int, expected: tuple[int, int]) -> None:
    tasks.memory.write_u16(NEW + offset, selector)
    with pytest.raises(GuestException) as caught:
        tasks.do(f"jmp {NEW_TSS}:0")
    assert (caught.value.vector, caught.value.error_code) == expected
    core = tasks.core
    assert (core.segments[TR].selector, core.rip) == (NEW_TSS, 0x1000)


def test_the_trap_bit(tasks: Any) -> None:
    tasks.memory.write_u16(NEW + 0x64, 1)
    with pytest.raises(GuestException) as caught:
        tasks.do(f"jmp {NEW_TSS}:0")
    assert caught.value.vector == 1
    assert tasks.core.dr[6] & 1 << 15
    assert tasks.core.rip == 0x1000


def test_a_task_in_virtual_8086_mode(tasks: Any) -> None:
    core = tasks.core
    tasks.put(NEW + 0x24, 4, 0x23202)
    tasks.put(NEW + 0x48, 4, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000)
    tasks.do(f"jmp {NEW_TSS}:0")
    assert core.rflags & VM
    assert core.cpl == 3
    for index, selector in enumerate((0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000)):
        view = core.segments[index]
        assert (view.selector, view.base, view.limit, view.attributes) == (selector, selector << 4, 0xFFFF, 0xF3)


def test_long_mode_has_no_tasks(cpu: Any, layout: Any) -> None:
    cpu.compatibility(0)
    assert cpu.fault(f"jmp {layout.TSS_SELECTOR}:0") == (13, layout.TSS_SELECTOR)
    cpu.core.rflags |= NT
    assert cpu.fault("iretd") == (13, 0)
