"""Port I/O: IN, OUT, INS and OUTS with the I/O permission bitmap (Intel SDM 1 chapter 19; 2A, IN and INS)."""

from __future__ import annotations

from iced_x86 import Code, Instruction, OpKind

from trivisor.machine.exits import PortIn, PortOut
from trivisor.translation.core import ES, RAX, RCX, RDI, RDX, RSI, TR
from trivisor.translation.emulator.contract import Cpu, Handler, notify
from trivisor.translation.emulator.operands import (
    MASK16,
    MASK32,
    MASK64,
    SEGMENT_INDEX,
    SIZE_MASK,
    general_protection,
    linear_address,
    next_rip,
    table_address,
)
from trivisor.x86.control import CR0_PE
from trivisor.x86.descriptors import PRESENT, TSS, TSS_BUSY, TYPE
from trivisor.x86.flags import DF, IOPL, IOPL_SHIFT, VM

MAXIMUM_ITERATIONS = 4096
"""Of one call for a repeated INS or OUTS; the rest is done when the instruction is executed again."""
_IO_MAP_BASE = 102
_SMALLEST_TSS_LIMIT = 103

_ADDRESS_MASK = {
    OpKind.MEMORY_ESDI: MASK16, OpKind.MEMORY_ESEDI: MASK32, OpKind.MEMORY_ESRDI: MASK64,
    OpKind.MEMORY_SEG_SI: MASK16, OpKind.MEMORY_SEG_ESI: MASK32, OpKind.MEMORY_SEG_RSI: MASK64,
}  # fmt: skip


def check_port(cpu: Cpu, port: int, size: int) -> None:
    """Raise #GP(0) unless the current privilege level may access the ports: by IOPL or the TSS's bitmap."""
    core = cpu.core
    flags = core.rflags
    if not core.cr0 & CR0_PE or (core.cpl <= (flags & IOPL) >> IOPL_SHIFT and not flags & VM):
        return
    tr = core.segments[TR]
    attributes, limit = tr.attributes, tr.limit
    if not attributes & PRESENT or attributes & TYPE not in (TSS, TSS_BUSY) or limit < _SMALLEST_TSS_LIMIT:
        raise general_protection()
    at = cpu.load(table_address(core, tr.base, _IO_MAP_BASE), 2, system=True) + (port >> 3)
    if at + 1 > limit:
        raise general_protection()
    bitmap = cpu.load(table_address(core, tr.base, at), 2, system=True)
    if bitmap >> (port & 7) & ((1 << size) - 1):
        raise general_protection()


def _read_port(cpu: Cpu, port: int, size: int) -> int:
    value = cpu.board.ports.read(port, size)
    if cpu.core.debug.watches_ports:
        cpu.core.debug.port_accessed(port, size)
    if PortIn in cpu.observed:
        notify(cpu, PortIn(port, size, value))
    return value


def _write_port(cpu: Cpu, port: int, size: int, value: int) -> None:
    cpu.board.ports.write(port, size, value)
    if cpu.core.debug.watches_ports:
        cpu.core.debug.port_accessed(port, size)
    if PortOut in cpu.observed:
        notify(cpu, PortOut(port, size, value))


def _in(size: int, *, immediate: bool) -> Handler:
    keep = 0 if size == 4 else MASK64 & ~SIZE_MASK[size]

    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        regs = core.regs
        port = instruction.immediate8 if immediate else regs[RDX] & MASK16
        if core.cpl:
            check_port(cpu, port, size)
        regs[RAX] = regs[RAX] & keep | _read_port(cpu, port, size)

    return execute


def _out(size: int, *, immediate: bool) -> Handler:
    mask = SIZE_MASK[size]

    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        regs = core.regs
        port = instruction.immediate8 if immediate else regs[RDX] & MASK16
        if core.cpl:
            check_port(cpu, port, size)
        _write_port(cpu, port, size, regs[RAX] & mask)

    return execute


def _advance(regs: memoryview, index: int, mask: int, step: int) -> None:
    """Step an index or count register of the address size; 32 bits clear the upper half, 16 do not."""
    value = (regs[index] + step) & mask
    regs[index] = regs[index] & ~MASK16 | value if mask == MASK16 else value


def _input_one(cpu: Cpu, port: int, size: int, segment: int, offset: int) -> None:
    linear = linear_address(cpu.core, segment, offset, size, write=True)
    cpu.probe_write(linear, size)  # reading a port has effects: no fault may come after it
    cpu.store(linear, size, _read_port(cpu, port, size))


def _output_one(cpu: Cpu, port: int, size: int, segment: int, offset: int) -> None:
    linear = linear_address(cpu.core, segment, offset, size)
    _write_port(cpu, port, size, cpu.load(linear, size))


def _string(size: int, *, read: bool) -> Handler:
    """INS or OUTS.  A fault in a repetition leaves the registers as of the last whole iteration."""
    pointer = RDI if read else RSI
    one = _input_one if read else _output_one

    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        regs = core.regs
        port = regs[RDX] & MASK16
        if core.cpl:
            check_port(cpu, port, size)
        segment = ES if read else SEGMENT_INDEX[instruction.memory_segment]
        mask = _ADDRESS_MASK[instruction.op0_kind if read else instruction.op1_kind]
        step = -size if core.rflags & DF else size
        repeated = instruction.has_rep_prefix or instruction.has_repne_prefix
        remaining = regs[RCX] & mask if repeated else 1
        following = next_rip(core, instruction)
        for _ in range(min(remaining, 1 if core.debug.step_trap else MAXIMUM_ITERATIONS)):
            one(cpu, port, size, segment, regs[pointer] & mask)
            _advance(regs, pointer, mask, step)
            if repeated:
                _advance(regs, RCX, mask, -1)
            remaining -= 1
            if core.debug.pending:
                break
        if not remaining:
            core.rip = following

    return execute


STRAIGHT: dict[int, Handler] = {
    Code.IN_AL_IMM8: _in(1, immediate=True),
    Code.IN_AX_IMM8: _in(2, immediate=True),
    Code.IN_EAX_IMM8: _in(4, immediate=True),
    Code.IN_AL_DX: _in(1, immediate=False),
    Code.IN_AX_DX: _in(2, immediate=False),
    Code.IN_EAX_DX: _in(4, immediate=False),
    Code.OUT_IMM8_AL: _out(1, immediate=True),
    Code.OUT_IMM8_AX: _out(2, immediate=True),
    Code.OUT_IMM8_EAX: _out(4, immediate=True),
    Code.OUT_DX_AL: _out(1, immediate=False),
    Code.OUT_DX_AX: _out(2, immediate=False),
    Code.OUT_DX_EAX: _out(4, immediate=False),
}
BRANCHES: dict[int, Handler] = {
    Code.INSB_M8_DX: _string(1, read=True),
    Code.INSW_M16_DX: _string(2, read=True),
    Code.INSD_M32_DX: _string(4, read=True),
    Code.OUTSB_DX_M8: _string(1, read=False),
    Code.OUTSW_DX_M16: _string(2, read=False),
    Code.OUTSD_DX_M32: _string(4, read=False),
}
