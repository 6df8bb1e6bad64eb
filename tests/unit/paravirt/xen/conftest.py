"""A PV domain on a processor that runs nothing: hypercalls are made by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from trivisor.machine.clock import Clock
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.paravirt.xen.domain import Domain
from trivisor.paravirt.xen.frames import L4
from trivisor.paravirt.xen.machine import XenMachine
from trivisor.x86.exceptions import PAGE_FAULT, GuestException

ARGUMENTS = 0x10000
"""Linear address of the memory that hypercalls' structures are put in."""
_ROOM = 0x10000


class StillCpu:
    """A processor whose memory is one piece at ARGUMENTS."""

    supervisor: Domain

    def __init__(self) -> None:
        self.registers = [0] * 16
        self.rip = 0x1000
        self.rflags = 0x202
        self.dr = [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400]
        self.xcr0 = 1
        self.xcr0_supported = 7
        self.fpu_disabled = False
        self.fsgsbase = False
        self.interrupt_flag_ignored = False
        self.forgets_at_once = False
        self.other_gs = 0
        self.memory = bytearray(_ROOM)
        self.selectors = [0, abi.FLAT_RING3_CS64, abi.FLAT_RING3_SS, 0, 0, 0]
        self.bases = {4: 0, 5: 0}
        self.flushes = 0
        self.invalidated: list[int] = []
        self.changed: list[tuple[int, int]] = []
        self.space = (0, True)
        self.ticks = 0

    def selector(self, segment: int) -> int:
        return self.selectors[segment]

    def load_segment(self, segment: int, selector: int) -> None:
        if selector & ~3 == 0xBAD0:
            raise GuestException(13, selector)
        self.selectors[segment] = selector
        if segment in self.bases:
            self.bases[segment] = 0

    def set_flat(self, code: int, stack: int) -> None:
        self.selectors[1], self.selectors[2] = code, stack

    def base(self, segment: int) -> int:
        return self.bases[segment]

    def set_base(self, segment: int, base: int) -> None:
        self.bases[segment] = base

    def set_descriptor_tables(self, gdt: int, gdt_limit: int, ldt: int, ldt_limit: int) -> None:
        pass

    def enter_space(self, root: int, kernel: bool) -> None:
        self.space = (root, kernel)

    def flush(self) -> None:
        self.flushes += 1

    def invalidate(self, linear: int) -> None:
        self.invalidated.append(linear)

    def entry_changed(self, address: int, level: int, old: int, new: int) -> bool:
        if (old ^ new) & ~0x60:
            self.changed.append((address, level))
        return True

    def _at(self, linear: int, length: int, write: int) -> int:
        at = linear - ARGUMENTS
        if not 0 <= at <= at + length <= _ROOM:
            raise GuestException(PAGE_FAULT, 4 | write, linear)
        return at

    def load(self, linear: int, size: int) -> bytes:
        at = self._at(linear, size, 0)
        return bytes(self.memory[at : at + size])

    def store(self, linear: int, data: bytes) -> None:
        at = self._at(linear, len(data), 2)
        self.memory[at : at + len(data)] = data

    def memory_written(self, address: int, length: int) -> None:
        pass

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return (leaf, subleaf, 0xFFFFFFFF, 0xFFFFFFFF)

    def guest_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self.supervisor.cpuid(leaf, subleaf)

    def set_debug_register(self, number: int, value: int) -> None:
        self.dr[number] = value

    def read_msr(self, index: int) -> int:
        return 0

    def write_msr(self, index: int, value: int) -> None:
        pass

    def tsc(self) -> int:
        return self.ticks

    def attention(self) -> None:
        pass


class Guest:
    """What a guest does: hypercalls by name, with structures packed into its memory."""

    def __init__(self, machine: XenMachine, cpu: StillCpu, printed: list[bytes]) -> None:
        self.machine = machine
        self.domain: Domain = machine.domain
        self.cpu = cpu
        cpu.supervisor = self.domain
        self.frames = machine.domain.frames
        self.events = machine.domain.events
        self.printed = printed

    def call(self, name: str, *arguments: int) -> int:
        padded = (*arguments, *(0,) * (6 - len(arguments)))
        return self.domain.call(HYPERCALL_NUMBERS[name], padded)

    def put(self, layout: str, *values: int, at: int = ARGUMENTS) -> int:
        """Pack values into the guest's memory; returns the address."""
        self.cpu.store(at, struct.pack(layout, *values))
        return at

    def get(self, layout: str, at: int = ARGUMENTS) -> tuple[int, ...]:
        return struct.unpack(layout, self.cpu.load(at, struct.calcsize(layout)))

    def frame(self) -> int:
        """A frame of the domain's, cleared."""
        frame = self.frames.allocate()
        self.frames.words[frame * 512 : frame * 512 + 512] = memoryview(bytes(4096)).cast("Q")
        return frame

    def update(self, table: int, index: int, entry: int, command: int = 0) -> int:
        """mmu_update of one entry."""
        self.put("<QQ", table << 12 | index * 8 | command, entry)
        return self.call("mmu_update", ARGUMENTS, 1, 0, abi.DOMID_SELF)

    def extended(self, command: int, first: int = 0, second: int = 0) -> int:
        """One mmuext_op."""
        self.put("<I4xQQ", command, first, second)
        return self.call("mmuext_op", ARGUMENTS, 1, 0, abi.DOMID_SELF)


@pytest.fixture
def guest() -> Iterator[Guest]:
    printed: list[bytes] = []
    cpu = StillCpu()
    machine = XenMachine(
        16 << 20,
        Clock(lambda: 0),
        console_output=printed.append,
        tsc=cpu.tsc,
        tsc_frequency=1_000_000_000,
        on_stop=lambda: None,
    )
    machine.domain.cpu = cpu
    machine.domain.frames.give_free(machine.ram)
    made = Guest(machine, cpu, printed)
    root = made.frame()
    machine.domain.tables.get_kind(root, L4)
    machine.domain.state.kernel_root = root
    yield made
    machine.close()
