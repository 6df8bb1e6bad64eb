"""Interrupt wires between devices, interrupt controllers and the processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Line = Callable[[bool], None]
"""One interrupt wire: called with True to assert it and False to release it.  Setting it twice is harmless."""

Message = Callable[[int, bool, int, int, bool], bool]
"""Send (destination, logical, vector, delivery mode, level triggered); True when a local APIC accepted it."""


class InterruptSource(Protocol):
    """A line that asks for an interrupt, and the acknowledge cycle that tells which."""

    def pending(self) -> bool:
        """Whether an interrupt waits that the processor would take now if IF were set."""

    def acknowledge(self) -> int:
        """Take the most urgent pending interrupt and return its vector, 0 to 255.

        Only called right after `pending()` was true.
        """


class InterruptController(InterruptSource, Protocol):
    """What the processor sees of the interrupt controllers: its INTR pin and the acknowledge cycle."""

    on_pending: Callable[[], None]
    """Set by the processor; called whenever an interrupt begins to wait."""
    on_nmi: Callable[[], None]
    """Set by the processor; called for each non-maskable interrupt."""
    cr8: int
    """The task priority, 0 to 15, which the processor shows as its register CR8."""


def no_line(level: bool) -> None:
    """A wire that is not connected."""
