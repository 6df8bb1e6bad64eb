"""The table from the command line: `python -m trivisor.insight.unit_tests PATH`."""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trivisor.insight.unit_tests.entries import Entry, read_entries
from trivisor.insight.unit_tests.runs import QEMU, Result, Verdict, keep_log, not_for_us, run_qemu, run_trivisor

_STYLES = {Verdict.PASS: "green", Verdict.SKIP: "dim"}


def main() -> int:
    """Run the entries and print the table; the exit status is 1 when trivisor fails one."""
    arguments = _arguments()
    try:
        entries = read_entries(arguments.build)
    except OSError as error:
        print(f"no build of kvm-unit-tests: {error}", file=sys.stderr)
        return 2
    chosen = [entry for entry in entries if _is_chosen(entry, arguments.entries)]
    if not chosen:
        print("no entry of that name", file=sys.stderr)
        return 2
    gc.set_threshold(100_000, 50, 1_000)
    peers = {} if arguments.no_trivisor else {"trivisor": run_trivisor}
    if arguments.qemu and shutil.which(QEMU):
        peers["QEMU TCG"] = run_qemu
    table = Table("entry", "processors", *peers, title=f"kvm-unit-tests, {len(chosen)} entries")
    counts: dict[str, Counter[Verdict]] = {peer: Counter() for peer in peers}
    progress = Console(stderr=True)
    for entry in chosen:
        cells = []
        why = not_for_us(entry)
        for peer, run in peers.items():
            progress.print(f"{entry.name}: {peer}", highlight=False)
            result = Result(Verdict.SKIP, why) if why else run(entry, arguments.timeout or entry.timeout)
            counts[peer][result.verdict] += 1
            cells.append(_cell(result))
            if arguments.logs:
                arguments.logs.mkdir(parents=True, exist_ok=True)
                keep_log(arguments.logs, entry, peer.split()[0].lower(), result)
        table.add_row(entry.name, str(entry.processors), *cells)
    console = Console(width=arguments.width)
    console.print(table)
    for peer, count in counts.items():
        console.print(f"{peer}: " + ", ".join(f"{number} {verdict}" for verdict, number in count.most_common()))
    failed = {Verdict.FAIL, Verdict.CRASH, Verdict.TIMEOUT, Verdict.UNSUPPORTED}
    return 1 if failed & set(counts.get("trivisor", ())) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trivisor.insight.unit_tests",
        description="Run the entries of a kvm-unit-tests build (made for x86_64) and print a table.",
    )
    parser.add_argument("build", type=Path, help="the directory that kvm-unit-tests was built in")
    parser.add_argument("entries", nargs="*", help="names of entries or of groups (default: all)")
    parser.add_argument("--qemu", action="store_true", help=f"the same under {QEMU} -accel tcg")
    parser.add_argument("--no-trivisor", action="store_true", help="only under QEMU")
    parser.add_argument("--timeout", type=float, help="seconds an entry, instead of its own")
    parser.add_argument("--logs", type=Path, metavar="DIRECTORY", help="keep what the entries print there")
    parser.add_argument("--width", type=int, help="of the table, in characters")
    return parser.parse_args()


def _is_chosen(entry: Entry, names: list[str]) -> bool:
    return not names or entry.name in names or not set(names).isdisjoint(entry.groups)


def _cell(result: Result) -> str:
    style = _STYLES.get(result.verdict, "red")
    return f"[{style}]{result.verdict}[/] {result.detail}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
