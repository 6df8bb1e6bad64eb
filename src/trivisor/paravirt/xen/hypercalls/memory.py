"""memory_op: the domain's memory, and what the machine-to-physical table is (memory.h)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EINVAL, ENOSYS, EPERM, ESRCH, HYPERCALL_NUMBERS
from trivisor.paravirt.xen.errors import HypercallError, Preempted
from trivisor.paravirt.xen.own_memory import NO_FRAME
from trivisor.x86.exceptions import GuestException

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain
    from trivisor.paravirt.xen.hypercalls import Handler

_E820_RAM = 1
_AT_A_TIME = 512
_MOST_EXTENTS = 0xFFFFFFFF >> abi.MEMOP_EXTENT_SHIFT
"""As many as the rest of a preempted call can tell of."""
_MACH2PHYS_SIZE = 0x4000000000


def handlers(domain: Domain) -> dict[int, Handler]:
    """By number."""
    return {HYPERCALL_NUMBERS["memory_op"]: _Memory(domain).memory_op}


class _Memory:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._operations = {
            abi.XENMEM_MAXIMUM_RAM_PAGE: lambda _: domain.frames.count - 1,
            abi.XENMEM_CURRENT_RESERVATION: self._of_self(lambda: domain.frames.owned),
            abi.XENMEM_MAXIMUM_RESERVATION: self._of_self(lambda: domain.pages),
            abi.XENMEM_MAXIMUM_GPFN: self._of_self(lambda: domain.pages - 1),
            abi.XENMEM_MEMORY_MAP: self._memory_map,
            abi.XENMEM_MACHPHYS_MAPPING: self._machphys_mapping,
            abi.XENMEM_MACHPHYS_MFN_LIST: self._machphys_mfn_list,
            abi.XENMEM_MACHINE_MEMORY_MAP: _refused,
            abi.XENMEM_SET_MEMORY_MAP: _refused,
        }

    def memory_op(self, command: int, argument: int, *_: int) -> int:
        """The upper bits of `command` tell how many extents were done before a preemption."""
        operation, done = command & abi.MEMOP_CMD_MASK, (command & 0xFFFFFFFF) >> abi.MEMOP_EXTENT_SHIFT
        if operation in (
            abi.XENMEM_INCREASE_RESERVATION, abi.XENMEM_DECREASE_RESERVATION, abi.XENMEM_POPULATE_PHYSMAP
        ):  # fmt: skip
            return self._reservation(operation, argument, done)
        handler = self._operations.get(operation)
        if handler is None:
            raise HypercallError(ENOSYS)
        return handler(argument)

    def _of_self(self, answer: Callable[[], int]) -> Callable[[int], int]:
        """An operation that tells a number about the domain whose id is the argument."""

        def operation(argument: int) -> int:
            self._domain.check_self(int.from_bytes(self._domain.cpu.load(argument, 2), "little"), ESRCH)
            return answer()

        return operation

    def _reservation(self, operation: int, argument: int, done: int) -> int:
        """struct xen_memory_reservation; returns how many extents were done, short of all whatever went wrong."""
        try:
            start, count, order, _, who = struct.unpack("<QQIIH", self._domain.cpu.load(argument, 26))
            self._domain.check_self(who, ESRCH)
        except (GuestException, HypercallError):
            return done
        # Frames that follow each other are for domains with hardware of their own.
        if order or done >= count or count > _MOST_EXTENTS:
            return done
        end: int = min(count, done + _AT_A_TIME)
        for number in range(done, end):
            try:
                self._extent(operation, start + 8 * number)
            except (GuestException, HypercallError):
                return number
        if end < count:
            raise Preempted(operation | end << abi.MEMOP_EXTENT_SHIFT, argument)
        return end

    def _extent(self, operation: int, address: int) -> None:
        domain = self._domain
        cpu, frames, own = domain.cpu, domain.frames, domain.own
        value = int.from_bytes(cpu.load(address, 8), "little") if operation != abi.XENMEM_INCREASE_RESERVATION else 0
        if operation == abi.XENMEM_DECREASE_RESERVATION:
            frames.release(value)
            own.set_physical(value, NO_FRAME)
            domain.flush()
            return
        if frames.owned >= domain.pages:
            raise HypercallError(EPERM)
        frame = frames.allocate()
        domain.memory.write(frame << 12, bytes(4096))
        cpu.memory_written(frame << 12, 4096)
        if operation == abi.XENMEM_POPULATE_PHYSMAP:
            own.set_physical(frame, value)
        cpu.store(address, frame.to_bytes(8, "little"))

    def _memory_map(self, argument: int) -> int:
        """The domain's memory as one range of RAM from 0."""
        cpu = self._domain.cpu
        room, buffer = struct.unpack("<I4xQ", cpu.load(argument, 16))
        if room < 1:
            raise HypercallError(EINVAL)
        cpu.store(buffer, struct.pack("<QQI", 0, self._domain.pages * 4096, _E820_RAM))
        cpu.store(argument, struct.pack("<I", 1))
        return 0

    def _machphys_mapping(self, argument: int) -> int:
        start = self._domain.own.map_address
        data = struct.pack("<QQQ", start, start + _MACH2PHYS_SIZE, self._domain.frames.count - 1)
        self._domain.cpu.store(argument, data)
        return 0

    def _machphys_mfn_list(self, argument: int) -> int:
        """For tools of a privileged domain that map the table themselves; this one cannot."""
        raise HypercallError(EPERM)


def _refused(_argument: int) -> int:
    raise HypercallError(EPERM)
