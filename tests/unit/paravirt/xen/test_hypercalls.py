"""Hypercalls with good, bad and hostile arguments; those about page tables and events have modules of their own."""

from __future__ import annotations

import random

import pytest

from trivisor.machine.memory import MIB, PAGE_SIZE, GuestMemory
from trivisor.machine.stop import Crash, PowerOff, Reset
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EFAULT, EINVAL, ENOENT, ENOSYS, EPERM, ESRCH, HYPERCALLS
from trivisor.paravirt.xen.errors import DomainCrash, Preempted
from trivisor.paravirt.xen.frames import Frames
from trivisor.paravirt.xen.own_memory import OwnMemory, own_size
from trivisor.paravirt.xen.shared_table import SharedTable
from trivisor.x86.exceptions import INVALID_OPCODE

A = 0x10000
BAD = 0xDEAD0000


def test_unknown_numbers_are_not_implemented(guest) -> None:
    for number in (11, 41, 63, 1 << 31):
        assert guest.domain.call(number, (0,) * 6) == -ENOSYS


@pytest.mark.parametrize("seed", range(6))
def test_arguments_of_every_kind_end_in_a_result(guest, seed: int) -> None:
    values = (0, 1, 2, 3, 5, 8, 31, 63, 0x7FF0, 0xFFFF, A, A + 8, A + 0xFFF8, BAD, 1 << 31, 1 << 47, 1 << 63, (1 << 64) - 1)
    choose = random.Random(seed)
    for _ in range(6000):
        number = choose.choice(list(HYPERCALLS))
        if number == abi.IRET:
            continue
        guest.put("<8Q", *(choose.choice(values) for _ in range(8)))
        try:
            result = guest.domain.call(number, tuple(choose.choice(values) for _ in range(6)))
        except Preempted as rest:
            assert len(rest.arguments) <= 6
        else:
            assert isinstance(result, int)
        guest.domain.halt = None


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
    assert guest.call("callback_op", 1, A) == -EINVAL, "the event callback stays"
    guest.put("<H", 7)
    assert guest.call("callback_op", 1, A) == 0 and guest.domain.state.syscall32.address == 0


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
    assert guest.call("set_debugreg", 7, 1 << 32) == -EPERM
    assert guest.call("set_debugreg", 8, 0) == guest.call("get_debugreg", 8) == -EINVAL
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


def test_multicall(guest) -> None:
    number = abi.HYPERCALL_NUMBERS
    guest.put("<8Q", number["xen_version"], 0, abi.XENVER_PAGESIZE, 0, 0, 0, 0, 0)
    guest.put("<8Q", number["multicall"], 0, A, 1, 0, 0, 0, 0, at=A + 64)
    guest.put("<8Q", 63, 0, 0, 0, 0, 0, 0, 0, at=A + 128)
    assert guest.call("multicall", A, 3) == 0
    assert [guest.get("<Qq", at=A + 64 * i)[1] for i in range(3)] == [4096, -ENOSYS, -ENOSYS]
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
        assert own.map_address % (4 * MIB) == 2 * MIB, "not where a direct-mapped TLB has the guest's own table"
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
    assert guest.call("memory_op", abi.XENMEM_POPULATE_PHYSMAP, A) == -ESRCH
    assert guest.call("memory_op", 30, A) == -ENOSYS


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


@pytest.mark.parametrize("reason, ends", [(0, PowerOff), (1, Reset), (3, Crash), (4, Crash)])
def test_shutdown(guest, reason: int, ends: type) -> None:
    guest.put("<I", reason)
    assert guest.call("sched_op", abi.SCHEDOP_SHUTDOWN, A) == 0
    assert isinstance(guest.domain.platform.stop_reason, ends)


def test_what_an_unprivileged_domain_is_refused(guest) -> None:
    for name in ("platform_op", "domctl", "sysctl", "hvm_op", "kexec_op", "xsm_op"):
        assert guest.call(name, 0, A) == -EPERM
    assert guest.call("sched_op", abi.SCHEDOP_REMOTE_SHUTDOWN, A) == -EPERM


def test_io_privilege(guest) -> None:
    guest.put("<I", 1)
    assert guest.call("physdev_op", abi.PHYSDEVOP_SET_IOPL, A) == 0 and guest.domain.state.iopl == 1
    guest.put("<I", 4)
    assert guest.call("physdev_op", abi.PHYSDEVOP_SET_IOPL, A) == -EINVAL


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
