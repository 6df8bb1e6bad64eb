"""A KVM processor all of whose guest runs in ring 3: its run loop, and what its supervisor is told of each exit."""

from __future__ import annotations

import errno
import os
import struct
import time
from ctypes import sizeof
from fcntl import ioctl
from typing import Any, Final

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.cpu import KvmVcpu
from trivisor.hardware.kvm.direct.deprivileged import FLAT_CODE, FLAT_DATA, Deprivileged
from trivisor.hardware.kvm.direct.guest_memory import RingThreeMemory
from trivisor.hardware.kvm.direct.hidden import HIDDEN, load_hidden
from trivisor.hardware.kvm.direct.native_loop import ASKS, EXIT
from trivisor.hardware.kvm.direct.native_run import NativeRun
from trivisor.hardware.kvm.direct.registers import RunRegisters, segment
from trivisor.hardware.kvm.direct.segment_faults import prefix_made_stack_fault
from trivisor.hardware.kvm.direct.stub import AT_A_TIME, PHYSICAL, TSS_LIMIT, VECTORS, Stub
from trivisor.hardware.kvm.guest_cpuid import check_avx512, ring_0_is_emulated, shown_cpuid
from trivisor.hardware.kvm.system import KvmUnavailable, System, cpuid_table
from trivisor.machine.cpuid import HAS_SUBLEAVES, GuestCpuid
from trivisor.machine.deprivileged import CS, SS, Supervisor
from trivisor.machine.exits import DebugStop, Exit, Halt, Kicked, Unsupported
from trivisor.machine.memory import PAGE_SIZE
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.machine.vcpu import Surroundings
from trivisor.x86 import msr
from trivisor.x86.cpuid import CpuChoice, features, host_cpuid
from trivisor.x86.exceptions import (
    BREAKPOINT,
    DEBUG,
    ERROR_IDT,
    GENERAL_PROTECTION,
    INVALID_OPCODE,
    PAGE_FAULT,
    PUSHES_ERROR_CODE,
    STACK_FAULT,
    GuestException,
)
from trivisor.x86.flags import AC, DF, FIXED, IF, NT, RF, STATUS, TF
from trivisor.x86.paging import is_canonical

_IMMEDIATE_EXIT = abi.RunHeader.immediate_exit.offset
_EXIT_REASON = abi.RunHeader.exit_reason.offset // 4
_MONITOR_SLOT: Final = 30
"""KVM's number for the memory that the stub is in."""
_RAX, _RSP, _RDI = 0, 4, 7
_FRAME = struct.Struct("<5Q")
_RING0_CODE, _RING0_DATA = 0x00AF9B000000FFFF, 0x00CF93000000FFFF
_INT = b"\xcd"
_SERIALIZE = b"\x0f\x01\xe8"
_SYSCALL_MASK: Final = 0x47700  # AC, NT, IOPL, DF, IF and TF
_RING3_FLAGS: Final = STATUS | TF | DF | NT | RF | AC | 1 << 21
"""Flags that ring 3 has in its own hands; where it can go to the entry point itself, it says what they were."""


class Selectors:
    """Where in the guest's GDT, on pages that are the hypervisor's, the segments are that the processor needs.

    Ring 0's data segment follows its code segment; `code` and `stack` are flat ones of ring 3.
    """

    def __init__(self, ring0_code: int, code: int, stack: int) -> None:
        self.ring0_code = ring0_code
        self.code = code
        self.stack = stack


class DirectVcpu(KvmVcpu):
    """`board`'s processor for a guest that is all in ring 3; `slot` is the level-4 entry that the stub may have.

    `supervise` must come before anything else.  The guest sees the best processor that there is, or `cpuid` if it
    began elsewhere.  Raises `KvmUnavailable`.
    """

    supervisor: Supervisor
    native: NativeRun

    def __init__(
        self, board: Surroundings, slot: int, selectors: Selectors, cpuid: GuestCpuid | None = None
    ) -> None:
        self._selectors, self._slot = selectors, slot
        choice = CpuChoice(added=frozenset({"cx16"}) & features(host_cpuid))
        with System() as system:
            system.require()
            here = shown_cpuid(system, board, choice)
        if cpuid is not None:
            if missing := cpuid.features - here.features - {"serialize"}:
                raise KvmUnavailable(f"the host's KVM lacks {', '.join(sorted(missing))}, which the guest was told of")
            check_avx512(cpuid, here)
        super().__init__(board, choice, cpuid or here)
        try:
            self.ring_0_is_emulated = ring_0_is_emulated(self._system)
            linear = slot << 39 | (0xFFFF << 48 if slot & 0x100 else 0)
            self.stub = Stub(linear, selectors.ring0_code, board.memory.span, stays_in_ring_3=self.ring_0_is_emulated)
            region = abi.UserspaceMemoryRegion(_MONITOR_SLOT, 0, PHYSICAL, self.stub.size, self.stub.host)
            self._vm.control(abi.SET_USER_MEMORY_REGION, region)
            self.ring3_memory = RingThreeMemory(board.memory, slot)
            self.registers = RunRegisters(self._run_bytes)
        except BaseException:
            self.close()
            raise
        self._ring0 = (
            segment(selectors.ring0_code, _RING0_CODE), segment(selectors.ring0_code + 8, _RING0_DATA)
        )  # fmt: skip
        self._outside = True
        """The registers are the guest's, between two instructions of ring 3."""
        self.deprivileged = Deprivileged(self)
        self.technique, self.engine = "paravirt", "direct execution on /dev/kvm"
        self._stepped = False
        self._own_trap = 0
        self._exceptions: dict[int, int] = {}
        self._system_calls = self._stub_runs = self._rewritten = 0
        self._descriptor = self.handle.descriptor

    def supervise(self, supervisor: Supervisor) -> None:
        """Have exceptions and system calls go to `supervisor`, and CPUID answer what it says."""
        self.supervisor = supervisor
        leaves = [*self.guest_cpuid.table, *((0x40000000 + leaf, 0) for leaf in range(4))]
        table = {key: supervisor.cpuid(*key) for key in leaves}
        self.handle.control(abi.SET_CPUID2, cpuid_table(table, HAS_SUBLEAVES))
        supervision = supervisor.native
        self.stub.set_entry(supervision.ring_3)
        self.native = NativeRun(self.handle, self.board.memory, self._slot, self.stub, supervision)
        flat = segment(self._selectors.code, FLAT_CODE), segment(self._selectors.stack, FLAT_DATA)
        self.native.set_segments(flat, self._ring0)

    def close(self) -> None:
        for name in ("registers", "ring3_memory", "native"):
            part = self.__dict__.pop(name, None)
            if part is not None:
                part.close()
        super().close()
        if hasattr(self, "stub"):
            self.stub.close()

    # -- state ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> CpuState:
        """As the guest knows it: the stub and its tables are not part of it."""
        self._push()
        state = KvmVcpu.state.fget(self)  # type: ignore[attr-defined]
        assert isinstance(state, CpuState)
        state.idtr, state.tr = Table(0, 0), Segment(0, 0, 0, 0x8B)
        for index in (msr.IA32_STAR, msr.IA32_LSTAR, msr.IA32_CSTAR, msr.IA32_FMASK):
            state.msrs.pop(index, None)
        state.msrs[msr.IA32_KERNEL_GS_BASE] = self.deprivileged.other_gs  # there is no SWAPGS in ring 3
        return state

    @state.setter
    def state(self, state: CpuState) -> None:
        KvmVcpu.state.fset(self, state)  # type: ignore[attr-defined]
        if not hasattr(self, "stub"):
            return
        sregs = self.handle.get(abi.GET_SREGS, abi.SpecialRegs)
        sregs.idt = abi.DescriptorTable(self.stub.idt, 16 * VECTORS - 1)
        sregs.tr = abi.Segment(base=self.stub.tss, limit=TSS_LIMIT, selector=0x40, type=11, present=1)
        self.handle.control(abi.SET_SREGS, sregs)
        selectors = self._selectors
        self.handle.set_msrs(
            {
                msr.IA32_STAR: selectors.ring0_code << 32 | (selectors.stack - 8) << 48,
                msr.IA32_LSTAR: self.stub.entry,
                msr.IA32_CSTAR: self.stub.entry,
                msr.IA32_FMASK: _SYSCALL_MASK,
            }
        )
        self._pull()
        self.deprivileged.state_loaded(state)

    def _push(self) -> None:
        """Registers that wait in the run structure go to KVM now."""
        shown = abi.SyncRegs.from_buffer_copy(self.registers.save().ljust(sizeof(abi.SyncRegs), b"\0"))
        self.handle.control(abi.SET_SREGS, shown.sregs)
        self.handle.control(abi.SET_REGS, shown.regs)

    def _pull(self) -> None:
        """The run structure shows KVM's registers from now on."""
        shown = bytes(self.handle.get(abi.GET_REGS, abi.Regs)) + bytes(
            self.handle.get(abi.GET_SREGS, abi.SpecialRegs)
        )
        self.registers.load(shown)
        self.registers.enable()

    def set_gdt(self, base: int, limit: int) -> None:
        """Load GDTR."""
        at = abi.RUN_SYNC_REGS + abi.SyncRegs.sregs.offset + abi.SpecialRegs.gdt.offset
        new = bytes(abi.DescriptorTable(base, limit))
        if self._run_bytes[at : at + len(new)] != new:
            self._run_bytes[at : at + len(new)] = new
            self.registers.special = True

    # -- one step -------------------------------------------------------------------------------------------

    def step(self) -> Exit:
        """By the trap flag, of which PUSHF alone tells; what the supervisor does is part of a step."""
        self._begin()
        self._stepping = True
        try:
            if self.halted and (exit_ := self._idle()) is not None:
                return exit_
            while True:
                self._stepped = False
                exit_ = self._once()
                if exit_ is not None or self._stepped:
                    return exit_ or DebugStop(self.registers.rip)
        finally:
            self._stepping = False
            self._end()

    def _set_trap(self) -> None:
        """Have the next instruction trap."""
        run = self.registers
        self._own_trap = run.rflags & TF
        run.rflags |= TF

    def _drop_trap(self) -> None:
        """The guest's own trap flag is back."""
        run = self.registers
        run.rflags = run.rflags & ~TF | self._own_trap

    # -- running --------------------------------------------------------------------------------------------

    def _once(self) -> Exit | None:
        if self._look and self._outside and (exit_ := self._serve()) is not None:
            return exit_
        if self._outside:
            if not is_canonical(self.registers.rip):  # nothing is there, and VT-x would not even go
                return self._after(self.supervisor.exception(GENERAL_PROTECTION, 0, None))
            if self._stepping:
                self._set_trap()
            self._enter()
        else:
            self._run_bytes[_IMMEDIATE_EXIT] = 0  # what waits is served in a moment, at an exit of the stub's
        started = time.perf_counter_ns()
        end = self._run()
        self._guest_ns += time.perf_counter_ns() - started
        if end < 0:
            self._interrupted(-end)
            return None
        if end != EXIT:
            self._outside = True
            self._look |= end == ASKS
            return None
        reason = self._run_words[_EXIT_REASON]
        self._outside = self._stepped = True
        if reason == abi.EXIT_IO and self.registers.rip in self.stub.stops:
            return self._after(self._system_call())
        if reason == abi.EXIT_HLT:
            return self._after(self._stopped())
        name = abi.EXIT_NAMES.get(reason, str(reason))
        self._count(name)
        if reason == abi.EXIT_IO:
            return self._after(self._port_access())
        handler = self._handlers.get(reason)
        if handler is None or reason == abi.EXIT_MMIO:
            return Unsupported(f"KVM exit {name} in ring 3", self.registers.rip)
        return handler()

    def _run(self) -> int:
        """Run the guest until there is something for Python, as `native_loop` tells it."""
        if self._stepping or self.supervisor.watched():
            self.native.answer_nothing()
            try:
                ioctl(self._descriptor, abi.RUN)
            except OSError as error:
                return -(error.errno or errno.EIO)
            return EXIT
        cpu = self.deprivileged
        changes = bool(cpu.changed_tables or cpu.changed_entries)
        end = self.native.run(self._tsc_offset, flush_is_pythons=changes or not self.ring_0_is_emulated)
        if end != EXIT and end > 0:
            self.registers.resume()
        cpu.take_native()
        return end

    def _interrupted(self, error: int) -> None:
        """KVM_RUN has failed; raises OSError unless that was for a signal."""
        if error not in (errno.EINTR, errno.EAGAIN):
            raise OSError(error, os.strerror(error))
        self._outside = self._between_instructions()
        if self._stepping and self._outside:
            self._drop_trap()
        self._take_signals()
        self._count("signal")

    def _serve(self) -> Exit | None:
        """Timers, kicks and interrupts."""
        if (kicked := self._look_around()) is not None:
            return kicked
        return self._after(self.supervisor.interrupt()) if self.board.interrupts.pending() else None

    def _after(self, exit_: Exit | None) -> Exit | None:
        """What comes of a call of the supervisor's."""
        if exit_ is None:
            return Kicked() if self.board.stop_reason is not None else None
        return self._idle() if exit_ == Halt(True) else exit_

    def _between_instructions(self) -> bool:
        """Whether a signal has stopped the guest in ring 3 with nothing on its way to it; not so in the stub.

        Where a system call was on its way in ring 3, it is as if its SYSCALL were still to come.
        """
        run = self.registers
        if run.ring != 3:
            return False
        events = self.handle.get(abi.GET_VCPU_EVENTS, abi.VcpuEvents)
        if events.exception.injected or events.exception.pending:
            return False
        if self.stub.is_entering(run.rip):
            run.system_call(_RING3_FLAGS, IF | FIXED)
        return True

    # -- into the guest -------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Have the next KVM_RUN go on with the guest, through the stub when there is something for it to do."""
        cpu = self.deprivileged
        if cpu.at_once or cpu.flush_wanted:
            changes = cpu.changed_tables or cpu.changed_entries
            # A KVM without a TLB but its shadow tables (kvm-pvm) knows all by what changed in them.
            if changes or not self.ring_0_is_emulated:
                self._through_stub(self.stub.leave if self.ring_0_is_emulated else self.stub.flush)
                return
            cpu.flush_wanted = False
        self.registers.commit()

    def _through_stub(self, last: int) -> None:
        """Go on in ring 0, by the stack that the code in `stub` describes."""
        cpu, stub, run = self.deprivileged, self.stub, self.registers
        if len(cpu.changed_entries) > AT_A_TIME:  # whole tables are fewer
            cpu.changed_tables |= {entry & -PAGE_SIZE for entry in cpu.changed_entries}
            cpu.changed_entries.clear()
        flush = [run[_RAX], run[_RDI], run.rip, run.selector(CS), run.rflags, run[_RSP], run.selector(SS)]
        tables = [cpu.changed_tables.pop() for _ in range(min(AT_A_TIME, len(cpu.changed_tables)))]
        entries = [cpu.changed_entries.pop() for _ in range(min(AT_A_TIME, len(cpu.changed_entries)))]
        if not cpu.changed_tables and not cpu.changed_entries:
            cpu.at_once = cpu.flush_wanted = False
        else:
            last = stub.more
        stack = [
            *(stub.map + table for table in tables), stub.entries_end - len(entries) * stub.step,
            *(stub.map + entry for entry in entries), last, *flush,
        ]  # fmt: skip
        at = stub.stack_at - 8 * len(stack)
        struct.pack_into(f"<{len(stack)}Q", stub.view, at, *stack)
        run[_RSP] = stub.stack - 8 * len(stack)
        run.rip = stub.tables_end - len(tables) * stub.tables_step
        run.rflags = 2
        run.set_segment(CS, self._ring0[0])
        run.set_segment(SS, self._ring0[1])
        run.commit()
        self._stub_runs += 1
        self._rewritten += len(tables) + len(entries)

    # -- out of the guest -----------------------------------------------------------------------------------

    def _stopped(self) -> Exit | None:
        """A HLT of the stub's: an exception, or the end of one run through it of several."""
        run, stub = self.registers, self.stub
        place = run.rip - 1
        if place == stub.more:
            self._restore(_FRAME.unpack_from(stub.view, stub.stack_at - _FRAME.size))
            run[_RAX], run[_RDI] = struct.unpack_from("<2Q", stub.view, stub.stack_at - _FRAME.size - 16)
            self._stepped = False
            if self._stepping:
                self._drop_trap()
            return None
        vector = place - stub.vectors
        frame = _FRAME.unpack_from(stub.view, stub.stack_at - _FRAME.size)
        if not 0 <= vector < VECTORS or not frame[1] & 3:
            return Unsupported(f"exception {vector} in the stub", frame[0])
        error = None
        if vector in PUSHES_ERROR_CODE:
            (error,) = struct.unpack_from("<Q", stub.view, stub.stack_at - _FRAME.size - 8)
        self._exceptions[vector] = self._exceptions.get(vector, 0) + 1
        self._restore(frame)
        if self._stepping:
            self._drop_trap()
            if vector == DEBUG and not self._own_trap:
                return None
        return self._exception(vector, error)

    def _restore(self, frame: tuple[int, ...]) -> None:
        """The registers become those that the processor put into a frame."""
        run, cpu = self.registers, self.deprivileged
        run.rip, code, run.rflags, run[_RSP], stack = frame
        run.set_segment(CS, cpu.loaded(code & 0xFFFF, FLAT_CODE))
        run.set_segment(SS, cpu.loaded(stack & 0xFFFF, FLAT_DATA))

    def _exception(self, vector: int, error: int | None) -> Exit | None:
        supervisor, run = self.supervisor, self.registers
        if vector in (PAGE_FAULT, STACK_FAULT) and self.stub.is_entering(run.rip):
            return self._system_call()  # the guest's stack is not fit for an answer in ring 3
        if vector == PAGE_FAULT:
            if run.cr2 in HIDDEN and self.ring_0_is_emulated and load_hidden(run, self.ring3_memory, run.cr2):
                self._count("hidden load")
                return None
            return supervisor.exception(vector, error, run.cr2)
        if vector == BREAKPOINT:
            return supervisor.software_interrupt(vector, run.rip)
        if vector == DEBUG:
            self.deprivileged.debug_exception()
        elif vector == GENERAL_PROTECTION and error and error & ERROR_IDT:
            return supervisor.software_interrupt(error >> 3 & 0xFF, run.rip + 2)
        elif vector == STACK_FAULT and self.ring_0_is_emulated and prefix_made_stack_fault(run, self.ring3_memory):
            return supervisor.exception(GENERAL_PROTECTION, 0, None)
        elif vector == INVALID_OPCODE:
            if (number := self._software_interrupt()) is not None:
                return supervisor.software_interrupt(number, run.rip + 2)
            if "serialize" in self.guest_cpuid.features and self._code(3) == _SERIALIZE:
                run.rip += len(_SERIALIZE)  # translation has it on every host; the way here has serialized
                return None
        return supervisor.exception(vector, error, None)

    def _software_interrupt(self) -> int | None:
        """The number if INT n is what raised #UD, as it does in kvm-pvm."""
        if not self.ring_0_is_emulated:
            return None
        code = self._code(2)
        return code[1] if code[:1] == _INT else None

    def _code(self, length: int) -> bytes:
        """So many bytes at rip; none if they are not all there."""
        try:
            return self.ring3_memory.load(self.registers.rip, length)
        except GuestException:
            return b""

    def _system_call(self) -> Exit | None:
        run, selectors = self.registers, self._selectors
        self._system_calls += 1
        following = run.system_call(_RING3_FLAGS, IF | FIXED)
        if self._stepping:
            self._drop_trap()
        if run.ring != 3:
            self.deprivileged.set_flat(selectors.code, selectors.stack)
        return self.supervisor.system_call(following)

    def _port_access(self) -> Exit | None:
        """The guest used the port of the stub's: #GP as for all ports.

        Only where ring 0 is emulated.  There KVM does an IN when it is entered next, which is to be over before
        the registers are changed; and an OUT, of one byte or two, has been done.
        """
        run = self.registers
        if self._run_bytes[abi.EXIT_DATA] == abi.IO_OUT:
            try:
                length = 2 if self.ring3_memory.load(run.rip - 2, 2) in (b"\xe6\x00", b"\xe7\x00") else 1
            except GuestException:
                length = 1
            run.rip -= length
        else:
            before = run.save()
            self._incomplete = True
            self._complete()
            run.load(before)
        return self.supervisor.exception(GENERAL_PROTECTION, 0, None)

    # -- accounts -------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        statistics = super().statistics()
        natively = self.native.exceptions()
        exceptions = {
            vector: count
            for vector in range(VECTORS)
            if (count := self._exceptions.get(vector, 0) + natively[vector])
        }
        exits = statistics["exits"] | {"system call": self._system_calls + self.native.calls}
        exits |= {f"exception {vector}": count for vector, count in exceptions.items()}
        statistics["exits"] = dict(sorted(exits.items(), key=lambda item: -item[1]))
        statistics["native helpers"] = {"supervised": self.native.calls + sum(natively)}
        statistics["the stub"] = {
            "runs": self._stub_runs + self.native.stub_runs,
            "entries and tables rewritten": self._rewritten + self.native.rewritten,
        }
        return statistics
