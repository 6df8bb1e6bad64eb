"""A whole processor on the real board, with a guest of a few instructions.

`Machine(source)` assembles the guest, puts it at `CODE` and is
ready to run it: long mode (or flat 32-bit protected mode with paging
off), identity page tables, GDT, IDT and TSS in guest memory.  Every vector has
a handler that halts, so that an exception ends the run with its frame on the
stack for `Machine.frame` to read.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trivisor.machine import tsc
from trivisor.machine.clock import Clock
from trivisor.machine.exits import Exit, Halt, PortOut
from trivisor.machine.memory import GuestMemory
from trivisor.machine.state import GPR_NAMES, CpuState, Segment, Table
from trivisor.pc import Pc
from trivisor.translation.cpu import TranslationVcpu
from trivisor.x86 import exceptions
from trivisor.x86.assembler import assemble
from trivisor.x86.descriptors import Gate, build_gate, build_gate64, build_segment, build_system_segment

PML4, PDPT, PD, MMIO_PD = 0x1000, 0x2000, 0x3000, 0x4000
GDT, IDT, TSS, HANDLERS = 0x6000, 0x7000, 0x8000, 0x9000
TABLE_POOL = 0x40000
CODE, DATA = 0x100000, 0x300000
STACK, KERNEL_STACK, IST_STACK, USER_STACK = 0x200000, 0x210000, 0x220000, 0x230000
DEVICE = 0xD0000000
"""Physical address of the recording device that `Machine.record` puts on the bus."""

KERNEL_CS, KERNEL_DS, USER_CS32, USER_DS, USER_CS, KERNEL_CS32 = range(0x08, 0x38, 8)
TSS_SELECTOR = 0x40
_FLAT = {KERNEL_CS: 0xA09B, KERNEL_DS: 0xC093, USER_CS32: 0xC0FB, USER_DS: 0xC0F3, USER_CS: 0xA0FB,
         KERNEL_CS32: 0xC09B}  # fmt: skip
P, W, U, A, D, LARGE, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
_MASK = (1 << 64) - 1
PATIENCE = 20.0
"""Seconds after which a guest that does not end is kicked, and its test fails."""


_images: dict[int, bytes] = {}
"""Page tables, descriptors and handlers, by bits, once made."""


@dataclass(frozen=True)
class Frame:
    """What an exception or interrupt has left on its handler's stack."""

    vector: int
    error: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int


class Recorder:
    """A device that remembers what was done to it; reading gives the bytes 0xA0, 0xA1, ... by offset."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        value = int.from_bytes(bytes(0xA0 + (offset + i) % 64 for i in range(size)), "little")
        self.log.append(("read", offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))


class Machine:
    """A guest on its processor."""

    def __init__(
        self,
        source: str,
        bits: int = 64,
        *,
        origin: int = CODE,
        cpl: int = 0,
        memory: int = 64 << 20,
        crystal: int = 0,
        processor: Callable[[Pc], Any] = TranslationVcpu,
    ) -> None:
        self.bits = bits
        self.origin = origin
        self.memory = GuestMemory(memory)
        self.board = Pc(
            self.memory,
            Clock(),
            serial_output=lambda data: None,
            tsc=tsc.read,
            tsc_frequency=tsc.frequency(),
            on_stop=lambda: None,
            crystal=crystal,
        )
        self._tables = TABLE_POOL
        self._deadline = math.inf
        self._closed = threading.Event()
        self._watchdog: threading.Thread | None = None
        image = _images.get(bits)
        if image is None:
            self._identity_map()
            self._descriptors()
            _images[bits] = self.memory.read(PML4, HANDLERS + 0x1000 - PML4)
        else:
            self.memory.write(PML4, image)
        self.vcpu = processor(self.board)
        self.core = getattr(self.vcpu, "core", None)
        self.vcpu.state = self.initial_state(cpl)
        self.labels: dict[str, int] = {}
        self.put(source, origin)
        self.devices: list[Recorder] = []

    # -- making it ------------------------------------------------------------------------------------------

    def _identity_map(self) -> None:
        memory = self.memory
        memory.write_u64(PML4, PDPT | P | W | U)
        memory.write_u64(PDPT, PD | P | W | U)
        memory.write_u64(PDPT + 24, MMIO_PD | P | W | U)
        for i in range(32):
            memory.write_u64(PD + 8 * i, i << 21 | P | W | U | LARGE)
        for i in range(512):
            memory.write_u64(MMIO_PD + 8 * i, 3 << 30 | i << 21 | P | W | U | LARGE)

    def _descriptors(self) -> None:
        memory = self.memory
        for selector, attributes in _FLAT.items():
            memory.write_u64(GDT + selector, build_segment(0, 0xFFFFFFFF, attributes))
        if self.bits == 64:
            memory.write(GDT + TSS_SELECTOR, build_system_segment(TSS, 0x67, 0x8B).to_bytes(16, "little"))
            memory.write_u64(TSS + 4, KERNEL_STACK)
            memory.write_u64(TSS + 36, IST_STACK)
        else:
            memory.write_u64(GDT + TSS_SELECTOR, build_segment(TSS, 0x67, 0x8B))
            memory.write_u32(TSS + 4, KERNEL_STACK)
            memory.write_u32(TSS + 8, KERNEL_DS)
        memory.write_u16(TSS + 102, 0x68)
        for vector in range(256):
            memory.write(HANDLERS + 16 * vector, b"\xf4\xeb\xfd")  # hlt; jmp to it
            self.gate(vector, HANDLERS + 16 * vector, dpl=3 if vector in (3, 4, 0x80) else 0)

    def initial_state(self, cpl: int = 0) -> CpuState:
        """The registers that the guest starts with."""
        s = CpuState()
        long = self.bits == 64
        s.cr0, s.cr3, s.cr4 = (0x80010033 if long else 0x33), PML4, 0x620 if long else 0x600
        s.efer = 0xD01 if long else 0
        if getattr(self.vcpu, "xcr0_supported", 0):  # the translation engine's code looks at CR4.OSXSAVE
            s.cr4, s.xcr0 = s.cr4 | 1 << 18, self.vcpu.xcr0_supported
        code = (USER_CS if long else USER_CS32) if cpl else (KERNEL_CS if long else KERNEL_CS32)
        data = USER_DS if cpl else KERNEL_DS
        s.cs = Segment(code | cpl, 0, 0xFFFFFFFF, _FLAT[code])
        for name in ("ss", "ds", "es"):
            setattr(s, name, Segment(data | cpl, 0, 0xFFFFFFFF, _FLAT[data]))
        s.fs = s.gs = Segment(0, 0, 0xFFFFFFFF, _FLAT[data])
        s.tr = Segment(TSS_SELECTOR, TSS, 0x67, 0x8B)
        s.gdtr, s.idtr = Table(GDT, 0x4F), Table(IDT, 0xFFF)
        s.rip, s.gpr[4] = self.origin, USER_STACK if cpl else STACK
        return s

    def restart(self, cpl: int = 0) -> None:
        """Begin anew, with memory as it is."""
        self.vcpu.state = self.initial_state(cpl)

    def restart_at(self, label: str, cpl: int = 0, **registers: int) -> None:
        """Begin anew at a label, with the TLBs and control registers as they are."""
        core = self.core
        if core.cpl != cpl:
            state = self.vcpu.state
            fresh = self.initial_state(cpl)
            state.cs, state.ss = fresh.cs, fresh.ss
            self.vcpu.state = state
        core.rip, core.rflags = self.labels[label], 2
        self.set(**{"rsp": USER_STACK if cpl else STACK, **registers})

    def put(self, source: str, at: int) -> dict[str, int]:
        """Assemble `source` to physical address `at`; its labels join the others."""
        known = {name: value for name, value in self.labels.items() if f"{name}:" not in source}
        program = assemble(source, bits=self.bits, origin=at, symbols=_SYMBOLS | known)
        self.memory.write(at, program.code)
        self.vcpu.memory_written(at, len(program.code))
        self.labels.update(program.labels)
        return program.labels

    def gate(self, vector: int, where: int | str, *, dpl: int = 0, ist: int = 0, trap: bool = False) -> None:
        """Have `vector` lead to an address or a label."""
        offset = self.labels[where] if isinstance(where, str) else where
        gate = Gate(0xF if trap else 0xE, KERNEL_CS if self.bits == 64 else KERNEL_CS32, offset, dpl, True, ist)
        if self.bits == 64:
            self.memory.write(IDT + 16 * vector, build_gate64(gate).to_bytes(16, "little"))
        else:
            self.memory.write_u64(IDT + 8 * vector, build_gate(gate))

    def entry(self, linear: int) -> int:
        """Physical address of the 4 KiB page's entry for `linear`, with tables made and large pages split."""
        table = PML4
        for shift in (39, 30, 21):
            at = table + 8 * (linear >> shift & 511)
            entry = self.memory.read_u64(at)
            if not entry & P or entry & LARGE:
                new, self._tables = self._tables, self._tables + 0x1000
                small = 1 << shift - 9
                for i in range(512):
                    keep = 0 if shift == 21 else LARGE
                    value = ((entry & ~LARGE) + i * small) | keep if entry & P else 0
                    self.memory.write_u64(new + 8 * i, value)
                entry = new | P | W | U
                self.memory.write_u64(at, entry)
            table = entry & 0xFFFFFFFFFF000
        return table + 8 * (linear >> 12 & 511)

    def map(self, linear: int, physical: int, flags: int = P | W | U) -> int:
        """Map a 4 KiB page without telling the processor; returns its entry's physical address."""
        at = self.entry(linear)
        self.memory.write_u64(at, physical | flags)
        return at

    def flush(self) -> None:
        """As if CR4.PGE had been toggled."""
        self.vcpu.flush_tlb(keep_global=False)

    def record(self, base: int = DEVICE, length: int = 0x3000) -> Recorder:
        """Put a recording device on the memory bus."""
        device = Recorder()
        self.board.mmio.attach(base, length, device)
        return device

    def on_port(self, action: Callable[[PortOut], None], port: int = 0x80) -> None:
        """Call `action` for each OUT to `port`."""

        def subscriber(exit_: PortOut) -> None:
            if exit_.port == port:
                action(exit_)

        self.vcpu.observed.setdefault(PortOut, []).append(subscriber)

    def interrupt(self, vector: int) -> None:
        """The local APIC gets a fixed interrupt; from the processor's thread."""
        self.board.local_apic.deliver(vector, 0, False)

    # -- running it -----------------------------------------------------------------------------------------

    def set(self, **registers: int) -> None:
        """Set general registers, or `rflags`, `rip`, by name."""
        for name, value in registers.items():
            if name in GPR_NAMES:
                self.core.regs[GPR_NAMES.index(name)] = value & _MASK
            else:
                setattr(self.core, name, value)

    def __getitem__(self, register: str) -> int:
        value: int = self.core.regs[GPR_NAMES.index(register)]
        return value

    def run(self, at: str | int | None = None, **registers: int) -> Exit:
        """Run until it stops, from a label if one is given; a guest that does not end is kicked."""
        if at is not None:
            self.vcpu._next = None
            self.core.rip = self.labels[at] if isinstance(at, str) else at
        self.set(**registers)
        return self._watched(self.vcpu.run)

    def step(self) -> Exit:
        """One instruction; a processor that sleeps too long is kicked."""
        return self._watched(self.vcpu.step)

    def _watched(self, go: Callable[[], Exit]) -> Exit:
        self._deadline = time.monotonic() + PATIENCE
        if self._watchdog is None:
            self._watchdog = threading.Thread(target=self._watch, daemon=True)
            self._watchdog.start()
        try:
            return go()
        finally:
            self._deadline = math.inf

    def _watch(self) -> None:
        """Kick a guest that does not end; runs in a thread of its own."""
        while not self._closed.wait(PATIENCE / 10):
            if time.monotonic() > self._deadline:
                self.vcpu.kick()

    def halt(self, at: str | int | None = None, **registers: int) -> None:
        """Run to a HLT of the guest's own."""
        exit_ = self.run(at, **registers)
        assert isinstance(exit_, Halt), exit_
        if HANDLERS <= self.core.linear_rip < HANDLERS + 0x1000:
            raise AssertionError(f"unexpected {self.frame()}, CR2 {self.core.cr2:#x}")

    def fault(self, at: str | int | None = None, **registers: int) -> Frame:
        """Run into an exception or interrupt, and give its frame."""
        exit_ = self.run(at, **registers)
        assert isinstance(exit_, Halt), exit_
        where = self.core.linear_rip
        assert HANDLERS <= where < HANDLERS + 0x1000, f"no exception; rip {where:#x}"
        return self.frame()

    def frame(self) -> Frame:
        """The frame of the handler that has halted."""
        return self.frame_of(self.vcpu.state)

    def frame_of(self, state: CpuState) -> Frame:
        """The same, of a processor in `state`."""
        vector = (state.cs.base if self.bits != 64 else 0) + state.rip - HANDLERS >> 4
        size = self.bits // 8
        at = state.gpr[4]
        error = None
        if vector in exceptions.PUSHES_ERROR_CODE:
            error = self.word(at)
            at += size
        values = [self.word(at + size * i) for i in range(5)]
        return Frame(vector, error, *values)

    def word(self, address: int) -> int:
        """A word of the mode's size in physical memory."""
        return int.from_bytes(self.memory.read(address, self.bits // 8), "little")

    def close(self) -> None:
        self._closed.set()
        if self._watchdog is not None:
            self._watchdog.join()
        self.vcpu.close()
        self.memory.close()


_SYMBOLS = {
    name: value
    for name, value in globals().items()
    if name.isupper() and isinstance(value, int) and not name.startswith("_") and len(name) > 1
}

Make = Callable[..., Machine]
"""What the `machine` fixture gives."""
