"""What an engine may do at an I/O port without asking the device there: registers without side effects.

One 16-bit word a port, for accesses of one byte alone: the low byte is a
value, the high byte has the bits below.  Devices keep it true; an engine reads
it natively or not at all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

READS = 0x100
"""IN gives the value and has no effect."""
LATCHES = 0x200
"""OUT does nothing but to become the value."""
DROPS = 0x400
"""OUT does nothing."""
QUEUES = 0x800
"""OUT may wait: the device can have its bytes later, in order (one port of a board only)."""

QUEUE_SIZE = 4096
"""Bytes that may wait."""
_PORTS = 0x10000


class FastPorts:
    """The words of all ports, and the queue."""

    def __init__(self) -> None:
        self._words = (ctypes.c_uint16 * _PORTS).from_buffer_copy((READS | DROPS | 0xFF).to_bytes(2, "little") * _PORTS)
        self.queue_port = 0
        self.on_queue: Callable[[], None] = lambda: None
        """Set by an engine; called when the queueing port was written to the slow way: it may start to queue."""
        self._accept: Callable[[bytes], None] = lambda data: None

    @property
    def address(self) -> int:
        """Host address of the words."""
        return ctypes.addressof(self._words)

    def claim(self, base: int, length: int) -> None:
        """A device answers at these ports: nothing goes by it until it says so."""
        for port in range(base, base + length):
            self._words[port] = 0

    def register(self, port: int) -> FastRegister:
        """The device's handle on one port."""
        return FastRegister(self._words, port)

    def wrote_slowly(self) -> None:
        """The device at the queueing port was written to."""
        self.on_queue()

    def queue(self, port: int, accept: Callable[[bytes], None]) -> FastRegister:
        """The handle on the one port that queues; `accept` gets what was written, later."""
        self.queue_port, self._accept = port, accept
        return FastRegister(self._words, port)

    def deliver(self, data: bytes) -> None:
        """An engine hands over what was queued."""
        self._accept(data)


class FastRegister:
    """A device's handle on one port's word."""

    __slots__ = ("_port", "_words")

    def __init__(self, words: ctypes.Array[ctypes.c_uint16], port: int) -> None:
        self._words = words
        self._port = port

    def set(self, how: int, value: int = 0) -> None:
        """Say what may be done here from now on, with `value` as the byte; 0: nothing."""
        self._words[self._port] = how | value

    @classmethod
    def alone(cls) -> FastRegister:
        """One that no engine looks at."""
        return cls((ctypes.c_uint16 * 1)(), 0)

    @property
    def value(self) -> int:
        """The byte, as a guest may have left it."""
        return self._words[self._port] & 0xFF
