"""grant_table_op (grant_table.h): the domain grants to back ends and to itself; nobody else grants to it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EINVAL, ENOSYS, EOPNOTSUPP, HYPERCALL_NUMBERS
from trivisor.paravirt.xen.errors import HypercallError, Preempted
from trivisor.paravirt.xen.grants import GrantError
from trivisor.paravirt.xen.hypercalls.grant_copy import copy
from trivisor.x86.exceptions import GuestException

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain
    from trivisor.paravirt.xen.hypercalls import Handler

_AT_A_TIME = 256
"""Operations that are done before the guest may be interrupted."""
_COMMAND = (1 << 12) - 1
_ALONE = frozenset({abi.GNTTABOP_SETUP_TABLE, abi.GNTTABOP_QUERY_SIZE, abi.GNTTABOP_GET_STATUS_FRAMES})
"""Of these there may be one at a time."""


def handlers(domain: Domain) -> dict[int, Handler]:
    """By number."""
    return {HYPERCALL_NUMBERS["grant_table_op"]: _Grants(domain).grant_table_op}


class _Grants:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._versions: dict[int, Callable[[int], None]] = {
            abi.GNTTABOP_SET_VERSION: self._set_version,
            abi.GNTTABOP_GET_VERSION: self._get_version,
        }
        """Operations on one structure, whatever their number is said to be."""
        self._operations: dict[int, tuple[int, int, Callable[[int], None]]] = {
            abi.GNTTABOP_SETUP_TABLE: (24, 8, self._setup_table),
            abi.GNTTABOP_QUERY_SIZE: (16, 12, self._query_size),
            abi.GNTTABOP_GET_STATUS_FRAMES: (16, 6, self._get_status_frames),
            abi.GNTTABOP_MAP_GRANT_REF: (32, 18, self._map),
            abi.GNTTABOP_UNMAP_GRANT_REF: (24, 20, self._unmap),
            abi.GNTTABOP_UNMAP_AND_REPLACE: (24, 20, self._replace),
            abi.GNTTABOP_COPY: (40, 36, self._copy),
            abi.GNTTABOP_SWAP_GRANT_REF: (12, 8, self._swap),
        }
        """Size of an operation's structure, where its status is in it, and what does one or raises GrantError."""

    def grant_table_op(self, command: int, operations: int, count: int, *_: int) -> int:
        command, count = command & 0xFFFFFFFF, count & 0xFFFFFFFF
        if count >> 31 or command & ~_COMMAND:
            raise HypercallError(EINVAL)
        if command in self._versions:
            self._versions[command](operations)
            return 0
        if command == abi.GNTTABOP_TRANSFER:
            raise HypercallError(EOPNOTSUPP)  # as Xen says that is told `gnttab=no-transfer`
        if command not in self._operations:
            raise HypercallError(ENOSYS)
        if command in _ALONE and count != 1:
            raise HypercallError(EINVAL)
        size, status_at, do = self._operations[command]
        now = min(count, _AT_A_TIME)
        for at in range(operations, operations + size * now, size):
            status = abi.GNTST_OKAY
            try:
                do(at)
            except GrantError as error:
                status = error.status
            self._domain.cpu.store(at + status_at, struct.pack("<h", status))
        if now < count:
            raise Preempted(command, operations + size * now, count - now)
        return 0

    # -- the table ------------------------------------------------------------------------------------------

    def _check_own(self, who: int) -> None:
        if who not in (abi.DOMID_SELF, self._domain.number):
            raise GrantError("another domain's table", abi.GNTST_BAD_DOMAIN)

    def _tell_frames(self, address: int, frames: list[int]) -> None:
        try:
            self._domain.cpu.store(address, struct.pack(f"<{len(frames)}Q", *frames))
        except GuestException:
            raise GrantError("no memory for the frames", abi.GNTST_BAD_VIRT_ADDR) from None

    def _setup_table(self, argument: int) -> None:
        """Tell the frames of the table, which grows to what is asked for."""
        grants = self._domain.grants
        who, count, frame_list = struct.unpack("<H2xI8xQ", self._domain.cpu.load(argument, 24))
        self._check_own(who)
        if count > len(grants.shared):
            raise GrantError(f"{count} frames")
        grants.grow(count)
        self._tell_frames(frame_list, grants.shared[:count])

    def _get_status_frames(self, argument: int) -> None:
        """Tell the frames of the status, of version 2; in version 1 there are none."""
        count, who, frame_list = struct.unpack("<IH2xQ", self._domain.cpu.load(argument, 16))
        self._check_own(who)
        frames = self._domain.grants.status_shared()
        if count > len(frames):
            raise GrantError(f"{count} status frames")
        self._tell_frames(frame_list, frames[:count])

    def _query_size(self, argument: int) -> None:
        domain, grants = self._domain, self._domain.grants
        (who,) = struct.unpack("<H", domain.cpu.load(argument, 2))
        self._check_own(who)
        domain.cpu.store(argument + 4, struct.pack("<II", grants.used, len(grants.shared)))

    def _set_version(self, argument: int) -> None:
        """The version that is in effect afterwards is told also if it could not be changed."""
        domain, grants = self._domain, self._domain.grants
        (version,) = struct.unpack("<I", domain.cpu.load(argument, 4))
        before = grants.version
        try:
            if version not in (1, 2):
                raise HypercallError(EINVAL)
            grants.set_version(version)
        finally:
            domain.cpu.store(argument, struct.pack("<I", grants.version))
            if grants.version != before:
                domain.flush()  # a TLB may have status frames that went
                for frame in (*grants.shared, *grants.status):
                    domain.cpu.memory_written(frame << 12, abi.PAGE_SIZE)

    def _get_version(self, argument: int) -> None:
        (who,) = struct.unpack("<H", self._domain.cpu.load(argument, 2))
        self._domain.check_self(who, abi.ESRCH)
        self._domain.cpu.store(argument + 4, struct.pack("<I", self._domain.grants.version))

    def _swap(self, argument: int) -> None:
        self._domain.grants.swap(*struct.unpack("<II", self._domain.cpu.load(argument, 8)))

    # -- using grants ---------------------------------------------------------------------------------------

    def _map(self, argument: int) -> None:
        domain = self._domain
        address, flags, reference, granter = struct.unpack("<QIIH", domain.cpu.load(argument, 18))
        handle, frame = domain.grant_maps.map(address, flags, reference, granter)
        domain.cpu.store(argument + 20, struct.pack("<IQ", handle, frame << 12))

    def _unmap(self, argument: int) -> None:
        address, bus_address, handle = struct.unpack("<QQI", self._domain.cpu.load(argument, 20))
        self._domain.grant_maps.unmap(address, bus_address, handle)

    def _replace(self, argument: int) -> None:
        address, new_address, handle = struct.unpack("<QQI", self._domain.cpu.load(argument, 20))
        self._domain.grant_maps.replace(address, new_address, handle)

    def _copy(self, argument: int) -> None:
        copy(self._domain, self._domain.cpu.load(argument, 36))
