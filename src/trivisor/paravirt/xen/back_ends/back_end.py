"""What all back ends have in common: the hand-shake with the front end through the store (io/xenbus.h)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from trivisor.machine.clock import Clock
from trivisor.machine.memory import GuestMemory
from trivisor.machine.saved_values import number, rows
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.back_ends.ring import RingError, SharedRing
from trivisor.paravirt.xen.events import EventChannels
from trivisor.paravirt.xen.grants import Grant, GrantError, GrantTable
from trivisor.paravirt.xen.xenstore.store import Store

INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = range(1, 7)
"""States of either end (enum xenbus_state)."""
PROTOCOL = "x86_64-abi"


class NoConnection(Exception):
    """The front end has not told what is needed, or something that is not there."""


class Guest(NamedTuple):
    """What a back end reaches of the domain that it serves."""

    store: Store
    events: EventChannels
    grants: GrantTable
    memory: GuestMemory
    clock: Clock
    written: Callable[[int, int], None]
    """To be called after memory was written: physical address and length, within one page."""


class BackEnd(Remembers):
    """One device.  All methods belong to the vCPU's thread."""

    ring_names: ClassVar[Mapping[str, int]]
    """The nodes that name its rings, and the size of an entry of each, in bytes."""

    def __init__(self, guest: Guest, front: str, back: str, offers: Mapping[str, str]) -> None:
        """`front` and `back` are the ends' paths in the store; `offers` is what the front end is told at first."""
        self.guest = guest
        self._front = front
        self._back = back
        self._offers = offers
        self.trouble = ""
        """Why the front end is not served."""
        self._state = INITIALISING
        self._port: int | None = None
        self._held: list[Grant] = []
        self._rings: list[SharedRing] = []
        self._watch = guest.store.watch(f"{front}/state", self._front_changed)

    # -- what a device does itself --------------------------------------------------------------------------

    def connect(self) -> None:
        """Take what the front end tells; raises NoConnection."""
        raise NotImplementedError

    def use(self, rings: list[SharedRing]) -> None:
        """The front end's rings, in the order of `ring_names`; none once it is gone, after `quiesce`."""
        raise NotImplementedError

    def quiesce(self) -> None:
        """Finish and answer what is under way."""
        raise NotImplementedError

    def notified(self) -> None:
        """The front end has sent an event; raises RingError."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Any]:
        """What was done so far."""
        raise NotImplementedError

    def close(self) -> None:
        """The machine is switched off: stop all threads, finish what is under way, and give back what is the host's."""
        raise NotImplementedError

    # -- the hand-shake -------------------------------------------------------------------------------------

    def _front_changed(self, _path: str) -> None:
        state = self._number("state")
        if state == INITIALISING and self._state in (INITIALISING, CLOSING, CLOSED):
            self._hang_up()
            self.trouble = ""
            self.tell(self._offers)
            self._go(INIT_WAIT)
        elif state in (INITIALISED, CONNECTED) and self._state == INIT_WAIT:
            self._connect()
        elif state in (CLOSING, CLOSED) and self._state != state:
            self._hang_up()
            self._go(state)
        elif state is None and self._state == CONNECTED:
            self._hang_up()
            self._go(CLOSED)

    def _connect(self) -> None:
        try:
            self.connect()
            self._bind()
            for name, entry_size in self.ring_names.items():
                self._take_ring(name, entry_size)
        except (NoConnection, GrantError) as error:
            self.fail(str(error))
            return
        self.use(self._rings)
        self._go(CONNECTED)

    def fail(self, why: str) -> None:
        """The front end broke the protocol: it is served no more, until it begins again."""
        self.trouble = why
        self._hang_up()
        self._go(CLOSING)

    def _go(self, state: int) -> None:
        self._state = state
        self.guest.store.write(f"{self._back}/state", str(state))

    def _hang_up(self) -> None:
        self.quiesce()
        self.use([])
        self._rings = []
        if self._port is not None:
            self.guest.events.unbind_back_end(self._port)
            self._port = None
        for grant in self._held:
            grant.release()
        self._held.clear()

    def _take_ring(self, name: str, entry_size: int) -> None:
        """Take the ring whose page's grant is in a node."""
        reference = self._number(name)
        if reference is None:
            raise NoConnection(f"no {name}")
        grant = self.guest.grants.take(reference, write=True)
        self._held.append(grant)
        self._rings.append(SharedRing(self.guest.memory, grant.address, entry_size))

    def _bind(self) -> None:
        """Bind to the event channel that the front end offers."""
        port = self._number("event-channel")
        if port is None:
            raise NoConnection("no event-channel")
        if self.told("protocol") not in (None, PROTOCOL):
            raise NoConnection(f"protocol {self.told('protocol')}")
        try:
            self.guest.events.bind_back_end(port, self._notified)
        except ValueError as error:
            raise NoConnection(str(error)) from None
        self._port = port

    # -- into a snapshot and out of it ----------------------------------------------------------------------

    def save(self) -> Saved:
        """The connection, which the front end keeps.  After `quiesce`: no request is under way."""
        pairs = zip(self._held, self._rings, strict=True)
        return {
            "state": self._state,
            "port": self._port or 0,
            "rings": [[grant.reference, grant.frame, ring.answered] for grant, ring in pairs],
        }

    def load(self, saved: Saved) -> None:
        """Once ports, frames and grants are loaded; ValueError for what no back end can have."""
        state = number(saved.get("state"), "state", 3)
        port = number(saved.get("port"), "port", 12)
        rings = rows(saved, "rings", [32, 40, 32], len(self.ring_names))
        expected = len(self.ring_names) if state == CONNECTED else 0
        if not INITIALISING <= state <= CLOSED or len(rings) != expected:
            raise ValueError(f"a back end in state {state} has {expected} rings")
        for (reference, frame, answered), entry_size in zip(rings, self.ring_names.values(), strict=False):
            try:
                grant = self.guest.grants.take_again(reference, frame, write=True)
            except GrantError as error:
                raise ValueError(f"a ring cannot be there: {error}") from None
            self._held.append(grant)
            self._rings.append(SharedRing(self.guest.memory, grant.address, entry_size, answered))
        self._state = state
        if self._rings:
            self.use(self._rings)
            self._port = port if self.guest.events.rebind_back_end(port, self._notified) else None

    # -- for devices ----------------------------------------------------------------------------------------

    def tell(self, values: Mapping[str, str]) -> None:
        """Write nodes of the back end."""
        for name, value in values.items():
            self.guest.store.write(f"{self._back}/{name}", value)

    def told(self, name: str) -> str | None:
        """A node of the front end."""
        return self.guest.store.read(f"{self._front}/{name}")

    def _number(self, name: str) -> int | None:
        text = self.told(name)
        return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) <= 10 else None

    def flag(self, name: str) -> bool:
        """Whether the front end says that it can do something."""
        return self._number(name) == 1

    def _notified(self) -> None:
        try:
            self.notified()
        except RingError as error:
            self.fail(str(error))

    def notify(self) -> None:
        """Send the front end an event."""
        if self._port is not None:
            self.guest.events.set_pending(self._port)
