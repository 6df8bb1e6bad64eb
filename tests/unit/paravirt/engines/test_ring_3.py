"""Hypercalls that the page where SYSCALL goes answers in ring 3, where it stays there; what a guest can do to that page."""

from __future__ import annotations

import threading

from tests.unit.paravirt.engines.conftest import Guest
from tests.unit.paravirt.engines.test_programs import SET_TRAPS, TRAPS, USER
from trivisor.hardware.kvm.direct.vcpu import DirectVcpu
from trivisor.machine.exits import Hypercall, Kicked
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS

IS_UP = "mov edi, 3\n mov eax, vcpu_op\n syscall\n"


def crossings(guest: Guest) -> int:
    """System calls that have left ring 3, under direct execution."""
    return guest.vcpu.statistics()["exits"]["system call"]


def test_which_processors_are_up(boot) -> None:
    """Registers and flags are what a hypercall leaves, with the guest's stack where it can be used and where not."""
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + f"""
    mov rdx, 21
    mov r8, 22
    mov r12, rsp
    xor esi, esi
    std
    stc
{IS_UP}
up: pushfq
    cld
    pop qword [DATA + 16]
    mov [DATA + 8], rax
    mov [DATA + 24], rcx
    mov [DATA + 32], r11
    add rdx, r8
    add rdx, rdi
    mov [DATA + 40], rdx
    cmp rsp, r12
    jne shutdown
    mov esi, 7
{IS_UP}
    mov [DATA + 48], rax
    xor esi, esi
    mov rsp, 0x12340
{IS_UP}
    mov rsp, 0x1234567812345678
    mov rbx, rax
{IS_UP}
    mov rsp, r12
    shl rax, 8
    or rax, rbx
    mov [DATA + 56], rax
    jmp shutdown
"""
    )
    guest.finish()
    flags = guest[2]
    assert guest.words(1, 1) == [1] and flags & 0x401 == 0x401
    assert guest.words(3, 2) == [guest.label("up"), flags] and guest[5] == 46
    assert guest.words(6, 2) == [(1 << 64) - abi.ENOENT, 0x101]
    if isinstance(guest.vcpu, DirectVcpu) and guest.vcpu.ring_0_is_emulated:
        assert crossings(guest) == 4, "set_trap_table, sched_op and the two without a stack"


def test_a_user_who_calls_the_same_calls_the_guests_kernel(boot) -> None:
    guest = boot(
        TRAPS + "start:" + USER + f"""
user:
{IS_UP}
after:
    ud2
entered:
    mov [DATA + 16], rax
    mov [DATA + 24], rcx
    jmp shutdown
"""
    )
    guest.finish()
    assert guest.words(2, 2) == [24, guest.label("after")]


def test_what_the_users_program_notes_is_nobodys(boot) -> None:
    """The kernel's stack is what the kernel has said last, and the user's GS base; not what stands in the notes."""
    guest = boot(
        TRAPS + "start:" + USER + """
user:
    mov rbx, [DATA + 0x40]
    mov rax, [gs:0]
    mov [DATA + 0x48], rax
    test rbx, rbx
    jz call
    mov qword [rbx], 1
    mov qword [rbx + 8], 1
    mov qword [rbx + 16], 0xe02b
    mov qword [rbx + 24], USER_STACK - 64
    mov qword [rbx + 32], 0x1234
call:
    mov eax, 39
    syscall
entered:
    mov [DATA + 0x50], rsp
    mov edi, 0
    mov rsi, KERNEL_STACK - 256
    mov eax, stack_switch
    syscall
    mov edi, 1
    mov rsi, 0x7000
    mov eax, set_segment_base
    syscall
    or rax, rsi
    mov [DATA + 0x58], rax
    mov edi, 1
    mov rsi, 0x0000900000000000
    mov eax, set_segment_base
    syscall
    mov [DATA + 0x60], rax
    mov ecx, 0xc0000102
    rdmsr
    mov [DATA + 0x68], rax
    jmp shutdown
"""
    )
    vcpu = guest.vcpu
    guest[8] = vcpu.stub.notes if isinstance(vcpu, DirectVcpu) and vcpu.ring_0_is_emulated else 0
    guest.finish()
    assert guest[9] == 0x55, "GS base of the user's"
    assert guest[10] == 0xFFFFFFFF80109000 - 56, "on the kernel's stack"
    assert guest[11] == 0x7000 and guest[12] == (1 << 64) - abi.EINVAL and guest[13] == 0x7000
    state = guest.domain.state
    assert (state.kernel_stack, state.kernel_stack_selector) == (0xFFFFFFFF80109000 - 256, 3)


def test_who_watches_hypercalls_sees_all_of_them(boot) -> None:
    guest = boot(
        f"start: xor esi, esi\n {IS_UP} mov edi, 0xe02b\n mov rsi, STACK\n mov eax, stack_switch\n syscall\n jmp shutdown"
    )
    seen: list[Hypercall] = []
    guest.domain.observers = lambda kind: [seen.append] if kind is Hypercall else []
    guest.finish()
    assert [call.number for call in seen] == [HYPERCALL_NUMBERS[name] for name in ("vcpu_op", "stack_switch", "sched_op")]


def test_a_guest_that_stays_on_the_page_is_ended_all_the_same(boot) -> None:
    """It can jump to any instruction there, with the way back leading there too."""
    guest = boot("start: mov rcx, [DATA + 8]\n mov rbx, rcx\n push rbx\n jmp rcx\n")
    vcpu = guest.vcpu
    if not isinstance(vcpu, DirectVcpu) or not vcpu.ring_0_is_emulated:
        guest[1] = guest.label("start")
    else:
        guest[1] = vcpu.stub.stops[1] + 1  # the jump at its end
        for _ in range(3):
            timer = threading.Timer(0.05, vcpu.kick)
            timer.start()
            assert vcpu.run() == Kicked()
            timer.join()
        assert guest.cpu.rip == guest[1]
        guest[1] = vcpu.stub.entry
        guest.cpu.registers[0], guest.cpu.rip = 24, guest.label("start")
    timer = threading.Timer(0.05, vcpu.kick)
    timer.start()
    assert vcpu.run() == Kicked()
    timer.join()


def test_any_place_on_the_page_is_harmless_to_jump_to(boot) -> None:
    """Each byte of it, with registers that mean nothing: the guest may do itself harm, and the monitor is told."""
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + """
    mov rbp, next
    mov rbx, [DATA + 8]
next:
    mov rsp, STACK
    mov r14, DATA + 64
    cmp rbx, [DATA + 16]
    je shutdown
    mov rax, rbx
    inc rbx
    push 0x202
    mov rcx, next
    mov r11, 0x202
    mov edi, 3
    jmp rax
""")  # fmt: skip
    vcpu = guest.vcpu
    if isinstance(vcpu, DirectVcpu) and vcpu.ring_0_is_emulated:
        guest[1], guest[2] = vcpu.stub.entry, vcpu.stub.entry + 0x60
    else:
        guest[1] = guest[2] = guest.label("shutdown")
    timer = threading.Timer(0.5, vcpu.kick)
    timer.start()
    assert vcpu.run() == Kicked()
    timer.cancel()
    timer.join()


def test_the_kernel_is_told_of_the_vector_registers_that_programs_find(boot) -> None:
    """CPUID that the hypervisor answers has AVX-512 where CPUID by itself has; and XSETBV takes what XGETBV shows."""
    guest = boot(
        """
start:
    mov eax, 7
    xor ecx, ecx
    cpuid
    mov [DATA + 8], rbx
    mov eax, 7
    xor ecx, ecx
    db 0x0f, 0x0b, 0x78, 0x65, 0x6e
    cpuid
    mov [DATA + 16], rbx
    xor ecx, ecx
    xgetbv
    and eax, 0xe7
    mov [DATA + 24], rax
    xor edx, edx
    xsetbv
    mov eax, 0xd
    xor ecx, ecx
    db 0x0f, 0x0b, 0x78, 0x65, 0x6e
    cpuid
    mov [DATA + 32], rax
    jmp shutdown
"""
    )
    guest.finish()
    by_itself, by_hypervisor, in_use, supported = guest.words(1, 4)
    avx512 = 0xDC230000
    assert by_itself & avx512 == by_hypervisor & avx512
    assert in_use & ~supported == 0
