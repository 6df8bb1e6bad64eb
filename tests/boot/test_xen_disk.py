"""A disk of a PV guest: what is written is there in the next run, and what was flushed survives kill -9."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trivisor import VirtualMachine
from trivisor.guests.debian import DefaultGuest

pytestmark = [pytest.mark.boot, pytest.mark.timeout(600)]

MIB = 1 << 20
WRITE = """
set -e
cat /proc/partitions
mke2fs /dev/xvda >/dev/null
mkdir /disk
mount -t ext4 /dev/xvda /disk
dd if=/dev/urandom of=/disk/random bs=64k count=48 2>/dev/null
cp /bin/busybox /disk/busybox
cd /disk
sha256sum random busybox >sums
cat sums
cd /
umount /disk
"""
READ = """
dmesg | grep -o "Grant tables using version .*"
mkdir /disk
mount -t ext4 -o ro /dev/xvda /disk
cd /disk
sha256sum -c sums && cat sums
dd if=/dev/zero of=/dev/xvda bs=4k count=1 conv=fsync || echo refused
cd /
umount /disk
sha256sum /dev/xvda
"""
FOREVER = """
number=0
while :; do
    echo "block $number of the disk"; number=$((number + 1))
done | while read -r line; do
    set -- $line
    yes "$line" | head -c 16384 >/block
    dd if=/block of=/dev/xvda bs=16k seek=$(($2 % 256)) conv=fsync 2>/dev/null
    echo "flushed $2"
done
"""


def run(disk: str, script: str, append: str | None = None) -> tuple[list[str], dict[str, int]]:
    with VirtualMachine(disks=[disk], command=["sh", "-c", script], append=append) as machine:
        assert machine.technique == "paravirt", "a disk is for Xen guests"
        outcome = machine.run(timeout=300)
        assert outcome.status == 0, (outcome, machine.output)
        return machine.output.decode().splitlines(), machine.statistics()["xvda"]


def test_files_are_there_in_the_next_run(debian: DefaultGuest, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    written, counts = run(str(image), WRITE)
    assert written[2].split() == ["202", "0", str(24 * 1024), "xvda"]
    assert counts["writes"] > 0 and counts["flushes"] > 0 and counts["bytes written"] > 4 * MIB
    assert "failed" not in counts and "refused" not in counts
    whole = hashlib.sha256(image.read_bytes()).hexdigest()
    (version, *read), counts = run(f"{image},readonly", READ, append="grant_table.version=2")
    assert version == "Grant tables using version 2 layout"
    assert read[:2] == ["random: OK", "busybox: OK"]
    assert read[2:4] == written[3:5]
    assert read[3].split()[0] == hashlib.sha256(debian.busybox.read_bytes()).hexdigest()
    assert "refused" in read
    assert read[-1].split()[0] == whole == hashlib.sha256(image.read_bytes()).hexdigest()
    assert counts["bytes read"] > 4 * MIB and "writes" not in counts


def test_what_was_flushed_survives_a_kill(debian: DefaultGuest, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(4 * MIB)
    command = [sys.executable, "-m", "trivisor", "run", "--disk", str(image), "--", "sh", "-c", FOREVER]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = 0
    try:
        for line in process.stdout:
            told = int(line.removeprefix("flushed "))
            if told == 40:
                break
        time.sleep(0.1)  # in the middle of something
    finally:
        os.kill(process.pid, signal.SIGKILL)
        told = [told, *map(int, re.findall("flushed ([0-9]+)\n", process.stdout.read()))][-1]
        process.wait()
        process.stdout.close()
    assert told >= 40, "the guest was killed while it wrote"
    content = image.read_bytes()
    for number in range(told + 1):
        expected = (f"block {number} of the disk\n" * 1000).encode()[:16384]
        assert content[number * 16384 : (number + 1) * 16384] == expected, number
