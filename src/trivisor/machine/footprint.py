"""How much of the host's memory this process takes, and how much of that is a guest's RAM (proc(5))."""

from __future__ import annotations

import re
from pathlib import Path

from trivisor.machine.memory import MIB, GuestMemory

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_AREA = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
_RESIDENT = re.compile(r"^Rss:\s+(\d+) kB$")


def footprint(memory: GuestMemory) -> dict[str, int]:
    """MiB of the guest's RAM that the host holds, and of all else at the peak; empty without a /proc.

    RAM is never given back, so what it has now it had at its peak.  The host gives it out in huge pages where it can:
    a guest that touched a byte of 2 MiB may have all of them.
    """
    try:
        status = Path("/proc/self/status").read_text()
        areas = Path("/proc/self/smaps").read_text()
    except OSError:
        return {}
    peak = _PEAK.search(status)
    if peak is None:
        return {}
    ram = resident(areas, memory.base, memory.base + memory.span)
    return {"guest RAM": ram // MIB, "all else, at most": max(0, int(peak[1]) * 1024 - ram) // MIB}


def resident(areas: str, start: int, end: int) -> int:
    """Bytes in the host's RAM of the mappings between the addresses `start` and `end`; `areas` as in smaps."""
    total, inside = 0, False
    for line in areas.splitlines():
        if area := _AREA.match(line):
            inside = start <= int(area[1], 16) and int(area[2], 16) <= end
        elif inside and (size := _RESIDENT.match(line)):
            total += int(size[1]) * 1024
    return total
