"""The seam between the monitor and the techniques: what every virtual processor can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from trivisor.machine.bus import Bus
from trivisor.machine.clock import Clock
from trivisor.machine.cpuid import GuestCpuid
from trivisor.machine.exits import Exit
from trivisor.machine.fast_ports import FastPorts
from trivisor.machine.interrupts import InterruptController
from trivisor.machine.memory import GuestMemory
from trivisor.machine.state import CpuState
from trivisor.machine.virtual_apic import VirtualApic

MsrHandler = tuple[Callable[[], int], Callable[[int], None]]
"""Reader and writer of one MSR; either may raise `GeneralProtection`."""


class GeneralProtection(Exception):
    """Raised by an MSR handler: the guest's access gets #GP(0)."""


class Surroundings(Protocol):
    """What a processor is plugged into: the board, as the processor sees it."""

    memory: GuestMemory
    ports: Bus
    fast_ports: FastPorts
    mmio: Bus
    clock: Clock
    interrupts: InterruptController
    virtual_apic: VirtualApic
    msrs: dict[int, MsrHandler]
    """MSRs that live outside the processor core (the local APIC's)."""
    apic_id: int
    tsc_frequency: int
    """Hz, told to the guest in CPUID."""
    crystal_frequency: int
    """Hz of the local APIC timer's input clock, told in CPUID leaf 0x15."""
    tsc: Callable[[], int]
    """The guest's time-stamp counter now, for timers that wait for it; set by the processor."""

    def tsc_changed(self) -> None:
        """The guest has set its time-stamp counter; called by the processor."""

    stop_reason: object | None
    """Set by a device that ends the run (power off, reset, debug exit); the vCPU then returns at once."""


class Vcpu(Protocol):
    """One virtual processor under some technique.

    All methods but `kick` belong to one thread.  Exits that the surroundings
    can answer (ports, MMIO, MSRs, CPUID, HLT with a timer running) are handled
    inside `run`; an exit object for them is made only for kinds in `observed`.
    """

    state: CpuState
    """Get copies the whole state out, set loads it; both only while not running."""
    observed: dict[type, list[Callable[[Any], None]]]
    """Subscribers by exit type, called with each exit of that type as it happens."""
    technique: str
    engine: str
    guest_cpuid: GuestCpuid
    """The processor that the guest sees."""
    tsc_offset: int
    """What the guest's time-stamp counter is ahead of the host's, modulo 2^64; ValueError where it cannot be set."""

    def attach(self) -> None:
        """Be the processor that the board's wires lead to: its timers, interrupts and TSC."""

    def run(self) -> Exit:
        """Run until something needs the monitor: Halt for good, Shutdown, Kicked, DebugStop, Unsupported."""

    def step(self) -> Exit:
        """Run one instruction; DebugStop when nothing else happened."""

    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt at the next instruction boundary that has IF=1."""

    def kick(self) -> None:
        """Make `run` return `Kicked` soon; callable from any thread and from a signal handler."""

    def memory_written(self, address: int, length: int) -> None:
        """Guest physical memory was changed from outside: forget translations made from it."""

    def last_block(self) -> tuple[int, int] | None:
        """(linear address, length in bytes) of the straight run of code that rip stands in, if the engine knows."""

    def statistics(self) -> dict[str, Any]:
        """Exact counters since the start: exits by kind and what the engine adds."""

    def close(self) -> None:
        """Give host resources back."""
