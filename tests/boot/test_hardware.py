"""Debian's kernel on the host's KVM: to a shell, commands, and what it cost."""

from __future__ import annotations

import pytest

from trivisor import VirtualMachine
from trivisor.guests.debian import DefaultGuest
from trivisor.hardware.kvm.guest_cpuid import ring_0_is_emulated
from trivisor.hardware.kvm.system import KvmUnavailable, System

pytestmark = [pytest.mark.boot, pytest.mark.timeout(280)]

PROBE = """
i=0; while [ $i -lt 20 ]; do (true); i=$((i + 1)); done; echo processes $i
dd if=/dev/zero of=/tmp/x bs=64k count=64 2>/dev/null; md5sum </tmp/x
start=$(date +%s); sleep 1; echo slept $(($(date +%s) - start))
dmesg -r | grep "^<[0-3]>"; exit 7
"""


@pytest.fixture(scope="module")
def emulated() -> bool:
    """Whether this host's KVM emulates ring 0."""
    try:
        with System() as system:
            system.require()
            return ring_0_is_emulated(system)
    except KvmUnavailable as reason:
        pytest.skip(str(reason))


def test_a_command_in_a_guest_on_kvm(debian: DefaultGuest, emulated: bool) -> None:
    with VirtualMachine(technique="hardware", command=["sh", "-c", PROBE]) as machine:
        outcome = machine.run(timeout=250)
        lines = machine.output.decode().splitlines()
        statistics = machine.statistics()
    assert outcome.status == 7, (outcome, lines)
    assert lines[0] == "processes 20"
    assert lines[1].split()[0] == "b5cfa9d6c8febd618f91ac2843d50a1c"
    assert lines[2] in ("slept 1", "slept 2", "slept 3")
    assert not lines[3:], "nothing in the log is an error"
    if emulated:
        assert statistics["exits"]["system call"] > 300
        assert statistics["exits"]["page fault"] > 500
        assert statistics["seconds"]["ring 3"] > 0
        assert statistics["of ring 0"]["native helpers"]["sysret"] > 100


def test_the_shell_is_interactive(debian: DefaultGuest, emulated: bool) -> None:
    with VirtualMachine(technique="hardware") as machine:
        machine.read_until("/root # ", timeout=250)
        machine.write("echo $((6 * 7)) $(tty)\n")
        assert b"42 /dev/ttyS0" in machine.read_until("/root # ", timeout=30)
