"""Running one entry: under trivisor, and under QEMU's TCG for comparison."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import NamedTemporaryFile

from trivisor.insight.unit_tests.entries import Entry
from trivisor.monitor.outcome import StopReason
from trivisor.monitor.virtual_machine import VirtualMachine

QEMU = "qemu-system-x86_64"
_MEMORY = "128M"
_STATUS_PASS, _STATUS_SKIP = 0, 77 >> 1
"""What the suite's `exit` is called with (lib/report.c)."""


_ON_BARE_METAL = frozenset({"apic.flat"})
"""Kernels that take a test device for a sign of KVM and make its hypercalls, unless told that there is none."""


class Verdict(StrEnum):
    """How an entry went."""

    PASS = "pass"
    FAIL = "FAIL"
    SKIP = "skip"
    TIMEOUT = "TIMEOUT"
    CRASH = "CRASH"
    UNSUPPORTED = "UNSUPPORTED"


@dataclass(frozen=True, slots=True)
class Result:
    """A verdict, a line that explains it, and all that was printed."""

    verdict: Verdict
    detail: str = ""
    log: str = ""


def not_for_us(entry: Entry) -> str:
    """Why an entry is for none of the two to run; empty when it is."""
    if entry.architecture not in ("", "x86_64"):
        return f"{entry.architecture} only"
    if entry.accelerator:
        return f"{entry.accelerator} only"
    if "/kvm" in entry.check:
        return "needs an option of the host's KVM"
    if not entry.kernel.exists():
        return f"{entry.kernel.name} is not built"
    return ""


@contextmanager
def environment(entry: Entry) -> Iterator[list[Path]]:
    """The file of environment variables that the entry is to have as its module, if any."""
    if entry.kernel.name not in _ON_BARE_METAL:
        yield []
        return
    with NamedTemporaryFile("w", suffix=".env") as file:
        file.write("TEST_DEVICE=0\n")
        file.flush()
        yield [Path(file.name)]


def run_trivisor(entry: Entry, timeout: float) -> Result:
    """Under binary translation, with the one processor that it has."""
    with environment(entry) as modules:
        try:
            machine = VirtualMachine(
                entry.kernel,
                append=entry.arguments,
                memory=entry.qemu_option("-m").upper() or _MEMORY,
                technique="translation",
                modules=modules,
                devices=["pc-testdev"],
                keep_translations=False,
                cpu=entry.features,
                no_reboot=True,
            )
        except ValueError as error:
            return Result(Verdict.SKIP, str(error))
    with machine:
        outcome = machine.run(timeout)
        log = machine.output.decode(errors="replace")
    if outcome.reason is StopReason.DEBUG_EXIT:
        assert outcome.guest_status is not None
        return verdict_of(outcome.guest_status >> 1, log)
    verdict = {StopReason.TIMEOUT: Verdict.TIMEOUT, StopReason.UNSUPPORTED: Verdict.UNSUPPORTED}.get(
        outcome.reason, Verdict.CRASH
    )
    return Result(verdict, outcome.message, log + outcome.dump)


def run_qemu(entry: Entry, timeout: float) -> Result:
    """Under QEMU's own translator, with as many processors as the entry asks for."""
    command = [
        QEMU, "--no-reboot", "-nodefaults", "-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-display", "none", "-serial", "stdio", "-device", "pci-testdev", "-machine", "accel=tcg",
        "-kernel", str(entry.kernel), "-smp", str(entry.processors),
    ]  # fmt: skip
    if entry.arguments:
        command += ["-append", entry.arguments]
    command += [word for word in entry.qemu if word != "-enable-kvm"]
    try:
        with environment(entry) as modules:
            command += [word for module in modules for word in ("-initrd", str(module))]
            done = subprocess.run(
                command, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL, text=True, errors="replace"
            )
    except subprocess.TimeoutExpired as late:
        printed = late.stdout if isinstance(late.stdout, bytes) else b""
        return Result(Verdict.TIMEOUT, f"{timeout:g} s", printed.decode(errors="replace"))
    log = done.stdout + done.stderr
    if not done.stdout:  # its own errors end it with the status that stands for success
        lines = [line for line in done.stderr.splitlines() if "warning" not in line]
        return Result(Verdict.SKIP, lines[-1] if lines else f"status {done.returncode}", log)
    if done.returncode & 1 and done.returncode > 0:
        return verdict_of(done.returncode >> 1, log)
    return Result(Verdict.CRASH, f"status {done.returncode}", log)


def verdict_of(status: int, log: str) -> Result:
    """What the number says that a kernel ended with, and its own summary."""
    summary = re.findall(r"^SUMMARY: (.*?)\r?$", log, re.MULTILINE)
    detail = summary[-1] if summary else ""
    verdict = {_STATUS_PASS: Verdict.PASS, _STATUS_SKIP: Verdict.SKIP}.get(status, Verdict.FAIL)
    if verdict is Verdict.FAIL and not summary:
        detail = f"status {status}"
    return Result(verdict, detail, log)


def keep_log(directory: Path, entry: Entry, peer: str, result: Result) -> None:
    """Write what an entry printed to a file of its own."""
    (directory / f"{entry.name}.{peer}.log").write_text(f"{result.log}\n{result.verdict} {result.detail}\n")
