"""System kernels: single operations of the processor in a kernel of our own, and processes in Linux, beside TCG."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.boot import qemu_command
from bench.guests.fork import FORKS, fork_initramfs
from bench.guests.system_kernels import OPERATIONS, system_image
from bench.machines import PARAVIRTUAL, TCG, TRIVISOR, have_qemu, run_image
from bench.process import Failed, output_to_line
from bench.records import Comparison, Record, parse
from trivisor.guests.debian import default_guest
from trivisor.guests.initramfs import console_command_line

FORK = "fork"
"""The kernel that needs Linux."""
OPERATIONS_EACH = OPERATIONS | {FORK: FORKS}
NAMES = tuple(OPERATIONS_EACH)
_LIMIT_SECONDS = 240.0
_RECORD = re.compile(r"^fork: ([0-9a-f ]+)$", re.MULTILINE)


def run_system(runs: int, names: Sequence[str], said: Callable[[str], None], *, qemu: bool = True) -> Comparison:
    """Run the kernels `runs` times under trivisor and TCG, in turn; raises `process.Failed` and GuestUnavailable."""
    comparison = Comparison(tuple(names))
    machines = [TRIVISOR, TCG] if qemu and have_qemu() else [TRIVISOR]
    if FORK in names:
        machines += PARAVIRTUAL
    own = [name for name in names if name != FORK]
    with tempfile.TemporaryDirectory(prefix="trivisor-bench-") as directory:
        image, initramfs = Path(directory, "kernels.elf"), Path(directory, "initramfs.cpio")
        image.write_bytes(system_image(own) if own else b"")
        initramfs.write_bytes(fork_initramfs())
        for number in range(1, runs + 1):
            for machine in machines:
                records: dict[str, Record | None] = {}
                if machine in PARAVIRTUAL:
                    records = dict.fromkeys(own)  # they are of a kernel that knows no Xen
                elif own:
                    said(f"system kernels, {number} of {runs}: {machine}")
                    records = parse(run_image(machine, image, comparison.statistics), own, machine)
                if FORK in names:
                    said(f"processes in Linux, {number} of {runs}: {machine}")
                    records |= _run_linux(machine, initramfs, said)
                comparison.add(machine, records)
    return comparison


def _run_linux(machine: str, initramfs: Path, said: Callable[[str], None]) -> dict[str, Record | None]:
    """Boot the default guest's kernel with an /init that forks."""
    guest = default_guest(lambda what, part: said(what))
    if machine == TCG:
        command = qemu_command(guest.kernel, initramfs)
    else:
        command = [
            sys.executable, "-m", "trivisor", "run", str(guest.kernel),
            *PARAVIRTUAL.get(machine, ("--technique", "translation")),
            "--initrd", str(initramfs),
            "--append", console_command_line("hvc0" if machine in PARAVIRTUAL else "ttyS0"),
        ]  # fmt: skip
    output = output_to_line(command, b"fork: done", limit=_LIMIT_SECONDS, end_with=signal.SIGTERM)
    found = _RECORD.search(output.decode(errors="replace").replace("\r", ""))
    if found is None:
        raise Failed(f"{machine} ran the forking /init but printed no record")
    return parse(found[1], [FORK], machine)
