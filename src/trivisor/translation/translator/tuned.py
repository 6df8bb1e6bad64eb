"""Blocks that turned out to be hot, made anew: cheaper ways to memory for each of their instructions.

Two things make a tuned block faster than the one that was made at first sight.

A *site cache* is a TLB of one entry for one place in the code: the same page
again and again is the rule there, and an entry at a fixed place in the state
block is read long before the address is known, which takes the look-up off
the critical path.  Where it is not the rule, the tuner sees the misses, and
the instruction gets the TLB's plain check back.

A *group* is a run of instructions that access memory off the same registers:
pushes, pops and the return after them, fields of a structure.  The first of
them checks the whole range, the others use the host address that it leaves in
r10.  If the check fails, because the range runs into another page or has to
be done by Python, the block is left for a plain one at the same place.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

from iced_x86 import (
    ConstantOffsets,
    Decoder,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
)

from trivisor.translation.layout import DISTANT_SITES, SITES
from trivisor.translation.translator.instructions import InstructionMaker
from trivisor.translation.translator.recipe import KIND_WRITE, Form, Recipe
from trivisor.translation.translator.registers import DISPLACED, GPR

LARGEST_SPAN = 256
"""Bytes of a group's range: a longer one would run into the next page too often."""
_CACHED_CHECKS = ([False], [True], [False, True], [True, False])
"""Which checks (whether they are for writing) an instruction may have that gets site caches.

Gathers and their like, and those that read two places, keep to the TLB.
"""

PLAIN_CHECK = -1
"""In `Form.sites`: this check does not go by a site cache."""
_STACK_READ, _STACK_WRITE = 0, 1
FIRST_SITES = (2, DISTANT_SITES)
"""The first site of the distant forms that no instruction has yet, and the first of the others."""

_WRITES = {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}

Address = tuple[int, int, int, int]
"""Segment (for FS and GS), base, index, scale."""
_STACK: Address = (Register.NONE, Register.RSP, Register.NONE, 1)


class Decoded(NamedTuple):
    """An instruction of the block."""

    instruction: Instruction
    raw: bytes
    offsets: ConstantOffsets


class _Access(NamedTuple):
    """What an instruction does to memory, if it may be in a group."""

    address: Address
    displacement: int
    size: int
    write: bool
    moves: int
    """What it adds to the base register afterwards."""


@dataclass(slots=True)
class _Group:
    """Instructions that may share a check; distances are from what `address` was at the first."""

    address: Address
    members: list[tuple[int, int]] = field(default_factory=list)
    """(index in the block, distance)."""
    low: int = 0
    high: int = 0
    write: bool = False
    shift: int = 0
    """How far the base register has moved since."""
    single: bool = False
    """Its one instruction accesses memory in a way of its own."""
    leaves: bool = False
    """A way out of the trace lies between its instructions."""

    def take(self, index: int, access: _Access) -> bool:
        """Add an instruction's access, unless the range would become too long."""
        at = self.shift + access.displacement
        low, high = (min(self.low, at), max(self.high, at + access.size)) if self.members else (at, at + access.size)
        if high - low > LARGEST_SPAN:
            return False
        if self.leaves and access.write and not self.write:
            return False  # the page may be one that is often read here, and written to by nobody
        self.low, self.high, self.write = low, high, self.write or access.write
        self.members.append((index, at))
        self.shift += access.moves
        return True


class Tuning:
    """Finds how the instructions of a block are to reach memory; `forms` has the outcome."""

    def __init__(
        self,
        maker: InstructionMaker,
        decoded: list[Decoded],
        recipes: list[Recipe],
        next_sites: tuple[int, int],
        scattered: set[int],
        turns: Container[int] = (),
    ) -> None:
        """`recipes`: the plain ones of the instructions; `turns`: indexes of a trace's jumps.

        `scattered`: those of the instructions whose site caches would miss.
        """
        self._maker = maker
        self._decoded = decoded
        self._scattered = scattered
        self._turns = turns
        self._info = InstructionInfoFactory()
        self._plain = recipes
        self.forms: list[Form | None] = [None] * len(decoded)
        self._next_sites = list(next_sites)
        self._computed = self._computed_registers()
        self._known_sites: dict[tuple[Address, bool, int, bool], int] = {}
        for group in self._groups():
            self._form(group)

    def recipe(self, index: int) -> Recipe:
        """The instruction's recipe as it is to be now."""
        form = self.forms[index]
        return self._plain[index] if form is None else self._maker.make(*self._decoded[index], form=form)

    @property
    def pays(self) -> bool:
        """Whether anything is different from a plain block."""
        return any(form is not None for form in self.forms)

    # -- groups ---------------------------------------------------------------------------------------------

    def _groups(self) -> list[_Group]:
        """All accesses, as groups of one or more."""
        groups: list[_Group] = []
        current: _Group | None = None
        for index, (instruction, _, _) in enumerate(self._decoded):
            recipe = self._plain[index]
            access = self._access(instruction, recipe)
            if access is not None:
                if current is None or current.address != access.address or not current.take(index, access):
                    current = _Group(access.address)
                    current.take(index, access)
                    groups.append(current)
                if self._spoils(instruction, access.address, access.moves):
                    current = None
            elif recipe.checks:
                single = _Group(_address(instruction), [(index, 0)], instruction.memory_displacement, single=True)
                groups.append(single)
                current = None
            elif current is not None:
                moved = _moves(instruction, current.address) if current.address[2] == Register.NONE else None
                if _leaves_r10_unknown(recipe):
                    current = None
                elif moved is not None:
                    current.shift += moved
                elif self._spoils(instruction, current.address, 0):
                    current = None
                elif index in self._turns and instruction.is_jcc_short_or_near:
                    current.leaves = True
        return groups

    def _access(self, instruction: Instruction, recipe: Recipe) -> _Access | None:
        """The instruction's one access, if others may share its check and it may share theirs."""
        if recipe.checks != 1 or any(item.escapes or item.loops for item in recipe.items):
            return None
        size = abs(instruction.stack_pointer_increment)
        mnemonic = instruction.mnemonic
        if instruction.is_call_near:
            return _Access(_STACK, -size, size, True, -size)
        if mnemonic == Mnemonic.RET:
            return _Access(_STACK, 0, 8, False, size)
        if mnemonic in (Mnemonic.PUSH, Mnemonic.POP) and instruction.op0_kind != OpKind.MEMORY:
            if mnemonic == Mnemonic.PUSH:
                return _Access(_STACK, -size, size, True, -size)
            into_stack_pointer = RegisterExt.full_register(instruction.op0_register) == Register.RSP
            return None if into_stack_pointer else _Access(_STACK, 0, size, False, size)
        if recipe.ends is not None or not recipe.takes_form:
            return None
        operands = [i for i in range(instruction.op_count) if instruction.op_kind(i) == OpKind.MEMORY]
        size = MemorySizeExt.size(instruction.memory_size)
        if len(operands) != 1 or not 0 < size <= 64 or instruction.memory_base == Register.EIP:
            return None
        if self._maker.address_bits(instruction) != 64:
            return None
        write = self._info.info(instruction).op_access(operands[0]) in _WRITES
        displacement = instruction.memory_displacement
        displacement -= (displacement >> 63) << 64
        return _Access(_address(instruction), displacement, size, write, 0)

    def _spoils(self, instruction: Instruction, address: Address, moves: int) -> bool:
        """Whether the instruction changes a register of the address by more than is known."""
        for used in self._info.info(instruction).used_registers():
            if used.access in _WRITES:
                full = RegisterExt.full_register(used.register)
                if full in address[1:3] and not (full == Register.RSP and moves):
                    return True
        return False

    def _computed_registers(self) -> set[int]:
        """Registers to which some instruction gives a value that is more than their own moved along."""
        found: set[int] = set()
        for instruction, _, _ in self._decoded:
            along = Register.NONE
            if instruction.mnemonic in _STEPS and instruction.op0_kind == OpKind.REGISTER:
                along = RegisterExt.full_register(instruction.op0_register)
            for used in self._info.info(instruction).used_registers():
                full = RegisterExt.full_register(used.register)
                if used.access in _WRITES and full not in (along, Register.RSP):
                    found.add(full)
        return found

    # -- forms ----------------------------------------------------------------------------------------------

    def _form(self, group: _Group) -> None:
        """Give the group's instructions their forms."""
        first = group.members[0][0]
        scattered = first in self._scattered
        distant = not (scattered or group.single) and self._is_distant(group.address)
        if len(group.members) == 1 and not distant:
            write = [bool(miss.kind_and_size & KIND_WRITE) for item in self._plain[first].items for miss in item.misses]
            if write in _CACHED_CHECKS and not scattered:
                self.forms[first] = Form(tuple(self._site(group, kind, distant=False) for kind in write))
            return
        site = PLAIN_CHECK if scattered else self._site(group, group.write, distant=distant)
        for index, at in group.members:
            leads = index == first
            span = group.high - group.low if leads else 0
            self.forms[index] = Form((site,) if leads else (), at - group.low, span, group.write, distant)

    def _site(self, group: _Group, write: bool, *, distant: bool) -> int:
        """The number of the site cache for a group: that of others off the same registers and close by, if any."""
        if group.address == _STACK and distant:
            return _STACK_WRITE if write else _STACK_READ
        key = group.address, write, group.low // LARGEST_SPAN, distant
        site = self._known_sites.get(key)
        if site is None:
            half = int(not distant)
            site = self._known_sites[key] = self._next_sites[half]
            self._next_sites[half] += 1
            if self._next_sites[half] == (DISTANT_SITES, SITES)[half]:
                self._next_sites[half] = FIRST_SITES[half]
        return site

    def _is_distant(self, address: Address) -> bool:
        """Whether accesses are to be `Form.distant`: off one register, or off two that are not known early.

        The latter take an instruction more, which is lost where the check is out of the way anyway.
        """
        segment, base, index, _ = address
        registers = [register for register in (base, index) if register != Register.NONE]
        if segment != Register.NONE or not registers:
            return False
        if any(GPR.get(register, (0, 0))[1] != 8 or GPR[register][0] in DISPLACED for register in registers):
            return False
        return index == Register.NONE or not self._computed.isdisjoint(registers)

    @property
    def next_sites(self) -> tuple[int, int]:
        """Like `FIRST_SITES`, for the next block."""
        distant, other = self._next_sites
        return distant, other


_STEPS = {Mnemonic.INC, Mnemonic.DEC, Mnemonic.ADD, Mnemonic.SUB}


def _address(instruction: Instruction) -> Address:
    """What the memory operand's address is made of, but for its displacement; the stack's without an operand."""
    if all(instruction.op_kind(i) != OpKind.MEMORY for i in range(instruction.op_count)):
        return _STACK
    segment = instruction.memory_segment
    return (
        segment if segment in (Register.FS, Register.GS) else Register.NONE,
        instruction.memory_base,
        instruction.memory_index,
        instruction.memory_index_scale if instruction.memory_index != Register.NONE else 1,
    )


def _moves(instruction: Instruction, address: Address) -> int | None:
    """What an instruction adds to the address's base register, if that is a constant and all that it does."""
    base = address[1]
    if instruction.op_count != 2 or instruction.op0_kind != OpKind.REGISTER or instruction.op0_register != base:
        return None
    if address[2] == base or GPR.get(base, (0, 0))[1] != 8:
        return None
    mnemonic = instruction.mnemonic
    if mnemonic in (Mnemonic.ADD, Mnemonic.SUB) and instruction.op1_kind in _IMMEDIATES:
        value: int = instruction.immediate(1)
        value -= (value >> 63) << 64
        return value if mnemonic == Mnemonic.ADD else -value
    if mnemonic == Mnemonic.LEA and instruction.memory_base == base and instruction.memory_index == Register.NONE:
        value = instruction.memory_displacement
        return value - ((value >> 63) << 64)
    return None


_IMMEDIATES = {OpKind.IMMEDIATE8TO64, OpKind.IMMEDIATE32TO64}


def _leaves_r10_unknown(recipe: Recipe) -> bool:
    """Whether the host code of an instruction without memory operands uses r10, or may change what the TLBs allow.

    Both is to be expected of the helpers.
    """
    info = InstructionInfoFactory()
    code = b"".join(item.code for item in recipe.items)
    return any(
        instruction.mnemonic == Mnemonic.CALL
        or RegisterExt.full_register(used.register) == Register.R10
        for instruction in Decoder(64, code)
        for used in info.info(instruction).used_registers()
    )
