"""Timing a process from its start to a line of its output."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class Failed(Exception):
    """A process did not get to where it was to be timed; the message is one line."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from the start to the line: by the clock, and of processor time (user and system, to the end)."""

    wall: float
    cpu: float


def time_to_line(command: Sequence[str], line: bytes, *, limit: float, end_with: int = signal.SIGKILL) -> Timing:
    """Start `command`, wait until `line` stands in its output, and end it with the signal `end_with`.

    Raises `Failed` when it ends before that or takes more than `limit` seconds.
    """
    wall, cpu, _ = _run(command, line, limit, end_with)
    return Timing(wall, cpu)


def output_to_line(command: Sequence[str], line: bytes, *, limit: float, end_with: int = signal.SIGKILL) -> bytes:
    """What `time_to_line` reads up to the line."""
    return _run(command, line, limit, end_with)[2]


def time_and_output(
    command: Sequence[str], first: bytes, last: bytes, *, limit: float, end_with: int = signal.SIGKILL
) -> tuple[Timing, bytes]:
    """The times up to the line `first`, and what was printed up to the line `last`; otherwise like `time_to_line`."""
    marks: list[Timing] = []
    output = _run(command, last, limit, end_with, first, marks)[2]
    return marks[0], output


def _run(
    command: Sequence[str],
    line: bytes,
    limit: float,
    end_with: int,
    first: bytes = b"",
    marks: list[Timing] | None = None,
) -> tuple[float, float, bytes]:
    """Run it to the line: seconds by the clock, seconds of processor time, and the output.

    With `marks` the times at the line `first`, which comes before, are added to them.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    try:
        output = bytearray()
        if marks is not None:
            _read_until(process.stdout.fileno(), first, started + limit, output)
            marks.append(Timing(time.perf_counter() - started, _processor_time(process.pid)))
        _read_until(process.stdout.fileno(), line, started + limit, output)
        wall = time.perf_counter() - started
        os.kill(process.pid, end_with)  # not send_signal, which may reap it
        cpu = _reap(process)
    finally:
        process.stdout.close()
        if process.returncode is None:
            process.kill()
            process.wait()
    if line not in output:
        last = output.decode(errors="replace").strip().rpartition("\n")[2]
        raise Failed(f"{command[0]} did not print {line.decode()!r} within {limit:g} s; its last line: {last!r}")
    return wall, cpu, bytes(output)


def _processor_time(pid: int) -> float:
    """Seconds of user and system time that a process has taken, in steps of clock ticks (proc(5), /proc/pid/stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read_until(descriptor: int, line: bytes, deadline: float, output: bytearray) -> None:
    """Add to `output` what is printed up to the line, the end of the output or the deadline."""
    while line not in output[-4096 - len(line) :]:
        remaining = deadline - time.perf_counter()
        if remaining <= 0 or not select.select([descriptor], [], [], remaining)[0]:
            break
        piece = os.read(descriptor, 4096)
        if not piece:
            break
        output += piece


def _reap(process: subprocess.Popen[bytes]) -> float:
    """Wait for the end (a minute at most, for those that end in their own way); its processor time in seconds."""
    deadline = time.monotonic() + 60
    descriptor = process.stdout.fileno() if process.stdout is not None else -1
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            process.kill()
        if select.select([descriptor], [], [], 0.01)[0] and not os.read(descriptor, 1 << 16):
            time.sleep(0.01)
