"""Debian's own kernel on the default board: what it finds there, what it complains of, and what it is told.

Each boot costs seconds, so one boot answers for many tests.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import pytest

from trivisor import StopReason, VirtualMachine
from trivisor.guests.debian import DefaultGuest
from trivisor.machine import tsc
from trivisor.machine.memory import GIB

pytestmark = [pytest.mark.boot, pytest.mark.timeout(120)]

WARNING = 4
"""The kernel's log level from which on something is wrong (include/linux/kern_levels.h)."""

PROBE = """
section() { echo "== $1"; }
section log; dmesg -r
section clock
cat /sys/devices/system/clocksource/clocksource0/current_clocksource
cat /sys/devices/system/clockevents/clockevent0/current_device
section interrupts; cat /proc/interrupts
section processor; cat /proc/cpuinfo
section vulnerabilities; cat /sys/devices/system/cpu/vulnerabilities/*
section memory; cat /proc/meminfo /proc/mtrr
section tainted; cat /proc/sys/kernel/tainted
section time; date +%s
sleep 1
section slept
"""

ALLOWED = {
    # Printed under QEMU too: the root bridge has no memory-mapped configuration space there either.
    r"acpi PNP0A03:00: fail to add MMCONFIG information",
    # The same under QEMU: how this kernel is built and configured.
    r"ACPI: Early table checksum verification disabled",
    r"NX \(Execute Disable\) protection: active",
    r"Yama: disabled by default",
    r"audit: initializing netlink subsys \(disabled\)",
    r"evm: security\.SMACK64\w* \(disabled\)",
    r"NMI watchdog: Perf NMI watchdog permanently disabled",
    r"PCI: Using host bridge windows from ACPI; if necessary, use \"pci=nocrs\" and report a bug",
    r"ima: No (TPM chip|architecture policies) found",
    r"No NUMA configuration found",
    r"iommu: DMA domain TLB invalidation policy",
    r"x86/mm: Checked W\+X mappings: passed, no W\+X pages found",
    # Not under QEMU, at level "info": there is no IOMMU to remap interrupts, so Linux, which sees no hypervisor
    # that it trusts with it, leaves the x2APIC that there is in xAPIC mode.
    r"x2apic: IRQ remapping doesn't support X2APIC mode",
    # The same under QEMU with an Intel processor (-cpu Icelake-Server): it has neither performance counters nor
    # frequency control.
    r"Performance Events: unsupported p6 CPU model \d+ no PMU driver, software events only",
    r"intel_pstate: CPU model not supported",
    # At level "info": nobody could type on a PS/2 keyboard, so ACPI does not tell of one.
    r"i8042: PNP: No PS/2 controller found",
}
SUSPICIOUS = re.compile(
    r"error|warn|fail|\bbug|unsupported|n[o']t support|invalid|unable|disabled?\b|cannot|can't|not found|"
    r"no \S+ \S+ found|broken|corrupt|timed out|timeout|stall|lockup|call trace|oops|kernel panic|skipping|missing|"
    r"unknown|bogus|illegal|spurious|unreliable|unstable|bad\b",
    re.IGNORECASE,
)


@dataclass
class Report:
    """What the guest had to say, by section, and when the host saw a section begin."""

    sections: dict[str, list[str]] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)

    def text(self, section: str) -> str:
        return "\n".join(self.sections[section])

    def log(self) -> list[tuple[int, str]]:
        """The kernel's log as (level, message)."""
        entries = []
        for line in self.sections["log"]:
            match = re.fullmatch(r"<(\d+)>\[ *\d+\.\d+\] (.*)", line)
            if match:  # else it is the second line of a message
                entries.append((int(match[1]) & 7, match[2]))
        return entries


@pytest.fixture(scope="module")
def report(debian: DefaultGuest) -> Report:
    report = Report()
    pending = bytearray()
    current: list[str] = []

    def printed(data: bytes) -> None:
        nonlocal current
        pending.extend(data)
        while (end := pending.find(b"\n")) >= 0:
            line = pending[:end].decode()
            del pending[: end + 1]
            if line.startswith("== "):
                current = report.sections[line[3:]] = []
                report.seen[line[3:]] = time.time()
            else:
                current.append(line)

    with VirtualMachine(command=["sh", "-c", PROBE], serial=printed) as machine:
        outcome = machine.run(timeout=110)
    assert (outcome.reason, outcome.status) == (StopReason.POWEROFF, 0), outcome.message
    return report


def test_nothing_in_the_log_is_a_warning(report: Report) -> None:
    log = report.log()
    assert len(log) > 200
    bad = [
        f"<{level}> {message}"
        for level, message in log
        if (level <= WARNING or SUSPICIOUS.search(message))
        and not any(re.match(allowed, message) for allowed in ALLOWED)
    ]
    assert bad == []
    assert report.sections["tainted"] == ["0"]


def test_the_firmware_left_what_kernels_look_for(report: Report) -> None:
    log = "\n".join(message for _, message in report.log())
    assert "DMI: trivisor virtual machine" in log
    assert "ACPI: PM: (supports S0 S5)" in log
    assert "x86/PAT: Configuration [0-7]: WB  WC  UC- UC" in log
    assert "reg00: base=0x0c0000000 ( 3072MB), size= 1024MB, count=1: uncachable" in report.text("memory")


def test_interrupts_come_through_the_apics(report: Report) -> None:
    lines = report.text("interrupts")
    assert re.search(r"^ *4: +[1-9]\d* +IO-APIC +4-edge +ttyS0$", lines, re.MULTILINE)
    assert re.search(r"^LOC: +[1-9]\d\d+ ", lines, re.MULTILINE), "local timer"
    for name in ("SPU", "ERR", "MIS"):
        assert re.search(rf"^{name}: +0\b", lines, re.MULTILINE), name


def test_the_tsc_is_the_clock_and_calibrated(report: Report) -> None:
    assert report.sections["clock"] == ["tsc", "lapic-deadline"]
    told = [re.match(r"tsc: Detected ([\d.]+) MHz", message) for _, message in report.log()]
    frequencies = [float(match[1]) * 1e6 for match in told if match]
    assert frequencies
    assert all(abs(frequency - tsc.frequency()) < 0.001 * tsc.frequency() for frequency in frequencies)
    flags = re.search(r"^flags\s*: (.*)$", report.text("processor"), re.MULTILINE)
    assert flags and {"constant_tsc", "nonstop_tsc", "tsc_known_freq", "apic"} <= set(flags[1].split())


def test_time_is_the_hosts(report: Report) -> None:
    (now,) = report.sections["time"]
    assert abs(int(now) - report.seen["time"]) <= 2
    assert 0.9 < report.seen["slept"] - report.seen["time"] < 2.5


def test_no_known_flaw_is_left_open(report: Report) -> None:
    assert report.sections["vulnerabilities"]
    assert not [line for line in report.sections["vulnerabilities"] if "ulnerable" in line]


def test_memory_is_all_there(report: Report) -> None:
    total = re.search(r"MemTotal: +(\d+) kB", report.text("memory"))
    assert total and 460_000 < int(total[1]) < 512 * 1024


def test_a_shell_on_the_console_reboot_and_poweroff(debian: DefaultGuest) -> None:
    prompt, pasted = "/root # ", b"".join(b"%04d: a line among many that were pasted\n" % n for n in range(300))
    with VirtualMachine(terminal_size=(40, 132)) as machine:
        first = machine.read_until(prompt, timeout=100)
        assert b"Run /init as init process" in first and b"trivisor: userspace after " in first
        machine.write("echo $((6 * 7)); stty size\n")
        assert b"\r\n42\r\n40 132\r\n" in machine.read_until(prompt, timeout=20)

        machine.write("stty -echo; cat >/tmp/pasted; stty echo; wc -c </tmp/pasted; tail -n 1 /tmp/pasted\n")
        machine.read_until("/tmp/pasted\r\n", timeout=20)
        machine.write(pasted + b"\x04")
        answer = machine.read_until(prompt, timeout=60)
        assert b"%d\r\n%b\r\n" % (len(pasted), pasted.splitlines()[-1]) in answer

        exits = machine.statistics()["exits"]
        machine.write("reboot -f\n")
        again = machine.read_until(prompt, timeout=100)
        assert b"reboot: Restarting system" in again and again.count(b"Linux version") == 1
        assert machine.outcome is None
        assert machine.statistics()["exits"]["interrupt"] > exits["interrupt"] + 100
        machine.write("ls /tmp; poweroff -f\n")
        outcome = machine.run(timeout=60)
        assert (outcome.reason, outcome.status) == (StopReason.POWEROFF, 0)
        assert b"pasted" not in machine.output.rpartition(b"ls /tmp")[2]
        assert machine.run() == outcome


def test_a_machine_that_is_told_to_stop_goes_on_later(debian: DefaultGuest) -> None:
    with VirtualMachine(command=["sh", "-c", "echo through"], memory=GIB) as machine:
        for _ in range(20):
            if (outcome := machine.run(timeout=0.3)).reason is not StopReason.TIMEOUT:
                break
            state = machine.registers
            machine.registers = state
        outcome = machine.run(timeout=100)
        assert (outcome.reason, outcome.status, machine.output) == (StopReason.POWEROFF, 0, b"through\n")
