"""Guest time: nanoseconds since the machine was switched on, and the timers that hang on it."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from itertools import count

from trivisor.machine.saving import Remembers

_FEW = 64
"""Cancelled timers that are not worth a purge."""


class Timer:
    """A callback due at a time; made by `Clock.at`."""

    __slots__ = ("_on_cancel", "callback", "deadline")

    def __init__(self, deadline: int, callback: Callable[[], None], on_cancel: Callable[[], None]) -> None:
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback
        self._on_cancel = on_cancel

    def cancel(self) -> None:
        """Never call back; harmless when it already did."""
        if self.callback is not None:
            self.callback = None
            self._on_cancel()


class Clock(Remembers):
    """Monotonic guest time that can be paused, and a queue of timers.

    The monitor calls `run_due` in the vCPU's thread; callbacks run there, so
    devices need no locks.  `source` gives host nanoseconds (tests pass their own).
    """

    remembered = ("elapsed",)

    def __init__(self, source: Callable[[], int] = time.monotonic_ns) -> None:
        self._source = source
        self._origin = source()
        self._queue: list[tuple[int, int, Timer]] = []
        self._order = count()
        self._cancelled = 0  # timers in the queue that are, which is what makes it worth a purge
        self.on_earlier: Callable[[int], None] | None = None
        """Called with a deadline that is sooner than all before it (an engine re-arms its host timer)."""
        self._posted: deque[Callable[[], None]] = deque()
        self.on_posted: Callable[[], None] = lambda: None
        """Called, in any thread, when something was posted: have `run_due` called soon."""
        self.on_look: Callable[[], None] | None = None
        """Called before the timers are looked at: who keeps one elsewhere sets it here now."""

    def now(self) -> int:
        """Nanoseconds of guest time."""
        return self._source() - self._origin

    @property
    def elapsed(self) -> int:
        """`now`, which can be set to go on from another machine's time: its devices must set their timers anew."""
        return self.now()

    @elapsed.setter
    def elapsed(self, nanoseconds: int) -> None:
        self._origin = self._source() - nanoseconds

    def at(self, deadline: int, callback: Callable[[], None], *, quietly: bool = False) -> Timer:
        """Have `callback()` called once guest time reaches `deadline` (ns).

        `quietly`: from `on_look`, when whoever looks will see it.
        """
        timer = Timer(deadline, callback, self._one_cancelled)
        earlier = not self._queue or deadline < self._queue[0][0]
        heapq.heappush(self._queue, (deadline, next(self._order), timer))
        if earlier and not quietly and self.on_earlier is not None:
            self.on_earlier(deadline)
        return timer

    def post(self, callback: Callable[[], None]) -> None:
        """Have `callback()` called in the vCPU's thread soon; from any thread."""
        self._posted.append(callback)
        self.on_posted()

    def next_deadline(self) -> int | None:
        """The guest time (ns) of the next live timer, or None."""
        if self.on_look is not None:
            self.on_look()
        queue = self._queue
        while queue and queue[0][2].callback is None:
            heapq.heappop(queue)
            self._cancelled -= 1
        return queue[0][0] if queue else None

    def _one_cancelled(self) -> None:
        """Throw cancelled timers out once they are most of the queue: a guest may set and cancel forever."""
        self._cancelled += 1
        if self._cancelled > _FEW and 2 * self._cancelled > len(self._queue):
            self._queue = [entry for entry in self._queue if entry[2].callback is not None]
            heapq.heapify(self._queue)
            self._cancelled = 0

    def run_due(self) -> None:
        """Call what was posted, and every timer whose deadline has passed, in order of deadline."""
        while self._posted:
            self._posted.popleft()()
        while (deadline := self.next_deadline()) is not None and deadline <= self.now():
            timer = heapq.heappop(self._queue)[2]
            callback = timer.callback
            timer.callback = None
            if callback is not None:
                callback()
