"""Running a case on the translation engine: a small guest in long mode with the same linear addresses."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from struct import unpack_from

from trivisor.insight.differential.case import (
    CODE_DATA,
    CODE_DATA_SIZE,
    CODE_FAR,
    CODE_NEAR,
    DATA,
    DEVICE_PAGE,
    FPU_SIZE,
    PAGE,
    READ_ONLY,
    Case,
    Layout,
    Result,
    Skipped,
    State,
)
from trivisor.insight.differential.segments import FLAT, LOCAL
from trivisor.machine.bus import Bus
from trivisor.machine.clock import Clock
from trivisor.machine.exits import DebugStop, Exit, Halt, Unsupported
from trivisor.machine.fast_ports import FastPorts
from trivisor.machine.interrupts import InterruptController
from trivisor.machine.memory import MIB, GuestMemory
from trivisor.machine.state import SEGMENT_NAMES, CpuState, Segment, Table
from trivisor.machine.vcpu import MsrHandler
from trivisor.machine.virtual_apic import VirtualApic
from trivisor.translation.cpu import TranslationVcpu
from trivisor.translation.layout import OFFSETS
from trivisor.x86.descriptors import DPL

KERNEL = 0xFFFF800000000000
"""Where the guest's kernel sees the first 2 MiB of physical memory."""
_IDT, _TSS, _HANDLERS, _STACK_TOP, _GDT, _LDT = 0x2000, 0x3000, 0x4000, 0x7000, 0x8000, 0x9000
_TABLES, _DEVICE_TABLES = 0x10000, 0x30000
_DEVICE_FRAME = 0xFE000000
_DATA_FRAMES = (0x400000, 0x640000, 0x410000, 0x500000)
_CODE_FRAMES = {CODE_NEAR: (0x700000, 0x722000), CODE_FAR: (0x810000, 0x804000)}
_UD2 = b"\x0f\x0b"
_FPU = OFFSETS["FPU"]
_PATIENCE = 4.0
"""Seconds of the processor's time that a run may take; _LOOK seconds lie between two looks at it."""
_LOOK = 1.0
_PRESENT, _WRITABLE, _USER, _LARGE = 1, 2, 4, 0x80
_WITH_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17, 21}
_FRAME_FLAGS = 0x244DD5
"""Of RFLAGS in the handler's frame: arithmetic, DF, IF, NT, AC, ID."""


class _NoInterrupts:
    """Interrupt controllers that never have any."""

    def __init__(self) -> None:
        self.on_pending: Callable[[], None] = lambda: None
        self.on_nmi: Callable[[], None] = lambda: None
        self.cr8 = 0

    def pending(self) -> bool:
        return False

    def acknowledge(self) -> int:
        return 0xFF


class _Board:
    """A processor's surroundings with memory and nothing else."""

    def __init__(self) -> None:
        self.memory = GuestMemory(16 * MIB)
        self.ports = Bus("ports")
        self.fast_ports = FastPorts()
        self.virtual_apic = VirtualApic()
        self.mmio = Bus("mmio")
        self.clock = Clock()
        self.interrupts: InterruptController = _NoInterrupts()
        self.msrs: dict[int, MsrHandler] = {}
        self.apic_id = 0
        self.tsc_frequency = 1_000_000_000
        self.crystal_frequency = 25_000_000
        self.stop_reason: object | None = None
        self.tsc: Callable[[], int] = lambda: 0

    def tsc_changed(self) -> None:
        """There is no timer that would want to know."""


class _Device:
    """A page of registers that remember what is written to them."""

    def __init__(self) -> None:
        self.content = bytearray(PAGE)

    def read(self, offset: int, size: int) -> int:
        """Read `size` bytes."""
        return int.from_bytes(self.content[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes."""
        self.content[offset : offset + size] = value.to_bytes(size, "little")


class _PageTables:
    """Builds 4-level page tables in guest memory."""

    def __init__(self, memory: GuestMemory, root: int) -> None:
        self.memory = memory
        self.root = root
        self._free = root + PAGE

    def map(self, linear: int, physical: int, flags: int) -> None:
        """Map a 4 KiB page, or with `_LARGE` one of 2 MiB."""
        table = self.root
        for shift in (39, 30) if flags & _LARGE else (39, 30, 21):
            entry = table + (linear >> shift & 0x1FF) * 8
            if not self.memory.read_u64(entry):
                self.memory.write_u64(entry, self._free | _PRESENT | _WRITABLE | _USER)
                self._free += PAGE
            table = self.memory.read_u64(entry) & ~0xFFF
        shift = 21 if flags & _LARGE else 12
        self.memory.write_u64(table + (linear >> shift & 0x1FF) * 8, physical | flags | _PRESENT)


class _Watch(threading.Thread):
    """Kicks a processor that is at one and the same run for long."""

    def __init__(self, vcpu: TranslationVcpu) -> None:
        super().__init__(daemon=True)
        self.vcpu = vcpu
        self.runs = 0
        """To be counted up with each run."""
        self._closed = threading.Event()
        self.start()

    def run(self) -> None:
        seen, since = -1, 0.0
        while not self._closed.wait(_LOOK):
            now = time.process_time()
            if self.runs != seen:
                seen, since = self.runs, now
            elif now - since > _PATIENCE:
                self.vcpu.kick()

    def close(self) -> None:
        self._closed.set()
        self.join()


class TranslatedGuest:
    """One virtual processor, used for many cases."""

    def __init__(self) -> None:
        self.board = _Board()
        memory = self.memory = self.board.memory
        self.device = _Device()
        self.board.mmio.attach(_DEVICE_FRAME, PAGE, self.device)
        self._map_all(_TABLES, _DATA_FRAMES)
        self._map_all(_DEVICE_TABLES, [*_DATA_FRAMES[:DEVICE_PAGE], _DEVICE_FRAME, *_DATA_FRAMES[DEVICE_PAGE + 1 :]])
        for vector in range(32):
            handler = KERNEL + _HANDLERS + 16 * vector
            memory.write_u8(_HANDLERS + 16 * vector, 0xF4)  # hlt
            low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
            gate = low | 8 << 16 | 1 << 32 | 0xEE << 40 | middle << 48
            memory.write_u64(_IDT + 16 * vector, gate)
            memory.write_u64(_IDT + 16 * vector + 8, high)
        for number, descriptor in enumerate((0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)):
            memory.write_u64(_GDT + 8 * number, descriptor)
        for selector, flat in FLAT.items():
            memory.write_u64(_GDT + (selector & ~7), flat.raw)
        for local in LOCAL:
            memory.write_u64(_LDT + (local.selector & ~7), local.raw)
        memory.write_u64(_TSS + 0x24, KERNEL + _STACK_TOP)  # IST1
        self.vcpu = TranslationVcpu(self.board)
        self._watch = _Watch(self.vcpu)
        self.features = self.vcpu.blocks.translator.features
        """The decoder's features that the guest's processor has."""
        self._states = {
            (bits, user): self._state(bits, user) for bits in (16, 32, 64) for user in (False, True)
        }

    def _map_all(self, root: int, data: Sequence[int]) -> None:
        """Page tables at physical `root` with the data pages in these frames."""
        tables = _PageTables(self.memory, root)
        tables.map(KERNEL, 0, _LARGE | _WRITABLE)
        for number, frame in enumerate(data):
            linear = DATA + number * PAGE
            tables.map(linear, frame, _USER if linear == READ_ONLY else _USER | _WRITABLE)
        for linear, frames in _CODE_FRAMES.items():
            for number, frame in enumerate(frames):
                tables.map(linear + number * PAGE, frame, _USER | _WRITABLE)

    def _state(self, bits: int, user: bool) -> CpuState:
        dpl = 3 if user else 0
        long = 0x2000 if bits == 64 else 0x4000
        code = Segment(0x18 | dpl if user else 8, 0, 0xFFFFFFFF, 0x809B | long | dpl << 5)
        data = Segment(0x20 | dpl if user else 0x10, 0, 0xFFFFFFFF, 0xC093 | dpl << 5)
        null = Segment(0, 0, 0xFFFFFFFF, 0xC093 | dpl << 5)
        flat = null if bits == 64 else data
        return CpuState(
            cs=code, ss=data, ds=flat, es=flat, fs=null, gs=null,
            tr=Segment(0x40, KERNEL + _TSS, 0x67, 0x8B), ldtr=Segment(0x50, KERNEL + _LDT, 8 * len(LOCAL) - 1, 0x82),
            gdtr=Table(KERNEL + _GDT, 0x37), idtr=Table(KERNEL + _IDT, 0x1FF),
            cr0=0x80050033, cr4=0x506A0 | 0x10000, efer=0xD01, xcr0=7,
        )  # fmt: skip

    def close(self) -> None:
        self._watch.close()
        self.vcpu.close()
        self.memory.close()

    def run(self, case: Case, layout: Layout) -> list[Result]:
        """Run the case from each of its states; raises Skipped for what the engine does not have."""
        state = self._states[case.bits, case.user]
        self.vcpu.blocks.tunes_at_once = case.manner == "tuned"
        if case.segments:
            self._load_segments(state, case)
        else:
            state.fs = Segment(0, case.fs_base, 0xFFFFFFFF, 0xC093)
            state.gs = Segment(0, case.gs_base, 0xFFFFFFFF, 0xC093)
        state.cr3 = _DEVICE_TABLES if case.manner == "on a device" else _TABLES
        self.vcpu.state = state  # forgets what the TLBs have of the case before
        self._processor = state
        return [self._run(case, layout, state) for state in case.states]

    def _load_segments(self, state: CpuState, case: Case) -> None:
        """The segments of 16- or 32-bit code, at CPL 0 with a DPL to suit."""
        for name, descriptor in case.segments.items():
            segment = descriptor.segment
            if not case.user and segment.selector and name in ("cs", "ss"):
                segment.selector &= ~3
                segment.attributes &= ~DPL
            setattr(state, name, segment)

    def _run(self, case: Case, layout: Layout, state: State) -> Result:
        view, core = self.memory.view, self.vcpu.core
        content = case.memory(state, layout)
        self.device.content[:] = content[DEVICE_PAGE * PAGE : (DEVICE_PAGE + 1) * PAGE]
        for number, frame in enumerate(_DATA_FRAMES):
            view[frame : frame + PAGE] = content[number * PAGE : (number + 1) * PAGE]
        frames = _CODE_FRAMES[case.code_page]
        full, at = layout.code + _UD2, case.code_offset
        before = full[: PAGE - at] if at < PAGE else b""
        after = full[len(before) :]
        if before:
            self._write(frames[0] + at, before)
        if after:
            self._write(frames[1] + max(0, at - PAGE), after)
        self._write(frames[0] + CODE_DATA, state.code_data)
        self._restart(case, state)
        self._watch.runs += 1
        exit_ = self._go(case.manner)
        if isinstance(exit_, Unsupported):
            raise Skipped(exit_.what)
        offset = core.rip - KERNEL - _HANDLERS
        if not isinstance(exit_, Halt) or not 0 <= offset < 16 * 32:
            raise RuntimeError(f"{exit_} at {core.rip:#x}")
        vector = offset // 16
        error = 0
        frame = _STACK_TOP - 40
        if vector in _WITH_ERROR_CODE:
            frame -= 8
            (error,) = unpack_from("<Q", view, frame)
        rip, _, flags, rsp, _ = unpack_from("<5Q", view, _STACK_TOP - 40)
        gpr = list(core.regs)
        gpr[4] = rsp
        ended = vector == 6 and rip == layout.addresses[-1]
        pages = [bytes(view[frame : frame + PAGE]) for frame in _DATA_FRAMES]
        if case.manner == "on a device":
            pages[DEVICE_PAGE] = bytes(self.device.content)
        at = frames[0] + CODE_DATA
        return Result(
            gpr, rip, flags & _FRAME_FLAGS, bytes(core.bytes[_FPU : _FPU + FPU_SIZE]), b"".join(pages),
            bytes(view[at : at + CODE_DATA_SIZE]), -1 if ended else vector, error, core.cr2,
            self._selectors(case) if case.segments else (),
        )  # fmt: skip

    def _selectors(self, case: Case) -> tuple[int, ...]:
        es, _, _, ds, fs, gs = (view.selector for view in self.vcpu.core.segments[:6])
        (ss,) = unpack_from("<Q", self.memory.view, _STACK_TOP - 8)
        return es, ss if case.user or not ss else ss | 3, ds, fs, gs

    def _restart(self, case: Case, state: State) -> None:
        """Have the processor stand before the code again, with its translations and what is in its TLBs."""
        core, processor = self.vcpu.core, self._processor
        core.regs[:] = array("Q", state.gpr)
        core.rflags = state.rflags
        for name, view in zip(SEGMENT_NAMES, core.segments, strict=False):
            segment: Segment = getattr(processor, name)
            view.set(segment.selector, segment.base, segment.limit, segment.attributes)
        core.cpl = 3 if case.user else 0
        core.rip = case.rip  # an offset in the code segment
        core.bytes[_FPU : _FPU + FPU_SIZE] = state.fpu
        self.vcpu.mode_changed()

    def _go(self, manner: str) -> Exit:
        """Run to HLT, or to whatever else comes of it."""
        vcpu = self.vcpu
        if manner == "stepped":
            while isinstance(exit_ := vcpu.step(), DebugStop):
                pass
            return exit_
        if manner == "polled":
            # As it is when an interrupt came in: the next check for one leaves the translated code.
            words = vcpu.core.words
            words[OFFSETS["PENDING"] // 8] = 0
            words[OFFSETS["POLL"] // 8] = words[OFFSETS["POLL_BAD"] // 8]
        return vcpu.run()

    def _write(self, physical: int, content: bytes) -> None:
        """Put content where code may lie, unless it is there: what is the same stays translated."""
        there = self.memory.view[physical : physical + len(content)]
        if there != content:
            self.vcpu.memory_written(physical, len(content))
            there[:] = content
