"""The timers of the domain's processor: their ticks are VIRQ_TIMER, or the end of a poll (vcpu.h, sched.h)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from trivisor.machine.clock import Timer
from trivisor.machine.saved_values import number
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.abi import VIRQ_TIMER
from trivisor.paravirt.xen.events import EventChannels
from trivisor.paravirt.xen.shared_table import SharedTable, SharedWord
from trivisor.paravirt.xen.time import SystemTime

SET, STOPPED = 1, 2
"""Words of the shared table: what native code has done to the singleshot timer."""
SHORTEST_PERIOD = 1_000_000
LONGEST_PERIOD = (1 << 62) - 1
"""Of the periodic timer, in ns."""


class _OneTimer:
    """A timer that is set or not; deadlines are of the system time, in ns."""

    def __init__(self, clock: SystemTime, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._callback = callback
        self._timer: Timer | None = None
        self._deadline = 0

    def set(self, deadline: int, *, quietly: bool = False) -> None:
        """Have it go off then, and only then; `quietly` as `Clock.at` has it."""
        self.stop()
        self._deadline = deadline
        self._timer = self._clock.at(deadline, self._callback, quietly=quietly)

    def stop(self) -> None:
        """Have it not go off; harmless if it is not set."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def deadline(self) -> int | None:
        """None when it is not set, or has gone off."""
        return None if self._timer is None or self._timer.callback is None else self._deadline


class _SharedTimer(_OneTimer):
    """One that native code may set and stop too: that is minded when anybody looks at timers."""

    _native_deadline = SharedWord("SINGLE")
    _change = SharedWord("SINGLE_CHANGE")

    def __init__(self, clock: SystemTime, callback: Callable[[], None], table: SharedTable) -> None:
        super().__init__(clock, callback)
        self.table = table
        clock.on_look(self._settle)

    def _settle(self) -> None:
        """Do to it what native code has done."""
        if change := self._change:
            if change == SET:
                self.set(self._native_deadline, quietly=True)
            else:
                self.stop()

    def stop(self) -> None:
        self._change = 0
        super().stop()

    @property
    def deadline(self) -> int | None:
        self._settle()
        return super().deadline


class VcpuTimers(Remembers):
    """The singleshot timer, the periodic timer and the end of a poll."""

    def __init__(self, clock: SystemTime, events: EventChannels, table: SharedTable) -> None:
        self._clock = clock
        tick = partial(events.raise_virq, VIRQ_TIMER)
        self._tick = tick
        self.single = _SharedTimer(clock, tick, table)
        self.poll = _OneTimer(clock, events.end_poll)
        self._periodic = _OneTimer(clock, self._period_over)
        self._period = 0

    def start_periodic(self, period: int) -> None:
        """A tick every so many ns."""
        self._period = period
        self._periodic.set(self._clock.now() + period)

    def stop_periodic(self) -> None:
        """No more of those ticks."""
        self._periodic.stop()

    def _period_over(self) -> None:
        self._tick()
        self.start_periodic(self._period)

    def save(self) -> Saved:
        named = {"single": self.single, "poll": self.poll, "periodic": self._periodic}
        return {"period": self._period, **{name: timer.deadline for name, timer in named.items()}}

    def load(self, saved: Saved) -> None:
        """Once the system time goes on from where it was."""
        self._period = number(saved.get("period"), "period", 62)
        if saved.get("periodic") is not None and self._period < SHORTEST_PERIOD:
            raise ValueError("the period is too short")
        for name, timer in (("single", self.single), ("poll", self.poll), ("periodic", self._periodic)):
            deadline = saved.get(name)
            if deadline is not None:
                timer.set(number(deadline, name, 64))
