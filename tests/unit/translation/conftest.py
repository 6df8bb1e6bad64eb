"""A processor without an engine: registers over plain memory, with paging off."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from iced_x86 import Decoder

from trivisor.machine.bus import Bus
from trivisor.machine.exits import Exit
from trivisor.machine.memory import GuestMemory
from trivisor.machine.vcpu import GeneralProtection
from trivisor.translation.core import CS, DS, ES, FS, GS, RSP, SS, TR, Core
from trivisor.translation.emulator import system
from trivisor.x86.assembler import assemble
from trivisor.x86.cpuid import FEATURES
from trivisor.x86.descriptors import (
    CALL_GATE,
    Gate,
    build_gate,
    build_gate64,
    build_segment,
    build_system_segment,
)
from trivisor.x86.exceptions import GuestException

GDT, IDT, TSS, LDT = 0x1000, 0x2000, 0x4000, 0x5000
CODE, STACK, KERNEL_STACK, IST_STACK, DATA = 0x8000, 0x20000, 0x30000, 0x38000, 0x10000

# Selectors of the GDT that every test gets.
KERNEL_CS64, KERNEL_DS, USER_CS32, USER_DS, USER_CS64, KERNEL_CS32, KERNEL_CS16 = range(0x08, 0x40, 8)
TSS_SELECTOR, LDT_SELECTOR = 0x40, 0x50
ABSENT_DS, READ_ONLY_DS, CONFORMING_CS, GATE_SELECTOR, HIDDEN_CS = 0x60, 0x68, 0x70, 0x78, 0x88

_FLAT = {
    KERNEL_CS64: 0xA09A, KERNEL_DS: 0xC092, USER_CS32: 0xC0FA, USER_DS: 0xC0F2, USER_CS64: 0xA0FA,
    KERNEL_CS32: 0xC09A, ABSENT_DS: 0xC012, READ_ONLY_DS: 0xC090, CONFORMING_CS: 0xC09E, HIDDEN_CS: 0xC098,
}  # fmt: skip


class Msrs:
    """MSR 0x123 and IA32_DEBUGCTL are there, and no other."""

    def __init__(self) -> None:
        self.values = {0x123: 5, 0x1D9: 0}

    def read(self, index: int) -> int:
        if index not in self.values:
            raise GeneralProtection
        return self.values[index]

    def write(self, index: int, value: int) -> None:
        self.read(index)
        self.values[index] = value


class Port:
    """Counts up when read, remembers what is written."""

    def __init__(self) -> None:
        self.reads = 0
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return self.reads

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


class FakeCpu:
    """`translation.contract.Cpu` with linear addresses equal to physical ones."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.core = Core(memory)
        self.port = Port()
        ports = Bus("port")
        ports.attach(0x60, 0x10, self.port)
        self.board: Any = SimpleNamespace(
            memory=memory,
            ports=ports,
            msrs={},
            interrupts=SimpleNamespace(cr8=0),
            tsc_changed=lambda: self.calls.append("tsc_changed"),
        )
        self.msrs = Msrs()
        self.observed: dict[type, list[Any]] = {}
        self.features = set(FEATURES)
        self.calls: list[Any] = []
        self.absent_pages: set[int] = set()
        self.accesses: list[tuple[str, int, int, bool]] = []
        self.bits = 64

    # what an engine provides

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        registers = [0, 0, 0, 0]
        if leaf == 0:
            registers = [0x1F, 0x756E6547, 0x6C65746E, 0x49656E69]
        if (leaf, subleaf) == (0xD, 0):
            registers[0] = 7
        for name in self.features:
            place = FEATURES[name]
            if (place.leaf, place.subleaf) == (leaf, subleaf):
                registers[place.register] |= 1 << place.bit
        return registers[0], registers[1], registers[2], registers[3]

    def _check(self, linear: int, size: int, write: bool, system: bool) -> None:
        for page in range(linear >> 12, (linear + size - 1 >> 12) + 1):
            if page in self.absent_pages or not self.memory.is_ram(page << 12, 4096):
                user = self.core.cpl == 3 and not system
                raise GuestException(14, 2 * write + 4 * user, max(linear, page << 12))

    def load(self, linear: int, size: int, *, system: bool = False) -> int:
        self._check(linear, size, False, system)
        self.accesses.append(("load", linear, size, system))
        return int.from_bytes(self.memory.read(linear, size), "little")

    def store(self, linear: int, size: int, value: int, *, system: bool = False) -> None:
        self.probe_write(linear, size, system=system)
        self.accesses.append(("store", linear, size, system))
        self.memory.write(linear, value.to_bytes(size, "little"))

    def probe_write(self, linear: int, size: int, *, system: bool = False) -> None:
        self._check(linear, size, True, system)

    def flush_tlb(self, *, keep_global: bool) -> None:
        self.calls.append(("flush", keep_global))

    def invalidate_page(self, linear: int) -> None:
        self.calls.append(("invalidate", linear))

    def mode_changed(self) -> None:
        self.calls.append("mode")

    def tsc(self) -> int:
        return (0x1122334455667788 + self.core.tsc_offset) & (1 << 64) - 1

    # what the tests say

    def write_tables(self) -> None:
        for selector, attributes in _FLAT.items():
            self.memory.write_u64(GDT + selector, build_segment(0, 0xFFFFFFFF, attributes))
        self.memory.write_u64(GDT + KERNEL_CS16, build_segment(0, 0xFFFF, 0x9A))
        self.core.gdtr_base, self.core.gdtr_limit = GDT, 0xFF
        self.core.idtr_base, self.core.idtr_limit = IDT, 0xFFF

    def _segments(self, code: int, data: int, cpl: int) -> None:
        core = self.core
        attributes = (_FLAT[code] | 1) & ~0x60 | cpl << 5
        core.segments[CS].set(code | cpl, 0, 0xFFFFFFFF, attributes)
        for index in (SS, DS, ES, FS, GS):
            core.segments[index].set(data | cpl, 0, 0xFFFFFFFF, 0xC093 | cpl << 5)
        core.cpl = cpl
        core.rip, core.regs[RSP] = CODE, STACK
        core.rflags = 2

    def long_mode(self, cpl: int = 0) -> FakeCpu:
        """64-bit mode with a 64-bit TSS: RSP0 and IST1 set."""
        self.bits = 64
        self.write_tables()
        core = self.core
        core.cr0, core.cr4, core.efer = 0x80050033, 0x20, 0xD01
        self._segments(USER_CS64 if cpl else KERNEL_CS64, USER_DS if cpl else KERNEL_DS, cpl)
        self.write_system(TSS_SELECTOR, build_system_segment(TSS, 0x67, 0x89))
        self.write_system(LDT_SELECTOR, build_system_segment(LDT, 0xFFF, 0x82))
        core.segments[TR].set(TSS_SELECTOR, TSS, 0x67, 0x8B)
        self.memory.write_u64(TSS + 4, KERNEL_STACK)
        self.memory.write_u64(TSS + 36, IST_STACK)
        self.memory.write_u16(TSS + 102, 0x68)  # no I/O permission bitmap
        return self

    def compatibility(self, cpl: int = 3) -> FakeCpu:
        self.long_mode(cpl)
        self.bits = 32
        code = USER_CS32 if cpl else KERNEL_CS32
        self.core.segments[CS].set(code | cpl, 0, 0xFFFFFFFF, 0xC09B | cpl << 5)
        return self

    def protected(self, cpl: int = 0) -> FakeCpu:
        """32-bit protected mode with a 32-bit TSS."""
        self.bits = 32
        self.write_tables()
        core = self.core
        core.cr0, core.cr4, core.efer = 0x11, 0, 0
        self._segments(USER_CS32 if cpl else KERNEL_CS32, USER_DS if cpl else KERNEL_DS, cpl)
        self.memory.write_u64(GDT + TSS_SELECTOR, build_segment(TSS, 0x67, 0x89))
        self.memory.write_u64(GDT + LDT_SELECTOR, build_segment(LDT, 0xFFF, 0x82))
        core.segments[TR].set(TSS_SELECTOR, TSS, 0x67, 0x8B)
        self.memory.write_u32(TSS + 4, KERNEL_STACK)
        self.memory.write_u32(TSS + 8, KERNEL_DS)
        self.memory.write_u16(TSS + 102, 0x68)
        return self

    def real(self) -> FakeCpu:
        self.bits = 16
        core = self.core
        core.cr0, core.cr4, core.efer, core.cpl = 0x10, 0, 0, 0
        core.segments[CS].set(0x800, 0x8000, 0xFFFF, 0x9B)
        for index in (SS, DS, ES, FS, GS):
            core.segments[index].set(0x1000, 0x10000, 0xFFFF, 0x93)
        core.idtr_base, core.idtr_limit = 0, 0x3FF
        core.rip, core.regs[RSP], core.rflags = 0, 0x8000, 2
        return self

    def write_system(self, selector: int, raw: int) -> None:
        self.memory.write(GDT + selector, raw.to_bytes(16, "little"))

    def gate(
        self, vector: int, selector: int, offset: int, kind: int = 0xE, dpl: int = 0, ist: int = 0
    ) -> None:
        """Put a gate into the IDT of the current mode."""
        gate = Gate(kind, selector, offset, dpl, True, ist)
        if self.core.efer & 0x400:
            self.memory.write(IDT + 16 * vector, build_gate64(gate).to_bytes(16, "little"))
        else:
            self.memory.write_u64(IDT + 8 * vector, build_gate(gate))

    def call_gate(self, selector: int, offset: int, dpl: int = 3, parameters: int = 0) -> None:
        """Put a call gate at `GATE_SELECTOR`."""
        gate = Gate(CALL_GATE, selector, offset, dpl, True, parameters=parameters)
        if self.core.efer & 0x400:
            self.write_system(GATE_SELECTOR, build_gate64(gate))
        else:
            self.memory.write_u64(GDT + GATE_SELECTOR, build_gate(gate))

    def put(self, address: int, size: int, *values: int) -> None:
        for i, value in enumerate(values):
            self.memory.write(address + i * size, value.to_bytes(size, "little"))

    def get(self, address: int, size: int, count: int) -> list[int]:
        raw = self.memory.read(address, size * count)
        return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]

    def decode(self, code: str | bytes) -> Any:
        data = code if isinstance(code, bytes) else assemble(code, bits=self.bits, origin=self.core.rip).code
        return Decoder(self.bits, data, ip=self.core.rip).decode()

    def do(self, code: str | bytes) -> Exit | None:
        """Execute one instruction, in assembly or machine code, at rip."""
        return system.execute(self, self.decode(code))

    def advanced(self, code: str | bytes) -> None:
        """Execute one instruction, and expect rip after it."""
        following = self.core.rip + self.decode(code).len
        assert self.do(code) is None
        assert self.core.rip == following

    def snapshot(self) -> tuple[Any, ...]:
        """Every register that an instruction could change."""
        core = self.core
        return (
            core.rip, core.rflags, list(core.regs), core.cpl, core.cr0, core.cr3, core.cr4,
            self.board.interrupts.cr8,
            core.efer, [(s.selector, s.base, s.limit, s.attributes) for s in core.segments],
            list(core.dr), core.xcr0,
            core.gdtr_base, core.gdtr_limit, core.idtr_base, core.idtr_limit, core.kernel_gs_base,
        )  # fmt: skip

    def fault(self, code: str | bytes) -> tuple[int, int | None]:
        """(vector, error code) of the exception that the instruction must raise, changing no register."""
        before = self.snapshot()
        with pytest.raises(GuestException) as caught:
            self.do(code)
        assert self.snapshot() == before
        return caught.value.vector, caught.value.error_code


@pytest.fixture
def cpu() -> Iterator[FakeCpu]:
    memory = GuestMemory(16 << 20)
    fake = FakeCpu(memory)
    yield fake
    memory.close()


@pytest.fixture
def layout() -> SimpleNamespace:
    """The addresses and selectors above, for the tests that name them."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if isinstance(value, int)})
