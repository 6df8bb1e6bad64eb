"""Paravirtualization beside full translation and TCG: the tables, and the verdicts on what is promised."""

from __future__ import annotations

from dataclasses import asdict
from statistics import geometric_mean, median
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench.guests.kernels import NAMES
from bench.guests.user_space import OPERATIONS
from bench.kernel_report import number
from bench.machines import DIRECT, LINUX, NATIVE, TCG
from bench.paravirt import Paravirtual
from bench.report import titled_table
from bench.verdict import verdict

DIRECT_MUST = 1.1
"""Times native, of compute kernels in the user space of a guest that is executed directly."""
BOOT_MUST = 1.0
"""Times full translation's processor time, of a boot by paravirtualization on translation."""


def print_paravirt(console: Console, found: Paravirtual) -> None:
    """Boots, compute kernels over native, Linux's work in cycles, and what of it is promised."""
    machines = [name for name in (*LINUX, TCG) if name in found.boots]
    title = "Xen guests: boot to userspace, translations kept, in seconds (medians)"
    table = titled_table(console, title, "", "s", "CPU", f"over {TCG}", "CPU over translation")
    for name in machines:
        table.add_row(
            name,
            *(f"{median(times):.2f}" for times in zip(*((t.wall, t.cpu) for t in found.boots[name]), strict=True)),
            number(found.boot_ratio(name, TCG, "wall"), 2),
            number(found.boot_ratio(name, "translation", "cpu"), 2),
        )
    console.print(table)
    console.print()
    table = titled_table(console, "Compute kernels in Linux's user space: time over native (medians)", "", *machines)
    for kernel in NAMES:
        table.add_row(kernel, *(number(found.kernels.ratio(name, NATIVE, kernel), 2) for name in machines))
    table.add_section()
    table.add_row("geometric mean", *(number(_mean(found, name), 2) for name in machines))
    console.print(table)
    console.print()
    title = "Linux's work for a program: cycles of the TSC an operation (medians)"
    table = titled_table(console, title, "", *machines, NATIVE)
    for kernel, count in OPERATIONS.items():
        cycles = (found.kernels.cycles(name, kernel) for name in (*machines, NATIVE))
        table.add_row(kernel, *(number(one and one / count, 0) for one in cycles))
    console.print(table)
    _print_verdicts(console, found)


def _print_verdicts(console: Console, found: Paravirtual) -> None:
    mean = _mean(found, DIRECT)
    if mean is None:
        console.print(escape(f"There is no direct execution here: {found.without_direct}."), highlight=False)
    else:
        ratios = _compute(found, DIRECT)
        slowest = max(ratios, key=ratios.__getitem__)
        what = f"user-space compute under {DIRECT}: geometric mean {mean:.2f} times native"
        console.print(verdict(what, f"at most {DIRECT_MUST:g}", mean <= DIRECT_MUST), highlight=False)
        console.print(f"slowest: {slowest}, {ratios[slowest]:.2f} times native", highlight=False)
    ratio = found.boot_ratio("paravirt", "translation", "cpu")
    if ratio is not None:
        what = f"boot by paravirtualization on translation: {ratio:.2f} times full translation's processor time"
        console.print(verdict(what, f"at most {BOOT_MUST:g}", ratio <= BOOT_MUST), highlight=False)


def _compute(found: Paravirtual, machine: str) -> dict[str, float]:
    """Time over native of each compute kernel."""
    ratios = found.kernels.ratios(machine, NATIVE)
    return {name: ratio for name, ratio in ratios.items() if name in NAMES}


def _mean(found: Paravirtual, machine: str) -> float | None:
    ratios = _compute(found, machine)
    return geometric_mean(ratios.values()) if ratios else None


def as_json(found: Paravirtual) -> dict[str, Any]:
    """All of it, for programs."""
    return {
        "boots": {name: [asdict(timing) for timing in timings] for name, timings in found.boots.items()},
        "boot ratios over TCG": {name: found.boot_ratio(name, TCG, "wall") for name in found.boots},
        "boot processor time over translation": {
            name: found.boot_ratio(name, "translation", "cpu") for name in found.boots
        },
        "compute over native": {name: _mean(found, name) for name in found.boots},
        "kernels": found.kernels.as_json(),
        "no direct execution": found.without_direct,
    }
