"""A thread that does a back end's work in the order in which it is given, so that the processor need not wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from trivisor.machine.clock import Clock

Job = TypeVar("Job")


class Worker(Generic[Job]):
    """`work(job)` runs in the thread; `finished(jobs)` is called in the vCPU's thread with those done since then.

    What `work` raises is raised there too.
    """

    def __init__(
        self, clock: Clock, work: Callable[[Job], None], finished: Callable[[list[Job]], None], name: str
    ) -> None:
        self._clock = clock
        self._work = work
        self._finished = finished
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._done: deque[Job] = deque()
        self._under_way = 0
        self._failure: BaseException | None = None
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Have a job done."""
        self._under_way += 1
        self._queue.put(job)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._work(job)
            except BaseException as failure:
                self._failure = failure
            with self._idle:
                first = not self._done
                self._done.append(job)
                self._idle.notify()
            if first:
                self._clock.post(self._collect)

    def _collect(self) -> None:
        with self._idle:
            jobs = list(self._done)
            self._done.clear()
        self._under_way -= len(jobs)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if jobs:
            self._finished(jobs)

    def drain(self) -> None:
        """Wait until all is done, and finish it."""
        while self._under_way:
            with self._idle:
                while not self._done:
                    self._idle.wait()
            self._collect()

    def close(self) -> None:
        """Finish everything and end the thread; harmless the second time."""
        self.drain()
        self._queue.put(None)
        self._thread.join()
