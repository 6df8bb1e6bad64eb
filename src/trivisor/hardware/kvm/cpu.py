"""A processor on the host's own virtualization: its run loop over KVM_RUN and what it does about each exit.

The board's own interrupt controllers and timers serve it, as they serve every
technique (`kernel_apic` has one with KVM's local APIC).  KVM_RUN comes back
early for one signal alone, which is blocked everywhere else, so that it needs
no handler and none is ever lost: a `kick` sends it, and so does the host's
timer at the clock's next deadline.
"""

from __future__ import annotations

import errno
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.guest_cpuid import kvm_cpuid
from trivisor.hardware.kvm.rescue import Rescue
from trivisor.hardware.kvm.state_transfer import KEPT_MSRS, TRANSFERRED_MSRS, get_state, set_state
from trivisor.hardware.kvm.system import System, cpuid_table
from trivisor.hardware.kvm.vcpu import VcpuHandle
from trivisor.hardware.kvm.vm import Vm
from trivisor.machine import tsc
from trivisor.machine.cpuid import HAS_SUBLEAVES, GuestCpuid
from trivisor.machine.exits import (
    DebugStop,
    Exit,
    Halt,
    Kicked,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    PortIn,
    PortOut,
    Shutdown,
    Unsupported,
)
from trivisor.machine.host_timer import HostTimer
from trivisor.machine.msrs import MsrFile
from trivisor.machine.state import CpuState
from trivisor.machine.vcpu import GeneralProtection, Surroundings, Vcpu
from trivisor.x86 import msr
from trivisor.x86.cpuid import USUAL_CPU, CpuChoice
from trivisor.x86.exceptions import DOUBLE_FAULT

KICK_SIGNAL = signal.SIGRTMIN + 11
_MASK64 = (1 << 64) - 1
_EXIT_REASON = abi.RunHeader.exit_reason.offset // 4
_IMMEDIATE_EXIT = abi.RunHeader.immediate_exit.offset
_WINDOW = abi.RunHeader.request_interrupt_window.offset
_READY = abi.RunHeader.ready_for_interrupt_injection.offset
_IF = abi.RunHeader.if_flag.offset
_CR8 = abi.RunHeader.cr8.offset
_IO = struct.Struct("<BBHIQ")
_MMIO = struct.Struct("<Q8sIB")
_MSR = struct.Struct("<B7xIIQ")
_COMES_BACK = frozenset({abi.EXIT_IO, abi.EXIT_MMIO, abi.EXIT_X86_RDMSR, abi.EXIT_X86_WRMSR})
"""Exits after which KVM finishes the instruction on the next entry."""


class KvmVcpu:
    """A virtual x86 processor of the host's KVM; see `machine.vcpu.Vcpu` for its methods.

    The guest sees the processor `cpuid`; without one the best that this KVM has,
    changed by `choice`.  `substitute` makes a processor of another engine on the same board,
    which takes over for what KVM cannot emulate; without one such an instruction
    ends the run.  Raises `KvmUnavailable`.
    """

    technique = "hardware"
    chip = "the board's local APIC"
    """Which one the guest has, for people to read."""

    def __init__(
        self,
        board: Surroundings,
        choice: CpuChoice = USUAL_CPU,
        cpuid: GuestCpuid | None = None,
        substitute: Callable[[GuestCpuid], Vcpu] | None = None,
    ) -> None:
        self.board = board
        self.observed: dict[type, list[Callable[[Any], None]]] = {}
        self.halted = False
        self.injected: list[int] = []
        self.tsc_adjust = 0
        self._tsc_offset = 0
        self._kicked = False
        self._look = True  # something waits that the run loop must see to before it enters the guest
        self._incomplete = False  # KVM has the rest of an instruction to do
        self._stepping = False
        self._closed = False
        self._wake = threading.Event()
        self._kick_lock = threading.RLock()
        self._thread: int | None = None  # whom a kick has to signal
        self._timer: HostTimer | None = None
        self._timer_thread = -1
        self._counts: dict[str, int] = {}
        self._guest_ns = self._idle_ns = self._total_ns = 0
        self._rescue: Rescue | None = None
        self._system = system = System()
        try:
            system.require()
            self.guest_cpuid = cpuid or kvm_cpuid(system, board, choice)
            self._vm = Vm(system, board.memory)
            self._vm.hand_over_msrs(self._make_chip())
            if substitute is not None and system.capability("EXIT_ON_EMULATION_FAILURE"):
                self._vm.enable("EXIT_ON_EMULATION_FAILURE", 1)
            self.handle = VcpuHandle(self._vm)
            self.handle.control(abi.SET_CPUID2, cpuid_table(self.guest_cpuid.table, HAS_SUBLEAVES))
        except BaseException:
            self.close()
            raise
        self.xcr0_supported = self.guest_cpuid.xcr0_supported
        self.msrs = MsrFile(self.guest_cpuid, tsc_frequency=board.tsc_frequency)
        self.transferred_msrs = tuple(
            index for index in TRANSFERRED_MSRS if self.handle.get_msrs([index])
        )
        self.reset_msrs = self.handle.get_msrs(self.transferred_msrs)
        self.engine = f"the host's KVM with {self.chip}"
        if substitute is not None:
            self._rescue = Rescue(self, substitute)
            self.engine += ", and translation for what it cannot emulate"
        self._run_bytes, self._run_words = self.handle.run_bytes, self.handle.run_words
        self._handlers: dict[int, Callable[[], Exit | None]] = {
            abi.EXIT_IO: self._on_io,
            abi.EXIT_MMIO: self._on_mmio,
            abi.EXIT_HLT: self._on_halt,
            abi.EXIT_IRQ_WINDOW_OPEN: self._on_window,
            abi.EXIT_INTR: self._on_window,
            abi.EXIT_SET_TPR: self._on_window,
            abi.EXIT_X86_RDMSR: self._on_rdmsr,
            abi.EXIT_X86_WRMSR: self._on_wrmsr,
            abi.EXIT_SHUTDOWN: lambda: Shutdown(DOUBLE_FAULT),
            abi.EXIT_DEBUG: self._on_debug,
            abi.EXIT_INTERNAL_ERROR: self._on_internal_error,
            abi.EXIT_FAIL_ENTRY: self._on_fail_entry,
        }
        self.attach()
        self.tsc_offset = 0
        self.state = CpuState()

    def _make_chip(self) -> frozenset[int]:
        """Have KVM make what it is to do of the interrupt controllers; returns the MSRs that are KVM's."""
        return KEPT_MSRS

    def attach(self) -> None:
        board = self.board
        board.clock.on_earlier = self._on_earlier
        board.clock.on_posted = self._wake_up
        board.interrupts.on_pending = self._attention
        board.interrupts.on_nmi = self._nmi
        board.tsc = self.tsc
        self._look = True

    def close(self) -> None:
        """Give host resources back; the processor must not be used afterwards."""
        if self._closed:
            return
        self._closed = True
        if self.board.clock.on_earlier == self._on_earlier:
            self.board.clock.on_earlier = None
        if self._timer is not None:
            self._timer.close()
        if self._rescue is not None:
            self._rescue.close()
        for name in ("handle", "_vm", "_system"):
            if hasattr(self, name):
                getattr(self, name).close()

    # -- state ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> CpuState:
        self._complete()
        return get_state(self)

    @state.setter
    def state(self, state: CpuState) -> None:
        self._complete()
        set_state(self, state)
        self._run_bytes[_READY] = 0  # of the old state: KVM will say when
        self._look = True

    def _complete(self) -> None:
        """Have KVM do the rest of the instruction whose exit was answered, and nothing more."""
        if not self._incomplete:
            return
        self._incomplete = False
        self._run_bytes[_IMMEDIATE_EXIT] = 1
        try:
            self.handle.control(abi.RUN)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
        else:
            # An instruction of several accesses comes back with the next one.
            reason = self._run_words[_EXIT_REASON]
            if reason in _COMES_BACK:
                self._incomplete = True
                self._handlers[reason]()
                self._complete()
        self._look = True

    def tsc(self) -> int:
        """The guest's time-stamp counter now."""
        return tsc.read() + self._tsc_offset & _MASK64

    @property
    def tsc_offset(self) -> int:
        return self._tsc_offset

    @tsc_offset.setter
    def tsc_offset(self, offset: int) -> None:
        offset &= _MASK64
        if not self.handle.set_tsc_offset(offset) and offset:
            raise ValueError("this host's KVM cannot set the guest's time-stamp counter")
        self._tsc_offset = offset
        self.board.tsc_changed()

    def set_tsc(self, value: int) -> None:
        """Have the TSC go on from `value`."""
        self.tsc_offset = value - tsc.read()

    # -- running --------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        started = time.perf_counter_ns()
        self._begin()
        try:
            if self.halted and (exit_ := self._idle()) is not None:
                return exit_
            while (exit_ := self._once()) is None:
                pass
            return exit_
        finally:
            self._end()
            self._total_ns += time.perf_counter_ns() - started

    def step(self) -> Exit:
        if self.halted:
            self._begin()
            try:
                if (exit_ := self._idle()) is not None:
                    return exit_
            finally:
                self._end()
        self._single_step(True)
        try:
            return self.run()
        finally:
            self._single_step(False)

    def _single_step(self, on: bool) -> None:
        self._stepping = on
        control = abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP if on else 0
        self.handle.control(abi.SET_GUEST_DEBUG, abi.GuestDebug(control))

    def _begin(self) -> None:
        """Make the calling thread the one that kicks and timers go to."""
        thread = threading.get_ident()
        if self._timer_thread != thread:
            signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {KICK_SIGNAL}
            self.handle.set_signal_mask(blocked)
            if self._timer is not None:
                self._timer.close()
            self._timer = HostTimer(KICK_SIGNAL)
            self._timer_thread = thread
        with self._kick_lock:
            self._thread = thread
        self._look = True

    def _end(self) -> None:
        with self._kick_lock:
            self._thread = None

    def _once(self) -> Exit | None:
        """Serve what waits, then run the guest until its next exit."""
        if self._look and (exit_ := self._serve()) is not None:
            return exit_
        run_bytes, interrupts = self._run_bytes, self.board.interrupts
        run_bytes[_CR8] = cr8 = interrupts.cr8
        started = time.perf_counter_ns()
        try:
            self.handle.control(abi.RUN)
        except OSError as error:
            self._guest_ns += time.perf_counter_ns() - started
            if error.errno not in (errno.EINTR, errno.EAGAIN):
                raise
            self._incomplete = False
            self._take_signals()
            self._count("signal")
            return None
        self._guest_ns += time.perf_counter_ns() - started
        reason = self._run_words[_EXIT_REASON]
        self._incomplete = reason in _COMES_BACK
        if run_bytes[_CR8] != cr8:
            interrupts.cr8 = run_bytes[_CR8]
        name = abi.EXIT_NAMES.get(reason, str(reason))
        self._counts[name] = self._counts.get(name, 0) + 1
        handler = self._handlers.get(reason)
        if handler is None:
            return Unsupported(f"KVM exit {name}", self.state.rip)
        return handler()

    def _take_signals(self) -> None:
        """Take the signals that ended KVM_RUN off the queue."""
        while signal.sigtimedwait((KICK_SIGNAL,), 0) is not None:
            pass
        self._look = True

    def _look_around(self) -> Kicked | None:
        """Timers and kicks."""
        board = self.board
        self._look = False
        self._run_bytes[_IMMEDIATE_EXIT] = 0  # a kick from now on either is seen below or sets it again
        board.clock.run_due()
        deadline = board.clock.next_deadline()
        if deadline is not None:
            self._on_earlier(deadline)
        if self._kicked or board.stop_reason is not None:
            self._kicked = False
            self._look = True
            return Kicked()
        return None

    def _serve(self) -> Exit | None:
        """Timers, kicks and interrupts."""
        if (kicked := self._look_around()) is not None:
            return kicked
        run_bytes, board = self._run_bytes, self.board
        waits = bool(self.injected) or board.interrupts.pending()
        if waits and self._may_inject():
            self._inject(self.injected.pop(0) if self.injected else board.interrupts.acknowledge())
            self._count("interrupt")
            run_bytes[_READY] = 0
            waits = bool(self.injected) or board.interrupts.pending()
        run_bytes[_WINDOW] = waits
        return None

    def _may_inject(self) -> bool:
        """Whether the guest would take the interrupt that waits."""
        return bool(self._run_bytes[_READY])

    def _inject(self, vector: int) -> None:
        """Have the guest take an interrupt as soon as it is entered."""
        self.handle.control(abi.INTERRUPT, abi.Interrupt(vector))

    def _idle(self) -> Exit | None:
        """HLT with interrupts on: sleep until one comes.  A kick does not end it: the next run sleeps on."""
        started = time.perf_counter_ns()
        clock, interrupts = self.board.clock, self.board.interrupts
        self.halted = True
        try:
            while True:
                self._wake.clear()
                clock.run_due()
                if self.injected or interrupts.pending() or not self.halted:
                    self.halted = False
                    self._look = True
                    return None
                if self._kicked or self.board.stop_reason is not None:
                    self._kicked = False
                    self._look = True
                    return Kicked()
                deadline = clock.next_deadline()
                self._wake.wait(None if deadline is None else max(0, deadline - clock.now()) / 1e9)
        finally:
            self._idle_ns += time.perf_counter_ns() - started

    def _count(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1

    # -- what happens outside -------------------------------------------------------------------------------

    def interrupt(self, vector: int) -> None:
        self.injected.append(vector)
        self._attention()

    def kick(self) -> None:
        with self._kick_lock:
            self._kicked = True
            if self._rescue is not None and not self._closed:
                self._rescue.kick()
            self._wake_up()

    def _wake_up(self) -> None:
        """Have the run loop look around soon; from any thread."""
        with self._kick_lock:
            self._look = True
            self._wake.set()
            if self._closed:
                return
            self._run_bytes[_IMMEDIATE_EXIT] = 1
            if self._thread is not None and self._thread != threading.get_ident():
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    def _attention(self) -> None:
        """An interrupt begins to wait; in the run loop's own thread."""
        self._look = True
        self._wake.set()

    def _nmi(self) -> None:
        """A non-maskable interrupt has come; in the run loop's own thread."""
        self._count("nmi")
        self.halted = False
        self.handle.control(abi.NMI)
        self._attention()

    def _on_earlier(self, deadline: int) -> None:
        if self._timer is not None:
            self._timer.arm(deadline - self.board.clock.now())

    # -- exits ----------------------------------------------------------------------------------------------

    def _on_io(self) -> Exit | None:
        run_bytes, ports, observed = self._run_bytes, self.board.ports, self.observed
        direction, size, port, count, at = _IO.unpack_from(run_bytes, abi.EXIT_DATA)
        kind = PortOut if direction == abi.IO_OUT else PortIn
        for place in range(at, at + size * count, size):
            if direction == abi.IO_OUT:
                value = int.from_bytes(run_bytes[place : place + size], "little")
                ports.write(port, size, value)
            else:
                value = ports.read(port, size)
                run_bytes[place : place + size] = value.to_bytes(size, "little")
            if kind in observed:
                for subscriber in observed[kind]:
                    subscriber(kind(port, size, value))
        return Kicked() if self.board.stop_reason is not None else None

    def _on_mmio(self) -> Exit | None:
        run_bytes, mmio, observed = self._run_bytes, self.board.mmio, self.observed
        address, data, length, is_write = _MMIO.unpack_from(run_bytes, abi.EXIT_DATA)
        kind = MmioWrite if is_write else MmioRead
        done = 0
        while done < length:  # in pieces that devices take
            size = 1 << min((length - done).bit_length() - 1, 3)
            if is_write:
                value = int.from_bytes(data[done : done + size], "little")
                mmio.write(address + done, size, value)
            else:
                value = mmio.read(address + done, size)
                place = abi.EXIT_DATA + abi.RunMmio.data.offset + done
                run_bytes[place : place + size] = value.to_bytes(size, "little")
            if kind in observed:
                for subscriber in observed[kind]:
                    subscriber(kind(address + done, size, value))
            done += size
        return Kicked() if self.board.stop_reason is not None else None

    def _on_halt(self) -> Exit | None:
        if not self._run_bytes[_IF]:
            return Halt(False)
        return self._idle()

    def _on_window(self) -> Exit | None:
        self._look = True
        return None

    def _on_debug(self) -> Exit | None:
        pc = abi.EXIT_DATA + abi.RunDebug.pc.offset
        return DebugStop(int.from_bytes(self._run_bytes[pc : pc + 8], "little"))

    def _on_rdmsr(self) -> Exit | None:
        _, _, index, _ = _MSR.unpack_from(self._run_bytes, abi.EXIT_DATA)
        value: int | None
        try:
            value = self._read_msr(index)
        except GeneralProtection:
            value = None
        _MSR.pack_into(self._run_bytes, abi.EXIT_DATA, value is None, 0, index, value or 0)
        for subscriber in self.observed.get(MsrRead, ()):
            subscriber(MsrRead(index, value))
        return None

    def _on_wrmsr(self) -> Exit | None:
        _, reason, index, value = _MSR.unpack_from(self._run_bytes, abi.EXIT_DATA)
        accepted = True
        try:
            self._write_msr(index, value)
        except GeneralProtection:
            accepted = False
        _MSR.pack_into(self._run_bytes, abi.EXIT_DATA, not accepted, reason, index, value)
        for subscriber in self.observed.get(MsrWrite, ()):
            subscriber(MsrWrite(index, value, accepted))
        return None

    def _read_msr(self, index: int) -> int:
        if index == msr.IA32_TIME_STAMP_COUNTER:
            return self.tsc()
        if index == msr.IA32_TSC_ADJUST and "tsc_adjust" in self.guest_cpuid.features:
            return self.tsc_adjust
        outside = self.board.msrs.get(index)
        return outside[0]() if outside is not None else self.msrs.read(index)

    def _write_msr(self, index: int, value: int) -> None:
        if index == msr.IA32_TIME_STAMP_COUNTER:
            self._move_tsc(value - self.tsc())
        elif index == msr.IA32_TSC_ADJUST and "tsc_adjust" in self.guest_cpuid.features:
            self._move_tsc(value - self.tsc_adjust)
        elif (outside := self.board.msrs.get(index)) is not None:
            outside[1](value)
        else:
            self.msrs.write(index, value)

    def _move_tsc(self, by: int) -> None:
        """Writes to the TSC and to TSC_ADJUST move both (Intel SDM 3B 18.17.3)."""
        self.tsc_offset = self._tsc_offset + by
        self.tsc_adjust = self.tsc_adjust + by & _MASK64

    def _on_internal_error(self) -> Exit | None:
        error = abi.RunEmulationFailure.from_buffer(self.handle.run_bytes, abi.EXIT_DATA)
        suberror = error.suberror
        known = error.ndata > 0 and error.flags & abi.EMULATION_HAS_BYTES
        instruction = bytes(error.insn_bytes[: error.insn_size]) if known else b""
        del error
        if suberror == abi.INTERNAL_ERROR_EMULATION and self._rescue is not None:
            return self._rescue.take_over(instruction, single=self._stepping)
        what = f"KVM cannot emulate {instruction.hex(' ')}" if instruction else f"KVM internal error {suberror}"
        return Unsupported(what.strip(), self.state.rip)

    def _on_fail_entry(self) -> Exit | None:
        failure = abi.RunFailEntry.from_buffer_copy(self.handle.run_bytes, abi.EXIT_DATA)
        reason = failure.hardware_entry_failure_reason
        return Unsupported(f"the processor refuses to enter the guest, reason {reason:#x}", self.state.rip)

    def forget_mappings(self) -> None:
        """Page tables may have been changed by another processor than KVM's."""
        self._vm.forget_mappings()

    # -- the rest of the protocol ---------------------------------------------------------------------------

    def last_block(self) -> tuple[int, int] | None:
        return None

    def memory_written(self, address: int, length: int) -> None:
        """The processor's own caches are coherent."""

    def statistics(self) -> dict[str, Any]:
        python = self._total_ns - self._guest_ns - self._idle_ns
        statistics: dict[str, Any] = {"exits": dict(sorted(self._counts.items(), key=lambda item: -item[1]))}
        if self._rescue is not None:
            statistics["given up by KVM, done by translation"] = dict(self._rescue.counts.most_common())
            statistics["translation went on for a while"] = self._rescue.went_on
            python -= self._rescue.nanoseconds
        statistics["seconds"] = {
            "guest": self._guest_ns / 1e9,
            "python": python / 1e9,
            "idle": self._idle_ns / 1e9,
        }
        if self._rescue is not None:
            statistics["seconds"]["translation"] = self._rescue.nanoseconds / 1e9
        return statistics
