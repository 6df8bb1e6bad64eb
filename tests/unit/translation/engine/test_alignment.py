"""Alignment checks (Intel SDM 3A 6.15, interrupt 17): #AC(0) at CPL 3, with CR0.AM and RFLAGS.AC, and nowhere else."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import DATA, USER_STACK, Machine, Make

AM, AC = 1 << 18, 1 << 18


def guest(machine: Make, source: str, bits: int = 64, *, cpl: int = 3, am: int = AM, ac: int = AC) -> Machine:
    m = machine(source, bits, cpl=cpl)
    state = m.initial_state(cpl)
    state.cr0 |= am
    state.rflags |= ac
    m.vcpu.state = state
    return m


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(
    ("access", "offset"),
    [
        ("mov ax, [esi]", 1), ("mov eax, [esi]", 2), ("mov [esi], eax", 1), ("inc dword [esi]", 3),
        ("fld qword [esi]", 4), ("fld tword [esi]", 4), ("movsd", 1), ("rep stosd", 2), ("push dword [esi]", 2),
        ("xchg [esi], eax", 1), ("movq mm0, [esi]", 4), ("cmpxchg8b [esi]", 4),
    ],
)  # fmt: skip
def test_odd_addresses_fault(machine: Make, bits: int, access: str, offset: int) -> None:
    if bits == 64:
        access = access.replace("esi", "rsi").replace("push dword", "push qword")
    m = guest(machine, f"{access}\n int3", bits)
    frame = m.fault(rsi=DATA + offset, rdi=DATA + offset, rcx=4)
    assert (frame.vector, frame.error, frame.rip) == (17, 0, m.origin)
    assert frame.rflags & AC
    m.restart(3)
    state = m.vcpu.state
    state.cr0 |= AM
    state.rflags |= AC
    m.vcpu.state = state
    assert m.fault(rsi=DATA, rdi=DATA + 64, rcx=4).vector == 3


@pytest.mark.parametrize("access", ["mov al, [rsi]", "movups xmm0, [rsi]", "movdqu [rsi], xmm0", "fxsave [rdi]"])
def test_what_need_not_be_aligned(machine: Make, access: str) -> None:
    m = guest(machine, f"{access}\n int3")
    assert m.fault(rsi=DATA + 1, rdi=DATA + 256).vector == 3


@pytest.mark.parametrize(("cpl", "am", "ac"), [(0, AM, AC), (3, 0, AC), (3, AM, 0)])
def test_only_with_both_bits_and_for_the_user(machine: Make, cpl: int, am: int, ac: int) -> None:
    m = guest(machine, "mov eax, [rsi]\n int3", cpl=cpl, am=am, ac=ac)
    assert m.fault(rsi=DATA + 1).vector == 3


def test_the_stack_counts(machine: Make) -> None:
    m = guest(machine, "push rax")
    assert m.fault(rsp=USER_STACK - 4).vector == 17


def test_across_pages(machine: Make) -> None:
    m = guest(machine, "mov eax, [rsi]")
    assert m.fault(rsi=DATA + 0xFFE).vector == 17


def test_popf_switches(machine: Make) -> None:
    m = guest(
        machine,
        "mov eax, [rsi]\n pushfq\n or dword [rsp], 0x40000\n popfq\n struck: mov eax, [rsi]",
        ac=0,
    )
    frame = m.fault(rsi=DATA + 1)
    assert (frame.vector, frame.rip) == (17, m.labels["struck"])
    m = guest(machine, "pushfq\n and dword [rsp], ~0x40000\n popfq\n mov eax, [rsi]\n int3")
    assert m.fault(rsi=DATA + 1).vector == 3


@pytest.mark.parametrize("way", ["iretq", "sysretq"])
def test_returns_to_user_code_switch(machine: Make, way: str) -> None:
    back = {
        "iretq": f"push USER_DS | 3\n push {USER_STACK}\n push 0x40002\n push USER_CS | 3\n lea rax, [rel user]\n push rax\n iretq",
        "sysretq": "lea rcx, [rel user]\n mov r11d, 0x40002\n sysretq",
    }[way]
    m = guest(
        machine,
        "mov ecx, 0xc0000081\n xor eax, eax\n mov edx, 0x00180008\n wrmsr\n xor eax, eax\n mov ds, eax\n mov es, eax\n"
        f"mov ebx, [rsi]\n {back}\n user: mov ebx, [rsi]",
        cpl=0, ac=0,
    )  # fmt: skip
    for _ in range(3):
        state = m.initial_state()
        state.cr0 |= AM
        m.vcpu.state = state
        frame = m.fault(rsi=DATA + 1)
        assert (frame.vector, frame.rip) == (17, m.labels["user"])
