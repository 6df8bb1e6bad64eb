"""Why a vCPU came back to the monitor: a closed set, in KVM's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class PortIn(NamedTuple):
    """IN, INS: the guest read `size` bytes (1, 2, 4) from `port`; `value` is what it was given."""

    port: int
    size: int
    value: int


class PortOut(NamedTuple):
    """OUT, OUTS: the guest wrote `value`."""

    port: int
    size: int
    value: int


class MmioRead(NamedTuple):
    """A load of `size` bytes from a physical address that is not RAM; `value` is what it was given."""

    address: int
    size: int
    value: int


class MmioWrite(NamedTuple):
    """A store to a physical address that is not RAM."""

    address: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class MsrRead:
    """RDMSR of `index`; `value` is None when the guest got #GP."""

    index: int
    value: int | None


@dataclass(frozen=True, slots=True)
class MsrWrite:
    """WRMSR; `accepted` is False when the guest got #GP."""

    index: int
    value: int
    accepted: bool


class CpuidExit(NamedTuple):
    """CPUID of (`leaf`, `subleaf`) and the (eax, ebx, ecx, edx) that was answered."""

    leaf: int
    subleaf: int
    result: tuple[int, int, int, int]


class Hypercall(NamedTuple):
    """VMCALL or a paravirtual call: its number and arguments."""

    number: int
    arguments: tuple[int, ...]


class Halt(NamedTuple):
    """HLT; `interrupts_enabled` False means that nothing but an NMI or reset could wake it."""

    interrupts_enabled: bool


class Shutdown(NamedTuple):
    """A triple fault: an exception (`vector`) while the double fault was being delivered."""

    vector: int


@dataclass(frozen=True, slots=True)
class InterruptWindow:
    """The guest can take an interrupt now."""


class ExceptionExit(NamedTuple):
    """An exception was delivered to the guest (reported to subscribers only)."""

    vector: int
    error_code: int | None
    address: int


class DebugStop(NamedTuple):
    """A single step or a monitor's breakpoint was reached at linear address `rip`."""

    rip: int


@dataclass(frozen=True, slots=True)
class Kicked:
    """`kick()` was called, or a host timer or signal wants the monitor's attention."""


@dataclass(frozen=True, slots=True)
class UserMode:
    """The processor is about to run 64-bit code in ring 3, for which it was told to come back (`machine.ring_zero`)."""


class Unsupported(NamedTuple):
    """The guest asked for what this technique does not have; `what` names it, `rip` is its address."""

    what: str
    rip: int


Exit = (
    PortIn
    | PortOut
    | MmioRead
    | MmioWrite
    | MsrRead
    | MsrWrite
    | CpuidExit
    | Hypercall
    | Halt
    | Shutdown
    | InterruptWindow
    | ExceptionExit
    | DebugStop
    | Kicked
    | UserMode
    | Unsupported
)
