"""Effective addresses, segment checks and register widths (Intel SDM 1, 3.3.7 and 3.7; 3A 5.3 to 5.5)."""

from __future__ import annotations

from typing import Any

import pytest
from iced_x86 import Register

from trivisor.translation.core import CS, DS, FS, RAX, RBP, RBX, RSI, RSP, SS
from trivisor.translation.emulator import operands
from trivisor.x86.exceptions import GuestException

PATTERN = 0x1122334455667788


def address_of(cpu: Any, source: str, size: int = 1, *, write: bool = False) -> int:
    return operands.memory_address(cpu.core, cpu.decode(source), size, write=write)


@pytest.mark.parametrize(
    ("number", "value", "expected", "read"),
    [
        (Register.AL, 0x1FF, 0x11223344556677FF, 0xFF),
        (Register.AH, 0x1FF, 0x112233445566FF88, 0xFF),
        (Register.AX, 0x1FFFF, 0x112233445566FFFF, 0xFFFF),
        (Register.EAX, 0x1_0000_0001, 1, 1),
        (Register.RAX, (1 << 65) + 2, 2, 2),
    ],
)
def test_registers_are_written_by_their_width(
    cpu: Any, number: int, value: int, expected: int, read: int
) -> None:
    cpu.core.regs[RAX] = PATTERN
    operands.write_register(cpu.core, number, value)
    assert cpu.core.regs[RAX] == expected
    assert operands.read_register(cpu.core, number) == read


def test_spl_and_ah_are_different_registers(cpu: Any) -> None:
    cpu.core.regs[RSP], cpu.core.regs[RAX] = 0x1234, 0xABCD
    assert operands.read_register(cpu.core, Register.SPL) == 0x34
    assert operands.read_register(cpu.core, Register.AH) == 0xAB


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("mov al, [rbx+rsi*4+0x10]", 0x1000 + 4 * 0x20 + 0x10),
        ("mov al, [rbx-1]", 0xFFF),
        ("mov al, [rsi*8-8]", 0xF8),
        (bytes.fromhex("8a042578563412"), 0x12345678),
        (bytes.fromhex("67 8a 04 b3".replace(" ", "")), 0x1080),  # [ebx+esi*4]
        (bytes.fromhex("8a0510000000"), 0x8000 + 6 + 0x10),  # rip-relative
    ],
)
def test_effective_addresses_in_64bit_mode(cpu: Any, code: str | bytes, expected: int) -> None:
    cpu.long_mode()
    cpu.core.regs[RBX], cpu.core.regs[RSI] = 0x1000, 0x20
    assert address_of(cpu, code) == expected


def test_address_size_prefix_cuts_the_address(cpu: Any) -> None:
    cpu.long_mode()
    cpu.core.regs[RBX] = 0xFFFFFFFF_FFFFFFFF
    assert address_of(cpu, bytes.fromhex("678a4302")) == 1  # mov al, [ebx+2]


def test_only_fs_and_gs_have_bases_in_64bit_mode(cpu: Any) -> None:
    cpu.long_mode()
    cpu.core.segments[DS].set(0, 0x5000, 0, 0)
    cpu.core.segments[FS].set(0, 0x7000, 0, 0)
    cpu.core.regs[RBX] = 0x10
    assert address_of(cpu, "mov al, [rbx]") == 0x10
    assert address_of(cpu, "mov al, [fs:rbx]") == 0x7010


@pytest.mark.parametrize(("source", "vector"), [("mov rax, [rbx]", 13), ("mov rax, [rbp]", 12)])
def test_addresses_must_be_canonical(cpu: Any, source: str, vector: int) -> None:
    cpu.long_mode()
    for bad in (1 << 47, (1 << 47) - 4, 0xFFFF_7FFF_FFFF_FFFF):
        cpu.core.regs[RBX] = cpu.core.regs[RBP] = bad
        with pytest.raises(GuestException) as caught:
            address_of(cpu, source, 8)
        assert (caught.value.vector, caught.value.error_code) == (vector, 0)
    cpu.core.regs[RBX] = cpu.core.regs[RBP] = 0xFFFF_8000_0000_0000
    assert address_of(cpu, source, 8) == 0xFFFF_8000_0000_0000


@pytest.mark.parametrize(
    ("attributes", "limit", "offset", "write", "good"),
    [
        (0x4093, 0xFFF, 0xFFC, True, True),
        (0x4093, 0xFFF, 0xFFD, True, False),
        (0x4091, 0xFFF, 0, True, False),  # read-only data
        (0x4091, 0xFFF, 0, False, True),
        (0x409B, 0xFFF, 0, False, True),  # readable code
        (0x409B, 0xFFF, 0, True, False),
        (0x4099, 0xFFF, 0, False, False),  # execute-only code
        (0x4097, 0xFFF, 0xFFF, True, False),  # expand-down: from limit + 1
        (0x4097, 0xFFF, 0x1000, True, True),
        (0x4097, 0xFFF, 0xFFFFFFFD, True, False),
        (0x0097, 0xFFF, 0xFFFC, True, True),  # a small one ends at 64 KiB
        (0x0097, 0xFFF, 0xFFFD, True, False),
        (0, 0xFFFF, 0, False, False),  # null selector
    ],
)
def test_segment_limits_and_types(
    cpu: Any, attributes: int, limit: int, offset: int, write: bool, good: bool
) -> None:
    cpu.protected()
    for segment, vector in ((DS, 13), (SS, 12)):
        cpu.core.segments[segment].set(0x10, 0x100000, limit, attributes)
        if good:
            linear = operands.linear_address(cpu.core, segment, offset, 4, write=write)
            assert linear == (0x100000 + offset) & 0xFFFFFFFF
        else:
            with pytest.raises(GuestException) as caught:
                operands.linear_address(cpu.core, segment, offset, 4, write=write)
            assert (caught.value.vector, caught.value.error_code) == (vector, 0)


def test_real_mode_writes_through_cs_and_wraps_16bit_addresses(cpu: Any) -> None:
    cpu.real()
    assert operands.linear_address(cpu.core, CS, 0x10, 2, write=True) == 0x8010
    cpu.core.regs[RBX], cpu.core.regs[RSI] = 0xFFFF, 3
    assert address_of(cpu, "mov al, [bx+si]") == 0x10002


def test_operands_in_memory_and_registers(cpu: Any) -> None:
    cpu.long_mode()
    cpu.core.regs[RBX] = 0x10000
    cpu.put(0x10000, 8, PATTERN)
    to_memory = cpu.decode("mov [rbx], eax")
    assert operands.read_operand(cpu, to_memory, 0, 4) == 0x55667788
    operands.write_operand(cpu, to_memory, 0, 2, 0xFFFF_0001)
    assert cpu.get(0x10000, 8, 1) == [0x1122334455660001]
    cpu.core.regs[RAX] = PATTERN
    operands.write_operand(cpu, to_memory, 1, 4, 7)
    assert cpu.core.regs[RAX] == 7


def test_next_rip_stays_in_32_bits_outside_64bit_mode(cpu: Any) -> None:
    cpu.protected()
    cpu.core.rip = 0xFFFFFFFE
    assert operands.next_rip(cpu.core, cpu.decode(bytes.fromhex("0fa2"))) == 0
    cpu.long_mode()
    cpu.core.rip = 0xFFFFFFFE
    assert operands.next_rip(cpu.core, cpu.decode(bytes.fromhex("0fa2"))) == 0x1_0000_0000
