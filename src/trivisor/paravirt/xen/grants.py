"""Grant tables, version 1: what the guest lets back ends use of its memory (grant_table.h).

The guest writes entries into frames that it shares with us; a back end names
one by its number.  Back ends are ours and have the domain number 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from trivisor.machine.memory import PAGE_SIZE
from trivisor.machine.saved_values import number
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.abi import (
    GRANT_ENTRIES_PER_FRAME,
    GTF_PERMIT_ACCESS,
    GTF_READING,
    GTF_READONLY,
    GTF_TYPE_MASK,
    GTF_WRITING,
)
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.frames import Frames

BACK_END_DOMAIN = 0
_ENTRY = struct.Struct("<HHI")
_ENTRY_SIZE = 8


class GrantError(Exception):
    """A grant reference that does not give what it is used for."""


class GrantTable(Remembers):
    """The domain's grants; `shared` are the frames of the table that the guest may have, `used` how many it has."""

    def __init__(self, frames: Frames, shared: list[int]) -> None:
        self._frames = frames
        self.shared = shared
        self.used = 4
        self._users: dict[int, list[int]] = {}
        """How many read and how many write through an entry, by its address."""

    remembered = ("used",)
    """Back ends have nothing in use when a snapshot is made: there are none."""

    def load(self, saved: Saved) -> None:
        self.grow(number(saved.get("used"), "used", 32))

    def grow(self, count: int) -> None:
        """The guest wants at least that many frames of the table; at most all of `shared`."""
        self.used = max(self.used, min(count, len(self.shared)))

    def entry_address(self, reference: int) -> int:
        """The physical address of an entry; GrantError for a number beyond the table."""
        frame, index = divmod(reference, GRANT_ENTRIES_PER_FRAME)
        if frame >= self.used:
            raise GrantError(f"grant {reference} is beyond the table")
        return self.shared[frame] * PAGE_SIZE + index * _ENTRY_SIZE

    @contextmanager
    def access(self, reference: int, *, write: bool, domain: int = BACK_END_DOMAIN) -> Iterator[int]:
        """The physical address of the granted page, for as long as the block runs; raises GrantError."""
        grant = self.take(reference, write=write, domain=domain)
        try:
            yield grant.address
        finally:
            grant.release()

    def take(self, reference: int, *, write: bool, domain: int = BACK_END_DOMAIN) -> Grant:
        """Use the granted page until it is released; raises GrantError.

        Meanwhile the entry is marked as in use and the frame is held, so that
        the guest can neither free it nor make it a page table.
        """
        at = self.entry_address(reference)
        view = self._frames.memory.view
        flags, grantee, frame = _ENTRY.unpack(view[at : at + _ENTRY_SIZE])
        if flags & GTF_TYPE_MASK != GTF_PERMIT_ACCESS or grantee != domain:
            raise GrantError(f"grant {reference} is not for us (flags {flags:#x}, domain {grantee})")
        if write and flags & GTF_READONLY:
            raise GrantError(f"grant {reference} is read-only")
        try:
            self._frames.get(frame)
            try:
                if write:
                    self._frames.get_writable(frame)
            except HypercallError:
                self._frames.put(frame)
                raise
        except HypercallError as error:
            raise GrantError(f"grant {reference}: {error}") from None
        users = self._users.setdefault(at, [0, 0])
        users[0] += 1
        users[1] += write
        view[at : at + 2] = (flags | GTF_READING | (GTF_WRITING if write else 0)).to_bytes(2, "little")
        return Grant(self, at, frame, write)

    def give_back(self, grant: Grant) -> None:
        """One user less; without any the entry is marked as unused."""
        if grant.write:
            self._frames.put_writable(grant.frame)
        self._frames.put(grant.frame)
        at, view = grant.entry, self._frames.memory.view
        users = self._users[at]
        users[0] -= 1
        users[1] -= grant.write
        unused = (0 if users[0] else GTF_READING) | (0 if users[1] else GTF_WRITING)
        if not users[0]:
            del self._users[at]
        flags = int.from_bytes(view[at : at + 2], "little")
        view[at : at + 2] = (flags & ~unused).to_bytes(2, "little")


class Grant:
    """A granted page in use: the `frame` behind it, until `release`."""

    __slots__ = ("_table", "entry", "frame", "write")

    def __init__(self, table: GrantTable, entry: int, frame: int, write: bool) -> None:
        self._table: GrantTable | None = table
        self.entry = entry
        self.frame = frame
        self.write = write

    @property
    def address(self) -> int:
        """Physical."""
        return self.frame * PAGE_SIZE

    def release(self) -> None:
        """The page is used no more; harmless the second time."""
        if self._table is not None:
            self._table.give_back(self)
            self._table = None
