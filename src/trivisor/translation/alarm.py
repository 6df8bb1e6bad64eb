"""What asks translated code to come back for timers: one timer of the host's, which native code may set too.

The host's timer fires at the guest's next deadline as Python knows it, or sooner: whoever looks then sets it anew.
"""

from __future__ import annotations

from trivisor.machine import tsc
from trivisor.machine.host_timer import HostTimer
from trivisor.translation.core import MASK64, Core
from trivisor.translation.host_signals import poll_timer
from trivisor.translation.layout import AT_ONCE, OFFSETS

_HOST_TIMER, _TSC_FREQUENCY, _ALARM, _ALARM_FOR = (
    OFFSETS[name] // 8 for name in ("HOST_TIMER", "TSC_FREQUENCY", "ALARM", "ALARM_FOR")
)


class Alarm:
    """The alarm of one processor; `natives/alarm.py` is the native side of it."""

    def __init__(self, core: Core, tsc_frequency: int) -> None:
        """`tsc_frequency` is the host's (Hz)."""
        self._address = core.address
        self._words = core.words
        self._frequency = tsc_frequency
        self._timer: HostTimer | None = None
        self._words[_TSC_FREQUENCY] = tsc_frequency
        self._words[_HOST_TIMER] = MASK64
        self.forget()

    def start(self) -> None:
        """Have the host's timer signal the calling thread, if there is none yet."""
        if self._timer is None:
            self._timer = poll_timer(self._address)
            self._words[_HOST_TIMER] = self._timer.number

    def close(self) -> None:
        """Give the host's timer back."""
        if self._timer is not None:
            self._timer.close()

    def forget(self) -> None:
        """It is set for nothing that is known."""
        self._words[_ALARM], self._words[_ALARM_FOR] = 0, MASK64

    def is_for(self, deadline: int) -> bool:
        """Whether it was set last to this guest time, by Python."""
        return self._words[_ALARM_FOR] == deadline

    def set(self, deadline: int, delay: int) -> bool:
        """Set it to a guest time `delay` ns from now; False if that is so soon that it is no use."""
        if self._timer is None:
            return True  # nothing runs yet
        if delay <= AT_ONCE:
            return False
        words = self._words
        words[_ALARM] = tsc.read() + delay * self._frequency // 1_000_000_000 & MASK64
        words[_ALARM_FOR] = deadline & MASK64
        self._timer.arm(delay)
        return True
