"""The hunt from the command line."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from trivisor.insight.differential.hunt import Hunt


def main() -> int:
    """Hunt, print differences as they come and a summary; the exit status is 1 when there were any."""
    parser = argparse.ArgumentParser(
        prog="python -m trivisor.insight.differential",
        description="Compare translated code with the host processor, on random instructions.",
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--bits", type=int, choices=(16, 32, 64), default=64)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=None, help="cases (default 3000, or as the minutes allow)")
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--stop-after", type=int, default=20, help="differences (default 20)")
    arguments = parser.parse_args()
    if arguments.count is None and arguments.minutes is None:
        arguments.count = 3000
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # the summary of what was done is printed all the same
    hunt = Hunt(arguments.bits)
    report = hunt.report
    number, shown = arguments.first, 0
    try:
        while arguments.count is None or number < arguments.first + arguments.count:
            hunt.try_one(f"{arguments.seed}:{number}")
            number += 1
            for difference in report.differences[shown:]:
                print(difference, flush=True)
            shown = len(report.differences)
            if shown >= arguments.stop_after:
                break
            if arguments.minutes is not None and report.seconds > 60 * arguments.minutes:
                break
    except KeyboardInterrupt:
        pass
    hunt.close()
    print(report)
    for what, times in report.skipped.most_common(10):
        print(f"  not supported: {what} ({times})")
    return 1 if report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
