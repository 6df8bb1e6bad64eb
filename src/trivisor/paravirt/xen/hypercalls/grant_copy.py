"""GNTTABOP_copy (common/grant_table.c, gnttab_copy): between pages that are granted, or the caller's own."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.grants import BACK_END_DOMAIN, GrantError

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain

_OPERATION = struct.Struct("<QHH4xQHH4xHH")


class _Place(NamedTuple):
    """One end of a copy: a grant of `domain`'s, or a frame of the caller's."""

    page: int
    domain: int
    offset: int
    granted: bool


def copy(domain: Domain, operation: bytes) -> None:
    """One copy, of a struct gnttab_copy without its status; raises GrantError.

    A grant may be of a piece of a page only (version 2); the copy is to stay within.
    """
    page, who, offset, to_page, to_who, to_offset, length, flags = _OPERATION.unpack(operation)
    if not length:
        return
    source = _Place(page, who, offset, bool(flags & abi.GNTCOPY_SOURCE_GREF))
    target = _Place(to_page, to_who, to_offset, bool(flags & abi.GNTCOPY_DEST_GREF))
    for place in (source, target):
        _check_domain(domain, place)
    with _held(domain, source, write=False) as (frame, start, end), _held(domain, target, write=True) as (
        to_frame, to_start, to_end,
    ):  # fmt: skip
        if max(offset, to_offset) + length > abi.PAGE_SIZE:
            raise GrantError("beyond the page", abi.GNTST_BAD_COPY_ARG)
        if offset < start or offset + length > end or to_offset < to_start or to_offset + length > to_end:
            raise GrantError("beyond what is granted")
        at = (to_frame << 12) + to_offset
        domain.memory.write(at, domain.memory.read((frame << 12) + offset, length))
        domain.cpu.memory_written(at, length)


def _check_domain(domain: Domain, place: _Place) -> None:
    if not place.granted and place.domain != abi.DOMID_SELF:
        raise GrantError("a frame of another's", abi.GNTST_PERMISSION_DENIED)
    if place.domain not in (abi.DOMID_SELF, domain.number, BACK_END_DOMAIN):
        raise GrantError("there is no such domain", abi.GNTST_BAD_DOMAIN)


@contextmanager
def _held(domain: Domain, place: _Place, *, write: bool) -> Iterator[tuple[int, int, int]]:
    """(frame, start, end) of what may be copied there, for as long as the block runs; raises GrantError."""
    if place.granted:
        if place.domain == BACK_END_DOMAIN:
            raise GrantError("it has granted nothing")
        grant = domain.grants.take(place.page & 0xFFFFFFFF, write=write, domain=domain.number, whole=False)
        try:
            yield grant.frame, grant.start, grant.start + grant.length
        finally:
            grant.release()
        return
    if not domain.frames.owns(place.page):
        raise GrantError("the frame is not the domain's", abi.GNTST_BAD_PAGE)
    try:
        domain.frames.hold(place.page, writable=write)
    except HypercallError as error:
        raise GrantError(str(error)) from None
    try:
        yield place.page, 0, abi.PAGE_SIZE
    finally:
        domain.frames.let_go(place.page, writable=write)
