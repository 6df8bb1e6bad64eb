"""The guest's debug registers: none may watch what is Xen's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trivisor.paravirt.xen.abi import EINVAL, ENODEV, EPERM
from trivisor.paravirt.xen.shared_table import INDEX
from trivisor.paravirt.xen.walk import may_be_guests
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


def debug_register(domain: Domain, number: int) -> int | None:
    """A debug register; None where there is none: 4 and 5 are 6 and 7, unless CR4.DE is on."""
    if number > 7 or (number in (4, 5) and domain.state.cr4 & CR4_DE):
        return None
    return domain.cpu.dr[number + 2 if number in (4, 5) else number]


def set_debug_register(domain: Domain, number: int, value: int) -> int:
    """Keep a debug register; 0, or why not: ENODEV, EINVAL for bits that there are not, EPERM for what is not its."""
    cpu = domain.cpu
    if debug_register(domain, number) is None:
        return ENODEV
    if number < 4:
        if not may_be_guests(value):
            return EPERM
        cpu.set_debug_register(number, value)
        return 0
    if value >> 32:
        return EINVAL
    if number in (4, 6):
        cpu.set_debug_register(6, value & DR6_VALID | DR6_FIXED)
        return 0
    if value & DR7_GD:
        return EPERM
    if not domain.state.cr4 & CR4_DE and any(kind == _PORT for _, kind, _ in _enabled(value)):
        return EPERM
    cpu.set_debug_register(7, value & 0xFFFF27FF | DR7_FIXED)
    domain.table.words[INDEX["BREAKPOINTS"]] = value & 0xFF
    return 0
