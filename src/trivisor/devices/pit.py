"""The 8254 programmable interval timer of a PC and its speaker port.

Source: Intel 82C54 data sheet (231244-006).  A channel is not counted down:
its output and count are worked out from the time since it was loaded.
"""

from __future__ import annotations

from trivisor.devices.bytewise import ByteDevice
from trivisor.machine.clock import Clock, Timer
from trivisor.machine.interrupts import Line
from trivisor.machine.saving import Remembers

FREQUENCY = 1_193_182
"""Hz of the counters' clock input."""
MINIMUM_PERIOD = 50_000
"""Nanoseconds; interrupts never come faster, whatever period the guest asks for."""
_SECOND = 1_000_000_000
_REFRESH_TICKS = 18  # of channel 1, as every BIOS sets it: 15 us


def _ticks_to_ns(ticks: int) -> int:
    """The first nanosecond at which `ticks` clock pulses have passed."""
    return -(-ticks * _SECOND // FREQUENCY)


def _from_bcd(value: int) -> int:
    return sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(4))


def _to_bcd(value: int) -> int:
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))


class Channel(Remembers):
    """One counter.  Times are in pulses of the clock input since the machine was switched on.

    `start` is the pulse that loaded the counting element with `count`; it lies
    one ahead when that is yet to come.  While counting is suspended, `held`
    keeps how many pulses it had counted.
    """

    remembered = (
        "gate", "mode", "count", "start", "held", "_reload", "_reload_at", "_control", "_low_byte",
        "_high_byte_next", "_latched_count", "_latched_status",
    )  # fmt: skip

    def __init__(self, gate: bool) -> None:
        self.gate = gate
        self.mode = 0
        self.count = 0x10000
        self.start: int | None = None
        self.held: int | None = None
        self._reload: int | None = None  # the count register, once written
        self._reload_at: int | None = None  # modes 2 and 3: when it replaces `count`
        self._control = 0x30
        self._low_byte: int | None = None  # of a two-byte write that is not complete
        self._high_byte_next = False
        self._latched_count: list[int] = []
        self._latched_status: int | None = None

    # Writing

    def control(self, value: int) -> None:
        """A control word for this counter, other than a latch command."""
        self._control = value & 0x3F
        mode = value >> 1 & 7
        self.mode = mode & 3 if mode > 5 else mode
        self.start = self.held = self._reload = self._reload_at = None
        self._low_byte = None
        self._high_byte_next = False
        self._latched_count = []
        self._latched_status = None

    def write(self, now: int, value: int) -> None:
        access = self._control >> 4
        if access == 1:
            self._set_count(now, value)
        elif access == 2:
            self._set_count(now, value << 8)
        elif self._low_byte is None:
            self._low_byte = value
            if self.mode == 0:
                self.start = self.held = None  # the first byte stops counting
        else:
            count = value << 8 | self._low_byte
            self._low_byte = None
            self._set_count(now, count)

    def _set_count(self, now: int, value: int) -> None:
        self._settle(now)
        self._reload = (_from_bcd(value) or 10000) if self._control & 1 else (value or 0x10000)
        if self.mode in (1, 5):
            return  # waits for the gate
        if self.mode in (2, 3):
            if self.start is None:
                self._load(now)
            elif self.held is None:
                self._reload_at = self._next_boundary(now)
        else:
            self._load(now)
            if not self.gate:
                self.held = 0

    def _load(self, now: int) -> None:
        if self._reload is not None:
            self.count = self._reload
            self.start = now + 1
            self.held = None
            self._reload_at = None
            if self.mode in (2, 3) and not self.gate:
                self.held = 0

    def set_gate(self, now: int, level: bool) -> None:
        if level == self.gate:
            return
        self._settle(now)
        self.gate = level
        if self.mode in (1, 5):
            if level:
                self._load(now)
        elif self.start is None:
            return
        elif not level:
            self.held = max(0, now - self.start)
        elif self.mode in (2, 3):
            self._load(now)
        else:
            self.start = now - (self.held or 0)
            self.held = None

    # Counting

    def _settle(self, now: int) -> None:
        """Let a new count of modes 2 and 3 take its turn if its time has come."""
        at = self._reload_at
        if at is not None and now >= at and self._reload is not None:
            if self.mode == 3 and self.start is not None and (at - self.start) % self.count:
                at -= self._high_time(self._reload)  # between the halves: the low one is next
            self.count = self._reload
            self.start = at
            self._reload_at = None

    def _next_boundary(self, now: int) -> int:
        """The end of the current period (mode 2) or half period (mode 3)."""
        assert self.start is not None
        elapsed = max(0, now - self.start)
        begin = self.start + elapsed - elapsed % self.count
        middle = begin + self._high_time(self.count)
        return middle if self.mode == 3 and now < middle else begin + self.count

    @staticmethod
    def _high_time(count: int) -> int:
        return count + 1 >> 1

    def _elapsed(self, now: int) -> int | None:
        """Pulses counted since loading, negative before it; None when nothing was loaded."""
        if self.start is None:
            return None
        return now - self.start if self.held is None else self.held

    def output(self, now: int) -> bool:
        """The OUT pin."""
        self._settle(now)
        elapsed = self._elapsed(now)
        if elapsed is None:
            return self.mode != 0
        if self.mode < 2:
            return elapsed >= self.count or (self.mode == 1 and elapsed < 0)
        if self.mode > 3:
            return elapsed != self.count
        if self.held is not None or elapsed < 0:
            return True
        phase = elapsed % self.count
        return phase != self.count - 1 if self.mode == 2 else phase < self._high_time(self.count)

    def next_rise(self, now: int) -> int | None:
        """The next pulse, after `now`, at which OUT goes from low to high; None when it will not."""
        self._settle(now)
        if self.start is None or self.held is not None:
            return None
        if self.mode in (2, 3):
            at = self._reload_at
            if at is not None and self._reload is not None:
                between_halves = self.mode == 3 and (at - self.start) % self.count
                return at + (self._reload >> 1 if between_halves else 0)
            elapsed = max(0, now - self.start)
            return self.start + elapsed - elapsed % self.count + self.count
        rise = self.start + self.count + (self.mode > 3)
        return rise if rise > now else None

    def counter(self, now: int) -> int:
        """The counting element as it reads, in BCD if so programmed."""
        self._settle(now)
        elapsed = max(0, self._elapsed(now) or 0)
        count = self.count
        if self.mode == 2:
            value = count - elapsed % count
        elif self.mode == 3:
            phase, high = elapsed % count, self._high_time(count)
            value = count - count % 2 - 2 * (phase if phase < high else phase - high)
        else:
            value = count - elapsed
        return _to_bcd(value % 10000) if self._control & 1 else value & 0xFFFF

    # Reading

    def latch_count(self, now: int) -> None:
        if not self._latched_count:
            value = self.counter(now)
            low, high = value & 0xFF, value >> 8
            self._latched_count = [[], [low], [high], [low, high]][self._control >> 4]

    def latch_status(self, now: int) -> None:
        if self._latched_status is None:
            output = self.output(now)
            waiting = self.start is None or self._reload_at is not None or now < self.start
            null_count = waiting or (self.mode in (1, 5) and self._reload != self.count)
            self._latched_status = output << 7 | null_count << 6 | self._control

    def read(self, now: int) -> int:
        if (status := self._latched_status) is not None:
            self._latched_status = None
            return status
        if self._latched_count:
            return self._latched_count.pop(0)
        value = self.counter(now)
        access = self._control >> 4
        if access == 3:
            self._high_byte_next = not self._high_byte_next
            return value & 0xFF if self._high_byte_next else value >> 8
        return value & 0xFF if access == 1 else value >> 8


class Pit8254(ByteDevice, Remembers):
    """Three counters at offsets 0 to 2 and the control word at 3; `speaker` is the window of port 0x61.

    Counter 0's output drives `irq0`.  In the periodic modes the wire stays
    high but for an instant at the end of each period: only the edge matters.
    """

    length = 4
    remembered = ("channels", "speaker")

    def __init__(self, clock: Clock, irq0: Line) -> None:
        self._clock = clock
        self._irq0 = irq0
        self._timer: Timer | None = None
        self._edge: int | None = None  # the pulse at which the wire rises next
        self.channels = (Channel(True), Channel(True), Channel(False))
        self.speaker = SpeakerPort(self)

    def loaded(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._arm(self.ticks(), 0)

    def ticks(self) -> int:
        """Pulses of the clock input so far."""
        return self._clock.now() * FREQUENCY // _SECOND

    def read_byte(self, offset: int) -> int:
        if offset == 3:
            return 0xFF  # not driven
        return self.channels[offset].read(self.ticks())

    def write_byte(self, offset: int, value: int) -> None:
        now = self.ticks()
        if offset < 3:
            self.channels[offset].write(now, value)
        elif value >> 6 == 3:
            self._read_back(now, value)
            return
        elif value & 0x30 == 0:
            self.channels[value >> 6].latch_count(now)
            return
        else:
            offset = value >> 6
            self.channels[offset].control(value)
        if offset == 0:
            self._irq0(self.channels[0].output(now))
            self._arm(now, 0)

    def _read_back(self, now: int, command: int) -> None:
        for index, channel in enumerate(self.channels):
            if command & 2 << index:
                if not command & 0x20:
                    channel.latch_count(now)
                if not command & 0x10:
                    channel.latch_status(now)

    def _arm(self, now: int, earliest: int) -> None:
        """Have the timer run by the next edge, but not before `earliest` (ns).

        A timer that runs too soon only looks again, so one that is there already will do.
        """
        self._edge = self.channels[0].next_rise(now)
        if self._edge is None:
            return
        deadline = max(_ticks_to_ns(self._edge), earliest)
        timer = self._timer
        if timer is not None:
            if timer.deadline <= deadline:
                return
            timer.cancel()
        self._timer = self._clock.at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self.ticks()
        earliest = 0
        if self._edge is not None and now >= self._edge:
            # Edges that were missed meanwhile stay missed: a storm of them would not help the guest.
            earliest = self._clock.now() + MINIMUM_PERIOD
            self._irq0(False)
            self._irq0(True)
        self._arm(now, earliest)


class SpeakerPort(ByteDevice, Remembers):
    """System control port B (port 0x61): counter 2's gate and output, and the memory refresh toggle.

    82371SB PIIX3 data sheet, NMI status and control register.
    """

    remembered = ("_control",)

    def __init__(self, pit: Pit8254) -> None:
        self._pit = pit
        self._control = 0

    def read_byte(self, offset: int) -> int:
        now = self._pit.ticks()
        refresh = now // _REFRESH_TICKS & 1
        return self._control | refresh << 4 | self._pit.channels[2].output(now) << 5

    def write_byte(self, offset: int, value: int) -> None:
        self._control = value & 0x0F
        self._pit.channels[2].set_gate(self._pit.ticks(), bool(value & 1))
