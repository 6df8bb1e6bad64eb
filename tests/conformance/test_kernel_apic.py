"""KVM's local APIC under the same board: what is its own beside the programs that every technique runs.

Counts are of exits, so they hold also where the host's KVM emulates ring 0.
"""

from __future__ import annotations

import random
import threading
import time

import pytest

from tests.conformance.machine import CRYSTAL, UNAVAILABLE, Guest, make_vcpu
from tests.conformance.test_change_of_technique import image, result
from trivisor import VirtualMachine
from trivisor.guests.test_kernel import STATUS
from trivisor.hardware.kvm import kernel_apic
from trivisor.hardware.kvm.kernel_apic import KernelApicVcpu, crystal_for, why_not
from trivisor.hardware.kvm.system import System
from trivisor.machine import tsc
from trivisor.machine.cpuid import tsc_ratio
from trivisor.machine.exits import Halt, Kicked, Unsupported
from trivisor.machine.state import GPR_NAMES
from trivisor.monitor import assembly
from trivisor.monitor.outcome import StopReason

TECHNIQUE = "hardware, KVM's APIC"
pytestmark = pytest.mark.skipif(TECHNIQUE in UNAVAILABLE, reason=UNAVAILABLE.get(TECHNIQUE, ""))

APIC_ON = "mov eax, 0xfee00000\n mov dword [rax+0xf0], 0x1ff\n"
TICKS = APIC_ON + """
    mov dword [rax+0x3e0], 0xb
    mov dword [rax+0x320], MODE
    mov dword [rax+0x380], COUNT
    xor ebx, ebx
wait:
    sti
    hlt
    cli
    cmp ebx, TIMES
    jb wait
    hlt
tick:
    inc ebx
    mov dword [rax+0xb0], 0
    iretq
"""

DEADLINES = """
    mov ecx, 0x1b
    rdmsr
    or eax, 0x400
    wrmsr
    xor edx, edx
    mov ecx, 0x80f
    mov eax, 0x1ff
    wrmsr
    mov ecx, 0x832
    mov eax, 0x40040
    wrmsr
    xor ebx, ebx
    call arm
wait:
    sti
    hlt
    cli
    cmp ebx, TIMES
    jb wait
    hlt
tick:
    inc ebx
    xor eax, eax
    xor edx, edx
    mov ecx, 0x80b
    wrmsr
    call arm
    iretq
arm:
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rax, TICKS
    mov rdx, rax
    shr rdx, 32
    mov ecx, 0x6e0
    wrmsr
    ret
"""


def ticks(technique: str, times: int = 50, code: str = TICKS) -> Guest:
    """A guest that waits for `times` periods of about a millisecond."""
    values = {"MODE": 0x20040, "COUNT": CRYSTAL // 1000, "TIMES": times, "TICKS": tsc.frequency() // 1000}
    source = code
    for name, value in values.items():
        source = source.replace(name, str(value))
    guest = Guest(technique, source)
    guest.gate(0x40, "tick")
    return guest


def register(guest: Guest, name: str) -> int:
    return guest.vcpu.state.gpr[GPR_NAMES.index(name)]


@pytest.mark.parametrize("code", [TICKS, DEADLINES], ids=["xAPIC, periodic", "x2APIC, deadlines"])
def test_a_tick_costs_no_exit(code: str) -> None:
    exits = {}
    for technique in ("hardware", TECHNIQUE):
        guest = ticks(technique, code=code)
        try:
            started = time.monotonic()
            assert guest.watched_run() == Halt(False)
            assert register(guest, "rbx") == 50
            assert time.monotonic() - started > 0.045
            counts = guest.vcpu.statistics()["exits"]
            exits[technique] = sum(counts.values()) - counts.get("signal", 0)
        finally:
            guest.close()
    assert exits[TECHNIQUE] <= 5 < 100 <= exits["hardware"], exits


def test_a_halt_for_good_is_seen_soon() -> None:
    guest = Guest(TECHNIQUE, "cli\n hlt\n nop")
    try:
        started = time.monotonic()
        assert guest.watched_run() == Halt(False)
        assert time.monotonic() - started < 40 * kernel_apic.LOOK / 1e9
        assert not guest.vcpu.state.halted
    finally:
        guest.close()


def test_a_guest_that_sleeps_can_be_kicked_and_sleeps_on() -> None:
    guest = Guest(TECHNIQUE, APIC_ON + "sti\n hlt\n mov ebx, 7\n cli\n hlt\n back: iretq")
    guest.gate(0x51, "back")
    try:
        for asks in (False, True):
            timer = threading.Timer(0.05, guest.vcpu.kick)
            timer.start()
            assert isinstance(guest.watched_run(), Kicked)
            timer.join()
            if asks:  # the halt goes to the board with the state, and back
                assert guest.vcpu.state.halted
                guest.interrupt(0x51)
        assert guest.watched_run() == Halt(False)
        assert register(guest, "rbx") == 7
    finally:
        guest.close()


def test_a_level_triggered_interrupt_comes_until_the_device_lets_go() -> None:
    pin = 20
    source = APIC_ON + f"""
        mov ecx, 0xfec00000
        mov dword [rcx], {0x10 + 2 * pin}
        mov dword [rcx+0x10], 0x8045
        sti
    wait:
        cmp ebx, 3
        jb wait
        mov edx, 0x10000
    more:
        dec edx
        jnz more
        cli
        hlt
    handler:
        inc ebx
        cmp ebx, 3
        jne on
        out 0x80, al
    on:
        mov dword [rax+0xb0], 0
        iretq
    """
    guest = Guest(TECHNIQUE, source)
    guest.gate(0x45, "handler")
    line = guest.board.io_apic.line(pin)
    guest.on_port(lambda exit_: line(False))
    line(True)
    try:
        assert guest.watched_run() == Halt(False)
        assert register(guest, "rbx") == 3
        assert guest.vcpu.statistics()["exits"]["ioapic_eoi"] == 3
    finally:
        guest.close()


@pytest.mark.parametrize(
    "body", ["sti\n out 0x80, al\n wait: cmp ebx, 1\n jb wait", "out 0x80, al\n sti\n hlt"], ids=["running", "in hlt"]
)
def test_the_8259_reaches_the_guest_through_lint0(body: str) -> None:
    guest = Guest(TECHNIQUE, body + "\n cli\n hlt\n handler: inc ebx\n mov al, 0x20\n out 0x20, al\n iretq")
    guest.board.local_apic.enter_virtual_wire_mode()
    guest.board.pic.master.write(1, 1, 0)
    guest.gate(0x0B, "handler")
    line = guest.board.pic.line(3)
    guest.on_port(lambda exit_: line(True))
    try:
        assert guest.watched_run() == Halt(False)
        assert register(guest, "rbx") == 1
    finally:
        guest.close()


def test_an_injected_interrupt_needs_no_8259() -> None:
    source = "out 0x80, al\n mov ecx, 1000\n wait: loop wait\n sti\n here: jmp here\n handler: mov ebx, 5\n hlt"
    guest = Guest(TECHNIQUE, source)
    guest.gate(0x66, "handler")
    guest.on_port(lambda exit_: guest.vcpu.interrupt(0x66))
    try:
        assert guest.watched_run() == Halt(False)
        assert register(guest, "rbx") == 5
    finally:
        guest.close()


def test_msrs_that_kvm_refuses_are_refused() -> None:
    source = "mov ecx, 0x1b\n rdmsr\n mov ebx, eax\n or eax, 1\n wrmsr\n hlt"
    guest = Guest(TECHNIQUE, source)
    try:
        assert guest.watched_run() == Halt(False)
        assert guest.frame().vector == 13
        assert register(guest, "rbx") == 0xFEE00900
    finally:
        guest.close()


def test_a_state_that_kvm_refuses_ends_the_run_in_a_line() -> None:
    guest = ticks(TECHNIQUE)
    saved = guest.board.local_apic.save()
    guest.board.local_apic.load({**saved, "base": 0x400 | saved["base"] & ~0x800, "dfr": 1 << 70})
    try:
        exit_ = guest.watched_run()
        assert isinstance(exit_, Unsupported) and "local APIC" in exit_.what
    finally:
        guest.close()


@pytest.mark.parametrize("code", [TICKS, DEADLINES], ids=["xAPIC, periodic", "x2APIC, deadlines"])
@pytest.mark.parametrize("other", ["translation", "hardware"])
def test_the_apic_goes_from_one_to_the_other_while_its_timer_runs(other: str, code: str) -> None:
    guest = ticks(TECHNIQUE, 60, code)
    chance = random.Random(5)
    changes = 0
    try:
        while True:
            timer = threading.Timer(chance.uniform(0.001, 0.01), guest.vcpu.kick)
            timer.start()
            exit_ = guest.watched_run()
            timer.join()
            if not isinstance(exit_, Kicked):
                break
            guest.switch(TECHNIQUE if guest.technique == other else other)
            changes += 1
        assert exit_ == Halt(False) and 60 <= register(guest, "rbx") <= 62
        assert changes >= 4
    finally:
        guest.close()


def test_a_machine_changes_its_technique_and_goes_through_files(tmp_path, monkeypatch) -> None:
    """As `test_change_of_technique`, but hardware is the whole guest with KVM's APIC."""
    monkeypatch.setattr(assembly, "_kvm_crystal", lambda frequency: CRYSTAL)
    monkeypatch.setattr(assembly, "_kvm", lambda board, hardware, cpuid, keep_in: (
        KernelApicVcpu(board, hardware.cpu, cpuid, substitute=lambda own: make_vcpu("translation", board))
    ))
    path, snapshot = tmp_path / "kernel.elf", tmp_path / "snapshot"
    path.write_bytes(image())
    chance = random.Random(3)
    with VirtualMachine(path, memory="64M", technique="hardware", keep_translations=False) as machine:
        assert "its own local APIC" in machine.engine
        outcome = machine.run(timeout=0.3)
        for number in range(10):
            assert outcome.reason is StopReason.TIMEOUT
            machine.change_technique(("translation", "hardware")[number % 2])
            outcome = machine.run(timeout=chance.uniform(0.001, 0.02))
        machine.snapshot(snapshot)
    for technique in ("translation", "hardware"):
        with VirtualMachine.restore(snapshot, technique=technique, keep_translations=False) as machine:
            assert machine.run(timeout=0.02).reason is StopReason.TIMEOUT
            machine.snapshot(snapshot)
    with VirtualMachine.restore(snapshot, technique="translation", keep_translations=False) as machine:
        assert machine.run(timeout=120).status == STATUS, machine.output
        checksum, seen = result(machine)
        assert seen > 3
    with VirtualMachine(path, memory="64M", technique="translation", keep_translations=False) as machine:
        assert machine.run(timeout=120).status == STATUS, machine.output
        assert result(machine)[0] == checksum


class _Kvm(System):
    """One that has some capabilities, and no device."""

    def __init__(self, *has: str) -> None:
        self.has = has

    def capability(self, name: str) -> int:
        return name in self.has


def test_when_kvms_apic_serves() -> None:
    needed = kernel_apic._NEEDED
    old, new = _Kvm(*needed), _Kvm(*needed, "X86_APIC_BUS_CYCLES_NS")
    assert not why_not(old, 10**9) and not why_not(new, 10**9) and not why_not(new, 25_000_000)
    assert "25 MHz" in why_not(old, 25_000_000)
    assert "24 MHz" in why_not(new, 24_000_000)
    assert why_not(new, 500_000) and "SPLIT_IRQCHIP" in why_not(_Kvm("SIGNAL_MSI"), 10**9)
    assert crystal_for(old, 2_400_000_000) == 10**9
    for frequency in (2_400_000_000, 2_096_064_000, 3_293_787_123, 4_700_001_000, 1_000_300_007):
        crystal = crystal_for(new, frequency)
        denominator, numerator = tsc_ratio(frequency, crystal)
        assert 10**9 % crystal == 0 and 10**6 <= crystal < 10**8 and not why_not(new, crystal)
        assert abs(crystal * numerator / denominator / frequency - 1) < 1.1e-6
