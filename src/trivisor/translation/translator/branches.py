"""Conditional jumps, and those that count: Jcc, JCXZ and LOOP, for every width of the counter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, Mnemonic, OpKind

from trivisor.translation.modes import Branch
from trivisor.translation.translator.recipe import ARITHMETIC, Recipe, asm

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


def is_narrow(instruction: Instruction) -> bool:
    """Whether a direct branch cuts its target to 16 bits."""
    return bool(instruction.op0_kind == OpKind.NEAR_BRANCH16)


def conditional(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """Jcc, JCXZ and LOOP."""
    recipe.shared = True
    narrow = is_narrow(instruction)
    if instruction.is_jcc_short_or_near:
        recipe.reads |= instruction.rflags_read & ARITHMETIC
        recipe.ends = Branch(instruction.condition_code - 1, narrow=narrow)
        return
    counter = _COUNTERS[instruction.code]
    if instruction.is_jcx_short:
        recipe.ends = Branch(0, _if_zero(counter), narrow)
        return
    # taken: counter not zero (and ZF as asked)
    mnemonic = instruction.mnemonic
    jump = b"\xeb\0"
    if mnemonic != Mnemonic.LOOP:
        recipe.reads |= instruction.rflags_read & ARITHMETIC
        jump = b"\x74\0" if mnemonic == Mnemonic.LOOPE else b"\x75\0"
    recipe.ends = Branch(0, _add(counter, -1) + _unless_zero(counter) + jump, narrow, _add(counter, 1))


def _add(counter: str, by: int) -> bytes:
    if counter == "cx":
        return asm(f"lea r11d, [rcx+({by})]\n mov cx, r11w")
    return asm(f"lea {counter}, [rcx+({by})]")


_JUMP = {"rcx": b"\xe3", "ecx": b"\x67\xe3"}
# 64-bit mode has no JCXZ: CX stands alone in rcx while that is looked at.
_ALONE = asm("mov r11, rcx\n movzx ecx, cx")
_BACK = asm("mov rcx, r11")


def _if_zero(counter: str) -> bytes:
    """Ends in a short jump that is taken when the counter is 0; no flag changes."""
    if counter != "cx":
        return _JUMP[counter] + b"\0"
    other = _BACK + b"\xeb" + bytes((len(_BACK) + 2,))
    return _ALONE + b"\xe3" + bytes((len(other),)) + other + _BACK + b"\xeb\0"


def _unless_zero(counter: str) -> bytes:
    """Skips the two bytes that follow when the counter is 0; no flag changes."""
    if counter != "cx":
        return _JUMP[counter] + b"\x02"
    zero = _BACK + b"\xeb\x02"
    other = _BACK + b"\xeb" + bytes((len(zero),))
    return _ALONE + b"\xe3" + bytes((len(other),)) + other + zero


_COUNTERS: dict[int, str] = {
    getattr(Code, name): "rcx" if "RCX" in name or name.startswith("JRCXZ")
    else "ecx" if "ECX" in name
    else "cx"
    for name in dir(Code)
    if name.startswith(("JCXZ_", "JECXZ_", "JRCXZ_", "LOOP"))
}  # fmt: skip
