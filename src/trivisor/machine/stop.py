"""Why a machine stopped for good: what its board says when the guest ends the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class PowerOff:
    """The guest switched the machine off (ACPI sleep state S5)."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The guest asked for a reset: reset control register, keyboard controller or port 0x92."""


class DebugExit(NamedTuple):
    """The guest wrote to the debug exit device."""

    status: int
    """Exit status for the host, 0 to 255: the written value doubled, plus one, as the device has it."""


class Crash(NamedTuple):
    """A paravirtual guest reported its own end, or did what a hypervisor ends a guest for."""

    what: str


StopReason = PowerOff | Reset | DebugExit | Crash
