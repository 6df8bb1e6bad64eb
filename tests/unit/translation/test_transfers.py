"""Flags, interrupts, system calls and far transfers, against the Intel SDM (2A, 2B; 3A 5.8)."""

from __future__ import annotations

from typing import Any

import pytest

from trivisor.machine.exits import Halt
from trivisor.translation.core import CS, DS, RAX, RBX, RCX, RDX, RSP, SS
from trivisor.x86.descriptors import CALL_GATE16, Gate, build_gate

GP0, UD = (13, 0), (6, None)
CF, TF, IF, OF, NT, RF, AC = 1, 1 << 8, 1 << 9, 1 << 11, 1 << 14, 1 << 16, 1 << 18
KERNEL_TEXT = 0xFFFFFFFF81000000


def test_halt_says_whether_anything_can_wake_it(cpu: Any) -> None:
    cpu.long_mode()
    assert cpu.do("hlt") == Halt(False)
    assert cpu.core.rip == 0x8001
    cpu.core.rflags |= IF
    assert cpu.do("hlt") == Halt(True)


def test_sti_shadow(cpu: Any) -> None:
    core = cpu.long_mode().core
    cpu.advanced("sti")
    assert core.rflags & IF and core.interrupt_shadow
    cpu.advanced("sti")  # IF was set already
    assert not core.interrupt_shadow
    cpu.advanced("cli")
    assert not core.rflags & IF
    core.cpl, core.rflags = 3, 2 | 3 << 12
    cpu.advanced("sti")
    assert core.rflags & IF


def test_protected_mode_virtual_interrupts(cpu: Any) -> None:
    core = cpu.protected(3).core
    core.cr4 |= 2
    cpu.advanced("sti")
    assert core.rflags == 2 | 1 << 19
    cpu.advanced("cli")
    assert core.rflags == 2
    core.rflags |= 1 << 20  # an interrupt waits
    assert cpu.fault("sti") == GP0


@pytest.mark.parametrize(
    ("cpl", "iopl", "image", "expected"),
    [
        (0, 0, 0xFFFFFFFF, 0x2 | 0x244FD5 | IF | 3 << 12),
        (3, 0, 0xFFFFFFFF, 0x2 | 0x244FD5 & ~IF),
        (3, 3, 0, 0x2 | 3 << 12),
        (3, 3, IF, 0x2 | IF | 3 << 12),
    ],
)
def test_popf(cpu: Any, layout: Any, cpl: int, iopl: int, image: int, expected: int) -> None:
    core = cpu.long_mode(cpl).core
    core.rflags = 2 | iopl << 12 | RF
    cpu.put(layout.STACK, 8, image)
    cpu.advanced("popfq")
    assert core.rflags == expected | (TF if image & TF else 0)
    assert core.regs[RSP] == layout.STACK + 8
    assert cpu.calls == (["mode"] if image & TF else [])


def test_pushf_sizes(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    core.rflags = 2 | AC | RF | CF
    cpu.advanced("pushfq")
    assert cpu.get(layout.STACK - 8, 8, 1) == [2 | AC | CF]
    cpu.advanced(bytes.fromhex("669c"))
    assert core.regs[RSP] == layout.STACK - 10
    cpu.put(layout.STACK - 10, 2, 0)
    cpu.advanced(bytes.fromhex("669d"))
    assert core.rflags == 2 | AC


def test_ac_flag(cpu: Any) -> None:
    cpu.long_mode()
    cpu.advanced("stac")
    assert cpu.core.rflags & AC
    cpu.advanced("clac")
    assert not cpu.core.rflags & AC
    cpu.long_mode(3)
    assert cpu.fault("stac") == UD


# INT and IRET


def test_software_interrupts(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode(3).core
    for vector, code in ((0x80, "cd80"), (3, "cc"), (1, "f1")):
        cpu.long_mode(3)
        cpu.gate(vector, layout.KERNEL_CS64, 0x12345, dpl=0 if vector == 1 else 3)
        assert cpu.do(bytes.fromhex(code)) is None
        assert core.rip == 0x12345
        assert cpu.get(core.regs[RSP], 8, 1) == [0x8000 + len(code) // 2]
    cpu.long_mode(3)
    cpu.gate(3, layout.KERNEL_CS64, 0x12345)
    assert cpu.fault("int3") == (13, 3 << 3 | 2)


def test_overflow_and_bound(cpu: Any, layout: Any) -> None:
    core = cpu.protected().core
    cpu.gate(4, layout.KERNEL_CS32, 0x4444)
    cpu.advanced("into")
    core.rflags |= OF
    cpu.do("into")
    assert core.rip == 0x4444
    core.rip, core.regs[RBX] = 0x8000, 0x10000
    cpu.put(0x10000, 4, 0xFFFFFFFE, 5)
    for index in (0xFFFFFFFE, 0, 5):
        core.regs[RAX] = index
        cpu.advanced("bound eax, [ebx]")
    for index in (0xFFFFFFFD, 6):
        core.regs[RAX] = index
        assert cpu.fault("bound eax, [ebx]") == (5, None)


def put_frame(cpu: Any, size: int, *values: int) -> None:
    cpu.put(cpu.core.regs[RSP], size, *values)


def test_iretq_to_user(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    core.nmi_blocked = True
    put_frame(cpu, 8, 0x400000, layout.USER_CS64 | 3, 0x202 | RF, 0x7FFF0000, layout.USER_DS | 3)
    assert cpu.do("iretq") is None
    assert (core.rip, core.cpl, core.rflags) == (0x400000, 3, 0x202 | RF)
    assert core.regs[RSP] == 0x7FFF0000
    assert core.segments[CS].attributes == 0xA0FB
    assert core.segments[SS].selector == layout.USER_DS | 3
    assert core.segments[DS].selector == 0  # a kernel segment
    assert not core.nmi_blocked
    assert "mode" in cpu.calls


def test_iretq_within_the_kernel_takes_the_stack_too(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    put_frame(cpu, 8, KERNEL_TEXT, layout.KERNEL_CS64, 0x2, 0x123457, 0)
    cpu.do("iretq")
    assert (core.rip, core.regs[RSP], core.segments[SS].selector) == (KERNEL_TEXT, 0x123457, 0)
    assert core.segments[DS].selector == layout.KERNEL_DS


def test_iret_to_compatibility_mode(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    put_frame(cpu, 8, 0x400000, layout.USER_CS32 | 3, 0x202, 0xFFFFFFFF_7FFF0000, layout.USER_DS | 3)
    cpu.do("iretq")
    assert (core.cpl, core.regs[RSP], core.segments[CS].attributes) == (3, 0x7FFF0000, 0xC0FB)


def test_iret_checks(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode().core
    user, data = layout.USER_CS64 | 3, layout.USER_DS | 3
    for frame, expected in (
        ((0, 0, 2, 0, data), GP0),
        ((0, layout.KERNEL_DS, 2, 0, data), (13, layout.KERNEL_DS)),
        ((0, layout.USER_CS64, 2, 0, data), (13, layout.USER_CS64)),
        ((0, 0x1F8, 2, 0, data), (13, 0x1F8)),
        ((1 << 47, user, 2, 0, data), GP0),
        ((0, user, 2, 0, 0), GP0),
        ((0, user, 2, 0, layout.KERNEL_DS), (13, layout.KERNEL_DS)),
        ((0, user, 2, 0, layout.KERNEL_DS | 3), (13, layout.KERNEL_DS)),
    ):
        put_frame(cpu, 8, *frame)
        assert cpu.fault("iretq") == expected
    core.rflags |= NT
    assert cpu.fault("iretq") == GP0


def test_user_iret_cannot_raise_itself(cpu: Any, layout: Any) -> None:
    core = cpu.long_mode(3).core
    put_frame(cpu, 8, 0x400000, layout.KERNEL_CS64, 2, 0, layout.KERNEL_DS)
    assert cpu.fault("iretq") == (13, layout.KERNEL_CS64)
    put_frame(cpu, 8, 0x400000, layout.USER_CS64 | 3, 0x3202, 0x5000, layout.USER_DS | 3)
    cpu.do("iretq")
    assert (core.rip, core.rflags) == (0x400000, 2)  # neither IOPL nor IF


def test_iretd_in_protected_mode(cpu: Any, layout: Any) -> None:
    core = cpu.protected().core
    put_frame(cpu, 4, 0x1234, layout.KERNEL_CS32, 0x202)
    cpu.do("iretd")
    assert (core.rip, core.regs[RSP], core.rflags) == (0x1234, layout.STACK + 12, 0x202)
    put_frame(cpu, 4, 0x4321, layout.USER_CS32 | 3, 0x202, 0x5000, layout.USER_DS | 3)
    cpu.do("iretd")
    assert (core.rip, core.regs[RSP], core.cpl) == (0x4321, 0x5000, 3)


def test_iret_in_real_mode(cpu: Any) -> None:
    core = cpu.real().core
    cpu.put(0x18000, 2, 0x1234, 0xF000, 0x202)
    assert cpu.do(bytes.fromhex("cf")) is None
    assert (core.rip, core.segments[CS].base, core.rflags, core.regs[RSP]) == (0x1234, 0xF0000, 0x202, 0x8006)


# system calls


def test_syscall_and_sysret(cpu: Any) -> None:
    core = cpu.long_mode(3).core
    core.star, core.lstar, core.fmask = 0x0023_0010 << 32, KERNEL_TEXT, IF | TF
    core.rflags = 0x202 | CF
    assert cpu.do("syscall") is None
    assert (core.rip, core.cpl, core.rflags) == (KERNEL_TEXT, 0, 2 | CF)
    assert (core.regs[RCX], core.regs[11]) == (0x8002, 0x202 | CF)
    assert (core.segments[CS].selector, core.segments[CS].attributes) == (0x10, 0xA09B)
    assert (core.segments[SS].selector, core.segments[SS].attributes) == (0x18, 0xC093)
    assert cpu.do(bytes.fromhex("480f07")) is None  # sysretq
    assert (core.rip, core.cpl, core.rflags) == (0x8002, 3, 0x202 | CF)
    assert (core.segments[CS].selector, core.segments[CS].attributes) == (0x33, 0xA0FB)
    assert (core.segments[SS].selector, core.segments[SS].attributes) == (0x2B, 0xC0F3)


def test_sysret_to_32bit_and_its_checks(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.star, core.regs[RCX], core.regs[11] = 0x0023 << 48, 0xABCD_00400000, 0x202
    cpu.do(bytes.fromhex("0f07"))
    assert (core.rip, core.segments[CS].selector, core.segments[CS].attributes) == (0x400000, 0x23, 0xC0FB)
    cpu.long_mode()
    core.regs[RCX] = 1 << 47
    assert cpu.fault(bytes.fromhex("480f07")) == GP0
    core.efer &= ~1
    assert cpu.fault("syscall") == UD
    cpu.compatibility()
    assert cpu.fault(bytes.fromhex("0f05")) == UD  # as Intel has it


def test_sysenter_and_sysexit(cpu: Any) -> None:
    core = cpu.compatibility().core
    core.rflags = 0x202
    assert cpu.fault("sysenter") == GP0
    core.sysenter_cs, core.sysenter_esp, core.sysenter_eip = 0x10, KERNEL_TEXT + 8, KERNEL_TEXT
    cpu.do("sysenter")
    assert (core.rip, core.regs[RSP], core.cpl, core.rflags) == (KERNEL_TEXT, KERNEL_TEXT + 8, 0, 2)
    assert (core.segments[CS].selector, core.segments[CS].attributes) == (0x10, 0xA09B)
    cpu.bits = 64
    core.regs[RCX], core.regs[RDX] = 0x7000, 0x400000
    cpu.do(bytes.fromhex("480f35"))
    assert (core.rip, core.regs[RSP], core.cpl) == (0x400000, 0x7000, 3)
    assert (core.segments[CS].selector, core.segments[SS].selector) == (0x33, 0x3B)
    core = cpu.protected().core
    cpu.do("sysexit")
    assert (core.segments[CS].selector, core.segments[CS].attributes) == (0x23, 0xC0FB)


# far transfers


def test_far_jump_into_64bit_code(cpu: Any, layout: Any) -> None:
    core = cpu.compatibility(0).core
    cpu.do(f"jmp {layout.KERNEL_CS64}:0x12345")
    assert (core.rip, core.segments[CS].attributes) == (0x12345, 0xA09B)
    assert "mode" in cpu.calls


def test_far_jump_checks(cpu: Any, layout: Any) -> None:
    core = cpu.protected(3).core
    for selector, expected in (
        (0, GP0), (layout.USER_DS | 3, (13, layout.USER_DS)), (layout.KERNEL_CS32, (13, layout.KERNEL_CS32)),
        (0x1F8, (13, 0x1F8)),
    ):  # fmt: skip
        assert cpu.fault(f"jmp {selector}:0x1000") == expected
    cpu.do(f"jmp {layout.CONFORMING_CS}:0x1000")
    assert (core.cpl, core.segments[CS].selector) == (3, layout.CONFORMING_CS | 3)
    cpu.protected()
    assert cpu.fault(f"jmp {layout.KERNEL_CS16}:0x10000") == GP0  # beyond the limit
    cpu.long_mode()
    core.regs[RBX] = 0x10000
    cpu.put(0x10000, 4, 0, layout.TSS_SELECTOR)
    assert cpu.fault(bytes.fromhex("ff2b")) == (13, layout.TSS_SELECTOR)


def test_far_call_and_return(cpu: Any, layout: Any) -> None:
    core = cpu.protected().core
    cpu.do(f"call {layout.KERNEL_CS32}:0x1234")
    assert core.rip == 0x1234
    assert cpu.get(core.regs[RSP], 4, 2) == [0x8007, layout.KERNEL_CS32]
    cpu.do(bytes.fromhex("ca0400"))  # retf 4
    assert (core.rip, core.regs[RSP]) == (0x8007, layout.STACK + 4)


def test_far_call_in_real_mode(cpu: Any) -> None:
    core = cpu.real().core
    cpu.do("call 0xF000:0x1234")
    assert (core.rip, core.segments[CS].base) == (0x1234, 0xF0000)
    assert cpu.get(0x17FFC, 2, 2) == [5, 0x800]
    cpu.do(bytes.fromhex("cb"))
    assert (core.rip, core.segments[CS].base, core.regs[RSP]) == (5, 0x8000, 0x8000)


def test_call_gate_to_the_kernel_copies_parameters(cpu: Any, layout: Any) -> None:
    core = cpu.protected(3).core
    cpu.call_gate(layout.KERNEL_CS32, 0x1234, parameters=2)
    cpu.put(layout.STACK, 4, 0xAAAA, 0xBBBB)
    cpu.do(f"call {layout.GATE_SELECTOR | 3}:0")
    assert (core.rip, core.cpl, core.regs[RSP]) == (0x1234, 0, layout.KERNEL_STACK - 24)
    assert cpu.get(core.regs[RSP], 4, 6) == [
        0x8007, layout.USER_CS32 | 3, 0xAAAA, 0xBBBB, layout.STACK, layout.USER_DS | 3,
    ]  # fmt: skip
    cpu.do(bytes.fromhex("ca0800"))  # back, dropping the parameters on both stacks
    assert (core.rip, core.cpl, core.regs[RSP]) == (0x8007, 3, layout.STACK + 8)


def test_a_16_bit_call_gate_copies_words(cpu: Any, layout: Any) -> None:
    core = cpu.protected(3).core
    gate = Gate(CALL_GATE16, layout.KERNEL_CS32, 0x1234, 3, True, parameters=3)
    cpu.memory.write_u64(layout.GDT + layout.GATE_SELECTOR, build_gate(gate))
    cpu.put(layout.STACK, 2, 0xAAAA, 0xBBBB, 0xCCCC)
    cpu.do(f"call {layout.GATE_SELECTOR | 3}:0")
    assert (core.rip, core.cpl, core.regs[RSP]) == (0x1234, 0, layout.KERNEL_STACK - 14)
    assert cpu.get(core.regs[RSP], 2, 7) == [
        0x8007, layout.USER_CS32 | 3, 0xAAAA, 0xBBBB, 0xCCCC, layout.STACK & 0xFFFF, layout.USER_DS | 3,
    ]  # fmt: skip


def test_call_gate_to_conforming_code_keeps_the_level(cpu: Any, layout: Any) -> None:
    core = cpu.protected(3).core
    cpu.call_gate(layout.CONFORMING_CS, 0x1234, parameters=2)
    cpu.do(f"call {layout.GATE_SELECTOR | 3}:0")
    assert (core.rip, core.cpl, core.regs[RSP]) == (0x1234, 3, layout.STACK - 8)
    assert core.segments[CS].selector == layout.CONFORMING_CS | 3
    core = cpu.protected(3).core
    cpu.call_gate(layout.CONFORMING_CS, 0x4321)
    cpu.do(f"jmp {layout.GATE_SELECTOR | 3}:0")  # such a jump is allowed
    assert (core.rip, core.cpl) == (0x4321, 3)


def test_call_gate_checks(cpu: Any, layout: Any) -> None:
    cpu.protected(3)
    cpu.call_gate(layout.KERNEL_CS32, 0x1234, dpl=2)
    assert cpu.fault(f"call {layout.GATE_SELECTOR}:0") == (13, layout.GATE_SELECTOR)
    cpu.call_gate(layout.KERNEL_CS32, 0x1234)
    assert cpu.fault(f"jmp {layout.GATE_SELECTOR}:0") == (13, layout.KERNEL_CS32)  # a jump keeps its level
    cpu.call_gate(layout.KERNEL_DS, 0x1234)
    assert cpu.fault(f"call {layout.GATE_SELECTOR}:0") == (13, layout.KERNEL_DS)


def test_call_gate_in_long_mode(cpu: Any, layout: Any) -> None:
    core = cpu.compatibility().core
    cpu.call_gate(layout.KERNEL_CS64, KERNEL_TEXT)
    cpu.do(f"call {layout.GATE_SELECTOR | 3}:0")
    assert (core.rip, core.cpl, core.segments[SS].selector) == (KERNEL_TEXT, 0, 0)
    assert cpu.get(core.regs[RSP], 8, 4) == [0x8007, layout.USER_CS32 | 3, layout.STACK, layout.USER_DS | 3]
    cpu.bits = 64
    cpu.do(bytes.fromhex("48cb"))
    assert (core.rip, core.cpl, core.regs[RSP]) == (0x8007, 3, layout.STACK)
