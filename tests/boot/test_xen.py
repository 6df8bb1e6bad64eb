"""Debian's kernel through its Xen PV entry: the shell on hvc0, commands, the end, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from trivisor import StopReason, VirtualMachine
from trivisor.guests.debian import DefaultGuest
from trivisor.monitor.techniques import TechniqueUnavailable

pytestmark = [pytest.mark.boot, pytest.mark.timeout(180)]

PROBE = """
cat /sys/hypervisor/type /sys/hypervisor/guest_type
cat /sys/devices/system/clocksource/clocksource0/current_clocksource
dmesg | grep -c "Booting kernel on Xen"
dmesg | grep -c "VDSO_CLOCKMODE_PVCLOCK not supported"
i=0; while [ $i -lt 20 ]; do (true); i=$((i + 1)); done; echo processes $i
dd if=/dev/zero of=/tmp/x bs=64k count=64 2>/dev/null; md5sum </tmp/x
start=$(date +%s); sleep 1; echo slept $(($(date +%s) - start))
dmesg -r | grep "^<[0-3]>"; exit 0
"""


def pv_machine(engine: str, **options: Any) -> VirtualMachine:
    """The default guest under an engine, if this host has that."""
    try:
        return VirtualMachine(technique="paravirt", engine=engine, **options)
    except TechniqueUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("engine", ["translation", "direct"])
def test_a_command_in_a_pv_guest(debian: DefaultGuest, engine: str) -> None:
    with pv_machine(engine, command=["sh", "-c", PROBE]) as machine:
        outcome = machine.run(timeout=150)
        lines = machine.output.decode().splitlines()
        statistics = machine.statistics()
    assert outcome.status == 0, (outcome, lines)
    assert lines[:3] == ["xen", "PV", "xen"]
    assert lines[3] == "1"
    assert lines[4] == "0", "programs read the clock without a system call"
    assert lines[5] == "processes 20"
    assert lines[6].split()[0] == "b5cfa9d6c8febd618f91ac2843d50a1c"
    assert lines[7] in ("slept 1", "slept 2")
    assert not lines[8:], "nothing in the log is an error"
    calls = statistics["hypercalls"]
    assert calls["iret"] > 100 and calls["mmu_update"] > 10_000 and calls["mmuext_op"] > 1_000
    if engine == "translation":
        assert statistics["native helpers"]["syscall"] == 0, "no SYSCALL went the architecture's way"
    else:
        assert statistics["the stub"]["runs"] > 1000


@pytest.mark.parametrize("engine", ["translation", "direct"])
def test_the_shell_on_hvc0_and_the_exit_status(debian: DefaultGuest, engine: str) -> None:
    with pv_machine(engine, no_reboot=True) as machine:
        machine.read_until("/root # ", timeout=120)
        machine.write("echo $((6 * 7)) $(tty)\n")
        assert b"42 /dev/hvc0" in machine.read_until("/root # ", timeout=20)
        machine.write("reboot -f\n")
        assert machine.run(timeout=30).reason is StopReason.RESET


def test_a_panic_is_a_crash(debian: DefaultGuest) -> None:
    with VirtualMachine(technique="paravirt", append="init=/nothing rdinit=/nothing") as machine:
        outcome = machine.run(timeout=120)
        assert b"Kernel panic" in machine.output
    assert outcome.reason is StopReason.CRASH and outcome.status == 125
