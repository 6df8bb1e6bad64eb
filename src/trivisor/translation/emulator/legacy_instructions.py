"""Unprivileged instructions that 64-bit mode lacks or that are too rare to translate (Intel SDM 2A to 2D)."""

from __future__ import annotations

from iced_x86 import Code, Instruction

from trivisor.translation.core import RAX, RBP, RSP, SS, Core
from trivisor.translation.emulator.contract import Cpu, Handler, has_feature
from trivisor.translation.emulator.operands import (
    SIZE_MASK,
    in_64bit_mode,
    invalid_opcode,
    linear_address,
)
from trivisor.translation.emulator.stack import push, release, set_stack_pointer, stack_mask, top
from trivisor.x86.exceptions import DIVIDE_ERROR, GuestException
from trivisor.x86.flags import AF, CF, OF, PF, SF, ZF


def _write_sized(core: Core, index: int, size: int, value: int) -> None:
    """Write a register of 2, 4 or 8 bytes; 4 clear the upper half."""
    mask = SIZE_MASK[size]
    kept = core.regs[index] & ~mask if size == 2 else 0
    core.regs[index] = kept | value & mask


def _pusha(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        push(cpu, size, *cpu.core.regs[:8])

    return execute


def _popa(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        values = top(cpu, size, 8)
        for index, value in zip(range(7, -1, -1), values, strict=True):
            if index != RSP:
                _write_sized(cpu.core, index, size, value)
        release(cpu.core, 8 * size)

    return execute


def _enter(size: int) -> Handler:
    """ENTER: the frame pointers of the enclosing procedures are copied from the old frame."""

    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        allocated, level = instruction.immediate16, instruction.immediate8_2nd & 31
        mask = stack_mask(core)
        pointer, frame = core.regs[RSP], core.regs[RBP]
        new_frame = pointer & ~mask | (pointer - size) & mask
        values = [frame]
        for i in range(1, level):
            address = linear_address(core, SS, (frame - size * i) & mask, size)
            values.append(cpu.load(address, size))
        if level:
            values.append(new_frame)
        bottom = ((pointer & mask) - size * len(values) - allocated) & mask
        cpu.probe_write(linear_address(core, SS, bottom, size, write=True), size)
        push(cpu, size, *values)
        _write_sized(core, RBP, size, new_frame)
        set_stack_pointer(core, mask, bottom)

    return execute


def _set_flags(core: Core, mask: int, value: int) -> None:
    core.rflags = core.rflags & ~mask | value & mask


def _result_flags(value: int) -> int:
    """SF, ZF and PF of an 8-bit result."""
    parity = PF if value.bit_count() % 2 == 0 else 0
    return (value & SF) | (0 if value else ZF) | parity


def _set_al(core: Core, value: int) -> None:
    core.regs[RAX] = core.regs[RAX] & ~0xFF | value & 0xFF


def _set_ax(core: Core, value: int) -> None:
    core.regs[RAX] = core.regs[RAX] & ~0xFFFF | value & 0xFFFF


def _overflow(before: int, added: int, after: int, bits: int) -> int:
    """OF of before + added = after, two's complement; for a subtraction `added` is the negative."""
    return OF if (before ^ after) & (added ^ after) & 1 << bits - 1 else 0


# The manuals have some flags undefined after the decimal instructions.  Processors leave those of the
# addition or subtraction of the correction, and clear them after AAM.


def _ascii_adjust(step: int) -> Handler:
    """AAA (6, then 1 in AH) and AAS (the same, subtracted)."""

    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        ax = core.regs[RAX] & 0xFFFF
        adjust = ax & 0xF > 9 or core.rflags & AF
        result = (ax + step) & 0xFFFF if adjust else ax
        _set_ax(core, result & 0xFF0F)
        flags = _result_flags(result & 0xFF) & PF | (result >> 8) & SF | (0 if result else ZF)
        flags |= _overflow(ax, step, result, 16) | AF | CF if adjust else 0
        _set_flags(core, OF | SF | ZF | AF | PF | CF, flags)

    return execute


def _decimal_adjust(sign: int) -> Handler:
    """DAA (sign 1) and DAS (sign -1)."""

    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        old = core.regs[RAX] & 0xFF
        flags = core.rflags
        correction = new_flags = 0
        if old & 0xF > 9 or flags & AF:
            correction = 6
            new_flags |= AF | (CF if sign < 0 and old < 6 else 0)
        if old > 0x99 or flags & CF:
            correction += 0x60
            new_flags |= CF
        result = (old + sign * correction) & 0xFF
        _set_al(core, result)
        if correction:
            new_flags |= _overflow(old, sign * correction, result, 8)
        _set_flags(core, OF | SF | ZF | AF | PF | CF, new_flags | _result_flags(result))

    return execute


def _aam(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    divisor = instruction.immediate8
    if not divisor:
        raise GuestException(DIVIDE_ERROR)
    high, low = divmod(core.regs[RAX] & 0xFF, divisor)
    _set_ax(core, high << 8 | low)
    _set_flags(core, OF | SF | ZF | AF | PF | CF, _result_flags(low))


def _aad(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    ax = core.regs[RAX] & 0xFFFF
    low, added = ax & 0xFF, (ax >> 8) * instruction.immediate8 & 0xFF
    result = (low + added) & 0xFF
    _set_ax(core, result)
    flags = _overflow(low, added, result, 8) | (low ^ added ^ result) & AF | (CF if low + added > 0xFF else 0)
    _set_flags(core, OF | SF | ZF | AF | PF | CF, flags | _result_flags(result))


def _salc(cpu: Cpu, instruction: Instruction) -> None:
    _set_al(cpu.core, 0xFF if cpu.core.rflags & CF else 0)


_AH_FLAGS = SF | ZF | AF | PF | CF


def _need_lahf(cpu: Cpu) -> None:
    if in_64bit_mode(cpu.core) and not has_feature(cpu, "lahf"):
        raise invalid_opcode()


def _lahf(cpu: Cpu, instruction: Instruction) -> None:
    _need_lahf(cpu)
    core = cpu.core
    core.regs[RAX] = core.regs[RAX] & ~0xFF00 | (core.rflags & _AH_FLAGS | 2) << 8


def _sahf(cpu: Cpu, instruction: Instruction) -> None:
    _need_lahf(cpu)
    _set_flags(cpu.core, _AH_FLAGS, cpu.core.regs[RAX] >> 8)


STRAIGHT: dict[int, Handler] = {
    Code.PUSHAW: _pusha(2),
    Code.PUSHAD: _pusha(4),
    Code.POPAW: _popa(2),
    Code.POPAD: _popa(4),
    Code.ENTERW_IMM16_IMM8: _enter(2),
    Code.ENTERD_IMM16_IMM8: _enter(4),
    Code.ENTERQ_IMM16_IMM8: _enter(8),
    Code.AAA: _ascii_adjust(0x106),
    Code.AAS: _ascii_adjust(-0x106),
    Code.DAA: _decimal_adjust(1),
    Code.DAS: _decimal_adjust(-1),
    Code.AAM_IMM8: _aam,
    Code.AAD_IMM8: _aad,
    Code.SALC: _salc,
    Code.LAHF: _lahf,
    Code.SAHF: _sahf,
}
