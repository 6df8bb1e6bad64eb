"""Virtual-8086 mode: entered by IRET, left by interrupts and faults; what its IOPL says (Intel SDM 3B 20.2, 20.3)."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import (
    HANDLERS,
    IDT,
    KERNEL_CS32,
    KERNEL_DS,
    KERNEL_STACK,
    TSS,
    USER_CS32,
    USER_DS,
    Machine,
    Make,
)
from trivisor.x86.assembler import assemble
from trivisor.x86.descriptors import INTERRUPT_GATE16, Gate, build_gate

_V86 = 0x20000
"""Linear address of the virtual machine's code: 2000:0000; its data is at 3000:0000, its stack below 4000:8000."""
_ENTER = """
    push edx
    push ecx
    push dword 0x3000
    push dword 0x5000
    push dword 0x4000
    push dword 0x8000
    push eax
    push dword 0x2000
    push dword 0
    iret
"""
VM, IF = 1 << 17, 1 << 9


def virtual(machine: Make, code: str, iopl: int = 3, source: str = _ENTER) -> Machine:
    """A 32-bit kernel that enters virtual-8086 mode with these flags in EAX, FS = ECX and GS = EDX."""
    m = machine(source, 32)
    program = assemble(code, bits=16)
    m.memory.write(_V86, program.code)
    m.labels.update({f"v.{name}": value for name, value in program.labels.items()})
    m.set(rax=VM | iopl << 12 | 2, rcx=0x6000, rdx=0x7000)
    return m


def stack(m: Machine, count: int) -> list[int]:
    return [m.word(m["rsp"] + 4 * i) for i in range(count)]


def fault(m: Machine) -> int:
    """Run to a handler; its vector."""
    m.run()
    where = m.core.linear_rip
    assert HANDLERS <= where < HANDLERS + 0x1000, hex(where)
    return where - HANDLERS >> 4


def test_in_and_out_again(machine: Make) -> None:
    m = virtual(machine, "mov [0x10], cs\n push ss\n pop bx\n mov si, es\n mov di, gs\n end: ud2")
    assert fault(m) == 6
    assert m.memory.read_u16(0x30010) == 0x2000
    assert (m["rbx"], m["rsi"], m["rdi"]) == (0x4000, 0x5000, 0x7000)
    assert m["rsp"] == KERNEL_STACK - 36
    assert stack(m, 9) == [
        m.labels["v.end"], 0x2000, VM | 0x13002, 0x8000, 0x4000, 0x5000, 0x3000, 0x6000, 0x7000,
    ]  # fmt: skip
    state = m.vcpu.state
    assert not state.rflags & VM
    assert (state.cs.selector, state.ss.selector) == (KERNEL_CS32, KERNEL_DS)
    for segment in (state.ds, state.es, state.fs, state.gs):
        assert (segment.selector, segment.attributes) == (0, 0)


def test_a_snapshot_taken_inside_goes_on(machine: Make) -> None:
    m = virtual(machine, "inc bx\n ud2")
    for _ in range(11):
        m.step()
    state = m.vcpu.state
    assert (state.rip, state.cs.base, state.ss.attributes) == (1, _V86, 0xF3)
    m.vcpu.state = state
    assert fault(m) == 6
    assert m["rbx"] == 1


@pytest.mark.parametrize("code", ["cli", "sti", "pushf", "popf", "iret", "int 0x40", "db 0x66\n pushf"])
def test_iopl_guards_the_flags(machine: Make, code: str) -> None:
    m = virtual(machine, code, iopl=0)
    m.gate(0x40, HANDLERS + 16 * 0x40, dpl=3)
    assert fault(m) == 13
    assert stack(m, 2) == [0, 0]  # error code and EIP
    m = virtual(machine, f"{code}\n ud2", iopl=3)
    m.gate(0x40, HANDLERS + 16 * 0x40, dpl=3)
    m.memory.write(0x48000, b"\x01\x00\x00\x20\x02\x02")  # an IRET's frame: 2000:0001, and flags for POPF
    assert fault(m) == (0x40 if code.startswith("int") else 6)


@pytest.mark.parametrize("code", ["int3", "into"])
def test_breakpoints_do_not_ask_for_iopl(machine: Make, code: str) -> None:
    m = virtual(machine, code, iopl=0)
    m.set(rax=m["rax"] | 0x800)
    assert fault(m) == (3 if code == "int3" else 4)
    assert stack(m, 2)[:2] == [1, 0x2000]


@pytest.mark.parametrize("code", ["hlt", "lgdt [0]", "mov eax, cr0", "mov cr0, eax", "clts", "invd"])
def test_privileged_instructions(machine: Make, code: str) -> None:
    assert fault(virtual(machine, code)) == 13


@pytest.mark.parametrize("code", ["lldt ax", "sldt ax", "lar ax, bx", "verr ax", "arpl ax, bx", "str ax"])
def test_instructions_that_need_descriptors(machine: Make, code: str) -> None:
    assert fault(virtual(machine, code)) == 6


def test_ports_go_by_the_bitmap_alone(machine: Make) -> None:
    m = virtual(machine, "in al, 0x80\n ud2", iopl=3)
    assert fault(m) == 13
    m = virtual(machine, "in al, 0x80\n ud2", iopl=0)
    m.memory.write_u16(TSS + 102, 0x68)
    m.memory.write(TSS + 0x68, bytes(0x20) + b"\xff")
    state = m.vcpu.state
    state.tr.limit = 0x88
    m.vcpu.state = state
    assert fault(m) == 6


def test_popf_leaves_iopl_and_vm_alone(machine: Make) -> None:
    m = virtual(machine, "push word 0x7ed5\n popf\n pushf\n pop bx\n ud2")
    assert fault(m) == 6
    assert m["rbx"] == 0x7ED7
    flags = stack(m, 3)[2]
    assert flags & VM and flags & 0x3000 == 0x3000


def test_far_transfers_are_those_of_real_mode(machine: Make) -> None:
    m = virtual(machine, "call 0x2000:f\n mov dx, 1\n ud2\n f: mov ax, cs\n mov ds, ax\n mov si, [0]\n retf")
    assert fault(m) == 6
    assert (m["rdx"] & 0xFFFF, m["rsi"]) == (1, m.memory.read_u16(_V86))


def test_limits(machine: Make) -> None:
    assert fault(virtual(machine, "mov bx, 0xffff\n mov ax, [bx]")) == 13
    m = virtual(machine, "mov bp, 0xffff\n mov ax, [bp]")
    assert fault(m) == 12


def test_the_handler_must_be_at_level_0(machine: Make) -> None:
    m = virtual(machine, "int 0x40")
    m.memory.write_u64(IDT + 8 * 0x40, build_gate(Gate(0xE, USER_CS32 | 3, 0x1000, 3, True)))
    assert fault(m) == 13
    assert m.word(m["rsp"]) == USER_CS32


def test_a_16_bit_gate_pushes_words(machine: Make) -> None:
    m = virtual(machine, "int 0x40")
    m.memory.write_u64(IDT + 8 * 0x40, build_gate(Gate(INTERRUPT_GATE16, KERNEL_CS32, HANDLERS, 3, True)))
    assert fault(m) == 0
    frame = [m.memory.read_u16(m["rsp"] + 2 * i) for i in range(9)]
    assert frame == [2, 0x2000, 0x3002, 0x8000, 0x4000, 0x5000, 0x3000, 0x6000, 0x7000]


def test_external_interrupts_leave_it(machine: Make) -> None:
    m = virtual(machine, "sti\n nop\n again: jmp again")
    m.gate(0x55, HANDLERS + 16 * 0x55)
    m.interrupt(0x55)
    assert fault(m) == 0x55
    assert stack(m, 3)[2] & (VM | IF) == VM | IF


def test_single_steps(machine: Make) -> None:
    m = virtual(machine, "nop\n nop")
    m.set(rax=m["rax"] | 0x100)
    assert fault(m) == 1
    assert stack(m, 2) == [1, 0x2000]


def test_16_bit_interrupt_gate_from_ring_3_to_ring_0(machine: Make) -> None:
    """The frame is of words on a 32-bit stack (SDM 3A 6.12.1.3)."""
    m = machine("int 0x40\n here: hlt", 32, cpl=3)
    m.memory.write_u64(IDT + 8 * 0x40, build_gate(Gate(INTERRUPT_GATE16, KERNEL_CS32, HANDLERS, 3, True)))
    assert fault(m) == 0
    frame = [m.memory.read_u16(m["rsp"] + 2 * i) for i in range(5)]
    assert frame[0] == m.labels["here"] & 0xFFFF
    assert (frame[1], frame[4]) == (USER_CS32 | 3, USER_DS | 3)
