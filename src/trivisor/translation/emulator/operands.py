"""Operands of an iced-x86 instruction on the virtual CPU: registers, effective addresses, memory.

Addresses go through the segment checks of Intel SDM 3A 5.3 to 5.5 outside
64-bit mode, and through the canonical check in it (SDM 1, 3.3.7.1).
"""

from __future__ import annotations

from iced_x86 import Instruction, OpKind, Register

from trivisor.translation.core import CS, DS, ES, FS, GS, SS, Core
from trivisor.translation.emulator.contract import Cpu
from trivisor.x86.control import CR0_PE, EFER_LMA
from trivisor.x86.descriptors import (
    DB,
    LONG,
    PRESENT,
    TYPE_CODE,
    TYPE_EXPAND_DOWN,
    TYPE_READABLE,
    TYPE_WRITABLE,
)
from trivisor.x86.exceptions import GENERAL_PROTECTION, INVALID_OPCODE, STACK_FAULT, GuestException

MASK16 = 0xFFFF
MASK32 = 0xFFFFFFFF
MASK64 = (1 << 64) - 1
SIZE_MASK = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 6, 8, 10, 16)}
"""All ones of a size in bytes."""

SEGMENT_INDEX = {
    Register.ES: ES, Register.CS: CS, Register.SS: SS, Register.DS: DS, Register.FS: FS, Register.GS: GS,
}  # fmt: skip


def _register_table() -> dict[int, tuple[int, int, int]]:
    table: dict[int, tuple[int, int, int]] = {}
    for index in range(16):
        low = Register.AL + index if index < 4 else Register.SPL + index - 4
        table[low] = (index, 0, 1)
        table[Register.AX + index] = (index, 0, 2)
        table[Register.EAX + index] = (index, 0, 4)
        table[Register.RAX + index] = (index, 0, 8)
    for index in range(4):
        table[Register.AH + index] = (index, 8, 1)
    return table


REGISTERS = _register_table()
"""iced's register -> (encoding, bit position of its lowest bit, size in bytes)."""


def general_protection(error_code: int = 0) -> GuestException:
    return GuestException(GENERAL_PROTECTION, error_code)


def invalid_opcode() -> GuestException:
    return GuestException(INVALID_OPCODE)


def in_64bit_mode(core: Core) -> bool:
    return bool(core.segments[CS].attributes & LONG and core.efer & EFER_LMA)


def table_address(core: Core, base: int, offset: int) -> int:
    """Where the processor looks in one of its tables (GDT, LDT, IDT, TSS): 32 bits wide outside long mode."""
    return (base + offset) & (MASK64 if core.efer & EFER_LMA else MASK32)


def is_canonical(address: int) -> bool:
    """Whether bits 47 to 63 are all alike (4-level paging)."""
    return address < 1 << 47 or MASK64 - (1 << 47) < address <= MASK64


def next_rip(core: Core, instruction: Instruction) -> int:
    """The address of the instruction after this one."""
    following: int = core.rip + instruction.len
    return following if following <= MASK32 or in_64bit_mode(core) else following & MASK32


def read_register(core: Core, register: int) -> int:
    index, shift, size = REGISTERS[register]
    return core.regs[index] >> shift & SIZE_MASK[size]


def write_register(core: Core, register: int, value: int) -> None:
    """Write as instructions do: 4 bytes clear the upper half, 1 and 2 leave the rest alone."""
    index, shift, size = REGISTERS[register]
    if size >= 4:
        core.regs[index] = value & SIZE_MASK[size]
    else:
        mask = SIZE_MASK[size]
        core.regs[index] = core.regs[index] & ~(mask << shift) | (value & mask) << shift


def effective_address(core: Core, instruction: Instruction) -> int:
    """The offset of the memory operand in its segment, cut to the address size."""
    base, index = instruction.memory_base, instruction.memory_index
    address: int = instruction.memory_displacement
    if base == Register.RIP:
        return address
    if base == Register.EIP:
        return address & MASK32
    if base == Register.NONE and index == Register.NONE:
        return address & SIZE_MASK[instruction.memory_displ_size or 8]
    if index != Register.NONE:
        address += read_register(core, index) * instruction.memory_index_scale
    if base == Register.NONE:
        return address & SIZE_MASK[REGISTERS[index][2]]
    return (address + read_register(core, base)) & SIZE_MASK[REGISTERS[base][2]]


def within_limit(attributes: int, limit: int, offset: int, size: int) -> bool:
    """Whether a segment holds [offset, offset + size); a data segment may expand down."""
    last = offset + size - 1
    if attributes & (TYPE_CODE | TYPE_EXPAND_DOWN) == TYPE_EXPAND_DOWN:
        return offset > limit and last <= (MASK32 if attributes & DB else MASK16)
    return last <= limit


def _may_access(attributes: int, write: bool) -> bool:
    if not attributes & PRESENT:
        return False
    if attributes & TYPE_CODE:
        return not write and bool(attributes & TYPE_READABLE)
    return not write or bool(attributes & TYPE_WRITABLE)


def linear_address(core: Core, segment: int, offset: int, size: int, *, write: bool = False) -> int:
    """The linear address of `size` bytes at `offset` in a segment register.

    Raises #GP(0), or #SS(0) in SS, for what segmentation does not allow.
    """
    if in_64bit_mode(core):
        linear = (core.segments[segment].base + offset) & MASK64 if segment >= FS else offset
        if is_canonical(linear) and is_canonical(linear + size - 1):
            return linear
    else:
        view = core.segments[segment]
        attributes = view.attributes
        allowed = not core.cr0 & CR0_PE or _may_access(attributes, write)
        if allowed and within_limit(attributes, view.limit, offset, size):
            return (view.base + offset) & MASK32
    raise GuestException(STACK_FAULT if segment == SS else GENERAL_PROTECTION, 0)


def memory_address(core: Core, instruction: Instruction, size: int, *, write: bool = False) -> int:
    """The linear address of the instruction's memory operand of `size` bytes, checked."""
    segment = SEGMENT_INDEX[instruction.memory_segment]
    return linear_address(core, segment, effective_address(core, instruction), size, write=write)


def read_operand(cpu: Cpu, instruction: Instruction, number: int, size: int) -> int:
    """Operand `number`, a general register or memory, cut to `size` bytes."""
    if instruction.op_kind(number) == OpKind.REGISTER:
        return read_register(cpu.core, instruction.op_register(number)) & SIZE_MASK[size]
    return cpu.load(memory_address(cpu.core, instruction, size), size)


def write_operand(cpu: Cpu, instruction: Instruction, number: int, size: int, value: int) -> None:
    """Write operand `number`: a general register by its own size, or `size` bytes of memory."""
    if instruction.op_kind(number) == OpKind.REGISTER:
        write_register(cpu.core, instruction.op_register(number), value)
    else:
        cpu.store(memory_address(cpu.core, instruction, size, write=True), size, value & SIZE_MASK[size])
