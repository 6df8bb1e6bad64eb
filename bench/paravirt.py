"""Paravirtualization: one Linux program under full translation, as a Xen guest under both engines, and under TCG.

The program is the guest's /init: its first line is the end of the boot, and what it prints then are records of the
compute kernels, as user space runs them, and of Linux's own work for a program.
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.boot import MEMORY_MIB, cache_of_its_own, qemu_command
from bench.guests.fork import initramfs_of
from bench.guests.user_space import ALL_NAMES, FIRST, LAST, user_space_program
from bench.machines import DIRECT, LINUX, NATIVE, TCG, have_qemu, run_to_end
from bench.process import Timing, time_and_output
from bench.records import Comparison, Record, parse
from trivisor.guests.debian import default_guest
from trivisor.guests.initramfs import console_command_line
from trivisor.hardware.kvm.probe import probe
from trivisor.hardware.kvm.system import KvmUnavailable

_LIMIT_SECONDS = 240.0
_RECORD = re.compile(r"^record: ([0-9a-f ]+)$", re.MULTILINE)


@dataclass(slots=True)
class Paravirtual:
    """What the program did on each machine, turn by turn."""

    kernels: Comparison = field(default_factory=lambda: Comparison(ALL_NAMES))
    boots: dict[str, list[Timing]] = field(default_factory=dict)
    """To the program's first line; with translations that an earlier boot has kept."""
    without_direct: str = ""
    """Why there is no direct execution here."""

    def boot_ratio(self, machine: str, other: str, what: str) -> float | None:
        """The time of one boot over another's, pair by pair: the median; `what` is "wall" or "cpu"."""
        pairs = zip(self.boots.get(machine, ()), self.boots.get(other, ()), strict=False)
        ratios = [getattr(one, what) / getattr(another, what) for one, another in pairs if getattr(another, what)]
        return median(ratios) if ratios else None


def run_paravirt(runs: int, said: Callable[[str], None], *, qemu: bool = True) -> Paravirtual:
    """Run the program `runs` times on each machine that there is, in turn; raises `Failed` and GuestUnavailable."""
    found = Paravirtual()
    guest = default_guest(lambda what, part: said(what))
    machines = dict(LINUX)
    try:
        probe()
    except KvmUnavailable as error:
        found.without_direct = str(error)
        del machines[DIRECT]
    with tempfile.TemporaryDirectory(prefix="trivisor-bench-") as directory:
        program, initramfs = Path(directory, "program"), Path(directory, "initramfs.cpio")
        program.write_bytes(user_space_program())
        program.chmod(0o755)
        initramfs.write_bytes(initramfs_of(program.read_bytes()))
        cache = cache_of_its_own(Path(directory, "cache"))
        commands = {name: _trivisor(name, guest.kernel, initramfs, cache) for name in machines}
        for name in commands:
            if name != DIRECT:
                said(f"the program under {name}, for its translations to be kept")
                _run(commands[name])
        if qemu and have_qemu():
            commands[TCG] = [*qemu_command(guest.kernel, initramfs), "-cpu", "max"]
        for number in range(1, runs + 1):
            for name, command in commands.items():
                said(f"Linux and its user space, {number} of {runs}: {name}")
                timing, output = _run(command)
                found.boots.setdefault(name, []).append(timing)
                found.kernels.add(name, _records(output, name))
            said(f"user space, {number} of {runs}: {NATIVE}")
            found.kernels.add(NATIVE, _records(run_to_end([str(program)], NATIVE), NATIVE))
    return found


def _trivisor(name: str, kernel: Path, initramfs: Path, cache: Path) -> list[str]:
    return [
        "env", f"XDG_CACHE_HOME={cache}",
        sys.executable, "-m", "trivisor", "run", str(kernel), *LINUX[name],
        "--memory", f"{MEMORY_MIB}M", "--initrd", str(initramfs),
        "--append", console_command_line(
            "ttyS0" if name == "translation" else "hvc0", crossings_are_dear=name == DIRECT
        ),
    ]  # fmt: skip


def _run(command: Sequence[str]) -> tuple[Timing, str]:
    timing, output = time_and_output(command, FIRST, LAST, limit=_LIMIT_SECONDS, end_with=signal.SIGTERM)
    return timing, output.decode(errors="replace").replace("\r", "")


def _records(output: str, who: str) -> dict[str, Record | None]:
    return parse("\n".join(_RECORD.findall(output)), ALL_NAMES, who)
