"""A guest that is up and waits to be told what to run: what snapshots are made of that many commands start from.

The default user space's /init comes as far as it can without knowing what it
is for.  Then it puts the console into raw mode, prints a mark, and reads one
line of shell (`initramfs`): a shell for a person, or a command to run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from trivisor.guests.command import ready_mark
from trivisor.guests.initramfs import check_command

_PLAIN = frozenset(
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-./,:;=+@%<>&|()[]{}*$\"#!~^"
)
"""What stands for itself in `$'...'`."""


class ReadyMark:
    """Watches the console for the mark; calls `ready` when it has come, and passes on everything before it."""

    def __init__(self, word: bytes, write: Callable[[bytes], None], ready: Callable[[], None]) -> None:
        self._mark = ready_mark(word).rstrip()
        self._write = write
        self._ready = ready
        self._held = b""
        self._done = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._done:
            return
        held = self._held + data
        found = held.find(self._mark)
        if found >= 0:
            self._done = True
            self._pass(held[:found])
            self._ready()
            return
        keep = next((n for n in range(len(self._mark) - 1, 0, -1) if held.endswith(self._mark[:n])), 0)
        self._pass(held[: len(held) - keep])
        self._held = held[len(held) - keep :]

    def _pass(self, data: bytes) -> None:
        if data:
            self._write(data)


def line(command: Sequence[str] | None, terminal_size: tuple[int, int] | None) -> bytes:
    """What to type for a waiting guest: a shell for whoever is on the console, or a command between marks.

    The marks are made of the word that the guest waits as.  ValueError for a command that no process can be given.
    """
    if command is None:
        rows_and_columns = "" if terminal_size is None else f" rows {terminal_size[0]:d} cols {terminal_size[1]:d}"
        return f"shell{rows_and_columns}\n".encode()
    check_command(command)
    return b"run " + b" ".join(_quoted(os.fsencode(argument)) for argument in command) + b"\n"


def _quoted(argument: bytes) -> bytes:
    """In `$'...'`, where every byte can be spelled: the line must be one line, and of printable characters."""
    return b"$'" + b"".join(bytes((byte,)) if byte in _PLAIN else b"\\%03o" % byte for byte in argument) + b"'"
