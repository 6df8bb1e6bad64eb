"""The seam between an engine that runs only 64-bit ring 3 of a guest, and a processor of another that does the rest.

The processor does everything in ring 0 and comes back with `UserMode`
when 64-bit code in ring 3 is to run.  The engine takes the registers that such
code works on, runs it, and gives them back when it wants ring 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from trivisor.machine.state import Segment
from trivisor.machine.vcpu import Vcpu


@dataclass(slots=True)
class UserRegisters:
    """What code in ring 3 can change of a processor by itself; as in `machine.state.CpuState`."""

    gpr: list[int]
    rip: int
    rflags: int
    segments: list[Segment]
    """The six segment registers in encoding order: ES, CS, SS, DS, FS, GS."""
    xsave: bytes


class Controls(NamedTuple):
    """What it depends on and cannot change."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    xcr0: int


class RingZero(Protocol):
    """The processor that runs ring 0."""

    @property
    def vcpu(self) -> Vcpu:
        """The processor itself."""

    user: UserRegisters
    """Get copies them out, set loads them; after `run` came back with `UserMode` alone."""

    @property
    def controls(self) -> Controls:
        """The control registers now."""

    @property
    def interrupt_flag(self) -> bool:
        """Whether an interrupt that waits will be taken."""

    @property
    def interrupt_waits(self) -> bool:
        """Whether there is one, the board's, injected by hand or an NMI."""

    @property
    def tlb_flushes(self) -> int:
        """How often the guest has had translations of addresses forgotten: what changed before may be seen after."""
