"""The default guest, booted once and restored as often as wanted."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conformance.machine import UNAVAILABLE
from trivisor import StopReason, VirtualMachine
from trivisor.monitor import TechniqueUnavailable

pytestmark = pytest.mark.boot
PROMPT = "/root # "


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "trivisor", "run", *map(str, arguments)]


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of the default guest that waits, as the command makes it."""
    path = tmp_path_factory.mktemp("snapshot") / "booted"
    made = subprocess.run(
        command("--snapshot", path, "--memory", "256M"), stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert re.fullmatch(rb"trivisor: snapshot of \d+ MiB in .*booted\n", made.stderr)
    assert b"Linux version" in made.stdout
    return path


def test_a_command_in_the_restored_guest(booted: Path) -> None:
    for _ in range(2):
        arguments = ("sh", "-c", 'echo "$1"; cat /proc/uptime; exit 7', "sh", "it's\n\\ $HOME 'ü'")
        run = subprocess.run(command("--restore", booted, "--", *arguments), capture_output=True, timeout=60)
        assert (run.returncode, run.stderr) == (7, b"")
        assert run.stdout.startswith("it's\n\\ $HOME 'ü'\n".encode())
        assert float(run.stdout.split()[-2]) < 60, "its time stood still in the file"


def test_a_shell_in_the_restored_guest(booted: Path) -> None:
    with VirtualMachine.restore(booted, technique="translation", terminal_size=(17, 91)) as machine:
        machine.read_until(PROMPT, 60)
        machine.write("stty size; date +%s\n")
        machine.read_until("17 91\r\n", 30)
        machine.read_until(PROMPT, 30)
        machine.write("dmesg | grep -ci -e stall -e 'clocksource.*unstable' -e oops; echo looked\n")
        assert b"\r\n0\r\nlooked" in machine.read_until("\r\nlooked", 30)
        machine.write("exit\n")
        assert machine.run(30).reason is StopReason.POWEROFF


def test_a_shell_put_into_a_snapshot_and_taken_out(booted: Path, tmp_path: Path) -> None:
    with VirtualMachine.restore(booted, technique="translation") as machine:
        machine.read_until(PROMPT, 60)
        machine.write("word=remembered; echo file >/tmp/file\n")
        machine.read_until(PROMPT, 30)
        machine.snapshot(tmp_path / "shell")
    for _ in range(2):
        with VirtualMachine.restore(tmp_path / "shell", technique="translation") as machine:
            machine.write("echo $word $(cat /tmp/file)\n")
            machine.read_until("\nremembered file", 30)


def test_linux_at_work_goes_through_files_at_chance_moments(booted: Path, tmp_path: Path) -> None:
    path, choose = tmp_path / "snapshot", random.Random(4)
    numbers = "".join(f"{number}\n" for number in range(1, 60_001)).encode()
    machine = VirtualMachine.restore(booted, technique="translation")
    try:
        machine.read_until(PROMPT, 60)
        machine.write("for i in 1 2 3 4 5 6; do seq 1 60000 | sha256sum; done; echo all; dmesg | grep -c -e oops -e stall\n")
        seen = b""
        for _ in range(6):
            machine.run(timeout=choose.uniform(0.05, 0.3))
            machine.snapshot(path)
            seen += machine.output
            machine.close()
            machine = VirtualMachine.restore(path, technique="translation")
        machine.read_until("\r\nall\r\n0\r\n", 120)
        seen += machine.output
    finally:
        machine.close()
    assert seen.count(hashlib.sha256(numbers).hexdigest().encode()) == 6, seen


def test_the_clock_chip_tells_the_present_date(booted: Path) -> None:
    run = subprocess.run(
        command("--restore", booted, "--", "cat", "/sys/class/rtc/rtc0/since_epoch"), capture_output=True, timeout=60
    )
    assert abs(int(run.stdout) - time.time()) < 30


def test_a_signal_writes_a_snapshot_and_the_guest_goes_on(booted: Path, tmp_path: Path) -> None:
    path = tmp_path / "on-the-way"
    arguments = command("--restore", booted, "--snapshot", path)
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdin is not None and run.stdout is not None
        seen = b""
        while PROMPT.encode() not in seen:
            seen += os.read(run.stdout.fileno(), 4096)
        run.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)
        out, error = run.communicate(b"echo still $((6*7))\nexit\n", timeout=60)
    assert run.returncode == 0 and b"still 42" in out and b"snapshot of" in error
    with VirtualMachine.restore(path, technique="translation") as machine:
        machine.write("echo again $((6*7))\n")
        machine.read_until("again 42", 60)


@pytest.mark.skipif("hardware" in UNAVAILABLE, reason=UNAVAILABLE.get("hardware", ""))
def test_a_snapshot_goes_on_under_hardware_and_back(booted: Path) -> None:
    try:
        restored = VirtualMachine.restore(booted, technique="hardware")
    except TechniqueUnavailable as reason:  # programs would see what the guest was not told of
        pytest.skip(str(reason))
    with restored as machine:
        assert machine.technique == "hardware"
        machine.write("echo there $((6*7))\n")
        machine.read_until("there 42", 60)
        machine.change_technique("translation")
        machine.write("echo answer $((6*7))\n")
        machine.read_until("answer 42", 60)


def test_what_the_command_refuses(booted: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(booted.read_bytes()[:-1])
    for arguments, says in (
        (("--restore", damaged, "--", "true"), b"damaged"),
        (("--restore", __file__), b"no snapshot"),
        (("--restore", tmp_path / "none"), b"No such file"),
        (("--restore", booted, "--memory", "64M"), b"leave out --memory"),
        (("--restore", booted, "vmlinuz"), b"leave out IMAGE"),
        (("--snapshot", tmp_path / "x", "--", "true"), b"runs a command"),
        (("--snapshot", tmp_path / "none" / "x"), b"No such file"),
        (("--snapshot", tmp_path), b"Is a directory"),
        (("--snapshot", booted / "x"), b"Not a directory"),
    ):
        run = subprocess.run(command(*arguments), capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
        assert run.returncode == 2 and says in run.stderr, (arguments, run)
        assert run.stderr.count(b"\n") == 1 and run.stdout == b"", run
