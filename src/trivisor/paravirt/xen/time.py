"""The PV clock: time from the TSC, as the guest computes it itself (xen.h, struct vcpu_time_info)."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from trivisor.machine.clock import Clock, Timer
from trivisor.machine.memory import GuestMemory
from trivisor.machine.saved_values import number
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.abi import PVCLOCK_TSC_STABLE
from trivisor.paravirt.xen.shared_table import INDEX, SharedTable, SharedWord

_SECOND = 1_000_000_000
_FAR_FUTURE = 1 << 62


def scale(frequency: int) -> tuple[int, int]:
    """(multiplier, shift) for nanoseconds out of counts of a TSC at `frequency` Hz; the multiplier fills 32 bits."""
    shift = 0
    while frequency > 2 * _SECOND:
        frequency >>= 1
        shift -= 1
    while frequency <= _SECOND:
        frequency <<= 1
        shift += 1
    return (_SECOND << 32) // frequency, shift


class SystemTime(Remembers):
    """Nanoseconds since the domain started, by its TSC, and the timers that hang on them."""

    _start = SharedWord("TIME_START")

    def __init__(
        self, memory: GuestMemory, clock: Clock, frequency: int, tsc: Callable[[], int], table: SharedTable
    ) -> None:
        self.table = table
        self._memory = memory
        self._clock = clock
        self._tsc = tsc
        self._multiplier, self._shift = scale(frequency)
        words = table.words
        words[INDEX["TIME_MULTIPLIER"]] = self._multiplier
        words[INDEX["TIME_LEFT"]], words[INDEX["TIME_RIGHT"]] = max(self._shift, 0), max(-self._shift, 0)
        self._start = tsc()
        self._wallclock = time.time_ns()

    remembered = ("_start",)

    def load(self, saved: Saved) -> None:
        """Once the processor's TSC goes on from where it was.  The time of day is the host's, as it is now."""
        self._start = number(saved.get("start"), "start", 64)
        self.moved(0)

    def moved(self, ticks: int) -> None:
        """The TSC has jumped by so many ticks, of which the system time knows nothing; `write` tells the guest."""
        self._start = self._start + ticks & (1 << 64) - 1
        self._wallclock = max(time.time_ns() - self.now(), 0)

    def now(self) -> int:
        """The system time, exactly as the guest computes it from what `write` told."""
        delta = (self._tsc() - self._start) & ((1 << 64) - 1)
        delta = delta << self._shift if self._shift >= 0 else delta >> -self._shift
        return delta * self._multiplier >> 32 & (1 << 64) - 1

    def at(self, deadline: int, callback: Callable[[], None], *, quietly: bool = False) -> Timer:
        """Have `callback()` called once the system time reaches `deadline` (ns); `quietly` as `Clock.at` has it."""
        delay = min(max(deadline - self.now(), 0), _FAR_FUTURE)
        return self._clock.at(self._clock.now() + delay, callback, quietly=quietly)

    def on_look(self, callback: Callable[[], None]) -> None:
        """Have `callback()` called before anybody looks at the timers (`Clock.on_look`)."""
        self._clock.on_look = callback

    def write(self, address: int) -> None:
        """Tell it at the physical `address` of a struct vcpu_time_info."""
        self._memory.write(address, self.told(self._memory.read_u32(address)))

    def told(self, version: int) -> bytes:
        """A struct vcpu_time_info in place of one of an older `version`."""
        return struct.pack(
            "<IIQQIbBxx", version + 2 & ~1 & 0xFFFFFFFF, 0, self._start, 0, self._multiplier, self._shift,
            PVCLOCK_TSC_STABLE,
        )  # fmt: skip

    def write_wallclock(self, address: int) -> None:
        """Tell the time of day at system time 0 at the physical `address` of wc_version (xen.h, struct shared_info)."""
        seconds, nanoseconds = divmod(self._wallclock, _SECOND)
        version = self._memory.read_u32(address) + 2 & ~1 & 0xFFFFFFFF
        data = struct.pack("<4I", version, seconds & 0xFFFFFFFF, nanoseconds, seconds >> 32)
        self._memory.write(address, data)
