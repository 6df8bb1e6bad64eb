"""A guest on a KVM that emulates ring 0: ring 3 runs under KVM, at the host processor's speed, ring 0 elsewhere.

Such a KVM (kvm-pvm) takes about a microsecond for an instruction of ring 0,
gives up on some, and leaves the processor in ring 3 at a guest's SYSCALL.  So
another engine's processor, a `RingZero`, has ring 0, and also what little ring 3
cannot have natively; this one runs 64-bit ring 3.

It wants back whatever leads to ring 0.  An interrupt descriptor table of no
length makes a triple fault of every exception there, which KVM reports with
the registers as they were at the instruction; and SYSCALL leads to an address
that nothing is mapped at.  The other processor then runs that one instruction
again, from before it, and so goes into ring 0 as the architecture says.

Programs see AVX-512 where the host has it, whatever they are told, and the other
processor has none of it.  So the guest is told of no more than has its kernel
keep their registers, and at such an instruction of theirs KVM's word is taken
for what exception it made.
"""

from __future__ import annotations

import errno
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.cpu import KvmVcpu
from trivisor.hardware.kvm.guest_cpuid import check_avx512, shown_cpuid
from trivisor.hardware.kvm.state_transfer import kvm_segment
from trivisor.hardware.kvm.system import KvmUnavailable, System
from trivisor.machine.cpuid import GuestCpuid
from trivisor.machine.exits import DebugStop, Exit, Kicked, Unsupported, UserMode
from trivisor.machine.memory import GuestMemoryError
from trivisor.machine.ring_zero import Controls, RingZero, UserRegisters
from trivisor.machine.state import CpuState, Segment
from trivisor.machine.vcpu import Surroundings, Vcpu
from trivisor.x86 import LONGEST_INSTRUCTION, msr
from trivisor.x86.control import CR0_EM, CR0_TS, CR4_TSD, DR6_BS, EFER_SCE, XCR0_AVX512
from trivisor.x86.cpuid import USUAL_CPU, CpuChoice, host_xgetbv
from trivisor.x86.exceptions import BREAKPOINT, DEBUG, PAGE_FAULT, GuestException
from trivisor.x86.flags import RF, TF
from trivisor.x86.paging import Access, PagingMode, walk

_REGS: Final = struct.Struct("<18Q")
_TO_KVM: Final = (0, 3, 1, 2, 6, 7, 4, 5, *range(8, 16))
"""Encoding number of the general register at each place of `kvm_regs`; `_FROM_KVM` is the other way."""
_FROM_KVM: Final = tuple(_TO_KVM.index(number) for number in range(16))
_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs")
_CS, _SS = 1, 2
_SLOTS: Final = (*range(256, 512), *range(1, 256))
"""Entries of the level-4 table, the kernel's half first."""
_FLAT_DATA: Final = 0xC0F3
"""What is behind a data selector of ring 3 in 64-bit mode, as far as anybody looks at it there."""
_PRESENT: Final = 1
_FRAME: Final = (1 << 52) - (1 << 12)
_SYSCALL_LENGTH: Final = 2
_TOLD: Final = frozenset({"avx512f"})
_EVEX: Final = 0x62
_PREFIXES: Final = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67})
"""What may stand before an EVEX prefix: segments, and the other address size (SDM 2A 2.7.2)."""
_NONE: Final = 255
"""What stands for no exception before there is one."""
_EXCEPTIONS: Final = {
    _NONE: "no exception", 0: "divide error", 3: "breakpoint", 6: "invalid opcode", 13: "general protection",
    14: "page fault",
}  # fmt: skip
_WINDOW: Final = abi.RunHeader.request_interrupt_window.offset
_IMMEDIATE_EXIT: Final = abi.RunHeader.immediate_exit.offset


class SplitVcpu(KvmVcpu):
    """See `machine.vcpu.Vcpu`.  The state is the other processor's but for the time that KVM runs.

    Raises `KvmUnavailable`.
    """

    def __init__(
        self,
        board: Surroundings,
        choice: CpuChoice = USUAL_CPU,
        cpuid: GuestCpuid | None = None,
        *,
        ring_zero: Callable[[GuestCpuid], RingZero],
    ) -> None:
        self._zero: RingZero | None = None
        with System() as system:
            system.require()
            here = shown_cpuid(system, board, choice, _TOLD)
        if cpuid is not None:
            check_avx512(cpuid, here)
        super().__init__(board, choice, cpuid or here)
        try:
            self._vm.watch_writes()
            self._zero = zero = ring_zero(self.guest_cpuid)
        except OSError as error:
            self.close()
            raise KvmUnavailable(f"KVM keeps no log of what a guest writes: {error.strerror}") from None
        except BaseException:
            self.close()
            raise
        self._other = zero.vcpu
        self.observed = self._other.observed
        self.engine = "the host's KVM for ring 3, and translation for ring 0, which this KVM only emulates"
        self._shows_avx512 = bool(host_xgetbv() & XCR0_AVX512)
        self._left_by: Counter[str] = Counter()
        self._flushes = self._forgotten = 0
        self._stepped = 0
        self._ring_3_ns = 0
        self._slot = 256  # of the level-4 table, where nothing is mapped
        self._trap = self._set_trap()
        self._sregs = self.handle.get(abi.GET_SREGS, abi.SpecialRegs)
        self._sregs.idt = abi.DescriptorTable(0, 0)
        self._sregs.tr = kvm_segment(Segment(0, 0, 0, 0x8B))  # and so without a bitmap of ports
        self._no_events = abi.VcpuEvents()
        self._no_events.exception.nr = _NONE
        self._loaded: list[Segment | None] = [None] * 6
        self._xcr0 = -1
        self.attach()
        self._other.state = CpuState()

    def attach(self) -> None:
        if self._zero is None:
            super().attach()
            return
        self._other.attach()
        clock = self.board.clock
        others = clock.on_posted

        def posted() -> None:
            others()
            self._wake_up()

        clock.on_posted = posted

    def close(self) -> None:
        if not self._closed and self._zero is not None:
            self._other.close()
        super().close()

    @property
    def ring_zero(self) -> Vcpu:
        """The processor that runs ring 0."""
        return self._other

    @property
    def state(self) -> CpuState:
        return super().state if self._zero is None else self._other.state

    @state.setter
    def state(self, state: CpuState) -> None:
        if self._zero is None:
            KvmVcpu.state.fset(self, state)  # type: ignore[attr-defined]
            return
        self._other.state = state
        self._flushes = -1

    @property
    def tsc_offset(self) -> int:
        return self._tsc_offset if self._zero is None else self._other.tsc_offset

    @tsc_offset.setter
    def tsc_offset(self, offset: int) -> None:
        if self._zero is None:
            self._tsc_offset = offset
        else:
            self._other.tsc_offset = offset

    # -- running --------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        started = time.perf_counter_ns()
        self._begin()
        try:
            while True:
                exit_: Exit | None = self._other.run()
                if isinstance(exit_, UserMode):
                    exit_ = self._ring_3()
                if exit_ is not None:
                    self._kicked = False
                    return exit_
        finally:
            self._end()
            self._total_ns += time.perf_counter_ns() - started

    def step(self) -> Exit:
        return self._other.step()

    def interrupt(self, vector: int) -> None:
        self._other.interrupt(vector)

    def kick(self) -> None:
        with self._kick_lock:
            super().kick()
            if not self._closed and self._zero is not None:
                self._other.kick()

    def memory_written(self, address: int, length: int) -> None:
        self._other.memory_written(address, length)
        self._flushes = -1  # there may be page tables in it

    def _ring_3(self) -> Exit | None:
        """Run ring 3 until it wants ring 0, or an exit comes of it."""
        zero = self._zero
        assert zero is not None
        controls, user = zero.controls, zero.user
        if not self._suits(controls, user):
            self._stepped += 1
            return _unless_done(self._other.step())
        self._enter(zero, controls, user)
        started = time.perf_counter_ns()
        try:
            cause, exit_ = self._until_ring_0(zero)
        finally:
            self._ring_3_ns += time.perf_counter_ns() - started
        self._left_by[cause] += 1
        trapped = self._leave(zero, user, cause == "exception")
        for page in self._vm.written_pages():
            self._other.memory_written(page, 4096)
        if trapped is not None:
            self._raise_debug_exception(trapped)
        elif cause == "exception" and self._is_avx512(zero, controls):
            self._raise_kvms_exception()
        elif cause in ("exception", "given up by KVM"):
            return _unless_done(self._other.step())
        return exit_

    def _suits(self, controls: Controls, user: UserRegisters) -> bool:
        """Whether the host's processor does for ring 3 what the guest's would: it knows none of these."""
        return not (
            controls.cr0 & (CR0_TS | CR0_EM)
            or controls.cr4 & CR4_TSD
            or not controls.efer & EFER_SCE
            or user.rflags & TF
            or self._other.tsc_offset
            or not self._find_slot(controls.cr3 & _FRAME)
        )

    def _until_ring_0(self, zero: RingZero) -> tuple[str, Exit | None]:
        """(What ended it, an exit)."""
        run_bytes, board = self._run_bytes, self.board
        while True:
            run_bytes[_IMMEDIATE_EXIT] = 0  # a kick from now on either is seen below or sets it again
            board.clock.run_due()
            if self._kicked or board.stop_reason is not None:
                self._complete()
                return "kick", Kicked()
            waits = zero.interrupt_waits
            if waits and zero.interrupt_flag:
                self._complete()
                return "interrupt", None
            run_bytes[_WINDOW] = waits
            deadline = board.clock.next_deadline()
            if deadline is not None:
                self._on_earlier(deadline)
            try:
                self.handle.control(abi.RUN)
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    raise
                self._incomplete = False
                self._take_signals()
                self._count("signal")
                continue
            reason = self.handle.header.exit_reason
            name = abi.EXIT_NAMES.get(reason, str(reason))
            self._count(name)
            if reason == abi.EXIT_SHUTDOWN:
                return "exception", None
            if reason == abi.EXIT_INTERNAL_ERROR:
                return "given up by KVM", None
            self._incomplete = reason in (abi.EXIT_IO, abi.EXIT_MMIO)
            if self._incomplete:
                self._handlers[reason]()
            elif reason not in (abi.EXIT_IRQ_WINDOW_OPEN, abi.EXIT_INTR):
                return name, Unsupported(f"KVM exit {name}", self.handle.get(abi.GET_REGS, abi.Regs).rip)

    # -- registers ------------------------------------------------------------------------------------------

    def _enter(self, zero: RingZero, controls: Controls, user: UserRegisters) -> None:
        """Load KVM's processor with what ring 3 works on."""
        handle, sregs = self.handle, self._sregs
        flushes = zero.tlb_flushes
        if flushes != self._flushes:
            self._flushes = flushes
            self._forgotten += 1
            self._vm.forget_mappings()
        for number, segment in enumerate(user.segments):
            if segment != self._loaded[number]:
                self._loaded[number] = segment
                setattr(sregs, _NAMES[number], kvm_segment(segment))
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = controls.cr0, controls.cr3, controls.cr4, controls.efer
        handle.control(abi.SET_SREGS, sregs)
        values = [user.gpr[number] for number in _TO_KVM]
        handle.control(abi.SET_REGS, bytearray(_REGS.pack(*values, user.rip, user.rflags & ~RF)))
        if controls.xcr0 != self._xcr0:
            self._xcr0 = controls.xcr0
            xcrs = abi.Xcrs(nr_xcrs=1)
            xcrs.xcrs[0].value = controls.xcr0
            handle.control(abi.SET_XCRS, xcrs)
        handle.control(abi.SET_VCPU_EVENTS, self._no_events)
        handle.control(abi.SET_XSAVE, bytearray(user.xsave.ljust(4096, b"\0")))

    def _leave(self, zero: RingZero, user: UserRegisters, fault: bool) -> int | None:
        """Give the registers back, as they are before the instruction that made a `fault`.

        After a debug trap, which comes behind its instruction, the bits of DR6 that it sets.
        """
        trapped = None
        handle = self.handle
        raw = bytearray(_REGS.size)
        handle.control(abi.GET_REGS, raw)
        values = _REGS.unpack(raw)
        gpr = [values[at] for at in _FROM_KVM]
        rip, rflags = values[16], values[17] & ~RF
        if rip == self._trap:
            self._count("system call")
            rip, rflags = gpr[1] - _SYSCALL_LENGTH, gpr[11] & ~RF
        elif fault:
            vector = handle.get(abi.GET_VCPU_EVENTS, abi.VcpuEvents).exception.nr
            self._count(_EXCEPTIONS.get(vector, f"exception {vector}"))
            if vector == BREAKPOINT:  # a trap: it stands after INT3
                rip -= 1
            elif vector == DEBUG:
                trapped = DR6_BS if rflags & TF else 0
        sregs = handle.get(abi.GET_SREGS, abi.SpecialRegs)
        segments = list(user.segments)
        for number, name in enumerate(_NAMES):
            if number in (_CS, _SS):
                continue
            now, before = getattr(sregs, name), segments[number]
            if now.selector != before.selector:
                attributes = _FLAT_DATA if now.selector & ~3 else 0
                segments[number] = Segment(now.selector, now.base, 0xFFFFFFFF, attributes)
            elif now.base != before.base:
                segments[number] = Segment(before.selector, now.base, before.limit, before.attributes)
        area = bytearray(4096)
        handle.control(abi.GET_XSAVE, area)
        zero.user = UserRegisters(gpr, rip, rflags, segments, bytes(area[: len(user.xsave)]))
        return trapped

    def _raise_debug_exception(self, bits: int) -> None:
        """Have the other processor begin with #DB, after a single step or INT1."""
        state = self._other.state
        state.dr[6] |= bits
        self._begin_with(state, DEBUG, None)

    def _is_avx512(self, zero: RingZero, controls: Controls) -> bool:
        """Whether the instruction is one that the other processor does not have, with an EVEX prefix."""
        if not self._shows_avx512:
            return False
        paging = PagingMode.from_registers(
            controls.cr0, controls.cr3, controls.cr4, controls.efer, physical_bits=self.guest_cpuid.physical_bits
        )
        memory, rip = self.board.memory, zero.user.rip
        for address in range(rip, rip + LONGEST_INSTRUCTION):
            try:
                found = walk(memory, paging, address, Access.EXECUTE, user=True, set_bits=False)
                (byte,) = memory.read(found.physical, 1)
            except (GuestException, GuestMemoryError):
                return False
            if byte not in _PREFIXES:
                return byte == _EVEX
        return False

    def _raise_kvms_exception(self) -> None:
        """Have the other processor begin with the exception that KVM could not deliver."""
        found = self.handle.get(abi.GET_VCPU_EVENTS, abi.VcpuEvents).exception
        state = self._other.state
        if found.nr == PAGE_FAULT:
            state.cr2 = self.handle.get(abi.GET_SREGS, abi.SpecialRegs).cr2
        self._begin_with(state, found.nr, found.error_code if found.has_error_code else None)

    def _begin_with(self, state: CpuState, vector: int, error_code: int | None) -> None:
        """Have the other processor go on in `state` with an exception; its time-stamp counter goes on by itself."""
        del state.msrs[msr.IA32_TIME_STAMP_COUNTER]
        state.exception_pending = (vector, error_code)
        self._other.state = state

    def _find_slot(self, table: int) -> bool:
        """Have SYSCALL lead where the level-4 table has nothing; whether there is such a place."""
        memory = self.board.memory
        if not memory.is_ram(table, 4096):
            return False
        entries = memory.view[table : table + 4096].cast("Q")
        if entries[self._slot] & _PRESENT:
            free = next((slot for slot in _SLOTS if not entries[slot] & _PRESENT), None)
            if free is None:
                return False
            self._slot = free
            self._trap = self._set_trap()
        return True

    def _set_trap(self) -> int:
        """Have SYSCALL lead there; the address."""
        address = self._slot << 39 | (0xFFFF << 48 if self._slot >= 256 else 0)
        self.handle.set_msrs({msr.IA32_LSTAR: address})
        return address

    def statistics(self) -> dict[str, Any]:
        python = self._total_ns - self._ring_3_ns
        other = self._other.statistics()
        return {
            "exits": dict(sorted(self._counts.items(), key=lambda item: -item[1])),
            "ring 3 left by": dict(self._left_by.most_common()),
            "entries into ring 3": {
                "by translation, one instruction": self._stepped,
                "after a look at the page tables anew": self._forgotten,
            },
            "seconds": {"ring 3": self._ring_3_ns / 1e9, "ring 0 and crossings": python / 1e9},
            "of ring 0": other,
        }


def _unless_done(exit_: Exit) -> Exit | None:
    """What a step came to; None when it was just done."""
    return None if isinstance(exit_, DebugStop) else exit_
