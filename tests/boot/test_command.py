"""The default guest by way of the command, as its users see it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from trivisor.guests.debian import DefaultGuest

pytestmark = [pytest.mark.boot, pytest.mark.timeout(120)]

TRIVISOR = [sys.executable, "-m", "trivisor", "run"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
EVERY_BYTE = bytes(range(256))


def test_a_commands_output_and_status_are_exact_with_4_gib(debian: DefaultGuest) -> None:
    escapes = "".join(f"\\{value:03o}" for value in EVERY_BYTE)
    script = f"printf '{escapes}'; grep -c 100000000-13fffffff /proc/iomem; read -r total </proc/meminfo"
    script += "; echo $total; echo trouble >&2; printf 'no end of line'; exit 7"
    run = subprocess.run(
        [*TRIVISOR, "--memory", "4G", "--", "sh", "-c", script],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=110,
        env=ENVIRONMENT,
    )
    assert (run.returncode, run.stderr) == (7, b"")
    assert run.stdout.startswith(EVERY_BYTE + b"1\nMemTotal: ")
    rest = run.stdout.removeprefix(EVERY_BYTE)
    match = re.fullmatch(rb"1\nMemTotal: (\d+) kB\ntrouble\nno end of line", rest)
    assert match and 3_900_000 < int(match[1]) < 4 * 1024 * 1024


def test_without_a_terminal_the_guest_reports_on_itself(debian: DefaultGuest, tmp_path: Path) -> None:
    counters = tmp_path / "counters.json"
    run = subprocess.run(
        [*TRIVISOR, "--append", "ignore_loglevel", "--stats-json", str(counters)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=110,
        env=ENVIRONMENT,
    )
    assert (run.returncode, run.stderr) == (0, b"")
    lines = run.stdout.replace(b"\r\n", b"\n").decode().splitlines()
    assert re.match(r"\[ +0\.000000\] Linux version ", lines[0])
    assert lines[-1].endswith("reboot: Power down")
    report = [line for line in lines if not line.startswith("[")]
    assert re.fullmatch(r"trivisor: userspace after [\d.]+ s", report[0])
    assert report[1].startswith("Linux trivisor ") and report[1].endswith(" x86_64 GNU/Linux")
    assert report[2] == "processor: 1 x trivisor virtual CPU"
    assert re.fullmatch(r"memory: 4\d\d MiB, \d+ MiB of it available", report[3])
    assert re.fullmatch(r"uptime: [\d.]+ s", report[4])
    counted = json.loads(counters.read_text())
    blocks = counted["translation"]["blocks"] + counted["native helpers"]["taken_up"]  # made, or kept from before
    assert counted["exits"]["interrupt"] > 100 and blocks > 10_000


class Terminal:
    """A terminal with the command on it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.settings = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            TRIVISOR, stdin=self.slave, stdout=self.slave, stderr=self.slave, env=ENVIRONMENT, start_new_session=True
        )
        self.seen = bytearray()

    def read_until(self, text: bytes, timeout: float) -> bytes:
        end = time.monotonic() + timeout
        while (at := self.seen.find(text)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {bytes(self.seen[-1000:])!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536)
        found = bytes(self.seen[: at + len(text)])
        del self.seen[: at + len(text)]
        return found

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def test_a_terminal_is_the_guests_console(debian: DefaultGuest) -> None:
    terminal = Terminal()
    try:
        terminal.read_until(b"/root # ", 100)
        assert termios.tcgetattr(terminal.slave) != terminal.settings
        terminal.type(b"echo abd\x1b[D\x1b[Dx\r")  # cursor left, twice
        assert b"\naxbd\r" in terminal.read_until(b"/root # ", 20)
        terminal.type(b"sleep 1000\r")
        terminal.read_until(b"sleep 1000\r", 20)
        time.sleep(0.5)
        terminal.type(b"\x03")  # interrupts the guest's command, not the monitor
        terminal.read_until(b"/root # ", 20)
        terminal.type(b"\x01x")
        assert terminal.process.wait(20) == 0
        assert termios.tcgetattr(terminal.slave) == terminal.settings
    finally:
        terminal.close()
