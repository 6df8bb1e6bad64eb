"""Work in threads beside the main one: what gives up the GIL, as reading, digests and unpacking do.

`concurrent.futures` would do as well, but takes longer to import than some of this work takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Result = TypeVar("Result")
NAME = "job"
"""Of the threads."""


class Jobs(Generic[Result]):
    """Jobs that some threads do in their order, from now on; one of `results` and `cancel` must be called."""

    def __init__(self, work: Sequence[Callable[[], Result]], threads: int = 1) -> None:
        self._waiting = iter(enumerate(work))
        self._done: dict[int, Result] = {}
        self._failures: dict[int, BaseException] = {}
        self._cancelled = False
        self._threads = [threading.Thread(target=self._work, name=NAME) for _ in range(min(threads, len(work)))]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        for number, job in self._waiting:  # the GIL gives each to one thread
            if self._cancelled:
                return
            try:
                self._done[number] = job()
            except BaseException as failure:
                self._failures[number] = failure
                self._cancelled = True

    def results(self) -> list[Result]:
        """Wait for all; what they return in the order of the jobs.  Raises what the first that failed has raised."""
        self._join()
        if self._failures:
            raise self._failures[min(self._failures)]
        return self._in_order()

    def cancel(self) -> list[Result]:
        """Wait for those that have begun, and leave the rest undone; what was done.  Harmless after `results`."""
        self._cancelled = True
        self._join()
        return self._in_order()

    def _in_order(self) -> list[Result]:
        return [self._done[number] for number in sorted(self._done)]

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
