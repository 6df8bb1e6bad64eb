"""Running many cases, comparing, and shrinking those that differ."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace

from trivisor.insight.differential.case import Case, Item, Skipped
from trivisor.insight.differential.compare import describe, differences
from trivisor.insight.differential.generator import Generator
from trivisor.insight.differential.native import NativeHost
from trivisor.insight.differential.translated import TranslatedGuest
from trivisor.translation.translator.recipe import asm, fragment

_RENEW = 4000
"""Cases for one virtual processor: it keeps what it made of all code."""


@dataclass(slots=True)
class Difference:
    """A case that ends differently."""

    seed: str
    case: Case
    lines: list[str]

    def __str__(self) -> str:
        return "\n".join((f"seed {self.seed}", *describe(self.case), *self.lines))


@dataclass(slots=True)
class Report:
    """What a hunt found."""

    cases: int = 0
    instructions: int = 0
    codes: set[int] = field(default_factory=set)
    faults: Counter[int] = field(default_factory=Counter)
    """Cases by the exception that they ended with; -1: none."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Cases with an instruction that the engine does not have, by its first word."""
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.cases / self.seconds if self.seconds else 0
        return (
            f"{self.cases} cases, {self.instructions} instructions, {len(self.codes)} opcodes, "
            f"{rate:.0f} cases a second; faults {dict(self.faults)}; not supported {self.skipped.total()}; "
            f"{len(self.differences)} differences"
        )


class Hunt:
    """Both sides, and the comparison, for 32- or 64-bit code."""

    def __init__(self, bits: int = 64) -> None:
        self.native = NativeHost.instance()
        self.report = Report()
        self._guest: TranslatedGuest | None = None
        self._age = 0
        self.generator = Generator(self.guest().features, bits)
        self._started = time.monotonic()

    def guest(self) -> TranslatedGuest:
        """The guest for the next case."""
        if self._guest is None or self._age >= _RENEW:
            self.close()
            self._guest = TranslatedGuest()
            self._age = 0
        self._age += 1
        return self._guest

    def close(self) -> None:
        """Give host resources back."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None
            asm.cache_clear()
            fragment.cache_clear()

    def compare(self, case: Case) -> list[str]:
        """Run on both sides; lines that tell the differences.  Raises Skipped."""
        expected = self.native.run(case)
        self.report.faults[expected.vector] += 1
        try:
            found = self.guest().run(case)
        except Skipped:
            raise
        except Exception as problem:  # the translator's own failure is a difference too
            self.close()
            return [f"  translated: {type(problem).__name__}: {problem}"]
        return differences(case, expected, found)

    def shrink(self, case: Case) -> Case:
        """Leave out instructions as long as there is a difference."""
        end = len(case.items)
        while end > 0:
            start = end - 1
            while start and case.items[start - 1].keep:
                start -= 1
            smaller = case
            for at in range(end - 1, start - 1, -1):
                smaller = _without(smaller, at)
            try:
                if smaller.items and self.compare(smaller):
                    case = smaller
            except (Skipped, ValueError):
                pass
            end = start
        return case

    def try_one(self, seed: str) -> None:
        """Try the case of a seed; what comes of it goes into the report."""
        case = self.generator.case(seed)
        report = self.report
        report.cases += 1
        report.instructions += len(case.items)
        report.codes.update(item.instruction.code for item in case.items)
        try:
            if self.compare(case):
                case = self.shrink(case)
                report.differences.append(Difference(seed, case, self.compare(case)))
        except Skipped as skipped:
            report.skipped[str(skipped).split()[0]] += 1
        report.seconds = time.monotonic() - self._started


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


def _without(case: Case, number: int) -> Case:
    """The case less one instruction."""
    items = [
        Item(
            item.instruction.copy(),
            item.target if item.target is None or item.target <= number else item.target - 1,
            item.prefix,
            item.keep,
        )
        for at, item in enumerate(case.items)
        if at != number
    ]
    pokes = [(address, n if n <= number else n - 1) for address, n in case.pokes]
    return replace(case, items=items, pokes=pokes)
