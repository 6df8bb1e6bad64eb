"""The virtual processor of the translation engine: its run loop and what it does about each exit."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from iced_x86 import Code, Instruction, Mnemonic

from trivisor.machine import tsc
from trivisor.machine.cpuid import GuestCpuid, guest_cpuid
from trivisor.machine.deprivileged import NativeSupervision, Supervisor
from trivisor.machine.exits import (
    CpuidExit,
    DebugStop,
    ExceptionExit,
    Exit,
    Halt,
    Kicked,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    Unsupported,
    UserMode,
)
from trivisor.machine.msrs import MsrFile
from trivisor.machine.state import CpuState
from trivisor.machine.vcpu import Surroundings
from trivisor.translation import slow_access, wild_jumps
from trivisor.translation.alarm import Alarm
from trivisor.translation.block_store import BlockStore
from trivisor.translation.block_tables import Block
from trivisor.translation.core import CS, MASK64, RCX, SS, Core
from trivisor.translation.cpuid_table import CpuidTable
from trivisor.translation.emulator import events, system
from trivisor.translation.emulator.contract import UnsupportedFeature, notify
from trivisor.translation.emulator.debug_exceptions import debug_exception
from trivisor.translation.kept_helpers import kept_helpers
from trivisor.translation.layout import EXITS, OFFSETS
from trivisor.translation.mmu import Mmu
from trivisor.translation.modes import MAXIMUM_SEGMENTED, OTHER_DEBUG, OTHER_TSD, Mode
from trivisor.translation.native_code import NativeCode
from trivisor.translation.natives import assembled_helpers
from trivisor.translation.port_gate import PortGate
from trivisor.translation.segmentation import segmentation, set_windows
from trivisor.translation.state_transfer import get_state, set_state
from trivisor.translation.translator.features import decoder_features
from trivisor.translation.translator.instructions import XSAVE_FAMILY
from trivisor.translation.translator.recipe import ALIGNMENT
from trivisor.translation.tuner import Tuner
from trivisor.x86.control import (
    CR0_AM,
    CR0_EM,
    CR0_PG,
    CR0_TS,
    CR4_LA57,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PKE,
    CR4_PKS,
    CR4_TSD,
    DR6_BS,
    EFER_LMA,
    XCR0_AVX,
    XCR0_PKRU,
    XCR0_SSE,
)
from trivisor.x86.cpuid import USUAL_CPU, CpuChoice, host_cpuid, xsave_area
from trivisor.x86.descriptors import DB, LONG
from trivisor.x86.exceptions import ALIGNMENT_CHECK, BREAKPOINT, INVALID_OPCODE, NMI, GuestException
from trivisor.x86.flags import AC, RF, TF
from trivisor.x86.msr import DEBUGCTL_BTF, IA32_APIC_BASE, IA32_DEBUGCTL

CODE_CACHE_SIZE = 64 << 20

_CR0_TS_EM = CR0_TS | CR0_EM
_XCR0_SSE_AVX = XCR0_SSE | XCR0_AVX
_INTEL = 0x756E6547
"""EBX of CPUID leaf 0 of Intel's, where SYSCALL is of 64-bit code alone."""
_SUPERVISED = {Code.SYSCALL: -1, Code.INT_IMM8: -1, Code.INT3: BREAKPOINT}
"""Instructions that are a supervisor's, and their vectors."""

(
    _MODE, _NATIVE_EVENTS, _NATIVE_MSRS, _NATIVE_MMIO, _WATCHING, _OPENED_COUNT, _PENDING, _ARMED, _POLL, _GOOD, _BAD,
    _EXIT_A,
    _EXIT_B, _FAULT_IP, _PORT_QUEUED, _SAMPLE_COUNT, _NATIVE_SUPERVISOR, _GUEST_KERNEL,
) = (
    OFFSETS[name] // 8
    for name in (
        "MODE", "NATIVE_EVENTS", "NATIVE_MSRS", "NATIVE_MMIO", "WATCHING", "OPENED_COUNT", "PENDING", "ARMED", "POLL",
        "POLL_GOOD", "POLL_BAD", "EXIT_A", "EXIT_B", "HOST_FAULT_IP", "PORT_QUEUED",
        "SAMPLE_COUNT", "SUPERVISED", "GUEST_KERNEL",
    )
)  # fmt: skip


def _check_alignment(linear: int, size: int) -> None:
    """Raise #AC for an access by ring 3 that is not aligned."""
    if linear & ALIGNMENT.get(size, 1) - 1:
        raise GuestException(ALIGNMENT_CHECK, 0)


class TranslationVcpu:
    """A virtual x86 processor by binary translation; see `machine.vcpu.Vcpu` for its methods."""

    technique = "translation"
    engine = "binary translation, x86-64 on x86-64"

    def __init__(
        self,
        board: Surroundings,
        choice: CpuChoice = USUAL_CPU,
        cpuid: GuestCpuid | None = None,
        keep_in: Path | None = None,
        supervision: NativeSupervision | None = None,
    ) -> None:
        """The guest sees the processor `cpuid`; without one the best that this host allows, changed by `choice`.

        The native helpers are kept from one process to the next in the directory `keep_in`.
        `supervision` is that of the `supervisor` which the processor will get.
        Raises ValueError for features that cannot be switched so; see `machine.cpuid.guest_cpuid`.
        """
        self.board = board
        self.observed: dict[type, list[Callable[[Any], None]]] = {}
        self.core = Core(board.memory)
        self.guest_cpuid = cpuid or guest_cpuid(
            host_cpuid,
            tsc_frequency=board.tsc_frequency,
            crystal_frequency=board.crystal_frequency,
            apic_id=board.apic_id,
            extra=choice.added,
            without=choice.removed,
            vendor=choice.vendor,
        )
        self.msrs = MsrFile(self.guest_cpuid, tsc_frequency=board.tsc_frequency)
        self.mmu = Mmu(self.core, board.memory, board.mmio, self.guest_cpuid.physical_bits)
        self.mmu.observed = self.observed
        self._words = self.core.words
        self._kicked = False
        self._waiting = False  # an interrupt waits for IF
        self._natively = 0  # what NATIVE_EVENTS is but for single steps
        self._supervision = supervision is not None
        self._may_supervise = False  # a supervisor's native code may serve the mode of now
        self.injected: list[int] = []
        """Vectors that `interrupt` was given and that wait for IF."""
        self.exception: GuestException | None = None
        """One whose delivery another processor had begun: it comes before anything else."""
        self.halted = False
        self._closed = False
        self.supervisor: Supervisor | None = None
        """A hypervisor that does what the architecture would, for a guest that is all in ring 3."""
        self.stop_in_ring_3 = False
        """Another engine runs 64-bit code of ring 3: `run` comes back for it."""
        self.flushes = 0  # of TLBs by Python
        self._wake = threading.Event()
        self._by_key: dict[int, Mode] = {}
        self._modes: dict[tuple[Any, ...], Mode] = {}
        self._segmented = 0  # how many modes have a segmentation
        self._cache_keys = [-1, -1, -1]
        self._counts: dict[str | int, int] = {}
        self._translated_ns = self._idle_ns = 0
        self._python_ns = [0] * (len(EXITS) + 1)
        """By the exit that Python was entered with; 0 is the start of a run."""
        self._left = self._left_by = self._elsewhere = 0
        self._idle_since: int | None = None
        self._running = False
        on_host = self.guest_cpuid.xcr0_on_host
        self.xcr0_supported = on_host | (self.guest_cpuid.xcr0_supported & XCR0_PKRU if on_host else 0)
        self.xsave_size = xsave_area(on_host)
        """Bytes of the components that live in the host's registers while translated code runs."""
        more = ""
        if supervision is not None:
            more = supervision.source
            self._words[OFFSETS["SUPERVISOR_TABLE"] // 8] = supervision.table
        make = assembled_helpers if keep_in is None else partial(kept_helpers, keep_in)
        self._native = native = NativeCode(self.core, on_host, CODE_CACHE_SIZE, make(on_host, more))
        self.mmu.native_walker = native.walk
        self._deliver_interrupt = native.address("external")
        self.blocks = BlockStore(
            self.core, self.mmu, native, decoder_features(self.guest_cpuid.features), self.xsave_size
        )
        self.mmu.on_code_write = self.blocks.written
        self.tuner = Tuner(self.core, self.blocks, self._by_key)
        self._alarm = Alarm(self.core, board.tsc_frequency)
        self.attach()
        self._handlers: dict[int, Callable[[], Exit | None]] = {
            EXITS["EXIT_LOOKUP"]: lambda: wild_jumps.check_target(self),
            EXITS["EXIT_POLL"]: lambda: None,
            EXITS["EXIT_CHAIN"]: self._on_chain,
            EXITS["EXIT_SLOW_ACCESS"]: lambda: slow_access.handle(self),
            EXITS["EXIT_EXCEPTION"]: self._on_exception,
            EXITS["EXIT_CALL_OUT"]: self._on_call_out,
            EXITS["EXIT_HOST_FAULT"]: self._on_host_fault,
            EXITS["EXIT_UNDEFINED"]: self._on_undefined,
            EXITS["EXIT_SEGMENT_FAULT"]: self._on_segment_fault,
            EXITS["EXIT_BREAKPOINT"]: self._on_breakpoint,
            EXITS["EXIT_INTERRUPT"]: self._on_interrupt,
            EXITS["EXIT_SYSTEM_CALL"]: self._on_system_call,
        }
        self._names = {number: name.removeprefix("EXIT_").lower() for name, number in EXITS.items()}
        self._cpuid_table = CpuidTable(self.core, self.guest_cpuid.empty_leaves)
        self._words[OFFSETS["VIRTUAL_APIC"] // 8] = board.virtual_apic.address
        self._ports = PortGate(self.core, board, self.observed)
        self._next: int | None = None  # host address to go on at, instead of looking rip up
        self.state = CpuState()

    @property
    def guest_kernel(self) -> bool:
        """The code that runs is the kernel of a guest that is all in ring 3."""
        return self._words[_GUEST_KERNEL] != 0

    @guest_kernel.setter
    def guest_kernel(self, value: bool) -> None:
        self._words[_GUEST_KERNEL] = int(value)

    def attach(self) -> None:
        board = self.board
        board.clock.on_earlier = self._arm_timer
        board.clock.on_posted = self.attention
        board.interrupts.on_pending = self._look
        board.interrupts.on_nmi = self._nmi
        board.tsc = self.tsc
        self._look()

    def close(self) -> None:
        """Give host resources back; the processor must not be used afterwards."""
        if self._closed:
            return
        self._closed = True
        if self.board.clock.on_earlier == self._arm_timer:  # else another processor has the board by now
            self.board.clock.on_earlier = None
        self._alarm.close()
        self._ports.close()
        self.blocks.close()
        self._native.close()
        self.mmu.close()
        self.core.close()

    # -- state ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> CpuState:
        return get_state(self)

    @state.setter
    def state(self, state: CpuState) -> None:
        set_state(self, state)
        self._native.flush_everything()
        self._cpuid_table.clear()
        self.mode_changed()
        self._next = None
        self._alarm.forget()  # the guest's time may be another
        self._words[_PENDING] = 1

    # -- what sensitive instructions need (translation/contract.py) -----------------------------------------

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        supervisor = self.supervisor
        answer = self.own_cpuid(leaf, subleaf) if supervisor is None else supervisor.cpuid(leaf, subleaf)
        self._cpuid_table.enter(leaf, subleaf, answer)
        return answer

    def own_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """CPUID without a hypervisor's changes."""
        core = self.core
        enabled = True
        if IA32_APIC_BASE in self.board.msrs:
            enabled = bool(self.board.msrs[IA32_APIC_BASE][0]() & 0x800)
        return self.guest_cpuid.query(leaf, subleaf, cr4=core.cr4, xcr0=core.xcr0, apic_enabled=enabled)

    def load(self, linear: int, size: int, *, system: bool = False) -> int:
        if self._aligned and not system:
            _check_alignment(linear, size)
        value = self.mmu.load(linear, size, self.core.cpl == 3 and not system, implicit=system)
        if self.core.debug.pages:
            self.core.debug.accessed(linear, size, write=False)
        return value

    def store(self, linear: int, size: int, value: int, *, system: bool = False) -> None:
        if self._aligned and not system:
            _check_alignment(linear, size)
        self.mmu.store(linear, size, value, self.core.cpl == 3 and not system)
        if self.core.debug.pages:
            self.core.debug.accessed(linear, size, write=True)

    def probe_write(self, linear: int, size: int, *, system: bool = False) -> None:
        self.mmu.probe_write(linear, size, self.core.cpl == 3 and not system)

    def flush_tlb(self, *, keep_global: bool) -> None:
        self.flushes += 1
        if keep_global:
            self._native.flush_local()
        else:
            self._native.flush_everything()

    def invalidate_page(self, linear: int) -> None:
        self.flushes += 1
        self._native.invalidate_page(linear)

    def entry_changed(self, address: int, old: int) -> bool:
        """See `machine.deprivileged.DeprivilegedCpu`."""
        return self._native.entry_changed(self.board.memory.base + address, old) != 0

    def tsc(self) -> int:
        value: int = (tsc.read() + self.core.tsc_offset) & ((1 << 64) - 1)
        return value

    @property
    def tsc_offset(self) -> int:
        return int(self.core.tsc_offset)

    @tsc_offset.setter
    def tsc_offset(self, offset: int) -> None:
        self.core.tsc_offset = offset
        self.board.tsc_changed()

    def mode_changed(self) -> None:
        core = self.core
        segments = core.segments
        cs, ss = segments[CS].attributes, segments[SS].attributes
        cr0, cr4 = core.cr0, core.cr4
        cpl = core.cpl
        long = bool(core.efer & EFER_LMA)
        bits = 64 if long and cs & LONG else 32 if cs & DB else 16
        segmented = None
        if bits != 64:
            set_windows(core)
            segmented = segmentation(core)
        guarded, no_avx = self._guards(bits == 64 and (cpl != 3 or self.guest_kernel))
        aligned = self._aligned = bool(cpl == 3 and cr0 & CR0_AM and core.rflags & AC)
        key = (
            bits, ss & DB, cpl == 3, guarded, no_avx, cr4 & CR4_TSD, bool(core.debug.code), segmented,
            self.guest_kernel, aligned,
        )  # fmt: skip
        mode = self._modes.get(key)
        if mode is None:
            mode = self._modes[key] = Mode(
                bits=bits,
                user=cpl == 3,
                segmentation=segmented,
                guarded=guarded,
                no_avx=no_avx,
                stack_bits=64 if bits == 64 else 32 if ss & DB else 16,
                other=(OTHER_TSD if cr4 & CR4_TSD else 0) | (OTHER_DEBUG if core.debug.code else 0),
                guest_kernel=self.guest_kernel,
                aligned=aligned,
                number=0 if segmented is None and not aligned else self._segmented_number(),
            )
        words = self._words
        core.mode = mode.key
        self._by_key[mode.key] = mode
        number = mode.jump_cache
        words[OFFSETS["JUMP_CACHE_CURRENT"] // 8] = core.address + OFFSETS[f"JUMP_CACHE_{mode.jump_cache_name}"]
        words[OFFSETS["JUMP_CACHE_USED_CURRENT"] // 8] = core.address + OFFSETS["JUMP_CACHE_USED"] + 128 * number
        self._claim_jumps(mode)
        debug = core.debug
        self.blocks.set_breakpoints(debug.code)
        words[_WATCHING] = 1 if debug.pages else 0
        self._cpuid_table.depend(cr4 & (CR4_OSXSAVE | CR4_PKE), core.xcr0, self.supervisor is not None)
        native = core.efer & EFER_LMA and cr0 & CR0_PG and not cr4 & CR4_LA57
        words[OFFSETS["PAGING_NATIVE"] // 8] = 1 if native else 0
        words[OFFSETS["KEYS"] // 8] = 1 if cr4 & (CR4_PKE | CR4_PKS) and long else 0
        words[OFFSETS["KEYS_USER"] // 8] = core.pkru if cr4 & CR4_PKE and long else 0
        words[OFFSETS["KEYS_SUPERVISOR"] // 8] = core.pkrs if cr4 & CR4_PKS and long else 0
        natively = (
            native and mode.bits == 64 and not debug.active and ExceptionExit not in self.observed
            and self.supervisor is None and not aligned
        )  # fmt: skip
        words[_NATIVE_EVENTS] = self._natively = 1 if natively else 0
        if natively:
            self._note_siblings(replace(mode, user=False), replace(mode, user=True))
            self._note_segments()
        self._may_supervise = bool(
            self._supervision and native and mode.bits == 64 and not debug.active and not aligned
        )
        if self._may_supervise:
            self._note_siblings(replace(mode, guest_kernel=True), replace(mode, guest_kernel=False))
        self._mind_observers()
        reserved = ((1 << 52) - 1) & ~((1 << self.guest_cpuid.physical_bits) - 1)
        words[OFFSETS["PHYSICAL_LIMIT_MASK"] // 8] = reserved | (0 if core.efer & 0x800 else 1 << 63)

    def _note_siblings(self, kernel: Mode, user: Mode) -> None:
        """Have the native helpers know the modes of 64-bit kernel and user code."""
        for mode, field in ((kernel, "MODE_KERNEL"), (user, "MODE_USER")):
            guarded, no_avx = self._guards(mode is kernel)
            sibling = replace(mode, guarded=guarded, no_avx=no_avx)
            self._words[OFFSETS[field] // 8] = sibling.key
            self._by_key[sibling.key] = sibling
            self._claim_jumps(sibling)

    def _guards(self, kernel64: bool) -> tuple[bool, bool]:
        """(`Mode.guarded`, `Mode.no_avx`).

        64-bit kernels set CR4.OSFXSR and OSXSAVE when they have run for a while, and use no vectors before: they
        are not asked, lest all that they have run until then be translated again.
        """
        core = self.core
        disabled = bool(core.cr0 & _CR0_TS_EM)
        if kernel64:
            return disabled, disabled
        no_avx = not core.cr4 & CR4_OSXSAVE or ~core.xcr0 & _XCR0_SSE_AVX != 0
        return disabled or not core.cr4 & CR4_OSFXSR, disabled or no_avx

    def _segmented_number(self) -> int:
        """The number of a new mode with segments that are not flat; when they run out, all begin anew."""
        if self._segmented == MAXIMUM_SEGMENTED:
            self._segmented = 0
            self._modes.clear()
            self._by_key.clear()
            self._next = None
            self._cache_keys = [-1, -1, -1]
            self.blocks.forget_modes()
        self._segmented += 1
        return self._segmented - 1

    def _mind_observers(self) -> None:
        """What somebody watches is not done natively."""
        observed = self.observed
        self._words[_NATIVE_MSRS] = 0 if MsrRead in observed or MsrWrite in observed else 1
        self._words[_NATIVE_MMIO] = 0 if MmioRead in observed or MmioWrite in observed else 1
        supervisor = self.supervisor
        natively = supervisor is not None and self._may_supervise and not supervisor.watched()
        self._words[_NATIVE_SUPERVISOR] = 1 if natively and ExceptionExit not in observed else 0
        self._cpuid_table.close(CpuidExit in observed)
        self._ports.look()

    def _claim_jumps(self, mode: Mode) -> None:
        """The mode's jump cache is for it alone from now on."""
        number = mode.jump_cache
        if self._cache_keys[number] != mode.key:
            self._cache_keys[number] = mode.key
            self._native.flush_jumps[number]()

    def _note_segments(self) -> None:
        """Have the native helpers know the flat segments in use now, by selector and descriptor."""
        core, words = self.core, self._words
        fields = (("KNOWN_CS", CS, 0x00A0FB00), ("KNOWN_SS", SS, 0x00C0F300)) if core.cpl == 3 else (
            ("KNOWN_KERNEL_CS", CS, 0x00A09B00),)  # fmt: skip
        for field, index, expected in fields:
            selector = core.segments[index].selector
            at = OFFSETS[f"{field}_SELECTOR"] // 8
            if words[at] == selector:
                continue
            words[at] = MASK64
            try:
                raw = self.load(core.gdtr_base + (selector & 0xFFF8), 8, system=True)
            except GuestException:
                continue
            # flat, present, accessed, of the right kind; the limit of a long code segment does not matter
            flat = raw >> 16 & 0xFFFFFF == 0 and raw >> 56 == 0
            if flat and raw >> 32 & 0x00E0FF00 == expected & 0x00E0FF00 and not selector & 4:
                words[OFFSETS[field] // 8] = raw
                words[at] = selector

    # -- running --------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        self._begin()
        self._alarm.start()
        self._mind_observers()
        self.tuner.start()
        try:
            if self.halted and (exit_ := self._idle()) is not None:
                return exit_
            while (exit_ := self._once(False)) is None:
                pass
            return exit_
        except UnsupportedFeature as missing:
            return Unsupported(str(missing), self.core.linear_rip)
        finally:
            self.tuner.stop()
            self._end()

    def _begin(self) -> None:
        """A run or step begins: time counts from now on."""
        self._left, self._left_by = time.perf_counter_ns(), 0
        self._elsewhere = self.blocks.translating + self._idle_ns
        self._running = True

    def _end(self) -> None:
        """A run or step ends."""
        self._account(time.perf_counter_ns())
        self._running = False

    def step(self) -> Exit:
        self._begin()
        self._mind_observers()
        try:
            if self.halted and (exit_ := self._idle()) is not None:
                return exit_
            exit_ = self._once(True)
        except UnsupportedFeature as missing:
            return Unsupported(str(missing), self.core.linear_rip)
        finally:
            self._end()
        return DebugStop(self.core.linear_rip) if exit_ is None else exit_

    def _once(self, single: bool) -> Exit | None:
        """One turn, with the delivery of the exception that it may end in."""
        try:
            return self._turn(single)
        except GuestException as fault:
            self.core.debug.pending = 0  # what an instruction has hit that then faults, it will hit again
            if self.supervisor is None:
                return events.raise_exception(self, fault)
            if ExceptionExit in self.observed:
                notify(self, ExceptionExit(fault.vector, fault.error_code, fault.address or 0))
            return self._after(self.supervisor.exception(fault.vector, fault.error_code, fault.address))

    def _turn(self, single: bool) -> Exit | None:
        """Serve what waits, then run translated code until it comes back, or one instruction."""
        words, core = self._words, self.core
        if words[_PENDING] or (self._waiting and core.interrupt_flag) or core.nmi_waiting:
            if core.debug.pending and not core.debug.blocked:
                self._next = None
                raise debug_exception(core, core.debug.take())
            if core.interrupt_shadow:
                core.interrupt_shadow = False
                return self._single_step()
            exit_ = self._serve(single or bool(core.rflags & TF))
            if exit_ is not None:
                return exit_
        core.interrupt_shadow = False
        if single or core.rflags & (TF | RF) or core.debug.blocked:
            if single or core.rflags & TF or core.debug.active:
                return self._single_step()
            core.rflags &= ~RF  # there is no breakpoint that it could hold off
        target = self._next
        if target is None:
            if self.stop_in_ring_3 and core.cpl == 3 and core.efer & EFER_LMA and core.segments[CS].attributes & LONG:
                # Nothing is ever translated for this mode, so that every way into it leads here.
                return self._single_step() if core.debug.active else UserMode()
            block = self.blocks.block(self.mode, core.linear_rip)
            target = self._native.cache.base + block.body
        else:
            self._next = None
        return self.handle(self.enter(target))

    def enter(self, target: int) -> int:
        """Run host code at `target` until it leaves; returns the exit's number."""
        if self._words[_OPENED_COUNT] and not self.core.rflags & AC:
            self._native.close_pages()
        started = time.perf_counter_ns()
        self._account(started)
        number = self._native.enter(target)
        self._left = left = time.perf_counter_ns()
        self._translated_ns += left - started
        self._left_by = number
        if self._words[_PORT_QUEUED]:
            self._ports.deliver()
        name = self._names[number]
        self._counts[name] = self._counts.get(name, 0) + 1
        return number

    def _account(self, now: int) -> None:
        """Put the time since translated code was left down to the exit that left it, but for translating and idling."""
        elsewhere = self.blocks.translating + self._idle_ns
        self._python_ns[self._left_by] += now - self._left - (elsewhere - self._elsewhere)
        self._elsewhere = elsewhere

    def enter_step(self, block: Block) -> int:
        """Run a single-step block."""
        self._next = None
        return self.enter(self._native.cache.base + block.body)

    def enter_next(self) -> int:
        """Go on in the middle of an instruction, at `resume_at`'s address."""
        target, self._next = self._next, None
        assert target is not None
        return self.enter(target)

    def handle(self, number: int) -> Exit | None:
        """Act on an exit; raises GuestException for an exception of the guest's that is to be delivered."""
        return self._handlers[number]()

    def count(self, name: str) -> None:
        """Count an event of the Python side."""
        self._counts[name] = self._counts.get(name, 0) + 1

    def _serve(self, single: bool) -> Exit | None:
        """Timers, kicks and interrupts; `single` if one instruction is to follow."""
        words = self._words
        if self.exception is not None:
            fault, self.exception = self.exception, None
            raise fault
        words[_PENDING] = 0
        words[_ARMED] = words[_POLL] = words[_GOOD]
        self._waiting = False
        if words[_SAMPLE_COUNT]:
            self.tuner.look()
        board = self.board
        board.clock.run_due()
        deadline = board.clock.next_deadline()
        if deadline is not None and not self._alarm.is_for(deadline):
            self._arm_timer(deadline)
        if self._kicked or board.stop_reason is not None:
            self._kicked = False
            words[_PENDING] = 1
            return Kicked()
        interrupts, injected = board.interrupts, self.injected
        if self.core.nmi_waiting and not self.core.nmi_blocked:
            self.core.nmi_waiting = False
            self.count("nmi")
            if not single and words[_NATIVE_EVENTS]:
                self.core.nmi_blocked = True
                if injected or interrupts.pending():
                    self._waiting = True
                    words[_ARMED] = words[_BAD]
                return self._take(NMI)
            if (shutdown := self._deliver(NMI)) is not None:
                return shutdown
        if not injected and not interrupts.pending():
            return None
        if self.core.interrupt_flag:
            self.count("interrupt")
            vector = injected.pop(0) if injected else interrupts.acknowledge()
            shutdown = self._deliver(vector) if single else self._take(vector)
            if self.supervisor is not None or shutdown is not None or not (injected or interrupts.pending()):
                return shutdown
        self._waiting = True
        words[_ARMED] = words[_BAD]
        if self.core.interrupt_flag:
            words[_POLL] = words[_BAD]
        return None

    def interrupt(self, vector: int) -> None:
        self.injected.append(vector)
        self._look()

    def _take(self, vector: int) -> Exit | None:
        """Deliver an external interrupt, or an NMI, now."""
        words = self._words
        if words[_NATIVE_EVENTS] or words[_NATIVE_SUPERVISOR]:
            # The next turn enters the helper that delivers it and goes on with the handler.
            words[_EXIT_A] = vector
            self._next = self._deliver_interrupt
            return None
        return self._deliver(vector)

    def _on_interrupt(self) -> Exit | None:
        return self._deliver(self._words[_EXIT_A])

    def _deliver(self, vector: int) -> Exit | None:
        """The same, by Python."""
        self._next = None
        if self.supervisor is not None:
            return self.supervisor.interrupt()
        try:
            events.deliver(self, vector, external=True)
        except GuestException as fault:
            return events.raise_exception(self, fault)
        return None

    def _arm_timer(self, deadline: int) -> None:
        if not self._alarm.set(deadline, deadline - self.board.clock.now()):
            words = self._words
            words[_PENDING] = 1
            words[_ARMED] = words[_POLL] = words[_BAD]

    def kick(self) -> None:
        self._kicked = True
        self.attention()

    def _look(self) -> None:
        """Have the run loop look at the interrupts; from its own thread."""
        self._words[_PENDING] = 1

    def _nmi(self) -> None:
        """A non-maskable interrupt has come; from the run loop's own thread."""
        self.core.nmi_waiting = True
        self._look()

    def attention(self) -> None:
        """Have the run loop look at timers and interrupts soon; from any thread."""
        words = self._words
        words[_PENDING] = 1
        words[_ARMED] = words[_BAD]
        words[_POLL] = words[_BAD]
        self._wake.set()

    def _idle(self) -> Exit | None:
        """HLT with interrupts on: sleep until one comes.  A kick does not end it: the next run sleeps on."""
        self._idle_since = started = time.perf_counter_ns()
        clock, words = self.board.clock, self._words
        self.halted = True
        self.tuner.pause()
        try:
            while True:
                words[_PENDING] = 0
                clock.run_due()
                wanted = self.injected or self.board.interrupts.pending()
                if wanted or (self.core.nmi_waiting and not self.core.nmi_blocked):
                    self.halted = False
                    words[_PENDING] = 1
                    return None
                if self._kicked or self.board.stop_reason is not None:
                    self._kicked = False
                    words[_PENDING] = 1
                    return Kicked()
                deadline = clock.next_deadline()
                self._wake.clear()
                if words[_PENDING]:
                    continue
                wait = None if deadline is None else max(0, deadline - clock.now()) / 1e9
                self._wake.wait(wait)
        finally:
            self.tuner.go_on()
            self._idle_ns += time.perf_counter_ns() - started
            self._idle_since = None

    def _single_step(self) -> Exit | None:
        """One instruction, and the debug trap that TF asks for."""
        core, debug = self.core, self.core.debug
        blocked, debug.blocked = debug.blocked, False
        flags = core.rflags
        start = core.linear_rip
        if debug.code and not (flags & RF or blocked) and (bits := debug.code.get(start)):
            raise debug_exception(core, bits)
        core.rflags = flags & ~RF
        debug.step_trap = bool(flags & TF)
        words = self._words
        words[_NATIVE_EVENTS] = words[_NATIVE_SUPERVISOR] = 0  # the helpers would go on with the handler
        try:
            exit_ = slow_access.step(self, [])
        finally:
            words[_NATIVE_EVENTS] = self._natively
            self._mind_observers()
        if debug.step_trap and not (self._steps_branches and self._ran_on(start)):
            debug.pending |= DR6_BS
        if exit_ is None and debug.pending and not debug.blocked:
            if core.linear_rip == start and self.blocks.instruction(self.mode, start).has_rep_prefix:
                core.rflags |= RF  # the rest of it is not to strike a breakpoint once more
            raise debug_exception(core, debug.take())
        return exit_

    @property
    def _steps_branches(self) -> bool:
        """TF traps after taken branches only (DEBUGCTL.BTF)."""
        return bool(self.msrs.values[IA32_DEBUGCTL] & DEBUGCTL_BTF)

    def _ran_on(self, start: int) -> bool:
        """Whether the instruction at `start` led to the one after it, and not elsewhere."""
        length: int = self.blocks.instruction(self.mode, start).len
        return bool(self.core.linear_rip == start + length)

    def _on_breakpoint(self) -> Exit | None:
        core = self.core
        raise debug_exception(core, core.debug.code[core.linear_rip])

    # -- exits ----------------------------------------------------------------------------------------------

    def _on_chain(self) -> Exit | None:
        target = self.blocks.follow(self.mode, self._words[_EXIT_A])
        self._next = self._native.cache.base + target.polled
        return None

    def _on_exception(self) -> Exit | None:
        words = self._words
        vector, error = words[_EXIT_A], words[_EXIT_B]
        raise GuestException(vector, None if error >> 63 else error, self.core.cr2 if vector == 14 else None)

    def _on_segment_fault(self) -> Exit | None:
        raise slow_access.first_fault(self, GuestException(self._words[_EXIT_A], 0))

    def _on_system_call(self) -> Exit | None:
        assert self.supervisor is not None
        self._counts[Mnemonic.SYSCALL] = self._counts.get(Mnemonic.SYSCALL, 0) + 1
        return self._after_supervisor(self.supervisor.system_call(self.core.linear_rip + 2))

    def _on_call_out(self) -> Exit | None:
        instruction = self.blocks.instruction(self.mode, self.core.linear_rip)
        return self.execute(instruction)

    def execute(self, instruction: Instruction) -> Exit | None:
        """Do a sensitive instruction in Python."""
        self._counts[instruction.mnemonic] = self._counts.get(instruction.mnemonic, 0) + 1
        supervisor = self.supervisor
        if supervisor is not None and instruction.code in _SUPERVISED:
            if instruction.code == Code.SYSCALL:
                if self.mode.bits != 64 and self.own_cpuid(0, 0)[1] == _INTEL:
                    raise GuestException(INVALID_OPCODE)
                return self._after_supervisor(supervisor.system_call(instruction.next_ip))
            vector = _SUPERVISED[instruction.code]
            if vector < 0:
                vector = instruction.immediate8
            return self._after_supervisor(supervisor.software_interrupt(vector, instruction.next_ip))
        result = system.execute(self, instruction)
        if instruction.mnemonic == Mnemonic.WRMSR and self.core.regs[RCX] & 0xFFFFFFFF == IA32_APIC_BASE:
            self._cpuid_table.clear()
        return self._after(result)

    def _after_supervisor(self, result: Exit | None) -> Exit | None:
        """The same of one that led to a supervisor: a #DB that MOV SS held up struck there, who takes no notice."""
        self.core.debug.pending = 0
        return self._after(result)

    def _after(self, result: Exit | None) -> Exit | None:
        """What comes of an instruction that Python or a supervisor did."""
        debug = self.core.debug
        if debug.pending:
            self._words[_PENDING] = 1
        if isinstance(result, Halt):
            if debug.step_trap and not self._steps_branches:
                return None  # the trap ends the halt
            return self._idle() if result.interrupts_enabled else result
        if self.board.stop_reason is not None:
            return Kicked()
        return result

    def _on_undefined(self) -> Exit | None:
        instruction = self.blocks.instruction(self.mode, self.core.linear_rip)
        return Unsupported(str(instruction), self.core.linear_rip)

    def _on_host_fault(self) -> Exit | None:
        words, core = self._words, self.core
        host = words[_FAULT_IP]
        number = words[OFFSETS["HOST_FAULT_SIGNAL"] // 8]
        address = words[OFFSETS["HOST_FAULT_ADDRESS"] // 8]
        block = self.blocks.at_host(host)
        if block is None:
            raise RuntimeError(f"host signal {number} at {host:#x}, outside every block")
        self._locate(block, host)
        if address == self._native.unreadable:
            words[_POLL] = words[_GOOD]
            self._counts["poll"] = self._counts.get("poll", 0) + 1
            return None
        instruction = self.blocks.instruction(self.mode, core.linear_rip)
        if instruction.mnemonic in XSAVE_FAMILY:
            core.regs[0] = words[OFFSETS["SPILL"] // 8]
            core.regs[2] = words[OFFSETS["SPILL_2"] // 8]
        if number == signal.SIGFPE:
            if instruction.mnemonic in (Mnemonic.DIV, Mnemonic.IDIV):
                raise GuestException(0)
            # A pending x87 exception is also raised by MMX instructions, so ask the host which it was.
            if words[OFFSETS["HOST_FAULT_CODE"] // 8] == 16:
                raise GuestException(16)
            raise GuestException(19 if core.cr4 & CR4_OSXMMEXCPT else 6)
        if number == signal.SIGILL:
            return Unsupported(f"{instruction} (this host refuses it)", core.linear_rip)
        if number == signal.SIGSEGV:
            raise GuestException(13, 0)
        raise OSError(f"host signal {number} while running {instruction} at {core.linear_rip:#x}: out of memory?")

    def _locate(self, block: Block, host: int) -> None:
        """Set rip and flags to where host code at `host` stands for."""
        core, words = self.core, self._words
        rip, parked = self.blocks.locate(block, host)
        core.linear_rip = rip
        if parked:
            parked_flags = words[OFFSETS["FLAGS_AX"] // 8]
            flags = parked_flags >> 8 & 0xD5 | (0x800 if parked_flags & 1 else 0)
            words[OFFSETS["FLAGS"] // 8] = words[OFFSETS["FLAGS"] // 8] & 0x400 | flags

    # -- the rest of the protocol ---------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """The translation mode of the code at rip."""
        return self._by_key[self._words[_MODE]]

    def resume_at(self, host: int) -> None:
        """Go on at a host address, in the middle of an instruction."""
        self._next = host

    def helpers(self) -> Iterator[tuple[int, int, str]]:
        """(host address, bytes, label) of the native helpers' pieces."""
        return self._native.helpers()

    def last_block(self) -> tuple[int, int] | None:
        return self.blocks.around(self.mode, self.core.linear_rip)

    def memory_written(self, address: int, length: int) -> None:
        self.blocks.written(address, length)

    def statistics(self) -> dict[str, Any]:
        words = self._words
        blocks = self.blocks
        names = {number: name for name, number in vars(Mnemonic).items() if isinstance(number, int)}
        exits = {k: v for k, v in self._counts.items() if isinstance(k, str)}
        instructions = {names[k].lower(): v for k, v in self._counts.items() if isinstance(k, int)}
        native = {
            name.removeprefix("COUNT_").lower(): words[at // 8]
            for name, at in OFFSETS.items()
            if name.startswith("COUNT_")
        }
        return {
            "exits": dict(sorted(exits.items(), key=lambda item: -item[1])),
            "instructions done by Python": dict(sorted(instructions.items(), key=lambda item: -item[1])),
            "native helpers": native,
            "translation": {
                "instructions": blocks.instructions,
                "blocks": blocks.made,
                "tuned blocks": blocks.tuned,
                "recipes": blocks.translator.recipes_made,
                "invalidated": blocks.invalidated,
                "code cache flushes": blocks.flushes,
                "code cache bytes": self._native.cache.used,
            },
            **self._times(),
        }

    def _times(self) -> dict[str, dict[str, float]]:
        """Where the time went: in all, and what Python had of it by the exit that it served.

        How the native part divides between translated code and helpers is estimated by the tuner's samples.
        """
        now = time.perf_counter_ns()
        idle = self._idle_ns + (now - self._idle_since if self._idle_since is not None else 0)
        if self._running and self._idle_since is None:
            self._account(now)
            self._left = now
        code, helpers = (self._words[OFFSETS[name] // 8] for name in ("SAMPLED_CODE", "SAMPLED_HELPERS"))
        in_helpers = self._translated_ns * helpers // (code + helpers) if code + helpers else 0
        python = {self._names.get(number, "start"): ns for number, ns in enumerate(self._python_ns) if ns}
        return {
            "seconds": {
                "translated code": (self._translated_ns - in_helpers) / 1e9,
                "native helpers": in_helpers / 1e9,
                "python": sum(python.values()) / 1e9,
                "translating": self.blocks.translating / 1e9,
                "idle": idle / 1e9,
            },
            "seconds of python by exit": {
                name: ns / 1e9 for name, ns in sorted(python.items(), key=lambda item: -item[1])
            },
            "microseconds of python an exit": {
                name: ns / 1e3 / self._counts[name]
                for name, ns in sorted(python.items(), key=lambda item: -item[1])
                if self._counts.get(name)
            },
        }
