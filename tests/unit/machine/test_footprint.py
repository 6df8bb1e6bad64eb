"""What is counted of the host's memory: against memory that was touched, and a table as the kernel prints it."""

from __future__ import annotations

import mmap

from trivisor.machine.footprint import footprint, resident
from trivisor.machine.memory import MIB, GuestMemory, host_map, host_unmap, prefer_huge_pages

AREAS = """\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
Rss:                1024 kB
7f0000200000-7f0000400000 ---p 00000000 00:00 0
Rss:                   0 kB
7f0000400000-7f0000500000 rw-p 00000000 00:00 0                          [heap]
Rss:                 512 kB
"""


def test_areas_between_the_addresses_count_and_no_others() -> None:
    assert resident(AREAS, 0x7F0000000000, 0x7F0000400000) == MIB
    assert resident(AREAS, 0x7F0000000000, 0x7F0000500000) == MIB + MIB // 2
    assert resident(AREAS, 0x7F0000200000, 0x7F0000500000) == MIB // 2


def test_touched_ram_is_the_guests_and_the_rest_is_ours() -> None:
    memory = GuestMemory(64 * MIB)
    try:
        before = footprint(memory)
        memory.write(8 * MIB, bytes([1]) * (20 * MIB))
        after = footprint(memory)
    finally:
        memory.close()
    assert before["guest RAM"] <= 2
    assert 20 <= after["guest RAM"] <= 24
    assert 0 < after["all else, at most"] < 1000


def test_a_mapping_of_the_same_kind_beside_the_rams_is_not_taken_for_it() -> None:
    """The kernel makes one area of two that lie side by side."""
    memory = GuestMemory(64 * MIB)
    others = [host_map(4 * MIB, mmap.PROT_READ | mmap.PROT_WRITE) for _ in range(4)]
    try:
        for other in others:
            prefer_huge_pages(other, 4 * MIB)
        memory.write(8 * MIB, bytes([1]) * (20 * MIB))
        assert 20 <= footprint(memory)["guest RAM"] <= 24
    finally:
        for other in others:
            host_unmap(other, 4 * MIB)
        memory.close()
