"""`python -m bench`: boot to userspace against QEMU's TCG, the command's start, the translator."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from bench import report
from bench.boot import run_boots
from bench.process import Failed
from trivisor.guests.debian import GuestUnavailable

_STARTS = 10


def main() -> int:
    """Measure, print and maybe write; the exit status is 0 unless something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--runs", type=_positive, default=5, help="boots under each (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured as JSON")
    arguments = parser.parse_args()
    progress = Console(stderr=True)
    try:
        with progress.status("trivisor --help") as status:
            start = time_starts(_STARTS)
            boots = run_boots(arguments.runs, status.update)
    except (Failed, GuestUnavailable) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    console = Console()
    report.print_boots(console, boots)
    console.print()
    report.print_start(console, start)
    console.print()
    report.print_statistics(console, boots.statistics)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.as_json(boots, start), indent=1) + "\n")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not more than 0")
    return number


def time_starts(count: int) -> list[float]:
    """Seconds that `trivisor --help` takes, `count` times."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "trivisor", "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
