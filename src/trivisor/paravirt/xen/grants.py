"""Grant tables, versions 1 and 2: what the guest lets others use of its memory (grant_table.h, common/grant_table.c).

The guest writes entries into frames that it shares with us; whoever was
granted something names an entry by its number.  Back ends are ours and have
the domain number 0.  Which entries are in use is shown in the entry itself
(version 1) or in frames beside the table (version 2); the guest can write to
either, so what is in use, and as what, is kept here as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

from trivisor.machine.memory import PAGE_SIZE
from trivisor.machine.saved_values import number
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.abi import (
    EAGAIN,
    EBUSY,
    ERANGE,
    GNTST_BAD_GNTREF,
    GNTST_EAGAIN,
    GNTST_GENERAL_ERROR,
    GNTTAB_RESERVED_ENTRIES,
    GRANT_STATUSES_PER_FRAME,
    GTF_PERMIT_ACCESS,
    GTF_READING,
    GTF_READONLY,
    GTF_SUB_PAGE,
    GTF_TRANSITIVE,
    GTF_TYPE_MASK,
    GTF_WRITING,
)
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.frames import Frames

BACK_END_DOMAIN = 0
_V1, _V2, _STATUS = struct.Struct("<HHI"), struct.Struct("<HHHHQ"), struct.Struct("<H")
_LAYOUTS: Final = {1: _V1, 2: _V2}
_V1_SIZE, _V2_SIZE = _V1.size, _V2.size
"""Flags, domain and frame; in version 2 there is the piece of a page, offset and length, before the frame."""
_IN_USE = GTF_READING | GTF_WRITING


class GrantError(Exception):
    """A grant reference that does not give what it is used for; `status` is one of abi.GNTST_*."""

    def __init__(self, what: str, status: int = GNTST_GENERAL_ERROR) -> None:
        super().__init__(what)
        self.status = status


class Entry(NamedTuple):
    """What an entry says; `start` and `length` are the granted piece of the page, in bytes."""

    flags: int
    domain: int
    start: int
    length: int
    frame: int


@dataclass(slots=True)
class ActiveGrant:
    """A grant in use (struct active_grant_entry): what the entry said when its first user came."""

    domain: int
    frame: int
    start: int
    length: int
    sub_page: bool
    status: int
    """The physical address of the 16 bits that show it."""
    users: int = 0
    writers: int = 0
    """How many of the users write."""


def status_frames(frames: int) -> int:
    """How many status frames a table of so many frames has in version 2."""
    return -(-frames * (PAGE_SIZE // _LAYOUTS[2].size) // GRANT_STATUSES_PER_FRAME)


class GrantTable(Remembers):
    """The domain's grants.

    `shared` are the frames of the table that the guest may have, `used` how
    many it has; `status` are those that show in version 2 what is in use.
    """

    def __init__(self, frames: Frames, shared: list[int], status: list[int]) -> None:
        self._frames = frames
        self.shared = shared
        self.status = status
        self.used = 4
        self.version = 1
        self.active: dict[int, ActiveGrant] = {}
        """By reference."""

    remembered = ("used", "version")
    """What is in use is entered again by those who use it (`enter_again`)."""

    def load(self, saved: Saved) -> None:
        self.version = number(saved.get("version"), "version", 2)
        if self.version not in _LAYOUTS:
            raise ValueError(f"there are no grant tables of version {self.version}")
        self.grow(number(saved.get("used"), "used", 32))

    def grow(self, count: int) -> None:
        """The guest wants at least that many frames of the table; at most all of `shared`."""
        self.used = max(self.used, min(count, len(self.shared)))
        if self.version == 2:
            self._share_status()

    def status_shared(self) -> list[int]:
        """The status frames that the guest has."""
        return self.status[: status_frames(self.used)] if self.version == 2 else []

    def _share_status(self) -> None:
        for frame in self.status[: status_frames(self.used)]:
            if not self._frames.owns(frame):
                self._frames.share(frame, writable=True)

    # -- versions -------------------------------------------------------------------------------------------

    def set_version(self, version: int) -> None:
        """Go over to another layout; all entries but the reserved ones are lost (gnttab_set_version).

        EBUSY while an entry is in use or a status frame is mapped that would go, ERANGE for reserved entries that
        version 1 does not have.
        """
        if version == self.version:
            return
        if any(reference >= GNTTAB_RESERVED_ENTRIES for reference in self.active):
            raise HypercallError(EBUSY)
        reserved = [(self.entry(reference), self._status(reference)) for reference in range(GNTTAB_RESERVED_ENTRIES)]
        if version == 1:
            if any(active.sub_page for active in self.active.values()):
                raise HypercallError(EAGAIN)
            if not all(_fits_version_1(entry) for entry, _ in reserved):
                raise HypercallError(ERANGE)
            self._frames.unshare(self.status_shared())
        view = self._frames.memory.view
        for frame in (*self.shared[: self.used], *self.status):
            view[frame * PAGE_SIZE : (frame + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
        self.version = version
        if version == 2:
            self._share_status()
        for reference, (entry, status) in enumerate(reserved):
            at = self.entry_address(reference)
            if version == 1 and entry.flags & GTF_TYPE_MASK != GTF_PERMIT_ACCESS:
                continue
            values = (entry.flags & ~_IN_USE, entry.domain, *((0, 0) if version == 2 else ()), entry.frame)
            _LAYOUTS[version].pack_into(view, at, *values)
            self._mark(self.status_address(reference), status & _IN_USE, 0)
        for reference, active in self.active.items():
            active.status = self.status_address(reference)

    # -- entries --------------------------------------------------------------------------------------------

    def entry_address(self, reference: int) -> int:
        """The physical address of an entry; GrantError for a number beyond the table."""
        offset = reference * (_V1_SIZE if self.version == 1 else _V2_SIZE)
        if offset >= self.used * PAGE_SIZE:
            raise GrantError(f"grant {reference} is beyond the table", GNTST_BAD_GNTREF)
        return self.shared[offset // PAGE_SIZE] * PAGE_SIZE + offset % PAGE_SIZE

    def entry(self, reference: int) -> Entry:
        """What the entry says now; it is the guest's to change at any time."""
        return Entry(*self._read(reference))

    def _read(self, reference: int) -> tuple[int, int, int, int, int]:
        """The fields of `Entry`."""
        at, view = self.entry_address(reference), self._frames.memory.view
        if self.version == 1:
            flags, domain, frame = _V1.unpack_from(view, at)
            return flags, domain, 0, PAGE_SIZE, frame
        flags, domain, start, length, frame = _V2.unpack_from(view, at)
        if not flags & GTF_SUB_PAGE:
            start, length = 0, PAGE_SIZE
        return flags, domain, start, length, frame

    def status_address(self, reference: int) -> int:
        """The physical address of the 16 bits that show whether an entry is in use."""
        if self.version == 1:
            return self.entry_address(reference)
        offset = reference * _STATUS.size
        return self.status[offset // PAGE_SIZE] * PAGE_SIZE + offset % PAGE_SIZE

    def _status(self, reference: int) -> int:
        return int(_STATUS.unpack_from(self._frames.memory.view, self.status_address(reference))[0])

    def _mark(self, status: int, used: int, unused: int) -> None:
        """Show, at a status's address, the bits `used` of GTF_READING and GTF_WRITING, no longer the bits `unused`."""
        view = self._frames.memory.view
        (flags,) = _STATUS.unpack_from(view, status)
        _STATUS.pack_into(view, status, flags & ~unused | used)

    def swap(self, one: int, other: int) -> None:
        """Two entries change places; raises GrantError, GNTST_eagain while one is in use."""
        places = [(self.entry_address(reference), _LAYOUTS[self.version].size) for reference in (one, other)]
        if one == other:
            return
        if one in self.active or other in self.active:
            raise GrantError("one of them is in use", GNTST_EAGAIN)
        view = self._frames.memory.view
        for (at, size), (there, _) in (places, [(self.status_address(one), 2), (self.status_address(other), 2)]):
            if self.version == 1 and size == 2:
                break  # the status is in the entry
            view[at : at + size], view[there : there + size] = (
                bytes(view[there : there + size]), bytes(view[at : at + size])
            )  # fmt: skip

    # -- use ------------------------------------------------------------------------------------------------

    def acquire(self, reference: int, domain: int, *, write: bool, whole: bool = True) -> ActiveGrant:
        """Use the grant as `domain`, all of the page if `whole`, until `release`; raises GrantError.

        The entry is marked as in use.  The frame is not held, nor looked at.
        """
        flags, grantee, start, length, frame = self._read(reference)
        active = self.active.get(reference)
        if active is None:
            kind = flags & (GTF_TYPE_MASK | (GTF_SUB_PAGE if whole else 0))
            if kind != GTF_PERMIT_ACCESS or grantee != domain:
                raise GrantError(f"grant {reference} is not for {domain} (flags {flags:#x}, domain {grantee})")
            sub_page = self.version == 2 and bool(flags & GTF_SUB_PAGE)
            active = ActiveGrant(domain, frame, start, length, sub_page, self.status_address(reference))
        elif active.domain != domain or (whole and active.sub_page):
            raise GrantError(f"grant {reference} is in use as another's")
        if write and flags & GTF_READONLY and not active.writers:
            raise GrantError(f"grant {reference} is read-only")
        self.enter(reference, active, write=write)
        self._mark(active.status, _IN_USE if write else GTF_READING, 0)
        return active

    def enter(self, reference: int, active: ActiveGrant, *, write: bool) -> None:
        """One user more of what is in use."""
        active.users += 1
        active.writers += write
        self.active[reference] = active

    def enter_again(self, reference: int, domain: int, frame: int, *, write: bool) -> ActiveGrant:
        """After `load`: a user of when the snapshot was made; raises GrantError for what cannot be in use so.

        The entry is marked already, and may say something else since.
        """
        self.entry_address(reference)
        new = ActiveGrant(domain, frame, 0, PAGE_SIZE, False, self.status_address(reference))
        active = self.active.get(reference, new)
        if (active.domain, active.frame) != (domain, frame):
            raise GrantError(f"grant {reference} is of two frames, or two domains")
        self.enter(reference, active, write=write)
        return active

    def release(self, reference: int, *, write: bool) -> None:
        """One user less; without any the entry is marked as unused."""
        active = self.active[reference]
        active.users -= 1
        active.writers -= write
        if not active.users:
            del self.active[reference]
        self._mark(active.status, 0, (0 if active.users else GTF_READING) | (0 if active.writers else GTF_WRITING))

    @contextmanager
    def access(self, reference: int, *, write: bool, domain: int = BACK_END_DOMAIN) -> Iterator[int]:
        """The physical address of the granted page, for as long as the block runs; raises GrantError."""
        grant = self.take(reference, write=write, domain=domain)
        try:
            yield grant.address
        finally:
            grant.release()

    def take(
        self, reference: int, *, write: bool, domain: int = BACK_END_DOMAIN, whole: bool = True
    ) -> Grant:
        """Use the granted page until it is released; raises GrantError.

        Meanwhile the entry is marked as in use and the frame is held, so that
        the guest can neither free it nor make it a page table.
        """
        return self._hold(reference, self.acquire(reference, domain, write=write, whole=whole), write)

    def take_again(self, reference: int, frame: int, *, write: bool) -> Grant:
        """After `load`: what a back end had when the snapshot was made; raises GrantError."""
        return self._hold(reference, self.enter_again(reference, BACK_END_DOMAIN, frame, write=write), write)

    def _hold(self, reference: int, active: ActiveGrant, write: bool) -> Grant:
        try:
            self._frames.hold(active.frame, writable=write)
        except HypercallError as error:
            self.release(reference, write=write)
            raise GrantError(f"grant {reference}: {error}") from None
        return Grant(self, reference, active, write)

    def give_back(self, grant: Grant) -> None:
        """What `take` gave is used no more."""
        self._frames.let_go(grant.frame, writable=grant.write)
        self.release(grant.reference, write=grant.write)


class Grant:
    """A granted page in use: the `frame` behind it, until `release`."""

    __slots__ = ("_table", "frame", "length", "reference", "start", "write")

    def __init__(self, table: GrantTable, reference: int, active: ActiveGrant, write: bool) -> None:
        self._table: GrantTable | None = table
        self.reference = reference
        self.frame = active.frame
        self.start, self.length = active.start, active.length
        """The piece of the page that is granted."""
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


def _fits_version_1(entry: Entry) -> bool:
    kind = entry.flags & GTF_TYPE_MASK
    return kind != GTF_TRANSITIVE and not (kind == GTF_PERMIT_ACCESS and entry.frame >> 32)
