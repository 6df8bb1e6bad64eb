"""Loading segment registers: descriptor fetch, the checks, accessed and busy bits.

Intel SDM 3A 3.4 and 5.3 to 5.8; 2B, MOV, LLDT and LTR.
"""

from __future__ import annotations

from array import array

from trivisor.translation.core import CS, DS, ES, FS, GS, LDTR, SS, TR, Core
from trivisor.translation.emulator.contract import Cpu
from trivisor.translation.emulator.operands import general_protection, in_64bit_mode, is_canonical, table_address
from trivisor.translation.layout import KNOWN_DATA_ENTRIES, KNOWN_DATA_SIZE, OFFSETS
from trivisor.x86.control import CR0_PE, EFER_LMA
from trivisor.x86.descriptors import (
    DB,
    DPL,
    DPL_SHIFT,
    LDT,
    LONG,
    PRESENT,
    SELECTOR_INDEX,
    SELECTOR_RPL,
    SELECTOR_TI,
    TSS,
    TSS16,
    TSS_BUSY_BIT,
    TYPE_ACCESSED,
    TYPE_CODE,
    TYPE_CONFORMING,
    TYPE_WRITABLE,
    S,
    SegmentDescriptor,
    parse_segment,
    parse_system_segment,
    upper_half_is_valid,
)
from trivisor.x86.exceptions import GENERAL_PROTECTION, SEGMENT_NOT_PRESENT, STACK_FAULT, GuestException
from trivisor.x86.flags import VM

ACCESS_BYTE = 5
"""Offset of the type, DPL and P byte in a descriptor."""
REAL_MODE_CODE = PRESENT | S | TYPE_CODE | 3


VIRTUAL_8086 = PRESENT | DPL | S | TYPE_WRITABLE | TYPE_ACCESSED
"""Attributes of every segment in virtual-8086 mode (SDM 3C 26.3.1.2)."""


def is_null(selector: int) -> bool:
    return not selector & ~SELECTOR_RPL


def has_segment_protection(core: Core) -> bool:
    """Whether selectors name descriptors: protected mode, not virtual-8086 mode."""
    return bool(core.cr0 & CR0_PE) and not core.rflags & VM


def descriptor_address(core: Core, selector: int, size: int = 8) -> int | None:
    """The linear address of a selector's descriptor, or None when its table does not reach so far."""
    offset = selector & SELECTOR_INDEX
    if selector & SELECTOR_TI:
        ldtr = core.segments[LDTR]
        base, limit = ldtr.base, ldtr.limit
        if not ldtr.attributes & PRESENT:
            return None
    else:
        base, limit = core.gdtr_base, core.gdtr_limit
    return table_address(core, base, offset) if offset + size - 1 <= limit else None


def fetch(
    cpu: Cpu, selector: int, vector: int = GENERAL_PROTECTION, external: int = 0
) -> tuple[SegmentDescriptor, int]:
    """A selector's descriptor and its linear address; the fault `vector` when it is outside its table."""
    address = descriptor_address(cpu.core, selector)
    if address is None:
        raise GuestException(vector, selector & ~SELECTOR_RPL | external)
    return parse_segment(cpu.load(address, 8, system=True)), address


def mark_accessed(cpu: Cpu, descriptor: SegmentDescriptor, address: int) -> None:
    """Set the accessed bit in memory if it is clear; to be called before any register changes."""
    if not descriptor.attributes & TYPE_ACCESSED:
        access = (descriptor.attributes | TYPE_ACCESSED) & 0xFF
        cpu.store(table_address(cpu.core, address, ACCESS_BYTE), 1, access, system=True)


def _set(cpu: Cpu, index: int, selector: int, base: int, limit: int, attributes: int) -> None:
    """Write a segment register, and tell the engine if the hidden part changed."""
    view = cpu.core.segments[index]
    same = view.base == base and view.limit == limit and view.attributes == attributes
    view.set(selector, base, limit, attributes)
    if not same:
        cpu.mode_changed()


def load(cpu: Cpu, index: int, selector: int) -> None:
    """Load ES, SS, DS, FS, GS, LDTR or TR; raises #GP, #SS or #NP with the selector, changing nothing."""
    selector &= 0xFFFF
    if index == LDTR:
        load_ldtr(cpu, selector)
    elif index == TR:
        load_tr(cpu, selector)
    elif not has_segment_protection(cpu.core):
        load_real(cpu, index, selector)
    elif index == SS:
        _load_stack(cpu, selector)
    else:
        _load_data(cpu, index, selector)


def set_virtual(core: Core, index: int, selector: int) -> None:
    """A segment register as virtual-8086 mode has it (SDM 3B 20.2.2); the caller tells the engine."""
    core.segments[index].set(selector, selector << 4, 0xFFFF, VIRTUAL_8086)


def load_real(cpu: Cpu, index: int, selector: int) -> None:
    """Load without a descriptor: the base is the selector times 16; in real mode limit and size stay as they were."""
    core = cpu.core
    view = core.segments[index]
    if core.rflags & VM:
        _set(cpu, index, selector, selector << 4, 0xFFFF, VIRTUAL_8086)
        return
    attributes = view.attributes & DB | REAL_MODE_CODE if index == CS else view.attributes
    _set(cpu, index, selector, selector << 4, view.limit, attributes)


def _load_data(cpu: Cpu, index: int, selector: int) -> None:
    if is_null(selector):
        _set(cpu, index, selector, 0, 0, 0)
        return
    descriptor, address = fetch(cpu, selector)
    dpl = descriptor.dpl
    privileged = not descriptor.is_conforming and (selector & SELECTOR_RPL > dpl or cpu.core.cpl > dpl)
    if not descriptor.is_readable or privileged:
        raise general_protection(selector & ~SELECTOR_RPL)
    if not descriptor.present:
        raise GuestException(SEGMENT_NOT_PRESENT, selector & ~SELECTOR_RPL)
    mark_accessed(cpu, descriptor, address)
    _set(cpu, index, selector, descriptor.base, descriptor.limit, descriptor.attributes | TYPE_ACCESSED)
    if in_64bit_mode(cpu.core) and not selector & SELECTOR_TI:
        _remember(cpu, selector, descriptor, address)


def _remember(cpu: Cpu, selector: int, descriptor: SegmentDescriptor, address: int) -> None:
    """Have the native helper for MOV to a data segment register know a descriptor that is good at this CPL."""
    words = cpu.core.words
    at = (OFFSETS["KNOWN_DATA"] + (selector >> 3) % KNOWN_DATA_ENTRIES * KNOWN_DATA_SIZE) // 8
    words[at] = selector | cpu.core.cpl << 16
    words[at + 1] = cpu.load(address, 8, system=True)
    words[at + 2 : at + 5] = array("Q", (descriptor.base, descriptor.limit, descriptor.attributes | TYPE_ACCESSED))


def _load_stack(cpu: Cpu, selector: int) -> None:
    core = cpu.core
    cpl = core.cpl
    if is_null(selector):
        if not in_64bit_mode(core) or cpl == 3 or selector != cpl:
            raise general_protection(0)
        _set(cpu, SS, selector, 0, 0, cpl << DPL_SHIFT)
        return
    descriptor, address = check_stack(cpu, selector, cpl, GENERAL_PROTECTION)
    mark_accessed(cpu, descriptor, address)
    _set(cpu, SS, selector, descriptor.base, descriptor.limit, descriptor.attributes | TYPE_ACCESSED)


def check_stack(
    cpu: Cpu, selector: int, cpl: int, vector: int, external: int = 0
) -> tuple[SegmentDescriptor, int]:
    """The descriptor of a stack segment for privilege level `cpl`, and its address.

    A wrong one is the fault `vector` (#GP, or #TS for a selector out of the TSS), an absent one #SS.
    """
    error = selector & ~SELECTOR_RPL | external
    if is_null(selector):
        raise GuestException(vector, external)
    descriptor, address = fetch(cpu, selector, vector, external)
    if selector & SELECTOR_RPL != cpl or not descriptor.is_writable or descriptor.dpl != cpl:
        raise GuestException(vector, error)
    if not descriptor.present:
        raise GuestException(STACK_FAULT, error)
    return descriptor, address


def set_data(core: Core, index: int, selector: int, descriptor: SegmentDescriptor) -> None:
    """Put a checked data segment, already marked accessed, into a register; the caller tells the engine."""
    attributes = descriptor.attributes | TYPE_ACCESSED
    core.segments[index].set(selector, descriptor.base, descriptor.limit, attributes)


def set_stack(core: Core, selector: int, descriptor: SegmentDescriptor) -> None:
    """The same for SS."""
    set_data(core, SS, selector, descriptor)


def set_null_stack(core: Core, cpl: int) -> None:
    """SS as 64-bit mode leaves it after entering a more privileged level: null, with RPL = CPL."""
    core.segments[SS].set(cpl, 0, 0, cpl << DPL_SHIFT)


def check_code(descriptor: SegmentDescriptor, selector: int, core: Core, *, external: int = 0) -> None:
    """Raise #GP unless it is a code segment (and not both L and D in long mode), #NP unless present."""
    error = selector & ~SELECTOR_RPL | external
    both = LONG | DB
    if not descriptor.is_code or (core.efer & EFER_LMA and descriptor.attributes & both == both):
        raise general_protection(error)
    if not descriptor.present:
        raise GuestException(SEGMENT_NOT_PRESENT, error)


def set_code(core: Core, selector: int, descriptor: SegmentDescriptor, cpl: int) -> None:
    """Put a checked code segment, already marked accessed, into CS with RPL = `cpl`, which becomes the CPL.

    The caller tells the engine.
    """
    attributes = descriptor.attributes | TYPE_ACCESSED
    core.segments[CS].set(selector & ~SELECTOR_RPL | cpl, descriptor.base, descriptor.limit, attributes)
    core.cpl = cpl


def drop_privileged_data(core: Core) -> None:
    """On a return to an outer level: null the data segments that it may not use (SDM 3A 5.8.6)."""
    cpl = core.cpl
    for index in (ES, DS, FS, GS):
        view = core.segments[index]
        attributes = view.attributes
        if not attributes & PRESENT:
            continue
        conforming = attributes & TYPE_CODE and attributes & TYPE_CONFORMING
        if not conforming and (attributes & DPL) >> DPL_SHIFT < cpl:
            view.set(0, view.base, 0, 0)  # unusable; in 64-bit code the base of FS and GS still counts


def _fetch_system(cpu: Cpu, selector: int, types: tuple[int, ...]) -> tuple[SegmentDescriptor, int]:
    """The GDT descriptor of an LDT or TSS, 16 bytes in long mode, of one of `types` and present."""
    core = cpu.core
    long_mode = core.efer & EFER_LMA
    error = selector & ~SELECTOR_RPL
    size = 16 if long_mode else 8
    address = None if selector & SELECTOR_TI else descriptor_address(core, selector, size)
    if address is None:
        raise general_protection(error)
    raw = cpu.load(address, size, system=True)
    descriptor = parse_system_segment(raw) if long_mode else parse_segment(raw)
    if not descriptor.is_system or descriptor.type not in types:
        raise general_protection(error)
    if not descriptor.present:
        raise GuestException(SEGMENT_NOT_PRESENT, error)
    if long_mode and not (upper_half_is_valid(raw) and is_canonical(descriptor.base)):
        raise general_protection(error)
    return descriptor, address


def load_ldtr(cpu: Cpu, selector: int) -> None:
    """LLDT's work after its privilege checks; a null selector leaves no LDT."""
    if is_null(selector):
        cpu.core.segments[LDTR].set(selector, 0, 0, 0)
        return
    descriptor, _ = _fetch_system(cpu, selector, (LDT,))
    cpu.core.segments[LDTR].set(selector, descriptor.base, descriptor.limit, descriptor.attributes)


def load_tr(cpu: Cpu, selector: int) -> None:
    """LTR's work after its privilege checks: the TSS must be available, and becomes busy."""
    if is_null(selector):
        raise general_protection(0)
    types = (TSS,) if cpu.core.efer & EFER_LMA else (TSS16, TSS)
    descriptor, address = _fetch_system(cpu, selector, types)
    attributes = descriptor.attributes | TSS_BUSY_BIT
    cpu.store(table_address(cpu.core, address, ACCESS_BYTE), 1, attributes & 0xFF, system=True)
    cpu.core.segments[TR].set(selector, descriptor.base, descriptor.limit, attributes)
