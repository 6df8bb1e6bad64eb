"""Far JMP, CALL and RET: code segments and call gates of every width (Intel SDM 3A 5.8; 2A and 2B)."""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Code, Instruction

from trivisor.translation.core import CS, RSP, SS, Core
from trivisor.translation.emulator import segments, task_switch
from trivisor.translation.emulator.contract import Cpu, Handler
from trivisor.translation.emulator.events import enter_inner_stack, tss_stack64
from trivisor.translation.emulator.operands import (
    MASK16,
    MASK64,
    general_protection,
    is_canonical,
    memory_address,
    next_rip,
    within_limit,
)
from trivisor.translation.emulator.stack import pack, push, set_stack_pointer, stack_mask, top
from trivisor.translation.emulator.task_switch import Source
from trivisor.x86.control import EFER_LMA
from trivisor.x86.descriptors import (
    CALL_GATE,
    CALL_GATE16,
    DB,
    LONG,
    SELECTOR_RPL,
    Gate,
    SegmentDescriptor,
    parse_gate,
    parse_gate64,
    upper_half_is_valid,
)
from trivisor.x86.exceptions import GENERAL_PROTECTION, SEGMENT_NOT_PRESENT, STACK_FAULT, GuestException

FarPointer = Callable[[Cpu, Instruction], tuple[int, int]]
"""Gets (selector, offset) out of an instruction."""


def check_target(core: Core, descriptor: SegmentDescriptor, offset: int) -> None:
    """Raise #GP(0) unless `offset` lies in a code segment that is about to be entered."""
    if descriptor.attributes & LONG and core.efer & EFER_LMA:
        inside = is_canonical(offset)
    else:
        inside = within_limit(descriptor.attributes, descriptor.limit, offset, 1)
    if not inside:
        raise general_protection()


def _direct(cpu: Cpu, instruction: Instruction) -> tuple[int, int]:
    return instruction.far_branch_selector, instruction.far_branch32


def _direct16(cpu: Cpu, instruction: Instruction) -> tuple[int, int]:
    return instruction.far_branch_selector, instruction.far_branch16


def _indirect(size: int) -> FarPointer:
    def read(cpu: Cpu, instruction: Instruction) -> tuple[int, int]:
        pointer = cpu.load(memory_address(cpu.core, instruction, size + 2), size + 2)
        return pointer >> 8 * size, pointer & ((1 << 8 * size) - 1)

    return read


def _code_or_gate(
    cpu: Cpu, selector: int
) -> tuple[SegmentDescriptor, int, Gate | None]:
    """What a far transfer's selector names: a checked code segment, or a call gate that may be used."""
    core = cpu.core
    if segments.is_null(selector):
        raise general_protection()
    descriptor, address = segments.fetch(cpu, selector)
    error = selector & ~SELECTOR_RPL
    if not descriptor.is_system:
        cpl = core.cpl
        if descriptor.is_conforming:
            allowed = descriptor.dpl <= cpl
        else:
            allowed = selector & SELECTOR_RPL <= cpl and descriptor.dpl == cpl
        if descriptor.is_code and not allowed:
            raise general_protection(error)
        segments.check_code(descriptor, selector, core)
        return descriptor, address, None
    gate = _call_gate(cpu, selector, descriptor, address)
    if gate.dpl < max(core.cpl, selector & SELECTOR_RPL):
        raise general_protection(error)
    if not gate.present:
        raise GuestException(SEGMENT_NOT_PRESENT, error)
    return descriptor, address, gate


def _call_gate(cpu: Cpu, selector: int, descriptor: SegmentDescriptor, address: int) -> Gate:
    kind = descriptor.type
    error = selector & ~SELECTOR_RPL
    if cpu.core.efer & EFER_LMA:
        if kind != CALL_GATE or segments.descriptor_address(cpu.core, selector, 16) is None:
            raise general_protection(error)
        raw = cpu.load(address, 16, system=True)
        if not upper_half_is_valid(raw):
            raise general_protection(error)
        return parse_gate64(raw)
    if kind not in (CALL_GATE, CALL_GATE16):
        raise general_protection(error)
    return parse_gate(cpu.load(address, 8, system=True))


def _gate_target(cpu: Cpu, gate: Gate, *, jump: bool) -> tuple[SegmentDescriptor, int]:
    """The code segment that a call gate leads to, checked but for its offset."""
    core = cpu.core
    if segments.is_null(gate.selector):
        raise general_protection()
    descriptor, address = segments.fetch(cpu, gate.selector)
    cpl = core.cpl
    wrong_level = descriptor.dpl > cpl or (
        jump and not descriptor.is_conforming and descriptor.dpl != cpl
    )
    not_long = core.efer & EFER_LMA and descriptor.attributes & (LONG | DB) != LONG
    if not descriptor.is_code or wrong_level or not_long:
        raise general_protection(gate.selector & ~SELECTOR_RPL)
    segments.check_code(descriptor, gate.selector, core)
    return descriptor, address


def _enter(cpu: Cpu, selector: int, descriptor: SegmentDescriptor, cpl: int, offset: int) -> None:
    segments.set_code(cpu.core, selector, descriptor, cpl)
    cpu.core.rip = offset
    cpu.mode_changed()


def _enter_real(cpu: Cpu, selector: int, offset: int) -> None:
    segments.load_real(cpu, CS, selector)
    cpu.core.rip = offset


def _check_real(core: Core, offset: int) -> None:
    if offset > core.segments[CS].limit:
        raise general_protection()


def _jump(pointer: FarPointer) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        selector, offset = pointer(cpu, instruction)
        if not segments.has_segment_protection(core):
            _check_real(core, offset)
            _enter_real(cpu, selector, offset)
            return
        task = task_switch.named_task(cpu, selector)
        if task is not None:
            task_switch.switch(cpu, task, Source.JUMP, next_rip(core, instruction))
            return
        descriptor, address, gate = _code_or_gate(cpu, selector)
        if gate is not None:
            selector, offset = gate.selector, gate.offset
            descriptor, address = _gate_target(cpu, gate, jump=True)
        check_target(core, descriptor, offset)
        segments.mark_accessed(cpu, descriptor, address)
        _enter(cpu, selector, descriptor, core.cpl, offset)

    return execute


def _call(pointer: FarPointer, size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        selector, offset = pointer(cpu, instruction)
        return_address = (core.segments[CS].selector, next_rip(core, instruction))
        if not segments.has_segment_protection(core):
            _check_real(core, offset)
            push(cpu, size, *return_address)
            _enter_real(cpu, selector, offset)
            return
        task = task_switch.named_task(cpu, selector)
        if task is not None:
            task_switch.switch(cpu, task, Source.CALL, return_address[1])
            return
        descriptor, address, gate = _code_or_gate(cpu, selector)
        if gate is not None:
            _call_through(cpu, gate, return_address)
            return
        check_target(core, descriptor, offset)
        segments.mark_accessed(cpu, descriptor, address)
        push(cpu, size, *return_address)
        _enter(cpu, selector, descriptor, core.cpl, offset)

    return execute


def _call_through(cpu: Cpu, gate: Gate, return_address: tuple[int, int]) -> None:
    """CALL by a call gate, which may lead to a more privileged level and its stack (SDM 3A 5.8.4, 5.8.5)."""
    core = cpu.core
    descriptor, address = _gate_target(cpu, gate, jump=False)
    check_target(core, descriptor, gate.offset)
    cpl = core.cpl if descriptor.is_conforming else descriptor.dpl
    long_mode = core.efer & EFER_LMA
    size = 8 if long_mode else 4 if gate.type == CALL_GATE else 2
    if cpl == core.cpl:
        segments.mark_accessed(cpu, descriptor, address)
        push(cpu, size, *return_address)
    elif long_mode:
        _push_inner_long(cpu, cpl, return_address, (descriptor, address))
    else:
        old_stack = (core.segments[SS].selector, core.regs[RSP] & stack_mask(core))
        parameters = reversed(top(cpu, size, gate.parameters)) if gate.parameters else ()
        values = (*old_stack, *parameters, *return_address)
        enter_inner_stack(cpu, cpl, size, values, 0, (descriptor, address))
    _enter(cpu, gate.selector, descriptor, cpl, gate.offset)


def _push_inner_long(
    cpu: Cpu, cpl: int, return_address: tuple[int, int], code: tuple[SegmentDescriptor, int]
) -> None:
    core = cpu.core
    values = (core.segments[SS].selector, core.regs[RSP], *return_address)
    pointer = (tss_stack64(cpu, cpl, 0) - 32) & MASK64
    if not (is_canonical(pointer) and is_canonical(pointer + 31)):
        raise GuestException(STACK_FAULT, 0)
    segments.mark_accessed(cpu, *code)
    cpu.store(pointer, 32, pack(values, 8), system=True)
    segments.set_null_stack(core, cpl)
    core.regs[RSP] = pointer


def return_code(cpu: Cpu, selector: int) -> tuple[SegmentDescriptor, int]:
    """The code segment that RET or IRET goes back to, checked but for its offset."""
    core = cpu.core
    if segments.is_null(selector):
        raise general_protection()
    descriptor, address = segments.fetch(cpu, selector)
    rpl = selector & SELECTOR_RPL
    wrong_level = descriptor.dpl > rpl if descriptor.is_conforming else descriptor.dpl != rpl
    if descriptor.is_code and (rpl < core.cpl or wrong_level):
        raise general_protection(selector & ~SELECTOR_RPL)
    segments.check_code(descriptor, selector, core)
    return descriptor, address


def return_stack(
    cpu: Cpu, selector: int, cpl: int, code: SegmentDescriptor
) -> tuple[SegmentDescriptor, int] | None:
    """The stack segment of a return to `cpl`; None for the null selector that 64-bit code may have."""
    if segments.is_null(selector):
        to_64bit = code.attributes & LONG and cpu.core.efer & EFER_LMA
        if not to_64bit or cpl == 3 or selector & SELECTOR_RPL != cpl:
            raise general_protection()
        return None
    return segments.check_stack(cpu, selector, cpl, GENERAL_PROTECTION)


def finish_return(
    cpu: Cpu,
    code: tuple[int, SegmentDescriptor, int, int],
    stack: tuple[int, tuple[SegmentDescriptor, int] | None, int],
    outer: bool,
) -> None:
    """Take (selector, descriptor, address, rip) and (selector, descriptor and address, rsp) of a return."""
    core = cpu.core
    selector, descriptor, address, rip = code
    stack_selector, stack_descriptor, pointer = stack
    cpl = selector & SELECTOR_RPL
    segments.mark_accessed(cpu, descriptor, address)
    if stack_descriptor is not None:
        segments.mark_accessed(cpu, *stack_descriptor)
    segments.set_code(core, selector, descriptor, cpl)
    if stack_descriptor is None:
        segments.set_null_stack(core, cpl)
    else:
        segments.set_stack(core, stack_selector, stack_descriptor[0])
    set_stack_pointer(core, stack_mask(core), pointer)
    core.rip = rip
    if outer:
        segments.drop_privileged_data(core)


def _return(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        released = instruction.immediate16 if instruction.op_count else 0
        rip, selector = top(cpu, size, 2)
        selector &= MASK16
        mask = stack_mask(core)
        after = (core.regs[RSP] & mask) + 2 * size + released
        if not segments.has_segment_protection(core):
            _check_real(core, rip)
            _enter_real(cpu, selector, rip)
            set_stack_pointer(core, mask, after)
            return
        descriptor, address = return_code(cpu, selector)
        check_target(core, descriptor, rip)
        cpl = selector & SELECTOR_RPL
        if cpl == core.cpl:
            segments.mark_accessed(cpu, descriptor, address)
            set_stack_pointer(core, mask, after)
            _enter(cpu, selector, descriptor, cpl, rip)
            return
        pointer, stack_selector = top(cpu, size, 2, skip=2 * size + released)
        stack_selector &= MASK16
        stack = return_stack(cpu, stack_selector, cpl, descriptor)
        finish_return(
            cpu, (selector, descriptor, address, rip), (stack_selector, stack, pointer + released), True
        )
        cpu.mode_changed()

    return execute


BRANCHES: dict[int, Handler] = {
    Code.JMP_PTR1616: _jump(_direct16),
    Code.JMP_PTR1632: _jump(_direct),
    Code.JMP_M1616: _jump(_indirect(2)),
    Code.JMP_M1632: _jump(_indirect(4)),
    Code.JMP_M1664: _jump(_indirect(8)),
    Code.CALL_PTR1616: _call(_direct16, 2),
    Code.CALL_PTR1632: _call(_direct, 4),
    Code.CALL_M1616: _call(_indirect(2), 2),
    Code.CALL_M1632: _call(_indirect(4), 4),
    Code.CALL_M1664: _call(_indirect(8), 8),
    Code.RETFW: _return(2),
    Code.RETFW_IMM16: _return(2),
    Code.RETFD: _return(4),
    Code.RETFD_IMM16: _return(4),
    Code.RETFQ: _return(8),
    Code.RETFQ_IMM16: _return(8),
}
