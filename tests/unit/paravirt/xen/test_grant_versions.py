"""The grant table's versions, its frames and those of its status, copies and swaps."""

from __future__ import annotations

import struct

import pytest

from tests.unit.paravirt.xen.conftest import Guest
from tests.unit.paravirt.xen.front_end import write_grant
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.errors import Preempted
from trivisor.paravirt.xen.grants import GrantError

A = 0x10000
BAD = 0xDEAD0000
OWN = 1
PERMIT, READ_ONLY, SUB_PAGE = abi.GTF_PERMIT_ACCESS, abi.GTF_READONLY, abi.GTF_SUB_PAGE
READING, WRITING = abi.GTF_READING, abi.GTF_WRITING
FROM, TO = abi.GNTCOPY_SOURCE_GREF, abi.GNTCOPY_DEST_GREF


def operation(guest: Guest, command: int, count: int = 1) -> int:
    return guest.call("grant_table_op", command, A, count)


def set_version(guest: Guest, version: int) -> tuple[int, int]:
    """(result, the version that is told)"""
    guest.put("<I", version)
    return operation(guest, abi.GNTTABOP_SET_VERSION), guest.get("<I")[0]


def status_frames(guest: Guest, count: int, who: int = abi.DOMID_SELF) -> tuple[int, list[int]]:
    guest.put("<IHhQ", count, who, 77, A + 64)
    assert operation(guest, abi.GNTTABOP_GET_STATUS_FRAMES) == 0
    return guest.get("<h", at=A + 6)[0], list(guest.get(f"<{count}Q", at=A + 64)) if count < 64 else []


def setup(guest: Guest, count: int, who: int = abi.DOMID_SELF, at: int = A + 64) -> int:
    guest.put("<HHIhHIQ", who, 0, count, 77, 0, 0, at)
    assert operation(guest, abi.GNTTABOP_SETUP_TABLE) == 0
    return guest.get("<h", at=A + 8)[0]


def copy(guest: Guest, source: tuple[int, int, int], target: tuple[int, int, int], length: int, flags: int) -> int:
    """Each end is (page or grant, domain, offset)."""
    guest.put("<QHHIQHHIHHh", *source, 0, *target, 0, length, flags, 77)
    assert operation(guest, abi.GNTTABOP_COPY) == 0
    return guest.get("<h", at=A + 36)[0]


def test_the_version_is_what_was_asked_for_last(guest: Guest) -> None:
    grants = guest.domain.grants
    for version in (1, 2, 2, 1):
        assert set_version(guest, version) == (0, version) and grants.version == version
        guest.put("<HHI", abi.DOMID_SELF, 0, 77)
        assert operation(guest, abi.GNTTABOP_GET_VERSION) == 0 and guest.get("<4xI") == (version,)
    for version in (0, 3, 0xFFFFFFFF):
        assert set_version(guest, version) == (-abi.EINVAL, 1)
    guest.put("<H", 5)
    assert operation(guest, abi.GNTTABOP_GET_VERSION) == -abi.ESRCH
    for command in (abi.GNTTABOP_SET_VERSION, abi.GNTTABOP_GET_VERSION):
        assert guest.call("grant_table_op", command, BAD, 1) == -abi.EFAULT


def test_entries_are_of_16_bytes_in_version_2(guest: Guest) -> None:
    grants = guest.domain.grants
    last = {1: 4 * 512 - 1, 2: 4 * 256 - 1}
    for version, size in ((1, 8), (2, 16)):
        set_version(guest, version)
        assert grants.entry_address(last[version]) == (grants.shared[3] + 1) * 4096 - size
        with pytest.raises(GrantError) as error:
            grants.entry_address(last[version] + 1)
        assert error.value.status == abi.GNTST_BAD_GNTREF
    frame = guest.frame()
    write_grant(guest, 600, PERMIT, 0, frame)
    grant = grants.take(600, write=True)
    assert grant.frame == frame
    assert guest.domain.memory.read_u16((grants.status[0] << 12) + 1200) == READING | WRITING
    assert guest.domain.memory.read_u16(grants.entry_address(600)) == PERMIT, "the entry is the guest's alone"
    grant.release()
    assert guest.domain.memory.read_u16((grants.status[0] << 12) + 1200) == 0
    write_grant(guest, 600, PERMIT, 0, frame | 1 << 40)
    with pytest.raises(GrantError):
        grants.take(600, write=False)
    assert not grants.active


def test_what_a_grant_was_when_its_first_user_came_counts(guest: Guest) -> None:
    """The guest may change the entry meanwhile, and what is shown as in use."""
    set_version(guest, 2)
    grants = guest.domain.grants
    one, other = guest.frame(), guest.frame()
    write_grant(guest, 9, PERMIT, 0, one)
    first = grants.take(9, write=False)
    write_grant(guest, 9, PERMIT | READ_ONLY, 0, other)
    assert grants.take(9, write=False).frame == one
    with pytest.raises(GrantError):
        grants.take(9, write=True)
    write_grant(guest, 9, 0, 5, other)
    guest.domain.memory.write(grants.status_address(9), b"\xff\xff")
    second = grants.take(9, write=True)
    assert second.frame == one
    with pytest.raises(GrantError):
        grants.take(9, write=False, domain=OWN)
    second.release()
    first.release()
    assert guest.domain.memory.read_u16(grants.status_address(9)) & (READING | WRITING) == READING
    assert grants.active[9].users == 1 and guest.frames.references[one] == 2


def test_status_frames_are_there_in_version_2_alone(guest: Guest) -> None:
    frames, grants = guest.frames, guest.domain.grants
    assert status_frames(guest, 0)[0] == 0 and status_frames(guest, 1)[0] == abi.GNTST_GENERAL_ERROR
    assert not any(frames.owns(frame) for frame in grants.status)
    set_version(guest, 2)
    assert status_frames(guest, 1) == (0, grants.status[:1]) and frames.owns(grants.status[0])
    assert status_frames(guest, 2)[0] == abi.GNTST_GENERAL_ERROR and not frames.owns(grants.status[1])
    assert setup(guest, 64) == 0
    assert status_frames(guest, 8) == (0, grants.status) and status_frames(guest, 9)[0] == abi.GNTST_GENERAL_ERROR
    assert status_frames(guest, 1 << 31)[0] == abi.GNTST_GENERAL_ERROR
    assert status_frames(guest, 1, 5)[0] == abi.GNTST_BAD_DOMAIN
    guest.put("<IHhQ", 1, abi.DOMID_SELF, 77, BAD)
    assert operation(guest, abi.GNTTABOP_GET_STATUS_FRAMES) == 0
    assert guest.get("<6xh") == (abi.GNTST_BAD_VIRT_ADDR,)
    assert operation(guest, abi.GNTTABOP_GET_STATUS_FRAMES, 2) == -abi.EINVAL
    assert set_version(guest, 1)[0] == 0 and not any(frames.owns(frame) for frame in grants.status)


def test_a_status_frame_that_is_mapped_cannot_go(guest: Guest) -> None:
    """XSA-255."""
    set_version(guest, 2)
    status = guest.domain.grants.status[0]
    table = guest.frame()
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    assert guest.update(table, 0, status << 12 | 3) == 0
    flushes = guest.cpu.flushes
    assert set_version(guest, 1) == (-abi.EBUSY, 2)
    assert guest.update(table, 0, 0) == 0
    assert set_version(guest, 1) == (0, 1) and guest.cpu.flushes > flushes, "no TLB may know it"
    assert guest.update(table, 0, status << 12 | 1) == -abi.EPERM
    set_version(guest, 2)
    assert guest.update(table, 0, status << 12 | 3) == 0


def test_a_status_frame_is_never_anything_else(guest: Guest) -> None:
    set_version(guest, 2)
    status = guest.domain.grants.status[0]
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, status) == -abi.EINVAL
    guest.put("<QQIIH", A + 64, 1, 0, 0, abi.DOMID_SELF)
    guest.put("<Q", status, at=A + 64)
    assert guest.call("memory_op", abi.XENMEM_DECREASE_RESERVATION, A) == 0
    assert guest.frames.owns(status)


def test_reserved_entries_outlast_a_change_and_others_do_not(guest: Guest) -> None:
    grants = guest.domain.grants
    held, frame = guest.frame(), guest.frame()
    write_grant(guest, 1, PERMIT, 0, held)
    write_grant(guest, 8, PERMIT, 0, frame)
    in_use = grants.take(1, write=True)
    assert set_version(guest, 2)[0] == 0
    assert grants.entry(1) == (PERMIT, 0, 0, 4096, held) and grants.entry(8).flags == 0
    assert guest.domain.memory.read_u16(grants.status_address(1)) == READING | WRITING
    assert set_version(guest, 1)[0] == 0
    assert grants.entry(1) == (PERMIT | READING | WRITING, 0, 0, 4096, held)
    in_use.release()
    assert grants.entry(1).flags == PERMIT and guest.frames.references[held] == 1
    write_grant(guest, 8, PERMIT, 0, frame)
    in_use = grants.take(8, write=False)
    assert set_version(guest, 2) == (-abi.EBUSY, 1)
    in_use.release()
    assert set_version(guest, 2) == (0, 2)


def test_what_version_1_cannot_say_keeps_version_2(guest: Guest) -> None:
    set_version(guest, 2)
    for flags, frame in ((PERMIT, 1 << 32), (abi.GTF_TRANSITIVE, 0)):
        write_grant(guest, 7, flags, 0, frame)
        assert set_version(guest, 1) == (-abi.ERANGE, 2)
    write_grant(guest, 7, 2, 0, 1 << 32)  # a transfer, which is not kept
    assert set_version(guest, 1) == (0, 1) and guest.domain.grants.entry(7) == (0, 0, 0, 4096, 0)


def test_the_table_grows_to_its_limit(guest: Guest) -> None:
    grants = guest.domain.grants
    assert setup(guest, 64) == 0 and list(guest.get("<64Q", at=A + 64)) == grants.shared
    guest.put("<HHIIh", abi.DOMID_SELF, 0, 7, 7, 7)
    assert operation(guest, abi.GNTTABOP_QUERY_SIZE) == 0
    assert guest.get("<4xIIh") == (64, 64, 0)
    assert setup(guest, 65) == setup(guest, 0xFFFFFFFF) == abi.GNTST_GENERAL_ERROR
    assert setup(guest, 1, 9) == abi.GNTST_BAD_DOMAIN and setup(guest, 1, at=BAD) == abi.GNTST_BAD_VIRT_ADDR
    guest.put("<H", 9)
    assert operation(guest, abi.GNTTABOP_QUERY_SIZE) == 0 and guest.get("<12xh") == (abi.GNTST_BAD_DOMAIN,)
    for command in (abi.GNTTABOP_SETUP_TABLE, abi.GNTTABOP_QUERY_SIZE):
        assert operation(guest, command, 0) == operation(guest, command, 2) == -abi.EINVAL
        assert guest.call("grant_table_op", command, BAD, 1) == -abi.EFAULT


def test_commands_that_there_are_not(guest: Guest) -> None:
    assert operation(guest, 99) == operation(guest, abi.GNTTABOP_CACHE_FLUSH) == -abi.ENOSYS
    assert operation(guest, abi.GNTTABOP_TRANSFER) == -abi.EOPNOTSUPP
    assert operation(guest, abi.GNTTABOP_COPY | 1 << 12) == operation(guest, abi.GNTTABOP_COPY, 1 << 31) == -abi.EINVAL


def test_many_operations_come_back_with_the_rest(guest: Guest) -> None:
    with pytest.raises(Preempted) as rest:
        operation(guest, abi.GNTTABOP_SWAP_GRANT_REF, 300)
    assert rest.value.arguments == (abi.GNTTABOP_SWAP_GRANT_REF, A + 12 * 256, 44)


# -- copies -------------------------------------------------------------------------------------------------


@pytest.fixture
def pages(guest: Guest) -> tuple[int, int]:
    """Two frames, the first with something in it."""
    first, second = guest.frame(), guest.frame()
    guest.domain.memory.write(first << 12, bytes(range(256)) * 16)
    return first, second


SELF = abi.DOMID_SELF


def test_copies_between_frames(guest: Guest, pages: tuple[int, int]) -> None:
    one, other = pages
    assert copy(guest, (one, SELF, 16), (other, SELF, 4090), 6, 0) == 0
    assert guest.domain.memory.read((other << 12) + 4088, 8) == b"\0\0\x10\x11\x12\x13\x14\x15"
    for source, target, length, flags, status in (
        ((one, OWN, 0), (other, SELF, 0), 1, 0, abi.GNTST_PERMISSION_DENIED),
        ((one, SELF, 0), (other, 0, 0), 1, 0, abi.GNTST_PERMISSION_DENIED),
        ((1, 7, 0), (other, SELF, 0), 1, FROM, abi.GNTST_BAD_DOMAIN),
        ((1, 0, 0), (other, SELF, 0), 1, FROM, abi.GNTST_GENERAL_ERROR),
        ((1 << 50, SELF, 0), (other, SELF, 0), 1, 0, abi.GNTST_BAD_PAGE),
        ((one, SELF, 0), (0, SELF, 0), 1, 0, abi.GNTST_BAD_PAGE),
        ((one, SELF, 0), (guest.domain.state.kernel_root, SELF, 0), 1, 0, abi.GNTST_GENERAL_ERROR),
        ((one, SELF, 4095), (other, SELF, 0), 2, 0, abi.GNTST_BAD_COPY_ARG),
        ((one, SELF, 0), (other, SELF, 0xFFFF), 0xFFFF, 0, abi.GNTST_BAD_COPY_ARG),
        ((99, OWN, 0), (99, OWN, 0), 0, 3, abi.GNTST_OKAY),
    ):  # fmt: skip
        assert copy(guest, source, target, length, flags) == status
    assert guest.frames.references[one] == guest.frames.references[other] == 1
    assert guest.frames.kind_count[other] == 0


@pytest.mark.parametrize("version", [1, 2])
def test_copies_by_grants(guest: Guest, pages: tuple[int, int], version: int) -> None:
    set_version(guest, version)
    one, other = pages
    write_grant(guest, 20, PERMIT | READ_ONLY, OWN, one)
    write_grant(guest, 21, PERMIT, OWN, other)
    write_grant(guest, 22, PERMIT, 0, other)
    assert copy(guest, (20, SELF, 1), (21, OWN, 2), 3, FROM | TO) == 0
    assert guest.domain.memory.read(other << 12, 6) == b"\0\0\1\2\3\0"
    assert copy(guest, (21, SELF, 0), (20, SELF, 0), 1, FROM | TO) == abi.GNTST_GENERAL_ERROR
    assert copy(guest, (22, SELF, 0), (21, SELF, 0), 1, FROM | TO) == abi.GNTST_GENERAL_ERROR
    assert copy(guest, (1 << 30, SELF, 0), (21, SELF, 0), 1, FROM | TO) == abi.GNTST_BAD_GNTREF
    assert not guest.domain.grants.active and guest.frames.references[other] == 1


def test_a_piece_of_a_page_is_for_copies_within_it_alone(guest: Guest, pages: tuple[int, int]) -> None:
    set_version(guest, 2)
    one, other = pages
    write_grant(guest, 20, PERMIT | SUB_PAGE, OWN, one, 100, 10)
    assert copy(guest, (20, SELF, 100), (other, SELF, 0), 10, FROM) == 0
    assert guest.domain.memory.read(other << 12, 11) == bytes(range(100, 110)) + b"\0"
    for offset, length in ((99, 1), (100, 11), (110, 1), (0, 4096)):
        assert copy(guest, (20, SELF, offset), (other, SELF, 0), length, FROM) == abi.GNTST_GENERAL_ERROR
        assert copy(guest, (other, SELF, 0), (20, SELF, offset), length, TO) == abi.GNTST_GENERAL_ERROR
    write_grant(guest, 21, PERMIT | SUB_PAGE, OWN, one, 0xFFFF, 0xFFFF)
    assert copy(guest, (21, SELF, 0xFFFF), (other, SELF, 0), 1, FROM) == abi.GNTST_BAD_COPY_ARG
    with pytest.raises(GrantError):
        guest.domain.grant_maps.map(0, abi.GNTMAP_DEVICE_MAP, 20, OWN)
    write_grant(guest, 22, PERMIT | SUB_PAGE, 0, one, 0, 4096)
    with pytest.raises(GrantError):
        guest.domain.grants.take(22, write=False)
    assert not guest.domain.grants.active


def test_transitive_grants_give_nothing(guest: Guest, pages: tuple[int, int]) -> None:
    set_version(guest, 2)
    _, other = pages
    for through in (0, OWN, 5):
        at = guest.domain.grants.entry_address(20)
        guest.domain.memory.write(at, struct.pack("<HHHHI", abi.GTF_TRANSITIVE, OWN, through, 0, 21))
        assert copy(guest, (20, SELF, 0), (other, SELF, 0), 1, FROM) == abi.GNTST_GENERAL_ERROR
        with pytest.raises(GrantError):
            guest.domain.grant_maps.map(0, abi.GNTMAP_DEVICE_MAP, 20, OWN)


@pytest.mark.parametrize("version", [1, 2])
def test_entries_change_places_unless_they_are_in_use(guest: Guest, pages: tuple[int, int], version: int) -> None:
    set_version(guest, version)
    grants = guest.domain.grants

    def swap(one: int, other: int) -> int:
        guest.put("<IIh", one, other, 77)
        assert operation(guest, abi.GNTTABOP_SWAP_GRANT_REF) == 0
        return guest.get("<8xh")[0]

    for reference, frame in zip((20, 21), pages, strict=True):
        write_grant(guest, reference, PERMIT, 0, frame)
    assert swap(20, 21) == swap(20, 20) == 0
    assert (grants.entry(20).frame, grants.entry(21).frame) == (pages[1], pages[0])
    with grants.access(20, write=False):
        assert swap(21, 20) == swap(20, 21) == abi.GNTST_EAGAIN
    assert swap(20, 1 << 31) == swap(1 << 31, 20) == abi.GNTST_BAD_GNTREF
