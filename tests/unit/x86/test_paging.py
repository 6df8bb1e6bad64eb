"""The reference walker against the tables of Intel SDM 3A chapter 4."""

from __future__ import annotations

import itertools

import pytest

from trivisor.x86 import paging
from trivisor.x86.exceptions import PAGE_FAULT, GuestException
from trivisor.x86.paging import Access, Mode, PagingMode, Translation, walk

P, RW, US, A, D, PS, G = (
    paging.PRESENT, paging.WRITABLE, paging.USER,
    paging.ACCESSED, paging.DIRTY, paging.PAGE_SIZE, paging.GLOBAL,
)  # fmt: skip
NX = paging.NO_EXECUTE
ALL = P | RW | US
READ, WRITE, EXECUTE = Access.READ, Access.WRITE, Access.EXECUTE


class Memory:
    """Sparse memory of aligned entries; all ones where nothing was put."""

    def __init__(self, entries: dict[int, int]) -> None:
        self.entries = entries

    def read_u32(self, address: int) -> int:
        return self.entries.get(address, 0xFFFFFFFF)

    def read_u64(self, address: int) -> int:
        return self.entries.get(address, 0xFFFFFFFFFFFFFFFF)

    def write_u32(self, address: int, value: int) -> None:
        assert value < 1 << 32
        self.entries[address] = value

    write_u64 = write_u32


class Memory64(Memory):
    def write_u64(self, address: int, value: int) -> None:
        self.entries[address] = value


LONG = PagingMode(Mode.LEVEL4, cr3=0x1000, wp=True, nxe=True, pge=True)
LINEAR = 0x0000_1234_5678_9ABC
INDEXES = [LINEAR >> shift & 511 for shift in (39, 30, 21, 12)]


def long_memory(pml4e: int = ALL, pdpte: int = ALL, pde: int = ALL, pte: int = 0x7654000 | ALL) -> Memory64:
    """Tables at 0x1000 to 0x4000 that map LINEAR; entries are flags, tables' addresses are added."""
    return Memory64(
        {
            0x1000 + 8 * INDEXES[0]: 0x2000 | pml4e,
            0x2000 + 8 * INDEXES[1]: pdpte if pdpte & PS else 0x3000 | pdpte,
            0x3000 + 8 * INDEXES[2]: pde if pde & PS else 0x4000 | pde,
            0x4000 + 8 * INDEXES[3]: pte,
        }
    )


def fault(memory: Memory, mode: PagingMode, linear: int, access: Access, **how: bool) -> int:
    """The error code of the page fault that this access must raise."""
    before = dict(memory.entries)
    with pytest.raises(GuestException) as caught:
        walk(memory, mode, linear, access, **{"user": False, **how})
    assert caught.value.vector == PAGE_FAULT
    assert caught.value.address == linear
    assert memory.entries == before, "a fault must leave the tables alone"
    assert caught.value.error_code is not None
    return caught.value.error_code


def test_no_paging() -> None:
    found = walk(Memory({}), PagingMode(Mode.NONE), 0x1_2345_6789, WRITE, user=True)
    assert (found.physical, found.writable, found.user, found.executable) == (0x23456789, True, True, True)


def test_mode_from_registers() -> None:
    def mode(cr0: int, cr4: int, efer: int) -> Mode:
        return PagingMode.from_registers(cr0, 0, cr4, efer).mode

    assert mode(1, 0x20, 0x100) is Mode.NONE
    assert mode(0x80000001, 0x10, 0) is Mode.BITS32
    assert mode(0x80000001, 0x20, 0) is Mode.PAE
    assert mode(0x80000001, 0x20, 0x500) is Mode.LEVEL4
    linux = PagingMode.from_registers(0x80050033, 0x1000, 0x3506F0, 0xD01)
    assert (linux.wp, linux.smep, linux.smap, linux.nxe, linux.pge) == (True, True, True, True, True)


def test_4_level_small_page() -> None:
    found = walk(long_memory(), LONG, LINEAR, READ, user=True)
    assert found == Translation(0x7654ABC, 4096, True, True, True, False, False, 0)


def test_4_level_large_pages() -> None:
    two = walk(long_memory(pde=0x7600000 | ALL | PS | G | D), LONG, LINEAR, READ, user=True)
    assert (two.physical, two.page_size) == (0x7600000 + 0x189ABC, 1 << 21)
    assert two.global_ and two.dirty
    one = walk(long_memory(pdpte=0x140000000 | ALL | PS), LONG, LINEAR, READ, user=True)
    assert (one.physical, one.page_size) == (0x140000000 + (LINEAR & 0x3FFFFFFF), 1 << 30)


def test_rights_combine_over_levels() -> None:
    for level in ("pml4e", "pdpte", "pde", "pte"):
        frame = 0x7654000 if level == "pte" else 0
        assert not walk(long_memory(**{level: frame | P | US}), LONG, LINEAR, READ, user=True).writable
        assert not walk(long_memory(**{level: frame | P | RW}), LONG, LINEAR, READ, user=False).user
        assert not walk(long_memory(**{level: frame | ALL | NX}), LONG, LINEAR, READ, user=True).executable


def test_accessed_and_dirty() -> None:
    memory = long_memory()
    walk(memory, LONG, LINEAR, READ, user=True)
    assert [entry & (A | D) for entry in memory.entries.values()] == [A, A, A, A]
    assert walk(memory, LONG, LINEAR, WRITE, user=True).dirty
    assert [entry & (A | D) for entry in memory.entries.values()] == [A, A, A, A | D]
    untouched = long_memory()
    before = dict(untouched.entries)
    assert not walk(untouched, LONG, LINEAR, WRITE, user=True, set_bits=False).dirty
    assert untouched.entries == before


def test_not_present_at_each_level() -> None:
    for level in ("pml4e", "pdpte", "pde", "pte"):
        memory = long_memory(**{level: RW | US | NX})
        assert fault(memory, LONG, LINEAR, READ) == 0
        assert fault(memory, LONG, LINEAR, WRITE, user=True) == 6
        assert fault(memory, LONG, LINEAR, EXECUTE, user=True) == 0x14


def test_reserved_bits() -> None:
    high = 1 << 40
    for level in ("pml4e", "pdpte", "pde", "pte"):
        assert fault(long_memory(**{level: ALL | high}), LONG, LINEAR, READ) == 9
        without_nx = LONG._replace(nxe=False)
        assert fault(long_memory(**{level: ALL | NX}), without_nx, LINEAR, WRITE, user=True) == 15
    assert fault(long_memory(pml4e=ALL | PS), LONG, LINEAR, READ) == 9
    assert fault(long_memory(pde=ALL | PS | 1 << 13), LONG, LINEAR, READ) == 9
    assert fault(long_memory(pdpte=ALL | PS | 1 << 29), LONG, LINEAR, READ) == 9
    assert fault(long_memory(pdpte=ALL | PS), LONG._replace(gigabyte_pages=False), LINEAR, READ) == 9
    assert walk(long_memory(pte=ALL | 0x7FF << 52), LONG, LINEAR, READ, user=True).physical == 0xABC
    assert fault(Memory64({}), LONG, LINEAR, READ) == 9, "tables outside memory read as all ones"


def expected(
    access: Access, user: bool, us: bool, rw: bool, nx: bool, wp: bool, smep: bool, smap: bool, ac: bool
) -> bool:
    """Section 4.6.1 of the manual, paragraph by paragraph."""
    if user:
        if not us:
            return False
        return {READ: True, WRITE: rw, EXECUTE: not nx}[access]
    if access is EXECUTE:
        return not nx and not (us and smep)
    if us and smap and not ac:
        return False
    return True if access is READ else (rw or not wp)


def test_access_rights_exhaustively() -> None:
    flags = [False, True]
    for access, user in itertools.product(Access, flags):
        for us, rw, nx, wp, smep, smap, ac in itertools.product(flags, repeat=7):
            memory = long_memory(pte=0x5000 | P | RW * rw | US * us | NX * nx)
            mode = LONG._replace(wp=wp, smep=smep, smap=smap)
            if expected(access, user, us, rw, nx, wp, smep, smap, ac):
                assert walk(memory, mode, LINEAR, access, user=user, ac=ac).physical == 0x5ABC
            else:
                code = 1 | 2 * (access is WRITE) | 4 * user | 16 * (access is EXECUTE)
                assert fault(memory, mode, LINEAR, access, user=user, ac=ac) == code


def test_implicit_access_is_the_supervisors_and_ac_does_not_help() -> None:
    kernel_page = long_memory(pte=0x5000 | P | RW)
    assert walk(kernel_page, LONG, LINEAR, READ, user=True, implicit=True).physical == 0x5ABC
    smap = LONG._replace(smap=True)
    assert fault(long_memory(), smap, LINEAR, READ, user=False, ac=True, implicit=True) == 1


def test_fetch_bit_needs_nx_or_smep() -> None:
    memory = long_memory(pte=0)
    assert fault(memory, LONG._replace(nxe=False), LINEAR, EXECUTE) == 0
    assert fault(memory, LONG._replace(nxe=False, smep=True), LINEAR, EXECUTE) == 0x10
    assert fault(memory, LONG, LINEAR, EXECUTE) == 0x10


def test_global_needs_pge() -> None:
    memory = long_memory(pte=0x5000 | ALL | G)
    assert walk(memory, LONG, LINEAR, READ, user=True).global_
    assert not walk(memory, LONG._replace(pge=False), LINEAR, READ, user=True).global_


def test_pat_index() -> None:
    small = long_memory(pte=0x5000 | ALL | paging.PAT | paging.WRITE_THROUGH)
    assert walk(small, LONG, LINEAR, READ, user=True).pat_index == 5
    large = long_memory(pde=0x600000 | ALL | PS | paging.PAT_LARGE | paging.CACHE_DISABLE)
    found = walk(large, LONG, LINEAR, READ, user=True)
    assert (found.pat_index, found.physical) == (6, 0x789ABC)


BITS32 = PagingMode(Mode.BITS32, cr3=0x1018, pse=True, wp=True)


def test_32_bit_small_page() -> None:
    memory = Memory({0x1000 + 4 * 0x301: 0x2000 | ALL, 0x2000 + 4 * 0x45: 0xFEDCB000 | ALL})
    found = walk(memory, BITS32, 0xC0445678, WRITE, user=True)
    assert (found.physical, found.page_size, found.executable) == (0xFEDCB678, 4096, True)
    assert memory.entries == {0x1C04: 0x2000 | ALL | A, 0x2114: 0xFEDCB000 | ALL | A | D}


def test_32_bit_large_page_with_40_bit_address() -> None:
    entry = 0x00C00000 | 0xAB << 13 | ALL | PS
    memory = Memory({0x1C04: entry})
    found = walk(memory, BITS32, 0xC0445678, READ, user=True)
    assert (found.physical, found.page_size) == (0xAB00C45678, 1 << 22)
    assert fault(Memory({0x1C04: entry | 1 << 21}), BITS32, 0xC0445678, READ) == 9
    pentium = BITS32._replace(physical_bits=36)
    assert fault(memory, pentium, 0xC0445678, READ) == 9
    narrow = Memory({0x1C04: 0x00C00000 | 0xB << 13 | ALL | PS})
    assert walk(narrow, pentium, 0xC0445678, READ, user=True).physical == 0xB00C45678


def test_32_bit_ps_is_ignored_without_pse() -> None:
    memory = Memory({0x1C04: 0x2000 | ALL | PS, 0x2114: 0x9000 | ALL})
    assert walk(memory, BITS32._replace(pse=False), 0xC0445678, READ, user=True).page_size == 4096


def test_32_bit_faults_have_no_fetch_bit_without_smep() -> None:
    mode = BITS32._replace(nxe=True)
    assert fault(Memory({0x1C04: 0}), mode, 0xC0445678, EXECUTE, user=True) == 4


PAE = PagingMode(Mode.PAE, cr3=0x1020, wp=True, nxe=True)


def pae_memory(pdpte: int = P, pde: int = ALL, pte: int = 0x87_6543_2000 | ALL) -> Memory64:
    return Memory64({0x1038: 0x2000 | pdpte, 0x2010: pde if pde & PS else 0x3000 | pde, 0x3228: pte})


def test_pae() -> None:
    memory = pae_memory()
    found = walk(memory, PAE, 0xC0445678, WRITE, user=True)
    assert (found.physical, found.page_size, found.user, found.writable) == (0x8765432678, 4096, True, True)
    assert memory.entries[0x1038] == 0x2000 | P, "a PDPTE has no accessed bit"
    assert memory.entries[0x2010] & A and memory.entries[0x3228] & D
    large = walk(pae_memory(pde=0x40000000 | ALL | PS), PAE, 0xC0445678, READ, user=True)
    assert (large.physical, large.page_size) == (0x40045678, 1 << 21)


def test_pae_reserved_bits() -> None:
    assert fault(pae_memory(pte=ALL | 1 << 52), PAE, 0xC0445678, READ) == 9
    assert fault(pae_memory(pde=ALL | PS | 1 << 13), PAE, 0xC0445678, READ) == 9
    assert fault(pae_memory(pte=ALL | NX), PAE._replace(nxe=False), 0xC0445678, READ) == 9
    assert fault(pae_memory(pdpte=0), PAE, 0xC0445678, READ) == 0


def test_pae_registers_win_over_memory() -> None:
    mode = PAE._replace(pdptes=(0, 0, 0, 0))
    assert fault(pae_memory(), mode, 0xC0445678, READ) == 0
    memory = pae_memory()
    mode = PAE._replace(pdptes=(0, 0, 0, memory.entries.pop(0x1038)))
    assert walk(memory, mode, 0xC0445678, READ, user=True).physical == 0x8765432678


def test_pdptes_that_mov_to_cr3_refuses() -> None:
    memory = Memory64({0x1020: 0x2001, 0x1028: 0, 0x1030: 0x3019, 0x1038: 0x1E6})
    loaded = paging.read_pdptes(memory, 0x1020)
    assert loaded == (0x2001, 0, 0x3019, 0x1E6)
    assert paging.pdptes_are_valid(loaded, 40)
    for bit in (1, 2, 5, 8, 40, 63):
        assert not paging.pdptes_are_valid((P | 1 << bit, 0, 0, 0), 40)


def test_canonical() -> None:
    assert paging.is_canonical(0x7FFF_FFFF_FFFF) and paging.is_canonical(0xFFFF_8000_0000_0000)
    assert not paging.is_canonical(0x8000_0000_0000) and not paging.is_canonical(0xFFFF_7FFF_FFFF_FFFF)
    assert not paging.is_canonical(0x7FFF_8000_0000_0000)
