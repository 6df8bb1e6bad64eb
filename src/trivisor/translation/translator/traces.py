"""Traces: the straight way that a hot block's code takes through forward jumps, found before it is laid out anew.

A trace goes on at the target of a jump, and on one side of a conditional one;
the other side leaves it.  It stays within the page and goes to higher addresses
only, so that the bytes which it is made of, with those that it jumps over, are
one range, as a block's are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from trivisor.translation.modes import Branch, Jump
from trivisor.translation.shapes import MAXIMUM_INSTRUCTIONS
from trivisor.translation.translator.recipe import Entry
from trivisor.x86 import LONGEST_INSTRUCTION

LONGEST_SPAN = 512
"""Bytes from a trace's first to its last (the map from host code to guest addresses holds 1023)."""
_LAST_START = 0x1000 - LONGEST_INSTRUCTION
"""Offset in its page of the last instruction that surely ends there."""


class Segment(NamedTuple):
    """Instructions of a trace that follow one another."""

    rip: int
    entries: list[Entry]
    length: int
    """Bytes."""
    polls: bool
    """Interrupts are to be looked for after it."""

    @property
    def end(self) -> int:
        return self.rip + self.length

    @property
    def has_shadow(self) -> bool:
        """Whether interrupts are held off somewhere in it: such code is not tuned."""
        return any(recipe.shadow for recipe, _, _ in self.entries)

    @property
    def ways(self) -> tuple[int, ...]:
        """Linear addresses where 64-bit code may go on: none after what no trace goes past, else the next one last."""
        recipe, constants, _ = self.entries[-1]
        ends = recipe.ends
        if self.polls:
            return ()
        target = self.end + constants.relative & (1 << 64) - 1
        if isinstance(ends, Branch) and not ends.prelude:
            return target, self.end
        if isinstance(ends, Jump) and not recipe.checks:  # calls push
            return (target,)
        return ()


class Judge(Protocol):
    """Knows where code goes on."""

    def __call__(self, ways: tuple[int, ...]) -> int | None:
        """The likeliest of the ways, from where the last call led; None if none is known to be taken."""


def any_way(ways: tuple[int, ...]) -> int:
    """A judge that knows nothing, but always the same."""
    return ways[(ways[0] ^ ways[0] >> 3) % len(ways)]


def follow(rip: int, segment_at: Callable[[int], Segment], judge: Judge) -> tuple[list[Segment], int | None]:
    """The segments of the trace from linear `rip`, and where the judge would go on from the last."""
    segments = [segment_at(rip)]
    count = len(segments[0].entries)
    while True:
        last = segments[-1]
        way = judge(last.ways) if last.ways else None
        if way is None or way < last.end or way >> 12 != rip >> 12 or way & 0xFFF > _LAST_START:
            return segments, way
        segment = segment_at(way)
        count += len(segment.entries)
        if count > MAXIMUM_INSTRUCTIONS or segment.end - rip > LONGEST_SPAN or segment.has_shadow:
            return segments, way
        segments.append(segment)
