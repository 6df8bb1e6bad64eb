"""Boot to userspace: the default guest under trivisor and under QEMU's TCG, turn by turn."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.machines import PARAVIRTUAL, QEMU, have_qemu
from bench.process import Failed, Timing, time_to_line
from trivisor.guests.debian import default_guest
from trivisor.guests.initramfs import console_command_line, default_initramfs
from trivisor.machine.user_cache import user_cache

FIRST_LINE = b"trivisor: userspace after"
"""What the guest's /init says first."""
ANSWER = b"restored"
"""What the command in a restored guest says."""
MEMORY_MIB = 512
_LIMIT_SECONDS = 300.0


@dataclass(slots=True)
class Boots:
    """The timings, in the order in which they were taken; `qemu` is empty where there is no QEMU."""

    trivisor: list[Timing] = field(default_factory=list)
    qemu: list[Timing] = field(default_factory=list)
    statistics: list[dict[str, Any]] = field(default_factory=list)
    """trivisor's own, of each of its boots up to there."""
    kept: list[Timing] = field(default_factory=list)
    """trivisor's with the translations that a boot before them has kept."""
    restored: list[Timing] = field(default_factory=list)
    """No boot: from the start of the process to the first output of a command in a restored guest."""

    paravirtual: dict[str, list[Timing]] = field(default_factory=dict)
    """Likewise, of the same kernel by its Xen entry, by the name that `machines.PARAVIRTUAL` has for the way."""

    def paravirtual_ratio(self, name: str) -> float | None:
        """The median of the ratios of a paravirtualised boot's processor time to full translation's, pair by pair."""
        ratios = [one.cpu / full.cpu for one, full in zip(self.paravirtual[name], self.kept, strict=False)]
        return median(ratios) if ratios else None

    @property
    def kept_ratio(self) -> float | None:
        """The median of the ratios of those to QEMU's, pair by pair."""
        ratios = [ours.wall / theirs.wall for ours, theirs in zip(self.kept, self.qemu, strict=False)]
        return median(ratios) if ratios else None

    @property
    def ratios(self) -> list[float]:
        """trivisor's time over QEMU's, pair by pair."""
        return [ours.wall / theirs.wall for ours, theirs in zip(self.trivisor, self.qemu, strict=False)]

    @property
    def ratio(self) -> float | None:
        """The median of the pairs' ratios."""
        return median(self.ratios) if self.ratios else None


def run_boots(
    runs: int, said: Callable[[str], None], *, qemu: bool = True, technique: str = "translation"
) -> Boots:
    """Boot `runs` times under each, in turn; `said` is told what is being done.  Raises `process.Failed`."""
    boots = Boots()
    guest = default_guest(lambda what, part: said(what))
    with tempfile.TemporaryDirectory(prefix="trivisor-bench-") as directory:
        # What `trivisor run` without a terminal gives its guest.
        initrd = Path(directory, "initramfs.cpio")
        initrd.write_bytes(default_initramfs(guest.busybox.read_bytes()))
        statistics = Path(directory, "statistics.json")
        keeping = [
            "env", f"XDG_CACHE_HOME={cache_of_its_own(Path(directory, 'cache'))}",
            sys.executable, "-m", "trivisor", "run", "--technique", technique,
            "--memory", f"{MEMORY_MIB}M", "--stats-json", str(statistics),
        ]  # fmt: skip
        ours = [*keeping, "--no-keep"]
        theirs = qemu_command(guest.kernel, initrd) if qemu and have_qemu() else None
        said("a boot under trivisor whose translations are kept")
        time_to_line(keeping, FIRST_LINE, limit=_LIMIT_SECONDS, end_with=signal.SIGTERM)
        restoring = _restoring(keeping, Path(directory, "snapshot"), said)
        for name, options in PARAVIRTUAL.items():
            said(f"a boot by {name} whose translations are kept")
            time_to_line([*keeping, *options], FIRST_LINE, limit=_LIMIT_SECONDS, end_with=signal.SIGTERM)
        for number in range(1, runs + 1):
            said(f"restore {number} of {runs}")
            boots.restored.append(time_to_line(restoring, ANSWER, limit=_LIMIT_SECONDS))
            said(f"boot {number} of {runs} under trivisor, translations kept")
            boots.kept.append(time_to_line(keeping, FIRST_LINE, limit=_LIMIT_SECONDS, end_with=signal.SIGTERM))
            for name, options in PARAVIRTUAL.items():
                said(f"boot {number} of {runs} by {name}, translations kept")
                timing = time_to_line([*keeping, *options], FIRST_LINE, limit=_LIMIT_SECONDS, end_with=signal.SIGTERM)
                boots.paravirtual.setdefault(name, []).append(timing)
            said(f"boot {number} of {runs} under trivisor")
            boots.trivisor.append(time_to_line(ours, FIRST_LINE, limit=_LIMIT_SECONDS, end_with=signal.SIGTERM))
            boots.statistics.append(json.loads(statistics.read_text()))
            if theirs is not None:
                said(f"boot {number} of {runs} under QEMU")
                boots.qemu.append(time_to_line(theirs, FIRST_LINE, limit=_LIMIT_SECONDS))
    return boots


def _restoring(keeping: list[str], snapshot: Path, said: Callable[[str], None]) -> list[str]:
    """The command that restores the booted guest, which is put into `snapshot` here, for a command in it."""
    said("a snapshot")
    made = subprocess.run(
        [*keeping, "--snapshot", str(snapshot)], stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_SECONDS
    )
    if made.returncode:
        raise Failed(f"no snapshot: {made.stderr.decode(errors='replace').strip()}")
    environment = keeping[: keeping.index("run") + 1]
    restoring = [*environment, "--restore", str(snapshot), "--", "echo", ANSWER.decode()]
    time_to_line(restoring, ANSWER, limit=_LIMIT_SECONDS, end_with=signal.SIGTERM)  # it keeps what it has translated
    return restoring


def cache_of_its_own(directory: Path) -> Path:
    """A cache directory with the default guest in it and nothing else."""
    (directory / "trivisor").mkdir(parents=True)
    (directory / "trivisor" / "debian").symlink_to(user_cache() / "debian")
    return directory


def qemu_command(kernel: Path, initrd: Path) -> list[str]:
    """QEMU on the same guest; without the devices that it would add and that trivisor's board has not."""
    return [
        QEMU, "-accel", "tcg", "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-serial", "stdio",
        "-no-reboot", "-kernel", str(kernel), "-initrd", str(initrd), "-append", console_command_line(),
    ]  # fmt: skip
