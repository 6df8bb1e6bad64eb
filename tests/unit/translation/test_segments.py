"""Segment register loads: checks, error codes, accessed and busy bits (Intel SDM 3A 3.4, 5.3 to 5.8)."""

from __future__ import annotations

from typing import Any

import pytest

from trivisor.translation.core import CS, DS, ES, FS, GS, LDTR, SS, TR
from trivisor.translation.emulator import segments
from trivisor.x86.descriptors import build_segment, build_system_segment
from trivisor.x86.exceptions import GuestException


def fault(cpu: Any, index: int, selector: int) -> tuple[int, int | None]:
    before = cpu.snapshot()
    with pytest.raises(GuestException) as caught:
        segments.load(cpu, index, selector)
    assert cpu.snapshot() == before
    return caught.value.vector, caught.value.error_code


def test_data_segment_load_sets_the_accessed_bit(cpu: Any, layout: Any) -> None:
    cpu.protected()
    cpu.memory.write_u64(layout.GDT + 0x90, build_segment(0x123456, 0xFFF, 0x4092))
    segments.load(cpu, ES, 0x90)
    view = cpu.core.segments[ES]
    assert (view.selector, view.base, view.limit, view.attributes) == (0x90, 0x123456, 0xFFF, 0x4093)
    assert cpu.memory.read_u8(layout.GDT + 0x95) == 0x93
    assert all(system for _, _, _, system in cpu.accesses)
    assert cpu.calls == ["mode"]


def test_loading_the_same_segment_again_does_not_disturb_the_engine(cpu: Any, layout: Any) -> None:
    cpu.protected()
    segments.load(cpu, DS, layout.KERNEL_DS)
    cpu.calls.clear()
    segments.load(cpu, DS, layout.KERNEL_DS)
    assert cpu.calls == []


@pytest.mark.parametrize(
    ("name", "rpl", "expected"),
    [
        ("KERNEL_DS", 0, (13, 0x10)),  # CPL 3 > DPL 0
        ("ABSENT_DS", 0, (13, 0x60)),
        ("HIDDEN_CS", 3, (13, 0x88)),  # execute-only
        ("TSS_SELECTOR", 3, (13, 0x40)),
        ("KERNEL_CS32", 3, (13, 0x30)),
    ],
)
def test_data_segment_checks_at_user_level(
    cpu: Any, layout: Any, name: str, rpl: int, expected: tuple[int, int]
) -> None:
    cpu.protected(3)
    assert fault(cpu, DS, getattr(layout, name) | rpl) == expected


def test_data_segment_checks_at_kernel_level(cpu: Any, layout: Any) -> None:
    cpu.protected()
    assert fault(cpu, FS, layout.KERNEL_DS | 3) == (13, 0x10)  # RPL counts too
    assert fault(cpu, FS, layout.ABSENT_DS) == (11, 0x60)
    assert fault(cpu, FS, 0x1F8) == (13, 0x1F8)  # beyond the GDT
    segments.load(cpu, FS, layout.CONFORMING_CS | 3)  # conforming code may be read at any level
    assert cpu.core.segments[FS].selector == layout.CONFORMING_CS | 3


def test_null_selector(cpu: Any) -> None:
    cpu.long_mode(3)
    cpu.core.segments[GS].set(0x2B, 0x7000, 0xFFFF, 0x40F3)
    segments.load(cpu, GS, 3)
    view = cpu.core.segments[GS]
    assert (view.selector, view.base, view.attributes) == (3, 0, 0)
    assert fault(cpu, SS, 0) == (13, 0)


def test_null_ss_is_for_64bit_kernels(cpu: Any) -> None:
    cpu.long_mode()
    segments.load(cpu, SS, 0)
    assert cpu.core.segments[SS].selector == 0
    assert fault(cpu, SS, 1) == (13, 0)
    cpu.protected()
    assert fault(cpu, SS, 0) == (13, 0)


def test_stack_segment_checks(cpu: Any, layout: Any) -> None:
    cpu.protected()
    assert fault(cpu, SS, layout.READ_ONLY_DS) == (13, 0x68)
    assert fault(cpu, SS, layout.KERNEL_DS | 1) == (13, 0x10)
    assert fault(cpu, SS, layout.USER_DS) == (13, 0x20)
    assert fault(cpu, SS, layout.ABSENT_DS) == (12, 0x60)
    segments.load(cpu, SS, layout.KERNEL_DS)
    assert cpu.core.segments[SS].attributes == 0xC093


def test_selectors_of_the_ldt(cpu: Any, layout: Any) -> None:
    cpu.protected()
    assert fault(cpu, DS, 4) == (13, 4)  # no LDT yet
    segments.load(cpu, LDTR, layout.LDT_SELECTOR)
    cpu.memory.write_u64(layout.LDT + 8, build_segment(0x777000, 0xFF, 0x4093))
    segments.load(cpu, DS, 0xC)
    assert cpu.core.segments[DS].base == 0x777000
    segments.load(cpu, LDTR, 0)
    assert fault(cpu, DS, 0xC) == (13, 0xC)


def test_task_register_becomes_busy(cpu: Any, layout: Any) -> None:
    cpu.long_mode()
    cpu.write_system(layout.TSS_SELECTOR, build_system_segment(0xFFFF8000_00001000, 0x67, 0x89))
    segments.load(cpu, TR, layout.TSS_SELECTOR)
    view = cpu.core.segments[TR]
    assert (view.base, view.limit, view.attributes) == (0xFFFF8000_00001000, 0x67, 0x8B)
    assert cpu.memory.read_u8(layout.GDT + layout.TSS_SELECTOR + 5) == 0x8B
    assert fault(cpu, TR, layout.TSS_SELECTOR) == (13, 0x40)  # busy now
    assert fault(cpu, TR, 0) == (13, 0)
    assert fault(cpu, TR, layout.KERNEL_DS) == (13, 0x10)
    assert fault(cpu, TR, layout.TSS_SELECTOR | 4) == (13, 0x44)


def test_long_mode_system_descriptors_must_be_well_formed(cpu: Any, layout: Any) -> None:
    cpu.long_mode()
    good = build_system_segment(0x1000, 0x67, 0x89)
    cpu.write_system(layout.TSS_SELECTOR, good | 0x1F << 104)
    assert fault(cpu, TR, layout.TSS_SELECTOR) == (13, 0x40)
    cpu.write_system(layout.TSS_SELECTOR, build_system_segment(1 << 47, 0x67, 0x89))
    assert fault(cpu, TR, layout.TSS_SELECTOR) == (13, 0x40)
    cpu.write_system(layout.TSS_SELECTOR, good & ~(0x80 << 40))
    assert fault(cpu, TR, layout.TSS_SELECTOR) == (11, 0x40)
    cpu.core.gdtr_limit = layout.TSS_SELECTOR + 14
    assert fault(cpu, TR, layout.TSS_SELECTOR) == (13, 0x40)


def test_page_fault_on_the_accessed_bit_changes_nothing(cpu: Any, layout: Any) -> None:
    cpu.protected()
    cpu.absent_pages.add(layout.GDT >> 12)
    before = cpu.snapshot()
    with pytest.raises(GuestException) as caught:
        segments.load(cpu, DS, layout.KERNEL_DS)
    assert caught.value.vector == 14
    assert cpu.snapshot() == before


def test_real_mode_load_keeps_the_limit(cpu: Any) -> None:
    cpu.real()
    cpu.core.segments[DS].set(0, 0, 0xFFFFFFFF, 0x4093)
    segments.load(cpu, DS, 0x1234)
    view = cpu.core.segments[DS]
    assert (view.selector, view.base, view.limit, view.attributes) == (0x1234, 0x12340, 0xFFFFFFFF, 0x4093)


def test_privileged_data_segments_are_dropped_on_the_way_out(cpu: Any) -> None:
    core = cpu.protected().core
    core.segments[DS].set(0x10, 0, 0xFFFFFFFF, 0xC093)
    core.segments[ES].set(0x23, 0, 0xFFFFFFFF, 0xC0F3)
    core.segments[FS].set(0x70, 0, 0xFFFFFFFF, 0xC09F)  # conforming
    core.segments[GS].set(0, 0x7000, 0, 0)  # a base without a segment, as 64-bit systems have it
    core.cpl = 3
    segments.drop_privileged_data(core)
    assert [core.segments[i].selector for i in (DS, ES, FS)] == [0, 0x23, 0x70]
    assert core.segments[DS].attributes == 0
    assert core.segments[GS].base == 0x7000
    assert core.segments[CS].selector == 0x30
