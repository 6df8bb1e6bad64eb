"""The comparisons of kernels as tables, with the verdicts on what is promised."""

from __future__ import annotations

from statistics import geometric_mean

from rich.console import Console
from rich.markup import escape

from bench.machines import NATIVE, PARAVIRTUAL, TCG, TRIVISOR, UNICORN
from bench.records import Comparison
from bench.report import titled_table
from bench.verdict import print_memory, verdict
from trivisor.machine import tsc

COMPUTE_MEAN_MUST = 2.5
"""Times as fast as TCG, geometric mean."""
COMPUTE_EACH_MUST = 0.9
SYSTEM_EACH_MUST = 0.5


def print_compute(console: Console, found: Comparison) -> None:
    """Time over native of each machine, and how many times as fast as TCG, kernel by kernel."""
    peers = [machine for machine in (TCG, UNICORN) if machine in found.runs]
    columns = ["", "native, us", TRIVISOR, *peers, "speed over TCG", "warm-up, us"]
    table = titled_table(console, "Compute kernels: time over native (medians)", *columns)
    megahertz = tsc.frequency() / 1e6
    for name in found.names:
        native, warm_up = found.cycles(NATIVE, name), found.warm_up(TRIVISOR, name)
        table.add_row(
            name,
            number(native and native / megahertz, 0),
            *(number(found.ratio(machine, NATIVE, name), 2) for machine in (TRIVISOR, *peers)),
            number(_inverse(found.ratio(TRIVISOR, TCG, name)), 2),
            number(warm_up and warm_up / megahertz, 0),
        )
    table.add_section()
    table.add_row(
        "geometric mean",
        "",
        *(number(_mean(found, machine, NATIVE), 2) for machine in (TRIVISOR, *peers)),
        number(_inverse(_mean(found, TRIVISOR, TCG)), 2),
        "",
    )
    console.print(table)
    if UNICORN not in found.runs:
        console.print(escape("Unicorn is not installed here (pip install -e '.[bench]')."), highlight=False)
    _print_verdicts(console, found, each=COMPUTE_EACH_MUST, mean=COMPUTE_MEAN_MUST)
    print_memory(console, found.statistics)


def print_system(console: Console, found: Comparison, operations: dict[str, int]) -> None:
    """Cycles of one operation, side by side; `operations` are how many a repetition has."""
    title = "System kernels: cycles of the TSC an operation (medians)"
    machines = [TRIVISOR, *(name for name in PARAVIRTUAL if name in found.runs), TCG]
    table = titled_table(console, title, "", *machines, "speed over TCG")
    for name in found.names:
        each = [cycles and cycles / operations[name] for cycles in (found.cycles(m, name) for m in machines)]
        speed = _inverse(found.ratio(TRIVISOR, TCG, name))
        table.add_row(name, *(number(cycles, 0) for cycles in each), number(speed, 2))
    console.print(table)
    _print_verdicts(console, found, each=SYSTEM_EACH_MUST)
    print_memory(console, found.statistics)


def _print_verdicts(console: Console, found: Comparison, *, each: float, mean: float | None = None) -> None:
    """Whether the promises are kept."""
    ratios = found.ratios(TRIVISOR, TCG)
    if not ratios:
        console.print("There is no QEMU to compare with.", highlight=False)
        return
    if mean is not None:
        speed = 1 / geometric_mean(ratios.values())
        what = f"geometric mean {speed:.2f} times as fast as {TCG}"
        console.print(verdict(what, str(mean), speed >= mean), highlight=False)
    slowest = max(ratios, key=ratios.__getitem__)
    speed = 1 / ratios[slowest]
    what = f"slowest: {slowest}, {speed:.2f} times as fast as {TCG}"
    console.print(verdict(what, str(each), speed >= each), highlight=False)


def _mean(found: Comparison, machine: str, other: str) -> float | None:
    """The geometric mean of the times of `machine` over those of `other`."""
    ratios = found.ratios(machine, other)
    return geometric_mean(ratios.values()) if ratios else None


def _inverse(ratio: float | None) -> float | None:
    return None if ratio is None else 1 / ratio


def number(value: float | None, digits: int) -> str:
    """For a table."""
    return "-" if value is None else f"{value:,.{digits}f}"
