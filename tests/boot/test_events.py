"""Interrupts of every kind on the real engine and board, with bare kernels of a few instructions each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trivisor import StopReason, VirtualMachine
from trivisor.guests.test_kernel import multiboot_elf

pytestmark = [pytest.mark.boot, pytest.mark.timeout(60)]

KERNEL = """
LOCAL_APIC equ 0xFEE00000
ICR equ LOCAL_APIC + 0x300
SELF_NMI equ 0x44400
SELF_FIXED equ 0x44000
header:
    dd 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFFFFFF
start:
    mov esp, stack_top
    lgdt [gdt_pointer]
    jmp 0x08:reloaded
reloaded:
    mov eax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov edi, idt
    xor ebx, ebx
.gate:
    mov eax, stray
    call set_gate
    inc ebx
    cmp ebx, 256
    jb .gate
    lidt [idt_pointer]
    mov al, 0xFF                   ; nothing from the 8259s
    out 0x21, al
    out 0xA1, al
    jmp main

set_gate:                          ; vector ebx to eax
    mov word [idt + 8 * ebx], ax
    mov word [idt + 8 * ebx + 2], 0x08
    mov word [idt + 8 * ebx + 4], 0x8E00
    shr eax, 16
    mov word [idt + 8 * ebx + 6], ax
    ret

stray:
    mov al, 99
finish:                            ; end the run with al
    out 0xF4, al
    cli
    hlt

align 8
gdt: dq 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF
gdt_pointer:
    dw 31
    dd gdt
idt_pointer:
    dw 8 * 256 - 1
    dd idt
mark: dd 0
align 16
"""
TABLES = """
align 4096                         ; off the code's page, writes to which are slow
idt:
stack_top equ idt + 0x4000
"""

Start = Callable[[str], VirtualMachine]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def make(main: str) -> VirtualMachine:
        path = tmp_path / "kernel"
        path.write_bytes(multiboot_elf(KERNEL + main + TABLES, {"SCRATCH": 0x4000}))
        return VirtualMachine(path, memory="16M")

    return make


def ending(machine: VirtualMachine) -> int:
    """What the kernel wrote to port 0xf4."""
    with machine:
        outcome = machine.run(timeout=20)
    assert outcome.reason is StopReason.DEBUG_EXIT, outcome.message
    return outcome.status >> 1


def test_an_nmi_comes_with_interrupts_off_and_the_next_waits_for_iret(start: Start) -> None:
    main = """
    main:
        mov ebx, 2
        mov eax, on_nmi
        call set_gate
        mov dword [ICR], SELF_NMI
        mov al, [mark]             ; 2: the handler has run twice
        jmp finish
    on_nmi:
        cmp dword [mark], 0
        jne .second
        mov dword [ICR], SELF_NMI
        nop
        cmp dword [mark], 0        ; not yet
        jne stray
        mov dword [mark], 1
        iretd
    .second:
        inc dword [mark]
        iretd
    """
    assert ending(start(main)) == 2


def test_an_nmi_from_the_timer_by_way_of_the_io_apic_ends_hlt(start: Start) -> None:
    main = """
    main:
        mov ebx, 2
        mov eax, on_nmi
        call set_gate
        mov dword [0xFEC00000], 0x15   ; pin 2, where the PIT is: to processor 0, as an NMI
        mov dword [0xFEC00010], 0
        mov dword [0xFEC00000], 0x14
        mov dword [0xFEC00010], 0x400
        mov al, 0x34
        out 0x43, al
        mov al, 0
        out 0x40, al
        mov al, 0x20
        out 0x40, al
        sti
    .wait:
        hlt
        cmp dword [mark], 3
        jb .wait
        cli
        mov al, [mark]
        jmp finish
    on_nmi:
        inc dword [mark]
        iretd
    """
    assert ending(start(main)) == 3


def test_only_an_interrupt_ends_hlt(start: Start) -> None:
    main = """
    main:
        sti
        hlt
        mov al, 1
        jmp finish
    """
    with start(main) as machine:
        for _ in range(3):
            machine.write("typing wakes the monitor, not the guest")
            assert machine.run(timeout=0.4).reason is StopReason.TIMEOUT
            assert machine.registers.halted
        machine.registers = machine.registers  # it stays so in a copy
        assert machine.run(timeout=0.2).reason is StopReason.TIMEOUT


def test_cr8_is_the_task_priority(start: Start) -> None:
    main = """
    main:
        mov dword [pml4], pdpt + 3
        mov dword [pdpt], 0x83         ; the first GiB and the last one below 4 GiB, to themselves
        mov dword [pdpt + 24], 0xC0000083
        mov eax, 0x20
        mov cr4, eax
        mov eax, pml4
        mov cr3, eax
        mov ecx, 0xC0000080
        rdmsr
        or eax, 0x100
        wrmsr
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        jmp 0x18:long_mode
    bits 64
    long_mode:
        mov edi, idt + 16 * 0x45
        mov eax, on_interrupt
        mov [rdi], ax
        mov word [rdi + 2], 0x18
        mov word [rdi + 4], 0x8E00
        shr eax, 16
        mov [rdi + 6], ax
        mov qword [rdi + 8], 0
        mov eax, 5
        mov cr8, rax
        mov ebx, LOCAL_APIC
        cmp dword [rbx + 0x80], 0x50   ; the task priority register shows it
        jne wrong
        mov dword [rbx + 0x300], SELF_FIXED + 0x45
        sti
        nop
        nop
        cmp dword [mark], 0            ; class 4 does not get past priority 5
        jne wrong
        mov dword [rbx + 0x80], 0x30
        nop
        mov rax, cr8
        cmp eax, 3
        jne wrong
        mov al, [mark]
        out 0xF4, al
    wrong:
        mov al, 98
        out 0xF4, al
        cli
        hlt
    on_interrupt:
        mov dword [mark], 7
        mov dword [rbx + 0xB0], 0
        iretq
    bits 32
    align 4096
    pml4: times 512 dq 0
    pdpt: times 512 dq 0
    """
    assert ending(start(main)) == 7


def test_setting_the_tsc_moves_the_deadline(start: Start) -> None:
    main = """
    main:
        mov ebx, 0x50
        mov eax, on_deadline
        call set_gate
        mov dword [LOCAL_APIC + 0x320], 0x40050    ; deadline mode
        mov ecx, 0x10
        xor eax, eax
        xor edx, edx
        wrmsr
        mov ecx, 0x6E0
        mov edx, 0x10000                           ; a day away
        wrmsr
        sti
        nop
        cmp dword [mark], 0
        jne stray
        mov ecx, 0x10
        mov edx, 0x10001                           ; and past
        wrmsr
    .wait:
        cmp dword [mark], 0
        je .wait
        mov al, [mark]
        jmp finish
    on_deadline:
        mov dword [mark], 11
        mov dword [LOCAL_APIC + 0xB0], 0
        iretd
    """
    assert ending(start(main)) == 11
