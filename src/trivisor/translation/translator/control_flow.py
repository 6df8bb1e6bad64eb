"""The stack and near control transfers of 64-bit code; those of other code are in `legacy_flow.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, MemorySizeExt, OpKind

from trivisor.translation.modes import CallOut, Indirect, Jump, Missing
from trivisor.translation.translator.recipe import Recipe
from trivisor.translation.translator.registers import (
    BY_SIZE,
    DISPLACED,
    GPR,
    RSP,
    SEGMENTS,
    SLOT,
    STACK,
    WORD,
    name,
)

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


def _stack_address(maker: InstructionMaker, recipe: Recipe, offset: int) -> None:
    """r10 (r11 if it is distant) = the linear address of the guest's stack pointer plus `offset`."""
    if recipe.addressed:
        return
    target = "r11" if recipe.distant else "r10"
    by = offset - recipe.before
    recipe.code("mov r11, r15" if recipe.distant and not by else f"lea {target}, [r15+({by})]")


def _operand(recipe: Recipe, offset: int) -> str:
    """The operand that was checked last, at the guest's stack pointer plus `offset`, as assembly has it."""
    return f"[r15+r10+({offset})]" if recipe.distant else f"[r10+{recipe.before}]"


def _move_stack(maker: InstructionMaker, recipe: Recipe, by: int) -> None:
    recipe.code(f"lea r15, [r15+({by})]")


def push(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """PUSH of a register, an immediate or memory."""
    size = -instruction.stack_pointer_increment
    kind = instruction.op0_kind
    if kind == OpKind.REGISTER and instruction.op0_register in SEGMENTS:
        recipe.code(f"movzx r11d, word [rsp+{SEGMENTS[instruction.op0_register]}_SELECTOR]\n mov [rsp+{SLOT}], r11")
        kind = OpKind.MEMORY
    elif kind == OpKind.MEMORY:
        maker.address(recipe, instruction)
        recipe.check(size, write=False)
        register = name(11, size)
        recipe.clobber(f"mov {register}, [r10]\n mov [rsp+{SLOT}], {register}\n retry")
    _stack_address(maker, recipe, -size)
    recipe.check(size, write=True)
    width, at = WORD[size], _operand(recipe, -size)
    if kind == OpKind.REGISTER:
        number = GPR[instruction.op0_register][0]
        if number in DISPLACED:
            recipe.code(f"mov r11, [rsp+GPR_R{number}]")
            number = 11
        recipe.code(f"mov {width} {at}, {name(STACK if number == RSP else number, size)}")
    elif kind == OpKind.MEMORY:
        recipe.code(f"mov {name(11, size)}, [rsp+{SLOT}]\n mov {at}, {name(11, size)}")
    else:
        value = instruction.immediate(0) & ((1 << 8 * size) - 1)
        if value >> 63:
            value -= 1 << 64
        recipe.code(f"mov {width} {at}, {value}")
    _move_stack(maker, recipe, -size)


def pop(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """POP to a register or memory."""
    size = instruction.stack_pointer_increment
    if instruction.op0_kind == OpKind.REGISTER:
        if instruction.op0_register in SEGMENTS:
            recipe.ends = CallOut()
            return
        _stack_address(maker, recipe, 0)
        recipe.check(size, write=False)
        at = _operand(recipe, 0)
        number = GPR[instruction.op0_register][0]
        if number == RSP:
            if size == 2:
                recipe.code(f"lea r15, [r15+2]\n mov r15w, {at}")
            else:
                recipe.code(f"mov r15, {at}" if size == 8 else f"mov r15d, {at}")
            return
        if number in DISPLACED:
            if size == 2:
                recipe.code(f"mov r11w, {at}\n mov [rsp+GPR_R{number}], r11w")
            else:
                recipe.code(f"mov {name(11, size)}, {at}\n mov [rsp+GPR_R{number}], r11")
        else:
            recipe.code(f"mov {name(number, size)}, {at}")
        _move_stack(maker, recipe, size)
        return
    _stack_address(maker, recipe, 0)
    recipe.check(size, write=False)
    register = name(11, size)
    recipe.clobber(f"mov {register}, [r10]\n mov [rsp+{SLOT}], {register}\n retry")
    # An address based on rsp uses its value after the pop.
    maker.address(recipe, instruction, size if instruction.memory_base in _STACK_POINTERS else 0)
    recipe.check(size, write=True)
    recipe.code(f"mov {register}, [rsp+{SLOT}]\n mov [r10], {register}")
    _move_stack(maker, recipe, size)


_STACK_POINTERS = {BY_SIZE[8][RSP], BY_SIZE[4][RSP]}


def leave(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """LEAVE."""
    size = 2 if instruction.code == Code.LEAVEW else 8
    recipe.code("mov r10, rbp")
    recipe.check(size, write=False)
    recipe.code(f"lea r15, [rbp+{size}]\n mov {name(5, size)}, [r10]")


def call(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """CALL to a direct near target."""
    push_return(maker, recipe)
    recipe.ends = Jump()
    recipe.shared = True


def push_return(maker: InstructionMaker, recipe: Recipe) -> None:
    """Push the address of the next instruction."""
    size = 8
    _stack_address(maker, recipe, -size)
    recipe.check(size, write=True)
    recipe.absolute("r11", 0)
    recipe.code(f"mov {_operand(recipe, -size)}, {name(11, size)}")
    _move_stack(maker, recipe, -size)


def indirect(maker: InstructionMaker, recipe: Recipe, instruction: Instruction, *, call: bool) -> None:
    """Near JMP and CALL through a register or memory."""
    size = 8
    if instruction.op0_kind == OpKind.REGISTER:
        number, width = GPR[instruction.op0_register]
        if width == 2:
            recipe.ends = Missing()
            return
        source = f"[rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, width)
        recipe.code(f"mov {name(10, width)}, {source}")
    else:
        if MemorySizeExt.size(instruction.memory_size) != size:
            recipe.ends = Missing()
            return
        maker.address(recipe, instruction)
        recipe.check(size, write=False)
        recipe.code(f"mov {name(10, size)}, [r10]")
    if call:
        recipe.clobber(f"mov [rsp+{SLOT}], r10\n retry")
        push_return(maker, recipe)
        recipe.code(f"mov r10, [rsp+{SLOT}]")
    recipe.ends = recipe.ends or Indirect()


def near_return(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """Near RET, with or without bytes to drop."""
    size = 8
    if instruction.code in (Code.RETNW, Code.RETNW_IMM16):
        recipe.ends = Missing()
        return
    drop = instruction.immediate16 if instruction.op_count else 0
    _stack_address(maker, recipe, 0)
    recipe.check(size, write=False)
    recipe.code(f"mov {name(10, size)}, {_operand(recipe, 0)}")
    _move_stack(maker, recipe, size + drop)
    recipe.ends = Indirect()
