"""What is counted of the host's memory: against memory that was touched, and a table as the kernel prints it."""

from __future__ import annotations

from trivisor.machine.footprint import footprint, resident
from trivisor.machine.memory import MIB, GuestMemory

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
