"""Memory sizes as people write them."""

from __future__ import annotations

import re

from trivisor.machine.memory import GIB, MAXIMUM_RAM, MIB, MINIMUM_RAM, PAGE_SIZE

_UNITS = {"": MIB, "K": 1 << 10, "M": MIB, "G": GIB}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE | re.ASCII)


def parse_memory(text: str | int) -> int:
    """Bytes of RAM for "512M", "1.5G", "512" (MiB, as QEMU takes it) or an int of bytes.

    ValueError for anything else, for less than 16 MiB or more than 16 GiB, and
    for what is not a whole number of pages.
    """
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"memory size {text!r} is not a number with K, M or G")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if not MINIMUM_RAM <= size <= MAXIMUM_RAM:
        raise ValueError(f"memory must be between 16M and 16G, not {text}")
    if size % PAGE_SIZE:
        raise ValueError(f"memory must be a whole number of 4 KiB pages, not {text}")
    return size


def format_memory(size: int) -> str:
    """Bytes of RAM as people write them: "512M", or in K when they are no whole number of MiB."""
    return f"{size // MIB}M" if size % MIB == 0 else f"{size >> 10}K"
