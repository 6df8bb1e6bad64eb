"""The I/O APIC against the 82093AA data sheet."""

from __future__ import annotations

import random

import pytest

from trivisor.devices.io_apic import IoApic

SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
MASKED, LEVEL, REMOTE_IRR, LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 11


class Bench:
    def __init__(self) -> None:
        self.accepts = True
        self.messages: list[tuple[int, bool, int, int, bool]] = []
        self.chip = IoApic(self._deliver)

    def _deliver(self, destination: int, logical: bool, vector: int, mode: int, level: bool) -> bool:
        self.messages.append((destination, logical, vector, mode, level))
        return self.accepts

    def get(self, register: int) -> int:
        self.chip.write(SELECT, 4, register)
        return self.chip.read(WINDOW, 4)

    def put(self, register: int, value: int) -> None:
        self.chip.write(SELECT, 4, register)
        self.chip.write(WINDOW, 4, value)

    def route(self, pin: int, low: int, high: int = 0) -> None:
        self.put(0x11 + 2 * pin, high)
        self.put(0x10 + 2 * pin, low)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_reset_state(bench: Bench) -> None:
    assert bench.get(1) == 0x0017_0020
    assert bench.get(0) == 0
    assert [bench.get(register) for register in range(0x10, 0x40)] == [MASKED, 0] * 24


def test_identification(bench: Bench) -> None:
    bench.put(0, 0xFFFFFFFF)
    assert bench.get(0) == 0x0F000000 and bench.get(2) == 0x0F000000


def test_read_only_bits_of_an_entry(bench: Bench) -> None:
    bench.route(23, 0xFFFFFFFF, 0xFFFFFFFF)
    assert bench.get(0x3E) == 0x1AFFF and bench.get(0x3F) == 0xFF000000


def test_edge(bench: Bench) -> None:
    bench.route(4, 0x34 | LOGICAL, 0x01000000)
    line = bench.chip.line(4)
    line(True)
    line(True)
    assert bench.messages == [(1, True, 0x34, 0, False)]
    line(False)
    line(True)
    assert len(bench.messages) == 2
    assert not bench.get(0x18) & REMOTE_IRR


def test_edge_on_a_masked_pin_is_lost(bench: Bench) -> None:
    bench.route(4, 0x34 | MASKED)
    line = bench.chip.line(4)
    line(True)
    bench.route(4, 0x34)
    assert bench.messages == []
    line(False)
    line(True)
    assert len(bench.messages) == 1


def test_level_repeats_after_the_end_of_interrupt_only(bench: Bench) -> None:
    bench.route(9, 0x39 | LEVEL)
    line = bench.chip.line(9)
    line(True)
    assert bench.messages == [(0, False, 0x39, 0, True)] and bench.get(0x22) & REMOTE_IRR
    line(False)
    line(True)
    assert len(bench.messages) == 1
    bench.chip.end_of_interrupt(0x38)
    assert len(bench.messages) == 1
    bench.chip.end_of_interrupt(0x39)
    assert len(bench.messages) == 2, "still asserted"
    line(False)
    bench.chip.end_of_interrupt(0x39)
    assert len(bench.messages) == 2 and not bench.get(0x22) & REMOTE_IRR


def test_level_waits_for_the_unmasking(bench: Bench) -> None:
    bench.route(9, 0x39 | LEVEL | MASKED)
    bench.chip.line(9)(True)
    assert bench.messages == []
    bench.put(0x22, 0x39 | LEVEL)
    assert len(bench.messages) == 1


def test_remote_irr_needs_acceptance(bench: Bench) -> None:
    bench.accepts = False
    bench.route(9, 0x39 | LEVEL)
    bench.chip.line(9)(True)
    assert not bench.get(0x22) & REMOTE_IRR


def test_a_turn_as_edge_ends_a_level_interrupt(bench: Bench) -> None:
    bench.route(9, 0x39 | LEVEL)
    bench.chip.line(9)(True)
    bench.put(0x22, 0x39 | MASKED)
    assert not bench.get(0x22) & REMOTE_IRR
    bench.put(0x22, 0x39 | LEVEL)
    assert len(bench.messages) == 2


def test_eoi_register(bench: Bench) -> None:
    bench.route(9, 0x39 | LEVEL)
    line = bench.chip.line(9)
    line(True)
    line(False)
    bench.chip.write(EOI, 4, 0x39)
    assert not bench.get(0x22) & REMOTE_IRR


def test_level_nmi_knows_no_end_of_interrupt(bench: Bench) -> None:
    bench.route(9, 0x400 | LEVEL)
    bench.chip.line(9)(True)
    assert bench.messages == [(0, False, 0, 4, True)] and not bench.get(0x22) & REMOTE_IRR


def test_no_such_pin(bench: Bench) -> None:
    with pytest.raises(ValueError, match="24"):
        bench.chip.line(24)


def test_hostile_accesses(bench: Bench) -> None:
    generator = random.Random(24)
    for _ in range(5000):
        size = generator.choice((1, 2, 4, 8))
        offset = generator.choice((SELECT, WINDOW, EOI, generator.randrange(0x1000)))
        bench.chip.write(offset, size, generator.getrandbits(8 * size))
        assert 0 <= bench.chip.read(offset, size) < 1 << 8 * size
        bench.chip.line(generator.randrange(24))(bool(generator.getrandbits(1)))
    assert all(vector < 256 and destination < 256 for destination, _, vector, _, _ in bench.messages)
