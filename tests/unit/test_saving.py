"""Every part of the board, its state taken out and put into another board: nothing is lost and nothing is new.

The theory: if what is saved is all that a device remembers, then two boards, one
of which has the other's state, cannot be told apart by anything that a guest
does to them afterwards.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.machine.clock import Clock
from trivisor.machine.memory import MIB, GuestMemory
from trivisor.machine.saving import Remembers, Saved
from trivisor.machine.vcpu import GeneralProtection
from trivisor.pc import Pc

IO_APIC, LOCAL_APIC, TEST_MEMORY = 0xFEC00000, 0xFEE00000, 0xFF000000
WINDOWS = {
    "first 8259A": [(0x20, 2), (0x4D0, 1)],
    "both 8259A": [(0x20, 2), (0xA0, 2), (0x4D0, 2)],
    "8254": [(0x40, 4), (0x61, 1)],
    "i8042": [(0x60, 1), (0x64, 1)],
    "port 92": [(0x92, 1)],
    "clock chip": [(0x70, 2)],
    "POST": [(0x80, 1)],
    "serial port": [(0x3F8, 8)],
    "fw_cfg": [(0x510, 2)],
    "power management": [(0x600, 16)],
    "PCI": [(0xCF8, 8)],
    "test device": [(0xE0, 16), (0x2000, 24)],
    "local APIC": [],
    "I/O APIC": [],
}
MMIO = {
    "local APIC": [(LOCAL_APIC, 0x400, 16)],
    "I/O APIC": [(IO_APIC, 0x20, 16)],
    "test device": [(TEST_MEMORY, 0x1000, 4)],
}
WINDOWS["everything"] = [window for windows in WINDOWS.values() for window in windows]
MMIO["everything"] = [window for windows in MMIO.values() for window in windows]


class Machine:
    """A board on a host clock of its own."""

    def __init__(self, now: int = 0) -> None:
        self.now = now
        self.memory = GuestMemory(16 * MIB)
        self.output = bytearray()
        self.pc = Pc(
            self.memory,
            Clock(lambda: self.now),
            serial_output=self.output.extend,
            tsc=lambda: self.now * 2,
            tsc_frequency=2_000_000_000,
            on_stop=lambda: None,
            test_device=True,
            wall_time=lambda: self.now / 1e9,
        )

    def do(self, generator: random.Random, which: str) -> list[object]:
        """Something that a guest, or whoever types, may do; returns all that can be seen of it."""
        pc = self.pc
        size = generator.choice((1, 1, 2, 4))
        value = generator.getrandbits(8 * size)
        kind = generator.randrange(12)
        seen: list[object] = []
        if kind < 8:
            bus, (address, write) = pc.ports, self._port(generator, which)
            if MMIO.get(which) and (not WINDOWS[which] or generator.random() < 0.5):
                bus, (address, write) = pc.mmio, self._register(generator, which)
                size = 4
            if write:
                bus.write(address, size, value)
            else:
                seen.append(bus.read(address, size))
        elif kind == 8:
            index = generator.choice((0x1B, 0x6E0, *range(0x800, 0x840)))
            seen.append(self._msr(index, generator.choice((None, value, 0xFEE00D00, 0xFEE00900))))
        elif kind == 9:
            seen.append(pc.console_input(bytes(generator.randrange(40))))
        elif kind == 10 and pc.interrupts.pending():
            seen.append(pc.interrupts.acknowledge())
        else:
            self.now += generator.choice((1, 1_000, 100_000, 3_000_000, 700_000_000))
            pc.clock.run_due()
        seen += [bytes(self.output), pc.interrupts.pending(), pc.interrupts.cr8]
        self.output.clear()
        return seen

    def _port(self, generator: random.Random, which: str) -> tuple[int, bool]:
        base, length = generator.choice(WINDOWS[which] or [(0x80, 1)])
        return base + generator.randrange(length), generator.random() < 0.6

    def _register(self, generator: random.Random, which: str) -> tuple[int, bool]:
        base, length, step = generator.choice(MMIO[which])
        return base + generator.randrange(0, length, step), generator.random() < 0.6

    def _msr(self, index: int, value: int | None) -> int | None:
        read, write = self.pc.msrs[index]
        try:
            if value is None:
                return read()
            write(value)
        except GeneralProtection:
            return -1
        return None

    def save(self) -> Saved:
        """As a file would have it."""
        saved: Saved = json.loads(json.dumps(self.pc.save()))
        return saved

    def load(self, saved: Saved) -> None:
        self.pc.load(saved)
        self.pc.tsc_changed()  # as a processor says that has its own


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32))
@pytest.mark.parametrize("which", WINDOWS)
def test_a_board_with_the_state_of_another_cannot_be_told_from_it(which: str, seed: int) -> None:
    generator = random.Random(seed)
    first = Machine()
    second = Machine()
    try:
        for _ in range(generator.randrange(200)):
            first.do(generator, which)
        second.now = first.now  # the host's clock goes on between saving and loading
        saved = first.save()
        second.load(saved)
        assert second.save() == saved
        now = generator.getrandbits(32)
        for step in range(200):
            one, other = (machine.do(random.Random(now + step), which) for machine in (first, second))
            assert one == other, step
        assert second.save() == first.save()
    finally:
        first.memory.close()
        second.memory.close()


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    pair = Machine(), Machine(now=10**15)
    yield pair
    for machine in pair:
        machine.memory.close()


def test_guest_time_goes_on_from_where_it_was(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    first.now = 5_000
    second.load(first.save())
    assert second.pc.clock.now() == 5_000
    second.now += 7
    assert second.pc.clock.now() == 5_007


def test_timers_fire_when_they_were_to(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    for port, value in ((0x43, 0x30), (0x40, 0x00), (0x40, 0x40)):  # one pulse in 0x4000 ticks: 13.7 ms
        first.pc.ports.write(port, 1, value)
    first.now += 10_000_000
    second.load(first.save())
    assert not second.pc.pic.master.irr & 1
    second.now += 3_000_000
    second.pc.clock.run_due()
    assert not second.pc.pic.master.irr & 1
    second.now += 1_000_000
    second.pc.clock.run_due()
    assert second.pc.pic.master.irr & 1


def test_the_date_is_the_hosts_after_a_pause(machines: tuple[Machine, Machine]) -> None:
    """The clock chip has its battery: what was 3 s fast is 3 s fast, a million seconds later."""
    first, second = machines
    first.pc.cmos._offset += 3_000_000_000
    second.load(first.save())
    assert second.pc.cmos._now() == second.now + 3_000_000_000


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.pop("clock"),
        lambda saved: saved["clock"].update(elapsed="soon"),
        lambda saved: saved["clock"].update(elapsed=1.5),
        lambda saved: saved.update(pic=[]),
        lambda saved: saved["pic"]["master"].update(awaited=3),
        lambda saved: saved["devices"].pop(),
        lambda saved: saved["devices"].append({}),
        lambda saved: saved["devices"][2].update(ram="00"),
        lambda saved: saved["devices"][2].update(ram="xy"),
        lambda saved: saved["local_apic"].update(lvt={"x": 1}),
    ],
)
def test_what_is_no_state_of_a_board_is_refused(change: object, machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    saved = first.save()
    change(saved)  # type: ignore[operator]
    with pytest.raises(ValueError):
        second.load(saved)


def test_only_plain_values_are_saved() -> None:
    class Part(Remembers):
        remembered = ("thing",)
        thing = object()

    with pytest.raises(TypeError, match="object"):
        Part().save()
