"""The benchmark's own machinery, over processes that print at once or never."""

from __future__ import annotations

import io
import json
import signal
import sys
import time

import pytest
from rich.console import Console

from bench import report
from bench.boot import Boots, qemu_command
from bench.process import Failed, Timing, time_to_line
from bench.verdict import print_memory, print_restored


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_the_time_is_that_to_the_line_not_to_the_end() -> None:
    started = time.monotonic()
    timing = time_to_line(
        script("import time; time.sleep(.1); print('here it is', flush=True); time.sleep(60)"), b"here it", limit=20
    )
    assert 0.1 <= timing.wall < 10
    assert 0 < timing.cpu < timing.wall
    assert time.monotonic() - started < 10


def test_a_gentle_end_lets_the_process_finish(tmp_path) -> None:
    file = tmp_path / "ended"
    body = f"""
import signal, sys, time
def end(*_): open({str(file)!r}, "w").close(); print("x" * 200000); sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
    time_to_line(script(body), b"ready", limit=20, end_with=signal.SIGTERM)
    assert file.exists()


@pytest.mark.parametrize("text", ["print('something else')", "import time; time.sleep(60)"])
def test_a_process_that_never_prints_it_is_a_failure(text: str) -> None:
    with pytest.raises(Failed, match="did not print 'here'"):
        time_to_line(script(text), b"here", limit=0.5)


def boots(*pairs: tuple[float, float]) -> Boots:
    statistics = [
        {"seconds": {"translating": 2.0, "idle": 0.5}, "translation": {"instructions": 100_000}, "exits": {"poll": 7}}
    ]
    return Boots([Timing(a, a) for a, _ in pairs], [Timing(b, b) for _, b in pairs if b], statistics)


def shown(found: Boots) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100)
    report.print_boots(console, found)
    report.print_start(console, [0.1, 0.2, 0.4])
    report.print_statistics(console, found.statistics)
    return out.getvalue()


def test_ratios_are_pair_by_pair_and_their_median_is_the_figure() -> None:
    found = boots((4, 1), (6, 2), (20, 2))
    assert found.ratios == [4, 3, 10]
    assert found.ratio == 4
    text = shown(found)
    assert "median      6.00   6.00      2.00   2.00   4.00" in text
    assert "us an instruction    20.00" in text


def test_without_qemu_one_line_says_so_and_our_own_numbers_stand() -> None:
    text = shown(boots((4, 0), (6, 0)))
    assert "qemu-system-x86_64 is not installed here: nothing to compare with.\n" in text
    assert "median      5.00" in text


def test_the_worst_run_says_whether_memory_is_within_bounds() -> None:
    def said(*beside: int) -> str:
        out = io.StringIO()
        runs = [{"MiB of host memory": {"guest RAM": 100, "all else, at most": one}} for one in beside]
        print_memory(Console(file=out, width=100), [*runs, {}])
        return out.getvalue()

    assert said(349, 350, 1).endswith("100 MiB of guest RAM, 350 MiB beside it (must be at most 350): met\n")
    assert said(349, 351, 1).endswith("not met\n")
    assert said() == ""


def test_the_json_holds_all_of_it() -> None:
    found = json.loads(json.dumps(report.boots_as_json(boots((4, 1), (6, 2)), [0.1])))
    assert found["median"] == {"trivisor": 5, "qemu": 1.5, "ratio": 3.5}
    assert found["trivisor"][0] == {"wall": 4, "cpu": 4}
    assert found["translator"]["microseconds an instruction"] == 20


def test_qemu_gets_the_same_guest(tmp_path) -> None:
    command = qemu_command(tmp_path / "vmlinuz", tmp_path / "initrd")
    assert command[command.index("-accel") + 1] == "tcg"
    assert command[command.index("-m") + 1] == "512"
    assert command[command.index("-append") + 1] == "console=ttyS0 panic=-1"


def test_the_verdict_on_restored_guests() -> None:
    for seconds, says in (([0.4, 0.6, 0.45], "0.45 s (median) (must be at most 0.5): met"), ([0.6], "not met"), ([], "")):
        out = io.StringIO()
        print_restored(Console(file=out, width=120), seconds)
        assert says in out.getvalue()
        assert bool(out.getvalue()) == bool(seconds)
