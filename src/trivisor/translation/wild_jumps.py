"""Near jumps of 64-bit code to addresses that are not canonical: they fault at the jump (Intel SDM 2A, JMP, RET).

Translated code jumps first and is found out at the target; then what the jump
has done is undone.  The word that a CALL has pushed stays, below the stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Instruction, Mnemonic, OpKind

from trivisor.translation.core import RSP
from trivisor.translation.emulator.operands import MASK64, is_canonical, read_operand
from trivisor.translation.layout import OFFSETS
from trivisor.x86.exceptions import GENERAL_PROTECTION, GuestException

if TYPE_CHECKING:
    from trivisor.translation.cpu import TranslationVcpu

_JUMPED_FROM = OFFSETS["JUMPED_FROM"] // 8
_NEAR = (Mnemonic.JMP, Mnemonic.CALL, Mnemonic.RET)


def check_target(cpu: TranslationVcpu) -> None:
    """Raise #GP(0) at the jump that has led to rip, if there was one and rip is not canonical."""
    core = cpu.core
    target = core.linear_rip
    if is_canonical(target) or cpu.mode.bits != 64:
        return
    block = cpu.blocks.at_host(cpu.core.words[_JUMPED_FROM])
    if block is None:
        return
    rip, _ = cpu.blocks.locate(block, core.words[_JUMPED_FROM])
    try:
        instruction = cpu.blocks.instruction(cpu.mode, rip)
        led_here = instruction.mnemonic in _NEAR and _leads_to(cpu, instruction) == target
    except GuestException:
        return
    if led_here:
        raise undone(cpu, instruction)


def check_step(cpu: TranslationVcpu, start: int) -> None:
    """The same after a single step of the instruction at linear `start`."""
    if cpu.mode.bits == 64 and not is_canonical(cpu.core.linear_rip):
        instruction = cpu.blocks.instruction(cpu.mode, start)
        if is_indirect(instruction):
            raise undone(cpu, instruction)


def undone(cpu: TranslationVcpu, instruction: Instruction) -> GuestException:
    """The processor as it was before a near jump; what the jump raises."""
    core = cpu.core
    core.regs[RSP] = (core.regs[RSP] + _stack_move(instruction)) & MASK64
    core.linear_rip = instruction.ip
    return GuestException(GENERAL_PROTECTION, 0)


def is_indirect(instruction: Instruction) -> bool:
    """Whether it takes its target from a register or memory."""
    return instruction.mnemonic in _NEAR and (
        instruction.op_count == 0 or instruction.op0_kind in (OpKind.REGISTER, OpKind.MEMORY, OpKind.IMMEDIATE16)
    )


def _stack_move(instruction: Instruction) -> int:
    """Bytes from the stack pointer after the jump back to that before it."""
    if instruction.mnemonic == Mnemonic.CALL:
        return 8
    if instruction.mnemonic == Mnemonic.RET:
        return -8 - (instruction.immediate16 if instruction.op_count else 0)
    return 0


def _leads_to(cpu: TranslationVcpu, instruction: Instruction) -> int:
    """The target that the jump has had, with its effect on the stack pointer already there."""
    core = cpu.core
    after = core.regs[RSP]
    core.regs[RSP] = (after + _stack_move(instruction)) & MASK64
    try:
        if instruction.mnemonic == Mnemonic.RET:
            return cpu.load(core.regs[RSP], 8)
        return read_operand(cpu, instruction, 0, 8) if is_indirect(instruction) else 0
    finally:
        core.regs[RSP] = after
