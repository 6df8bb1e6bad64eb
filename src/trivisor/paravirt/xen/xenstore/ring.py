"""The store's ring: requests and replies through a page that the guest shares (io/xs_wire.h)."""

from __future__ import annotations

from collections.abc import Callable

from trivisor.machine.memory import GuestMemory
from trivisor.machine.saved_values import data, flag, part
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.xenstore.protocol import HEADER, LONGEST_PAYLOAD, Connection
from trivisor.paravirt.xen.xenstore.store import Store

_SIZE = 1024
_REQUESTS, _REPLIES = 0, 1024
_REQ_CONS, _REQ_PROD, _RSP_CONS, _RSP_PROD = 2048, 2052, 2056, 2060
_ERROR = 2072
_ERROR_RING_INDEX, _ERROR_PROTOCOL = 2, 3
_MASK32 = 0xFFFFFFFF
_MOST_WAITING = 256 * 1024
"""Bytes of replies that wait for the guest to take them; a guest that lets more pile up is not served until it does."""


_MOST_RECEIVED = HEADER.size + LONGEST_PAYLOAD + _SIZE
_MOST_SAVED = 16 << 20
"""Events of watches are not held up, so more can wait."""


class StoreRing(Remembers):
    """The domain's way to the store; `notify()` sends it an event."""

    def __init__(
        self, memory: GuestMemory, address: int, store: Store, domain: int, notify: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._at = address
        self._notify = notify
        self._received = bytearray()
        self._waiting = bytearray()
        self._broken = False
        self._connection = Connection(store, domain, self._send)

    remembered = ("_received", "_waiting", "_broken", "_connection")

    def load(self, saved: Saved) -> None:
        self._received[:] = data(saved, "received", _MOST_RECEIVED)
        self._waiting[:] = data(saved, "waiting", _MOST_SAVED)
        self._broken = flag(saved, "broken")
        self._connection.load(part(saved, "connection"))

    def guest_sent(self) -> None:
        """The guest has sent an event: take requests, and go on with replies that it has made room for."""
        if self._broken:
            return
        moved = self._flush()
        while not self._broken and len(self._waiting) < _MOST_WAITING and self._take():
            moved = True
            self._serve()
            self._flush()
        if moved:
            self._notify()

    def _read(self, offset: int) -> int:
        return self._memory.read_u32(self._at + offset)

    def _write(self, offset: int, value: int) -> None:
        self._memory.write(self._at + offset, (value & _MASK32).to_bytes(4, "little"))

    def _take(self) -> bool:
        """Move what the guest has put into the ring; False when there is nothing."""
        consumer, producer = self._read(_REQ_CONS), self._read(_REQ_PROD)
        length = producer - consumer & _MASK32
        if length == 0:
            return False
        if length > _SIZE:
            self._fail(_ERROR_RING_INDEX)
            return False
        start = consumer % _SIZE
        first = min(length, _SIZE - start)
        self._received += self._memory.read(self._at + _REQUESTS + start, first)
        self._received += self._memory.read(self._at + _REQUESTS, length - first)
        self._write(_REQ_CONS, producer)
        return True

    def _serve(self) -> None:
        received = self._received
        while len(received) >= HEADER.size:
            kind, number, transaction, length = HEADER.unpack_from(received)
            if length > LONGEST_PAYLOAD:
                self._fail(_ERROR_PROTOCOL)
                return
            if len(received) < HEADER.size + length:
                return
            payload = bytes(received[HEADER.size : HEADER.size + length])
            del received[: HEADER.size + length]
            self._connection.request(kind, number, transaction, payload)

    def _fail(self, error: int) -> None:
        """The guest broke the protocol: it is told, and served no more."""
        self._broken = True
        self._connection.close()
        self._write(_ERROR, error)

    def _send(self, message: bytes) -> None:
        self._waiting += message
        if self._flush():
            self._notify()

    def _flush(self) -> bool:
        """Put waiting replies into the ring as far as there is room."""
        if not self._waiting or self._broken:
            return False
        consumer, producer = self._read(_RSP_CONS), self._read(_RSP_PROD)
        used = producer - consumer & _MASK32
        if used > _SIZE:
            self._fail(_ERROR_RING_INDEX)
            return False
        length = min(_SIZE - used, len(self._waiting))
        if not length:
            return False
        data = bytes(self._waiting[:length])
        del self._waiting[:length]
        start = producer % _SIZE
        first = min(length, _SIZE - start)
        self._memory.write(self._at + _REPLIES + start, data[:first])
        self._memory.write(self._at + _REPLIES, data[first:])
        self._write(_RSP_PROD, producer + length)
        return True
