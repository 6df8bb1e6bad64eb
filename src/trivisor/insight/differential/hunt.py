"""Running many cases, comparing, and shrinking those that differ."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace

from trivisor.insight.differential.case import Case, Endless, Item, Layout, Result, Skipped
from trivisor.insight.differential.compare import END, describe, differences
from trivisor.insight.differential.generator import Generator
from trivisor.insight.differential.native import NativeHost
from trivisor.insight.differential.translated import TranslatedGuest
from trivisor.translation.translator.recipe import forget_assembled

_RENEW = 4000
"""Cases for one virtual processor: it keeps what it made of all code."""


@dataclass(slots=True)
class Difference:
    """A case that ends differently."""

    seed: str
    case: Case
    run: int
    """Number of the state whose run differs."""
    lines: list[str]

    def __str__(self) -> str:
        return "\n".join((f"seed {self.seed}", *describe(self.case, self.run), *self.lines))


@dataclass(slots=True)
class Report:
    """What a hunt found."""

    cases: int = 0
    instructions: int = 0
    """In the cases."""
    executed: int = 0
    """Those that ran, once for each state; the passes of a loop count as one."""
    codes: set[int] = field(default_factory=set)
    faults: Counter[int] = field(default_factory=Counter)
    """Cases by the exception that they ended with; -1: none."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Cases with an instruction that the engine does not have, by its first word."""
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.executed / self.seconds if self.seconds else 0
        return (
            f"{self.cases} cases, {self.instructions} instructions, {len(self.codes)} opcodes; "
            f"{self.executed} instructions executed, {rate:.0f} a second; "
            f"faults {dict(sorted(self.faults.items()))}; not supported {self.skipped.total()}; "
            f"{len(self.differences)} differences"
        )


class Hunt:
    """Both sides, and the comparison, for 16-, 32- or 64-bit code."""

    def __init__(self, bits: int = 64, *, fault_flags: bool = False) -> None:
        self.native = NativeHost.instance()
        self.native.watch(True)
        self.fault_flags = fault_flags
        self.report = Report()
        self._guest: TranslatedGuest | None = None
        self._age = 0
        self.generator = Generator(self.guest().features, bits)
        self._started = time.monotonic()

    def guest(self) -> TranslatedGuest:
        """The guest for the next case."""
        if self._guest is None or self._age >= _RENEW:
            self._drop_guest()
            self._guest = TranslatedGuest()
            self._age = 0
        self._age += 1
        return self._guest

    def _drop_guest(self) -> None:
        if self._guest is not None:
            self._guest.close()
            self._guest = None
            forget_assembled()

    def close(self) -> None:
        """Give host resources back."""
        self._drop_guest()
        self.native.watch(False)

    def compare(self, case: Case) -> tuple[int, list[str]]:
        """Run on both sides; (which run differs, lines that tell how).  Raises Skipped and Endless."""
        layout = case.layout()
        native = self.native.run(case, layout)
        for result in native:
            self.report.faults[result.vector] += 1
            self.report.executed += _reached(layout, result)
        try:
            translated = self.guest().run(case, layout)
        except Skipped:
            raise
        except Exception as problem:  # the translator's own failure is a difference too
            self._drop_guest()
            return 0, [f"  translated: {type(problem).__name__}: {problem}"]
        for number, (expected, found) in enumerate(zip(native, translated, strict=True)):
            if lines := differences(case, layout, expected, found, fault_flags=self.fault_flags):
                return number, lines
        return 0, []

    def _differs(self, case: Case) -> bool:
        try:
            return bool(case.items and self.compare(case)[1])
        except (Skipped, Endless, ValueError):
            return False

    def shrink(self, case: Case, run: int) -> Case:
        """Leave out states and instructions as long as there is a difference; `run` is the one that differs."""
        for states in ([case.states[run]], case.states[: run + 1]):
            if self._differs(smaller := replace(case, states=states)):
                case = smaller
                break
        whole, left_out = case, set[int]()
        for part in reversed(_parts(case.items)):
            smaller = _without(whole, left_out | part)
            if self._differs(smaller):
                case = smaller
                left_out |= part
        return case

    def try_one(self, seed: str) -> None:
        """Try the case of a seed; what comes of it goes into the report."""
        case = self.generator.case(seed)
        report = self.report
        report.cases += 1
        report.instructions += len(case.items)
        report.codes.update(item.instruction.code for item in case.items)
        try:
            run, lines = self.compare(case)
            if lines:
                case = self.shrink(case, run)
                report.differences.append(Difference(seed, case, *self.compare(case)))
        except Skipped as skipped:
            report.skipped[str(skipped).split()[0]] += 1
        except Endless:
            report.skipped["(endless)"] += 1
        report.seconds = time.monotonic() - self._started


def _reached(layout: Layout, result: Result) -> int:
    """How many of the case's instructions a run has come to, the one that faults included; loops count once."""
    if result.rip not in layout.addresses:
        return 0
    at = layout.addresses.index(result.rip)
    return at + (result.vector != END)


def _parts(items: list[Item]) -> list[set[int]]:
    """Numbers of items that can be left out together."""
    parts: list[set[int]] = []
    groups: dict[int, set[int]] = {}
    together = False
    for number, item in enumerate(items):
        if item.group:
            if item.group not in groups:
                groups[item.group] = set()
                parts.append(groups[item.group])
            groups[item.group].add(number)
            together = False
        elif together:
            parts[-1].add(number)
            together = item.keep
        else:
            parts.append({number})
            together = item.keep
    return parts


def run(
    seed: int, count: int, *, bits: int = 64, seconds: float | None = None, stop_after: int | None = None
) -> Report:
    """Try cases `seed:0` to `seed:count-1`, or what can be done in `seconds`, up to `stop_after` differences."""
    hunt = Hunt(bits)
    report = hunt.report
    try:
        for number in range(count):
            hunt.try_one(f"{seed}:{number}")
            if seconds is not None and report.seconds > seconds:
                break
            if stop_after is not None and len(report.differences) >= stop_after:
                break
    finally:
        hunt.close()
    return report


def _without(case: Case, left_out: set[int]) -> Case:
    """The case less some instructions."""
    renumbered = []
    for number in range(len(case.items) + 1):
        renumbered.append(number - sum(1 for n in left_out if n < number))
    items = [
        replace(
            item,
            instruction=item.instruction.copy(),
            target=None if item.target is None else renumbered[min(item.target, len(case.items))],
        )
        for number, item in enumerate(case.items)
        if number not in left_out
    ]
    pokes = [(address, renumbered[min(n, len(case.items))]) for address, n in case.pokes]
    return replace(case, items=items, pokes=pokes)
