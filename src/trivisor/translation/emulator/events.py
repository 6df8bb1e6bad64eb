"""Delivery of exceptions and interrupts through the IDT (Intel SDM 3A chapter 6; 2A, INT n).

All checks and memory writes come before the first register changes, so that a
`GuestException` out of `deliver` leaves the processor as it was.
"""

from __future__ import annotations

from trivisor.machine.exits import ExceptionExit, Shutdown
from trivisor.translation.core import CS, DS, ES, FS, GS, RSP, SS, TR, Core
from trivisor.translation.emulator import segments, task_switch
from trivisor.translation.emulator.contract import Cpu, notify
from trivisor.translation.emulator.operands import (
    MASK16,
    MASK32,
    MASK64,
    general_protection,
    in_64bit_mode,
    is_canonical,
    table_address,
    within_limit,
)
from trivisor.translation.emulator.stack import pack, push, set_stack_pointer, stack_mask
from trivisor.translation.emulator.task_switch import Source
from trivisor.x86.control import CR0_PE, DR7_GD, EFER_LMA
from trivisor.x86.descriptors import (
    DB,
    INTERRUPT_GATE,
    INTERRUPT_GATE16,
    LONG,
    PRESENT,
    TASK_GATE,
    TRAP_GATE,
    TRAP_GATE16,
    TSS_BUSY,
    TYPE,
    Gate,
    SegmentDescriptor,
    parse_gate,
    parse_gate64,
)
from trivisor.x86.exceptions import (
    BREAKPOINT,
    DEBUG,
    DOUBLE_FAULT,
    ERROR_EXT,
    ERROR_IDT,
    INVALID_TSS,
    MACHINE_CHECK,
    NMI,
    OVERFLOW,
    PAGE_FAULT,
    SEGMENT_NOT_PRESENT,
    STACK_FAULT,
    GuestException,
    Outcome,
    combine,
)
from trivisor.x86.flags import AC, IF, NT, RF, TF, VM
from trivisor.x86.msr import DEBUGCTL_BTF, IA32_DEBUGCTL

_NOT_FAULTS = frozenset({DEBUG, NMI, BREAKPOINT, OVERFLOW, DOUBLE_FAULT, MACHINE_CHECK})
"""Vectors that are traps or aborts: their frames have RF as it is (SDM 3B 17.3.1.1).

Nor do the faults of #DB set RF: the handler of an instruction breakpoint does (17.3.1.1), and after one on debug
register access (DR7.GD) the instruction is to be tried again.
"""


def deliver(
    cpu: Cpu,
    vector: int,
    *,
    error_code: int | None = None,
    software: bool = False,
    external: bool = False,
    return_rip: int | None = None,
) -> None:
    """Enter the guest's handler for `vector`.

    `software` is for INT n, INT3 and INTO (the gate's DPL counts, EXT is clear),
    `external` for hardware interrupts and NMI; neither, for exceptions and INT1.
    The frame gets `return_rip`, or rip.  Raises `GuestException` for a fault on
    the way; after one of a task gate the new task's state is there.
    """
    core = cpu.core
    rip = core.rip if return_rip is None else return_rip
    flags = core.rflags
    if software or return_rip is not None:
        flags &= ~RF
    elif not external and vector not in _NOT_FAULTS:
        flags |= RF
    extern = 0 if software else ERROR_EXT
    if core.efer & EFER_LMA:
        _deliver_long(cpu, vector, error_code, software, extern, rip, flags)
    elif core.cr0 & CR0_PE:
        _deliver_protected(cpu, vector, error_code, software, extern, rip, flags)
    else:
        _deliver_real(cpu, vector, rip, flags)
    core.interrupt_shadow = False
    core.debug.step_trap = False
    if vector == DEBUG and not software:
        core.dr[7] &= ~DR7_GD
        cpu.msrs.write(IA32_DEBUGCTL, cpu.msrs.read(IA32_DEBUGCTL) & ~DEBUGCTL_BTF)
    if external and vector == NMI:
        core.nmi_blocked = True
    cpu.mode_changed()


def raise_exception(cpu: Cpu, exception: GuestException) -> Shutdown | None:
    """Deliver an exception, and what comes of delivering it; Shutdown is a triple fault (SDM 3A 6.15)."""
    current = exception
    while True:
        vector, error_code = current.vector, current.error_code
        if vector == PAGE_FAULT and current.address is not None:
            cpu.core.cr2 = current.address
        if ExceptionExit in cpu.observed:
            notify(cpu, ExceptionExit(vector, error_code, current.address or 0))
        try:
            deliver(cpu, vector, error_code=error_code)
            return None
        except GuestException as second:
            outcome = combine(vector, second.vector)
            if outcome is Outcome.SHUTDOWN:
                return Shutdown(second.vector)
            if outcome is Outcome.SERIAL:
                current = second
            else:
                if second.vector == PAGE_FAULT and second.address is not None:
                    cpu.core.cr2 = second.address
                current = GuestException(DOUBLE_FAULT, 0)


def _gate_error(vector: int, extern: int) -> int:
    return vector << 3 | ERROR_IDT | extern


def _check_gate(gate: Gate, kinds: tuple[int, ...], core: Core, vector: int, software: bool) -> None:
    extern = 0 if software else ERROR_EXT
    if gate.type not in kinds or (software and gate.dpl < core.cpl):
        raise general_protection(_gate_error(vector, extern))
    if not gate.present:
        raise GuestException(SEGMENT_NOT_PRESENT, _gate_error(vector, extern))


def _handler_segment(cpu: Cpu, selector: int, extern: int) -> tuple[SegmentDescriptor, int, int]:
    """The handler's code segment, its address, and the privilege level that it runs at."""
    if segments.is_null(selector):
        raise general_protection(extern)
    descriptor, address = segments.fetch(cpu, selector, external=extern)
    cpl = cpu.core.cpl
    if not descriptor.is_code or descriptor.dpl > cpl:
        raise general_protection(selector & ~3 | extern)
    if not descriptor.present:
        raise GuestException(SEGMENT_NOT_PRESENT, selector & ~3 | extern)
    return descriptor, address, cpl if descriptor.is_conforming else descriptor.dpl


def _flags_in_handler(core: Core, flags: int, interrupt_gate: bool) -> None:
    core.rflags = flags & ~(TF | NT | RF | VM | (IF if interrupt_gate else 0))


def tss_stack64(cpu: Cpu, slot: int, extern: int) -> int:
    """A stack pointer out of the 64-bit TSS: slots 0 to 2 are RSPn, 4 to 10 IST1 to IST7 (figure 7-11)."""
    tr = cpu.core.segments[TR]
    offset = 4 + 8 * slot
    if offset + 7 > tr.limit:
        raise GuestException(INVALID_TSS, tr.selector & ~3 | extern)
    pointer = cpu.load(table_address(cpu.core, tr.base, offset), 8, system=True)
    if not is_canonical(pointer):
        raise GuestException(STACK_FAULT, extern)
    return pointer


def _deliver_long(
    cpu: Cpu, vector: int, error_code: int | None, software: bool, extern: int, rip: int, flags: int
) -> None:
    core = cpu.core
    if vector * 16 + 15 > core.idtr_limit:
        raise general_protection(_gate_error(vector, extern))
    gate = parse_gate64(cpu.load(table_address(core, core.idtr_base, vector * 16), 16, system=True))
    _check_gate(gate, (INTERRUPT_GATE, TRAP_GATE), core, vector, software)
    descriptor, address, cpl = _handler_segment(cpu, gate.selector, extern)
    if descriptor.attributes & (LONG | DB) != LONG:
        raise general_protection(gate.selector & ~3 | extern)
    if not is_canonical(gate.offset):
        raise general_protection(extern)
    inner = cpl < core.cpl
    if gate.ist:
        pointer = tss_stack64(cpu, 3 + gate.ist, extern)
    elif inner:
        pointer = tss_stack64(cpu, cpl, extern)
    else:
        pointer = core.regs[RSP] if in_64bit_mode(core) else core.regs[RSP] & stack_mask(core)
    ss, cs = core.segments[SS], core.segments[CS]
    values: tuple[int, ...] = (ss.selector, core.regs[RSP], flags, cs.selector, rip)
    if error_code is not None:
        values += (error_code,)
    size = 8 * len(values)
    pointer = ((pointer & ~15) - size) & MASK64
    if not (is_canonical(pointer) and is_canonical(pointer + size - 1)):
        raise GuestException(STACK_FAULT, extern)
    segments.mark_accessed(cpu, descriptor, address)
    cpu.store(pointer, size, pack(values, 8), system=inner)
    segments.set_code(core, gate.selector, descriptor, cpl)
    if inner:
        segments.set_null_stack(core, cpl)
    core.regs[RSP] = pointer
    core.rip = gate.offset
    _flags_in_handler(core, flags, gate.type == INTERRUPT_GATE)


def tss_stack(cpu: Cpu, level: int, extern: int) -> tuple[int, int]:
    """(selector, pointer) of the stack for a level out of a 16- or 32-bit TSS (figures 7-2, 7-10)."""
    tr = cpu.core.segments[TR]
    wide = tr.attributes & TYPE == TSS_BUSY
    offset, size = (4 + 8 * level, 6) if wide else (2 + 4 * level, 4)
    if not tr.attributes & PRESENT or offset + size - 1 > tr.limit:
        raise GuestException(INVALID_TSS, tr.selector & ~3 | extern)
    raw = cpu.load(table_address(cpu.core, tr.base, offset), size, system=True)
    return (raw >> 32, raw & MASK32) if wide else (raw >> 16, raw & MASK16)


def enter_inner_stack(
    cpu: Cpu, cpl: int, size: int, values: tuple[int, ...], extern: int, code: tuple[SegmentDescriptor, int]
) -> None:
    """Switch to the TSS's stack for `cpl` and push `values` there: all that legacy gates do to SS:ESP.

    Also marks the `code` segment accessed (before anything changes).  CS, CPL and rip are the caller's.
    """
    core = cpu.core
    selector, pointer = tss_stack(cpu, cpl, extern)
    descriptor, address = segments.check_stack(cpu, selector, cpl, INVALID_TSS, extern)
    mask = MASK32 if descriptor.attributes & DB else MASK16
    total = size * len(values)
    pointer = (pointer - total) & mask
    if not within_limit(descriptor.attributes, descriptor.limit, pointer, total):
        raise GuestException(STACK_FAULT, selector & ~3 | extern)
    segments.mark_accessed(cpu, *code)
    segments.mark_accessed(cpu, descriptor, address)
    cpu.store((descriptor.base + pointer) & MASK32, total, pack(values, size), system=True)
    segments.set_stack(core, selector, descriptor)
    set_stack_pointer(core, mask, pointer)


def _deliver_protected(
    cpu: Cpu, vector: int, error_code: int | None, software: bool, extern: int, rip: int, flags: int
) -> None:
    core = cpu.core
    if vector * 8 + 7 > core.idtr_limit:
        raise general_protection(_gate_error(vector, extern))
    gate = parse_gate(cpu.load(table_address(core, core.idtr_base, vector * 8), 8, system=True))
    kinds = (INTERRUPT_GATE, TRAP_GATE, INTERRUPT_GATE16, TRAP_GATE16, TASK_GATE)
    _check_gate(gate, kinds, core, vector, software)
    if gate.type == TASK_GATE:
        task = task_switch.gate_task(cpu, gate.selector, extern)
        task_switch.switch(cpu, task, Source.EVENT, rip, flags=flags, error_code=error_code, external=extern)
        return
    descriptor, address, cpl = _handler_segment(cpu, gate.selector, extern)
    if flags & VM and cpl:
        raise general_protection(gate.selector & ~3 | extern)
    if not within_limit(descriptor.attributes, descriptor.limit, gate.offset, 1):
        raise general_protection(extern)
    size = 4 if gate.type in (INTERRUPT_GATE, TRAP_GATE) else 2
    values: tuple[int, ...] = (flags, core.segments[CS].selector, rip)
    if error_code is not None:
        values += (error_code,)
    if cpl < core.cpl:
        values = (core.segments[SS].selector, core.regs[RSP], *values)
        if flags & VM:
            values = (*(core.segments[index].selector for index in (GS, FS, DS, ES)), *values)
        enter_inner_stack(cpu, cpl, size, values, extern, (descriptor, address))
        if flags & VM:
            for index in (GS, FS, DS, ES):
                core.segments[index].set(0, 0, 0, 0)
    else:
        segments.mark_accessed(cpu, descriptor, address)
        try:
            push(cpu, size, *values)
        except GuestException as fault:
            if fault.vector == STACK_FAULT:
                raise GuestException(STACK_FAULT, extern) from None
            raise
    segments.set_code(core, gate.selector, descriptor, cpl)
    core.rip = gate.offset
    _flags_in_handler(core, flags, gate.type in (INTERRUPT_GATE, INTERRUPT_GATE16))


def _deliver_real(cpu: Cpu, vector: int, rip: int, flags: int) -> None:
    """Through the interrupt vector table (SDM 3B 20.1.4)."""
    core = cpu.core
    if vector * 4 + 3 > core.idtr_limit:
        raise general_protection(0)
    target = cpu.load(table_address(core, core.idtr_base, vector * 4), 4, system=True)
    push(cpu, 2, flags, core.segments[CS].selector, rip)
    segments.load_real(cpu, CS, target >> 16)
    core.rip = target & MASK16
    core.rflags = flags & ~(IF | TF | RF | AC)
