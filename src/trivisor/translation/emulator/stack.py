"""The guest's stack as call-outs use it: several values pushed or read at once, all or nothing."""

from __future__ import annotations

from trivisor.translation.core import RSP, SS, Core
from trivisor.translation.emulator.contract import Cpu
from trivisor.translation.emulator.operands import MASK16, MASK32, MASK64, in_64bit_mode, linear_address
from trivisor.x86.descriptors import DB


def stack_mask(core: Core) -> int:
    """All ones of the stack pointer's size: RSP in 64-bit mode, else ESP or SP by SS.B (SDM 1, 6.2.3)."""
    if in_64bit_mode(core):
        return MASK64
    return MASK32 if core.segments[SS].attributes & DB else MASK16


def set_stack_pointer(core: Core, mask: int, value: int) -> None:
    """Write RSP, ESP (which clears the upper half) or SP (which leaves the rest alone)."""
    if mask == MASK16:
        core.regs[RSP] = core.regs[RSP] & ~MASK16 | value & MASK16
    else:
        core.regs[RSP] = value & mask


def pack(values: tuple[int, ...], size: int) -> int:
    """The memory image of `values` pushed in order, `size` bytes each: the last one lies lowest."""
    mask = (1 << 8 * size) - 1
    image = 0
    for value in values:
        image = image << 8 * size | value & mask
    return image


def push(cpu: Cpu, size: int, *values: int) -> None:
    """Push `values` in order, `size` bytes each; on #SS or #PF nothing has changed."""
    core = cpu.core
    mask = stack_mask(core)
    pointer = core.regs[RSP] & mask
    total = size * len(values)
    if pointer >= total or pointer == 0:
        address = linear_address(core, SS, (pointer - total) & mask, total, write=True)
        cpu.store(address, total, pack(values, size))
    else:  # the stack pointer wraps on the way
        addresses = [
            linear_address(core, SS, (pointer - size * (i + 1)) & mask, size, write=True)
            for i in range(len(values))
        ]
        for address in addresses:
            cpu.probe_write(address, size)
        for address, value in zip(addresses, values, strict=True):
            cpu.store(address, size, value & ((1 << 8 * size) - 1))
    set_stack_pointer(core, mask, pointer - total)


def top(cpu: Cpu, size: int, count: int, skip: int = 0) -> list[int]:
    """The `count` values that pops would give, after `skip` bytes; the stack pointer stays."""
    core = cpu.core
    mask = stack_mask(core)
    start = (core.regs[RSP] + skip) & mask
    total = size * count
    if start + total > mask + 1:
        return [
            cpu.load(linear_address(core, SS, (start + size * i) & mask, size), size) for i in range(count)
        ]
    image = cpu.load(linear_address(core, SS, start, total), total)
    value_mask = (1 << 8 * size) - 1
    return [image >> 8 * size * i & value_mask for i in range(count)]


def release(core: Core, size: int) -> None:
    """Move the stack pointer up by `size` bytes."""
    mask = stack_mask(core)
    set_stack_pointer(core, mask, (core.regs[RSP] & mask) + size)
