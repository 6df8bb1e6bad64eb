"""Mapping granted frames (Xen, common/grant_table.c: map_grant_ref, unmap_common, replace_grant_pv_mapping).

No other domain grants anything to this one, but it may grant to itself.  A
mapping holds references of its own, beside those of the page-table entry that
it has made: what the guest does to the entry changes nothing of the mapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trivisor.machine.saved_values import rows
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.frames import L1
from trivisor.paravirt.xen.grants import BACK_END_DOMAIN, GrantError
from trivisor.paravirt.xen.page_tables import ACCESSED, DIRTY, PRESENT, USER, WRITE, entry_frame
from trivisor.paravirt.xen.walk import entry_address

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain

_MOST = 8192
"""Mappings at a time."""
_COMPARED = PRESENT | WRITE
_AVAILABLE, _AVAILABLE_SHIFT = 7, 9
"""The bits of a page-table entry that are the guest's own."""
_KEPT = 31
"""Of the flags of a mapping: what it is, without the bits that the guest wants in the entry."""
_WAYS = (abi.GNTMAP_HOST_MAP, abi.GNTMAP_DEVICE_MAP)


@dataclass(slots=True)
class Mapping:
    """One handle: which grant it is of, and how that is mapped; `flags` are abi.GNTMAP_*."""

    reference: int
    frame: int
    flags: int

    @property
    def writable(self) -> bool:
        return not self.flags & abi.GNTMAP_READONLY

    @property
    def rights(self) -> int:
        """What the page-table entry's bits must be."""
        return PRESENT | (WRITE if self.writable else 0)


class GrantMaps(Remembers):
    """The domain's mappings of grants, by handle."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.mappings: dict[int, Mapping] = {}

    def save(self) -> Saved:
        rows_of = [[handle, one.reference, one.frame, one.flags] for handle, one in self.mappings.items()]
        return {"mappings": rows_of}

    def load(self, saved: Saved) -> None:
        """Mappings take their references again; ValueError for what the domain cannot have mapped."""
        grants = self._domain.grants
        for handle, reference, frame, flags in rows(saved, "mappings", [13, 32, 40, 5], _MOST):
            if handle in self.mappings or not flags & (abi.GNTMAP_HOST_MAP | abi.GNTMAP_DEVICE_MAP):
                raise ValueError(f"handle {handle} is not of one mapping")
            mapping = Mapping(reference, frame, flags)
            try:
                grants.enter_again(reference, self._domain.number, frame, write=mapping.writable)
                self._hold(mapping)
            except GrantError as error:
                raise ValueError(str(error)) from None
            self.mappings[handle] = mapping

    # -- mapping --------------------------------------------------------------------------------------------

    def map(self, host_address: int, flags: int, reference: int, granter: int) -> tuple[int, int]:
        """(handle, frame) of a new mapping of a grant of `granter`'s; raises GrantError."""
        if not flags & (abi.GNTMAP_HOST_MAP | abi.GNTMAP_DEVICE_MAP):
            raise GrantError("it is to be mapped nowhere", abi.GNTST_BAD_GNTREF)
        domain = self._domain
        if granter not in (BACK_END_DOMAIN, domain.number, abi.DOMID_SELF):
            raise GrantError("there is no such domain", abi.GNTST_BAD_DOMAIN)
        handle = next((number for number in range(_MOST) if number not in self.mappings), None)
        if handle is None:
            raise GrantError("too many mappings", abi.GNTST_NO_SPACE)
        domain.grants.entry_address(reference)
        if granter == BACK_END_DOMAIN:
            raise GrantError("it has granted nothing")
        write = not flags & abi.GNTMAP_READONLY
        mapping = Mapping(reference, domain.grants.acquire(reference, domain.number, write=write).frame, flags & _KEPT)
        try:
            self._hold(mapping)
            if flags & abi.GNTMAP_HOST_MAP:
                self._make_entry(mapping, host_address, flags)
        except GrantError:
            domain.grants.release(reference, write=write)
            raise
        self.mappings[handle] = mapping
        return handle, mapping.frame

    def _hold(self, mapping: Mapping) -> None:
        """References for each way in which it is mapped; GNTST_bad_page or general_error."""
        if not self._domain.frames.owns(mapping.frame):
            raise GrantError("the frame is not the domain's", abi.GNTST_BAD_PAGE)
        held = 0
        for way in _WAYS:
            if mapping.flags & way:
                try:
                    self._domain.frames.hold(mapping.frame, writable=mapping.writable)
                except HypercallError as error:
                    self._let_go(mapping, held)
                    raise GrantError(str(error)) from None
                held |= way

    def _let_go(self, mapping: Mapping, ways: int) -> None:
        for way in _WAYS:
            if ways & way:
                self._domain.frames.let_go(mapping.frame, writable=mapping.writable)

    def _make_entry(self, mapping: Mapping, host_address: int, flags: int) -> None:
        """The page-table entry of a mapping that is held; without one it is held no more."""
        bits = (flags >> abi.GNTMAP_GUEST_AVAIL_SHIFT & _AVAILABLE) << _AVAILABLE_SHIFT | ACCESSED | DIRTY
        if flags & abi.GNTMAP_APPLICATION_MAP:
            bits |= USER
        try:
            place = self._entry(host_address, flags)
            self._domain.tables.change(*place, mapping.frame << 12 | mapping.rights | bits)
        except (HypercallError, GrantError) as error:
            self._let_go(mapping, mapping.flags)
            raise GrantError(str(error)) from None

    def _entry(self, host_address: int, flags: int) -> tuple[int, int]:
        """(table, index) of the level-1 entry that an operation means: by linear address, or by its own."""
        domain = self._domain
        if flags & abi.GNTMAP_CONTAINS_PTE:
            table = host_address >> 12
            if host_address & 7 or not domain.frames.owns(table):
                raise GrantError("there is no page-table entry at that address")
            found: tuple[int, int] | None = (table, host_address >> 3 & 511)
        else:
            found = entry_address(domain, host_address)
        if found is None or domain.frames.kind[found[0]] != L1 or not domain.frames.kind_count[found[0]]:
            raise GrantError("there is no entry of a level-1 table")
        return found

    # -- unmapping ------------------------------------------------------------------------------------------

    def unmap(self, host_address: int, bus_address: int, handle: int) -> None:
        """Undo the mapping at `host_address`, at `bus_address`, or both (0: neither); raises GrantError."""
        mapping = self._get(handle)
        ways = 0
        if bus_address and mapping.flags & abi.GNTMAP_DEVICE_MAP:
            if bus_address != mapping.frame << 12:
                raise GrantError("it is not at that bus address", abi.GNTST_BAD_DEV_ADDR)
            ways |= abi.GNTMAP_DEVICE_MAP
        if host_address and mapping.flags & abi.GNTMAP_HOST_MAP:
            self._domain.tables.change(*self._mapped(mapping, host_address), 0)
            ways |= abi.GNTMAP_HOST_MAP
        self._end(handle, mapping, ways)

    def replace(self, host_address: int, new_address: int, handle: int) -> None:
        """Undo a mapping, and have the entry at `new_address` take its place."""
        mapping = self._get(handle)
        if mapping.flags & abi.GNTMAP_CONTAINS_PTE or not mapping.flags & abi.GNTMAP_HOST_MAP:
            raise GrantError("it has no linear address")
        tables, words = self._domain.tables, self._domain.frames.words
        place = self._mapped(mapping, host_address)
        if not new_address:
            tables.change(*place, 0)
        else:
            other = self._entry(new_address, 0)
            entry = words[other[0] * 512 + other[1]]
            if other != place:
                tables.change(*place, entry)
                tables.change(*other, 0)
        self._end(handle, mapping, abi.GNTMAP_HOST_MAP)

    def _get(self, handle: int) -> Mapping:
        mapping = self.mappings.get(handle)
        if mapping is None:
            raise GrantError("no such handle", abi.GNTST_BAD_HANDLE)
        return mapping

    def _mapped(self, mapping: Mapping, host_address: int) -> tuple[int, int]:
        """The entry at an address, which must still be the mapping's."""
        place = self._entry(host_address, mapping.flags)
        entry = self._domain.frames.words[place[0] * 512 + place[1]]
        if entry_frame(entry) != mapping.frame or (entry ^ mapping.rights) & _COMPARED:
            raise GrantError("the entry is not the mapping's any more")
        return place

    def _end(self, handle: int, mapping: Mapping, ways: int) -> None:
        mapping.flags &= ~ways
        if not mapping.flags & (abi.GNTMAP_HOST_MAP | abi.GNTMAP_DEVICE_MAP):
            del self.mappings[handle]
            self._domain.grants.release(mapping.reference, write=mapping.writable)
        self._let_go(mapping, ways)
        if ways & abi.GNTMAP_HOST_MAP:
            self._domain.flush()
