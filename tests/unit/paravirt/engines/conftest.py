"""Small PV guests in assembly, run under each engine that this host has: both must end in the same memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trivisor.boot.image import Image
from trivisor.boot.xen_notes import read_xen_kernel
from trivisor.machine import tsc
from trivisor.machine.clock import Clock
from trivisor.machine.deprivileged import DeprivilegedCpu
from trivisor.machine.exits import Exit
from trivisor.machine.vcpu import Vcpu
from trivisor.monitor.techniques import TechniqueUnavailable
from trivisor.monitor.xen_processor import xen_processor
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.paravirt.xen.machine import XenMachine
from trivisor.x86.assembler import assemble

BASE = 0xFFFFFFFF80000000
CODE = BASE + 0x100000
DATA = CODE + 0x4000
"""A page of words that programs leave their results in; the first is the frame of the kernel's level-4 table."""
STACK = CODE + 0x8000
KERNEL_STACK = CODE + 0x9000
USER_STACK = CODE + 0xA000
PAGE = CODE + 0xB000
"""A page that programs may map something else at; the next one is for the same."""
_SIZE = 0x10000
_PRELUDE = """
    mov r15, rsi
    mov rsp, STACK
    jmp start
shutdown:
    mov dword [DATA + 0xff8], 0
    mov rdi, 2
    mov rsi, DATA + 0xff8
    mov eax, sched_op
    syscall
    ud2
"""


class Guest:
    """A domain that runs `source`, which begins at `start` and ends by `jmp shutdown`; r15 is start_info."""

    def __init__(self, engine: str, directory: Path, source: str) -> None:
        self.console = b""
        self.xen = XenMachine(
            32 << 20, Clock(), console_output=self._print, tsc=tsc.read, tsc_frequency=tsc.frequency(),
            on_stop=lambda: None,
        )  # fmt: skip
        symbols = {
            "DATA": DATA, "STACK": STACK, "KERNEL_STACK": KERNEL_STACK, "USER_STACK": USER_STACK, "PAGE": PAGE,
            **HYPERCALL_NUMBERS,
        }  # fmt: skip
        signed = {name: value - (1 << 64) if value >> 63 else value for name, value in symbols.items()}
        self.program = assemble(_PRELUDE + source, origin=CODE, symbols=signed)
        path = directory / "kernel"
        path.write_bytes(_elf(self.program.code))
        self.vcpu: Vcpu
        self.cpu: DeprivilegedCpu
        try:
            self.vcpu, self.cpu = xen_processor(self.xen, engine)
        except TechniqueUnavailable as error:
            self.xen.close()
            pytest.skip(str(error))
        with Image(path) as image:
            state = self.xen.start(self.cpu, read_xen_kernel(image), None, "")
        self.vcpu.state = state
        self.cpu.enter_space(state.cr3, True)
        self.domain = self.xen.domain
        self[0] = self.domain.state.kernel_root

    def _print(self, data: bytes) -> None:
        self.console += data

    def close(self) -> None:
        self.vcpu.close()
        self.xen.close()

    def run(self) -> Exit:
        """Run to the end that the program makes itself."""
        return self.vcpu.run()

    def finish(self) -> None:
        """Run, and demand that the end is a power-off."""
        exit_ = self.run()
        reason = self.xen.platform.stop_reason
        assert type(reason).__name__ == "PowerOff", (exit_, reason, hex(self.cpu.rip), self.words(0, 16))

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self.cpu.load(DATA + 8 * index, 8), "little")

    def __setitem__(self, index: int, value: int) -> None:
        self.cpu.store(DATA + 8 * index, value.to_bytes(8, "little"))

    def words(self, first: int, count: int) -> list[int]:
        """Words of the data page."""
        return [self[index] for index in range(first, first + count)]

    def label(self, name: str) -> int:
        """The address of a label of the program's."""
        return self.program.labels[name]

    def frame_of(self, linear: int) -> int:
        """The frame that a linear address is mapped to."""
        from trivisor.paravirt.xen.walk import walk

        entry = walk(self.domain, linear)
        assert entry is not None
        return (entry & (1 << 52) - 1) >> 12

    def table_of(self, linear: int) -> int:
        """The machine address of the level-1 entry of a linear address."""
        from trivisor.paravirt.xen.walk import entry_address

        found = entry_address(self.domain, linear)
        assert found is not None
        return found[0] * 4096 + found[1] * 8


def _elf(code: bytes) -> bytes:
    notes = b""
    for kind, value in ((5, b"xen-3.0\0"), (3, struct.pack("<Q", BASE)), (4, bytes(8)), (1, struct.pack("<Q", CODE))):
        notes += struct.pack("<3I4s", 4, len(value), kind, b"Xen\0") + value
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, CODE - BASE, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    at = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 7, at, CODE, CODE - BASE, len(code), _SIZE, 1)
    note = struct.pack("<IIQQQQQQ", 4, 4, at + len(code), 0, 0, len(notes), len(notes), 4)
    return header + load + note + code + notes


@pytest.fixture(params=["translation", "direct"])
def boot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Guest]]:
    """Make a guest of a program, under each engine."""
    made: list[Guest] = []

    def start(source: str) -> Guest:
        made.append(Guest(request.param, tmp_path, source))
        return made[-1]

    yield start
    for guest in made:
        guest.close()
