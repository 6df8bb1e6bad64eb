"""The back end's side of a ring of requests and responses on a page that the guest shares (io/ring.h).

Indices run on without end, modulo 2^32.  All that is read is the guest's to
change at any time: it is copied once and then looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

from trivisor.machine.memory import PAGE_SIZE, GuestMemory

_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = 0, 4, 8, 12
_HEADER = 64
_MASK32 = 0xFFFFFFFF


class RingError(Exception):
    """The guest's indices are nonsense."""


class SharedRing:
    """The ring at physical `address`, of entries of `entry_size` bytes."""

    def __init__(self, memory: GuestMemory, address: int, entry_size: int, answered: int | None = None) -> None:
        """All requests up to index `answered` were answered; without it, as many as the ring itself tells."""
        self._memory = memory
        self._at = address
        self._entry = entry_size
        self.size = 1 << ((PAGE_SIZE - _HEADER) // entry_size).bit_length() - 1
        """How many entries it has."""
        if answered is None:
            answered = self._read(_RSP_PROD)
        self._consumed = self._responded = self._pushed = answered

    def _read(self, offset: int) -> int:
        return self._memory.read_u32(self._at + offset)

    def _write(self, offset: int, value: int) -> None:
        self._memory.write(self._at + offset, (value & _MASK32).to_bytes(4, "little"))

    @property
    def answered(self) -> int:
        """The index up to which requests were answered, and the guest told so."""
        return self._pushed

    @property
    def waiting(self) -> int:
        """How many requests are there to be taken; RingError for more than there can be."""
        producer = self._read(_REQ_PROD)
        if producer - self._responded & _MASK32 > self.size:
            raise RingError(f"requests up to {producer:#x}, responses up to {self._responded:#x}")
        return producer - self._consumed & _MASK32

    def take(self) -> bytes:
        """The next request, of which there is one waiting."""
        start = self._at + _HEADER + self._consumed % self.size * self._entry
        self._consumed = self._consumed + 1 & _MASK32
        return self._memory.read(start, self._entry)

    def settle(self, wanted: int = 1) -> bool:
        """Have the guest send an event once `wanted` requests wait; whether they do already."""
        self._write(_REQ_EVENT, self._consumed + wanted)
        return self.waiting >= wanted

    def requests(self) -> Iterator[bytes]:
        """All requests, and those that come meanwhile; afterwards the guest sends an event with the next one."""
        while self.waiting or self.settle():
            yield self.take()

    def respond(self, response: bytes) -> None:
        """Put a response into the place of a request that was taken."""
        start = self._at + _HEADER + self._responded % self.size * self._entry
        self._responded = self._responded + 1 & _MASK32
        self._memory.write(start, response)

    def push(self) -> bool:
        """Let the guest see the responses; whether it wants an event."""
        before, self._pushed = self._pushed, self._responded
        self._write(_RSP_PROD, self._responded)
        wanted = self._read(_RSP_EVENT)
        return (self._responded - wanted & _MASK32) < (self._responded - before & _MASK32)
