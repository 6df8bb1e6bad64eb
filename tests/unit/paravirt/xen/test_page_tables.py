"""Page tables: whatever a guest asks for, nothing writable leads to a page table or to a frame that is not its own."""

from __future__ import annotations

import random

import pytest

from tests.unit.paravirt.xen.invariant import check, entries
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.frames import L1, NONE

P, W, U, LARGE, NX = 1, 2, 4, 0x80, 1 << 63
_ADDRESS = (1 << 52) - 4096


@pytest.mark.parametrize("seed", range(8))
def test_random_updates_keep_the_invariant(guest, seed: int) -> None:
    random_ = random.Random(seed)
    frames = guest.frames
    own = [guest.frame() for _ in range(12)] + [guest.domain.state.kernel_root]
    foreign = [0, 1, guest.domain.own.shared_info, guest.domain.own.spare.stop, frames.count - 1, frames.count + 7]
    done = 0
    for _ in range(4000):
        frame = random_.choice(own + foreign)
        target = random_.choice(own if random_.random() < 0.9 else foreign)
        flags = random_.choice((0, P, P | U, P | W, P | W | U, P | W | U | 0x60, P | LARGE, P | W | NX, P | 0x18, W))
        index = random_.choice((0, 1, 2, 255, 256, 260, 271, 272, 511))
        choice = random_.random()
        if choice < 0.7:
            result = guest.update(frame, index, target << 12 | flags, random_.choice((0, 0, 0, 2, 3)))
        elif choice < 0.85:
            result = guest.extended(random_.randrange(4), frame)
        elif choice < 0.95:
            result = guest.extended(abi.MMUEXT_UNPIN_TABLE, frame)
        else:
            result = guest.extended(random_.choice((abi.MMUEXT_NEW_BASEPTR, abi.MMUEXT_CLEAR_PAGE)), frame)
        done += result == 0
    check(guest)
    assert done > 200


def test_a_table_that_maps_itself_writable_is_refused(guest) -> None:
    table = guest.frame()
    guest.frames.words[table * 512] = table << 12 | P | W
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == -abi.EINVAL
    assert guest.frames.kind_count[table] == 0 and guest.frames.references[table] == 1


def test_a_pinned_table_is_not_writable_memory(guest) -> None:
    table, other = guest.frame(), guest.frame()
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, other) == 0
    assert guest.update(other, 0, table << 12 | P | W) == -abi.EINVAL
    assert guest.update(other, 0, table << 12 | P) == 0
    assert guest.extended(abi.MMUEXT_CLEAR_PAGE, table) == -abi.EINVAL
    assert guest.extended(abi.MMUEXT_UNPIN_TABLE, table) == 0
    assert guest.update(other, 0, table << 12 | P | W) == 0
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == -abi.EINVAL


def test_what_is_not_the_domains_cannot_be_mapped(guest) -> None:
    table = guest.frame()
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    for frame in (0, guest.domain.own.end - 1, guest.frames.count, 1 << 39):
        assert guest.update(table, 0, frame << 12 | P) == -abi.EPERM
    assert entries(guest.frames, table)[0] == 0


def test_the_machine_to_physical_table_is_read_only(guest) -> None:
    table = guest.frame()
    frame = (guest.domain.own.slots[0] & _ADDRESS) >> 12
    for _ in range(2):
        frame = (entries(guest.frames, frame)[0] & _ADDRESS) >> 12
    shown = (entries(guest.frames, frame)[0] & _ADDRESS) >> 12
    assert not entries(guest.frames, frame)[0] & W
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    assert guest.update(table, 0, shown << 12 | P | W) == -abi.EINVAL
    assert guest.update(shown, 0, 5) == -abi.EINVAL


def test_xens_entries_of_the_root_are_xens(guest) -> None:
    root, table = guest.domain.state.kernel_root, guest.frame()
    assert guest.extended(abi.MMUEXT_PIN_L3_TABLE, table) == 0
    for slot in (256, 260, 271):
        assert guest.update(root, slot, table << 12 | P | W | U) == -abi.EINVAL
    assert guest.update(root, 272, table << 12 | P | W | U) == 0
    assert entries(guest.frames, root)[256] == guest.domain.own.slots[0]


def test_a_level_4_table_gets_xens_entries_when_it_is_pinned(guest) -> None:
    root = guest.frame()
    guest.frames.words[root * 512 + 256] = 0xDEAD << 12 | P | W
    assert guest.extended(abi.MMUEXT_PIN_L4_TABLE, root) == 0
    assert entries(guest.frames, root)[256:272] == guest.domain.own.slots


def test_failed_validation_leaves_no_reference(guest) -> None:
    good, bad, table = guest.frame(), guest.frame(), guest.frame()
    words = guest.frames.words
    words[table * 512], words[table * 512 + 1] = good << 12 | P | W, 0 << 12 | P
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == -abi.EINVAL
    upper = guest.frame()
    words[upper * 512], words[upper * 512 + 1] = bad << 12 | P, table << 12 | P
    assert guest.extended(abi.MMUEXT_PIN_L2_TABLE, upper) == -abi.EINVAL
    for frame in (good, bad, table, upper):
        assert (guest.frames.references[frame], guest.frames.kind_count[frame]) == (1, 0)
    assert guest.frames.kind[bad] == NONE


def test_accessed_and_dirty_bits_are_preserved_on_demand(guest) -> None:
    table, page = guest.frame(), guest.frame()
    guest.extended(abi.MMUEXT_PIN_L1_TABLE, table)
    guest.update(table, 3, page << 12 | P | W | 0x60)
    guest.update(table, 3, page << 12 | P | W, abi.MMU_PT_UPDATE_PRESERVE_AD)
    assert entries(guest.frames, table)[3] == page << 12 | P | W | U | 0x60
    guest.update(table, 3, page << 12 | P | W)
    assert entries(guest.frames, table)[3] == page << 12 | P | W | U


def test_the_tlb_is_flushed_before_a_page_that_was_writable_becomes_a_table(guest) -> None:
    table, page = guest.frame(), guest.frame()
    guest.extended(abi.MMUEXT_PIN_L1_TABLE, table)
    guest.update(table, 0, page << 12 | P | W)
    guest.update(table, 0, page << 12 | P)
    before = guest.cpu.flushes
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, page) == 0
    assert guest.cpu.flushes == before + 1
    fresh = guest.frame()
    guest.extended(abi.MMUEXT_PIN_L1_TABLE, fresh)
    assert guest.cpu.flushes == before + 1


def test_freeing_a_frame_that_is_still_mapped(guest) -> None:
    table, page = guest.frame(), guest.frame()
    guest.extended(abi.MMUEXT_PIN_L1_TABLE, table)
    guest.update(table, 0, page << 12 | P | W)
    guest.put("<Q", page, at=0x11000)
    guest.put("<QQIIH6x", 0x11000, 1, 0, 0, abi.DOMID_SELF)
    free = guest.frames.free
    assert guest.call("memory_op", abi.XENMEM_DECREASE_RESERVATION, 0x10000) == 1
    assert guest.frames.free == free, "it is not free while it is mapped"
    guest.update(table, 0, 0)
    assert guest.frames.free == free + 1
    guest.put("<Q", table, at=0x11000)
    guest.put("<QQIIH6x", 0x11000, 1, 0, 0, abi.DOMID_SELF)
    assert guest.call("memory_op", abi.XENMEM_DECREASE_RESERVATION, 0x10000) == 0, "a pinned table stays"


def release(guest, frame: int) -> int:
    guest.put("<Q", frame, at=0x11000)
    guest.put("<QQIIH6x", 0x11000, 1, 0, 0, abi.DOMID_SELF)
    return guest.call("memory_op", abi.XENMEM_DECREASE_RESERVATION, 0x10000)


def test_frames_that_xen_writes_to_stay_what_they_are(guest) -> None:
    """Else a guest could have Xen itself write into a page table of its."""
    own = guest.domain.own
    ring = guest.frame()
    guest.frames.hold(ring, writable=True)
    for frame in (own.shared_info, own.grant_frames[0], ring):
        assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, frame) == -abi.EINVAL
    free = guest.frames.free
    assert release(guest, own.shared_info) == release(guest, own.grant_frames[0]) == 0
    assert (release(guest, ring), release(guest, ring)) == (1, 0), "once"
    assert guest.frames.free == free and guest.extended(abi.MMUEXT_PIN_L1_TABLE, ring) == -abi.EINVAL


def test_a_frame_is_given_back_once(guest) -> None:
    table, page = guest.frame(), guest.frame()
    guest.extended(abi.MMUEXT_PIN_L1_TABLE, table)
    guest.update(table, 0, page << 12 | P | W)
    assert (release(guest, page), release(guest, page)) == (1, 0)
    free = guest.frames.free
    guest.update(table, 0, 0)
    assert guest.frames.free == free + 1 and not guest.frames.owns(page)


def test_the_processor_is_told_of_entries_that_were_present_and_are_others(guest) -> None:
    table, page, other = guest.frame(), guest.frame(), guest.frame()
    guest.domain.tables.pin(table, L1)
    for entry in (page << 12 | P | U, page << 12 | P | U | 0x20, other << 12 | P | U, other << 12 | P | W | U, 0, 0):
        assert guest.update(table, 5, entry) == 0
    assert guest.cpu.changed == [(table * 4096 + 40, 1)] * 3, "not of a new one, nor of an accessed bit"


def test_addresses_that_have_no_entry_of_the_guests(guest) -> None:
    third, second, table, data = (guest.frame() for _ in range(4))
    guest.frames.words[third * 512], guest.frames.words[second * 512] = second << 12 | 7, table << 12 | 7
    assert guest.update(guest.domain.state.kernel_root, 0, third << 12 | 7) == 0
    assert guest.call("update_va_mapping", 0x5000, data << 12 | 7, abi.UVMF_INVLPG) == 0
    assert guest.cpu.invalidated == [0x5000] and entries(guest.frames, table)[5] == data << 12 | 7
    for linear in (1 << 48, 0x5000 | 1 << 63, 1 << 40, abi.HYPERVISOR_VIRT_START, abi.HYPERVISOR_VIRT_END - 1):
        assert guest.call("update_va_mapping", linear, 0, 0) == -abi.EINVAL
    for entry in (table << 12 | 3, (1 << 52) - 1, data << 12 | 0x9F):
        assert guest.call("update_va_mapping", 0x5000, entry, 0) in (-abi.EINVAL, -abi.EPERM)
    flushes = guest.cpu.flushes
    assert guest.call("update_va_mapping", 0x5000, 0, (1 << 64) - 4 | abi.UVMF_TLB_FLUSH) == 0
    assert guest.cpu.flushes == flushes + 1
    for domain, result in ((abi.DOMID_SELF, 0), (guest.domain.number, 0), (0, -abi.ESRCH), (0xFFFF, -abi.ESRCH)):
        assert guest.call("update_va_mapping_otherdomain", 0x5000, 0, 0, domain) == result


HUGE = (1 << 64) - 1


def test_mmuext_op_on_what_there_is_not(guest) -> None:
    data, state = guest.frame(), guest.domain.state
    root = state.kernel_root
    before = bytes(guest.frames.references)
    for command in range(19):
        for first, second in ((HUGE, HUGE), (0, HUGE), (1 << 52, 0), (guest.domain.own.shared_info, HUGE)):
            result = guest.extended(command, first, second)
            harmless = command in range(6, 12) or (command, first) == (abi.MMUEXT_NEW_USER_BASEPTR, 0)
            harmless |= (command, second) == (abi.MMUEXT_SET_LDT, 0) and not first & 0xFFF
            harmless |= command == abi.MMUEXT_CLEAR_PAGE and first == guest.domain.own.shared_info
            assert result == 0 if harmless else result < 0, (command, first, second)
    assert bytes(guest.frames.references) == before and state.kernel_root == root
    for command in (19, 0x7FFFFFFF, 0xFFFFFFFF):
        assert guest.extended(command, data) == -abi.ENOSYS
    assert guest.extended(abi.MMUEXT_FLUSH_CACHE) == -abi.EACCES
    assert guest.extended(abi.MMUEXT_SET_LDT, 0x1000, 8193) == guest.extended(abi.MMUEXT_SET_LDT, 8, 1) == -abi.EINVAL
    assert guest.call("mmuext_op", 0xDEAD0000, 1, 0, abi.DOMID_SELF) == -abi.EFAULT
    assert guest.call("mmuext_op", 0x10000, 1, 0, 5) == guest.call("mmu_update", 0x10000, 1, 0, 5) == -abi.ESRCH
    assert guest.call("mmu_update", 0x10000, 0, 0, 3 << 16 | abi.DOMID_SELF) == -abi.ESRCH
    assert guest.call("mmuext_op", 0xDEAD0000, 0, 0, abi.DOMID_SELF) == 0


def test_copies_and_clears_of_pages(guest) -> None:
    source, target, table = (guest.frame() for _ in range(3))
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    guest.frames.words[source * 512 + 511] = 7
    assert guest.extended(abi.MMUEXT_COPY_PAGE, target, source) == 0 and entries(guest.frames, target)[511] == 7
    assert guest.extended(abi.MMUEXT_CLEAR_PAGE, target) == 0 and not any(entries(guest.frames, target))
    assert guest.extended(abi.MMUEXT_COPY_PAGE, target, table) == 0, "tables may be read"
    assert guest.extended(abi.MMUEXT_COPY_PAGE, table, source) == -abi.EINVAL
    assert [guest.frames.references[frame] for frame in (source, target, table)] == [1, 1, 2]
