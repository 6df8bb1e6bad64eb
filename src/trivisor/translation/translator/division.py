"""DIV and IDIV: a divide error that can be told beforehand costs no signal of the host.

DIV's quotient fits if the dividend's upper half is less than the divisor, and
no other way; of IDIV only a divisor of zero is looked for.  What else does not
fit faults on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Instruction, MemorySizeExt, Mnemonic, OpKind

from trivisor.translation.translator.recipe import Recipe
from trivisor.translation.translator.registers import DISPLACED, GPR, HIGH_BYTES, RSP, STACK, WORD, name

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


def divide(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """DIV and IDIV."""
    maker.flags(recipe, instruction)
    if instruction.op0_kind == OpKind.MEMORY:
        size = MemorySizeExt.size(instruction.memory_size)
        maker.address(recipe, instruction)
        recipe.check(size, write=False)
        _look(recipe, instruction, f"{WORD[size]} [r10]", size)
        recipe.op(maker.on_host_address(instruction, False, False, True, size))
        return
    register = instruction.op0_register
    if register in HIGH_BYTES:
        maker.plain(recipe, instruction)
        return
    number, size = GPR[register]
    in_register = name(STACK if number == RSP else number, size)
    divisor = f"{WORD[size]} [rsp+GPR_R{number}]" if number in DISPLACED else in_register
    _look(recipe, instruction, divisor, size)
    maker.plain(recipe, instruction)


def _look(recipe: Recipe, instruction: Instruction, divisor: str, size: int) -> None:
    """Raise #DE now if `divisor` is sure to make one."""
    if instruction.mnemonic == Mnemonic.IDIV:
        compare = f"cmp {divisor}, 0\n jne fits"
    elif size == 1:
        compare = f"mov r11, rax\n shr r11, 8\n cmp r11b, {divisor}\n jb fits"
    else:
        compare = f"cmp {name(2, size)}, {divisor}\n jb fits"
    recipe.clobber(f"{compare}\n fault de\n fits:")
