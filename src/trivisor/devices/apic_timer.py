"""The local APIC's timer (Intel SDM 3A, 10.5.4): one-shot and periodic counts, and the TSC deadline."""

from __future__ import annotations

from collections.abc import Callable

from trivisor.machine.clock import Clock, Timer
from trivisor.machine.saving import Remembers

ONE_SHOT, PERIODIC, TSC_DEADLINE = 0, 1, 2
"""Timer modes, as in bits 17-18 of the LVT timer register."""

MINIMUM_PERIOD = 20_000
"""Nanoseconds between two expiries in periodic mode at the least, so that no guest can starve its host."""

_SECOND = 1_000_000_000
_FOREVER = 1 << 62


class ApicTimer(Remembers):
    """Calls `fire()` whenever the count reaches zero or the TSC reaches the deadline.

    `tsc()` counts at `tsc_frequency` Hz; the counter runs at `crystal_frequency` Hz
    over the divide configuration.
    """

    remembered = ("mode", "initial_count", "divide_config", "_divisor", "deadline", "_expiry")

    def __init__(
        self,
        clock: Clock,
        tsc: Callable[[], int],
        tsc_frequency: int,
        crystal_frequency: int,
        fire: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._tsc = tsc
        self._tsc_frequency = tsc_frequency
        self._crystal_frequency = crystal_frequency
        self._fire = fire
        self._timer: Timer | None = None
        self.reset()

    def reset(self) -> None:
        """Stop, in one-shot mode, dividing by 2."""
        self._disarm()
        self.mode = ONE_SHOT
        self.initial_count = 0
        self.divide_config = 0
        self._divisor = 2

    def loaded(self) -> None:
        """The processor sets a TSC deadline going, when it has its TSC."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._clock.at(self._expiry, self._count_expired) if self._expiry else None

    def set_mode(self, mode: int) -> None:
        """Change the mode; the reserved mode 3 never fires."""
        if mode != self.mode and (mode >= TSC_DEADLINE or self.mode >= TSC_DEADLINE):
            self._disarm()
            self.initial_count = 0
        self.mode = mode

    def start(self, count: int) -> None:
        """Write the initial count: start counting down from it, or stop at 0.  Not for deadline mode."""
        if self.mode >= TSC_DEADLINE:
            return
        self._disarm()
        self.initial_count = count
        if count:
            self._count_down(count)

    def set_divide(self, value: int) -> None:
        """Write the divide configuration (figure 10-10); a running count goes on at the new rate."""
        left = self.current_count()
        self.divide_config = value & 0xB
        self._divisor = 1 << ((value & 3 | (value & 8) >> 1) + 1 & 7)
        if left:
            self._disarm()
            self._count_down(left)

    def current_count(self) -> int:
        """What is left of the count, in divided crystal ticks."""
        if not self._expiry:
            return 0
        left = self._expiry - self._clock.now()
        if left <= 0:
            if self.mode != PERIODIC:
                return 0
            period = self._duration(self.initial_count)
            left = period - -left % period
        return min(left * self._crystal_frequency // (_SECOND * self._divisor), self.initial_count)

    def set_deadline(self, deadline: int) -> None:
        """Fire once the TSC is at `deadline` or beyond; 0 disarms.  Only in deadline mode."""
        if self.mode != TSC_DEADLINE:
            return
        self._disarm()
        self.deadline = deadline
        if deadline:
            self._await_deadline()

    def _duration(self, count: int) -> int:
        """Nanoseconds that `count` ticks take, rounded up."""
        return -(-count * self._divisor * _SECOND // self._crystal_frequency)

    def _count_down(self, count: int) -> None:
        self._expiry = self._clock.now() + self._duration(count)
        if self.mode != PERIODIC and self._clock.now() >= self._expiry:
            self._count_expired()  # so short a count that it is over by now
        else:
            self._timer = self._clock.at(self._expiry, self._count_expired)

    def _count_expired(self) -> None:
        if self.mode == PERIODIC:
            period = self._duration(self.initial_count)
            now = self._clock.now()
            self._expiry += ((now - self._expiry) // period + 1) * period
            self._timer = self._clock.at(max(self._expiry, now + MINIMUM_PERIOD), self._count_expired)
        else:
            self._timer = None
            self._expiry = 0
        self._fire()

    def _await_deadline(self) -> None:
        left = self.deadline - self._tsc()
        if left > 0:
            wait = -(-left * _SECOND // self._tsc_frequency)
            self._timer = self._clock.at(self._clock.now() + min(wait, _FOREVER), self._await_deadline)
        else:
            self._timer = None
            self.deadline = 0
            self._fire()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.deadline = 0
        self._expiry = 0
        """Guest time (ns) at which the count is zero; 0 when it is not counting."""
