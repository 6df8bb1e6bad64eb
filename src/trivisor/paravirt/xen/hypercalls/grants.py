"""grant_table_op (grant_table.h): the domain grants to back ends and to itself; nobody else grants to it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EINVAL, ENOSYS, HYPERCALL_NUMBERS
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.grant_maps import GrantFailure

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain
    from trivisor.paravirt.xen.hypercalls import Handler

_MOST_AT_A_TIME = 4096


def handlers(domain: Domain) -> dict[int, Handler]:
    """By number."""
    return {HYPERCALL_NUMBERS["grant_table_op"]: _Grants(domain).grant_table_op}


class _Grants:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._operations: dict[int, tuple[int, Callable[[int], int]]] = {
            abi.GNTTABOP_SETUP_TABLE: (24, self._setup_table),
            abi.GNTTABOP_QUERY_SIZE: (16, self._query_size),
            abi.GNTTABOP_SET_VERSION: (4, self._set_version),
            abi.GNTTABOP_GET_VERSION: (8, self._get_version),
            abi.GNTTABOP_MAP_GRANT_REF: (32, self._map),
            abi.GNTTABOP_UNMAP_GRANT_REF: (24, self._unmap),
            abi.GNTTABOP_UNMAP_AND_REPLACE: (24, self._replace),
            abi.GNTTABOP_COPY: (40, self._copy),
        }
        """Size of an operation's structure, and what does one."""

    def grant_table_op(self, command: int, operations: int, count: int, *_: int) -> int:
        entry = self._operations.get(command)
        if entry is None:
            raise HypercallError(ENOSYS)
        count &= 0xFFFFFFFF
        if count > _MOST_AT_A_TIME:
            raise HypercallError(EINVAL)
        size, handler = entry
        for number in range(count):
            result = handler(operations + size * number)
            if result:
                return result
        return 0

    def _status(self, address: int, status: int) -> int:
        self._domain.cpu.store(address, struct.pack("<h", status))
        return 0

    def _setup_table(self, argument: int) -> int:
        """Tell the frames of the table, which grows to what is asked for."""
        domain, grants = self._domain, self._domain.grants
        who, count, _, frame_list = struct.unpack("<H2xIh6xQ", domain.cpu.load(argument, 24))
        if who not in (abi.DOMID_SELF, 1):
            return self._status(argument + 8, abi.GNTST_BAD_DOMAIN)
        if count > len(grants.shared):
            return self._status(argument + 8, abi.GNTST_GENERAL_ERROR)
        grants.grow(count)
        domain.cpu.store(frame_list, struct.pack(f"<{count}Q", *grants.shared[:count]))
        return self._status(argument + 8, abi.GNTST_OKAY)

    def _query_size(self, argument: int) -> int:
        domain, grants = self._domain, self._domain.grants
        (who,) = struct.unpack("<H", domain.cpu.load(argument, 2))
        if who not in (abi.DOMID_SELF, 1):
            return self._status(argument + 12, abi.GNTST_BAD_DOMAIN)
        data = struct.pack("<IIh", grants.used, len(grants.shared), abi.GNTST_OKAY)
        domain.cpu.store(argument + 4, data)
        return 0

    def _set_version(self, argument: int) -> int:
        """Version 1 alone."""
        (version,) = struct.unpack("<I", self._domain.cpu.load(argument, 4))
        if version not in (1, 2):
            raise HypercallError(EINVAL)
        if version == 2:
            raise HypercallError(ENOSYS)
        self._domain.cpu.store(argument, (1).to_bytes(4, "little"))
        return 0

    def _get_version(self, argument: int) -> int:
        (who,) = struct.unpack("<H", self._domain.cpu.load(argument, 2))
        self._domain.check_self(who, abi.ESRCH)
        self._domain.cpu.store(argument + 4, (1).to_bytes(4, "little"))
        return 0

    def _map(self, argument: int) -> int:
        domain = self._domain
        address, flags, reference, granter = struct.unpack("<QIIH", domain.cpu.load(argument, 18))
        try:
            handle, frame = domain.grant_maps.map(address, flags, reference, granter, domain.number)
        except GrantFailure as failure:
            return self._status(argument + 18, failure.status)
        domain.cpu.store(argument + 20, struct.pack("<IQ", handle, frame << 12))
        return self._status(argument + 18, abi.GNTST_OKAY)

    def _unmap(self, argument: int) -> int:
        address, bus_address, handle = struct.unpack("<QQI", self._domain.cpu.load(argument, 20))
        return self._undo(argument, lambda: self._domain.grant_maps.unmap(address, bus_address, handle))

    def _replace(self, argument: int) -> int:
        address, new_address, handle = struct.unpack("<QQI", self._domain.cpu.load(argument, 20))
        return self._undo(argument, lambda: self._domain.grant_maps.replace(address, new_address, handle))

    def _undo(self, argument: int, undo: Callable[[], None]) -> int:
        try:
            undo()
        except GrantFailure as failure:
            return self._status(argument + 20, failure.status)
        except HypercallError:
            return self._status(argument + 20, abi.GNTST_GENERAL_ERROR)
        return self._status(argument + 20, abi.GNTST_OKAY)

    def _copy(self, argument: int) -> int:
        """Between frames of the domain's own; its grants are to others."""
        domain = self._domain
        source, s_who, s_offset, target, t_who, t_offset, length, flags = struct.unpack(
            "<QHH4xQHH4xHH", domain.cpu.load(argument, 36)
        )
        status = self._do_copy(source, s_who, s_offset, target, t_who, t_offset, length, flags)
        return self._status(argument + 36, status)

    def _do_copy(
        self, source: int, s_who: int, s_offset: int, target: int, t_who: int, t_offset: int, length: int, flags: int
    ) -> int:
        domain, frames = self._domain, self._domain.frames
        if flags & (abi.GNTCOPY_SOURCE_GREF | abi.GNTCOPY_DEST_GREF):
            return abi.GNTST_BAD_GNTREF
        if {s_who, t_who} - {abi.DOMID_SELF, 1}:
            return abi.GNTST_BAD_DOMAIN
        if max(s_offset, t_offset) + length > 4096:
            return abi.GNTST_BAD_COPY_ARG
        try:
            frames.get(source)
        except HypercallError:
            return abi.GNTST_BAD_PAGE
        try:
            frames.get(target)
            try:
                frames.get_writable(target)
            except HypercallError:
                frames.put(target)
                raise
        except HypercallError:
            frames.put(source)
            return abi.GNTST_BAD_PAGE
        domain.memory.write((target << 12) + t_offset, domain.memory.read((source << 12) + s_offset, length))
        domain.cpu.memory_written((target << 12) + t_offset, length)
        frames.put_writable(target)
        frames.put(target)
        frames.put(source)
        return abi.GNTST_OKAY
