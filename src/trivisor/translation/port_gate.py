"""The engine's side of `machine.fast_ports`: the native helpers' way to ports that need no device."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

from trivisor.machine.exits import PortIn, PortOut
from trivisor.machine.fast_ports import QUEUE_SIZE
from trivisor.machine.memory import host_map, host_unmap
from trivisor.machine.vcpu import Surroundings
from trivisor.translation.core import MASK64, Core
from trivisor.translation.layout import OFFSETS

LATENCY = 10_000_000
"""Nanoseconds that a queued byte may wait for its device."""
_WORDS_SIZE = 0x20000

_PORTS, _QUEUE, _QUEUED, _QUEUE_PORT = (
    OFFSETS[name] // 8 for name in ("PORTS", "PORT_QUEUE", "PORT_QUEUED", "QUEUE_PORT")
)


class PortGate:
    """Opens and closes that way, and hands over what was queued.

    Bytes are queued only while a timer runs that fetches them: the first one
    after a pause goes to its device at once.
    """

    def __init__(self, core: Core, board: Surroundings, observed: dict[type, list[Callable[[Any], None]]]) -> None:
        self._core = core
        self._words = core.words
        self._board = board
        self._observed = observed
        self._fast = board.fast_ports
        self._nothing = host_map(_WORDS_SIZE, mmap.PROT_READ)
        self._buffer = (ctypes.c_ubyte * QUEUE_SIZE)()
        self._view = memoryview(self._buffer).cast("B")
        self._waited = False
        self._open = False
        self._words[_QUEUE] = ctypes.addressof(self._buffer)
        self._words[_QUEUE_PORT] = MASK64
        self._fast.on_queue = self._begin
        self.look()

    def look(self) -> None:
        """Close the way while somebody watches ports, be it the guest."""
        watched = PortIn in self._observed or PortOut in self._observed or self._core.debug.watches_ports
        self._words[_PORTS] = self._nothing if watched else self._fast.address

    def deliver(self) -> None:
        """Hand over what was queued."""
        count = self._words[_QUEUED]
        if count:
            self._words[_QUEUED] = 0
            self._waited = True
            self._fast.deliver(bytes(self._view[:count]))

    def _begin(self) -> None:
        if not self._open:
            self._open = True
            self._words[_QUEUE_PORT] = self._fast.queue_port
            self._again()

    def _again(self) -> None:
        self._waited = False
        clock = self._board.clock
        clock.at(clock.now() + LATENCY, self._fetch)

    def _fetch(self) -> None:
        self.deliver()
        if self._waited:
            self._again()
        else:
            self._open = False
            self._words[_QUEUE_PORT] = MASK64

    def close(self) -> None:
        """Hand over the rest, and give host memory back."""
        self.deliver()
        self._fast.on_queue = lambda: None
        host_unmap(self._nothing, _WORDS_SIZE)
