"""The real-time clock against the MC146818A data sheet."""

import calendar
import random

import pytest

from trivisor.devices.cmos import Cmos
from trivisor.machine.clock import Clock

SECOND = 1_000_000_000
MS = 1_000_000
GIB = 1 << 30
START = calendar.timegm((2024, 2, 28, 23, 59, 58))  # a Wednesday


class Bench:
    """An RTC whose time starts at START."""

    def __init__(self, start: float = START, low_memory: int = 512 << 20, high_memory: int = 0) -> None:
        self.time = 12345
        self.clock = Clock(lambda: self.time)
        self.edges: list[bool] = []
        self.cmos = Cmos(self.clock, self.edges.append, low_memory, high_memory, wall_time=lambda: start)

    def __getitem__(self, index: int) -> int:
        self.cmos.write(0, 1, index)
        return self.cmos.read(1, 1)

    def __setitem__(self, index: int, value: int) -> None:
        self.cmos.write(0, 1, index)
        self.cmos.write(1, 1, value)

    def date(self) -> tuple[int, ...]:
        """Century, year, month, day, weekday, hours, minutes, seconds as they read."""
        return tuple(self[index] for index in (0x32, 9, 8, 7, 6, 4, 2, 0))

    def run(self, nanoseconds: int) -> int:
        """Move on timer by timer; return the rising edges of IRQ 8."""
        end = self.time + nanoseconds
        before = self.edges.count(True)
        while (deadline := self.clock.next_deadline()) is not None and deadline <= end - 12345:
            self.time = max(self.time, deadline + 12345)
            self.clock.run_due()
        self.time = end
        return self.edges.count(True) - before


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_date_in_bcd_and_over_a_leap_day(bench: Bench) -> None:
    assert bench.date() == (0x20, 0x24, 0x02, 0x28, 4, 0x23, 0x59, 0x58)
    bench.run(2 * SECOND)
    assert bench.date() == (0x20, 0x24, 0x02, 0x29, 5, 0x00, 0x00, 0x00)
    bench.run(86400 * SECOND)
    assert bench.date()[2:5] == (0x03, 0x01, 6)


def test_binary_and_twelve_hour_formats(bench: Bench) -> None:
    bench[0x0B] = 0x06
    assert bench.date() == (20, 24, 2, 28, 4, 23, 59, 58)
    bench[0x0B] = 0x00
    assert bench[4] == 0x91
    bench.run(2 * SECOND)
    assert bench[4] == 0x12
    bench.run(12 * 3600 * SECOND)
    assert bench[4] == 0x92


def test_registers_at_switch_on(bench: Bench) -> None:
    assert (bench[0x0A], bench[0x0B], bench[0x0C], bench[0x0D]) == (0x26, 0x02, 0x00, 0x80)
    bench[0x0D] = 0
    bench[0x0C] = 0xFF
    assert (bench[0x0C], bench[0x0D]) == (0x00, 0x80)


def test_update_in_progress_precedes_the_second(bench: Bench) -> None:
    assert not bench[0x0A] & 0x80
    bench.run(SECOND - 2_228_001)
    assert not bench[0x0A] & 0x80
    bench.run(1)
    assert bench[0x0A] & 0x80
    seconds = bench[0]
    bench.run(2_228_000)
    assert not bench[0x0A] & 0x80
    assert bench[0] == seconds + 1


def test_setting_the_clock_under_set(bench: Bench) -> None:
    bench[0x0B] = 0x82
    for index, value in ((0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x50)):
        bench[index] = value
    bench.run(30 * SECOND)
    assert bench.date()[-1] == 0x50  # it stands
    assert not bench[0x0A] & 0x80
    bench[0x0B] = 0x02
    bench.run(10 * SECOND)
    assert bench.date() == (0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0)


def test_divider_reset_starts_half_a_second_before_the_update(bench: Bench) -> None:
    bench.run(300 * MS)
    bench[0x0B] = 0x82  # as Linux's mc146818_set_time does
    bench[0x0A] = 0x76
    bench[0] = 0x10
    bench[0x0B] = 0x02
    bench.run(3 * SECOND)
    assert bench[0] == 0x10
    bench[0x0A] = 0x26
    bench.run(499 * MS)
    assert bench[0] == 0x10
    bench.run(2 * MS)
    assert bench[0] == 0x11


def test_writing_a_running_clock(bench: Bench) -> None:
    bench[2] = 0x30
    assert bench.date()[-3:] == (0x23, 0x30, 0x58)
    bench.run(SECOND)
    assert bench[0] == 0x59


@pytest.mark.parametrize("value", [0x00, 0x3C, 0xAA, 0xFF])
def test_nonsense_becomes_a_date(bench: Bench, value: int) -> None:
    bench[0x0B] = 0x82
    for index in (0x32, 9, 8, 7, 6, 4, 2, 0):
        bench[index] = value
    bench[0x0B] = 0x02
    bench.run(SECOND)
    _, _, month, day, weekday, hour, minute, second = bench.date()
    assert 1 <= month <= 0x12 and 1 <= day <= 0x31 and 1 <= weekday <= 7
    assert hour <= 0x23 and minute <= 0x59 and second <= 0x59


def test_update_interrupt_and_register_c(bench: Bench) -> None:
    bench[0x0B] = 0x12
    assert bench.run(SECOND - 1) == 0
    assert bench.run(1) == 1
    assert bench.run(5 * SECOND) == 0  # the wire stays high until register C is read
    assert bench[0x0C] & 0x90 == 0x90
    assert bench.edges[-1] is False
    assert bench[0x0C] == 0
    assert bench.run(SECOND) == 1


def test_flags_are_set_without_being_enabled(bench: Bench) -> None:
    bench.run(SECOND)
    assert bench[0x0C] & 0xD0 == 0x50
    assert bench.edges == [] and bench.clock.next_deadline() is None


def test_set_clears_update_interrupt_enable(bench: Bench) -> None:
    bench[0x0B] = 0x92
    assert bench[0x0B] == 0x82


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_periodic_interrupt_rates(bench: Bench, rate: int, hertz: int) -> None:
    bench[0x0A] = 0x20 | rate
    bench[0x0B] = 0x42
    bench[0x0C]
    count = 0
    end = bench.time + SECOND // 2
    while (deadline := bench.clock.next_deadline()) is not None and deadline + 12345 <= end:
        bench.run(deadline + 12345 - bench.time)
        count += bench[0x0C] & 0xC0 == 0xC0
    assert abs(count - hertz // 2) <= 1


def test_periodic_rate_zero_is_off(bench: Bench) -> None:
    bench[0x0A] = 0x20
    bench[0x0B] = 0x42
    assert bench.run(5 * SECOND) == 0
    assert not bench[0x0C] & 0x40


def test_alarm_once_a_day(bench: Bench) -> None:
    bench[5], bench[3], bench[1] = 0x00, 0x01, 0x05
    bench[0x0B] = 0x22
    assert bench.run(67 * SECOND - 1) == 0
    assert bench.run(1) == 1
    assert bench[0x0C] & 0xA0 == 0xA0
    assert bench.run(86400 * SECOND - 1) == 0
    assert bench.run(1) == 1


@pytest.mark.parametrize(
    ("alarm", "first", "second"),
    [
        ((0xFF, 0xFF, 0xFF), 1, 1),
        ((0xC0, 0xC0, 0x30), 32, 60),
        ((0xFF, 0x15, 0x00), 15 * 60 + 2, 3600),
        ((0x01, 0xFF, 0x59), 3600 + 61, 60),
        ((0x23, 0x59, 0xFF), 1, 86400 - 59),
    ],
)
def test_alarm_wildcards(bench: Bench, alarm: tuple[int, int, int], first: int, second: int) -> None:
    bench[5], bench[3], bench[1] = alarm
    bench[0x0B] = 0x22
    for delay in (first, second):
        assert bench.run(delay * SECOND - 1) == 0
        assert bench.run(1) == 1
        assert bench[0x0C] & 0x20


def test_alarm_in_twelve_hour_format(bench: Bench) -> None:
    bench[0x0B] = 0x00
    bench[5], bench[3], bench[1] = 0x81, 0x00, 0x00  # 1 p.m.
    bench[0x0B] = 0x20
    assert bench.run((13 * 3600 + 2) * SECOND - 1) == 0
    assert bench.run(1) == 1


def test_impossible_alarm_never_rings(bench: Bench) -> None:
    bench[5], bench[3], bench[1] = 0x30, 0x00, 0x00
    bench[0x0B] = 0x22
    assert bench.clock.next_deadline() is None


def test_memory_sizes() -> None:
    bench = Bench(low_memory=3 * GIB, high_memory=5 * GIB)
    assert bench[0x15] | bench[0x16] << 8 == 640
    assert bench[0x17] | bench[0x18] << 8 == 0xFFFF == bench[0x30] | bench[0x31] << 8
    assert bench[0x34] | bench[0x35] << 8 == (3 * GIB >> 16) - 256
    assert bench[0x5B] | bench[0x5C] << 8 | bench[0x5D] << 16 == 5 * GIB >> 16
    small = Bench(low_memory=16 << 20)
    assert small[0x30] | small[0x31] << 8 == 15 << 10
    assert small[0x34] | small[0x35] << 8 == 0
    assert small[0x2E] << 8 | small[0x2F] == sum(small[index] for index in range(0x10, 0x2E))


def test_ram_keeps_bytes_and_the_nmi_bit_is_no_index(bench: Bench) -> None:
    bench[0x80 | 0x0F] = 0x0A
    assert bench[0x0F] == 0x0A
    bench[0x7F] = 0x55
    assert bench[0xFF] == 0x55


def test_random_accesses_are_survived(bench: Bench) -> None:
    chance = random.Random(146818)
    for _ in range(3000):
        bench.time += chance.choice((0, MS, SECOND, 100_000 * SECOND))
        bench[chance.choice((*range(16), 0x32))] = chance.getrandbits(8)
        assert 0 <= bench[chance.randrange(16)] <= 255
        bench.clock.run_due()
        bench.cmos.write(chance.randrange(2), 4, chance.getrandbits(32))
        bench.cmos.read(chance.randrange(2), 4)
    assert len(bench.clock._queue) < 100
