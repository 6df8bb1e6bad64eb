"""The guest's debug registers: none may watch what is Xen's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trivisor.paravirt.xen.abi import HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from trivisor.paravirt.xen.shared_table import INDEX
from trivisor.x86.control import CR4_DE, DR6_FIXED, DR6_VALID, DR7_FIXED, DR7_GD

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain


_PORT = 2
"""The R/W field of DR7 for breakpoints on ports."""
_LENGTHS = (1, 2, 8, 4)
"""By its LEN fields."""


def _enabled(control: int) -> Iterator[tuple[int, int, int]]:
    """(number, R/W field, length in bytes) of the breakpoints that a DR7 has on."""
    for number in range(4):
        if control >> 2 * number & 3:
            yield number, control >> 16 + 4 * number & 3, _LENGTHS[control >> 18 + 4 * number & 3]


def ports_hit(domain: Domain, port: int, size: int) -> int:
    """The bits of DR6 for an access to `size` ports: the hypervisor does those, so it minds their breakpoints."""
    bits, registers = 0, domain.cpu.dr
    if domain.state.cr4 & CR4_DE:
        for number, kind, length in _enabled(registers[7]):
            start = registers[number] & ~(length - 1)
            if kind == _PORT and port < start + length and port + size > start:
                bits |= 1 << number
    return bits


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
        if not domain.state.cr4 & CR4_DE and any(kind == _PORT for _, kind, _ in _enabled(value)):
            return False
        cpu.set_debug_register(7, value & 0xFFFF27FF | DR7_FIXED)
        domain.table.words[INDEX["BREAKPOINTS"]] = value & 0xFF
    return True
