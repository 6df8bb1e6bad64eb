"""Instructions on segment registers, descriptor tables and selectors.

Intel SDM 2A to 2D under each instruction's name; 3A 2.4 and 5.10.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, OpKind

from trivisor.translation.core import CS, DS, ES, FS, GS, LDTR, RSP, SS, TR, Core
from trivisor.translation.emulator import segments
from trivisor.translation.emulator.contract import Cpu, Handler
from trivisor.translation.emulator.control_instructions import check_umip, privileged
from trivisor.translation.emulator.operands import (
    MASK32,
    SEGMENT_INDEX,
    SIZE_MASK,
    general_protection,
    invalid_opcode,
    is_canonical,
    memory_address,
    read_operand,
    read_register,
    write_operand,
    write_register,
)
from trivisor.translation.emulator.stack import push, set_stack_pointer, stack_mask, top
from trivisor.x86.control import EFER_LMA
from trivisor.x86.descriptors import (
    CALL_GATE,
    CALL_GATE16,
    LDT,
    SELECTOR_RPL,
    TASK_GATE,
    TSS,
    TSS16,
    TSS16_BUSY,
    TSS_BUSY,
    SegmentDescriptor,
    parse_segment,
)
from trivisor.x86.flags import ZF


def _mov_to_segment(cpu: Cpu, instruction: Instruction) -> None:
    index = SEGMENT_INDEX[instruction.op0_register]
    if index == CS:
        raise invalid_opcode()
    segments.load(cpu, index, read_operand(cpu, instruction, 1, 2))
    if index == SS:
        _hold_off_events(cpu.core)


def _hold_off_events(core: Core) -> None:
    """After MOV SS and POP SS: no interrupt, and no debug exception either, before one more instruction.

    A single-step trap that would come here is lost (Intel SDM 3A 6.8.3).
    """
    core.interrupt_shadow = True
    core.debug.blocked = core.debug.active
    core.debug.step_trap = False


def _mov_from_segment(cpu: Cpu, instruction: Instruction) -> None:
    """Memory gets 16 bits; a register of 32 or 64 bits is zero-extended."""
    selector = cpu.core.segments[SEGMENT_INDEX[instruction.op1_register]].selector
    write_operand(cpu, instruction, 0, 2, selector)


def _push_segment(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        push(cpu, size, cpu.core.segments[SEGMENT_INDEX[instruction.op0_register]].selector)

    return execute


def _pop_segment(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        index = SEGMENT_INDEX[instruction.op0_register]
        mask = stack_mask(core)  # before SS.B may change
        (value,) = top(cpu, size, 1)
        segments.load(cpu, index, value)
        set_stack_pointer(core, mask, (core.regs[RSP] & mask) + size)
        if index == SS:
            _hold_off_events(core)

    return execute


def _load_far_pointer(index: int, size: int) -> Handler:
    """LDS and its like: the offset comes first in memory, then the selector."""

    def execute(cpu: Cpu, instruction: Instruction) -> None:
        pointer = cpu.load(memory_address(cpu.core, instruction, size + 2), size + 2)
        segments.load(cpu, index, pointer >> 8 * size)
        write_register(cpu.core, instruction.op0_register, pointer)

    return execute


def _load_table(name: str, base_size: int, base_mask: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        privileged(core)
        size = 2 + base_size
        value = cpu.load(memory_address(core, instruction, size), size)
        base = value >> 16 & base_mask
        if base_size == 8 and not is_canonical(base):
            raise general_protection()
        setattr(core, f"{name}_base", base)
        setattr(core, f"{name}_limit", value & 0xFFFF)

    return execute


def _store_table(name: str, base_size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        check_umip(core)
        size = 2 + base_size
        base = getattr(core, f"{name}_base") & SIZE_MASK[base_size]
        value = getattr(core, f"{name}_limit") | base << 16
        cpu.store(memory_address(core, instruction, size, write=True), size, value)

    return execute


def _need_protection(core: Core) -> None:
    if not segments.has_segment_protection(core):
        raise invalid_opcode()


def _load_system_segment(index: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        _need_protection(cpu.core)
        privileged(cpu.core)
        segments.load(cpu, index, read_operand(cpu, instruction, 0, 2))

    return execute


def _store_system_segment(index: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        _need_protection(cpu.core)
        check_umip(cpu.core)
        write_operand(cpu, instruction, 0, 2, cpu.core.segments[index].selector)

    return execute


_LAR_TYPES = frozenset({TSS16, LDT, TSS16_BUSY, CALL_GATE16, TASK_GATE, TSS, TSS_BUSY, CALL_GATE})
_LAR_TYPES_LONG = frozenset({LDT, TSS, TSS_BUSY, CALL_GATE})
_GATES = frozenset({CALL_GATE16, TASK_GATE, CALL_GATE})
_LAR_MASK = 0x00F0FF00


def _visible(cpu: Cpu, selector: int) -> tuple[SegmentDescriptor, int] | None:
    """The descriptor (and its raw form) that LAR, LSL, VERR and VERW may see; they never fault on it."""
    core = cpu.core
    address = None if segments.is_null(selector) else segments.descriptor_address(core, selector)
    if address is None:
        return None
    raw = cpu.load(address, 8, system=True)
    descriptor = parse_segment(raw)
    if not descriptor.is_conforming and descriptor.dpl < max(core.cpl, selector & SELECTOR_RPL):
        return None
    return descriptor, raw


def _set_zero_flag(core: Core, value: bool) -> None:
    core.rflags = core.rflags & ~ZF | (ZF if value else 0)


def _verify(write: bool) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        _need_protection(cpu.core)
        seen = _visible(cpu, read_operand(cpu, instruction, 0, 2))
        good = seen is not None and (seen[0].is_writable if write else seen[0].is_readable)
        _set_zero_flag(cpu.core, good)

    return execute


def _system_types(core: Core) -> frozenset[int]:
    return _LAR_TYPES_LONG if core.efer & EFER_LMA else _LAR_TYPES


def _lar(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    _need_protection(core)
    seen = _visible(cpu, read_operand(cpu, instruction, 1, 2))
    good = seen is not None and (not seen[0].is_system or seen[0].type in _system_types(core))
    if seen is not None and good:
        write_register(core, instruction.op0_register, seen[1] >> 32 & _LAR_MASK)
    _set_zero_flag(core, good)


def _lsl(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    _need_protection(core)
    seen = _visible(cpu, read_operand(cpu, instruction, 1, 2))
    good = seen is not None and (
        not seen[0].is_system or seen[0].type in _system_types(core) - _GATES
    )
    if seen is not None and good:
        write_register(core, instruction.op0_register, seen[0].limit)
    _set_zero_flag(core, good)


def _arpl(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    _need_protection(core)
    wanted = read_register(core, instruction.op1_register) & SELECTOR_RPL
    in_register = instruction.op_kind(0) == OpKind.REGISTER
    if in_register:  # only the low 16 bits are the operand, whatever the register's name
        destination = read_register(core, instruction.op0_register)
    else:
        destination = cpu.load(memory_address(core, instruction, 2), 2)  # written only if it changes
    adjust = destination & SELECTOR_RPL < wanted
    if adjust:
        write_operand(cpu, instruction, 0, 2, destination & ~SELECTOR_RPL | wanted)
    _set_zero_flag(core, adjust)


def _codes(stem: str, names: str) -> list[int]:
    return [getattr(Code, f"{stem}_{name}") for name in names.split()]


_SELECTOR_FORMS = "RM16 R32M16 R64M16"
_LAR_FORMS = "R16_RM16 R32_R32M16 R64_R64M16"

STRAIGHT: dict[int, Handler] = {
    **dict.fromkeys(_codes("MOV", "SREG_RM16 SREG_R32M16 SREG_R64M16"), _mov_to_segment),
    **dict.fromkeys(_codes("MOV", "RM16_SREG R32M16_SREG R64M16_SREG"), _mov_from_segment),
    **dict.fromkeys(_codes("PUSHW", "ES CS SS DS FS GS"), _push_segment(2)),
    **dict.fromkeys(_codes("PUSHD", "ES CS SS DS FS GS"), _push_segment(4)),
    **dict.fromkeys(_codes("PUSHQ", "FS GS"), _push_segment(8)),
    **dict.fromkeys(_codes("POPW", "ES SS DS FS GS"), _pop_segment(2)),
    **dict.fromkeys(_codes("POPD", "ES SS DS FS GS"), _pop_segment(4)),
    **dict.fromkeys(_codes("POPQ", "FS GS"), _pop_segment(8)),
    Code.LDS_R16_M1616: _load_far_pointer(DS, 2),
    Code.LDS_R32_M1632: _load_far_pointer(DS, 4),
    Code.LES_R16_M1616: _load_far_pointer(ES, 2),
    Code.LES_R32_M1632: _load_far_pointer(ES, 4),
    Code.LGDT_M1632_16: _load_table("gdtr", 4, 0xFFFFFF),
    Code.LGDT_M1632: _load_table("gdtr", 4, MASK32),
    Code.LGDT_M1664: _load_table("gdtr", 8, SIZE_MASK[8]),
    Code.LIDT_M1632_16: _load_table("idtr", 4, 0xFFFFFF),
    Code.LIDT_M1632: _load_table("idtr", 4, MASK32),
    Code.LIDT_M1664: _load_table("idtr", 8, SIZE_MASK[8]),
    Code.SGDT_M1632_16: _store_table("gdtr", 4),
    Code.SGDT_M1632: _store_table("gdtr", 4),
    Code.SGDT_M1664: _store_table("gdtr", 8),
    Code.SIDT_M1632_16: _store_table("idtr", 4),
    Code.SIDT_M1632: _store_table("idtr", 4),
    Code.SIDT_M1664: _store_table("idtr", 8),
    **dict.fromkeys(_codes("LLDT", _SELECTOR_FORMS), _load_system_segment(LDTR)),
    **dict.fromkeys(_codes("LTR", _SELECTOR_FORMS), _load_system_segment(TR)),
    **dict.fromkeys(_codes("SLDT", _SELECTOR_FORMS), _store_system_segment(LDTR)),
    **dict.fromkeys(_codes("STR", _SELECTOR_FORMS), _store_system_segment(TR)),
    **dict.fromkeys(_codes("VERR", _SELECTOR_FORMS), _verify(write=False)),
    **dict.fromkeys(_codes("VERW", _SELECTOR_FORMS), _verify(write=True)),
    **dict.fromkeys(_codes("LAR", _LAR_FORMS), _lar),
    **dict.fromkeys(_codes("LSL", _LAR_FORMS), _lsl),
    **dict.fromkeys(_codes("ARPL", "RM16_R16 R32M16_R32"), _arpl),
}
for _name, _index in (("LSS", SS), ("LFS", FS), ("LGS", GS)):
    for _form, _size in (("R16_M1616", 2), ("R32_M1632", 4), ("R64_M1664", 8)):
        STRAIGHT[getattr(Code, f"{_name}_{_form}")] = _load_far_pointer(_index, _size)
