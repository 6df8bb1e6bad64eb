"""The measurements as tables and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.boot import Boots
from bench.machines import QEMU
from bench.verdict import print_memory, print_restored

_EXITS_SHOWN = 8


def titled_table(console: Console, title: str, *columns: str) -> Table:
    """A table with a line above it that says what it shows."""
    console.print(f"[bold]{title}[/bold]", highlight=False)
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def print_boots(console: Console, boots: Boots) -> None:
    """Each pair of boots, then median, least and most."""
    both = bool(boots.qemu)
    columns = ["", "trivisor", "(CPU)"] + (["QEMU TCG", "(CPU)", "ratio"] if both else [])
    table = titled_table(console, "Boot to userspace, in seconds", *columns)
    for number, ours in enumerate(boots.trivisor, 1):
        row = [str(number), f"{ours.wall:.2f}", f"{ours.cpu:.2f}"]
        if both:
            theirs = boots.qemu[number - 1]
            row += [f"{theirs.wall:.2f}", f"{theirs.cpu:.2f}", f"{boots.ratios[number - 1]:.2f}"]
        table.add_row(*row)
    table.add_section()
    measured = [[t.wall for t in boots.trivisor], [t.cpu for t in boots.trivisor]]
    if both:
        measured += [[t.wall for t in boots.qemu], [t.cpu for t in boots.qemu], boots.ratios]
    for name, choose in (("median", median), ("min", min), ("max", max)):
        table.add_row(name, *(f"{choose(column):.2f}" for column in measured))
    console.print(table)
    if boots.kept:
        ratio = "" if boots.kept_ratio is None else f", {boots.kept_ratio:.2f} times QEMU's"
        seconds = median(t.wall for t in boots.kept)
        console.print(f"With the translations of an earlier boot kept: median {seconds:.2f}{ratio}.", highlight=False)
    for name, timings in boots.paravirtual.items():
        relative = boots.paravirtual_ratio(name)
        times = "" if relative is None else f", {relative:.2f} times the processor time of full translation"
        seconds = median(t.wall for t in timings)
        console.print(f"The same by {name}, kept too: median {seconds:.2f}{times}.", highlight=False)
    print_restored(console, [timing.wall for timing in boots.restored])
    print_memory(console, boots.statistics)
    if not both:
        console.print(f"{QEMU} is not installed here: nothing to compare with.", highlight=False)


def print_start(console: Console, seconds: Sequence[float]) -> None:
    """The command's own start."""
    table = titled_table(console, "trivisor --help, in seconds", "median", "min", "max")
    table.add_row(*(f"{choose(seconds):.3f}" for choose in (median, min, max)))
    console.print(table)


def print_statistics(console: Console, statistics: Sequence[dict[str, Any]]) -> None:
    """Where the time of a boot goes, and how fast the translator is: medians over the boots."""
    seconds = medians(statistics, "seconds")
    total = sum(seconds.values())
    table = titled_table(console, "Where the time goes (median boot)", "", "s", "share")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.2f}", f"{value / total:.0%}" if total else "")
    console.print(table)
    console.print()
    exits = medians(statistics, "exits")
    table = titled_table(console, "Exits to Python (median boot)", "", "")
    for name, value in sorted(exits.items(), key=lambda item: -item[1])[:_EXITS_SHOWN]:
        table.add_row(name, f"{value:,.0f}")
    console.print(table)
    console.print()
    made = medians(statistics, "translation")
    table = titled_table(console, "Translator (median boot)", "", "")
    for name in ("instructions", "blocks"):
        if name in made:
            table.add_row(name, f"{made[name]:,.0f}")
    speed = microseconds_an_instruction(statistics)
    if speed is not None:
        table.add_row("us an instruction", f"{speed:.2f}")
    console.print(table)


def microseconds_an_instruction(statistics: Iterable[dict[str, Any]]) -> float | None:
    """Time in the translator over guest instructions translated: the median."""
    speeds = [
        one["seconds"]["translating"] / one["translation"]["instructions"] * 1e6
        for one in statistics
        if one.get("seconds", {}).get("translating") and one.get("translation", {}).get("instructions")
    ]
    return median(speeds) if speeds else None


def medians(statistics: Iterable[dict[str, Any]], group: str) -> dict[str, float]:
    """The median of each number in one group of the engine's counters."""
    found: dict[str, list[float]] = {}
    for one in statistics:
        for name, value in one.get(group, {}).items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(value)
    return {name: median(values) for name, values in found.items()}


def host_as_json() -> dict[str, Any]:
    """Where this was measured."""
    return {"machine": platform.machine(), "processors": os.cpu_count(), "python": platform.python_version()}


def boots_as_json(boots: Boots, start: Sequence[float]) -> dict[str, Any]:
    """All of the boots, for programs."""
    return {
        "trivisor": [asdict(timing) for timing in boots.trivisor],
        "qemu": [asdict(timing) for timing in boots.qemu],
        "ratios": boots.ratios,
        "kept": [asdict(timing) for timing in boots.kept],
        "kept ratio": boots.kept_ratio,
        "paravirtual": {name: [asdict(timing) for timing in timings] for name, timings in boots.paravirtual.items()},
        "paravirtual ratios": {name: boots.paravirtual_ratio(name) for name in boots.paravirtual},
        "restored": [asdict(timing) for timing in boots.restored],
        "median": {
            "trivisor": median(t.wall for t in boots.trivisor),
            "qemu": median(t.wall for t in boots.qemu) if boots.qemu else None,
            "ratio": boots.ratio,
        },
        "help": list(start),
        "translator": {"microseconds an instruction": microseconds_an_instruction(boots.statistics)},
        "statistics": boots.statistics,
    }
