"""Hypercalls about the hypervisor itself, and those that an unprivileged domain is refused."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EINVAL, ENOSYS, EPERM, HYPERCALL_NUMBERS
from trivisor.paravirt.xen.cpuid import VERSION
from trivisor.paravirt.xen.errors import HypercallError, Preempted
from trivisor.paravirt.xen.shared_table import INDEX

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain
    from trivisor.paravirt.xen.hypercalls import Handler

_CALLS_BEGUN, _CALL = INDEX["CALLS_BEGUN"], INDEX["CALL_RAX"]
BEGUN, DONE = 1, 2
"""Native code has left a multicall at an entry which it may have done a part of, or all but for writing its result."""
_CAPABILITIES = b"xen-3.0-x86_64"
_EXTRA_VERSION = b".0"
MULTICALL_SIZE = 64
CALLS_AT_A_TIME = 256
"""Entries of a multicall that are done before the guest may be interrupted."""
_LONGEST_MESSAGE = 4096
_REFUSED = ("platform_op", "xsm_op", "sysctl", "domctl", "kexec_op", "hvm_op", "physdev_op_compat", "xenpmu_op")


def handlers(domain: Domain) -> dict[int, Handler]:
    """By number."""
    calls = _Control(domain)
    by_name: dict[str, Handler] = {
        "xen_version": calls.xen_version,
        "multicall": calls.multicall,
        "console_io": calls.console_io,
        "vm_assist": calls.vm_assist,
        "physdev_op": calls.physdev_op,
        **dict.fromkeys(_REFUSED, _refuse),
    }
    return {HYPERCALL_NUMBERS[name]: handler for name, handler in by_name.items()}


def _refuse(*_: int) -> int:
    raise HypercallError(EPERM)


class _Control:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def xen_version(self, command: int, argument: int, *_: int) -> int:
        cpu = self._domain.cpu
        match command:
            case abi.XENVER_VERSION:
                return VERSION[0] << 16 | VERSION[1]
            case abi.XENVER_EXTRAVERSION:
                cpu.store(argument, _EXTRA_VERSION.ljust(16, b"\0"))
            case abi.XENVER_COMPILE_INFO:
                cpu.store(argument, b"trivisor".ljust(64, b"\0") + bytes(16 + 32 + 32))
            case abi.XENVER_CAPABILITIES:
                cpu.store(argument, _CAPABILITIES.ljust(1024, b"\0"))
            case abi.XENVER_CHANGESET:
                cpu.store(argument, b"unavailable".ljust(64, b"\0"))
            case abi.XENVER_PLATFORM_PARAMETERS:
                cpu.store(argument, struct.pack("<Q", abi.HYPERVISOR_VIRT_START))
            case abi.XENVER_GET_FEATURES:
                (index,) = struct.unpack("<I", cpu.load(argument, 4))
                bits = sum(1 << abi.FEATURES.index(name) for name in abi.OFFERED_FEATURES) if index == 0 else 0
                if index:
                    raise HypercallError(EINVAL)
                cpu.store(argument + 4, struct.pack("<I", bits))
            case abi.XENVER_PAGESIZE:
                return abi.PAGE_SIZE
            case abi.XENVER_GUEST_HANDLE:
                cpu.store(argument, struct.pack("<QQ", 0, 0))
            case abi.XENVER_COMMANDLINE:
                cpu.store(argument, b"<denied>\0")
            case abi.XENVER_BUILD_ID:
                raise HypercallError(EPERM)
            case _:
                raise HypercallError(ENOSYS)
        return 0

    def multicall(self, entries: int, count: int, *_: int) -> int:
        """`count` of struct multicall_entry, one after the other; each has its own result."""
        domain, cpu, words = self._domain, self._domain.cpu, self._domain.table.words
        count &= 0xFFFFFFFF
        begun, words[_CALLS_BEGUN] = words[_CALLS_BEGUN], 0
        for number in range(min(count, CALLS_AT_A_TIME)):
            at = entries + MULTICALL_SIZE * number
            try:
                result = self._entry(at, begun)
            except Preempted as rest:
                cpu.store(at + 16, struct.pack(f"<{len(rest.arguments)}Q", *rest.arguments))
                raise Preempted(at, count - number) from None
            begun = 0
            if not domain.state.in_kernel:
                return result  # an iret has left the kernel, and the rest of the calls with it
            cpu.store(at + 8, (result & (1 << 64) - 1).to_bytes(8, "little"))
            if domain.tables.gives_way:
                break
        left = count - number - 1 if count else 0
        if left:
            raise Preempted(at + MULTICALL_SIZE, left)
        return 0

    def _entry(self, at: int, begun: int) -> int:
        """Do the entry of a multicall at linear `at`, or what native code has left of it."""
        words = self._domain.table.words
        if begun == DONE:
            return words[_CALL]
        if begun:
            operation, *arguments = words[_CALL : _CALL + 7]
        else:
            operation, _, *arguments = struct.unpack("<8Q", self._domain.cpu.load(at, MULTICALL_SIZE))
        if operation == HYPERCALL_NUMBERS["multicall"]:
            return -EINVAL
        return self._domain.call(operation, tuple(arguments))

    def console_io(self, command: int, count: int, buffer: int, *_: int) -> int:
        """Xen's own console: what a guest says before it has one of its own goes to the same output."""
        if command != abi.CONSOLEIO_WRITE:
            raise HypercallError(EPERM)
        if count > _LONGEST_MESSAGE:
            raise HypercallError(EINVAL)
        self._domain.console_output(self._domain.cpu.load(buffer, count))
        return 0

    def vm_assist(self, command: int, kind: int, *_: int) -> int:
        assists = self._domain.state.assists
        if kind not in abi.VMASST_TYPES:
            raise HypercallError(EINVAL)
        if command == abi.VMASST_ENABLE:
            assists.add(kind)
        elif command == abi.VMASST_DISABLE:
            assists.discard(kind)
        else:
            raise HypercallError(ENOSYS)
        self._domain.state.entries_changed()
        self._domain.io_privilege_changed()
        return 0

    def physdev_op(self, command: int, argument: int, *_: int) -> int:
        """No hardware is this domain's; what it may do is keep its own I/O privilege level."""
        domain = self._domain
        match command:
            case abi.PHYSDEVOP_SET_IOPL:
                (level,) = struct.unpack("<I", domain.cpu.load(argument, 4))
                if level > 3:
                    raise HypercallError(EINVAL)
                domain.state.iopl = level
                domain.io_privilege_changed()
                return 0
            case abi.PHYSDEVOP_SET_IOBITMAP:
                (ports,) = struct.unpack("<8xI", domain.cpu.load(argument, 12))  # none of them is there
                if ports > 65536:
                    raise HypercallError(EINVAL)
                return 0
            case abi.PHYSDEVOP_IRQ_STATUS_QUERY | abi.PHYSDEVOP_EOI:
                raise HypercallError(EINVAL)
            case abi.PHYSDEVOP_PIRQ_EOI_GMFN_V1 | abi.PHYSDEVOP_PIRQ_EOI_GMFN_V2:
                raise HypercallError(ENOSYS)
        raise HypercallError(ENOSYS if command > 40 else EPERM)
