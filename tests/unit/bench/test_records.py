"""What the kernels print, and the comparison of machines by it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.kernel_report import print_compute, print_system
from bench.process import Failed
from bench.records import Comparison, Record, parse


def test_the_first_repetition_is_apart_and_the_quickest_of_the_others_counts() -> None:
    found = parse("1 ab 100 30 20 40 \n2 0 0 0 0 0 \n", ["one", "two"], "somebody")
    assert found == {"one": Record(0xAB, 0x100, 0x20), "two": None}


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ("", "printed 0 records, not 1"),
        ("exception 000000000000000e", "one: 'exception 000000000000000e' is no record"),
        ("1 2 3", "is no record"),
        ("3 2 3 4", "its checksum changed"),
    ],
)
def test_what_is_no_record_is_told(output: str, complaint: str) -> None:
    with pytest.raises(Failed, match=complaint):
        parse(output, ["one"], "somebody")


def compared(**machines: list[tuple[int | None, int | None]]) -> Comparison:
    """Runs of the kernels one and two, by the cycles of their quickest repetition."""
    found = Comparison(("one", "two"))
    for machine, runs in machines.items():
        for cycles in runs:
            records = zip(found.names, cycles, strict=True)
            found.add(machine, {name: None if c is None else Record(7, c + 500, c) for name, c in records})
    return found


def test_ratios_are_of_the_same_run_and_their_median_counts() -> None:
    found = compared(trivisor=[(100, 10), (300, 10), (100, 10)], native=[(50, 10), (100, 5), (100, 2)])
    assert found.ratio("trivisor", "native", "one") == 2
    assert found.ratio("trivisor", "native", "two") == 2
    assert found.cycles("trivisor", "one") == 100
    assert found.warm_up("trivisor", "one") == 500


def test_checksums_must_agree() -> None:
    found = compared(trivisor=[(1, 1)])
    with pytest.raises(Failed, match="two ends in 0x8 under native, in 0x7 under trivisor"):
        found.add("native", {"one": Record(7, 9, 9), "two": Record(8, 9, 9)})


def shown(found: Comparison) -> str:
    out = io.StringIO()
    print_compute(Console(file=out, width=120), found)
    return out.getvalue()


def test_the_verdicts_are_on_the_mean_and_on_the_slowest() -> None:
    text = shown(compared(trivisor=[(100, 100)], TCG=[(1600, 80)], native=[(50, 50)]))
    assert "geometric mean 3.58 times as fast as TCG (must be 2.5): met" in text
    assert "slowest: two, 0.80 times as fast as TCG (must be 0.9): not met" in text
    assert "Unicorn is not installed here (pip install -e '.[bench]')" in text


def test_a_kernel_that_a_machine_cannot_run_is_left_out_of_its_mean() -> None:
    text = shown(compared(trivisor=[(100, 100)], TCG=[(200, None)], native=[(50, 50)]))
    row = next(line for line in text.splitlines() if line.startswith("two"))
    assert row.split()[2:5] == ["2.00", "-", "-"]
    assert "geometric mean 2.00 times as fast" in text


def test_without_qemu_there_is_no_verdict() -> None:
    text = shown(compared(trivisor=[(100, 100)], native=[(50, 50)]))
    assert "There is no QEMU" in text
    assert "must be" not in text


def test_system_kernels_are_told_in_cycles_an_operation() -> None:
    out = io.StringIO()
    found = compared(trivisor=[(1000, 4000)], TCG=[(2000, 1000)])
    print_system(Console(file=out, width=120), found, {"one": 10, "two": 100})
    lines = out.getvalue().splitlines()
    assert lines[2].split() == ["one", "100", "200", "2.00"]
    assert lines[-1] == "slowest: two, 0.25 times as fast as TCG (must be 0.5): not met"
