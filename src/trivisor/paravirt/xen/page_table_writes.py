"""Writes to page tables by ordinary instructions: their mappings are read-only, so the hypervisor does them, checked.

Linux uses XCHG, LOCK AND and their like on entries, and relies on it (Xen,
arch/x86/pv/ro-page-fault.c).  As there, only tables of level 1 can be written so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Instruction, MemorySizeExt, Mnemonic, OpKind, Register

from trivisor.paravirt.xen.decode import fetch, get_register, memory_address, set_register
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.frames import L1
from trivisor.paravirt.xen.walk import walk

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain

_RAX = 0


def page_table_write(domain: Domain, fault: int) -> bool:
    """The instruction at rip wrote to a read-only page: do it if that is a level-1 table and the entry is a good one.

    False if it is neither, and the guest gets its page fault.  As on Xen, tables of higher levels are for mmu_update.
    """
    cpu, frames = domain.cpu, domain.frames
    entry = walk(domain, fault)
    if entry is None:
        return False
    table = (entry & (1 << 52) - 1) >> 12
    if not frames.owns(table) or frames.kind[table] != L1 or not frames.kind_count[table]:
        return False
    instruction = fetch(cpu, cpu.rip)
    if instruction is None:
        return False
    written = _written(domain, instruction, table, fault)
    if written is None:
        return False
    new, finish = written
    domain.tables.drop_lingering()
    try:
        domain.tables.change(table, fault >> 3 & 511, new)
    except HypercallError:
        return False
    finish()
    cpu.rip = instruction.next_ip
    return True


_LOGIC = {
    Mnemonic.AND: lambda old, operand: old & operand,
    Mnemonic.OR: lambda old, operand: old | operand,
    Mnemonic.XOR: lambda old, operand: old ^ operand,
}
_BITS = {
    Mnemonic.BTS: lambda old, bit: old | bit,
    Mnemonic.BTR: lambda old, bit: old & ~bit,
    Mnemonic.BTC: lambda old, bit: old ^ bit,
}
_CF, _PF, _AF, _ZF, _SF, _OF = 1, 4, 0x10, 0x40, 0x80, 0x800


def _written(
    domain: Domain, instruction: Instruction, table: int, address: int
) -> tuple[int, Callable[[], None]] | None:
    """(the whole entry as the instruction would leave it, what else it does), or None for one that is not known.

    `address` is where it writes; registers and flags change only in the second part.
    """
    cpu = domain.cpu
    if instruction.op_count < 2 or instruction.op_kind(0) != OpKind.MEMORY:
        return None
    size, offset = MemorySizeExt.size(instruction.memory_size), address & 7
    if size not in (1, 2, 4, 8) or offset % size or memory_address(cpu, instruction) != address:
        return None
    whole = domain.frames.words[table * 512 + (address >> 3 & 511)]
    mask = (1 << 8 * size) - 1
    old = whole >> 8 * offset & mask
    source = _source(domain, instruction, mask)
    if source is None:
        return None
    mnemonic = instruction.mnemonic

    def place(value: int) -> int:
        return whole & ~(mask << 8 * offset) | (value & mask) << 8 * offset

    def flags(value: int, kept: int) -> Callable[[], None]:
        return lambda: setattr(cpu, "rflags", cpu.rflags & ~kept | value)

    arithmetic = _CF | _PF | _AF | _ZF | _SF | _OF
    if mnemonic == Mnemonic.MOV:
        return place(source), lambda: None
    if mnemonic == Mnemonic.XCHG:
        return place(source), lambda: set_register(cpu, instruction.op1_register, old)
    if mnemonic in _LOGIC:
        result = _LOGIC[mnemonic](old, source)
        return place(result), flags(_result_flags(result & mask, size), arithmetic)
    if mnemonic in _BITS:
        number = source % (8 * size)
        if instruction.op1_kind == OpKind.REGISTER and not 0 <= source < 8 * size:
            return None
        return place(_BITS[mnemonic](old, 1 << number)), flags(old >> number & 1, _CF)
    if mnemonic == Mnemonic.CMPXCHG:
        wanted = cpu.registers[_RAX] & mask
        shown = flags(_difference_flags(wanted, old, size), arithmetic)
        if wanted == old:
            return place(source), shown

        def differs() -> None:
            shown()
            set_register(cpu, {1: Register.AL, 2: Register.AX, 4: Register.EAX, 8: Register.RAX}[size], old)

        return whole, differs
    return None


def _source(domain: Domain, instruction: Instruction, mask: int) -> int | None:
    kind = instruction.op1_kind
    if kind == OpKind.REGISTER:
        return get_register(domain.cpu, instruction.op1_register) & mask
    if kind in (
        OpKind.IMMEDIATE8, OpKind.IMMEDIATE16, OpKind.IMMEDIATE32, OpKind.IMMEDIATE8TO16, OpKind.IMMEDIATE8TO32,
        OpKind.IMMEDIATE8TO64, OpKind.IMMEDIATE32TO64,
    ):  # fmt: skip
        return instruction.immediate(1) & mask
    return None


def _result_flags(result: int, size: int) -> int:
    """PF, ZF and SF of a result; CF and OF are clear."""
    parity = 0 if bin(result & 0xFF).count("1") & 1 else _PF
    return parity | (_ZF if result == 0 else 0) | (_SF if result >> 8 * size - 1 else 0)


def _difference_flags(left: int, right: int, size: int) -> int:
    """The flags of CMP."""
    result = left - right & (1 << 8 * size) - 1
    overflow = (left ^ right) & (left ^ result) >> 0
    return (
        _result_flags(result, size)
        | (_CF if left < right else 0)
        | (_AF if (left ^ right ^ result) & 0x10 else 0)
        | (_OF if overflow >> 8 * size - 1 & 1 else 0)
    )
