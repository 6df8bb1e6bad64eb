"""Whether a promise of SPECIFICATION.md is kept, as a line to print, and the promise on memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape

RESTORE_MUST = 0.5
"""Seconds from the start of the process to the first output of a command in a restored guest."""
MEMORY_MUST = 350
"""MiB at most that a run takes beside the RAM that its guest has touched."""


def verdict(what: str, must: str, met: bool) -> str:
    """The line, with its colours."""
    return escape(f"{what} (must be {must}): ") + ("[green]met[/green]" if met else "[red]not met[/red]")


def print_restored(console: Console, seconds: Sequence[float]) -> None:
    """How soon a restored guest answers; nothing where none was restored."""
    if seconds:
        what = f"restored guest: first output of a command after {median(seconds):.2f} s (median)"
        console.print(verdict(what, f"at most {RESTORE_MUST:g}", median(seconds) <= RESTORE_MUST), highlight=False)


def print_memory(console: Console, statistics: Iterable[dict[str, Any]]) -> None:
    """The worst of some runs of trivisor's, by their own statistics; nothing when they do not tell."""
    found = [one["MiB of host memory"] for one in statistics if "MiB of host memory" in one]
    if found:
        worst = max(found, key=lambda one: one["all else, at most"])
        most = worst["all else, at most"]
        what = f"memory: {worst['guest RAM']} MiB of guest RAM, {most} MiB beside it"
        console.print(verdict(what, f"at most {MEMORY_MUST}", most <= MEMORY_MUST), highlight=False)
