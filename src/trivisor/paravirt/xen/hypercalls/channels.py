"""event_channel_op (event_channel.h)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EINVAL, ENOENT, ENOSYS, EPERM, ESRCH, HYPERCALL_NUMBERS
from trivisor.paravirt.xen.errors import HypercallError

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain
    from trivisor.paravirt.xen.hypercalls import Handler


def handlers(domain: Domain) -> dict[int, Handler]:
    """By number."""
    calls = _Channels(domain)
    return {
        HYPERCALL_NUMBERS["event_channel_op"]: calls.event_channel_op,
        HYPERCALL_NUMBERS["event_channel_op_compat"]: calls.event_channel_op_compat,
    }


_CONTROL_BLOCK = 72
"""Size of struct evtchn_fifo_control_block."""


class _Channels:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._operations: dict[int, Callable[[int], int]] = {
            abi.EVTCHNOP_BIND_INTERDOMAIN: self._bind_interdomain,
            abi.EVTCHNOP_BIND_VIRQ: self._bind_virq,
            abi.EVTCHNOP_BIND_PIRQ: _no_hardware,
            abi.EVTCHNOP_CLOSE: self._close,
            abi.EVTCHNOP_SEND: self._send,
            abi.EVTCHNOP_STATUS: self._status,
            abi.EVTCHNOP_ALLOC_UNBOUND: self._alloc_unbound,
            abi.EVTCHNOP_BIND_IPI: self._bind_ipi,
            abi.EVTCHNOP_BIND_VCPU: self._bind_vcpu,
            abi.EVTCHNOP_UNMASK: self._unmask,
            abi.EVTCHNOP_RESET: self._reset,
            abi.EVTCHNOP_INIT_CONTROL: self._init_control,
        }

    def event_channel_op(self, command: int, argument: int, *_: int) -> int:
        """The operations of the FIFO kind of channels are not there: the guest goes on with the 2-level kind."""
        handler = self._operations.get(command)
        if handler is None:
            raise HypercallError(ENOSYS)
        return handler(argument)

    def event_channel_op_compat(self, argument: int, *_: int) -> int:
        """The older form: the command in front of its structure."""
        command = int.from_bytes(self._domain.cpu.load(argument, 4), "little")
        return self.event_channel_op(command, argument + 8)

    def _read(self, argument: int, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._domain.cpu.load(argument, struct.calcsize(layout)))

    def _answer(self, address: int, value: int) -> int:
        self._domain.cpu.store(address, value.to_bytes(4, "little"))
        return 0

    def _init_control(self, argument: int) -> int:
        """The first of the FIFO kind's: arguments are looked at, and good ones refused, so that guests do without."""
        frame, offset, vcpu = self._read(argument, "<QII")
        if vcpu:
            raise HypercallError(ENOENT)
        if offset & 7 or offset > 4096 - _CONTROL_BLOCK or not self._domain.frames.owns(frame):
            raise HypercallError(EINVAL)
        raise HypercallError(ENOSYS)

    def _bind_interdomain(self, argument: int) -> int:
        remote, port = self._read(argument, "<H2xI")
        self._domain.check_self(remote, ESRCH)
        return self._answer(argument + 8, self._domain.events.bind_loopback(port, self._domain.number))

    def _bind_virq(self, argument: int) -> int:
        virq, vcpu = self._read(argument, "<II")
        if virq >= abi.NR_VIRQS:
            raise HypercallError(EINVAL)
        if vcpu:
            raise HypercallError(ENOENT)
        if virq in abi.GLOBAL_VIRQS:
            raise HypercallError(EPERM)
        return self._answer(argument + 8, self._domain.events.bind_virq(virq))

    def _bind_ipi(self, argument: int) -> int:
        (vcpu,) = self._read(argument, "<I")
        if vcpu:
            raise HypercallError(ENOENT)
        return self._answer(argument + 4, self._domain.events.bind_ipi())

    def _alloc_unbound(self, argument: int) -> int:
        own, remote = self._read(argument, "<HH")
        self._domain.check_self(own, ESRCH)
        if remote == abi.DOMID_SELF:
            remote = self._domain.number
        return self._answer(argument + 4, self._domain.events.allocate_unbound(remote))

    def _close(self, argument: int) -> int:
        self._domain.events.close(*self._read(argument, "<I"))
        return 0

    def _send(self, argument: int) -> int:
        self._domain.events.send(*self._read(argument, "<I"))
        return 0

    def _unmask(self, argument: int) -> int:
        self._domain.events.unmask(*self._read(argument, "<I"))
        return 0

    def _reset(self, argument: int) -> int:
        (who,) = self._read(argument, "<H")
        self._domain.check_self(who, ESRCH)
        self._domain.events.reset()
        return 0

    def _bind_vcpu(self, argument: int) -> int:
        port, vcpu = self._read(argument, "<II")
        if vcpu:
            raise HypercallError(ENOENT)
        self._domain.events.check_vcpu_bindable(port)
        return 0

    def _status(self, argument: int) -> int:
        who, number = self._read(argument, "<H2xI")
        self._domain.check_self(who, ESRCH)
        port = self._domain.events.status(number)
        detail = {
            abi.EVTCHNSTAT_UNBOUND: struct.pack("<H6x", port.remote_domain),
            abi.EVTCHNSTAT_INTERDOMAIN: struct.pack("<H2xI", port.remote_domain, port.remote_port),
            abi.EVTCHNSTAT_VIRQ: struct.pack("<I4x", port.virq),
        }.get(port.status, bytes(8))
        self._domain.cpu.store(argument + 8, struct.pack("<II", port.status, 0) + detail)
        return 0


def _no_hardware(_argument: int) -> int:
    raise HypercallError(EPERM)
