"""Hypercalls with good, bad and hostile arguments; those about page tables and events have modules of their own."""

from __future__ import annotations

import pytest

from trivisor.machine.memory import MIB, PAGE_SIZE, GuestMemory
from trivisor.machine.stop import Crash
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EFAULT, EINVAL, ENOENT, ENOSYS, EPERM, ESRCH
from trivisor.paravirt.xen.errors import DomainCrash, Preempted
from trivisor.paravirt.xen.frames import Frames
from trivisor.paravirt.xen.own_memory import OwnMemory, own_size
from trivisor.paravirt.xen.shared_table import SharedTable
from trivisor.x86.control import CR4_DE
from trivisor.x86.exceptions import INVALID_OPCODE

A = 0x10000
BAD = 0xDEAD0000


def test_unknown_numbers_are_not_implemented(guest) -> None:
    for number in (11, 41, 63, 1 << 31):
        assert guest.domain.call(number, (0,) * 6) == -ENOSYS


def test_trap_table(guest) -> None:
    guest.put("<BBHIQ", 14, 4, 0xE033, 0, 0xFFFFFFFF81000000)
    guest.put("<BBHIQ", 3, 3, 0xE033, 0, 0xFFFFFFFF81000100, at=A + 16)
    assert guest.call("set_trap_table", A) == 0
    traps = guest.domain.state.traps
    assert traps[14].clears_events and traps[14].dpl == 0
    assert traps[3].dpl == 3 and not traps[3].clears_events
    guest.put("<BBHIQ", 14, 0, 0xE033, 0, 1 << 47)
    assert guest.call("set_trap_table", A) == -EINVAL
    assert guest.call("set_trap_table", BAD) == -EFAULT
    assert guest.call("set_trap_table", 0) == 0 and not traps


def test_callbacks(guest) -> None:
    for kind, name in ((0, "event"), (1, "failsafe"), (2, "syscall"), (4, "nmi"), (7, "syscall32")):
        guest.put("<HH4xQ", kind, 1, 0x1234)
        assert guest.call("callback_op", 0, A) == 0
        callback = getattr(guest.domain.state, name)
        assert (callback.address, callback.masks_events) == (0x1234, True)
    guest.put("<HH4xQ", 9, 0, 0x1234)
    assert guest.call("callback_op", 0, A) == -ENOSYS
    guest.put("<HH4xQ", 0, 0, 1 << 60)
    assert guest.call("callback_op", 0, A) == -EINVAL
    guest.put("<H", 0)
    for kind, result in ((0, -EINVAL), (7, -EINVAL), (4, 0), (9, -ENOSYS)):
        guest.put("<H", kind)
        assert guest.call("callback_op", 1, A) == result
    assert guest.domain.state.event.address == 0x1234 and guest.domain.state.nmi.address == 0
    assert guest.call("callback_op", 2, A) == -ENOSYS
    assert guest.call("callback_op", 0, BAD) == guest.call("callback_op", 1, BAD) == -EFAULT


def test_descriptor_tables(guest) -> None:
    frame = guest.frame()
    words = guest.frames.words
    words[frame * 512 + 3] = 0x00AF9A000000FFFF  # 64-bit code for ring 0
    guest.put("<Q", frame)
    assert guest.call("set_gdt", A, 512) == 0
    assert words[frame * 512 + 3] == 0x00AFFB000000FFFF, "for ring 3 now, and accessed"
    assert guest.extended(abi.MMUEXT_CLEAR_PAGE, frame) == -EINVAL
    assert guest.call("update_descriptor", frame << 12 | 24, 0x00CF92000000FFFF) == 0
    assert words[frame * 512 + 3] == 0x00CFF3000000FFFF
    gate, task = 0x0000EC0000100000, 0x0000890000000067
    for raw in (gate, task):
        assert guest.call("update_descriptor", frame << 12 | 24, raw) == -EINVAL
    assert guest.call("update_descriptor", 0x8, 0) == -EPERM
    assert guest.call("set_gdt", A, 14 * 512 + 1) == -EINVAL
    table = guest.frame()
    words[table * 512] = gate
    guest.put("<Q", table)
    assert guest.call("set_gdt", A, 512) == -EINVAL
    assert guest.domain.state.gdt_frames == [frame]


def test_an_empty_gdt_needs_no_list(guest) -> None:
    guest.put("<Q", guest.frame())
    assert guest.call("set_gdt", A, 1) == 0
    assert guest.call("set_gdt", BAD, 0) == 0 and not guest.domain.state.gdt_frames
    assert guest.call("set_gdt", BAD, 1) == -EFAULT and guest.call("set_gdt", A, (1 << 32) - 1) == -EINVAL


def test_descriptors_are_written_where_a_guest_may_write(guest) -> None:
    frame, table = guest.frame(), guest.frame()
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    data = 0x00CFF2000000FFFF
    assert guest.call("update_descriptor", frame << 12 | 8, data) == 0
    assert guest.frames.words[frame * 512 + 1] == data | 1 << 40
    assert guest.frames.kind_count[frame] == 0 and guest.frames.references[frame] == 1
    for address in (table << 12, guest.domain.own.slots[0] & ~0xFFF, frame << 12 | 4, 1 << 63, (1 << 64) - 8):
        assert guest.call("update_descriptor", address, data) in (-EINVAL, -EPERM)
    assert guest.frames.words[table * 512] == 0


def test_a_trap_table_without_end_can_be_interrupted(guest) -> None:
    for number in range(300):
        guest.put("<BBHIQ", number & 0xFF, 0, 0, 0, 0x1000 + number, at=A + 16 * number)
    with pytest.raises(Preempted) as rest:
        guest.call("set_trap_table", A)
    assert rest.value.arguments == (A + 4096,)
    assert guest.call("set_trap_table", A + 4096) == 0
    traps = guest.domain.state.traps
    assert traps[5].address == 0x1000 + 261 and traps[255].address == 0x10FF and traps[5].selector == 3
    assert guest.call("set_trap_table", (1 << 64) - 8) == -EFAULT


def test_set_callbacks_takes_those_that_are_addresses(guest) -> None:
    assert guest.call("set_callbacks", 0x1000, 0x2000, 0x3000) == 0
    assert guest.call("set_callbacks", 1 << 47, 0x2008, (1 << 63) - 1) == 0
    state = guest.domain.state
    assert [one.address for one in (state.event, state.failsafe, state.syscall)] == [0x1000, 0x2008, 0x3000]
    assert not state.syscall.masks_events


def test_the_callback_for_nmis_has_an_older_form(guest) -> None:
    guest.put("<QQ", 0x5000, 0)
    assert guest.call("nmi_op", 0, A) == 0 and guest.domain.state.nmi.address == 0x5000
    guest.put("<QQ", 1 << 47, 0)
    assert guest.call("nmi_op", 0, A) == -EINVAL and guest.call("nmi_op", 0, BAD) == -EFAULT
    assert guest.call("nmi_op", 1) == 0 and guest.domain.state.nmi.address == 0
    assert guest.call("nmi_op", 2) == -ENOSYS


def test_stack_switch_and_fpu_taskswitch(guest) -> None:
    state = guest.domain.state
    assert guest.call("stack_switch", (1 << 64) - 4, (1 << 64) - 1) == 0
    assert (state.kernel_stack_selector, state.kernel_stack) == (0xFFFF, (1 << 64) - 1)
    for wanted, disabled in ((1, True), (0, False), (1 << 32, False), ((1 << 64) - 1, True)):
        assert guest.call("fpu_taskswitch", wanted) == 0 and guest.cpu.fpu_disabled is disabled


def test_segment_bases(guest) -> None:
    cpu = guest.cpu
    assert guest.call("set_segment_base", 0, 0x1000) == 0 and cpu.bases[4] == 0x1000
    assert guest.call("set_segment_base", 2, 0x2000) == 0 and cpu.bases[5] == 0x2000
    assert guest.call("set_segment_base", 1, 0x3000) == 0 and guest.cpu.other_gs == 0x3000
    assert guest.call("set_segment_base", 0, 1 << 50) == -EINVAL
    assert guest.call("set_segment_base", 4, 0) == -EINVAL
    assert guest.call("set_segment_base", 3, 0x2B) == 0
    assert cpu.bases[5] == 0x2000 and guest.cpu.other_gs == 0 and cpu.selectors[5] == 0x2B
    assert guest.call("set_segment_base", 3, 0xBAD3) == 0 and cpu.selectors[5] == 0


def test_debug_registers(guest) -> None:
    assert guest.call("set_debugreg", 0, 0x1000) == 0 and guest.call("get_debugreg", 0) == 0x1000
    assert guest.call("set_debugreg", 0, abi.HYPERVISOR_VIRT_START) == -EPERM
    assert guest.call("set_debugreg", 7, 1 << 32) == guest.call("set_debugreg", 6, 1 << 63) == -EINVAL
    assert guest.call("set_debugreg", 3, 1 << 47) == guest.call("set_debugreg", 7, 1 << 13) == -EPERM
    assert guest.call("set_debugreg", 7, 0x20003) == -EPERM, "breakpoints on ports are for CR4.DE"
    assert guest.call("set_debugreg", 8, 0) == guest.call("get_debugreg", 8) == -abi.ENODEV
    assert guest.call("set_debugreg", 5, 0x3) == 0 and guest.call("get_debugreg", 5) == 0x403
    guest.domain.state.cr4 |= CR4_DE
    assert guest.call("set_debugreg", 7, 0x20003) == 0 and guest.call("get_debugreg", 7) == 0x20403
    assert guest.call("set_debugreg", 5, 0) == guest.call("get_debugreg", 4) == -abi.ENODEV
    assert guest.call("get_debugreg", 6) == 0xFFFF0FF0


def test_version(guest) -> None:
    assert guest.call("xen_version", abi.XENVER_VERSION) == 4 << 16 | 17
    guest.put("<II", 0, 0)
    assert guest.call("xen_version", abi.XENVER_GET_FEATURES, A) == 0
    features = guest.get("<II")[1]
    assert features == 1 << 4 | 1 << 5 | 1 << 7
    assert guest.call("xen_version", abi.XENVER_PLATFORM_PARAMETERS, A) == 0
    assert guest.get("<Q") == (0xFFFF800000000000,)
    assert guest.call("xen_version", abi.XENVER_PAGESIZE) == 4096
    assert guest.call("xen_version", abi.XENVER_EXTRAVERSION, BAD) == -EFAULT
    assert guest.call("xen_version", 99) == -ENOSYS
    guest.put("<II", 1, 77)
    assert guest.call("xen_version", abi.XENVER_GET_FEATURES, A) == -EINVAL and guest.get("<II") == (1, 77)
    assert guest.call("xen_version", abi.XENVER_CAPABILITIES, A) == 0
    assert guest.cpu.load(A, 1024) == b"xen-3.0-x86_64".ljust(1024, b"\0")
    assert guest.call("xen_version", abi.XENVER_COMMANDLINE, A) == 0 and guest.cpu.load(A, 9) == b"<denied>\0"
    assert guest.call("xen_version", abi.XENVER_BUILD_ID, A) == -EPERM
    for command in range(11):
        if command not in (abi.XENVER_VERSION, abi.XENVER_PAGESIZE, abi.XENVER_BUILD_ID):
            assert guest.call("xen_version", command, BAD) == -EFAULT


def test_multicall(guest) -> None:
    number = abi.HYPERCALL_NUMBERS
    guest.put("<8Q", number["xen_version"], 0, abi.XENVER_PAGESIZE, 0, 0, 0, 0, 0)
    guest.put("<8Q", number["multicall"], 0, A, 1, 0, 0, 0, 0, at=A + 64)
    guest.put("<8Q", 63, 0, 0, 0, 0, 0, 0, 0, at=A + 128)
    assert guest.call("multicall", A, 3) == 0
    assert [guest.get("<Qq", at=A + 64 * i)[1] for i in range(3)] == [4096, -EINVAL, -ENOSYS]
    assert guest.call("multicall", BAD, 1) == -EFAULT


def test_a_long_call_comes_back_with_the_rest(guest) -> None:
    table = guest.frame()
    guest.extended(abi.MMUEXT_PIN_L1_TABLE, table)
    for index in range(600):
        guest.put("<QQ", table << 12 | (index % 512) * 8, index << 1, at=A + 16 * index)
    with pytest.raises(Preempted) as first:
        guest.call("mmu_update", A, 600, A + 0xF000, abi.DOMID_SELF)
    address, count = first.value.arguments
    assert (address, count & 0x7FFFFFFF) == (A + 16 * 512, 88)
    assert guest.call("mmu_update", address, count, A + 0xF000, abi.DOMID_SELF) == 0
    assert guest.get("<I", at=A + 0xF000) == (600,)


def test_an_update_that_fails_tells_how_many_were_done(guest) -> None:
    table = guest.frame()
    guest.extended(abi.MMUEXT_PIN_L1_TABLE, table)
    guest.put("<QQQQ", table << 12, 0, table << 12 | 8, 1)
    assert guest.call("mmu_update", A, 2, A + 512, abi.DOMID_SELF) == -EPERM
    assert guest.get("<I", at=A + 512) == (1,)
    assert guest.call("mmu_update", A, 1, 0, 7) == -ESRCH, "no other domain's memory"


def test_the_machine_to_physical_table_is_the_guests_to_fill_for_its_frames(guest) -> None:
    frame = guest.frame()
    assert guest.update(frame, 0, 0x777, abi.MMU_MACHPHYS_UPDATE) == 0
    assert guest.domain.own.physical(frame) == 0x777
    assert guest.update(1 << 30, 0, 0, abi.MMU_MACHPHYS_UPDATE) == -EPERM


@pytest.mark.parametrize("size", [64 * MIB, 1100 * MIB])
def test_the_machine_to_physical_table_is_where_the_interface_has_it_and_where_the_guest_is_told(size: int) -> None:
    memory = GuestMemory(size)
    try:
        frames = Frames(memory, SharedTable())
        own = OwnMemory(memory, frames)
        assert own.end <= own_size(size) // PAGE_SIZE

        def shown(linear: int) -> int:
            entry = own.slots[(linear >> 39 & 511) - abi.FIRST_XEN_SLOT]
            for shift in (30, 21, 12):
                entry = frames.words[(entry & (1 << 52) - 1) // PAGE_SIZE * 512 + (linear >> shift & 511)]
            return entry

        first = abi.MACH2PHYS_VIRT_START
        assert own.map_address % (2 * MIB) == MIB, "not where a direct-mapped TLB has the guest's own table"
        pages = -(-8 * frames.count // PAGE_SIZE)
        for page in range(pages):
            entry = shown(first + page * PAGE_SIZE)
            assert entry == shown(own.map_address + page * PAGE_SIZE) and entry & 7 == 5, "read-only"
        assert shown(own.map_address + pages * PAGE_SIZE) == 0
    finally:
        memory.close()


def test_memory(guest) -> None:
    domain = guest.domain
    guest.put("<I4xQ", 8, A + 64)
    assert guest.call("memory_op", abi.XENMEM_MEMORY_MAP, A) == 0
    assert guest.get("<I") == (1,) and guest.get("<QQI", at=A + 64) == (0, domain.pages * 4096, 1)
    assert guest.call("memory_op", abi.XENMEM_MACHPHYS_MAPPING, A) == 0
    start, end, last = guest.get("<QQQ")
    assert (start, end) == (domain.own.map_address, start + (1 << 38)) and last == guest.frames.count - 1
    guest.put("<Q", 0x55, at=A + 64)
    guest.put("<QQIIH6x", A + 64, 1, 0, 0, abi.DOMID_SELF)
    assert guest.call("memory_op", abi.XENMEM_POPULATE_PHYSMAP, A) == 1
    (frame,) = guest.get("<Q", at=A + 64)
    assert guest.frames.owns(frame) and domain.own.physical(frame) == 0x55
    assert guest.call("memory_op", abi.XENMEM_MACHINE_MEMORY_MAP, A) == -EPERM
    guest.put("<QQIIH6x", A + 64, 1, 0, 0, 3)
    assert guest.call("memory_op", abi.XENMEM_POPULATE_PHYSMAP, A) == 0
    assert guest.call("memory_op", 30, A) == -ENOSYS


def reservation(guest, operation: int, *values: int, at: int = A + 64, order: int = 0, count: int = -1) -> int:
    guest.put(f"<{len(values)}Q", *values, at=A + 64)
    guest.put("<QQIIH6x", at, len(values) if count < 0 else count, order, 0, abi.DOMID_SELF)
    return guest.call("memory_op", operation, A)


def test_a_reservation_ends_with_what_was_done(guest) -> None:
    """As Xen has it, no error is ever told."""
    table, frame, other = guest.frame(), guest.frame(), guest.frame()
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    less, more = abi.XENMEM_DECREASE_RESERVATION, abi.XENMEM_POPULATE_PHYSMAP
    for bad in (table, (1 << 64) - 1, guest.domain.own.shared_info, guest.domain.own.grant_frames[0], frame):
        taken = guest.frame()
        assert reservation(guest, less, taken, bad, other) == (2 if bad == frame else 1) + (bad == frame)
        assert not guest.frames.owns(taken)
    assert not guest.frames.owns(frame) and reservation(guest, less, frame) == 0
    assert reservation(guest, more, at=A + 0xFFF8, count=3) == 1, "the second is beyond what can be written"
    assert reservation(guest, more, 1, at=BAD) == reservation(guest, more, 1, order=1) == 0
    assert reservation(guest, more, at=A + 64, count=1 << 26) == reservation(guest, more, count=1 << 63) == 0
    assert guest.call("memory_op", more, BAD) == 0 and guest.call("memory_op", more | 5 << 6, BAD) == 5


def test_a_long_reservation_comes_back_with_the_rest(guest) -> None:
    operation = abi.XENMEM_INCREASE_RESERVATION
    with pytest.raises(Preempted) as rest:
        reservation(guest, operation, count=600)
    assert rest.value.arguments == (operation | 512 << 6, A)
    assert guest.call("memory_op", *rest.value.arguments) == 600
    assert len(set(guest.get("<600Q", at=A + 64))) == 600
    assert guest.call("memory_op", operation | 600 << 6, A) == 600
    assert guest.call("memory_op", operation | 0x3FFFFFF << 6, A) == 0x3FFFFFF


def test_what_is_told_of_the_domains_memory(guest) -> None:
    domain = guest.domain
    for operation, answer in (
        (abi.XENMEM_CURRENT_RESERVATION, domain.frames.owned), (abi.XENMEM_MAXIMUM_RESERVATION, domain.pages),
        (abi.XENMEM_MAXIMUM_GPFN, domain.pages - 1),
    ):  # fmt: skip
        guest.put("<H", abi.DOMID_SELF)
        assert guest.call("memory_op", operation, A) == answer
        guest.put("<H", 0)
        assert guest.call("memory_op", operation, A) == -ESRCH and guest.call("memory_op", operation, BAD) == -EFAULT
    assert guest.call("memory_op", abi.XENMEM_MAXIMUM_RAM_PAGE, BAD) == guest.frames.count - 1
    for operation in (abi.XENMEM_MEMORY_MAP, abi.XENMEM_MACHPHYS_MAPPING):
        assert guest.call("memory_op", operation, BAD) == -EFAULT
    guest.put("<I4xQ", 0, A + 64)
    assert guest.call("memory_op", abi.XENMEM_MEMORY_MAP, A) == -EINVAL
    guest.put("<I4xQ", 8, BAD)
    assert guest.call("memory_op", abi.XENMEM_MEMORY_MAP, A) == -EFAULT
    for operation in (abi.XENMEM_MACHPHYS_MFN_LIST, abi.XENMEM_SET_MEMORY_MAP):
        assert guest.call("memory_op", operation, A) == -EPERM


def test_a_domain_gets_no_more_memory_than_it_is_to_have(guest) -> None:
    guest.put("<QQIIH6x", A + 64, 1, 0, 0, abi.DOMID_SELF)
    guest.put("<Q", 1, at=A + 64)
    while guest.frames.owned < guest.domain.pages:
        guest.frames.allocate()
    assert guest.call("memory_op", abi.XENMEM_POPULATE_PHYSMAP, A) == 0


def test_timers(guest) -> None:
    guest.put("<II", abi.VIRQ_TIMER, 0)
    guest.call("event_channel_op", abi.EVTCHNOP_BIND_VIRQ, A)
    guest.put("<QI", 5000, 0)
    assert guest.call("vcpu_op", abi.VCPUOP_SET_SINGLESHOT_TIMER, 0, A) == 0
    clock = guest.domain.platform.clock
    assert clock.next_deadline() == 5000
    assert guest.call("vcpu_op", abi.VCPUOP_STOP_SINGLESHOT_TIMER, 0, 0) == 0
    assert clock.next_deadline() is None
    guest.cpu.ticks = 10_000
    guest.put("<QI", 5000, abi.VCPU_SSHOTTMR_FUTURE)
    assert guest.call("vcpu_op", abi.VCPUOP_SET_SINGLESHOT_TIMER, 0, A) == -abi.ETIME
    assert guest.call("set_timer_op", 5000) == 0
    clock.run_due()
    assert guest.events.pending()
    assert guest.call("vcpu_op", abi.VCPUOP_IS_UP, 0, 0) == 1
    assert guest.call("vcpu_op", abi.VCPUOP_IS_UP, 1, 0) == -ENOENT


def test_the_clock_that_the_guest_computes_is_ours(guest) -> None:
    frame = guest.frame()
    guest.put("<QII", frame, 256, 0)
    assert guest.call("vcpu_op", abi.VCPUOP_REGISTER_VCPU_INFO, 0, A) == 0
    memory, at = guest.domain.memory, frame << 12 | 256
    version, start = memory.read_u32(at + 32), memory.read_u64(at + 40)
    multiplier, shift = memory.read_u32(at + 56), memory.read_u8(at + 60)
    guest.cpu.ticks = 123_456_789
    assert version % 2 == 0
    shift -= 256 if shift > 127 else 0
    delta = guest.cpu.ticks - start
    delta = delta << shift if shift >= 0 else delta >> -shift
    assert delta * multiplier >> 32 == guest.domain.time.now()
    assert abs(guest.domain.time.now() - 123_456_789) < 2
    assert memory.read_u64(at + 8) == (1 << 64) - 1, "nothing is lost in the move"
    assert guest.call("vcpu_op", abi.VCPUOP_REGISTER_VCPU_INFO, 0, A) == -EINVAL


def test_what_an_unprivileged_domain_is_refused(guest) -> None:
    for name in ("platform_op", "domctl", "sysctl", "hvm_op", "kexec_op", "xsm_op"):
        assert guest.call(name, 0, A) == -EPERM


def test_io_privilege(guest) -> None:
    guest.put("<I", 1)
    assert guest.call("physdev_op", abi.PHYSDEVOP_SET_IOPL, A) == 0 and guest.domain.state.iopl == 1
    guest.put("<I", 4)
    assert guest.call("physdev_op", abi.PHYSDEVOP_SET_IOPL, A) == -EINVAL and guest.domain.state.iopl == 1
    for ports, result in ((65536, 0), (65537, -EINVAL), ((1 << 32) - 1, -EINVAL)):
        guest.put("<QI", BAD, ports)
        assert guest.call("physdev_op", abi.PHYSDEVOP_SET_IOBITMAP, A) == result
    for command in (abi.PHYSDEVOP_SET_IOPL, abi.PHYSDEVOP_SET_IOBITMAP):
        assert guest.call("physdev_op", command, BAD) == -EFAULT
    assert guest.call("physdev_op", abi.PHYSDEVOP_EOI, A) == -EINVAL
    assert guest.call("physdev_op", abi.PHYSDEVOP_PIRQ_EOI_GMFN_V2, A) == -ENOSYS


def test_assists(guest) -> None:
    assists = guest.domain.state.assists
    for kind in (0, 1, 2, 3, 4, 5, 32):
        assert guest.call("vm_assist", abi.VMASST_ENABLE, kind) == 0 and kind in assists
        assert guest.call("vm_assist", abi.VMASST_DISABLE, kind) == 0 and kind not in assists
    for kind in (6, 31, 33, 64, (1 << 64) - 1):
        assert guest.call("vm_assist", abi.VMASST_ENABLE, kind) == -EINVAL
    assert guest.call("vm_assist", 2, 4) == -ENOSYS and not assists


def test_what_a_guest_says_on_xens_console(guest) -> None:
    guest.cpu.store(A, b"hello\n")
    assert guest.call("console_io", abi.CONSOLEIO_WRITE, 6, A) == 0 and guest.printed == [b"hello\n"]
    assert guest.call("console_io", abi.CONSOLEIO_WRITE, 1 << 40, A) == -EINVAL
    assert guest.call("console_io", abi.CONSOLEIO_READ, 6, A) == -EPERM


def enter(guest, in_kernel: bool) -> None:
    guest.domain.state.in_kernel = in_kernel
    guest.cpu.registers[4] = A + 0x800
    guest.domain.state.kernel_stack = A + 0x1000
    guest.domain.state.user_root = guest.domain.state.kernel_root


def test_the_frame_of_an_exception_in_the_kernel(guest) -> None:
    enter(guest, True)
    guest.put("<BBHIQ", 13, 4, 0xE033, 0, 0x5000, at=A + 0x100)
    guest.call("set_trap_table", A + 0x100)
    guest.cpu.registers[1], guest.cpu.registers[11] = 0xC, 0x11
    guest.domain.deliver(13, 0x18)
    rsp = guest.cpu.registers[4]
    assert rsp == A + 0x800 - 64 and guest.cpu.rip == 0x5000
    assert guest.get("<8Q", at=rsp) == (0xC, 0x11, 0x18, 0x1000, 0xE030, 0x202, A + 0x800, 0xE02B)
    assert guest.domain.view[guest.events.vcpu_info + 1] == 1, "events are masked"


def test_the_frame_of_an_exception_in_user_mode_and_the_way_back(guest) -> None:
    enter(guest, False)
    guest.put("<BBHIQ", 6, 0, 0xE033, 0, 0x5000, at=A + 0x100)
    guest.call("set_trap_table", A + 0x100)
    guest.cpu.other_gs, guest.cpu.bases[5] = 0x111, 0x222
    guest.domain.exception(INVALID_OPCODE, None, None)
    rsp = guest.cpu.registers[4]
    assert rsp == A + 0x1000 - 56 and guest.cpu.space[1] is True
    assert guest.get("<7Q", at=rsp)[3:] == (0xE033, 0x202, A + 0x800, 0xE02B)
    assert guest.cpu.bases[5] == 0x111 and guest.cpu.other_gs == 0x222
    guest.put("<9Q", 0xAA, 0xBB, 0xCC, 0, 0x7000, 0xE033, 0x2 | 0x200 | 0x40, A + 0x20, 0xE02B, at=A + 0x200)
    guest.cpu.registers[4] = A + 0x200
    assert guest.call("iret") == 0xAA
    assert guest.cpu.rip == 0x7000 and guest.cpu.space[1] is False and guest.cpu.bases[5] == 0x222
    assert guest.cpu.registers[1] == 0xCC and guest.cpu.rflags == 0x242
    assert guest.domain.view[guest.events.vcpu_info + 1] == 0


def test_iret_cannot_change_the_privilege_level(guest) -> None:
    enter(guest, True)
    guest.put("<9Q", 0, 0, 0, 0, 0x7000, 0xE030, 0x23202 | 0x20000, A + 0x20, 0xE02B, at=A + 0x200)
    guest.cpu.registers[4] = A + 0x200
    guest.call("iret")
    assert guest.cpu.selectors[1:3] == [0xE033, 0xE02B] and not guest.cpu.rflags & 0x23000


def failed_iret(guest, rip: int, cs: int, ss: int, *, flags: int = 0) -> tuple[int, ...]:
    """The frame at the guest's handler of #GP that comes of an iret to user mode."""
    enter(guest, True)
    guest.put("<BBHIQ", 13, 4, 0xE033, 0, 0x6000, at=A + 0x100)
    guest.call("set_trap_table", A + 0x100)
    guest.put("<9Q", 1, 2, 3, flags, rip, cs, 0x202, A + 0x20, ss, at=A + 0x200)
    guest.cpu.registers[4] = A + 0x200
    assert guest.call("iret") == 1
    assert guest.cpu.rip == 0x6000 and guest.domain.state.in_kernel and guest.cpu.space[1] is True
    assert guest.cpu.selectors[1:3] == [abi.FLAT_RING3_CS64, abi.FLAT_RING3_SS]
    assert guest.cpu.registers[4] == A + 0x1000 - 64, "on the kernel's stack"
    assert guest.domain.view[guest.events.vcpu_info + 1] == 1, "as the trap wants events"
    return guest.get("<8Q", at=A + 0x1000 - 64)


def test_an_iret_to_no_address_is_the_users_fault(guest) -> None:
    """As any process can have it by sigreturn: it must not end the domain."""
    assert failed_iret(guest, 1 << 47, 0xE033, 0xE02B) == (3, 2, 0, 1 << 47, 0xE033, 0x202, A + 0x20, 0xE02B)
    assert failed_iret(guest, 1 << 63, 3, 0, flags=abi.VGCF_IN_SYSCALL)[2:4] == (0, 1 << 63)


@pytest.mark.parametrize(("cs", "ss", "error"), [(0xBAD3, 0xE02B, 0xBAD3), (0xE033, 0xBAD3, 0xBAD3)])
def test_an_iret_with_a_bad_selector_is_the_users_fault(guest, cs: int, ss: int, error: int) -> None:
    frame = failed_iret(guest, 0x7000, cs, ss)
    assert (frame[2] & ~3, frame[3], frame[4], frame[7]) == (error & ~3, 0x7000, cs, ss)


def test_what_ends_a_domain(guest) -> None:
    enter(guest, True)
    with pytest.raises(DomainCrash, match="no handler"):
        guest.domain.deliver(6)
    guest.cpu.registers[4] = BAD
    with pytest.raises(DomainCrash, match="cannot be read"):
        guest.call("iret")
    guest.domain.exception(6, None, None)
    assert isinstance(guest.domain.platform.stop_reason, Crash)


def test_int_n_needs_the_gates_privilege(guest) -> None:
    enter(guest, False)
    guest.put("<BBHIQ", 0x80, 3, 0xE033, 0, 0x5000, at=A + 0x100)
    guest.put("<BBHIQ", 13, 0, 0xE033, 0, 0x6000, at=A + 0x110)
    guest.call("set_trap_table", A + 0x100)
    guest.domain.software_interrupt(0x80, 0x1002)
    assert guest.cpu.rip == 0x5000 and guest.get("<7Q", at=guest.cpu.registers[4])[2] == 0x1002
    enter(guest, False)
    guest.cpu.rip = 0x1000
    guest.domain.software_interrupt(13, 0x1002)
    assert guest.cpu.rip == 0x6000 and guest.get("<8Q", at=guest.cpu.registers[4])[2:4] == (13 << 3 | 2, 0x1000)
