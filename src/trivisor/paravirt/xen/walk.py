"""Walking the guest's page tables as they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivisor.paravirt.xen.abi import HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from trivisor.x86.paging import is_canonical

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain


def walk(domain: Domain, linear: int) -> int | None:
    """The level-1 entry that maps a linear address in the space of the running mode; None without one."""
    found = entry_address(domain, linear)
    return None if found is None else domain.frames.words[found[0] * 512 + found[1]]


def may_be_guests(linear: int) -> bool:
    """Whether a linear address can be a guest's: it is canonical and not Xen's (xen.h, HYPERVISOR_VIRT_START)."""
    return is_canonical(linear) and not HYPERVISOR_VIRT_START <= linear < HYPERVISOR_VIRT_END


def entry_address(domain: Domain, linear: int) -> tuple[int, int] | None:
    """(frame, index) of the level-1 entry for a linear address; None where no table of that level is."""
    if not is_canonical(linear):
        return None
    words, state = domain.frames.words, domain.state
    table = state.kernel_root if state.in_kernel else state.user_root
    for shift in (39, 30, 21):
        entry = words[table * 512 + (linear >> shift & 511)]
        if not entry & 1 or entry & 0x80:
            return None
        table = (entry & (1 << 52) - 1) >> 12
    return table, linear >> 12 & 511
