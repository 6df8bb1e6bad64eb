"""The guest's debug registers: none may watch what is Xen's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivisor.paravirt.xen.abi import HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from trivisor.x86.control import DR6_FIXED, DR6_VALID, DR7_FIXED, DR7_GD

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain


def set_debug_register(domain: Domain, number: int, value: int) -> bool:
    """Keep a debug register; False for a value that it may not have."""
    cpu = domain.cpu
    if number < 4:
        if HYPERVISOR_VIRT_START <= value < HYPERVISOR_VIRT_END or value >> 47 not in (0, 0x1FFFF):
            return False
        cpu.set_debug_register(number, value)
    elif number in (4, 6):
        if value >> 32:
            return False
        cpu.set_debug_register(6, value & DR6_VALID | DR6_FIXED)
    else:
        if value >> 32 or value & DR7_GD:
            return False
        cpu.set_debug_register(7, value & 0xFFFF27FF | DR7_FIXED)
    return True
