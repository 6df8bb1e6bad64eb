"""Compute kernels: the same machine code under trivisor, under QEMU's TCG, on the host itself and in Unicorn."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.guests.kernels import program
from bench.hosted import have_unicorn
from bench.machines import NATIVE, TCG, TRIVISOR, UNICORN, have_qemu, run_image, run_to_end
from bench.records import Comparison, parse


def run_compute(runs: int, names: Sequence[str], said: Callable[[str], None], *, qemu: bool = True) -> Comparison:
    """Run the kernels `runs` times on each machine that there is, in turn.

    `said` is told what is being done.  Raises `process.Failed`, also when checksums differ.
    """
    comparison = Comparison(tuple(names))
    machines = [TRIVISOR]
    if qemu and have_qemu():
        machines.append(TCG)
    machines.append(NATIVE)
    if have_unicorn():
        machines.append(UNICORN)
    with tempfile.TemporaryDirectory(prefix="trivisor-bench-") as directory:
        image = Path(directory, "kernels.elf")
        image.write_bytes(program(names).image())
        for number in range(1, runs + 1):
            for machine in machines:
                said(f"compute kernels, {number} of {runs}: {machine}")
                if machine in (NATIVE, UNICORN):
                    hosted = [sys.executable, "-m", "bench.hosted", machine.lower(), *names]
                    output = run_to_end(hosted, machine)
                else:
                    output = run_image(machine, image, comparison.statistics)
                comparison.add(machine, parse(output, names, machine))
    return comparison
