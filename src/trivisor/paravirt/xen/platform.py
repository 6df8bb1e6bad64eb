"""What stands around a PV domain's processor: no devices, but the event channels and the clock."""

from __future__ import annotations

from collections.abc import Callable

from trivisor.machine.bus import Bus
from trivisor.machine.clock import Clock
from trivisor.machine.fast_ports import FastPorts
from trivisor.machine.interrupts import InterruptController
from trivisor.machine.memory import GuestMemory
from trivisor.machine.vcpu import MsrHandler
from trivisor.machine.virtual_apic import VirtualApic
from trivisor.paravirt.xen.console import ConsoleRing


class Platform:
    """The surroundings of the domain's processor (`machine.vcpu.Surroundings`), and its console for the monitor."""

    def __init__(
        self,
        memory: GuestMemory,
        clock: Clock,
        interrupts: InterruptController,
        *,
        tsc: Callable[[], int],
        tsc_frequency: int,
        on_stop: Callable[[], None],
    ) -> None:
        self.memory = memory
        self.clock = clock
        self.interrupts = interrupts
        self.ports = Bus("port")
        self.mmio = Bus("memory")
        self.msrs: dict[int, MsrHandler] = {}
        self.fast_ports = FastPorts()
        self.virtual_apic = VirtualApic()
        self.apic_id = 0
        self.tsc = tsc
        self.tsc_frequency = tsc_frequency
        self.crystal_frequency = tsc_frequency
        self.stop_reason: object | None = None
        self.console: ConsoleRing | None = None
        self._on_stop = on_stop

    def tsc_changed(self) -> None:
        """The PV clock tells the guest's own TSC, so nothing hangs on its value."""

    def stop(self, reason: object) -> None:
        """The domain has ended; the first reason counts."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self._on_stop()

    @property
    def post_code(self) -> int:
        """There is no port 0x80."""
        return 0

    @property
    def console_room(self) -> int:
        """How many bytes `console_input` would take now."""
        return 0 if self.console is None else self.console.room

    def console_input(self, data: bytes) -> int:
        """Type `data` on hvc0; returns how many bytes of it there was room for."""
        return 0 if self.console is None else self.console.feed(data)
