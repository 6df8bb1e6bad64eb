"""sched_op, vcpu_op and set_timer_op with good, bad and hostile arguments."""

from __future__ import annotations

import pytest

from tests.unit.paravirt.xen.conftest import Guest
from trivisor.machine.exits import Halt
from trivisor.machine.stop import Crash, PowerOff, Reset
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EEXIST, EFAULT, EINVAL, ENOENT, ENOSYS, EPERM, ESRCH, ETIME
from trivisor.paravirt.xen.shared_table import INDEX
from trivisor.paravirt.xen.timers import SET, STOPPED

A = 0x10000
BAD = 0xDEAD0000
HUGE = (1 << 64) - 1


def sched(guest: Guest, command: int, argument: int = A) -> int:
    return guest.call("sched_op", command, argument)


def vcpu(guest: Guest, command: int, argument: int = A, number: int = 0) -> int:
    return guest.call("vcpu_op", command, number, argument)


def poll(guest: Guest, ports: list[int], timeout: int = 0) -> int:
    guest.put(f"<{len(ports)}I", *ports, at=A + 64)
    guest.put("<QIIQ", A + 64, len(ports), 0, timeout)
    guest.domain.halt = None
    return sched(guest, abi.SCHEDOP_POLL)


def ipi(guest: Guest) -> int:
    guest.put("<II", 0, 0)
    assert guest.call("event_channel_op", abi.EVTCHNOP_BIND_IPI, A) == 0
    return guest.get("<II")[1]


def test_yield_goes_on_and_block_waits_with_events_unmasked(guest: Guest) -> None:
    mask = guest.events.vcpu_info + 1
    guest.domain.view[mask] = 1
    for call in ("sched_op", "sched_op_compat"):
        assert guest.call(call, abi.SCHEDOP_YIELD, BAD) == 0 and guest.domain.halt is None
    assert guest.domain.view[mask] == 1
    assert sched(guest, abi.SCHEDOP_BLOCK, BAD) == 0
    assert guest.domain.halt == Halt(True) and guest.domain.view[mask] == 0


@pytest.mark.parametrize(
    ("reason", "result", "ends"),
    [
        (0, 0, PowerOff), (1, 0, Reset), (2, -ENOSYS, None), (3, 0, Crash), (4, 0, Crash), (5, 0, Reset),
        (6, -EINVAL, None), (0xFFFFFFFF, -EINVAL, None),
    ],
)  # fmt: skip
def test_each_reason_of_a_shutdown(guest: Guest, reason: int, result: int, ends: type | None) -> None:
    guest.put("<I", reason)
    assert sched(guest, abi.SCHEDOP_SHUTDOWN) == result
    stop = guest.domain.platform.stop_reason
    assert stop is None if ends is None else isinstance(stop, ends)
    assert (guest.domain.halt is not None) == (ends is not None)


def test_the_older_form_of_a_shutdown_has_the_reason_in_place_of_a_pointer(guest: Guest) -> None:
    assert guest.call("sched_op_compat", abi.SCHEDOP_SHUTDOWN, 0x101) == 0
    assert isinstance(guest.domain.platform.stop_reason, Reset)
    assert guest.call("sched_op_compat", abi.SCHEDOP_POLL, A) == -ENOSYS


def test_what_else_there_is_of_sched_op(guest: Guest) -> None:
    for command in (abi.SCHEDOP_SHUTDOWN, abi.SCHEDOP_POLL, abi.SCHEDOP_REMOTE_SHUTDOWN, abi.SCHEDOP_SHUTDOWN_CODE):
        assert sched(guest, command, BAD) == -EFAULT
    for who, result in ((0, -EPERM), (1, -EPERM), (7, -ESRCH), (abi.DOMID_SELF, -ESRCH)):
        guest.put("<HxxI", who, 0)
        assert sched(guest, abi.SCHEDOP_REMOTE_SHUTDOWN) == result
    assert sched(guest, abi.SCHEDOP_SHUTDOWN_CODE) == 0 and guest.domain.platform.stop_reason is None
    for command in (abi.SCHEDOP_WATCHDOG, abi.SCHEDOP_PIN_OVERRIDE, 99, HUGE):
        assert sched(guest, command) == -ENOSYS


def test_a_poll_of_no_port_ends_with_any_event_or_its_time(guest: Guest) -> None:
    port = ipi(guest)
    guest.domain.view[guest.domain.own.shared_info * 4096 + abi.SHARED_EVTCHN_MASK + (port >> 3)] = 0xFF
    guest.cpu.ticks = 10
    for end in (lambda: guest.events.set_pending(port), guest.domain.platform.clock.run_due):
        assert poll(guest, [], timeout=1) == 0 and guest.domain.halt is not None
        assert not guest.events.pending()
        end()
        assert guest.events.pending() and not guest.events.upcall_wanted()
        assert not guest.events.pending(), "it is over"


def test_a_poll_does_not_wait_while_an_upcall_waits(guest: Guest) -> None:
    port = ipi(guest)
    guest.domain.view[guest.events.vcpu_info] = 1
    guest.domain.view[guest.events.vcpu_info + 1] = 0
    assert poll(guest, [port]) == 0 and guest.domain.halt is None
    guest.domain.view[guest.events.vcpu_info + 1] = 1
    assert poll(guest, [port]) == 0 and guest.domain.halt is not None


def test_polls_of_what_there_is_not(guest: Guest) -> None:
    assert poll(guest, [4096]) == poll(guest, [1, 0xFFFFFFFF]) == -EINVAL
    assert poll(guest, [1] * 129) == -EINVAL and poll(guest, [1] * 128) == 0
    for count in (129, 0xFFFFFFFF):
        guest.put("<QIIQ", A + 64, count, 0, 0)
        assert sched(guest, abi.SCHEDOP_POLL) == -EINVAL
    guest.put("<QIIQ", BAD, 1, 0, 0)
    assert sched(guest, abi.SCHEDOP_POLL) == -EFAULT
    assert poll(guest, [1], timeout=HUGE) == 0
    deadline = guest.domain.platform.clock.next_deadline()
    assert deadline is not None and deadline >> 60, "so far away that it never comes"


def test_there_is_one_processor(guest: Guest) -> None:
    for command in range(14):
        for number in (1, 0xFFFFFFFF):
            assert vcpu(guest, command, A, number) == -ENOENT
    assert vcpu(guest, abi.VCPUOP_INITIALISE) == -EEXIST and vcpu(guest, abi.VCPUOP_UP) == 0
    assert vcpu(guest, abi.VCPUOP_IS_UP, BAD) == 1
    assert vcpu(guest, abi.VCPUOP_GET_PHYSID) == -EINVAL
    for command in (abi.VCPUOP_SEND_NMI, 99, HUGE):
        assert vcpu(guest, command) == -ENOSYS


def test_when_the_last_processor_goes_down_the_domain_is_off(guest: Guest) -> None:
    assert vcpu(guest, abi.VCPUOP_DOWN) == 0
    assert isinstance(guest.domain.platform.stop_reason, PowerOff)


def test_pointers_of_vcpu_op(guest: Guest) -> None:
    for command in (
        abi.VCPUOP_GET_RUNSTATE_INFO, abi.VCPUOP_REGISTER_RUNSTATE_MEMORY_AREA, abi.VCPUOP_SET_PERIODIC_TIMER,
        abi.VCPUOP_SET_SINGLESHOT_TIMER, abi.VCPUOP_REGISTER_VCPU_INFO,
        abi.VCPUOP_REGISTER_VCPU_TIME_MEMORY_AREA,
    ):  # fmt: skip
        assert vcpu(guest, command, BAD) == vcpu(guest, command, HUGE) == -EFAULT
    assert vcpu(guest, abi.VCPUOP_GET_RUNSTATE_INFO) == 0
    state, entered, *times = guest.get("<i4xQ4Q")
    assert (state, entered, times) == (abi.RUNSTATE_RUNNING, 0, [guest.domain.time.now(), 0, 0, 0])


def test_times_of_timers(guest: Guest) -> None:
    clock = guest.domain.platform.clock
    for period, result in ((0, -EINVAL), (999_999, -EINVAL), (HUGE, -EINVAL), (1_000_000, 0)):
        guest.put("<Q", period)
        assert vcpu(guest, abi.VCPUOP_SET_PERIODIC_TIMER) == result
        assert (clock.next_deadline() is not None) == (result == 0)
    assert vcpu(guest, abi.VCPUOP_STOP_PERIODIC_TIMER, BAD) == 0 and clock.next_deadline() is None
    guest.cpu.ticks = 10_000
    for deadline, flags, result in ((5000, 1, -ETIME), (5000, 0, 0), (HUGE, 1, 0), (0, 0, 0)):
        guest.put("<QI", deadline, flags)
        assert vcpu(guest, abi.VCPUOP_SET_SINGLESHOT_TIMER) == result
    assert guest.call("set_timer_op", HUGE) == 0 and clock.next_deadline() is not None
    assert guest.call("set_timer_op", 0) == 0 and clock.next_deadline() is None


def test_places_of_vcpu_info(guest: Guest) -> None:
    table, frame = guest.frame(), guest.frame()
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    for place in ((frame, 4), (frame, 4096), (frame, 4040), (frame, 0xFFFFFFF8), (table, 0), (HUGE, 0), (0, 0)):
        guest.put("<QI", *place)
        assert vcpu(guest, abi.VCPUOP_REGISTER_VCPU_INFO) in (-EINVAL, -EPERM)
    assert guest.events.vcpu_info == guest.domain.own.shared_info << 12
    assert guest.frames.references[frame] == 1 and guest.frames.references[table] == 2
    guest.put("<QI", frame, 4032)
    assert vcpu(guest, abi.VCPUOP_REGISTER_VCPU_INFO) == 0
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, frame) == -EINVAL, "it stays writable memory"


def test_what_native_code_did_to_the_singleshot_timer_is_minded_when_timers_are_looked_at(guest: Guest) -> None:
    """The last thing that was done to it holds, whoever did it."""
    timers, words = guest.domain.timers, guest.domain.table.words
    single, change = INDEX["SINGLE"], INDEX["SINGLE_CHANGE"]
    words[single], words[change] = 7_000_000, SET
    assert timers.single.deadline == timers.save()["single"] == 7_000_000
    words[change] = STOPPED
    assert timers.single.deadline is None
    words[single], words[change] = 8_000_000, SET
    guest.put("<QI", 9_000_000, 0)
    assert vcpu(guest, abi.VCPUOP_SET_SINGLESHOT_TIMER) == 0
    assert timers.single.deadline == 9_000_000
    words[single], words[change] = 8_000_000, SET
    assert vcpu(guest, abi.VCPUOP_STOP_SINGLESHOT_TIMER) == 0
    assert timers.single.deadline is None


def test_the_time_is_told_at_a_place_of_the_guests_too(guest: Guest) -> None:
    register = abi.VCPUOP_REGISTER_VCPU_TIME_MEMORY_AREA
    guest.domain.time.write(guest.events.vcpu_info + abi.VCPU_INFO_TIME)
    guest.put("<I", 7, at=A + 0x100)
    guest.put("<Q", A + 0x100)
    assert vcpu(guest, register) == 0
    assert guest.get("<I", at=A + 0x100) == (8,)
    told = guest.domain.memory.read(guest.events.vcpu_info + abi.VCPU_INFO_TIME, 32)
    assert guest.cpu.load(A + 0x104, 28) == told[4:] and told[29] == abi.PVCLOCK_TSC_STABLE
    for area, result, kept in (
        (abi.HYPERVISOR_VIRT_START, -EFAULT, A + 0x100), (1 << 47, -EFAULT, A + 0x100), (BAD, 0, 0), (A + 8, 0, A + 8),
        (0, 0, 0),
    ):  # fmt: skip
        guest.put("<Q", area)
        assert vcpu(guest, register) == result and guest.domain.state.time_area == kept
