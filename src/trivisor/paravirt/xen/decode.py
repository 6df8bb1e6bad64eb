"""Instructions of the guest that the hypervisor looks at: their bytes, registers and memory operands."""

from __future__ import annotations

from iced_x86 import Decoder, DecoderError, Instruction, Register, RegisterExt

from trivisor.machine.deprivileged import FS, GS, DeprivilegedCpu
from trivisor.x86.exceptions import GuestException
from trivisor.x86.iced_types import RegisterNumber

_MASK64 = (1 << 64) - 1
_MASK32 = 0xFFFFFFFF
_LONGEST = 15
_SHORT = range(Register.EAX, Register.R15D + 1)
_HIGH_BYTES = (Register.AH, Register.CH, Register.DH, Register.BH)


def fetch(cpu: DeprivilegedCpu, address: int) -> Instruction | None:
    """The instruction at linear `address`; None when there is none or its bytes cannot be read."""
    data = b""
    try:
        room = 0x1000 - (address & 0xFFF)
        data = cpu.load(address, min(room, _LONGEST))
        if room < _LONGEST:
            data += cpu.load(address + room & _MASK64, _LONGEST - room)
    except GuestException:
        pass
    decoder = Decoder(64, data, ip=address)
    instruction = decoder.decode()
    return None if decoder.last_error != DecoderError.NONE else instruction


def memory_address(cpu: DeprivilegedCpu, instruction: Instruction) -> int:
    """The linear address of the memory operand; no segment but FS and GS has a base here."""
    segment = instruction.memory_segment
    base = cpu.base(FS if segment == Register.FS else GS) if segment in (Register.FS, Register.GS) else 0
    if instruction.is_ip_rel_memory_operand:
        return base + instruction.ip_rel_memory_address & _MASK64
    address = instruction.memory_displacement
    if instruction.memory_base != Register.NONE:
        address += get_register(cpu, instruction.memory_base)
    if instruction.memory_index != Register.NONE:
        address += get_register(cpu, instruction.memory_index) * instruction.memory_index_scale
    wide = _MASK64 if instruction.memory_base not in _SHORT and instruction.memory_index not in _SHORT else _MASK32
    return base + (address & wide) & _MASK64


def get_register(cpu: DeprivilegedCpu, register: RegisterNumber) -> int:
    """A general register's value, or that of a part of one."""
    value = cpu.registers[RegisterExt.full_register(register) - Register.RAX]
    if register in _HIGH_BYTES:
        value >>= 8
    return value & (1 << 8 * RegisterExt.size(register)) - 1


def set_register(cpu: DeprivilegedCpu, register: RegisterNumber, value: int) -> None:
    """Write a general register or a part of one, as MOV does."""
    registers, number = cpu.registers, RegisterExt.full_register(register) - Register.RAX
    size = RegisterExt.size(register)
    shift = 8 if register in _HIGH_BYTES else 0
    kept = 0 if size >= 4 else registers[number] & ~(((1 << 8 * size) - 1) << shift)
    registers[number] = kept | value << shift
