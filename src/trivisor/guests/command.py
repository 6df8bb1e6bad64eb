"""A command in the guest, seen from the host: its output, byte for byte, and its exit status.

The channel is the serial line itself.  The line also carries what firmware and
kernel have to say, so the guest's /init encloses the command's output in two
marks made from a random word that both sides know:

    WORD:begin LF  ...the output, raw...  WORD:end:STATUS LF

The line is in raw mode from before the first mark, so nothing in between is
translated.  The end mark follows the output directly: output that does not end
in a line feed stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable

_PREAMBLE_LIMIT = 16384
_STATUS_DIGITS = b"0123456789"
_STATUS_LENGTH = 3


def new_marker() -> bytes:
    """Return a fresh random word for one run, 32 hexadecimal digits."""
    return os.urandom(16).hex().encode()


def begin_mark(marker: bytes) -> bytes:
    """Return what the guest sends right before the command's output."""
    return marker + b":begin\n"


def end_mark(marker: bytes, status: int) -> bytes:
    """Return what the guest sends right after the command's output."""
    return marker + b":end:%d\n" % status


def ready_mark(word: bytes) -> bytes:
    """Return what a guest that waits for a command sends when it has begun to (`trivisor.guests.waiting`)."""
    return word + b":waits\n"


class CommandOutput:
    """Takes the serial line's bytes as they come and passes on those that are the command's output."""

    def __init__(self, marker: bytes, write: Callable[[bytes], None]) -> None:
        if not marker:
            raise ValueError("the marker must not be empty")
        self.status: int | None = None
        """The command's exit status (0-255, 128+n after signal n); None until it has ended."""
        self.started = False
        """The begin mark has been seen."""
        self.preamble = bytearray()
        """The last 16 KiB of what came before the output: why the guest never got there, if it did not."""
        self._begin = begin_mark(marker)
        self._end = marker + b":end:"
        self._write = write
        self._held = bytearray()

    def feed(self, data: bytes) -> None:
        """Take the next bytes; calls `write` with those that certainly are output."""
        if self.status is not None:
            return
        self._held += data
        if not self.started:
            self._seek_begin()
        if self.started:
            self._pass_output()

    def finish(self) -> None:
        """The line is closed: whatever was held back as a possible mark is output after all."""
        if self.started and self.status is None:
            self._emit(len(self._held))

    def _seek_begin(self) -> None:
        held = self._held
        found = held.find(self._begin)
        self.started = found >= 0
        passed = found if self.started else len(held) - _overlap(held, self._begin)
        self.preamble += held[:passed]
        del self.preamble[:-_PREAMBLE_LIMIT]
        del held[: passed + len(self._begin) if self.started else passed]

    def _pass_output(self) -> None:
        """Emit up to the end mark, or up to what may turn out to be its beginning."""
        held = self._held
        while (found := held.find(self._end)) >= 0:
            digits = found + len(self._end)
            stop = digits
            while stop < len(held) and stop - digits < _STATUS_LENGTH and held[stop] in _STATUS_DIGITS:
                stop += 1
            if stop == len(held):
                self._emit(found)
                return
            if stop > digits and held[stop] == 0x0A:
                self.status = int(held[digits:stop])
                del held[stop:]
                self._emit(found)
                held.clear()
                return
            self._emit(digits)
        self._emit(len(held) - _overlap(held, self._end))

    def _emit(self, length: int) -> None:
        if length:
            output = bytes(self._held[:length])
            del self._held[:length]
            self._write(output)


def _overlap(data: bytearray, mark: bytes) -> int:
    """Return the length of the longest end of `data` that is a beginning of `mark`."""
    for length in range(min(len(data), len(mark) - 1), 0, -1):
        if data.endswith(mark[:length]):
            return length
    return 0
