"""A guest in real mode: code at `CODE_SEGMENT`:0, data at `DATA_SEGMENT`:0, a stack below `STACK_SEGMENT`:`TOP`.

Every vector of the interrupt vector table has a handler that halts, as in `guest.py`.
"""

from __future__ import annotations

from tests.unit.translation.engine.guest import HANDLERS, IDT, Frame, Machine
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.x86.assembler import assemble

CODE_SEGMENT, DATA_SEGMENT, STACK_SEGMENT, EXTRA_SEGMENT = 0x1000, 0x2000, 0x3000, 0x4000
REAL_CODE, REAL_DATA, REAL_STACK, REAL_EXTRA = 0x10000, 0x20000, 0x30000, 0x40000
TOP = 0x8000
_SYMBOLS = {
    "CODE_SEGMENT": CODE_SEGMENT, "DATA_SEGMENT": DATA_SEGMENT, "STACK_SEGMENT": STACK_SEGMENT,
    "EXTRA_SEGMENT": EXTRA_SEGMENT, "TOP": TOP,
}  # fmt: skip


class RealMachine(Machine):
    """`Machine` in real mode; labels are offsets in the code segment."""

    def __init__(self, source: str) -> None:
        super().__init__(source, 16, origin=0)

    def _descriptors(self) -> None:
        super()._descriptors()
        for vector in range(256):
            self.memory.write_u32(IDT + 4 * vector, HANDLERS >> 4 << 16 | 16 * vector)

    def initial_state(self, cpl: int = 0) -> CpuState:
        state = CpuState()
        state.cs = Segment(CODE_SEGMENT, REAL_CODE, 0xFFFF, 0x9B)
        for name, selector in (("ss", STACK_SEGMENT), ("ds", DATA_SEGMENT), ("es", EXTRA_SEGMENT), ("fs", 0), ("gs", 0)):
            setattr(state, name, Segment(selector, selector << 4, 0xFFFF, 0x93))
        state.idtr = Table(IDT, 0x3FF)
        state.cr4 = 0x600
        state.rip, state.gpr[4] = 0, TOP
        return state

    def put(self, source: str, at: int) -> dict[str, int]:
        """Assemble 16-bit `source` to offset `at` in the code segment."""
        program = assemble(source, bits=16, origin=at, symbols=_SYMBOLS | self.labels)
        self.memory.write(REAL_CODE + at, program.code)
        self.vcpu.memory_written(REAL_CODE + at, len(program.code))
        self.labels.update(program.labels)
        return program.labels

    def frame(self) -> Frame:
        """IP, CS and FLAGS; there is no error code, and nothing else."""
        vector = self.core.linear_rip - HANDLERS >> 4
        at = REAL_STACK + (self["rsp"] & 0xFFFF)
        ip, cs, flags = (self.memory.read_u16(at + 2 * i) for i in range(3))
        return Frame(vector, None, ip, cs, flags, self["rsp"] & 0xFFFF, STACK_SEGMENT)

    def data(self, offset: int, size: int = 2) -> int:
        """A word of the data segment."""
        return int.from_bytes(self.memory.read(REAL_DATA + offset, size), "little")
