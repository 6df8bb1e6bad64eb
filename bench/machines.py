"""The machines that a benchmark's kernel runs on, by command: trivisor, QEMU's TCG, and this process's own likes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.process import Failed
from trivisor.guests.test_kernel import STATUS

TRIVISOR, TCG, NATIVE, UNICORN = "trivisor", "TCG", "native", "Unicorn"
PARAVIRTUAL = {"paravirt": ("--technique", "paravirt", "--engine", "translation")}
"""Ways of trivisor's to run a Linux that knows Xen, with their options."""
DIRECT = "direct"
"""A Xen guest whose ring 3 the host's processor runs in a KVM machine."""
LINUX = {
    "translation": ("--technique", "translation"),
    **PARAVIRTUAL,
    DIRECT: ("--technique", "paravirt", "--engine", "direct"),
}
"""All ways of trivisor's to run Debian's kernel that are compared with each other, with their options."""
QEMU = "qemu-system-x86_64"
_MEMORY_MIB = 64
_LIMIT_SECONDS = 240


def have_qemu() -> bool:
    """Whether there is a QEMU to compare with."""
    return shutil.which(QEMU) is not None


def multiboot_command(machine: str, image: Path) -> list[str]:
    """What runs a multiboot kernel, its console on stdout and port 0xf4 the way to end it."""
    if machine == TRIVISOR:
        return [
            sys.executable, "-m", "trivisor", "run", str(image), "--technique", "translation",
            "--memory", f"{_MEMORY_MIB}M",
        ]  # fmt: skip
    return [
        QEMU, "-accel", "tcg", "-cpu", "max", "-m", str(_MEMORY_MIB), "-nodefaults", "-display", "none",
        "-serial", "stdio", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", str(image),
    ]  # fmt: skip


def run_image(machine: str, image: Path, statistics: list[dict[str, Any]]) -> str:
    """Run a multiboot kernel to its end and return what it printed; raises `Failed`.

    trivisor's own counters are added to `statistics`.
    """
    command = multiboot_command(machine, image)
    if machine != TRIVISOR:
        return run_to_end(command, machine, status=STATUS)
    with tempfile.TemporaryDirectory(prefix="trivisor-bench-") as directory:
        written = Path(directory, "statistics.json")
        output = run_to_end([*command, "--stats-json", str(written)], machine, status=STATUS)
        statistics.append(json.loads(written.read_text()))
    return output


def run_to_end(command: Sequence[str], who: str, *, status: int = 0) -> str:
    """Run a command and return its stdout; raises `Failed` if it ends otherwise than with `status`."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{who} took more than {_LIMIT_SECONDS} s") from None
    if done.returncode != status:
        said = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise Failed(f"{who} ended with status {done.returncode}, not {status}: {said}")
    return done.stdout
