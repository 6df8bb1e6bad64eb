"""The network's back end (io/netif.h): the guest's Ethernet frames to and from a link of ours, by copying.

A frame takes one slot of the ring for each piece of it; requests to send may
have extra slots between.  The guest leaves checksums to us, and may send TCP
segments that are longer than the link's packets, which libslirp takes whole.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from trivisor.machine.memory import PAGE_SIZE
from trivisor.machine.saved_values import flag
from trivisor.machine.saving import Saved
from trivisor.paravirt.xen.back_ends.back_end import BackEnd, Guest, NoConnection
from trivisor.paravirt.xen.back_ends.checksums import fill_checksum
from trivisor.paravirt.xen.back_ends.ring import RingError, SharedRing
from trivisor.paravirt.xen.grants import GrantError

TX_SIZE, RX_SIZE = 12, 8
CSUM_BLANK, TX_DATA_VALIDATED, MORE_DATA, EXTRA_INFO = 1, 2, 4, 8
"""Flags of a request to send (NETTXF_*)."""
RX_DATA_VALIDATED = 1
"""Flag of a received frame whose checksums need no look (NETRXF_data_validated); MORE_DATA is the same as above."""
OKAY, ERROR, NULL = 0, -1, 1
"""Statuses (NETIF_RSP_*)."""
MOST_SLOTS = 18
"""Pieces of one frame (XEN_NETIF_NR_SLOTS_MIN)."""
LONGEST_FRAME = 65535
_SHORTEST_FRAME = 14
_MOST_WAITING = 512
"""Frames that wait until the guest has room for them; those that come then are lost."""
_EXTRA_MORE = 1

_TX = struct.Struct("<IHHHH")
_TX_RESPONSE = struct.Struct("<Hh8x")
_RX = struct.Struct("<HHI")
_RX_RESPONSE = struct.Struct("<HHHh")

_OFFERS = {
    "feature-rx-copy": "1",
    "feature-rx-flip": "0",
    "feature-sg": "1",
    "feature-gso-tcpv4": "1",
}


class Link(Protocol):
    """What frames go to and come from."""

    def send(self, frame: bytes) -> None:
        """Take a frame of the guest's."""

    def close(self) -> None:
        """Deliver no more."""


Plug = Callable[[Callable[[bytes], None]], Link]
"""Makes a link that calls its argument with each frame for the guest, from any thread."""


class NetworkBackEnd(BackEnd):
    """A network card on the link that `plug` makes."""

    ring_names: ClassVar = {"tx-ring-ref": TX_SIZE, "rx-ring-ref": RX_SIZE}

    def __init__(self, guest: Guest, front: str, back: str, plug: Plug) -> None:
        self._tx: SharedRing | None = None
        self._rx: SharedRing | None = None
        self._scatters = False
        self._waiting: deque[bytes] = deque()
        self._counts: Counter[str] = Counter()
        self._lost = 0  # by the link's thread
        self._link = plug(self._deliver)
        super().__init__(guest, front, back, _OFFERS)

    # -- the connection -------------------------------------------------------------------------------------

    def connect(self) -> None:
        if not self.flag("request-rx-copy"):
            raise NoConnection("the front end does not have frames copied")
        self._scatters = self.flag("feature-sg")

    def use(self, rings: list[SharedRing]) -> None:
        self._tx, self._rx = rings or (None, None)

    def quiesce(self) -> None:
        """Frames are taken whole.  Those that wait for room may be lost, as on any network."""

    def close(self) -> None:
        self._link.close()

    def save(self) -> Saved:
        """The connection.  The link is another one after a snapshot."""
        return {**super().save(), "scatters": self._scatters}

    def load(self, saved: Saved) -> None:
        self._scatters = flag(saved, "scatters")
        super().load(saved)

    def notified(self) -> None:
        tx = self._tx
        if tx is None:
            return
        answered = False
        while tx.waiting or tx.settle():
            self._take_frame(tx)
            answered = True
        if answered and tx.push():
            self.notify()
        self._receive()

    # -- from the guest -------------------------------------------------------------------------------------

    def _take_frame(self, ring: SharedRing) -> None:
        """Take one frame's slots, send it, and answer them; RingError for a frame without an end."""
        reference, offset, flags, number, length = _TX.unpack(ring.take())
        numbers, pieces, more = [number], [(reference, offset, 0)], flags
        extras = self._skip_extras(ring) if flags & EXTRA_INFO else 0
        rest = length
        while more & MORE_DATA:
            reference, offset, more, number, size = _TX.unpack(_following(ring))
            numbers.append(number)
            pieces.append((reference, offset, size))
            rest -= size
        # The first slot tells the length of the whole frame.
        pieces[0] = (pieces[0][0], pieces[0][1], rest)
        status = OKAY if self._send(pieces, length, flags) else ERROR
        for index, number in enumerate(numbers):
            ring.respond(_TX_RESPONSE.pack(number, status))
            for _ in range(0 if index else extras):
                ring.respond(_TX_RESPONSE.pack(0, NULL))

    @staticmethod
    def _skip_extras(ring: SharedRing) -> int:
        """The slots of extra information, which tells of how to cut a long segment up: nobody needs to."""
        count, flags = 0, _EXTRA_MORE
        while flags & _EXTRA_MORE:
            flags = _following(ring)[1]
            count += 1
        return count

    def _send(self, pieces: list[tuple[int, int, int]], length: int, flags: int) -> bool:
        """Copy a frame out of the guest's memory and send it; False when there is something wrong with it."""
        if length < _SHORTEST_FRAME or len(pieces) > MOST_SLOTS:
            self._counts["refused"] += 1
            return False
        frame = bytearray()
        try:
            for reference, offset, size in pieces:
                if size < 0 or offset + size > PAGE_SIZE:
                    raise GrantError(f"{size} bytes from {offset} on of a page")
                with self.guest.grants.access(reference, write=False) as address:
                    frame += self.guest.memory.read(address + offset, size)
        except GrantError:
            self._counts["refused"] += 1
            return False
        if flags & CSUM_BLANK:
            fill_checksum(frame)
        self._link.send(bytes(frame))
        self._counts["frames sent"] += 1
        self._counts["bytes sent"] += length
        return True

    # -- to the guest ---------------------------------------------------------------------------------------

    def _deliver(self, frame: bytes) -> None:
        """A frame for the guest; from any thread."""
        if len(self._waiting) >= _MOST_WAITING or len(frame) > LONGEST_FRAME:
            self._lost += 1
            return
        self._waiting.append(frame)
        if len(self._waiting) == 1:
            self.guest.clock.post(self._arrived)

    def _arrived(self) -> None:
        try:
            self._receive()
        except RingError as error:
            self.fail(str(error))

    def _receive(self) -> None:
        """Put frames into the guest's memory as far as it has given room."""
        ring, waiting = self._rx, self._waiting
        if ring is None:
            waiting.clear()  # nobody is there yet
            return
        answered = False
        while waiting:
            slots = -(-len(waiting[0]) // PAGE_SIZE)
            if slots > 1 and not self._scatters:
                waiting.popleft()
                self._counts["frames lost"] += 1
                continue
            if ring.waiting < slots and not ring.settle(slots):
                break
            self._put_frame(ring, waiting[0], slots)
            waiting.popleft()
            answered = True
        if answered and ring.push():
            self.notify()

    def _put_frame(self, ring: SharedRing, frame: bytes, slots: int) -> None:
        for index in range(slots):
            number, _, reference = _RX.unpack(ring.take())
            piece = frame[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            flags = (0 if index else RX_DATA_VALIDATED) | (MORE_DATA if index + 1 < slots else 0)
            status = len(piece)
            try:
                with self.guest.grants.access(reference, write=True) as address:
                    self.guest.memory.write(address, piece)
                    self.guest.written(address, status)
            except GrantError:
                self._counts["refused"] += 1
                status = ERROR
            ring.respond(_RX_RESPONSE.pack(number, 0, flags, status))
        self._counts["frames received"] += 1
        self._counts["bytes received"] += len(frame)

    def statistics(self) -> dict[str, Any]:
        lost = self._counts["frames lost"] + self._lost
        return {**self._counts, **({"frames lost": lost} if lost else {})}


def _following(ring: SharedRing) -> bytes:
    """The slot that has to follow."""
    if not ring.waiting:
        raise RingError("a frame without an end")
    return ring.take()
