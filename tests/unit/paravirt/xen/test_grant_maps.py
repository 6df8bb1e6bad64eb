"""Grants that the domain has given to itself, mapped and unmapped: statuses, entries, and references that add up."""

from __future__ import annotations

import random

import pytest

from tests.unit.paravirt.xen.front_end import write_grant
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.frames import L1, WRITABLE

A = 0x10000
HOST, DEVICE, READ_ONLY, BY_ENTRY = (
    abi.GNTMAP_HOST_MAP, abi.GNTMAP_DEVICE_MAP, abi.GNTMAP_READONLY, abi.GNTMAP_CONTAINS_PTE
)  # fmt: skip
OWN = 1


class Maps:
    """A guest with a level-1 table for linear addresses from 0 on, and a few frames."""

    def __init__(self, guest) -> None:
        self.guest = guest
        self.third, self.second, self.table = (guest.frame() for _ in range(3))
        guest.frames.words[self.third * 512] = self.second << 12 | 7
        guest.frames.words[self.second * 512] = self.table << 12 | 7
        assert guest.update(guest.domain.state.kernel_root, 0, self.third << 12 | 7) == 0
        self.data = [guest.frame() for _ in range(4)]

    def grant(self, reference: int, frame: int, flags: int = abi.GTF_PERMIT_ACCESS, domain: int = OWN) -> None:
        write_grant(self.guest, reference, flags, domain, frame)

    def flags(self, reference: int) -> int:
        """The entry's, and those of its status."""
        grants, memory = self.guest.domain.grants, self.guest.domain.memory
        return memory.read_u16(grants.entry_address(reference)) | memory.read_u16(grants.status_address(reference))

    def map(self, address: int, flags: int, reference: int, domain: int = OWN) -> tuple[int, int]:
        """(status, handle)"""
        self.guest.put("<QIIHhIQ", address, flags, reference, domain, 77, 0, 0, at=A)
        assert self.guest.call("grant_table_op", abi.GNTTABOP_MAP_GRANT_REF, A, 1) == 0
        status, handle = self.guest.get("<hI", at=A + 18)
        return status, handle

    def unmap(self, address: int, bus: int, handle: int) -> int:
        self.guest.put("<QQIh", address, bus, handle, 77, at=A)
        assert self.guest.call("grant_table_op", abi.GNTTABOP_UNMAP_GRANT_REF, A, 1) == 0
        return self.guest.get("<h", at=A + 20)[0]

    def replace(self, address: int, new: int, handle: int) -> int:
        self.guest.put("<QQIh", address, new, handle, 77, at=A)
        assert self.guest.call("grant_table_op", abi.GNTTABOP_UNMAP_AND_REPLACE, A, 1) == 0
        return self.guest.get("<h", at=A + 20)[0]

    def entry(self, index: int) -> int:
        return self.guest.frames.words[self.table * 512 + index]

    def uses(self, frame: int) -> tuple[int, int, int]:
        frames = self.guest.frames
        return frames.references[frame], frames.kind[frame], frames.kind_count[frame]


@pytest.fixture(params=[1, 2], ids="grants{}".format)
def maps(guest, request) -> Maps:
    guest.domain.grants.set_version(request.param)
    return Maps(guest)


def test_a_page_is_mapped_and_unmapped(maps: Maps) -> None:
    frame = maps.data[0]
    maps.grant(8, frame)
    status, handle = maps.map(0x1000, HOST | DEVICE, 8)
    assert status == abi.GNTST_OKAY and maps.entry(1) == frame << 12 | 0x67
    assert maps.flags(8) == abi.GTF_PERMIT_ACCESS | abi.GTF_READING | abi.GTF_WRITING
    assert maps.uses(frame) == (4, WRITABLE, 3)
    assert maps.unmap(0x1000, 0, handle) == abi.GNTST_OKAY and maps.entry(1) == 0
    assert maps.uses(frame) == (2, WRITABLE, 1)
    assert maps.unmap(0, 0x5000, handle) == abi.GNTST_BAD_DEV_ADDR
    assert maps.unmap(0, frame << 12, handle) == abi.GNTST_OKAY
    assert maps.uses(frame) == (1, 0, 0) and maps.flags(8) == abi.GTF_PERMIT_ACCESS
    assert maps.unmap(0, frame << 12, handle) == abi.GNTST_BAD_HANDLE


def test_read_only_and_by_the_entrys_address(maps: Maps) -> None:
    maps.grant(9, maps.data[1], abi.GTF_PERMIT_ACCESS | abi.GTF_READONLY)
    assert maps.map(0x2000, HOST, 9)[0] == abi.GNTST_GENERAL_ERROR
    status, handle = maps.map(maps.table << 12 | 16, HOST | READ_ONLY | BY_ENTRY, 9)
    assert status == 0 and maps.entry(2) == maps.data[1] << 12 | 0x65 and maps.uses(maps.data[1])[0] == 3
    assert maps.flags(9) & abi.GTF_READING and not maps.flags(9) & abi.GTF_WRITING
    assert maps.unmap(maps.table << 12 | 24, 0, handle) == abi.GNTST_GENERAL_ERROR
    assert maps.unmap(maps.table << 12 | 16, 0, handle) == 0 and maps.uses(maps.data[1]) == (1, 0, 0)


def test_the_guests_own_bits_of_the_entry(maps: Maps) -> None:
    maps.grant(8, maps.data[0])
    status, handle = maps.map(0x1000, HOST | 0xFFFF << abi.GNTMAP_GUEST_AVAIL_SHIFT, 8)
    assert status == 0 and maps.entry(1) == maps.data[0] << 12 | 0xE67
    assert maps.unmap(0x1000, 0, handle) == 0


def test_what_is_wrong_has_its_status_and_changes_nothing(maps: Maps) -> None:
    guest, frame = maps.guest, maps.data[2]
    before = bytes(guest.frames.references)
    maps.grant(10, frame)
    maps.grant(11, frame, 0)
    maps.grant(12, frame, domain=5)
    maps.grant(13, 1 << 31)
    maps.grant(14, maps.table)
    for address, flags, reference, domain, status in (
        (0x1000, 0, 10, OWN, abi.GNTST_BAD_GNTREF), (0x1000, HOST, 10, 7, abi.GNTST_BAD_DOMAIN),
        (0x1000, HOST, 1 << 31, OWN, abi.GNTST_BAD_GNTREF), (0x1000, HOST, 10, 0, abi.GNTST_GENERAL_ERROR),
        (0x1000, HOST, 11, OWN, abi.GNTST_GENERAL_ERROR), (0x1000, HOST, 12, OWN, abi.GNTST_GENERAL_ERROR),
        (0x1000, HOST, 13, OWN, abi.GNTST_BAD_PAGE), (0x1000, HOST, 14, OWN, abi.GNTST_GENERAL_ERROR),
        (1 << 46, HOST, 10, OWN, abi.GNTST_GENERAL_ERROR), (0, HOST | BY_ENTRY, 10, OWN, abi.GNTST_GENERAL_ERROR),
        (maps.table << 12 | 4, HOST | BY_ENTRY, 10, OWN, abi.GNTST_GENERAL_ERROR),
        (maps.second << 12, HOST | BY_ENTRY | DEVICE, 10, OWN, abi.GNTST_GENERAL_ERROR),
    ):  # fmt: skip
        assert maps.map(address, flags, reference, domain)[0] == status
    assert bytes(guest.frames.references) == before and not guest.domain.grant_maps.mappings


def test_an_entry_that_was_changed_is_not_unmapped(maps: Maps) -> None:
    frame = maps.data[0]
    maps.grant(8, frame)
    _, handle = maps.map(0x1000, HOST, 8)
    assert maps.guest.update(maps.table, 1, frame << 12 | 5) == 0
    assert maps.unmap(0x1000, 0, handle) == abi.GNTST_GENERAL_ERROR
    assert maps.uses(frame)[1:] == (WRITABLE, 1), "the mapping still holds it"
    assert maps.guest.extended(abi.MMUEXT_PIN_L1_TABLE, frame) == -abi.EINVAL


def test_unmap_and_replace(maps: Maps) -> None:
    one, two = maps.data[:2]
    maps.grant(8, one)
    maps.grant(9, two)
    _, first = maps.map(0x1000, HOST, 8)
    _, second = maps.map(0x2000, HOST | READ_ONLY, 9)
    assert maps.replace(0x2000, 0x1000, second) == 0
    assert maps.entry(1) == 0 and maps.entry(2) == one << 12 | 0x67
    assert maps.uses(two) == (1, 0, 0) and maps.uses(one) == (3, WRITABLE, 2)
    assert maps.replace(0x2000, 0, first) == 0 and maps.uses(one) == (1, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_references_add_up(maps: Maps, seed: int) -> None:
    rng = random.Random(seed)
    guest = maps.guest
    for _ in range(600):
        match rng.randrange(5):
            case 0:
                maps.grant(rng.randrange(8, 12), rng.choice([*maps.data, maps.table, 0]), rng.choice([0, 1, 5]))
            case 1 | 2:
                flags = rng.randrange(32)
                address = rng.choice([0x1000, 0x2000, 0x3000, maps.table << 12 | 8, 1 << 40])
                maps.map(address, flags, rng.randrange(7, 13), rng.choice([OWN, OWN, 0, 3]))
            case 3:
                maps.unmap(rng.choice([0, 0x1000, 0x2000, maps.table << 12 | 8]), rng.choice(
                    [0, maps.data[0] << 12, maps.data[1] << 12]), rng.randrange(6))  # fmt: skip
            case 4:
                maps.replace(rng.choice([0x1000, 0x2000]), rng.choice([0, 0x1000, 0x3000]), rng.randrange(6))
    held = guest.domain.grant_maps.mappings.values()
    for frame in maps.data:
        entries = [entry for entry in guest.frames.words[maps.table * 512 : maps.table * 512 + 512].tolist()
                   if entry & 1 and entry >> 12 & 0xFFFFFFF == frame]  # fmt: skip
        ways = [m for m in held if m.frame == frame for way in (HOST, DEVICE) if m.flags & way]
        assert guest.frames.references[frame] == 1 + len(entries) + len(ways)
        writers = [entry for entry in entries if entry & 2] + [m for m in ways if m.writable]
        assert guest.frames.kind_count[frame] == len(writers)
    assert guest.frames.kind[maps.table] == L1
