"""The timer against the 82C54 data sheet."""

import random

import pytest

from trivisor.devices.pit import FREQUENCY, MINIMUM_PERIOD, Pit8254
from trivisor.machine.clock import Clock


class Bench:
    """A timer whose clock is moved by counts of its own input."""

    def __init__(self) -> None:
        self.ticks = 0
        self.extra = 0
        self.clock = Clock(lambda: -(-self.ticks * 1_000_000_000 // FREQUENCY) + self.extra)
        self.edges: list[bool] = []
        self.pit = Pit8254(self.clock, self.edges.append)

    def program(self, channel: int, mode: int, count: int, bcd: int = 0) -> None:
        self.pit.write(3, 1, channel << 6 | 0x30 | mode << 1 | bcd)
        self.pit.write(channel, 1, count & 0xFF)
        self.pit.write(channel, 1, count >> 8)

    def count(self, channel: int) -> int:
        self.pit.write(3, 1, channel << 6)
        return self.pit.read(channel, 1) | self.pit.read(channel, 1) << 8

    def status(self, channel: int) -> int:
        self.pit.write(3, 1, 0xE0 | 2 << channel)
        return self.pit.read(channel, 1)

    def output(self, channel: int) -> int:
        return self.status(channel) >> 7

    def gate(self, level: int) -> None:
        self.pit.speaker.write(0, 1, level)

    def run(self, ticks: int) -> int:
        """Move on pulse by pulse of the queue; return the rising edges of IRQ 0."""
        end = self.ticks + ticks
        before = self.edges.count(True)
        while self.ticks < end:
            deadline = self.clock.next_deadline()
            step = end if deadline is None else -(-deadline * FREQUENCY // 1_000_000_000)
            self.ticks = min(end, max(step, self.ticks + 1))
            self.clock.run_due()
        return self.edges.count(True) - before

    def wave(self, channel: int, length: int) -> str:
        """OUT over the next `length` pulses, starting with the one that loads the count."""
        levels = ""
        for _ in range(length):
            self.ticks += 1
            levels += str(self.output(channel))
        return levels


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_mode_0_goes_high_a_count_and_a_load_after_the_write(bench: Bench) -> None:
    bench.program(0, 0, 4)
    assert bench.output(0) == 0
    assert bench.wave(0, 7) == "0000111"


def test_mode_0_counts_on_through_zero(bench: Bench) -> None:
    bench.program(0, 0, 3)
    bench.ticks += 3
    assert bench.count(0) == 1
    bench.ticks += 2
    assert bench.count(0) == 0xFFFF


def test_mode_0_interrupts_once(bench: Bench) -> None:
    bench.program(0, 0, 1000)
    assert bench.run(1000) == 0
    assert bench.run(1) == 1
    assert bench.run(500_000) == 0
    assert bench.clock.next_deadline() is None


def test_mode_0_first_byte_of_a_new_count_stops_it(bench: Bench) -> None:
    bench.program(0, 0, 1000)
    bench.run(900)
    bench.pit.write(0, 1, 0)
    assert bench.run(1000) == 0
    bench.pit.write(0, 1, 1)
    assert bench.run(257) == 1


def test_mode_0_gate_suspends_counting(bench: Bench) -> None:
    bench.gate(1)
    bench.program(2, 0, 100)
    bench.ticks += 41
    bench.gate(0)
    bench.ticks += 1000
    assert bench.count(2) == 60
    bench.gate(1)
    bench.ticks += 59
    assert not bench.pit.speaker.read(0, 1) & 0x20
    bench.ticks += 1
    assert bench.pit.speaker.read(0, 1) & 0x20


def test_mode_1_is_a_retriggerable_one_shot(bench: Bench) -> None:
    bench.program(2, 1, 3)
    assert bench.wave(2, 3) == "111"
    bench.gate(1)
    assert bench.wave(2, 5) == "00011"
    bench.gate(0)
    bench.gate(1)
    assert bench.wave(2, 2) == "00"
    bench.gate(0)
    bench.gate(1)
    assert bench.wave(2, 5) == "00011"


def test_mode_2_is_low_for_the_last_pulse_of_each_period(bench: Bench) -> None:
    bench.program(0, 2, 3)
    assert bench.wave(0, 7) == "1101101"


def test_mode_2_interrupts_every_period(bench: Bench) -> None:
    bench.program(0, 2, 11932)
    bench.edges.clear()
    assert bench.run(11932 * 100 + 1) == 100


def test_mode_2_new_count_waits_for_the_end_of_the_period(bench: Bench) -> None:
    bench.program(0, 2, 1000)
    bench.run(501)
    bench.pit.write(0, 1, 0x10)
    bench.pit.write(0, 1, 0x27)
    assert bench.status(0) & 0x40  # null count: not in the counting element yet
    assert bench.count(0) == 500
    assert bench.run(500) == 1
    assert not bench.status(0) & 0x40
    assert bench.run(9999) == 0
    assert bench.run(1) == 1


def test_mode_2_gate_low_sets_output_high_and_rising_reloads(bench: Bench) -> None:
    bench.gate(1)
    bench.program(2, 2, 4)
    assert bench.wave(2, 4) == "1110"
    bench.gate(0)
    assert bench.output(2) == 1
    assert bench.wave(2, 5) == "11111"
    bench.gate(1)
    assert bench.wave(2, 5) == "11101"


@pytest.mark.parametrize(("count", "wave"), [(4, "110011001"), (5, "1110011100")])
def test_mode_3_is_a_square_wave(bench: Bench, count: int, wave: str) -> None:
    bench.program(0, 3, count)
    assert bench.wave(0, len(wave)) == wave


@pytest.mark.parametrize(("count", "values"), [(4, [4, 2, 4, 2, 4]), (5, [4, 2, 0, 4, 2, 4])])
def test_mode_3_counts_by_two(bench: Bench, count: int, values: list[int]) -> None:
    bench.program(0, 3, count)
    for value in values:
        bench.ticks += 1
        assert bench.count(0) == value


def test_mode_3_new_count_takes_the_next_half(bench: Bench) -> None:
    bench.program(0, 3, 8)
    assert bench.wave(0, 2) == "11"
    bench.pit.write(0, 1, 4)
    bench.pit.write(0, 1, 0)
    assert bench.wave(0, 8) == "11001100"
    assert bench.run(1) == 1


def test_mode_4_strobes_low_for_one_pulse(bench: Bench) -> None:
    bench.program(0, 4, 3)
    assert bench.wave(0, 7) == "1110111"


def test_mode_4_interrupts_once_per_count(bench: Bench) -> None:
    bench.program(0, 4, 500)
    bench.edges.clear()
    assert bench.run(501) == 0
    assert bench.run(1) == 1
    assert bench.run(200_000) == 0
    bench.pit.write(0, 1, 0xF4)
    bench.pit.write(0, 1, 0x01)
    assert bench.run(502) == 1


def test_mode_5_strobes_after_a_trigger(bench: Bench) -> None:
    bench.program(2, 5, 2)
    assert bench.wave(2, 4) == "1111"
    bench.gate(1)
    assert bench.wave(2, 5) == "11011"


def test_bcd_counts_in_decimal(bench: Bench) -> None:
    bench.program(0, 2, 0x1000, bcd=1)
    bench.ticks += 2
    assert bench.count(0) == 0x0999
    bench.program(0, 0, 0, bcd=1)
    bench.ticks += 2
    assert bench.count(0) == 0x9999


def test_zero_means_65536(bench: Bench) -> None:
    bench.program(0, 2, 0)
    assert bench.run(65536) == 0
    assert bench.run(1) == 1


def test_latch_holds_until_read_and_reprogramming_drops_it(bench: Bench) -> None:
    bench.program(0, 2, 5000)
    bench.ticks += 1001
    bench.pit.write(3, 1, 0x00)
    bench.ticks += 1000
    bench.pit.write(3, 1, 0x00)  # ignored: one is there
    assert (bench.pit.read(0, 1), bench.pit.read(0, 1)) == (4000 & 0xFF, 4000 >> 8)
    assert bench.count(0) == 3000
    bench.pit.write(3, 1, 0x00)
    bench.program(0, 2, 0x1234)
    bench.ticks += 1
    assert (bench.pit.read(0, 1), bench.pit.read(0, 1)) == (0x34, 0x12)


def test_single_byte_access(bench: Bench) -> None:
    bench.pit.write(3, 1, 0x14)  # counter 0, low byte, mode 2
    bench.pit.write(0, 1, 100)
    bench.ticks += 11
    assert [bench.pit.read(0, 1) for _ in range(2)] == [90, 90]
    bench.pit.write(3, 1, 0x24)  # high byte
    bench.pit.write(0, 1, 2)
    bench.ticks += 2
    assert bench.pit.read(0, 1) == 1
    bench.pit.write(3, 1, 0x00)
    assert bench.pit.read(0, 1) == 1


def test_read_back_gives_status_before_count(bench: Bench) -> None:
    bench.program(1, 3, 0x1000)
    bench.program(0, 2, 0x2000)
    bench.ticks += 1
    bench.pit.write(3, 1, 0xC6)  # count and status of 0 and 1
    assert [bench.pit.read(0, 1) for _ in range(3)] == [0xB4, 0x00, 0x20]
    assert [bench.pit.read(1, 1) for _ in range(3)] == [0xB6, 0x00, 0x10]


def test_linux_calibrates_by_counter_2(bench: Bench) -> None:
    bench.gate((bench.pit.speaker.read(0, 1) & ~2 & 0x0F) | 1)
    latch = FREQUENCY // 100
    bench.program(2, 0, latch)
    assert not bench.pit.speaker.read(0, 1) & 0x20
    bench.ticks += latch
    assert not bench.pit.speaker.read(0, 1) & 0x20
    bench.ticks += 1
    assert bench.pit.speaker.read(0, 1) & 0x23 == 0x21


def test_refresh_bit_toggles_every_15_microseconds(bench: Bench) -> None:
    levels = []
    for _ in range(72):
        levels.append(bench.pit.speaker.read(0, 1) >> 4 & 1)
        bench.ticks += 1
    assert levels == ([0] * 18 + [1] * 18) * 2


def test_late_timer_gives_one_edge_and_looks_ahead(bench: Bench) -> None:
    bench.program(0, 2, 1193)
    bench.edges.clear()
    bench.ticks += 1193 * 1000 + 600
    bench.clock.run_due()
    assert bench.edges.count(True) == 1
    deadline = bench.clock.next_deadline()
    assert deadline is not None and bench.clock.now() < deadline <= bench.clock.now() + 1_000_000


@pytest.mark.parametrize("mode", [2, 3])
def test_tiny_period_does_not_storm(bench: Bench, mode: int) -> None:
    bench.program(0, mode, 1)
    bench.ticks += 5
    for _ in range(20):
        bench.clock.run_due()
        deadline = bench.clock.next_deadline()
        assert deadline is not None and deadline >= bench.clock.now() + MINIMUM_PERIOD - 1000
        bench.ticks += 1 + MINIMUM_PERIOD * FREQUENCY // 1_000_000_000


def test_reprogramming_does_not_pile_up_timers(bench: Bench) -> None:
    for value in range(10_000):
        bench.program(0, 0, 0xFFFF)
        bench.program(0, 4, 0xFF00 + (value & 0xFF))
    assert len(bench.clock._queue) < 300


def test_random_accesses_are_survived(bench: Bench) -> None:
    chance = random.Random(8254)
    for _ in range(3000):
        bench.ticks += chance.choice((0, 1, 3, 70_000))
        offset, size = chance.randrange(4), chance.choice((1, 2, 4))
        bench.pit.write(offset, size, chance.getrandbits(8 * size))
        bench.gate(chance.getrandbits(8))
        assert 0 <= bench.pit.read(offset, size) < 1 << 8 * size
        bench.clock.run_due()
