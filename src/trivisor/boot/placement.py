"""Finding room in guest memory for what a boot loader adds to the kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trivisor.machine.memory import PAGE_SIZE

E820_RAM = 1
"""Type of usable memory in an e820 map (ACPI 15.1)."""

E820Map = Sequence[tuple[int, int, int]]
"""Address, length in bytes and type of each range, as firmware reports them."""


def usable(e820: E820Map) -> list[tuple[int, int]]:
    """Return (start, end) of each usable range."""
    return [(start, start + length) for start, length, kind in e820 if kind == E820_RAM]


def find_room(
    e820: E820Map,
    taken: Iterable[tuple[int, int]],
    size: int,
    *,
    alignment: int = PAGE_SIZE,
    floor: int,
    ceiling: int,
    highest: bool = False,
) -> int | None:
    """Return an address for `size` bytes of usable memory within [floor, ceiling), or None.

    `taken` are (start, end) ranges to keep clear of.  The lowest place that
    fits is chosen, or the `highest`.
    """
    ranges = [(max(start, floor), min(end, ceiling)) for start, end in usable(e820)]
    taken = list(taken)
    if highest:
        edges = [end for _, end in ranges] + [start for start, _ in taken]
        candidates = sorted(((edge - size) // alignment * alignment for edge in edges), reverse=True)
    else:
        edges = [start for start, _ in ranges] + [end for _, end in taken]
        candidates = sorted(-(-edge // alignment) * alignment for edge in edges)
    for address in candidates:
        end = address + size
        inside = any(low <= address and end <= high for low, high in ranges)
        if inside and all(end <= start or stop <= address for start, stop in taken):
            return address
    return None
