"""Debian's kernel as a Xen guest, booted once and restored as often as wanted."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

from trivisor import StopReason, VirtualMachine
from trivisor.guests.debian import DefaultGuest

pytestmark = [pytest.mark.boot, pytest.mark.timeout(240)]
PROMPT = "/root # "


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "trivisor", "run", *map(str, arguments)]


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory, debian: DefaultGuest) -> Path:
    """A snapshot of the default guest that waits, as the command makes it."""
    path = tmp_path_factory.mktemp("snapshot") / "booted"
    made = subprocess.run(
        command("--technique", "paravirt", "--snapshot", path, "--memory", "256M"),
        stdin=subprocess.DEVNULL, capture_output=True, timeout=200,
    )  # fmt: skip
    assert made.returncode == 0 and made.stderr.startswith(b"trivisor: snapshot of"), made.stderr
    assert b"Booting kernel on Xen" in made.stdout
    return path


def test_a_command_in_the_restored_guest(booted: Path) -> None:
    for _ in range(2):
        script = 'echo "$1"; cat /sys/hypervisor/guest_type; exit 7'
        run = subprocess.run(
            command("--restore", booted, "--", "sh", "-c", script, "sh", "it's\n\\ $HOME 'ü'"),
            capture_output=True, timeout=60,
        )  # fmt: skip
        assert (run.returncode, run.stderr) == (7, b"")
        assert run.stdout == "it's\n\\ $HOME 'ü'\nPV\n".encode()


def test_a_shell_put_into_a_snapshot_and_taken_out(booted: Path, tmp_path: Path) -> None:
    with VirtualMachine.restore(booted, terminal_size=(17, 91)) as machine:
        machine.read_until(PROMPT, 60)
        machine.write("word=remembered; echo file >/tmp/file; stty size\n")
        machine.read_until("17 91\r\n", 30)
        machine.read_until(PROMPT, 30)
        machine.snapshot(tmp_path / "shell")
        frames = machine._machine.xen.domain.frames  # type: ignore[union-attr]
        before = [bytes(column) for column in (frames.owner, frames.kind, frames.kind_count, frames.references)]
    for _ in range(2):
        with VirtualMachine.restore(tmp_path / "shell") as machine:
            frames = machine._machine.xen.domain.frames  # type: ignore[union-attr]
            after = [bytes(column) for column in (frames.owner, frames.kind, frames.kind_count, frames.references)]
            assert before == after, "Linux's page tables are validated to the same counts"
            machine.write("echo $word $(cat /tmp/file)\n")
            machine.read_until("\nremembered file", 30)
            machine.read_until(PROMPT, 30)
            machine.write("sleep 1; dmesg -r | grep '^<[0-3]>'; dmesg | grep -ci -e 'rcu.*stall' -e oops; exit\n")
            machine.read_until("\r\n0\r\n", 30)
            assert machine.run(30).reason is StopReason.POWEROFF


def test_linux_at_work_goes_through_files_at_chance_moments(booted: Path, tmp_path: Path) -> None:
    path, choose = tmp_path / "snapshot", random.Random(5)
    numbers = "".join(f"{number}\n" for number in range(1, 60_001)).encode()
    machine = VirtualMachine.restore(booted)
    try:
        machine.read_until(PROMPT, 60)
        machine.write("for i in 1 2 3 4 5 6; do seq 1 60000 | sha256sum; done; echo all; dmesg | grep -ci -e oops -e 'rcu.*stall'\n")
        seen = b""
        for _ in range(6):
            machine.run(timeout=choose.uniform(0.05, 0.3))
            machine.snapshot(path)
            seen += machine.output
            machine.close()
            machine = VirtualMachine.restore(path)
        machine.read_until("\r\nall\r\n0\r\n", 120)
        seen += machine.output
    finally:
        machine.close()
    assert seen.count(hashlib.sha256(numbers).hexdigest().encode()) == 6, seen


def test_one_technique_only(booted: Path) -> None:
    run = subprocess.run(command("--restore", booted, "--technique", "translation"), capture_output=True, timeout=60)
    assert run.returncode == 3 and run.stderr.count(b"\n") == 1 and b"technique paravirt" in run.stderr
