"""The hypercalls, one file a subject; each file's `handlers` gives functions by hypercall number.

A handler takes the six argument registers and returns the result; it raises
HypercallError for an error, GuestException for a guest address that cannot
be used (-EFAULT), Preempted to be called again, and DomainCrash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain

Handler = Callable[..., int]


def handlers(domain: Domain) -> dict[int, Handler]:
    """All hypercalls that this hypervisor has, by number."""
    from trivisor.paravirt.xen.hypercalls import channels, control, grants, memory, mmu, registers, scheduling

    table: dict[int, Handler] = {}
    for module in (registers, mmu, memory, control, scheduling, channels, grants):
        table |= module.handlers(domain)
    return table
