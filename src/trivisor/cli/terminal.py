"""The user's terminal while it is the guest's console: raw mode and the escape key."""

from __future__ import annotations

import contextlib
import os
import termios
from collections.abc import Iterator
from enum import Enum

ESCAPE = 0x01
"""Ctrl-A, as in QEMU and screen."""

HELP = b"""
Ctrl-A x        end trivisor
Ctrl-A c, h, ?  this help
Ctrl-A Ctrl-A   send Ctrl-A to the guest
"""


class Action(Enum):
    """What an escape sequence asks the monitor to do."""

    END = "end"
    HELP = "help"


class EscapeKeys:
    """Takes the escape sequences out of what is typed."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, typed: bytes) -> tuple[bytes, list[Action]]:
        """Return what goes to the guest and the actions asked for; unknown sequences vanish."""
        for_guest = bytearray()
        actions: list[Action] = []
        for key in typed:
            if not self._escaped:
                self._escaped = key == ESCAPE
                if not self._escaped:
                    for_guest.append(key)
                continue
            self._escaped = False
            if key == ESCAPE:
                for_guest.append(key)
            elif key in b"xX":
                actions.append(Action.END)
            elif key in b"cChH?":
                actions.append(Action.HELP)
        return bytes(for_guest), actions


@contextlib.contextmanager
def raw_mode(descriptor: int) -> Iterator[None]:
    """Keys come one by one, unechoed and without signals, until the block is left, however it is left.

    Output is still processed, so that our own messages end their lines.  Does
    nothing when `descriptor` is no terminal.
    """
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    raw = termios.tcgetattr(descriptor)
    raw[0] &= ~(
        termios.BRKINT | termios.ICRNL | termios.IGNCR | termios.INLCR
        | termios.INPCK | termios.ISTRIP | termios.IXON
    )  # fmt: skip
    raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
    raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
    try:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, raw)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone (SIGHUP)
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
