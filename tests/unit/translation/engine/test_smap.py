"""CR4.SMAP (Intel SDM 3A 4.6): the kernel's data accesses to user pages fault unless RFLAGS.AC is set.

User pages that were let into the kernel's software TLB must be out of it as soon as AC is clear, however it was
cleared.
"""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import (
    CODE,
    DATA,
    GDT,
    IDT,
    KERNEL_CS,
    KERNEL_STACK,
    STACK,
    TSS,
    Machine,
    Make,
    P,
    W,
)
from trivisor.machine.exits import Shutdown

SMAP = 1 << 21
AC = 1 << 18
OWN = (CODE, DATA, STACK - 0x1000, GDT, IDT, TSS, 0x9000)


def guest(machine: Make, source: str, *, own: tuple[int, ...] = OWN) -> Machine:
    """A kernel with SMAP on whose own pages (`own`) are the supervisor's; all others are the user's."""
    m = machine(source)
    for page in own:
        m.map(page, page, P | W)
    state = m.initial_state()
    state.cr4 |= SMAP
    m.vcpu.state = state
    return m


USER = 0x400000
"""A user page."""


@pytest.mark.parametrize(("access", "error"), [("mov eax, [rsi]", 1), ("mov [rsi], eax", 3), ("inc byte [rsi]", 3)])
def test_user_pages_are_out_of_reach(machine: Make, access: str, error: int) -> None:
    m = guest(machine, access)
    frame = m.fault(rsi=USER)
    assert (frame.vector, frame.error, m.core.cr2) == (14, error, USER)


def test_stac_opens_and_clac_closes(machine: Make) -> None:
    m = guest(machine, "stac\n mov eax, [rsi]\n mov [rsi], ebx\n clac\n mov ecx, [rsi]")
    m.memory.write_u32(USER, 77)
    frame = m.fault(rsi=USER, rbx=5)
    assert (frame.vector, frame.error) == (14, 1)
    assert m["rax"] == 77 and m.memory.read_u32(USER) == 5
    assert not frame.rflags & AC


def test_it_opens_again(machine: Make) -> None:
    m = guest(machine, "mov ecx, 50\n again: stac\n inc dword [rsi]\n clac\n loop again\n hlt")
    m.halt(rsi=USER)
    assert m.memory.read_u32(USER) == 50


def test_more_pages_than_are_noted(machine: Make) -> None:
    m = guest(
        machine,
        "stac\n mov ecx, 40\n mov rdi, rsi\n open: inc byte [rdi]\n add rdi, 4096\n loop open\n clac\n try: inc byte [rsi]",
    )
    for page in (0, 17, 39):
        m.restart()
        state = m.vcpu.state
        state.cr4 |= SMAP
        m.vcpu.state = state
        m.core.rip = CODE
        assert m.fault(rsi=USER).vector == 14
        frame = m.fault("try", rsi=USER + page * 4096)
        assert (frame.vector, m.core.cr2) == (14, USER + page * 4096)


def test_they_keep_the_arithmetic_flags(machine: Make) -> None:
    m = guest(machine, "stac\n mov al, [rsi]\n cmp ebx, 5\n clac\n setz cl\n cmp ebx, 6\n stac\n setc ch\n clac\n hlt")
    m.halt(rsi=USER, rbx=5, rcx=0)
    assert m["rcx"] == 0x101


@pytest.mark.parametrize(
    "clearing",
    [
        "pushfq\n and dword [rsp], ~0x40000\n popfq\n",
        f"mov rax, rsp\n push 0x10\n push rax\n push 2\n push {KERNEL_CS}\n lea rax, [rel on]\n push rax\n iretq\n on:",
    ],
    ids=["popf", "iret"],
)
def test_other_ways_to_clear_ac(machine: Make, clearing: str) -> None:
    m = guest(machine, f"stac\n mov eax, [rsi]\n {clearing} mov ecx, [rsi]")
    frame = m.fault(rsi=USER)
    assert (frame.vector, frame.error) == (14, 1)


def test_syscall_clears_ac_by_its_mask(machine: Make) -> None:
    m = guest(
        machine,
        "mov ecx, 0xc0000081\n xor eax, eax\n mov edx, 0x00180008\n wrmsr\n inc ecx\n lea eax, [rel entry]\n"
        f"xor edx, edx\n wrmsr\n mov ecx, 0xc0000084\n mov eax, {AC}\n wrmsr\n"
        "stac\n mov eax, [rsi]\n lea rcx, [rel user]\n mov r11d, 0x40002\n sysretq\n"
        "entry: mov edx, [rsi]\n hlt\n align 4096\n user: syscall",
    )
    frame = m.fault(rsi=USER)
    assert (frame.vector, frame.error, frame.rip) == (14, 1, m.labels["entry"])
    assert m["r11"] & AC


def test_ac_does_not_open_what_the_processor_reads_itself(machine: Make) -> None:
    m = guest(machine, "stac\n mov eax, 0x10\n mov ds, eax", own=tuple(page for page in OWN if page != GDT))
    # Neither can the handler's code segment be read then, so it is a triple fault.
    assert isinstance(m.run(), Shutdown)


def test_the_user_is_not_concerned(machine: Make) -> None:
    m = machine(f"mov rax, [{USER}]\n int3", cpl=3)
    for page in (GDT, IDT, TSS, 0x9000, KERNEL_STACK - 0x1000):
        m.map(page, page, P | W)
    state = m.initial_state(cpl=3)
    state.cr4 |= SMAP
    m.vcpu.state = state
    assert m.fault().vector == 3
