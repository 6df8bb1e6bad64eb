"""What the translator must know of the processor's mode, and the ways in which a block can end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Mode:
    """What the translator must know of the processor's mode; its `key` is part of every block's key."""

    bits: int = 64
    user: bool = False
    flat: bool = True
    """ES, CS, SS and DS have base 0 (always so in 64-bit mode)."""
    no_fpu: bool = False
    """CR0.TS or EM: x87 and SSE instructions fault."""
    stack_bits: int = 64
    other: int = 0
    """A number that sets apart modes that differ in what else matters."""

    key: int = field(init=False, compare=False)
    """The mode in ten bits: part of every block's key."""

    def __post_init__(self) -> None:
        key = (
            {16: 0, 32: 1, 64: 2}[self.bits]
            | (4 if self.user else 0)
            | (0 if self.flat else 8)
            | (16 if self.no_fpu else 0)
            | {16: 0, 32: 32, 64: 64}[self.stack_bits]
            | self.other << 7
        )
        object.__setattr__(self, "key", key)

    def at_level(self, user: bool) -> Mode:
        """The same mode at CPL 3 or not."""
        return replace(self, user=user)

    @property
    def jump_cache(self) -> int:
        """Which of the jump caches it uses: 0 kernel, 1 user, 2 other."""
        return (1 if self.user else 0) if self.bits == 64 else 2

    @property
    def jump_cache_name(self) -> str:
        return ("KERNEL", "USER", "OTHER")[self.jump_cache]


class Jump(NamedTuple):
    """Ends a block: go on at next + the instruction's `Constants.relative`."""


class Branch(NamedTuple):
    """Ends a block: at next + `Constants.relative` when the condition holds, else at next.

    `condition` is the low four bits of the jcc; with a `prelude`, its last
    instruction is a short jump whose displacement byte comes last and leads to
    the taken way.
    """

    condition: int
    prelude: bytes = b""


class Indirect(NamedTuple):
    """Ends a block: go on at the address in r10."""


class CallOut(NamedTuple):
    """Ends a block: Python does this instruction."""


class Native(NamedTuple):
    """Ends a block: the helper whose address is in the state block's field `name` does this instruction."""

    name: str


class Raise(NamedTuple):
    """Ends a block: the instruction raises exception `vector`."""

    vector: int


class Missing(NamedTuple):
    """Ends a block and the run: the instruction is not supported."""


class Repeat(NamedTuple):
    """Ends a single-step block of a repeated string instruction: itself again unless rcx is 0."""


class RepeatCompare(NamedTuple):
    """The same for SCAS and CMPS, which also end when ZF is `until_equal`."""

    until_equal: bool
