"""Mapping granted frames (Xen, common/grant_table.c: map_grant_ref, unmap_common, replace_grant_pv_mapping).

No other domain grants anything to this one, but it may grant to itself.  A
mapping holds references of its own, beside those of the page-table entry that
it has made: what the guest does to the entry changes nothing of the mapping.
"""

from __future__ import annotations

import struct
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
_ENTRY = struct.Struct("<HHI")
_COMPARED = PRESENT | WRITE


class GrantFailure(Exception):
    """An operation on a grant fails with `status`, one of abi.GNTST_*."""

    def __init__(self, status: int) -> None:
        super().__init__(f"grant status {status}")
        self.status = status


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
        for handle, reference, frame, flags in rows(saved, "mappings", [13, 32, 40, 16], _MOST):
            if handle in self.mappings or not flags & (abi.GNTMAP_HOST_MAP | abi.GNTMAP_DEVICE_MAP):
                raise ValueError(f"handle {handle} is not of one mapping")
            mapping = Mapping(reference, frame, flags)
            try:
                self._domain.grants.entry_address(reference)
                self._hold(mapping)
            except (GrantError, GrantFailure) as error:
                raise ValueError(str(error)) from None
            self.mappings[handle] = mapping

    # -- mapping --------------------------------------------------------------------------------------------

    def map(self, host_address: int, flags: int, reference: int, granter: int, own_id: int) -> tuple[int, int]:
        """(handle, frame) of a new mapping of a grant of `granter`'s; raises GrantFailure."""
        if not flags & (abi.GNTMAP_HOST_MAP | abi.GNTMAP_DEVICE_MAP):
            raise GrantFailure(abi.GNTST_BAD_GNTREF)
        if granter not in (BACK_END_DOMAIN, own_id, abi.DOMID_SELF):
            raise GrantFailure(abi.GNTST_BAD_DOMAIN)
        handle = next((number for number in range(_MOST) if number not in self.mappings), None)
        if handle is None:
            raise GrantFailure(abi.GNTST_NO_SPACE)
        try:
            at = self._domain.grants.entry_address(reference)
        except GrantError:
            raise GrantFailure(abi.GNTST_BAD_GNTREF) from None
        if granter == BACK_END_DOMAIN:
            raise GrantFailure(abi.GNTST_GENERAL_ERROR)  # it has granted nothing
        frame = self._granted(at, own_id, write=not flags & abi.GNTMAP_READONLY)
        mapping = Mapping(reference, frame, flags)
        self._hold(mapping)
        if flags & abi.GNTMAP_HOST_MAP:
            try:
                place = self._entry(host_address, flags)
                user = USER if flags & abi.GNTMAP_APPLICATION_MAP else 0
                self._domain.tables.change(*place, frame << 12 | mapping.rights | user | ACCESSED | DIRTY)
            except (HypercallError, GrantFailure):
                self._release(mapping, flags)
                raise GrantFailure(abi.GNTST_GENERAL_ERROR) from None
        self.mappings[handle] = mapping
        self._mark(mapping)
        return handle, frame

    def _granted(self, at: int, own_id: int, *, write: bool) -> int:
        """The frame that the entry at physical `at` grants to this domain."""
        flags, grantee, frame = _ENTRY.unpack(self._domain.view[at : at + _ENTRY.size])
        if flags & abi.GTF_TYPE_MASK != abi.GTF_PERMIT_ACCESS or grantee != own_id:
            raise GrantFailure(abi.GNTST_GENERAL_ERROR)
        if write and flags & abi.GTF_READONLY:
            raise GrantFailure(abi.GNTST_GENERAL_ERROR)
        return int(frame)

    def _hold(self, mapping: Mapping) -> None:
        """References for each way in which it is mapped; GNTST_bad_page or general_error."""
        frames = self._domain.frames
        held = 0
        for way in (abi.GNTMAP_HOST_MAP, abi.GNTMAP_DEVICE_MAP):
            if not mapping.flags & way:
                continue
            try:
                frames.get(mapping.frame)
            except HypercallError:
                self._release(mapping, held)
                raise GrantFailure(abi.GNTST_BAD_PAGE) from None
            if mapping.writable:
                try:
                    frames.get_writable(mapping.frame)
                except HypercallError:
                    frames.put(mapping.frame)
                    self._release(mapping, held)
                    raise GrantFailure(abi.GNTST_GENERAL_ERROR) from None
            held |= way

    def _release(self, mapping: Mapping, ways: int) -> None:
        frames = self._domain.frames
        for way in (abi.GNTMAP_HOST_MAP, abi.GNTMAP_DEVICE_MAP):
            if ways & way:
                if mapping.writable:
                    frames.put_writable(mapping.frame)
                frames.put(mapping.frame)

    def _entry(self, host_address: int, flags: int) -> tuple[int, int]:
        """(table, index) of the level-1 entry that an operation means: by linear address, or by its own."""
        domain = self._domain
        if flags & abi.GNTMAP_CONTAINS_PTE:
            table = host_address >> 12
            if host_address & 7 or not domain.frames.owns(table):
                raise GrantFailure(abi.GNTST_GENERAL_ERROR)
            found: tuple[int, int] | None = (table, host_address >> 3 & 511)
        else:
            found = entry_address(domain, host_address)
        if found is None or domain.frames.kind[found[0]] != L1 or not domain.frames.kind_count[found[0]]:
            raise GrantFailure(abi.GNTST_GENERAL_ERROR)
        return found

    def _mark(self, mapping: Mapping) -> None:
        """Show in the grant's entry whether it is in use, as all its mappings together have it."""
        used = 0
        for other in self.mappings.values():
            if other.reference == mapping.reference:
                used |= abi.GTF_READING | (abi.GTF_WRITING if other.writable else 0)
        at = self._domain.grants.entry_address(mapping.reference)
        view = self._domain.view
        flags = int.from_bytes(view[at : at + 2], "little") & ~(abi.GTF_READING | abi.GTF_WRITING)
        view[at : at + 2] = (flags | used).to_bytes(2, "little")

    # -- unmapping ------------------------------------------------------------------------------------------

    def unmap(self, host_address: int, bus_address: int, handle: int) -> None:
        """Undo the mapping at `host_address`, at `bus_address`, or both (0: neither); raises GrantFailure."""
        mapping = self._get(handle)
        ways = 0
        if bus_address and mapping.flags & abi.GNTMAP_DEVICE_MAP:
            if bus_address != mapping.frame << 12:
                raise GrantFailure(abi.GNTST_GENERAL_ERROR)
            ways |= abi.GNTMAP_DEVICE_MAP
        if host_address and mapping.flags & abi.GNTMAP_HOST_MAP:
            self._domain.tables.change(*self._mapped(mapping, host_address), 0)
            ways |= abi.GNTMAP_HOST_MAP
        self._end(handle, mapping, ways)

    def replace(self, host_address: int, new_address: int, handle: int) -> None:
        """Undo a mapping, and have the entry at `new_address` take its place."""
        mapping = self._get(handle)
        if mapping.flags & abi.GNTMAP_CONTAINS_PTE or not mapping.flags & abi.GNTMAP_HOST_MAP:
            raise GrantFailure(abi.GNTST_GENERAL_ERROR)
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
            raise GrantFailure(abi.GNTST_BAD_HANDLE)
        return mapping

    def _mapped(self, mapping: Mapping, host_address: int) -> tuple[int, int]:
        """The entry at an address, which must still be the mapping's."""
        place = self._entry(host_address, mapping.flags)
        entry = self._domain.frames.words[place[0] * 512 + place[1]]
        if entry_frame(entry) != mapping.frame or (entry ^ mapping.rights) & _COMPARED:
            raise GrantFailure(abi.GNTST_GENERAL_ERROR)
        return place

    def _end(self, handle: int, mapping: Mapping, ways: int) -> None:
        mapping.flags &= ~ways
        if not mapping.flags & (abi.GNTMAP_HOST_MAP | abi.GNTMAP_DEVICE_MAP):
            del self.mappings[handle]
            self._mark(mapping)
        self._release(mapping, ways)
        if ways & abi.GNTMAP_HOST_MAP:
            self._domain.flush()
