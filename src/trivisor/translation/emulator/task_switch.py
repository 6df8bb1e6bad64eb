"""Hardware task switches of legacy protected mode (Intel SDM 3A chapter 7).

Up to the commit point (7.3, step 12) a fault belongs to the old task, in which
nothing has changed; after it faults belong to the new one, whose registers are
all loaded but for the descriptors that could not be.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from trivisor.translation.core import CS, DS, ES, FS, GS, LDTR, SS, TR
from trivisor.translation.emulator import segments
from trivisor.translation.emulator.contract import Cpu
from trivisor.translation.emulator.operands import general_protection, table_address, within_limit
from trivisor.translation.emulator.stack import push
from trivisor.x86.control import CR0_PG, CR0_TS, CR4_PGE, DR6_BT, EFER_LMA
from trivisor.x86.descriptors import (
    LDT,
    SELECTOR_RPL,
    SELECTOR_TI,
    TASK_GATE,
    TSS,
    TSS16,
    TSS16_BUSY,
    TSS_BUSY,
    TSS_BUSY_BIT,
    SegmentDescriptor,
    parse_gate,
    parse_segment,
)
from trivisor.x86.exceptions import DEBUG, GENERAL_PROTECTION, INVALID_TSS, SEGMENT_NOT_PRESENT, GuestException
from trivisor.x86.flags import FIXED, NT, VALID, VM


class Source(Enum):
    """What a task switch comes from."""

    JUMP = "JMP"
    CALL = "CALL"
    EVENT = "an interrupt or exception"
    RETURN = "IRET"


class _Layout(NamedTuple):
    """Where a TSS has the registers that a switch saves and loads (figures 7-2 and 7-10)."""

    size: int
    """Of EIP, EFLAGS and the general registers."""
    registers: int
    """Offset of EIP; EFLAGS and the eight registers follow."""
    segments: int
    """Offset of ES; CS, SS, DS and, in the 32-bit TSS, FS and GS follow."""
    segment_count: int
    ldt: int
    limit: int
    """The least that its descriptor may have."""

    def segment(self, index: int) -> int:
        return self.segments + index * self.size


_WIDE = _Layout(4, 0x20, 0x48, 6, 0x60, 0x67)
_NARROW = _Layout(2, 0x0E, 0x22, 4, 0x2A, 0x2B)
_CR3 = 0x1C
_TRAP = 0x64
_TYPES = (TSS, TSS16, TSS_BUSY, TSS16_BUSY)


def _layout(descriptor_type: int) -> _Layout:
    return _WIDE if descriptor_type in (TSS, TSS_BUSY) else _NARROW


class Task(NamedTuple):
    """A TSS that may be switched to: its selector, its descriptor, and where that lies."""

    selector: int
    descriptor: SegmentDescriptor
    address: int


def named_task(cpu: Cpu, selector: int) -> Task | None:
    """The task that the selector of a far JMP or CALL names, by its TSS or a task gate; None if it names none.

    Raises #GP, #NP or #TS for one that may not be switched to.
    """
    core = cpu.core
    if segments.is_null(selector) or core.efer & EFER_LMA:
        return None
    descriptor, address = segments.fetch(cpu, selector)
    if not descriptor.is_system or descriptor.type not in (*_TYPES, TASK_GATE):
        return None
    error = selector & ~SELECTOR_RPL
    if descriptor.dpl < max(core.cpl, selector & SELECTOR_RPL):
        raise general_protection(error)
    if descriptor.type == TASK_GATE:
        if not descriptor.present:
            raise GuestException(SEGMENT_NOT_PRESENT, error)
        return gate_task(cpu, parse_gate(cpu.load(address, 8, system=True)).selector)
    return _available(cpu, selector)


def gate_task(cpu: Cpu, selector: int, external: int = 0) -> Task:
    """The task of a task gate's TSS selector; raises #GP, #NP or #TS with it."""
    if segments.is_null(selector):
        raise general_protection(external)
    return _available(cpu, selector, external)


def _available(cpu: Cpu, selector: int, external: int = 0) -> Task:
    return _task(cpu, selector, (TSS, TSS16), GENERAL_PROTECTION, external)


def _task(cpu: Cpu, selector: int, types: tuple[int, ...], vector: int, external: int) -> Task:
    """A task whose TSS is in the GDT and of one of `types`, else the fault `vector`; present and large enough."""
    error = selector & ~SELECTOR_RPL | external
    address = None if selector & SELECTOR_TI else segments.descriptor_address(cpu.core, selector)
    if address is None:
        raise GuestException(vector, error)
    descriptor = parse_segment(cpu.load(address, 8, system=True))
    if not descriptor.is_system or descriptor.type not in types:
        raise GuestException(vector, error)
    if not descriptor.present:
        raise GuestException(SEGMENT_NOT_PRESENT, error)
    if descriptor.limit < _layout(descriptor.type).limit:
        raise GuestException(INVALID_TSS, error)
    return Task(selector, descriptor, address)


def return_to_previous(cpu: Cpu, following: int) -> None:
    """IRET with NT set: back to the task that the current TSS links to (SDM 2A, IRET; table 7-2)."""
    core = cpu.core
    selector = cpu.load(core.segments[TR].base, 2, system=True)
    task = _task(cpu, selector, (TSS_BUSY, TSS16_BUSY), INVALID_TSS, 0)
    switch(cpu, task, Source.RETURN, following)


def switch(
    cpu: Cpu,
    task: Task,
    source: Source,
    rip: int,
    *,
    flags: int | None = None,
    error_code: int | None = None,
    external: int = 0,
) -> None:
    """Switch to `task`; the old one is to go on at `rip`, with `flags` if they are not those it has.

    `error_code` is pushed on the new task's stack; `external` is the EXT bit for selector error codes.
    """
    core = cpu.core
    old_flags = core.rflags if flags is None else flags
    nested = source in (Source.CALL, Source.EVENT)
    if source is Source.RETURN:
        old_flags &= ~NT
    old = core.segments[TR]
    old_selector, old_base = old.selector, old.base
    base = task.descriptor.base
    new = _layout(task.descriptor.type)
    image = _read(cpu, base, 0, new.limit + 1)
    _probe(cpu, base)
    _save(cpu, old_base, _layout(old.attributes & 0xF), old_flags, rip)
    if not nested:
        _set_busy(cpu, old_selector, False)
    if source is not Source.RETURN:
        _set_busy(cpu, task.selector, True)
    if nested:
        cpu.store(base, 2, old_selector, system=True)
    _load(cpu, task, new, image, nested=nested, external=external)
    if error_code is not None:
        push(cpu, new.size, error_code)
    if not within_limit(core.segments[CS].attributes, core.segments[CS].limit, core.rip, 1):
        raise general_protection(external)
    if new is _WIDE and image[_TRAP] & 1:
        core.dr[6] |= DR6_BT
        raise GuestException(DEBUG)


def _read(cpu: Cpu, base: int, offset: int, size: int) -> bytes:
    return cpu.load(table_address(cpu.core, base, offset), size, system=True).to_bytes(size, "little")


def _probe(cpu: Cpu, base: int) -> None:
    """Raise the page fault that writing to either TSS would, before anything has changed (step 8)."""
    core = cpu.core
    cpu.probe_write(base, 2, system=True)
    old = core.segments[TR]
    mine = _layout(old.attributes & 0xF)
    cpu.probe_write(table_address(core, old.base, mine.registers), mine.ldt - mine.registers, system=True)


def _save(cpu: Cpu, base: int, layout: _Layout, flags: int, rip: int) -> None:
    """The old task's registers into its TSS; its selectors are 16 bits each."""
    core = cpu.core
    size = layout.size
    mask = (1 << 8 * size) - 1
    values = (rip, flags, *core.regs[:8])
    image = b"".join((value & mask).to_bytes(size, "little") for value in values)
    at = table_address(core, base, layout.registers)
    cpu.store(at, len(image), int.from_bytes(image, "little"), system=True)
    for index in range(layout.segment_count):
        at = table_address(core, base, layout.segment(index))
        cpu.store(at, 2, core.segments[index].selector, system=True)


def _set_busy(cpu: Cpu, selector: int, busy: bool) -> None:
    """Mark a TSS descriptor in the GDT."""
    core = cpu.core
    at = table_address(core, core.gdtr_base, (selector & ~7) + segments.ACCESS_BYTE)
    access = cpu.load(at, 1, system=True) & ~TSS_BUSY_BIT
    cpu.store(at, 1, access | (TSS_BUSY_BIT if busy else 0), system=True)


def _load(cpu: Cpu, task: Task, layout: _Layout, image: bytes, *, nested: bool, external: int) -> None:
    """The new task's registers out of its TSS's `image`; then its segments, whose faults are its own."""
    core = cpu.core
    size = layout.size

    def word(offset: int, length: int) -> int:
        return int.from_bytes(image[offset : offset + length], "little")

    core.segments[TR].set(
        task.selector, task.descriptor.base, task.descriptor.limit, task.descriptor.attributes | TSS_BUSY_BIT
    )
    core.cr0 |= CR0_TS
    if layout is _WIDE and core.cr0 & CR0_PG:
        core.cr3 = word(_CR3, 4)
        cpu.flush_tlb(keep_global=bool(core.cr4 & CR4_PGE))
    rip = word(layout.registers, size)
    flags = word(layout.registers + size, size) & VALID | FIXED
    upper = 0 if layout is _WIDE else 0xFFFF0000  # as processors do; the manual leaves it open
    for number in range(8):
        core.regs[number] = upper | word(layout.registers + size * (2 + number), size)
    selectors = [word(layout.segment(index), 2) for index in range(layout.segment_count)]
    selectors += [0] * (6 - len(selectors))
    for index, selector in enumerate(selectors):
        core.segments[index].set(selector, 0, 0, 0)
    core.segments[LDTR].set(word(layout.ldt, 2), 0, 0, 0)
    core.rflags = flags | NT if nested else flags
    core.cpl = 3 if flags & VM else selectors[CS] & SELECTOR_RPL
    core.rip = rip
    try:
        _load_segments(cpu, selectors, core.segments[LDTR].selector, external)
    finally:
        core.rip = rip  # CS's base has come up
        cpu.mode_changed()


def _load_segments(cpu: Cpu, selectors: list[int], ldt: int, external: int) -> None:
    """The descriptors of the new task's segments, checked in the order of table 7-1."""
    core = cpu.core
    _load_local_table(cpu, ldt, external)
    if core.rflags & VM:
        for index in (CS, SS, DS, ES, FS, GS):
            segments.set_virtual(core, index, selectors[index])
        return
    _load_code(cpu, selectors[CS], external)
    stack = selectors[SS]
    descriptor, address = segments.check_stack(cpu, stack, core.cpl, INVALID_TSS, external)
    segments.mark_accessed(cpu, descriptor, address)
    segments.set_stack(core, stack, descriptor)
    for index in (DS, ES, FS, GS):
        _load_data(cpu, index, selectors[index], external)


def _load_local_table(cpu: Cpu, selector: int, external: int) -> None:
    core = cpu.core
    if segments.is_null(selector):
        return
    error = selector & ~SELECTOR_RPL | external
    address = None if selector & SELECTOR_TI else segments.descriptor_address(core, selector)
    if address is None:
        raise GuestException(INVALID_TSS, error)
    descriptor = parse_segment(cpu.load(address, 8, system=True))
    if not descriptor.is_system or descriptor.type != LDT or not descriptor.present:
        raise GuestException(INVALID_TSS, error)
    core.segments[LDTR].set(selector, descriptor.base, descriptor.limit, descriptor.attributes)


def _load_code(cpu: Cpu, selector: int, external: int) -> None:
    error = selector & ~SELECTOR_RPL | external
    if segments.is_null(selector):
        raise GuestException(INVALID_TSS, external)
    descriptor, address = segments.fetch(cpu, selector, INVALID_TSS, external)
    rpl = selector & SELECTOR_RPL
    wrong_level = descriptor.dpl > rpl if descriptor.is_conforming else descriptor.dpl != rpl
    if not descriptor.is_code or wrong_level:
        raise GuestException(INVALID_TSS, error)
    if not descriptor.present:
        raise GuestException(SEGMENT_NOT_PRESENT, error)
    segments.mark_accessed(cpu, descriptor, address)
    segments.set_code(cpu.core, selector, descriptor, rpl)


def _load_data(cpu: Cpu, index: int, selector: int, external: int) -> None:
    core = cpu.core
    if segments.is_null(selector):
        return
    error = selector & ~SELECTOR_RPL | external
    descriptor, address = segments.fetch(cpu, selector, INVALID_TSS, external)
    privileged = not descriptor.is_conforming and descriptor.dpl < max(core.cpl, selector & SELECTOR_RPL)
    if not descriptor.is_readable or privileged:
        raise GuestException(INVALID_TSS, error)
    if not descriptor.present:
        raise GuestException(SEGMENT_NOT_PRESENT, error)
    segments.mark_accessed(cpu, descriptor, address)
    segments.set_data(core, index, selector, descriptor)


