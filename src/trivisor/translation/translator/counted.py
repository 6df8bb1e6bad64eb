"""Loops that do nothing but count, run forward: of their iterations all but the last few are done at once.

Such a loop has registers that grow by one in each iteration, comparisons of
them and of registers that stay, and ways out.  From the registers at its head
follows how many iterations none of the ways out is taken in; so many are added
to those that grow.  Linux under Xen looks so at a hundred million pages that
are not there, one by one.  A loop with but one way out is left alone: it may be
there to take time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from iced_x86 import ConditionCode, Instruction, Mnemonic, OpKind

from trivisor.translation.translator.registers import GPR, RSP, name

_LEFT = 16
"""Iterations that are left to the loop itself."""
_TAKEN = {RSP, 10, 11, 15}
"""Guest registers that are not in the host's of the same name."""
_INVERSE: dict[int, int] = {
    ConditionCode.E: ConditionCode.NE, ConditionCode.NE: ConditionCode.E,
    ConditionCode.AE: ConditionCode.B, ConditionCode.B: ConditionCode.AE,
}  # fmt: skip
_JUMP: dict[int, str] = {ConditionCode.E: "je", ConditionCode.NE: "jne", ConditionCode.AE: "jae", ConditionCode.B: "jb"}
_IMMEDIATES = {
    OpKind.IMMEDIATE8, OpKind.IMMEDIATE32, OpKind.IMMEDIATE8TO32, OpKind.IMMEDIATE8TO64, OpKind.IMMEDIATE32TO64,
}  # fmt: skip


class _Value(NamedTuple):
    """What is compared."""

    text: str
    """As assembly has it."""
    number: int = -1
    """The register's; -1 for a constant."""
    grown: int = -1
    """By how much it has grown in the iteration; -1 if it does not grow."""

    @property
    def grows(self) -> bool:
        return self.grown >= 0


class _NotCounted(Exception):
    """The loop is of another kind."""


def run_forward(instructions: Sequence[Instruction], turns: Mapping[int, int]) -> str | None:
    """Assembly for the head of the loop that these instructions of 64-bit code are, or None if it is of another kind.

    `turns`: by index of a jump that is not the last, where the loop goes on.  r10, r11 and flags may be lost.
    """
    if instructions[-1].near_branch_target != instructions[0].ip:
        return None
    try:
        return _Loop(instructions, turns).source()
    except _NotCounted:
        return None


class _Loop:
    def __init__(self, instructions: Sequence[Instruction], turns: Mapping[int, int]) -> None:
        self._instructions = instructions
        self._turns = turns
        self._widths: dict[int, int] = {}
        """Of the registers that grow, in bytes."""
        self._constants: dict[int, int] = {}
        """What other registers are set to in the iteration so far."""
        self._grown: dict[int, int] = {}
        """By how much registers have grown in the iteration so far."""
        self._lines: list[str] = []
        self._ways_out = 0
        self._bounds = 0
        """How many ways out are taken after a number of iterations that is known."""

    def source(self) -> str:
        self._find_changes()
        compared: tuple[_Value, _Value, int] | None = None
        for index, instruction in enumerate(self._instructions):
            mnemonic = instruction.mnemonic
            if mnemonic in (Mnemonic.CMP, Mnemonic.TEST):
                compared = self._compared(instruction)
            elif instruction.is_jcc_short_or_near:
                if compared is None:
                    raise _NotCounted
                self._way_out(*compared, self._stays(index, instruction))
            elif mnemonic != Mnemonic.JMP:
                self._step(instruction)
                compared = None
        if self._ways_out < 2 or not self._bounds:
            raise _NotCounted
        grow = "".join(f"add {name(number, size)}, {name(10, size)}\n" for number, size in self._widths.items())
        return "\n".join([*self._lines, f"sub r10, {_LEFT}\n jbe soon\n {grow} soon:"])

    def _find_changes(self) -> None:
        """Which registers grow, each once in an iteration; all others must stay or become constants."""
        constant: set[int] = set()
        for instruction in self._instructions:
            if instruction.mnemonic in (Mnemonic.INC, Mnemonic.XOR, Mnemonic.MOV):
                number, size = _register(instruction.op0_register)
                if instruction.mnemonic != Mnemonic.INC:
                    constant.add(number)
                elif number in self._widths:
                    raise _NotCounted
                else:
                    self._widths[number] = size
                    self._grown[number] = 0
        if constant & self._widths.keys():
            raise _NotCounted
        self._constant = constant

    def _step(self, instruction: Instruction) -> None:
        if instruction.op0_kind != OpKind.REGISTER:
            raise _NotCounted
        mnemonic = instruction.mnemonic
        number, _ = _register(instruction.op0_register)
        if mnemonic == Mnemonic.INC:
            self._grown[number] = 1
        elif mnemonic == Mnemonic.XOR and instruction.op1_kind == OpKind.REGISTER:
            if instruction.op1_register != instruction.op0_register:
                raise _NotCounted
            self._constants[number] = 0
        elif mnemonic == Mnemonic.MOV and instruction.op1_kind in _IMMEDIATES:
            self._constants[number] = instruction.immediate(1)
        else:
            raise _NotCounted

    def _compared(self, instruction: Instruction) -> tuple[_Value, _Value, int]:
        """(left, right, their size) of a comparison."""
        if instruction.op0_kind != OpKind.REGISTER:
            raise _NotCounted
        size = _register(instruction.op0_register)[1]
        left = self._value(instruction.op0_register, size)
        if instruction.mnemonic == Mnemonic.TEST:
            if instruction.op1_kind != OpKind.REGISTER or instruction.op1_register != instruction.op0_register:
                raise _NotCounted
            return left, _Value("0"), size
        if instruction.op1_kind in _IMMEDIATES:
            return left, _constant(instruction.immediate(1), size), size
        if instruction.op1_kind != OpKind.REGISTER:
            raise _NotCounted
        return left, self._value(instruction.op1_register, size), size

    def _value(self, register: int, size: int) -> _Value:
        number, _ = _register(register)
        if number in self._widths:
            if self._widths[number] != size:
                raise _NotCounted
            return _Value(name(number, size), number, self._grown[number])
        if number in self._constant:
            if number not in self._constants:
                raise _NotCounted
            return _constant(self._constants[number], size)
        return _Value(name(number, size), number)

    def _stays(self, index: int, instruction: Instruction) -> int:
        """The condition with which a jump stays in the loop."""
        condition = instruction.condition_code
        if condition not in _INVERSE:
            raise _NotCounted
        last = index == len(self._instructions) - 1
        return condition if last or self._turns[index] == instruction.near_branch_target else _INVERSE[condition]

    def _way_out(self, left: _Value, right: _Value, size: int, stays: int) -> None:
        """How many iterations from now on stay: into r10, if they are less than by the ways out before."""
        self._ways_out += 1
        if right.grows and not left.grows and stays == ConditionCode.NE:
            left, right = right, left
        bound, lines = name(11, size), self._lines
        if right.grows or left.number < 0:
            raise _NotCounted
        if not left.grows:
            lines.append(f"cmp {left.text}, {right.text}\n {_JUMP[_INVERSE[stays]]} soon")
            return
        lines.append(f"lea {bound}, [{name(left.number, 8)}+{left.grown}]")
        if stays == ConditionCode.NE:
            lines.append(f"neg {bound}\n add {bound}, {right.text}")
        elif stays == ConditionCode.AE:  # until it is 0 again
            lines.append(f"cmp {bound}, {right.text}\n jb soon\n neg {bound}")
        elif stays == ConditionCode.B:
            lines.append(f"cmp {bound}, {right.text}\n jae soon\n neg {bound}\n add {bound}, {right.text}")
        else:
            raise _NotCounted
        lines.append("cmp r11, r10\n cmovb r10, r11" if self._bounds else "mov r10, r11")
        self._bounds += 1


def _constant(value: int, size: int) -> _Value:
    """An operand that is a constant, where it fits sign-extended 32 bits."""
    value &= (1 << 8 * size) - 1
    value -= value >> 8 * size - 1 << 8 * size
    if not -(1 << 31) <= value < 1 << 31:
        raise _NotCounted
    return _Value(str(value))


def _register(register: int) -> tuple[int, int]:
    """(number, size) of a general register of 32 or 64 bits that translated code has in the host's."""
    number, size = GPR.get(register, (RSP, 0))
    if size < 4 or number in _TAKEN:
        raise _NotCounted
    return number, size

