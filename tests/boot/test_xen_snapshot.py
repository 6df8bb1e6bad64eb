"""Debian's kernel as a Xen guest, booted once and restored as often as wanted."""

from __future__ import annotations

import hashlib
import itertools
import random
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trivisor import StopReason, VirtualMachine
from trivisor.devices.user_network import NetworkUnavailable, UserNetwork
from trivisor.guests.debian import DefaultGuest
from trivisor.machine.cpuid import AVX512
from trivisor.monitor import TechniqueUnavailable

pytestmark = [pytest.mark.boot, pytest.mark.timeout(240)]
PROMPT = "/root # "


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "trivisor", "run", *map(str, arguments)]


def restored(path: Path, engine: str, **options: Any) -> VirtualMachine:
    """The machine of a snapshot under an engine, if this host has that."""
    try:
        return VirtualMachine.restore(path, engine=engine, **options)
    except TechniqueUnavailable as reason:
        pytest.skip(str(reason))


def snapshot_of(engine: str, path: Path) -> Path:
    """A snapshot of the default guest that waits, as the command makes it."""
    made = subprocess.run(
        command("--technique", "paravirt", "--engine", engine, "--snapshot", path, "--memory", "256M"),
        stdin=subprocess.DEVNULL, capture_output=True, timeout=200,
    )  # fmt: skip
    if made.returncode == 3:
        pytest.skip(made.stderr.decode())
    assert made.returncode == 0 and made.stderr.startswith(b"trivisor: snapshot of"), made.stderr
    assert b"Booting kernel on Xen" in made.stdout
    return path


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory, debian: DefaultGuest) -> Path:
    return snapshot_of("translation", tmp_path_factory.mktemp("snapshot") / "booted")


@pytest.fixture(scope="module")
def booted_directly(tmp_path_factory: pytest.TempPathFactory, debian: DefaultGuest) -> Path:
    return snapshot_of("direct", tmp_path_factory.mktemp("snapshot") / "booted")


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


@pytest.mark.parametrize(("engine", "count"), [("translation", 60_000), ("direct", 1_500)])
def test_linux_at_work_goes_through_files_at_chance_moments(
    request: pytest.FixtureRequest, tmp_path: Path, engine: str, count: int
) -> None:
    """Each number is a system call, and those are dear where ring 0 is emulated."""
    path, choose = tmp_path / "snapshot", random.Random(5)
    numbers = "".join(f"{number}\n" for number in range(1, count + 1)).encode()
    machine = restored(request.getfixturevalue("booted" if engine == "translation" else "booted_directly"), engine)
    try:
        machine.read_until(PROMPT, 60)
        machine.write(
            f"for i in 1 2 3 4 5 6; do seq 1 {count} | sha256sum; done; "
            "echo all; dmesg | grep -ci -e oops -e 'rcu.*stall'\n"
        )
        seen = b""
        for _ in range(6):
            machine.run(timeout=choose.uniform(0.05, 0.3))
            machine.snapshot(path)
            seen += machine.output
            machine.close()
            machine = restored(path, engine)
        machine.read_until("\r\nall\r\n0\r\n", 120)
        seen += machine.output
    finally:
        machine.close()
    assert seen.count(hashlib.sha256(numbers).hexdigest().encode()) == 6, seen


def test_one_technique_only(booted: Path) -> None:
    run = subprocess.run(command("--restore", booted, "--technique", "translation"), capture_output=True, timeout=60)
    assert run.returncode == 3 and run.stderr.count(b"\n") == 1 and b"technique paravirt" in run.stderr


# -- direct execution ----------------------------------------------------------------------------------------


def test_a_guest_of_either_engine_goes_on_under_either(booted: Path, booted_directly: Path) -> None:
    script = "echo $((6 * 7)); cat /sys/hypervisor/guest_type; seq 1 1000 | sha256sum; exit 7"
    with VirtualMachine.restore(booted_directly, engine="direct") as machine:
        apart = bool(machine.features & AVX512)
    answers = set()
    for path, engine in itertools.product((booted, booted_directly), ("translation", "direct")):
        run = subprocess.run(
            command("--restore", path, "--engine", engine, "--", "sh", "-c", script), capture_output=True, timeout=60
        )
        if apart and (path is booted) != (engine == "translation"):
            assert run.returncode == 3 and run.stderr.count(b"\n") == 1 and b"AVX-512" in run.stderr
        else:
            assert (run.returncode, run.stderr) == (7, b"")
            answers.add(run.stdout)
    assert len(answers) == 1 and answers.pop().startswith(b"42\nPV\n")


# -- disks and networks --------------------------------------------------------------------------------------

FILL = """
mke2fs /dev/xvda >/dev/null
mkdir /disk
mount -t ext4 /dev/xvda /disk
cd /disk
dd if=/dev/urandom of=random bs=64k count=48 2>/dev/null
sha256sum random >sums
"""
AT_WORK = """
for number in 1 2 3 4 5; do cp random copy$number; sync; done; sha256sum copy* >>sums; sync
cd /; umount /disk; mount -t ext4 -o ro /dev/xvda /disk
(cd /disk && sha256sum -c sums && cut -c1-64 sums | uniq | wc -l); dmesg -r | grep '^<[0-3]>'; echo o''ver
"""


def image(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(32 << 20)
    return path


@pytest.mark.parametrize("engine", ["translation", "direct"])
def test_a_disk_that_is_written_to_before_and_after(debian: DefaultGuest, tmp_path: Path, engine: str) -> None:
    """Snapshots in the middle of writes; the files are whole, and the file system knows of nothing."""
    disk, path, choose = image(tmp_path / "disk"), tmp_path / "snapshot", random.Random(8)
    try:
        machine = VirtualMachine(disks=[disk], technique="paravirt", engine=engine, memory="256M")
    except TechniqueUnavailable as reason:
        pytest.skip(str(reason))
    try:
        machine.read_until(PROMPT, 120)
        machine.write(f"{{{FILL}}}; echo fil''led\n")
        machine.read_until("\nfilled", 60)
        machine.read_until("/disk # ", 30)
        machine.write(f"{{{AT_WORK}}}\n")
        for _ in range(4):
            machine.run(timeout=choose.uniform(0.05, 0.3))
            machine.snapshot(path)
            machine.close()
            machine = restored(path, engine, disks=[disk])
            assert machine.warnings == []
        seen = machine.read_until("\nover", 120).decode(errors="replace")
    finally:
        machine.close()
    names = ("random", *(f"copy{number}" for number in range(1, 6)))
    assert all(f"{name}: OK" in seen for name in names) and "\n1\r\n" in seen, seen
    assert "<3>" not in seen, "nothing in the log is an error"


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory, debian: DefaultGuest) -> tuple[Path, Path]:
    """A snapshot of the default guest that waits with a disk and a network, and the disk."""
    try:
        UserNetwork(lambda frame: None).close()
    except NetworkUnavailable as reason:
        pytest.skip(str(reason))
    directory = tmp_path_factory.mktemp("attached")
    path, disk = directory / "snapshot", image(directory / "disk")
    made = subprocess.run(
        command("--disk", disk, "--net", "user", "--snapshot", path, "--memory", "256M"),
        stdin=subprocess.DEVNULL, capture_output=True, timeout=200,
    )  # fmt: skip
    assert made.returncode == 0 and made.stderr.startswith(b"trivisor: snapshot of"), made.stderr
    return path, disk


def test_one_snapshot_and_what_is_on_its_disk_since(attached: tuple[Path, Path]) -> None:
    path, disk = attached
    base = command("--restore", path, "--disk", disk, "--net", "user", "--")
    fill = subprocess.run([*base, "sh", "-e", "-c", FILL + "cat sums; cd /; umount /disk"], capture_output=True, timeout=100)
    assert (fill.returncode, fill.stderr) == (0, b"")
    check = "mkdir /disk; mount -t ext4 -o ro /dev/xvda /disk && cd /disk && sha256sum -c sums && cat sums"
    run = subprocess.run([*base, "sh", "-c", check], capture_output=True, timeout=100)
    assert (run.returncode, run.stderr) == (0, b"") and run.stdout == b"random: OK\n" + fill.stdout
    for options in ((), ("--disk", disk), ("--net", "user"), ("--disk", f"{disk},readonly", "--net", "user")):
        run = subprocess.run(command("--restore", path, *options), capture_output=True, timeout=60)
        assert run.returncode == 2 and run.stderr.count(b"\n") == 1 and b"xvda" in run.stderr, run.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """The port of a server on the host's loopback that has a file."""
    (tmp_path / "file").write_bytes(random.Random(2).randbytes(2 << 20))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made.server_port
        made.shutdown()


def test_the_network_of_a_restored_guest(attached: tuple[Path, Path], server: int, tmp_path: Path) -> None:
    path, disk = attached
    script = f"""
        ifconfig eth0 | grep -o 'addr:[0-9][0-9.]*'
        wget -q -O - http://10.0.2.2:{server}/file | sha256sum
        udhcpc -q -n -f -t 5 -T 1 -i eth0 -s /etc/udhcpc.script 2>&1 | grep -o 'lease of [0-9.]*'
        wget -q -O - http://10.0.2.2:{server}/file | sha256sum
    """
    with VirtualMachine.restore(path, disks=[disk], network="user", command=["sh", "-c", script]) as machine:
        outcome = machine.run(timeout=120)
        lines = machine.output.decode().splitlines()
    digest = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert outcome.status == 0
    assert lines == ["addr:10.0.2.15", f"{digest}  -", "lease of 10.0.2.15", f"{digest}  -"]


def test_connections_of_before_are_gone_and_a_port_is_forwarded_in(
    attached: tuple[Path, Path], server: int, tmp_path: Path
) -> None:
    path, disk = attached
    snapshot = tmp_path / "connected"
    with VirtualMachine.restore(path, disks=[disk], network="user") as machine:
        machine.read_until(PROMPT, 60)
        machine.write(f"(sleep 2; echo GET; sleep 5) | nc 10.0.2.2 {server}; echo en''ded\n")
        machine.run(timeout=1)
        machine.snapshot(snapshot)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with VirtualMachine.restore(snapshot, disks=[disk], network=f"user,forward={port}:80") as machine:
        machine.read_until("ended\r\n", 30)  # what it sends is answered by a reset
        machine.write("echo served >/tmp/page; httpd -p 80 -h /tmp; echo rea''dy\n")
        machine.read_until("\nready", 30)
        answers: list[bytes] = []

        def fetch() -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=30) as answer:
                answers.append(answer.read())
            machine.stop()

        thread = threading.Thread(target=fetch)
        thread.start()
        machine.run(timeout=40)
        thread.join()
        assert answers == [b"served\n"]
