"""The system kernels: what an operating system asks of the processor, one operation at a time.

`kernel_main` runs them like the compute kernels (prepare, then run timed by RDTSC) and prints the same records.
Those that happen in ring 3 go there with SYSRET and come back with the system call `END`.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.guests.long_mode import USER, long_mode_kernel
from bench.records import OK, UNSTEADY
from trivisor.x86.assembler import assemble

REPETITIONS = 21
OPERATIONS = {
    "syscall": 2000,  # system call from ring 3 and back
    "int": 1000,  # INT from ring 3 and IRET
    "page fault": 256,  # ring 3 touches a page, the handler maps it
    "invlpg": 1000,  # a page is mapped elsewhere, INVLPG, a read of it
    "switch": 200,  # system call, MOV to CR3, eight pages read and written in ring 3
    "port": 200,  # OUT to port 0x80
    "timer": 10,  # local APIC, one shot: armed, awaited, taken, EOI
    "divide": 200,  # division by zero in ring 3, skipped by the handler
    "cr8": 1000,  # MOV to CR8
    "call/ret": 10000,  # call to another page and return, in ring 3
}
"""How many operations one repetition has."""

_PROGRAM = """
CALL_NOTHING equ 0
CALL_SWITCH equ 1
CALL_END equ 2

user_syscall:
    mov ebx, COUNT_SYSCALL
.again:
    mov eax, CALL_NOTHING
    syscall
    dec ebx
    jne .again
finish:
    mov eax, CALL_END
    syscall

user_int:
    mov ebx, COUNT_INT
.again:
    int 0x80
    dec ebx
    jne .again
    jmp finish

user_page_fault:
    mov ebx, FAULTING
.again:
    add [rbx], rbx
    add rbx, 4096
    cmp ebx, FAULTING + COUNT_PAGE_FAULT * 4096
    jne .again
    jmp finish

user_switch:
    mov ebx, COUNT_SWITCH
.again:
    mov eax, OWN_PAGES
.page:
    inc qword [rax]
    add rax, 4096
    cmp eax, OWN_PAGES + 8 * 4096
    jne .page
    mov eax, CALL_SWITCH
    syscall
    dec ebx
    jne .again
    jmp finish

user_divide:
    mov ebx, COUNT_DIVIDE
    xor ecx, ecx
.again:
    mov eax, 1
    xor edx, edx
    div ecx
    dec ebx
    jne .again
    jmp finish

user_call:
    mov ebx, COUNT_CALL
    xor eax, eax
.again:
    call callee
    dec ebx
    jne .again
    jmp finish

align 4096
callee:
    inc eax
    ret
"""

_KERNEL = """
KERNEL_GS_BASE equ 0xC0000102
APIC equ 0xFEE00000
FAULTING_ENTRIES equ user_tables + (FAULTING - USER >> 12) * 8
INVLPG_ENTRY equ user_tables + (INVLPG_PAGE - USER >> 12) * 8
OTHER_PDPT equ other_pml4 + 0x1000
OTHER_DIRECTORY equ other_pml4 + 0x2000
OTHER_TABLE equ other_pml4 + 0x3000
other_pml4 equ user_memory + TABLES

kernel_main:
    mov al, 0xFF                   ; no interrupt but the local APIC's timer
    out 0x21, al
    out 0xA1, al
    mov rax, system_call
    call set_lstar
    mov ecx, KERNEL_GS_BASE
    mov eax, processor
    xor edx, edx
    wrmsr
    mov edi, 0
    mov rax, divide_error
    call set_gate
    mov edi, 14
    mov rax, page_fault
    call set_gate
    mov edi, 0x40
    mov rax, timer_interrupt
    call set_gate
    mov edi, 0x80
    mov rax, software_interrupt
    call set_gate
    mov eax, APIC
    mov dword [rax + 0xF0], 0x1FF  ; on, spurious vector 0xFF
    mov dword [rax + 0x3E0], 11    ; divide by one
    mov dword [rax + 0x320], 0x40  ; one shot
    call make_other_space

    mov r12, kernels
.kernel:
    mov qword [record], OK
    xor r14d, r14d
.repetition:
    mov qword [counter], 0
    call [r12]
    lfence
    rdtsc
    shl rdx, 32
    lea r15, [rax + rdx]
    mov rdi, [r12 + 16]
    call [r12 + 8]
    lfence
    rdtsc
    shl rdx, 32
    add rax, rdx
    sub rax, r15
    mov [record + r14*8 + 16], rax
    mov rbx, [counter]
    test r14d, r14d
    jz .first
    cmp [record + 8], rbx
    je .same
    mov qword [record], UNSTEADY
.first:
    mov [record + 8], rbx
.same:
    inc r14d
    cmp r14d, REPETITIONS
    jne .repetition
    xor r14d, r14d
.word:
    mov rax, [record + r14*8]
    call print_hex
    inc r14d
    cmp r14d, REPETITIONS + 2
    jne .word
    call new_line
    add r12, 24
    cmp qword [r12], 0
    jne .kernel
    ret

make_other_space:                  ; like the first but for the eight pages at OWN_PAGES
    mov rsi, pml4
    mov rdi, other_pml4
    call copy_page
    mov rsi, pdpt
    mov rdi, OTHER_PDPT
    call copy_page
    mov rsi, user_directory
    mov rdi, OTHER_DIRECTORY
    call copy_page
    mov rsi, user_tables + (OWN_PAGES - USER >> 21) * 0x1000
    mov rdi, OTHER_TABLE
    call copy_page
    lea rax, [OTHER_PDPT + 7]
    mov [other_pml4], rax
    lea rax, [OTHER_DIRECTORY + 7]
    mov [OTHER_PDPT + 8], rax
    lea rax, [OTHER_TABLE + 7]
    mov [OTHER_DIRECTORY + (OWN_PAGES - USER >> 21) * 8], rax
    xor ecx, ecx
.page:
    add qword [OTHER_TABLE + (OWN_PAGES >> 12 & 511) * 8 + rcx*8], 8 * 4096
    inc ecx
    cmp ecx, 8
    jne .page
    mov qword [next_space], other_pml4
    ret

copy_page:
    mov ecx, 512
    rep movsq
    ret

; ---- to ring 3 and back ----

run_user:                          ; rdi = rip
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [processor], rsp
    mov [tss + 4], rsp
    mov rcx, rdi
    mov esp, USER_STACK
    mov r11d, 2
    sysretq

system_call:
    swapgs
    mov [gs:8], rsp
    mov rsp, [gs:0]
    push rcx
    push r11
    cmp eax, 2
    jae .end
    mov eax, eax
    call [system_calls + rax*8]
    pop r11
    pop rcx
    mov rsp, [gs:8]
    swapgs
    sysretq
.end:
    swapgs
    add rsp, 16
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

count:
    inc qword [counter]
    ret

switch_space:
    inc qword [counter]
    mov rax, [next_space]
    mov rdx, cr3
    mov [next_space], rdx
    mov cr3, rax
    ret

; ---- handlers ----

divide_error:
    add qword [rsp], 2             ; the length of div ecx
    inc qword [counter]
    iretq

software_interrupt:
    inc qword [counter]
    iretq

page_fault:                        ; map what was touched if it is one of ours
    push rax
    mov rax, cr2
    sub rax, FAULTING
    cmp rax, COUNT_PAGE_FAULT * 4096
    jae .other
    shr rax, 12
    or byte [FAULTING_ENTRIES + rax*8], 1
    inc qword [counter]
    pop rax
    add rsp, 8
    iretq
.other:
    pop rax
    push 14
    jmp exception

timer_interrupt:
    inc qword [counter]
    push rax
    mov eax, APIC
    mov dword [rax + 0xB0], 0
    pop rax
    iretq

; ---- the kernels ----

nothing:
    ret

prepare_page_fault:
    xor ecx, ecx
.page:
    and byte [FAULTING_ENTRIES + rcx*8], 0xFE
    inc ecx
    cmp ecx, COUNT_PAGE_FAULT
    jne .page
    mov rax, cr3
    mov cr3, rax
    ret

prepare_invlpg:
    mov qword [user_memory + INVLPG_PAGE - USER], 3
    mov qword [user_memory + INVLPG_PAGE - USER - 4096], 5 ; one of these is the other page
    mov qword [user_memory + INVLPG_PAGE - USER + 4096], 5
    ret

run_invlpg:
    mov ecx, COUNT_INVLPG
.again:
    xor dword [INVLPG_ENTRY], 4096
    invlpg [INVLPG_PAGE]
    mov rax, [INVLPG_PAGE]
    add [counter], rax
    dec ecx
    jne .again
    ret

run_port:
    mov ecx, COUNT_PORT
.again:
    mov eax, ecx
    out 0x80, al
    dec ecx
    jne .again
    ret

run_timer:
    sti
    mov ecx, COUNT_TIMER
    mov eax, APIC
.again:
    mov rdx, [counter]
    mov dword [rax + 0x380], 8     ; due at once: how long a tick is differs from machine to machine
.wait:
    pause
    cmp rdx, [counter]
    je .wait
    dec ecx
    jne .again
    cli
    ret

run_cr8:
    mov ecx, COUNT_CR8
.again:
    mov eax, ecx
    and eax, 15
    mov cr8, rax
    dec ecx
    jne .again
    mov rax, cr8
    add [counter], rax
    mov cr8, rcx
    ret

align 8
system_calls: dq count, switch_space
processor: dq 0, 0                 ; the kernel's stack, and ring 3's
next_space: dq 0
counter: dq 0
record: times REPETITIONS + 2 dq 0
kernels:
"""

_ROWS = {
    "syscall": ("nothing", "run_user", "USER_SYSCALL"),
    "int": ("nothing", "run_user", "USER_INT"),
    "page fault": ("prepare_page_fault", "run_user", "USER_PAGE_FAULT"),
    "invlpg": ("prepare_invlpg", "run_invlpg", "0"),
    "switch": ("nothing", "run_user", "USER_SWITCH"),
    "port": ("nothing", "run_port", "0"),
    "timer": ("nothing", "run_timer", "0"),
    "divide": ("nothing", "run_user", "USER_DIVIDE"),
    "cr8": ("nothing", "run_cr8", "0"),
    "call/ret": ("nothing", "run_user", "USER_CALL"),
}
"""By kernel: what prepares it, what runs it, and for ring 3 where to."""


def system_image(names: Sequence[str]) -> bytes:
    """A multiboot kernel that runs these kernels and prints their records."""
    symbols = {
        "USER": USER,
        "FAULTING": USER + 0x200000,
        "INVLPG_PAGE": USER + 0x400000,
        "OWN_PAGES": USER + 0x600000,
        "USER_STACK": USER + 0x1F0000,
        "TABLES": 0xF00000,
        "REPETITIONS": REPETITIONS,
        "OK": OK,
        "UNSTEADY": UNSTEADY,
    }
    symbols |= {
        f"COUNT_{name.partition('/')[0].replace(' ', '_').upper()}": count for name, count in OPERATIONS.items()
    }
    program = assemble(_PROGRAM, origin=USER, symbols=symbols)
    places = {label.upper(): at for label, at in program.labels.items() if label.startswith("user_")}
    places = {name: at for name, at in places.items() if "." not in name}
    rows = [f"dq {', '.join(_ROWS[name])}" for name in names]
    return long_mode_kernel("\n".join([_KERNEL, *rows, "dq 0"]), program.code, symbols | places)
