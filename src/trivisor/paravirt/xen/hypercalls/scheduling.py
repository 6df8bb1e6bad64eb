"""Hypercalls about time and the processor: sched_op, vcpu_op, set_timer_op (sched.h, vcpu.h)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from trivisor.machine.stop import Crash, PowerOff, Reset
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EEXIST, EFAULT, EINVAL, ENOENT, ENOSYS, EPERM, ESRCH, ETIME, HYPERCALL_NUMBERS
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.grants import BACK_END_DOMAIN
from trivisor.paravirt.xen.timers import LONGEST_PERIOD, SHORTEST_PERIOD
from trivisor.paravirt.xen.walk import may_be_guests

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain
    from trivisor.paravirt.xen.hypercalls import Handler

_MOST_POLLED = 128


def handlers(domain: Domain) -> dict[int, Handler]:
    """By number."""
    calls = _Scheduling(domain)
    by_name: dict[str, Handler] = {
        "sched_op": calls.sched_op,
        "sched_op_compat": calls.sched_op_compat,
        "vcpu_op": calls.vcpu_op,
        "set_timer_op": calls.set_timer_op,
    }
    return {HYPERCALL_NUMBERS[name]: handler for name, handler in by_name.items()}


class _Scheduling:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._timers = domain.timers
        self._operations = {
            abi.VCPUOP_IS_UP: lambda _: 1,
            abi.VCPUOP_UP: lambda _: 0,
            abi.VCPUOP_DOWN: self._down,
            abi.VCPUOP_GET_PHYSID: _not_pinned,
            abi.VCPUOP_INITIALISE: _already_up,
            abi.VCPUOP_GET_RUNSTATE_INFO: self._get_runstate,
            abi.VCPUOP_REGISTER_RUNSTATE_MEMORY_AREA: self._register_runstate,
            abi.VCPUOP_SET_PERIODIC_TIMER: self._set_periodic,
            abi.VCPUOP_STOP_PERIODIC_TIMER: self._stop_periodic,
            abi.VCPUOP_SET_SINGLESHOT_TIMER: self._set_single,
            abi.VCPUOP_STOP_SINGLESHOT_TIMER: self._stop_single,
            abi.VCPUOP_REGISTER_VCPU_INFO: self._register_vcpu_info,
            abi.VCPUOP_REGISTER_VCPU_TIME_MEMORY_AREA: self._register_time,
        }

    # -- sched_op -------------------------------------------------------------------------------------------

    def sched_op(self, command: int, argument: int, *_: int) -> int:
        domain = self._domain
        match command:
            case abi.SCHEDOP_YIELD:
                return 0
            case abi.SCHEDOP_BLOCK:
                domain.view[domain.events.vcpu_info + 1] = 0
                domain.block()
                return 0
            case abi.SCHEDOP_SHUTDOWN:
                self._shutdown(int.from_bytes(domain.cpu.load(argument, 4), "little"))
                return 0
            case abi.SCHEDOP_POLL:
                return self._do_poll(argument)
            case abi.SCHEDOP_REMOTE_SHUTDOWN:
                (who,) = struct.unpack("<H", domain.cpu.load(argument, 2))
                raise HypercallError(EPERM if who in (BACK_END_DOMAIN, domain.number) else ESRCH)
            case abi.SCHEDOP_SHUTDOWN_CODE:
                domain.cpu.load(argument, 4)  # the reason that a later shutdown is to have in its place: it has its own
                return 0
        raise HypercallError(ENOSYS)

    def sched_op_compat(self, command: int, argument: int, *_: int) -> int:
        """The older form: the reason of a shutdown is the argument itself."""
        if command == abi.SCHEDOP_SHUTDOWN:
            self._shutdown(argument & 0xFF)
            return 0
        if command in (abi.SCHEDOP_YIELD, abi.SCHEDOP_BLOCK):
            return self.sched_op(command, argument)
        raise HypercallError(ENOSYS)

    def _shutdown(self, reason: int) -> None:
        reasons = {
            abi.SHUTDOWN_POWEROFF: PowerOff(),
            abi.SHUTDOWN_REBOOT: Reset(),
            abi.SHUTDOWN_SOFT_RESET: Reset(),
            abi.SHUTDOWN_CRASH: Crash("the guest reported that it crashed"),
            abi.SHUTDOWN_WATCHDOG: Crash("the guest's watchdog ran out"),
        }
        if reason not in reasons:
            raise HypercallError(ENOSYS if reason == abi.SHUTDOWN_SUSPEND else EINVAL)
        self._domain.platform.stop(reasons[reason])
        self._domain.block()

    def _do_poll(self, argument: int) -> int:
        """Sleep until one of some ports has an event, masked or not, or a system time has come (0: never)."""
        domain = self._domain
        ports_at, count, timeout = struct.unpack("<QI4xQ", domain.cpu.load(argument, 24))
        if count > _MOST_POLLED:
            raise HypercallError(EINVAL)
        ports = frozenset(struct.unpack(f"<{count}I", domain.cpu.load(ports_at, 4 * count)))
        if any(port >= abi.EVTCHN_2L_PORTS for port in ports):
            raise HypercallError(EINVAL)
        self._timers.poll.stop()
        view, info = domain.view, domain.events.vcpu_info
        if view[info] and not view[info + 1]:
            return 0  # the upcall comes first
        if not domain.events.poll(ports):
            return 0
        if timeout:
            self._timers.poll.set(timeout)
        domain.block()
        return 0

    # -- timers ---------------------------------------------------------------------------------------------

    def set_timer_op(self, deadline: int, *_: int) -> int:
        """One tick of VIRQ_TIMER at a system time; 0 stops the timer."""
        self._timers.single.stop()
        if deadline:
            self._timers.single.set(deadline)
        return 0

    def _set_single(self, argument: int) -> int:
        domain = self._domain
        deadline, flags = struct.unpack("<QI", domain.cpu.load(argument, 12))
        if flags & abi.VCPU_SSHOTTMR_FUTURE and deadline < domain.time.now():
            raise HypercallError(ETIME)
        self._timers.single.set(deadline)
        return 0

    def _stop_single(self, _argument: int) -> int:
        self._timers.single.stop()
        return 0

    def _set_periodic(self, argument: int) -> int:
        (period,) = struct.unpack("<Q", self._domain.cpu.load(argument, 8))
        if not SHORTEST_PERIOD <= period <= LONGEST_PERIOD:
            raise HypercallError(EINVAL)
        self._timers.start_periodic(period)
        return 0

    def _stop_periodic(self, _argument: int) -> int:
        self._timers.stop_periodic()
        return 0

    # -- vcpu_op --------------------------------------------------------------------------------------------

    def vcpu_op(self, command: int, vcpu: int, argument: int, *_: int) -> int:
        if vcpu != 0:
            raise HypercallError(ENOENT)
        handler = self._operations.get(command)
        if handler is None:
            raise HypercallError(ENOSYS)
        return handler(argument)

    def _down(self, _argument: int) -> int:
        """The last processor goes: that is a power-off."""
        self._domain.platform.stop(PowerOff())
        self._domain.block()
        return 0

    def _runstate(self) -> bytes:
        """It has run all the time: waiting for events is not told apart."""
        now = self._domain.time.now()
        return struct.pack("<i4xQ4Q", abi.RUNSTATE_RUNNING, 0, now, 0, 0, 0)

    def _get_runstate(self, argument: int) -> int:
        self._domain.cpu.store(argument, self._runstate())
        return 0

    def _register_runstate(self, argument: int) -> int:
        domain = self._domain
        (area,) = struct.unpack("<Q", domain.cpu.load(argument, 8))
        domain.state.runstate_area = area
        if area:
            domain.cpu.store(area, self._runstate())
        return 0

    def _register_vcpu_info(self, argument: int) -> int:
        """Once, and it stays: the page is writable memory of the guest's as long as the domain runs."""
        domain, events = self._domain, self._domain.events
        frame, offset = struct.unpack("<QI", domain.cpu.load(argument, 12))
        if offset > 4096 - abi.VCPU_INFO_SIZE or offset & 7 or events.vcpu_info != domain.own.shared_info << 12:
            raise HypercallError(EINVAL)
        domain.frames.hold(frame, writable=True)
        new = frame << 12 | offset
        domain.memory.write(new, domain.memory.read(events.vcpu_info, abi.VCPU_INFO_SIZE))
        domain.cpu.memory_written(new, abi.VCPU_INFO_SIZE)
        events.vcpu_info = new
        domain.vcpu_info_moved()
        events.moved()
        domain.time.write(new + abi.VCPU_INFO_TIME)
        return 0

    def _register_time(self, argument: int) -> int:
        """A second place for the time, a page that the guest shows its programs; a null pointer is none."""
        domain = self._domain
        (area,) = struct.unpack("<Q", domain.cpu.load(argument, 8))
        if not may_be_guests(area):
            raise HypercallError(EFAULT)
        domain.state.time_area = area
        domain.tell_time()
        return 0


def _not_pinned(_argument: int) -> int:
    raise HypercallError(EINVAL)


def _already_up(_argument: int) -> int:
    raise HypercallError(EEXIST)
