"""Looking into a guest through its own page tables."""

from collections.abc import Iterator

import pytest

from trivisor.machine.memory import GuestMemory
from trivisor.machine.state import CpuState
from trivisor.monitor.linear import read_linear, translate

MIB = 1 << 20
PG, PAE, LME_LMA = 1 << 31 | 1, 1 << 5, 0x500


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(16 * MIB)
    yield made
    made.close()


def long_mode(memory: GuestMemory) -> CpuState:
    """Linear 0xffff800000000000: two pages in reverse order, then a hole; 2 MiB pages from +2 MiB."""
    memory.write_u64(0x1000 + 256 * 8, 0x2003)
    memory.write_u64(0x2000, 0x3003)
    memory.write_u64(0x3000, 0x4003)
    memory.write_u64(0x3008, 0x400083)
    memory.write_u64(0x4000, 0x7003)
    memory.write_u64(0x4008, 0x6003)
    return CpuState(cr0=PG, cr3=0x1000, cr4=PAE, efer=LME_LMA)


BASE = 0xFFFF_8000_0000_0000


def test_a_read_follows_the_pages(memory: GuestMemory) -> None:
    state = long_mode(memory)
    memory.write(0x7FFE, b"ab")
    memory.write(0x6000, b"cd")
    assert read_linear(memory, state, BASE + 0xFFE, 4) == b"abcd"


def test_a_read_ends_where_the_mapping_ends(memory: GuestMemory) -> None:
    state = long_mode(memory)
    assert len(read_linear(memory, state, BASE + 0x1FF0, 100)) == 16
    assert read_linear(memory, state, BASE + 0x2000, 4) == b""


def test_large_pages(memory: GuestMemory) -> None:
    assert translate(memory, long_mode(memory), BASE + 0x212345) == 0x412345


def test_looking_changes_nothing(memory: GuestMemory) -> None:
    state = long_mode(memory)
    before = memory.read(0, MIB)
    read_linear(memory, state, BASE, 0x2000)
    assert memory.read(0, MIB) == before


def test_tables_outside_ram_map_nothing(memory: GuestMemory) -> None:
    assert translate(memory, CpuState(cr0=PG, cr3=0xFFFF_F000, cr4=PAE, efer=LME_LMA), BASE) is None


def test_without_paging_linear_is_physical(memory: GuestMemory) -> None:
    memory.write(0x5000, b"xyz")
    assert read_linear(memory, CpuState(cr0=1), 0x5000, 3) == b"xyz"


def test_32_bit_paging(memory: GuestMemory) -> None:
    memory.write_u32(0x1000 + 4 * 0x300, 0x2003)
    memory.write_u32(0x2000 + 4 * 5, 0x9003)
    assert translate(memory, CpuState(cr0=PG, cr3=0x1000), 0xC0005123) == 0x9123
