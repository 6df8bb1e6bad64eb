"""`python -m bench`: compute kernels, system kernels, boots and Xen guests against QEMU's TCG; see README.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import kernel_report, paravirt, paravirt_report, report, system
from bench.boot import run_boots
from bench.compute import run_compute
from bench.exits import print_exits, run_exits
from bench.guests.kernels import NAMES
from bench.process import Failed
from trivisor.guests.debian import GuestUnavailable

_STARTS = 10


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and maybe write; the exit status is 0 unless something could not be measured."""
    arguments = _parse(words)
    measured: dict[str, Any] = {"host": report.host_as_json()}
    console, progress = Console(), Console(stderr=True)
    try:
        for part in arguments.parts:
            with progress.status(part) as status:
                show, measured[part] = _PARTS[part](arguments, status.update)
            show(console)
            console.print()
    except (Failed, GuestUnavailable) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(_PARTS)} (default: all)")
    parser.add_argument("--runs", type=_positive, help="runs under each machine (default 5; paravirt 3)")
    parser.add_argument("--only", action="append", metavar="NAME", help="this kernel alone; may be repeated")
    parser.add_argument("--skip-qemu", action="store_true", help="do not run QEMU")
    techniques = ["translation", "hardware", "paravirt"]
    parser.add_argument("--technique", choices=techniques, default="translation", help="of the boots (translation)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured as JSON")
    arguments = parser.parse_args(words)
    unknown = [part for part in arguments.parts if part not in _PARTS]
    unknown += [name for name in arguments.only or () if name not in (*NAMES, *system.NAMES)]
    if unknown:
        parser.error(f"there is no {unknown[0]}")
    if arguments.only and not arguments.parts:
        kernels = {"compute": NAMES, "system": system.NAMES}
        arguments.parts = [part for part, names in kernels.items() if not set(names).isdisjoint(arguments.only)]
    arguments.parts = arguments.parts or list(_PARTS)
    arguments.xen_runs = arguments.runs or 3  # direct execution boots slowly where ring 0 is emulated
    arguments.runs = arguments.runs or 5
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not more than 0")
    return number


Said = Callable[[str], None]
Shown = tuple[Callable[[Console], None], Any]
"""What prints it, and it for the JSON file."""


def _compute(arguments: argparse.Namespace, said: Said) -> Shown:
    names = [name for name in NAMES if arguments.only is None or name in arguments.only]
    found = run_compute(arguments.runs, names, said, qemu=not arguments.skip_qemu)
    return lambda console: kernel_report.print_compute(console, found), found.as_json()


def _system(arguments: argparse.Namespace, said: Said) -> Shown:
    names = [name for name in system.NAMES if arguments.only is None or name in arguments.only]
    found = system.run_system(arguments.runs, names, said, qemu=not arguments.skip_qemu)
    return lambda console: kernel_report.print_system(console, found, system.OPERATIONS_EACH), found.as_json()


def _boot(arguments: argparse.Namespace, said: Said) -> Shown:
    start = time_starts(_STARTS)
    boots = run_boots(arguments.runs, said, qemu=not arguments.skip_qemu, technique=arguments.technique)

    def show(console: Console) -> None:
        report.print_boots(console, boots)
        console.print()
        report.print_start(console, start)
        console.print()
        report.print_statistics(console, boots.statistics)

    return show, report.boots_as_json(boots, start)


def _exits(arguments: argparse.Namespace, said: Said) -> Shown:
    found = run_exits(arguments.runs, said)
    return lambda console: print_exits(console, found), found.as_json()


def _paravirt(arguments: argparse.Namespace, said: Said) -> Shown:
    found = paravirt.run_paravirt(arguments.xen_runs, said, qemu=not arguments.skip_qemu)
    return lambda console: paravirt_report.print_paravirt(console, found), paravirt_report.as_json(found)


_PARTS = {"compute": _compute, "system": _system, "exits": _exits, "boot": _boot, "paravirt": _paravirt}


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
