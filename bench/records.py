"""What a benchmark's guest prints about each of its kernels, and the comparison of several machines by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.process import Failed

OK, ABSENT, UNSTEADY = 1, 2, 3
"""A record's status: measured; the processor lacks what it needs; its checksum changed from one to the next."""


@dataclass(frozen=True, slots=True)
class Record:
    """One kernel in one run: its checksum, and the cycles of the TSC of the first and of the quickest repetition."""

    checksum: int
    first: int
    least: int


def parse(output: str, names: Sequence[str], who: str) -> dict[str, Record | None]:
    """The records of `names`, None for those that the processor cannot run; raises `Failed`."""
    lines = output.splitlines()
    if len(lines) != len(names):
        last = lines[-1] if lines else ""
        raise Failed(f"{who} printed {len(lines)} records, not {len(names)}; its last line: {last!r}")
    found: dict[str, Record | None] = {}
    for name, line in zip(names, lines, strict=True):
        try:
            status, checksum, first, *others = (int(word, 16) for word in line.split())
            least = min(others)
        except ValueError:
            raise Failed(f"{who}, {name}: {line!r} is no record") from None
        if status not in (OK, ABSENT):
            raise Failed(f"{who}, {name}: its checksum changed from one repetition to the next")
        found[name] = Record(checksum, first, least) if status == OK else None
    return found


@dataclass(slots=True)
class Comparison:
    """The same kernels on several machines, as often on each."""

    names: tuple[str, ...]
    runs: dict[str, list[dict[str, Record | None]]] = field(default_factory=dict)
    """By machine, in the order in which they were taken."""
    statistics: list[dict[str, Any]] = field(default_factory=list)
    """trivisor's own, of each of its runs."""

    def add(self, machine: str, records: dict[str, Record | None]) -> None:
        """Take in a run; raises `Failed` if a checksum is not what another machine found."""
        for other, runs in self.runs.items():
            for name, record in records.items():
                theirs = runs[0][name]
                if record is not None and theirs is not None and record.checksum != theirs.checksum:
                    raise Failed(
                        f"{name} ends in {record.checksum:#x} under {machine}, in {theirs.checksum:#x} under {other}"
                    )
        self.runs.setdefault(machine, []).append(records)

    def cycles(self, machine: str, name: str) -> float | None:
        """Cycles of the quickest repetition: the median of the runs."""
        found = [record.least for records in self.runs.get(machine, ()) if (record := records[name]) is not None]
        return median(found) if found else None

    def warm_up(self, machine: str, name: str) -> float | None:
        """Cycles that the first repetition takes longer than the quickest: the median of the runs."""
        found = [r.first - r.least for records in self.runs.get(machine, ()) if (r := records[name]) is not None]
        return median(found) if found else None

    def ratio(self, machine: str, other: str, name: str) -> float | None:
        """The time of `machine` over that of `other`, run by run: the median."""
        pairs = zip(self.runs.get(machine, ()), self.runs.get(other, ()), strict=False)
        found = [a.least / b.least for x, y in pairs if (a := x[name]) is not None and (b := y[name]) is not None]
        return median(found) if found else None

    def ratios(self, machine: str, other: str) -> dict[str, float]:
        """`ratio` of all kernels that both can run."""
        found = ((name, self.ratio(machine, other, name)) for name in self.names)
        return {name: ratio for name, ratio in found if ratio is not None}

    def as_json(self) -> dict[str, object]:
        """Every record, for programs."""
        return {
            machine: [
                {name: [r.checksum, r.first, r.least] if r is not None else None for name, r in records.items()}
                for records in runs
            ]
            for machine, runs in self.runs.items()
        }
