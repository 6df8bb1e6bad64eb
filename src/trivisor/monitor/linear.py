"""Guest linear addresses as a debugger sees them: translated without permission checks or side effects."""

from __future__ import annotations

from trivisor.machine.memory import PAGE_SIZE, GuestMemory, GuestMemoryError
from trivisor.machine.state import CpuState
from trivisor.x86.exceptions import GuestException
from trivisor.x86.paging import Access, PagingMode, walk

_PHYSICAL_BITS = 52
"""The architecture's limit: a look into a guest need not mind which bits its processor reserves."""


def translate(memory: GuestMemory, state: CpuState, address: int) -> int | None:
    """The guest physical address of linear `address`, or None when it is not mapped."""
    paging = PagingMode.from_registers(
        state.cr0, state.cr3, state.cr4, state.efer, physical_bits=_PHYSICAL_BITS
    )
    try:
        found = walk(memory, paging, address, Access.READ, user=False, ac=True, set_bits=False)
    except (GuestException, GuestMemoryError):
        return None
    return found.physical


def read_linear(memory: GuestMemory, state: CpuState, address: int, length: int) -> bytes:
    """Up to `length` bytes from linear `address`; shorter where the mapping or RAM ends."""
    data = bytearray()
    mask = 0xFFFF_FFFF_FFFF_FFFF
    while len(data) < length:
        here = (address + len(data)) & mask
        physical = translate(memory, state, here)
        piece = min(length - len(data), PAGE_SIZE - here % PAGE_SIZE)
        if physical is None or not memory.is_ram(physical, piece):
            break
        data += memory.read(physical, piece)
    return bytes(data)
