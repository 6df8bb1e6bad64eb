"""The local APIC's state into KVM's register page and out of it, against the board's own device."""

from __future__ import annotations

import random

import pytest

from trivisor.devices.local_apic import GLOBAL_ENABLE, X2APIC_ENABLE, LocalApic
from trivisor.hardware.kvm import apic_page
from trivisor.machine.clock import Clock

CRYSTAL, TSC = 25_000_000, 2_400_000_000
LEVELS = {"lint0_level": False, "lint1_level": False}


class Bench:
    def __init__(self) -> None:
        self.now = 1_000_000
        self.clock = Clock(lambda: self.now)
        self.apic = LocalApic(self.clock, 0, lambda: self.now * 12 // 5, TSC, CRYSTAL)

    def page(self) -> bytes:
        return apic_page.to_page(self.apic.save(), self.clock.now(), CRYSTAL)

    def back(self, page: bytes, deadline: int = 0) -> None:
        before = self.apic.save()
        self.apic.load(apic_page.from_page(page, before, before["base"], deadline, self.clock.now(), CRYSTAL))


def register(page: bytes, number: int) -> int:
    return int.from_bytes(page[16 * number : 16 * number + 4], "little")


@pytest.mark.parametrize("seed", range(40))
def test_there_and_back(seed: int) -> None:
    chance = random.Random(seed)
    bench = Bench()
    apic = bench.apic
    apic.enter_virtual_wire_mode()
    if x2apic := seed % 2:
        apic.write_base(apic.read_base() | X2APIC_ENABLE)
        apic.write_msr(0x830, chance.getrandbits(32) << 32 | 0x40)
    else:
        for number, bits in ((0x2, 32), (0xD, 32), (0xE, 32), (0x31, 32)):
            apic.write(16 * number, 4, chance.getrandbits(bits))
    apic.cr8 = chance.randrange(16)
    for _ in range(6):
        apic.deliver(chance.randrange(16, 256), 0, chance.random() < 0.5)
    if apic.pending():
        apic.acknowledge()
    for number in range(0x32, 0x38):
        value = chance.choice((0x10000, 0)) | chance.randrange(16, 256)
        apic.write_msr(0x800 + number, value) if x2apic else apic.write(16 * number, 4, value)
    before = apic.save()
    page = bench.page()
    assert len(page) == apic_page.SIZE
    bench.apic = LocalApic(bench.clock, 0, lambda: 0, TSC, CRYSTAL)
    bench.apic.load(apic_page.from_page(page, before, before["base"], 0, bench.clock.now(), CRYSTAL))
    after = bench.apic.save()
    assert {**after, "errors": 0} == {**before, "errors": 0}


def test_a_register_where_the_manual_has_it() -> None:
    bench = Bench()
    bench.apic.enter_virtual_wire_mode()
    bench.apic.cr8 = 3
    bench.apic.deliver(0x45, 0, False)
    page = bench.page()
    assert register(page, 0x8) == 0x30
    assert register(page, 0xF) == 0x1FF
    assert register(page, 0x20 + 0x45 // 32) == 1 << 0x45 % 32
    assert register(page, 0x35) == 0x700 and register(page, 0x36) == 0x400


@pytest.mark.parametrize("mode", [apic_page.ONE_SHOT, apic_page.PERIODIC])
@pytest.mark.parametrize("divide", [0, 3, 0xA, 0xB])
def test_what_is_left_of_a_count(mode: int, divide: int) -> None:
    bench = Bench()
    apic = bench.apic
    apic.enter_virtual_wire_mode()
    apic.write(0x3E0, 4, divide)
    apic.write(0x320, 4, mode << 17 | 0x40)
    apic.write(0x380, 4, 100_000)
    bench.now += 300_000
    left = apic.read(0x390, 4)
    page = bench.page()
    assert register(page, 0x39) == left and register(page, 0x38) == 100_000
    bench.back(page)
    assert abs(apic.read(0x390, 4) - left) <= 1
    bench.now += bench.clock.next_deadline() - bench.clock.now()
    bench.clock.run_due()
    assert apic.save()["irr"] == 1 << 0x40
    assert bool(bench.clock.next_deadline()) == (mode == apic_page.PERIODIC)


def test_a_count_that_is_over_does_not_run_out_again() -> None:
    bench = Bench()
    apic = bench.apic
    apic.enter_virtual_wire_mode()
    apic.write(0x320, 4, 0x40)
    apic.write(0x380, 4, 10)
    bench.now += 1_000_000
    bench.clock.run_due()
    page = bench.page()
    assert register(page, 0x38) == register(page, 0x39) == 0
    bench.back(page)
    assert bench.clock.next_deadline() is None


def test_one_that_is_just_over_still_runs_out() -> None:
    bench = Bench()
    apic = bench.apic
    apic.enter_virtual_wire_mode()
    apic.write(0x320, 4, 0x40)
    apic.write(0x380, 4, 10)
    bench.now += 1_000_000
    assert register(bench.page(), 0x39) == 1


def test_a_deadline_is_the_msr() -> None:
    bench = Bench()
    apic = bench.apic
    apic.enter_virtual_wire_mode()
    apic.write(0x320, 4, apic_page.TSC_DEADLINE << 17 | 0x40)
    deadline = bench.now * 12 // 5 + 2_400_000
    apic.write_tsc_deadline(deadline)
    assert apic.save()["timer"]["deadline"] == deadline
    page = bench.page()
    assert register(page, 0x38) == 0
    bench.back(page, deadline)
    apic.tsc_changed()
    assert apic.read_tsc_deadline() == deadline
    bench.now += 1_000_001
    bench.clock.run_due()
    assert apic.save()["irr"] == 1 << 0x40


@pytest.mark.parametrize("seed", range(20))
def test_no_page_of_kvms_is_too_much(seed: int) -> None:
    bench = Bench()
    chance = random.Random(seed)
    bench.back(chance.randbytes(apic_page.SIZE), chance.getrandbits(64))
    bench.apic.tsc_changed()
    bench.apic.pending()
    bench.now += 1 << 40
    bench.clock.run_due()


def test_a_retired_apic_only_passes_on() -> None:
    bench = Bench()
    apic = bench.apic
    apic.enter_virtual_wire_mode()
    apic.write(0x320, 4, 1 << 17 | 0x40)
    apic.write(0x380, 4, 1000)
    apic.deliver(0x50, 0, False)
    saved, sent = apic.save(), []

    def elsewhere(*message: object) -> bool:
        sent.append(message)
        return True

    apic.retire(elsewhere)
    assert not apic.pending() and bench.clock.next_deadline() is None
    assert apic.message(1, True, 0x60, 1, True) and apic.deliver(0x61, 0, False)
    assert sent == [(1, True, 0x60, 1, True), (0xFF, False, 0x61, 0, False)]
    assert not apic.read_base() & GLOBAL_ENABLE
    apic.load(saved)
    assert apic.pending() and apic.acknowledge() == 0x50
    apic.message(0, False, 0x62, 0, False)
    assert len(sent) == 2 and apic.save()["irr"] == 1 << 0x62
