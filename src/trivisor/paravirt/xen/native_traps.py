"""Entering the guest's kernel and leaving it, as native code: `traps.py` has the same for every case."""

from __future__ import annotations

from trivisor.paravirt.xen.abi import FLAT_RING3_CS64, FLAT_RING3_SS, VCPU_INFO_CR2, VGCF_IN_SYSCALL
from trivisor.paravirt.xen.native_memory import guest_bytes
from trivisor.x86.exceptions import PAGE_FAULT, PF_PRESENT, PF_USER, PF_WRITE
from trivisor.x86.flags import AC, DF, FIXED, ID, IF, IOPL, NT, RF, STATUS, TF, VM

_FLAT_PAIR = FLAT_RING3_CS64 | FLAT_RING3_SS << 16
_MASK32 = (1 << 32) - 1

SET_FLAT = """
    ; the hidden parts of CS and SS
    mov eax, 0xffffffff
    mov [rbp+CS_LIMIT], rax
    mov [rbp+SS_LIMIT], rax
    mov qword [rbp+CS_ATTRIBUTES], 0xa0fb
    mov qword [rbp+SS_ATTRIBUTES], 0xc0f3
    xor eax, eax
    mov [rbp+CS_BASE], rax
    mov [rbp+SS_BASE], rax
"""

TRAPS = f"""
; Enter the kernel at X_ENTRY, with a frame that tells of X_ENTRY_RIP and, unless it is -1, of error code
; X_ENTRY_ERROR; flags X_ENTRY_CLEAR are cleared, and events masked if X_ENTRY_MASKS.  ZF clear: it cannot be done
; here, and nothing has changed.
xen_enter:
    mov r15, [rbp+GPR_RSP]
    cmp qword [rbx+X_IN_KERNEL], 0
    jne xen_enter_stack
    mov r15, [rbx+X_KERNEL_STACK]
xen_enter_stack:
    mov ecx, 4096-64
    and r15, -16
    sub r15, 64
    cmp qword [rbx+X_ENTRY_ERROR], -1
    jne xen_enter_sized
    add r15, 8
    mov ecx, 4096-56
xen_enter_sized:
    mov eax, r15d
    and eax, 0xfff
    cmp eax, ecx
    ja xen_enter_not
    cmp qword [rbx+X_ENTRY], 0
    je xen_enter_not
    ; the kernel's TLB must be of its page tables, and the walk through them
    mov rax, [rbx+X_KERNEL_ROOT]
    shl rax, 12
    cmp rax, [rbp+ROOT_KERNEL]
    jne xen_enter_not
    push qword [rbp+GUEST_CR3]
    mov [rbp+GUEST_CR3], rax
    mov r13, r15
    mov r12d, 1
    call guest_page
    pop rax
    mov [rbp+GUEST_CR3], rax
    jnz xen_enter_not
    mov rax, [rbp+GPR_RCX]
    mov [rdi], rax
    mov rax, [rbp+GPR_R11]
    mov [rdi+8], rax
    lea rsi, [rdi+16]
    mov rax, [rbx+X_ENTRY_ERROR]
    cmp rax, -1
    je xen_enter_no_error
    mov [rsi], rax
    add rsi, 8
xen_enter_no_error:
    mov rax, [rbx+X_ENTRY_RIP]
    mov [rsi], rax
    mov rdx, [rbx+X_VCPU_INFO]
    movzx ecx, byte [rdx+1]
    movzx eax, word [rbp+CS_SELECTOR]
    cmp qword [rbx+X_IN_KERNEL], 0
    je xen_enter_selector
    and eax, 0xfffc
xen_enter_selector:
    mov r8, rcx
    shl r8, 32
    or rax, r8
    mov [rsi+8], rax
    call gather_flags
    and eax, {~(IF | IOPL) & _MASK32:#x}
    test ecx, ecx
    jnz xen_enter_masked
    or eax, {IF}
xen_enter_masked:
    cmp qword [rbx+X_IOPL_IN_FRAMES], 0
    je xen_enter_flags
    mov r8, [rbx+X_IOPL]
    shl r8d, 12
    or eax, r8d
xen_enter_flags:
    mov [rsi+16], rax
    mov rax, [rbp+GPR_RSP]
    mov [rsi+24], rax
    mov rax, [rbp+SS_SELECTOR]
    mov [rsi+32], rax
    mov [rbp+GPR_RSP], r15
    and dword [rbp+SYSTEM_FLAGS], {~(AC | VM | RF | NT | TF) & _MASK32:#x}
    mov rax, [rbx+X_ENTRY_CLEAR]
    not rax
    and [rbp+FLAGS], rax
    mov rax, [rbx+X_ENTRY]
    mov [rbp+GUEST_RIP], rax
    mov qword [rbp+CS_SELECTOR], {FLAT_RING3_CS64}
    mov qword [rbp+SS_SELECTOR], {FLAT_RING3_SS}
    {SET_FLAT}
    cmp qword [rbx+X_ENTRY_MASKS], 0
    je xen_enter_unmasked
    mov byte [rdx+1], 1
xen_enter_unmasked:
    cmp qword [rbx+X_IN_KERNEL], 0
    jne xen_entered
    call xen_switch_mode
xen_entered:
    xor eax, eax
    ret
xen_enter_not:
    or eax, 1
    ret

; From the guest's kernel to its user or back: address space and GS base.
xen_switch_mode:
    mov rax, [rbp+GS_BASE]
    mov rcx, [rbp+KERNEL_GS_BASE]
    mov [rbp+GS_BASE], rcx
    mov [rbp+KERNEL_GS_BASE], rax
    mov rdi, [rbx+X_USER_ROOT]
    mov esi, [rbx+X_IN_KERNEL]
    xor esi, 1
    mov [rbx+X_IN_KERNEL], rsi
    cmovnz rdi, [rbx+X_KERNEL_ROOT]
    shl rdi, 12
    jmp supervised_enter

; The upcall: the guest goes on at GUEST_RIP afterwards.
xen_upcall:
    mov rax, [rbx+X_EVENT_ADDRESS]
    mov [rbx+X_ENTRY], rax
    mov qword [rbx+X_ENTRY_MASKS], 1
    mov qword [rbx+X_ENTRY_ERROR], -1
    mov qword [rbx+X_ENTRY_CLEAR], 0
    mov rax, [rbp+GUEST_RIP]
    mov [rbx+X_ENTRY_RIP], rax
    call xen_enter
    jnz supervised_interrupt
    inc qword [rbx+X_UPCALLS]
    jmp supervised_resume

; An event, if it is still wanted.
supervisor_interrupt:
    mov rbx, [rbp+SUPERVISOR_TABLE]
    call xen_event
    je supervised_resume
    jmp xen_upcall

; SYSCALL by the guest's user.
supervisor_user_call:
    mov rbx, [rbp+SUPERVISOR_TABLE]
    mov rax, [rbx+X_SYSCALL_ADDRESS]
    test rax, rax
    jz xen_python
    mov [rbx+X_ENTRY], rax
    mov rax, [rbx+X_SYSCALL_MASKS]
    mov [rbx+X_ENTRY_MASKS], rax
    mov qword [rbx+X_ENTRY_ERROR], -1
    mov qword [rbx+X_ENTRY_CLEAR], {DF}
    mov rax, [rbp+GPR_RCX]
    mov [rbx+X_SAVED_RCX], rax
    mov rax, [rbp+GPR_R11]
    mov [rbx+X_SAVED_R11], rax
    mov rax, [rbp+CS_SELECTOR]
    mov [rbx+X_SAVED_CS], rax
    mov rax, [rbp+SS_SELECTOR]
    mov [rbx+X_SAVED_SS], rax
    mov qword [rbp+CS_SELECTOR], {FLAT_RING3_CS64}
    mov qword [rbp+SS_SELECTOR], {FLAT_RING3_SS}
    call gather_flags
    mov [rbp+GPR_R11], rax
    mov rax, [rbp+GUEST_RIP]
    add rax, 2
    mov [rbp+GPR_RCX], rax
    mov [rbx+X_ENTRY_RIP], rax
    call xen_enter
    jnz xen_user_call_not
    inc qword [rbx+X_SYSCALLS]
    call xen_event
    jnz xen_upcall
    jmp supervised_resume
xen_user_call_not:
    mov rax, [rbx+X_SAVED_RCX]
    mov [rbp+GPR_RCX], rax
    mov rax, [rbx+X_SAVED_R11]
    mov [rbp+GPR_R11], rax
    mov rax, [rbx+X_SAVED_CS]
    mov [rbp+CS_SELECTOR], rax
    mov rax, [rbx+X_SAVED_SS]
    mov [rbp+SS_SELECTOR], rax
    jmp xen_python

; An exception: page faults that are the guest's own.
supervisor_exception:
    mov rbx, [rbp+SUPERVISOR_TABLE]
    cmp qword [rbp+EXIT_A], {PAGE_FAULT}
    jne xen_instruction_fault
    mov rax, [rbp+EXIT_B]
    or eax, {PF_USER}
    cmp qword [rbx+X_IN_KERNEL], 0
    je xen_page_fault
    mov ecx, eax
    and ecx, {PF_PRESENT | PF_WRITE}
    cmp ecx, {PF_PRESENT | PF_WRITE}
    je xen_table_write
xen_kernel_page_fault:
    mov rax, [rbp+EXIT_B]
    and eax, {~PF_USER}
xen_page_fault:
    mov [rbx+X_ENTRY_ERROR], rax
    mov rax, [rbx+X_PAGE_FAULT_ADDRESS]
    mov [rbx+X_ENTRY], rax
    mov rax, [rbx+X_PAGE_FAULT_MASKS]
    mov [rbx+X_ENTRY_MASKS], rax
    mov qword [rbx+X_ENTRY_CLEAR], 0
    mov rax, [rbp+GUEST_RIP]
    mov [rbx+X_ENTRY_RIP], rax
    call xen_enter
    jnz xen_python
    mov rax, [rbp+GUEST_CR2]
    mov [rbx+X_CR2], rax
    mov rdx, [rbx+X_VCPU_INFO]
    mov [rdx+{VCPU_INFO_CR2}], rax
    inc qword [rbx+X_PAGE_FAULTS]
    call xen_event
    jnz xen_upcall
    jmp supervised_resume

; The iret hypercall: back to where a frame on the stack says.
xen_iret:
    {guest_bytes("[rbp+GPR_RSP]", 72)}
    mov r15, rdi
    ; rax, r11, rcx, flags, rip, cs, rflags, rsp, ss
    mov eax, [r15+48]
    test eax, {TF | NT | RF | AC}
    jnz xen_python
    cmp qword [rbx+X_IOPL_IN_FRAMES], 0
    je xen_iret_target
    shr eax, 12
    and eax, 3
    cmp rax, [rbx+X_IOPL]
    jne xen_python
xen_iret_target:
    mov rax, [r15+32]
    sar rax, 47
    inc rax
    cmp rax, 1
    ja xen_python
    mov r14d, {_FLAT_PAIR:#x}
    test dword [r15+24], {VGCF_IN_SYSCALL}
    jnz xen_iret_flat
    movzx ecx, word [r15+64]
    shl ecx, 16
    mov cx, [r15+40]
    or ecx, 0x30003
    cmp ecx, r14d
    je xen_iret_flat
    mov r14, [rbx+X_FLAT_PAIR]
    cmp rcx, r14
    jne xen_python
xen_iret_flat:
    mov eax, [r15+40]
    and eax, 3
    cmp eax, 3
    jne xen_iret_same
    cmp qword [rbx+X_USER_ROOT], 0
    je xen_python
    call xen_switch_mode
xen_iret_same:
    mov rcx, [r15+56]
    mov [rbp+GPR_RSP], rcx
    mov rcx, [r15+32]
    mov [rbp+GUEST_RIP], rcx
    mov edx, [r15+48]
    mov ecx, edx
    and ecx, HOST_FLAGS
    mov [rbp+FLAGS], rcx
    mov ecx, edx
    and ecx, {ID}
    or ecx, {FIXED}
    mov [rbp+SYSTEM_FLAGS], rcx
    movzx ecx, r14w
    mov [rbp+CS_SELECTOR], rcx
    shr r14d, 16
    mov [rbp+SS_SELECTOR], r14
    {SET_FLAT}
    mov rcx, [rbx+X_VCPU_INFO]
    test edx, {IF}
    setz [rcx+1]
    mov rcx, [r15+16]
    mov rsi, [r15+8]
    test dword [r15+24], {VGCF_IN_SYSCALL}
    jz xen_iret_registers
    mov rcx, [r15+32]
    mov esi, edx
    and esi, {STATUS | DF | ID}
    or esi, {IF | FIXED}
xen_iret_registers:
    mov [rbp+GPR_RCX], rcx
    mov [rbp+GPR_R11], rsi
    mov rax, [r15]
    mov [rbp+GPR_RAX], rax
    call xen_account
    call xen_event
    jnz xen_upcall
    jmp supervised_resume
"""
