"""The real-time clock and CMOS RAM of a PC.

Source: Motorola MC146818A data sheet (MC146818A/D).  The clock runs on guest
time from the host's date at switch-on, in UTC.  Flags of register C are worked
out when somebody looks; a timer runs only towards an interrupt that is enabled.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable

from trivisor.devices.bytewise import ByteDevice
from trivisor.machine.clock import Clock, Timer
from trivisor.machine.interrupts import Line
from trivisor.machine.saving import Remembers, Saved

_SECOND = 1_000_000_000
_DAY = 86400
_UPDATE_TIME = (244 + 1984) * 1000  # ns that UIP is high: t_BUC and t_UC at 32.768 kHz (table 2)
_SECONDS, _SECONDS_ALARM, _MINUTES, _MINUTES_ALARM, _HOURS, _HOURS_ALARM = range(6)
_WEEKDAY, _DAY_OF_MONTH, _MONTH, _YEAR, _A, _B, _C, _D = range(6, 14)
_CENTURY = 0x32
_TIME_REGISTERS = (_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY_OF_MONTH, _MONTH, _YEAR, _CENTURY)
_DIVIDER_RESET = 0x60
_SET, _PERIODIC, _ALARM, _UPDATE, _BINARY, _HOURS_24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
_AFTERNOON = 0x80


class Cmos(ByteDevice, Remembers):
    """Index register at offset 0, data at offset 1; IRQ 8.

    `low_memory` and `high_memory` are the bytes of RAM below and from 4 GiB,
    left in the places where a PC's BIOS leaves them.
    """

    length = 2
    remembered = ("_index", "ram", "_flags", "_level", "_stopped", "_ahead", "_unseen")

    def __init__(
        self,
        clock: Clock,
        irq8: Line,
        low_memory: int,
        high_memory: int = 0,
        wall_time: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._wall_time = wall_time
        self._ahead = self._unseen = 0  # while saving and loading: of the host's date, and of `_seen`
        self._irq8 = irq8
        self._index = 0
        self._timer: Timer | None = None
        self.ram = bytearray(128)
        """The registers as bytes; time registers hold the time only while the clock is stopped."""
        self.ram[_A], self.ram[_B], self.ram[_D] = 0x26, _HOURS_24, 0x80
        self._flags = 0
        self._level = False
        self._stopped = False
        self._offset = int(wall_time() * _SECOND) - clock.now()  # from guest time to the RTC's, ns
        self._seen = self._now()  # the RTC's time up to which the flags are right
        _describe_memory(self.ram, low_memory, high_memory)

    def save(self) -> Saved:
        """Saved as the difference from the host's date: the clock has its battery while the machine is off."""
        now = self._now()
        self._ahead, self._unseen = now - int(self._wall_time() * _SECOND), now - self._seen
        return super().save()

    def loaded(self) -> None:
        self._offset = int(self._wall_time() * _SECOND) + self._ahead - self._clock.now()
        self._seen = self._now() - self._unseen
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._update()

    def read_byte(self, offset: int) -> int:
        if offset == 0:
            return 0xFF  # the index cannot be read back
        index = self._index
        if index == _A:
            return self.ram[_A] | self._updating() << 7
        if index == _C:
            return self._take_flags()
        if index in _TIME_REGISTERS and not self._stopped:
            self._store_time()
        return self.ram[index]

    def write_byte(self, offset: int, value: int) -> None:
        if offset == 0:
            self._index = value & 0x7F  # bit 7 masks the NMI, which nothing here raises
            return
        index = self._index
        if index in (_C, _D):
            return
        self._advance()
        if index in (_A, _B):
            self._control(index, value)
        elif index in _TIME_REGISTERS:
            self._write_time(index, value)
        else:
            self.ram[index] = value
        self._update()

    # Time

    def _now(self) -> int:
        """The RTC's time as nanoseconds since 1970; the divider runs by it even while the date stands."""
        return self._clock.now() + self._offset

    def _updating(self) -> bool:
        return not self._stopped and self._now() % _SECOND >= _SECOND - _UPDATE_TIME

    def _write_time(self, index: int, value: int) -> None:
        if self._stopped:
            self.ram[index] = value
        else:
            self._store_time()
            self.ram[index] = value
            self._load_time(self._now() % _SECOND)

    def _control(self, index: int, value: int) -> None:
        """Write register A or B, either of which may stop the date or let it go on."""
        if index == _A:
            value &= 0x7F
        elif value & _SET:
            value &= ~_UPDATE
        if not self._stopped:
            self._store_time()
        was_reset = self._divider_reset()
        self.ram[index] = value
        if was_reset and not self._divider_reset():
            # The first update comes half a second after the divider's reset ends ("Divider control").
            self._offset += _SECOND // 2 - self._now() % _SECOND
            self._seen = self._now()
        stopped = bool(self.ram[_B] & _SET) or self._divider_reset()
        if self._stopped and not stopped:
            self._load_time(self._now() % _SECOND)
        self._stopped = stopped

    def _divider_reset(self) -> bool:
        return self.ram[_A] & _DIVIDER_RESET == _DIVIDER_RESET

    def _store_time(self) -> None:
        """Put the date into its registers."""
        now = time.gmtime(self._now() // _SECOND)
        ram, encode = self.ram, self._encode
        ram[_SECONDS], ram[_MINUTES] = encode(now.tm_sec), encode(now.tm_min)
        if ram[_B] & _HOURS_24:
            ram[_HOURS] = encode(now.tm_hour)
        else:
            ram[_HOURS] = encode(now.tm_hour % 12 or 12) | (_AFTERNOON if now.tm_hour >= 12 else 0)
        ram[_WEEKDAY] = encode((now.tm_wday + 1) % 7 + 1)  # Sunday is 1
        ram[_DAY_OF_MONTH], ram[_MONTH] = encode(now.tm_mday), encode(now.tm_mon)
        ram[_YEAR], ram[_CENTURY] = encode(now.tm_year % 100), encode(now.tm_year // 100 % 100)

    def _load_time(self, fraction: int) -> None:
        """Go on from the date in the registers, `fraction` ns into the second; nonsense becomes a near date.

        The day of the week follows from the date.
        """
        ram, decode = self.ram, self._decode
        year = min(max(decode(ram[_CENTURY]) * 100 + decode(ram[_YEAR]), 1), 9999)
        month = min(max(decode(ram[_MONTH]), 1), 12)
        day = min(max(decode(ram[_DAY_OF_MONTH]), 1), calendar.monthrange(year, month)[1])
        hour = min(self._decode_hour(ram[_HOURS]), 23)
        minute, second = min(decode(ram[_MINUTES]), 59), min(decode(ram[_SECONDS]), 59)
        seconds = calendar.timegm((year, month, day, hour, minute, second))
        self._offset = seconds * _SECOND + fraction - self._clock.now()
        self._seen = self._now()

    def _encode(self, value: int) -> int:
        return value if self.ram[_B] & _BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.ram[_B] & _BINARY else (value >> 4) * 10 + (value & 0xF)

    def _decode_hour(self, value: int) -> int:
        if self.ram[_B] & _HOURS_24:
            return self._decode(value)
        return self._decode(value & ~_AFTERNOON) % 12 + (12 if value & _AFTERNOON else 0)

    # Interrupts

    def _period(self) -> int:
        """The periodic interrupt's, in pulses of 32768 Hz; 0 for none (table 5)."""
        rate = self.ram[_A] & 0x0F
        if rate == 0 or self._divider_reset():
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)

    def _advance(self) -> None:
        """Set the flags of what has happened since the last time."""
        before, now = self._seen, self._now()
        self._seen = now
        if (period := self._period()) and _pulses(before) // period != _pulses(now) // period:
            self._flags |= _PERIODIC
        second_before, second = before // _SECOND, now // _SECOND
        if not self._stopped and second > second_before:
            self._flags |= _UPDATE
            alarm = self._next_alarm(second_before)
            if alarm is not None and alarm <= second:
                self._flags |= _ALARM

    def _next_alarm(self, after: int) -> int | None:
        """The first second later than `after` that the alarm registers match, None if they cannot."""
        ram, decode = self.ram, self._decode
        hours = _matches(ram[_HOURS_ALARM], self._decode_hour(ram[_HOURS_ALARM]), 24)
        minutes = _matches(ram[_MINUTES_ALARM], decode(ram[_MINUTES_ALARM]), 60)
        seconds = _matches(ram[_SECONDS_ALARM], decode(ram[_SECONDS_ALARM]), 60)
        if not (hours and minutes and seconds):
            return None
        midnight = (after + 1) // _DAY * _DAY
        minute, second = divmod(after + 1 - midnight, 60)
        hour, minute = divmod(minute, 60)
        if hour in hours and minute in minutes and second <= seconds[-1]:
            return midnight + hour * 3600 + minute * 60 + max(second, seconds[0])
        if hour in hours and minute < minutes[-1]:
            return midnight + hour * 3600 + max(minute + 1, minutes[0]) * 60 + seconds[0]
        next_hour = max(hour + 1, hours[0]) if hour < hours[-1] else hours[0] + 24
        return midnight + next_hour * 3600 + minutes[0] * 60 + seconds[0]

    def _take_flags(self) -> int:
        self._advance()
        flags = self._flags
        raised = flags & self.ram[_B] & (_PERIODIC | _ALARM | _UPDATE)
        self._flags = 0
        self._update()
        return flags | (0x80 if raised else 0)

    def _update(self) -> None:
        """Drive the wire, and have a timer run at the next flag that would raise it."""
        level = bool(self._flags & self.ram[_B] & (_PERIODIC | _ALARM | _UPDATE))
        if level != self._level:
            self._level = level
            self._irq8(level)
        event = self._next_event()
        if event is None:
            return
        deadline = event - self._offset
        timer = self._timer
        if timer is not None:
            if timer.deadline <= deadline:
                return  # it will look again
            timer.cancel()
        self._timer = self._clock.at(deadline, self._on_timer)

    def _next_event(self) -> int | None:
        """The RTC's time (ns) of the next flag that is enabled and not yet set."""
        now = self._now()
        wanted = self.ram[_B] & ~self._flags
        events = []
        if wanted & _PERIODIC and (period := self._period()):
            pulse = (_pulses(now) // period + 1) * period
            events.append(-(-pulse * _SECOND // 32768))
        if not self._stopped:
            if wanted & _UPDATE:
                events.append((now // _SECOND + 1) * _SECOND)
            if wanted & _ALARM and (alarm := self._next_alarm(now // _SECOND)) is not None:
                events.append(alarm * _SECOND)
        return min(events, default=None)

    def _on_timer(self) -> None:
        self._timer = None
        self._advance()
        self._update()


def _pulses(now: int) -> int:
    """Pulses of the 32768 Hz divider output until the RTC's time `now` (ns)."""
    return now * 32768 // _SECOND


def _matches(raw: int, value: int, limit: int) -> range:
    """The values that an alarm register matches: 0xC0 and above are "don't care"."""
    if raw >= 0xC0:
        return range(limit)
    return range(value, min(value + 1, limit))


def _describe_memory(ram: bytearray, low_memory: int, high_memory: int) -> None:
    """Leave memory sizes, equipment and their checksum as a BIOS does."""
    kib = min(max(low_memory - (1 << 20), 0) >> 10, 0xFFFF)
    above_16m = min(max(low_memory - (16 << 20), 0) >> 16, 0xFFFF)
    ram[0x14] = 0x02  # a coprocessor
    ram[0x15:0x17] = (640).to_bytes(2, "little")
    ram[0x17:0x19] = ram[0x30:0x32] = kib.to_bytes(2, "little")
    ram[0x34:0x36] = above_16m.to_bytes(2, "little")
    ram[0x5B:0x5E] = min(high_memory >> 16, 0xFFFFFF).to_bytes(3, "little")
    ram[0x2E:0x30] = (sum(ram[0x10:0x2E]) & 0xFFFF).to_bytes(2, "big")
