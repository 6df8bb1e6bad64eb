"""Guest memory by linear address, as ring 3 may use it: a walk of the guest's page tables as they stand."""

from __future__ import annotations

from trivisor.machine.memory import PAGE_SIZE, GuestMemory
from trivisor.x86.exceptions import PAGE_FAULT, PF_PRESENT, PF_USER, PF_WRITE, GuestException
from trivisor.x86.paging import ACCESSED, DIRTY, PRESENT, USER, WRITABLE, is_canonical

_ADDRESS = (1 << 52) - PAGE_SIZE
_MASK64 = (1 << 64) - 1
_INDEX = 511


class RingThreeMemory:
    """Loads and stores through the tables at `root`, a physical address.

    `own_slot` is the level-4 entry that leads out of the guest's memory: nothing there is ring 3's to load.
    """

    def __init__(self, memory: GuestMemory, own_slot: int) -> None:
        self._view = memory.view
        self._words = memory.view.cast("Q")
        self._own_slot = own_slot
        self.root = 0

    def close(self) -> None:
        """Let the memory go."""
        self._words.release()

    def load(self, linear: int, size: int, *, system: bool = False) -> bytes:
        """`size` bytes at `linear`, or as ring 0 sees them (`system`); raises `GuestException`."""
        room = PAGE_SIZE - (linear & 0xFFF)
        if size <= room:
            at = self.physical(linear, False, system)
            return bytes(self._view[at : at + size])
        rest = self.load(linear + room & _MASK64, size - room, system=system)
        return self.load(linear, room, system=system) + rest

    def store(self, linear: int, data: bytes) -> None:
        """Write page by page; raises `GuestException` at the first that cannot be written."""
        room = PAGE_SIZE - (linear & 0xFFF)
        if len(data) > room:
            self.store(linear, data[:room])
            self.store(linear + room & _MASK64, data[room:])
            return
        at = self.physical(linear, True)
        self._view[at : at + len(data)] = data

    def physical(self, linear: int, write: bool, system: bool = False) -> int:
        """Where `linear` leads, setting accessed and dirty bits as the processor does; raises `GuestException`."""
        words, table, rights = self._words, self.root >> 3, USER | WRITABLE
        error = PF_USER | PF_WRITE if write else PF_USER
        if linear >> 39 & _INDEX == self._own_slot or not is_canonical(linear):
            raise GuestException(PAGE_FAULT, error, linear)
        at = entry = 0
        for shift in (39, 30, 21, 12):
            at = table + (linear >> shift & _INDEX)
            entry = words[at]
            if not entry & PRESENT:
                raise GuestException(PAGE_FAULT, error, linear)
            rights &= entry
            table = (entry & _ADDRESS) >> 3
        if not (rights & USER or system) or (write and not rights & WRITABLE):
            raise GuestException(PAGE_FAULT, error | PF_PRESENT, linear)
        marks = ACCESSED | DIRTY if write else ACCESSED
        if entry & marks != marks:
            words[at] = entry | marks
        return (entry & _ADDRESS) + (linear & 0xFFF)
