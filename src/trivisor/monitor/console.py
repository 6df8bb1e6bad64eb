"""The guest's serial console from the monitor's side: what it printed, and what waits to be typed."""

from __future__ import annotations

import re
import threading
import time
from collections import deque

OUTPUT_LIMIT = 16 << 20
"""Bytes of output that are kept; of more the older half is forgotten."""
MATCH_WINDOW = 4096
"""A pattern's match is looked for in this many bytes before newly arrived ones."""

Pattern = str | bytes | re.Pattern[bytes]


def compile_pattern(pattern: Pattern) -> re.Pattern[bytes]:
    """A literal string or bytes as an expression for just that; a compiled one as it is."""
    if isinstance(pattern, re.Pattern):
        return pattern
    return re.compile(re.escape(pattern.encode() if isinstance(pattern, str) else pattern))


class Console:
    """Bytes both ways.  The vCPU's thread calls `feed` and `take_input`; the rest is for any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._output = bytearray()
        self._cursor = 0
        self._searched = 0
        self._watched: re.Pattern[bytes] | None = None
        self._input: deque[bytes] = deque()

    @property
    def output(self) -> bytes:
        """All that the guest printed (its newest 8 to 16 MiB)."""
        with self._changed:
            return bytes(self._output)

    def feed(self, data: bytes) -> bool:
        """The guest printed `data`; True when the pattern that is watched for is now there."""
        with self._changed:
            self._output += data
            if len(self._output) > OUTPUT_LIMIT:
                self._forget(len(self._output) - OUTPUT_LIMIT // 2)
            if self._watched is None or self._find(self._watched) is None:
                return False
            self._changed.notify_all()
            return True

    def _forget(self, length: int) -> None:
        del self._output[:length]
        self._cursor = max(0, self._cursor - length)
        self._searched = max(0, self._searched - length)

    def _find(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Search what was not searched yet, with a window before it for matches that began earlier."""
        start = max(self._cursor, self._searched - MATCH_WINDOW)
        match = pattern.search(self._output, start)
        if match is None:
            self._searched = len(self._output)
        return match

    def watch(self, pattern: re.Pattern[bytes] | None) -> None:
        """Have `feed` look for `pattern` in what `consume` has not given out; None ends it."""
        with self._changed:
            self._watched = pattern
            self._searched = self._cursor

    def consume(self, pattern: re.Pattern[bytes]) -> bytes | None:
        """What was printed since the last one, up to and with the first match; None without a match."""
        with self._changed:
            match = self._find(pattern)
            if match is None:
                return None
            start, self._cursor = self._cursor, match.end()
            self._searched = self._cursor
            return bytes(self._output[start : self._cursor])

    def matches(self, pattern: re.Pattern[bytes]) -> bool:
        """Whether `consume` would find it."""
        with self._changed:
            return self._find(pattern) is not None

    def wait(self, seconds: float) -> None:
        """Sleep until a watched pattern came or `wake` was called, at most `seconds`."""
        with self._changed:
            if self._watched is None or self._find(self._watched) is None:
                self._changed.wait(min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """End every `wait`."""
        with self._changed:
            self._changed.notify_all()

    def write(self, data: bytes) -> None:
        """Type `data`; it waits until the vCPU's thread takes it."""
        self._input.append(data)

    def return_input(self, data: bytes) -> None:
        """Put back what was taken but could not be used: it comes first the next time."""
        self._input.appendleft(data)

    @property
    def has_input(self) -> bool:
        """Whether something was typed and not yet taken."""
        return bool(self._input)

    def take_input(self) -> bytes:
        """All that was typed and not yet taken."""
        pieces = []
        while self._input:
            pieces.append(self._input.popleft())
        return b"".join(pieces)


class Deadline:
    """A moment on the host's monotonic clock, or never."""

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"timeout must not be negative: {seconds}")
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, at least 0; infinity for never."""
        return float("inf") if self._end is None else max(0.0, self._end - time.monotonic())
