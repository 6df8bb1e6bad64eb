"""What the Python side of sensitive instructions needs of the engine that calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from iced_x86 import Instruction

from trivisor.machine.exits import Exit
from trivisor.machine.vcpu import Surroundings
from trivisor.translation.core import Core
from trivisor.x86.cpuid import FEATURES


class UnsupportedFeature(Exception):
    """The guest asked for something that is not there; the text names it.  Nothing has changed."""


class ModelSpecificRegisters(Protocol):
    """The MSRs that have no field in the core; both raise `machine.vcpu.GeneralProtection`."""

    def read(self, index: int) -> int: ...

    def write(self, index: int, value: int) -> None: ...


class Cpu(Protocol):
    """The virtual processor, stopped at an instruction boundary.

    Linear addresses and values are unsigned.  Sizes are in bytes and may be
    any from 1 to 512: whole stack frames are moved at once.  An address may be
    one that is not canonical, when a guest's own tables lie there, and an
    access that starts below 4 GiB may end above it: outside long mode that
    wraps.
    """

    core: Core
    observed: dict[type, list[Callable[[Any], None]]]

    @property
    def board(self) -> Surroundings: ...

    @property
    def msrs(self) -> ModelSpecificRegisters: ...

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """CPUID as the guest sees it: (eax, ebx, ecx, edx)."""

    def load(self, linear: int, size: int, *, system: bool = False) -> int:
        """Read at the current privilege level, or with `system` as the processor reads its own tables.

        May cross pages; raises `GuestException` with #PF.
        """

    def store(self, linear: int, size: int, value: int, *, system: bool = False) -> None:
        """Write all of `value` or, raising `GuestException`, nothing."""

    def probe_write(self, linear: int, size: int, *, system: bool = False) -> None:
        """Raise the exception that `store` would raise."""

    def flush_tlb(self, *, keep_global: bool) -> None:
        """Forget translations of linear addresses, of global pages only if not `keep_global`."""

    def invalidate_page(self, linear: int) -> None:
        """Forget the translation of one linear address, as INVLPG does."""

    def mode_changed(self) -> None:
        """CS, SS, CPL, CR0, CR4, EFER, XCR0, TF or the hidden part of a data segment has changed."""

    def tsc(self) -> int:
        """The guest's time-stamp counter now."""


def notify(cpu: Cpu, exit: object) -> None:
    """Call the subscribers to this kind of exit.

    Callers look into `cpu.observed` first, so that an object is made only for a subscriber.
    """
    for subscriber in cpu.observed.get(type(exit), ()):
        subscriber(exit)


def has_feature(cpu: Cpu, name: str) -> bool:
    """Whether the guest's CPUID tells of a feature (a name of `x86.cpuid.FEATURES`)."""
    leaf, subleaf, register, bit = FEATURES[name]
    return bool(cpu.cpuid(leaf, subleaf)[register] >> bit & 1)


Handler = Callable[[Cpu, Instruction], Exit | None]
"""Does one instruction.  Raises `GuestException` or `UnsupportedFeature` before anything has changed.

A "straight" handler leaves rip alone; a "branch" sets it.
"""
