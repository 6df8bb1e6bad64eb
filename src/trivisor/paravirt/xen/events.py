"""Event channels of the 2-level kind, and the upcall that tells of them (event_channel.h; xen.h, struct vcpu_info).

A port is one of the domain's: closed, waiting for another domain to bind to
it, bound to a back end of ours ("interdomain"), to a virtual interrupt, or to
the domain itself (an IPI).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trivisor.machine.memory import PAGE_SIZE, GuestMemory
from trivisor.machine.saved_values import flag, number, number_list, rows
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.abi import (
    EEXIST,
    EINVAL,
    ENOSPC,
    EVTCHN_2L_PORTS,
    EVTCHNSTAT_CLOSED,
    EVTCHNSTAT_INTERDOMAIN,
    EVTCHNSTAT_IPI,
    EVTCHNSTAT_UNBOUND,
    EVTCHNSTAT_VIRQ,
    NR_VIRQS,
    SHARED_EVTCHN_MASK,
    SHARED_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_SIZE,
)
from trivisor.paravirt.xen.errors import HypercallError

_OPEN = (EVTCHNSTAT_UNBOUND, EVTCHNSTAT_INTERDOMAIN, EVTCHNSTAT_VIRQ, EVTCHNSTAT_IPI)


@dataclass(slots=True)
class Port:
    """One event channel's end; `status` is one of abi.EVTCHNSTAT_*."""

    status: int
    remote_domain: int = 0
    remote_port: int = 0
    virq: int = 0
    notify: Callable[[], None] | None = None
    """What the other end does when the guest sends."""


class EventChannels(Remembers):
    """The domain's ports; an interrupt line for the processor (`machine.interrupts.InterruptController`)."""

    def __init__(self, memory: GuestMemory, shared_info: int) -> None:
        """`shared_info` is the physical address of the page that the guest shares."""
        self._view = memory.view
        self._shared = shared_info
        self.vcpu_info = shared_info
        """Physical address of the processor's struct vcpu_info."""
        self._ports: dict[int, Port] = {}
        self._virqs: dict[int, int] = {}
        self._polled: frozenset[int] | None = None
        """The ports of the poll that goes on; without ports, any."""
        self._poll_over = False
        self.on_pending: Callable[[], None] = lambda: None
        self.on_nmi: Callable[[], None] = lambda: None
        self.cr8 = 0

    # -- into a snapshot and out of it ----------------------------------------------------------------------

    def save(self) -> Saved:
        return {
            "ports": [
                [number, port.status, port.remote_domain, port.remote_port, port.virq]
                for number, port in self._ports.items()
            ],
            "vcpu_info": self.vcpu_info,
            "polled": None if self._polled is None else sorted(self._polled),
            "poll_over": self._poll_over,
        }

    def load(self, saved: Saved) -> None:
        """What back ends are to be told comes by `rebind_back_end`.  Pending and mask bits are in the guest's memory.

        `vcpu_info` is not yet known to lie in the domain's own memory.
        """
        ports = {}
        for at, status, remote_domain, remote_port, virq in rows(saved, "ports", [12, 3, 16, 12, 5], EVTCHN_2L_PORTS):
            port = ports[at] = Port(status, remote_domain, remote_port, virq)
            if not at or port.status not in _OPEN or port.virq >= NR_VIRQS:
                raise ValueError(f"port {at} cannot be so")
            if port.status == EVTCHNSTAT_VIRQ and port.virq in self._virqs:
                raise ValueError(f"virtual interrupt {port.virq} is bound twice")
            if port.status == EVTCHNSTAT_VIRQ:
                self._virqs[port.virq] = at
        for at, port in ports.items():
            if port.status != EVTCHNSTAT_INTERDOMAIN or not port.remote_port:
                continue
            other = ports.get(port.remote_port)
            if other is None or other.status != EVTCHNSTAT_INTERDOMAIN or other.remote_port != at:
                raise ValueError(f"port {at} is bound to one that is not bound to it")
            port.notify = partial(self.set_pending, port.remote_port)
        self._ports = ports
        self.vcpu_info = number(saved.get("vcpu_info"), "vcpu_info", 52)
        if self.vcpu_info & 7 or self.vcpu_info % PAGE_SIZE > PAGE_SIZE - VCPU_INFO_SIZE:
            raise ValueError("vcpu_info cannot be there")
        self._polled = None if saved.get("polled") is None else frozenset(number_list(saved, "polled", 12))
        self._poll_over = flag(saved, "poll_over")

    def rebind_back_end(self, port: int, notify: Callable[[], None]) -> bool:
        """After `load`: the back end at `port` is this one; False if the guest has closed the port."""
        found = self._ports.get(port)
        if found is None or found.status != EVTCHNSTAT_INTERDOMAIN or found.remote_port:
            return False
        found.notify = notify
        return True

    # -- as the processor sees it ---------------------------------------------------------------------------

    def pending(self) -> bool:
        """Whether the guest is to be interrupted now."""
        at = self.vcpu_info
        return (self._view[at] != 0 and not self._view[at + 1]) or self._poll_over

    def acknowledge(self) -> int:
        """There is one interrupt only, the upcall; it has no number.  It ends a poll."""
        self._poll_over = False
        self._polled = None
        return 0

    def upcall_wanted(self) -> bool:
        """Whether the upcall is to be made; ends a poll."""
        self.acknowledge()
        at = self.vcpu_info
        return self._view[at] != 0 and not self._view[at + 1]

    def poll(self, ports: frozenset[int]) -> bool:
        """Have the end of a block come with an event on one of `ports`, masked or not; False if there is one now."""
        if any(self._bit(SHARED_EVTCHN_PENDING, port) for port in ports):
            return False
        self._polled = ports
        return True

    def end_poll(self) -> None:
        """The time of a poll is over."""
        if self._polled is not None:
            self._poll_over = True
            self.on_pending()

    # -- bits -----------------------------------------------------------------------------------------------

    def _bit(self, array: int, port: int) -> int:
        return self._view[self._shared + array + (port >> 3)] >> (port & 7) & 1

    def set_pending(self, port: int) -> None:
        """An event has come on `port`."""
        view, at = self._view, self._shared + SHARED_EVTCHN_PENDING + (port >> 3)
        bit = 1 << (port & 7)
        if self._polled is not None and (port in self._polled or not self._polled):
            self._poll_over = True
            self.on_pending()
        if view[at] & bit:
            return
        view[at] |= bit
        if not self._bit(SHARED_EVTCHN_MASK, port):
            self._select(port)

    def _select(self, port: int) -> None:
        """Tell the processor: the selector's bit of the port's word, then the upcall."""
        view, info = self._view, self.vcpu_info
        word = port >> 6
        view[info + VCPU_INFO_PENDING_SEL + (word >> 3)] |= 1 << (word & 7)
        view[info] = 1
        if not view[info + 1]:
            self.on_pending()

    def moved(self) -> None:
        """The processor's struct vcpu_info is elsewhere now: what waits is told there too."""
        self._view[self.vcpu_info + VCPU_INFO_PENDING_SEL : self.vcpu_info + VCPU_INFO_PENDING_SEL + 8] = b"\xff" * 8
        self._view[self.vcpu_info] = 1

    # -- ports ----------------------------------------------------------------------------------------------

    def _free(self) -> int:
        for port in range(1, EVTCHN_2L_PORTS):
            if port not in self._ports:
                return port
        raise HypercallError(ENOSPC)

    def get(self, port: int) -> Port:
        """An open port; EINVAL for one that is not."""
        found = self._ports.get(port)
        if found is None:
            raise HypercallError(EINVAL, f"event channel {port} is closed")
        return found

    def status(self, port: int) -> Port:
        """A port, closed or not; EINVAL for a number that none can have."""
        if not 0 <= port < EVTCHN_2L_PORTS:
            raise HypercallError(EINVAL)
        return self._ports.get(port, Port(EVTCHNSTAT_CLOSED))

    def allocate_unbound(self, remote_domain: int) -> int:
        """A port that waits for `remote_domain` to bind to it."""
        port = self._free()
        self._ports[port] = Port(EVTCHNSTAT_UNBOUND, remote_domain)
        return port

    def bind_back_end(self, port: int, notify: Callable[[], None]) -> None:
        """A back end of ours binds to a port that waits for it; ValueError if it does not."""
        found = self._ports.get(port)
        if found is None or found.status != EVTCHNSTAT_UNBOUND or found.remote_domain:
            raise ValueError(f"event channel {port} does not wait for a back end")
        found.status = EVTCHNSTAT_INTERDOMAIN
        found.notify = notify

    def unbind_back_end(self, port: int) -> None:
        """The back end is gone; the port waits again, if the guest has not closed it."""
        found = self._ports.get(port)
        if found is not None and found.status == EVTCHNSTAT_INTERDOMAIN:
            found.status = EVTCHNSTAT_UNBOUND
            found.notify = None

    def bind_loopback(self, remote_port: int, own_id: int) -> int:
        """Bind a new port to one of the domain's own that waits for the domain itself, whose number is `own_id`."""
        remote = self.get(remote_port)
        if remote.status != EVTCHNSTAT_UNBOUND or remote.remote_domain != own_id:
            raise HypercallError(EINVAL)
        port = self._free()
        self._ports[port] = Port(
            EVTCHNSTAT_INTERDOMAIN, own_id, remote_port, notify=partial(self.set_pending, remote_port)
        )
        remote.status, remote.remote_port = EVTCHNSTAT_INTERDOMAIN, port
        remote.notify = partial(self.set_pending, port)
        self.set_pending(port)  # as Xen does: either end may have missed the other's first event
        return port

    def bind_virq(self, virq: int) -> int:
        if virq in self._virqs:
            raise HypercallError(EEXIST)
        port = self._free()
        self._virqs[virq] = port
        self._ports[port] = Port(EVTCHNSTAT_VIRQ, virq=virq)
        return port

    def bind_ipi(self) -> int:
        port = self._free()
        self._ports[port] = Port(EVTCHNSTAT_IPI)
        return port

    def close(self, port: int) -> None:
        found = self.get(port)
        if found.status == EVTCHNSTAT_VIRQ:
            del self._virqs[found.virq]
        if found.status == EVTCHNSTAT_INTERDOMAIN and found.remote_port:
            remote = self._ports.get(found.remote_port)
            if remote is not None:
                remote.status, remote.remote_port, remote.notify = EVTCHNSTAT_UNBOUND, 0, None
        del self._ports[port]
        self._view[self._shared + SHARED_EVTCHN_PENDING + (port >> 3)] &= ~(1 << (port & 7)) & 0xFF

    def send(self, port: int) -> None:
        """The guest sends an event."""
        found = self.get(port)
        if found.status == EVTCHNSTAT_IPI:
            self.set_pending(port)
        elif found.status == EVTCHNSTAT_INTERDOMAIN:
            if found.notify is not None:
                found.notify()
        elif found.status != EVTCHNSTAT_UNBOUND:
            raise HypercallError(EINVAL)

    def unmask(self, port: int) -> None:
        """Clear the port's mask bit, and tell of an event that came meanwhile."""
        self.get(port)
        at, bit = self._shared + SHARED_EVTCHN_MASK + (port >> 3), 1 << (port & 7)
        was_masked = self._view[at] & bit
        self._view[at] &= ~bit & 0xFF
        if was_masked and self._bit(SHARED_EVTCHN_PENDING, port):
            self._select(port)

    def reset(self) -> None:
        """Close all ports."""
        for port in list(self._ports):
            if port in self._ports:
                self.close(port)

    def raise_virq(self, virq: int) -> None:
        """A virtual interrupt, if the guest has bound it."""
        port = self._virqs.get(virq)
        if port is not None:
            self.set_pending(port)

    def check_vcpu_bindable(self, port: int) -> None:
        """EINVAL for ports that stay with the processor they were bound on."""
        found = self.get(port)
        if found.status not in (EVTCHNSTAT_UNBOUND, EVTCHNSTAT_INTERDOMAIN):
            raise HypercallError(EINVAL)

