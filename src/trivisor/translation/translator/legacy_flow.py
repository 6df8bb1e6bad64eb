"""The stack and near control transfers of 16- and 32-bit code (Intel SDM 1, 6.2 and 6.3).

The operand size, the stack's (SS.B) and the code's are three things there, and
the instruction pointer is an offset in a code segment that may have a base and
a limit.  Translated code deals in linear addresses; offsets appear where the
guest can see them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, MemorySizeExt, Mnemonic, OpKind, Register

from trivisor.translation.modes import FLAT_LIMIT, CallOut, Indirect, Jump
from trivisor.translation.translator.branches import is_narrow
from trivisor.translation.translator.recipe import Recipe
from trivisor.translation.translator.registers import GPR, RSP, SEGMENTS, SLOT, STACK, WORD, name
from trivisor.x86.iced_types import RegisterNumber

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


def _stack(maker: InstructionMaker, recipe: Recipe, offset: int, size: int, *, write: bool) -> None:
    """r10 = the host address of `size` bytes at the stack pointer plus `offset`."""
    recipe.code(f"lea r10d, [r15+({offset})]" + ("\n movzx r10d, r10w" if maker.mode.stack_bits == 16 else ""))
    recipe.segment = "SS" if maker.mode.checks("SS") else ""
    recipe.check(size, write=write)


def _move_stack(maker: InstructionMaker, recipe: Recipe, by: int, base: str = "r15") -> None:
    """SP or ESP = `base` + `by`; uses r11."""
    if maker.mode.stack_bits == 16:
        recipe.code(f"lea r11d, [{base}+({by})]\n mov r15w, r11w")
    else:
        recipe.code(f"lea r15d, [{base}+({by})]")


def _host(number: int, size: int) -> str:
    return name(STACK if number == RSP else number, size)


def push(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """PUSH of a register, an immediate or memory."""
    size = -instruction.stack_pointer_increment
    width = WORD[size]
    kind = instruction.op0_kind
    if kind == OpKind.REGISTER and instruction.op0_register in SEGMENTS:
        # 32 bits wide it is a 16-bit move all the same, which leaves the upper half (SDM 2B, PUSH).
        _stack(maker, recipe, -size, 2, write=True)
        recipe.code(f"mov r11w, [rsp+{SEGMENTS[instruction.op0_register]}_SELECTOR]\n mov [r10], r11w")
    elif kind == OpKind.REGISTER:
        _stack(maker, recipe, -size, size, write=True)
        recipe.code(f"mov {width} [r10], {_host(GPR[instruction.op0_register][0], size)}")
    elif kind == OpKind.MEMORY:
        maker.address(recipe, instruction)
        recipe.check(size, write=False)
        recipe.clobber(f"mov {name(11, size)}, [r10]\n mov [rsp+{SLOT}], {name(11, size)}\n retry")
        _stack(maker, recipe, -size, size, write=True)
        recipe.code(f"mov {name(11, size)}, [rsp+{SLOT}]\n mov [r10], {name(11, size)}")
    else:
        _stack(maker, recipe, -size, size, write=True)
        recipe.code(f"mov {width} [r10], {instruction.immediate(0) & ((1 << 8 * size) - 1)}")
    _move_stack(maker, recipe, -size)


def pop(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """POP to a register, a segment register or memory."""
    size = instruction.stack_pointer_increment
    register = name(11, size)
    if instruction.op0_kind == OpKind.REGISTER:
        if instruction.op0_register in SEGMENTS:
            _pop_segment(maker, recipe, instruction.op0_register, size)
            return
        _stack(maker, recipe, 0, size, write=False)
        number = GPR[instruction.op0_register][0]
        if number == RSP:
            if size == 2:
                _move_stack(maker, recipe, size)
            recipe.code(f"mov {name(STACK, size)}, [r10]")
            return
        recipe.code(f"mov {name(number, size)}, [r10]")
        _move_stack(maker, recipe, size)
        return
    _stack(maker, recipe, 0, size, write=False)
    recipe.clobber(f"mov {register}, [r10]\n mov [rsp+{SLOT}], {register}\n retry")
    # An address based on ESP uses its value after the pop.
    maker.address(recipe, instruction, size if instruction.memory_base == Register.ESP else 0)
    recipe.check(size, write=True)
    recipe.code(f"mov {register}, [rsp+{SLOT}]\n mov [r10], {register}")
    _move_stack(maker, recipe, size)


def _pop_segment(maker: InstructionMaker, recipe: Recipe, register: RegisterNumber, size: int) -> None:
    segment = SEGMENTS[register]
    if not maker.mode.real or segment == "SS":
        recipe.ends = CallOut()
        return
    _stack(maker, recipe, 0, 2, write=False)
    recipe.code("movzx r10d, word [r10]")
    _move_stack(maker, recipe, size)
    load_real(recipe, segment)


def load_real(recipe: Recipe, segment: str) -> None:
    """A segment register of real or virtual-8086 mode gets the selector in r10: its limit and type stay."""
    recipe.clobber(f"mov [rsp+{segment}_SELECTOR], r10\n shl r10d, 4\n mov [rsp+{segment}_BASE], r10")


def mov(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """MOV; reading a selector is inline, and so is loading one (but for SS) where it needs no descriptor."""
    source = instruction.op1_register if instruction.op1_kind == OpKind.REGISTER else Register.NONE
    target = instruction.op0_register if instruction.op0_kind == OpKind.REGISTER else Register.NONE
    if source in SEGMENTS:
        selector = f"[rsp+{SEGMENTS[source]}_SELECTOR]"
        if target == Register.NONE:
            maker.address(recipe, instruction)
            recipe.check(2, write=True)
            recipe.code(f"mov r11w, {selector}\n mov [r10], r11w")
            return
        number, size = GPR[target]
        recipe.code(f"movzx r11d, word {selector}\n mov {_host(number, size)}, {name(11, size)}")
    elif target in SEGMENTS and maker.mode.real and target not in (Register.CS, Register.SS):
        if source == Register.NONE:
            maker.address(recipe, instruction)
            recipe.check(2, write=False)
            recipe.code("movzx r10d, word [r10]")
        else:
            recipe.code(f"movzx r10d, {_host(GPR[source][0], 2)}")
        load_real(recipe, SEGMENTS[target])
    elif maker.is_sensitive(instruction):
        recipe.ends = CallOut()
    else:
        maker.plain(recipe, instruction)


def load_far_pointer(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """LDS, LES, LFS and LGS where the selector needs no descriptor."""
    if not maker.mode.real:
        recipe.ends = CallOut()
        return
    number, size = GPR[instruction.op0_register]
    maker.address(recipe, instruction)
    recipe.check(size + 2, write=False)
    offset = name(11, size)
    recipe.code(f"mov {offset}, [r10]\n movzx r10d, word [r10+{size}]\n mov {_host(number, size)}, {offset}")
    load_real(recipe, _FAR_POINTERS[instruction.mnemonic])


_FAR_POINTERS = {Mnemonic.LDS: "DS", Mnemonic.LES: "ES", Mnemonic.LFS: "FS", Mnemonic.LGS: "GS"}


def leave(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """LEAVE."""
    size = 2 if instruction.code == Code.LEAVEW else 4
    narrow = maker.mode.stack_bits == 16
    recipe.code("movzx r10d, bp" if narrow else "mov r10d, ebp")
    recipe.segment = "SS" if maker.mode.checks("SS") else ""
    recipe.check(size, write=False)
    _move_stack(maker, recipe, size, "rbp")
    recipe.code(f"mov {name(5, size)}, [r10]")


def call(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """CALL to a direct near target."""
    narrow = is_narrow(instruction)
    if maker.mode.code_limit != FLAT_LIMIT:
        # The target is looked at before the return address is pushed.
        recipe.absolute("r10", None)
        recipe.code(f"lea r10d, [r10+({_signed(-maker.mode.code_base)})]" + ("\n movzx r10d, r10w" if narrow else ""))
        _check_target(maker, recipe)
    _push_return(maker, recipe, 2 if narrow else 4)
    recipe.ends = Jump(narrow)
    recipe.shared = True


def indirect(maker: InstructionMaker, recipe: Recipe, instruction: Instruction, *, call: bool) -> None:
    """Near JMP and CALL through a register or memory."""
    if instruction.op0_kind == OpKind.REGISTER:
        number, size = GPR[instruction.op0_register]
        source = _host(number, size)
    else:
        size = MemorySizeExt.size(instruction.memory_size)
        maker.address(recipe, instruction)
        recipe.check(size, write=False)
        source = "[r10]"
    recipe.code(f"movzx r10d, {'word ' if source == '[r10]' else ''}{source}" if size == 2 else f"mov r10d, {source}")
    _check_target(maker, recipe)
    if call:
        recipe.clobber(f"mov [rsp+{SLOT}], r10\n retry")
        _push_return(maker, recipe, size)
        recipe.code(f"mov r10, [rsp+{SLOT}]")
    _go_to_offset(maker, recipe)


def near_return(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """Near RET, with or without bytes to drop."""
    size = 2 if instruction.code in (Code.RETNW, Code.RETNW_IMM16) else 4
    drop = instruction.immediate16 if instruction.op_count else 0
    _stack(maker, recipe, 0, size, write=False)
    recipe.code("movzx r10d, word [r10]" if size == 2 else "mov r10d, [r10]")
    _check_target(maker, recipe)
    _move_stack(maker, recipe, size + drop)
    _go_to_offset(maker, recipe)


def _check_target(maker: InstructionMaker, recipe: Recipe) -> None:
    """#GP(0) unless the offset in r10 lies in the code segment."""
    if maker.mode.code_limit != FLAT_LIMIT:
        recipe.clobber(f"cmp r10d, dword {maker.mode.code_limit}\n jbe inside\n fault gp\n inside:")


def _go_to_offset(maker: InstructionMaker, recipe: Recipe) -> None:
    """End the block at the offset in r10."""
    if maker.mode.code_base:
        recipe.code(f"lea r10d, [r10+({_signed(maker.mode.code_base)})]")
    recipe.ends = Indirect()


def _push_return(maker: InstructionMaker, recipe: Recipe, size: int) -> None:
    """Push the offset of the next instruction."""
    _stack(maker, recipe, -size, size, write=True)
    recipe.absolute("r11", 0)
    if maker.mode.code_base:
        recipe.code(f"lea r11d, [r11+({_signed(-maker.mode.code_base)})]")
    recipe.code(f"mov [r10], {name(11, size)}")
    _move_stack(maker, recipe, -size)


def _signed(value: int) -> int:
    """A displacement that adds `value` modulo 2**32."""
    return (value + 0x80000000 & 0xFFFFFFFF) - 0x80000000


INLINE = {
    Mnemonic.PUSH: push, Mnemonic.POP: pop, Mnemonic.LEAVE: leave, Mnemonic.MOV: mov,
    **dict.fromkeys(_FAR_POINTERS, load_far_pointer),
}  # fmt: skip
"""What this file has for the table in `inline.py`."""
