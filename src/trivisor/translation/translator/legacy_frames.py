"""Several registers at once, and the flags, on the stack of 16- and 32-bit code: PUSHA, POPA, PUSHF, POPF."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Instruction, Mnemonic

from trivisor.translation.modes import CallOut
from trivisor.translation.translator.recipe import ARITHMETIC, Recipe
from trivisor.translation.translator.registers import RSP, STACK, name

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


def _stack(maker: InstructionMaker, offset: int, access: str) -> str:
    """r10 = the host address of the access at the stack pointer plus `offset`.

    One that is not within the segment as a whole may be so piece by piece, where the pointer wraps: Python's.
    """
    checked = f"segment SS {access} escape\n" if maker.mode.checks("SS") else ""
    narrow = "movzx r10d, r10w\n" if maker.mode.stack_bits == 16 else ""
    return f"lea r10d, [r15+({offset})]\n {narrow} {checked} check {access}"


def _move_stack(maker: InstructionMaker, by: int) -> str:
    if maker.mode.stack_bits == 16:
        return f"lea r11d, [r15+({by})]\n mov r15w, r11w"
    return f"lea r15d, [r15+({by})]"


def pusha(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """PUSHA and PUSHAD; the stack pointer's own value is that from before."""
    total = -instruction.stack_pointer_increment
    size = total // 8
    stores = "\n".join(
        f"mov [r10+{(7 - number) * size}], {name(STACK if number == RSP else number, size)}" for number in range(8)
    )
    recipe.clobber(f"{_stack(maker, -total, f'write {total}')}\n {stores}\n {_move_stack(maker, -total)}")


def popa(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """POPA and POPAD; the stack pointer's place is skipped."""
    total = instruction.stack_pointer_increment
    size = total // 8
    loads = "\n".join(
        f"mov {name(number, size)}, [r10+{(7 - number) * size}]" for number in range(8) if number != RSP
    )
    recipe.clobber(f"{_stack(maker, 0, f'read {total}')}\n {loads}\n {_move_stack(maker, total)}")


def pushf(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """PUSHF and PUSHFD; in virtual-8086 mode, where IOPL counts, Python's."""
    if maker.mode.real and maker.mode.user:
        recipe.ends = CallOut()
        return
    size = -instruction.stack_pointer_increment
    # No op, but a need for flags: they are parked on the way in and restored on the way out.
    recipe.reads |= ARITHMETIC
    recipe.clobber(
        f"""
        movzx r11d, byte [rsp+FLAGS_AX+1]
        movzx r10d, byte [rsp+FLAGS_AX]
        shl r10d, 11
        or r11d, r10d
        pushfq
        pop r10
        and r10d, 0x400
        or r11d, r10d
        or r11, [rsp+IF]
        or r11, [rsp+SYSTEM_FLAGS]
        and r11d, 0xfcffff
        mov [rsp+SLOT], r11
        retry
        {_stack(maker, -size, f"write {size}")}
        mov r11, [rsp+SLOT]
        mov [r10], {name(11, size)}
        {_move_stack(maker, -size)}
        """
    )


def popf(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """POPF and POPFD at CPL 0 when the system flags stay as they are; otherwise, and with DF, Python does it."""
    if maker.mode.user:
        recipe.ends = CallOut()
        return
    size = instruction.stack_pointer_increment
    recipe.clobber(
        f"""
        retry
        {_stack(maker, 0, f"read {size}")}
        {"movzx r10d, word [r10]" if size == 2 else "mov r10d, [r10]"}
        mov r11d, r10d
        and r11d, {0x7502 if size == 2 else 0x3F7502}
        or r11d, 2
        cmp {name(11, size)}, [rsp+SYSTEM_FLAGS]
        je same
        escape
        same:
        {_move_stack(maker, size)}
        mov r11d, r10d
        and r11d, 0x200
        mov [rsp+IF], r11
        mov r11, [rsp+ARMED]
        mov [rsp+POLL], r11
        and r10d, 0x8d5
        push r10
        popfq
        """
    )
    recipe.writes |= ARITHMETIC
    recipe.polls = True


INLINE = {
    Mnemonic.PUSHA: pusha, Mnemonic.PUSHAD: pusha, Mnemonic.POPA: popa, Mnemonic.POPAD: popa,
    Mnemonic.PUSHF: pushf, Mnemonic.PUSHFD: pushf, Mnemonic.POPF: popf, Mnemonic.POPFD: popf,
}  # fmt: skip
"""What this file has for the table in `inline.py`."""
