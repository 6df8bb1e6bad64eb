"""Exceptions, IRET, SYSCALL, SYSRET and address space switches of 64-bit code, without Python.

Each does the common case and leaves everything else, before anything has
changed, to Python (`events.py`, `system.py`), which does all cases exactly.
"""

from __future__ import annotations

from trivisor.translation.natives.common import spill


def enter_mode(view: str, level: int, state: str = "rbp", scratch: str = "rax") -> str:
    """MODE, CPL and the jump cache of 64-bit code at a privilege level."""
    number = 0 if view == "KERNEL" else 1
    return f"""
    mov {scratch}, [{state}+MODE_{view}]
    mov [{state}+MODE], {scratch}
    mov qword [{state}+CPL], {level}
    lea {scratch}, [{state}+JUMP_CACHE_{view}]
    mov [{state}+JUMP_CACHE_CURRENT], {scratch}
    lea {scratch}, [{state}+JUMP_CACHE_USED+{128 * number}]
    mov [{state}+JUMP_CACHE_USED_CURRENT], {scratch}
    """


def _flat_segments(code: str, data: str) -> str:
    """The hidden parts of CS and SS as SYSCALL and SYSRET set them; rsp is the state pointer, r10 is lost."""
    return f"""
    mov qword [rsp+CS_ATTRIBUTES], {code}
    mov qword [rsp+SS_ATTRIBUTES], {data}
    mov r10d, 0xffffffff
    mov [rsp+CS_LIMIT], r10
    mov [rsp+SS_LIMIT], r10
    """


def _drop_data(segment: str) -> str:
    """Empty a data segment register that CPL 3 may not have; its base stays (see `segments.drop_privileged_data`)."""
    return f"""
    mov eax, [rbp+{segment}_ATTRIBUTES]
    test al, 0x80
    jz iret_keep_{segment}
    mov ecx, eax
    and ecx, 0x60
    cmp ecx, 0x60
    je iret_keep_{segment}
    and eax, 0x1c
    cmp eax, 0x1c ; conforming code
    je iret_keep_{segment}
    xor eax, eax
    mov [rbp+{segment}_SELECTOR], rax
    mov [rbp+{segment}_LIMIT], rax
    mov [rbp+{segment}_ATTRIBUTES], rax
iret_keep_{segment}:
    """


EVENTS = f"""
; The host address of r13, linear, for the supervisor; r12 = kind.  The bytes meant must lie in one page.
; ZF set: rdi = host address.  Keeps rbx, rbp, r12, r13, r15.
kernel_host:
    mov rcx, r13
    and rcx, -4096
    mov edx, r13d
    shr edx, 7
    and edx, (TLB_ENTRIES-1)*32
    lea r14, [rbp+rdx+TLB_KERNEL]
    mov rax, [r14+TLB_READ]
    test r12b, KIND_WRITE
    cmovnz rax, [r14+TLB_WRITE]
    cmp rax, rcx
    je kernel_host_hit
    call fill_tlb
    test eax, eax
    jnz kernel_host_done
kernel_host_hit:
    mov rdi, r13
    and edi, 0xfff
    add rdi, [r14+TLB_HOST]
    xor eax, eax
kernel_host_done:
    ret

; Compare the descriptor that selector eax names in the GDT with the raw one in rbx; ZF set when they are equal.
same_descriptor:
    and eax, 0xfff8
    mov r13, rax
    add rax, 7
    cmp rax, [rbp+GDTR_LIMIT]
    ja same_descriptor_no
    add r13, [rbp+GDTR_BASE]
    mov eax, r13d
    and eax, 0xfff
    cmp eax, 4088
    ja same_descriptor_done
    mov r12d, 0
    call kernel_host
    jnz same_descriptor_done
    cmp [rdi], rbx
same_descriptor_done:
    ret
same_descriptor_no:
    or eax, 1
    ret

; rax = RFLAGS in full.
gather_flags:
    mov rax, [rbp+FLAGS]
    and eax, HOST_FLAGS
    or rax, [rbp+IF]
    or rax, [rbp+SYSTEM_FLAGS]
    or eax, 2
    ret

; Exception EXIT_A with error code EXIT_B (-1: none); registers, FLAGS and RIP are in the state block.
deliver:
    mov qword [rbp+EVENT], EVENT_FAULT
    mov rax, [rbp+GUEST_RIP]
    mov [rbp+EVENT_RIP], rax
deliver_event:
    mov rsp, rbp
    cmp qword [rbp+NATIVE_EVENTS], 0
    je deliver_otherwise
    test dword [rbp+SYSTEM_FLAGS], FLAG_TF
    jnz deliver_python
    mov rax, [rbp+EXIT_A]
    shl eax, 4
    lea rcx, [rax+15]
    cmp rcx, [rbp+IDTR_LIMIT]
    ja deliver_python
    mov r13, [rbp+IDTR_BASE]
    add r13, rax
    mov eax, r13d
    and eax, 0xfff
    cmp eax, 4080
    ja deliver_python
    mov r12d, 0
    call kernel_host
    jnz deliver_python
    mov rax, [rdi]
    mov rdx, [rdi+8]
    ; present, interrupt or trap gate
    mov rcx, rax
    shr rcx, 40
    and ecx, 0x9e
    cmp ecx, 0x8e
    jne deliver_python
    mov rcx, rax
    shr rcx, 16
    movzx ecx, cx
    cmp rcx, [rbp+KNOWN_KERNEL_CS_SELECTOR]
    jne deliver_python
    mov [rbp+SCRATCH_0], rax
    cmp qword [rbp+EVENT], EVENT_SOFTWARE
    jne deliver_allowed
    mov rcx, rax
    shr rcx, 45
    and ecx, 3
    cmp rcx, [rbp+CPL]
    jb deliver_python
deliver_allowed:
    ; the handler's address
    movzx ecx, ax
    mov r8, rax
    shr r8, 32
    and r8d, 0xffff0000
    or r8, rcx
    shl rdx, 32
    or r8, rdx
    mov [rbp+SCRATCH_1], r8
    sar r8, 47
    inc r8
    cmp r8, 1
    ja deliver_python
    mov rax, [rbp+KNOWN_KERNEL_CS_SELECTOR]
    mov rbx, [rbp+KNOWN_KERNEL_CS]
    call same_descriptor
    jnz deliver_python
    ; the stack: IST, RSP0 or where it is
    mov rax, [rbp+SCRATCH_0]
    shr rax, 32
    and eax, 7
    jnz deliver_ist
    mov r15, [rbp+GPR_RSP]
    cmp qword [rbp+CPL], 3
    jne deliver_stack
    mov r13d, 4
    jmp deliver_from_tss
deliver_ist:
    lea r13d, [rax*8+0x1c]
deliver_from_tss:
    lea eax, [r13+7]
    cmp rax, [rbp+TR_LIMIT]
    ja deliver_python
    add r13, [rbp+TR_BASE]
    mov eax, r13d
    and eax, 0xfff
    cmp eax, 4088
    ja deliver_python
    mov r12d, 0
    call kernel_host
    jnz deliver_python
    mov r15, [rdi]
deliver_stack:
    and r15, -16
    sub r15, 48
    mov eax, r15d
    and eax, 0xfff
    cmp eax, 4048
    ja deliver_python
    mov r13, r15
    mov r12d, KIND_WRITE
    call kernel_host
    jnz deliver_python
    ; six words up from rdi, or five from rdi+8
    mov rax, [rbp+SS_SELECTOR]
    mov [rdi+40], rax
    mov rax, [rbp+GPR_RSP]
    mov [rdi+32], rax
    call gather_flags
    mov ecx, eax
    or ecx, FLAG_RF
    cmp qword [rbp+EVENT], EVENT_FAULT
    cmove eax, ecx
    mov [rdi+24], rax
    mov rax, [rbp+CS_SELECTOR]
    mov [rdi+16], rax
    mov rax, [rbp+EVENT_RIP]
    mov [rdi+8], rax
    mov rax, [rbp+EXIT_B]
    test rax, rax
    js deliver_no_error
    mov [rdi], rax
    jmp deliver_commit
deliver_no_error:
    add r15, 8
    ; five words: the frame's top is 16-byte aligned, so they start eight higher
deliver_commit:
    mov [rbp+GPR_RSP], r15
    mov rax, [rbp+SCRATCH_1]
    mov [rbp+GUEST_RIP], rax
    and dword [rbp+SYSTEM_FLAGS], ~(FLAG_TF|FLAG_NT|FLAG_RF|FLAG_VM)
    bt qword [rbp+SCRATCH_0], 40
    jc deliver_trap_gate
    mov qword [rbp+IF], 0
deliver_trap_gate:
    mov rax, [rbp+KNOWN_KERNEL_CS_SELECTOR]
    mov [rbp+CS_SELECTOR], rax
    mov qword [rbp+CS_ATTRIBUTES], CODE_64
    cmp qword [rbp+CPL], 3
    jne deliver_done
    mov qword [rbp+SS_SELECTOR], 0
    mov qword [rbp+SS_ATTRIBUTES], 0x10000
    {enter_mode("KERNEL", 0)}
deliver_done:
    mov rax, [rbp+EVENT]
    inc qword [rbp+rax*8+COUNT_EXCEPTION]
    jmp resume
deliver_otherwise:
    cmp qword [rbp+SUPERVISED], 0
    jne supervised_event
deliver_python:
    mov rsp, rbp
    mov rax, [rbp+EVENT]
    mov ecx, EXIT_EXCEPTION
    mov edx, EXIT_CALL_OUT
    cmp eax, EVENT_SOFTWARE
    cmove ecx, edx
    mov edx, EXIT_INTERRUPT
    cmova ecx, edx
    mov [rbp+EXIT], rcx
    jmp leave_spilled

; Entered by Python: external interrupt EXIT_A.
external:
    pushfq
    pop qword [rsp+FLAGS]
    {spill(0)}
    mov rbp, rsp
    and qword [rbp+FLAGS], HOST_FLAGS
    mov qword [rbp+EXIT_B], -1
    mov qword [rbp+EVENT], EVENT_EXTERNAL
    mov rax, [rbp+GUEST_RIP]
    mov [rbp+EVENT_RIP], rax
    jmp deliver_event

; call [INTERRUPT]; dq rip; dd length: INT of vector r10
interrupt:
    pushfq
    pop qword [rsp+8+FLAGS]
    {spill(8)}
    pop rbx
    mov rbp, rsp
    and qword [rbp+FLAGS], HOST_FLAGS
    mov [rbp+EXIT_A], r10
    mov qword [rbp+EXIT_B], -1
    mov qword [rbp+EVENT], EVENT_SOFTWARE
    mov rax, [rbx]
    mov [rbp+GUEST_RIP], rax
    mov ecx, [rbx+8]
    add rax, rcx
    mov [rbp+EVENT_RIP], rax
    jmp deliver_event

; call [IRET]; dq rip; dd length
iret:
    pushfq
    pop qword [rsp+8+FLAGS]
    {spill(8)}
    pop rbx
    mov rbp, rsp
    mov rax, [rbx]
    mov [rbp+GUEST_RIP], rax
    cmp qword [rbp+NATIVE_EVENTS], 0
    je iret_python
    test dword [rbp+SYSTEM_FLAGS], FLAG_NT
    jnz iret_python
    mov r13, r15
    mov eax, r13d
    and eax, 0xfff
    cmp eax, 4056
    ja iret_python
    mov r12d, 0
    call kernel_host
    jnz iret_python
    mov r15, rdi
    ; rip must be canonical, and no odd flag come up
    mov rax, [r15]
    sar rax, 47
    inc rax
    cmp rax, 1
    ja iret_python
    test dword [r15+16], FLAG_TF|FLAG_NT|FLAG_VM
    jnz iret_python
    mov eax, [r15+8]
    cmp rax, [rbp+KNOWN_KERNEL_CS_SELECTOR]
    je iret_kernel
    cmp rax, [rbp+KNOWN_CS_SELECTOR]
    jne iret_python
    mov ecx, [r15+32]
    cmp rcx, [rbp+KNOWN_SS_SELECTOR]
    jne iret_python
    test dword [r15+16], FLAG_AC ; alignment checks are a mode of their own
    jnz iret_python
    mov rbx, [rbp+KNOWN_CS]
    call same_descriptor
    jnz iret_python
    mov rax, [rbp+KNOWN_SS_SELECTOR]
    mov rbx, [rbp+KNOWN_SS]
    call same_descriptor
    jnz iret_python
    mov rcx, [rbp+DS_SELECTOR]
    or rcx, [rbp+ES_SELECTOR]
    or rcx, [rbp+FS_SELECTOR]
    or rcx, [rbp+GS_SELECTOR]
    jnz iret_data
iret_user:
    mov rax, [rbp+KNOWN_CS_SELECTOR]
    mov [rbp+CS_SELECTOR], rax
    mov qword [rbp+CS_ATTRIBUTES], CODE_64_USER
    mov rax, [rbp+KNOWN_SS_SELECTOR]
    mov [rbp+SS_SELECTOR], rax
    mov qword [rbp+SS_ATTRIBUTES], DATA_USER
    mov eax, 0xffffffff
    mov [rbp+SS_LIMIT], rax
    {enter_mode("USER", 3)}
    jmp iret_commit
iret_data:
    ; the user may not keep the kernel's data segments
    {"".join(_drop_data(segment) for segment in ("DS", "ES", "FS", "GS"))}
    jmp iret_user
iret_kernel:
    mov ecx, [r15+32]
    cmp rcx, [rbp+SS_SELECTOR]
    je iret_kernel_cs
    jmp iret_python
iret_kernel_cs:
    mov rbx, [rbp+KNOWN_KERNEL_CS]
    call same_descriptor
    jnz iret_python
iret_commit:
    mov rax, [r15]
    mov [rbp+GUEST_RIP], rax
    mov rax, [r15+24]
    mov [rbp+GPR_RSP], rax
    mov eax, [r15+16]
    mov ecx, eax
    and ecx, HOST_FLAGS
    mov [rbp+FLAGS], rcx
    mov ecx, eax
    and ecx, SYSTEM_MASK & ~FLAG_RF
    or ecx, 2
    mov [rbp+SYSTEM_FLAGS], rcx
    cmp qword [rbp+OPENED_COUNT], 0
    jne iret_close
iret_closed:
    inc qword [rbp+COUNT_IRET]
    cmp qword [rbp+NMI_BLOCKED], 0
    jne iret_unblock
iret_unblocked:
    and eax, FLAG_IF
    mov [rbp+IF], rax
    jz resume
open_window:
    ; interrupts are possible now: is one waiting?
    mov rax, [rbp+ARMED]
    mov [rbp+POLL], rax
    cmp rax, [rbp+POLL_BAD]
    jne resume
    mov qword [rbp+EXIT], EXIT_POLL
    mov rsp, rbp
    jmp leave_spilled
iret_unblock:
    mov qword [rbp+NMI_BLOCKED], 0
    cmp qword [rbp+NMI_WAITING], 0
    je iret_unblocked
    and eax, FLAG_IF
    mov [rbp+IF], rax
    mov qword [rbp+EXIT], EXIT_POLL
    mov rsp, rbp
    jmp leave_spilled
iret_close:
    push rax
    mov rdi, rbp
    call close_pages
    pop rax
    jmp iret_closed
iret_python:
    mov rsp, rbp
    mov qword [rbp+EXIT], EXIT_CALL_OUT
    jmp leave_spilled

; call [WRITE_CR3]; dq rip; dd length: r10 = the new value
write_cr3:
    pushfq
    pop qword [rsp+8+FLAGS]
    {spill(8)}
    pop rbx
    mov rbp, rsp
    mov rax, [rbx]
    mov [rbp+GUEST_RIP], rax
    cmp qword [rbp+NATIVE_EVENTS], 0
    je iret_python
    mov rcx, [rbp+PHYSICAL_LIMIT_MASK]
    bts rcx, 63
    test r10, rcx
    jnz iret_python
    mov ecx, [rbx+8]
    add rax, rcx
    mov [rbp+GUEST_RIP], rax
    mov [rbp+GUEST_CR3], r10
    inc qword [rbp+COUNT_CR3]
    mov rdi, rbp
    call flush_local
    jmp resume

; call [SYSCALL]; dq rip; dd length: from 64-bit code at CPL 3
syscall_native:
    pop r10
    pushfq
    pop r11
    cmp qword [rsp+NATIVE_EVENTS], 0
    je syscall_otherwise
    test byte [rsp+EFER], 1
    jz syscall_python
    test dword [rsp+SYSTEM_FLAGS], FLAG_TF
    jnz syscall_python
    cmp qword [rsp+OPENED_COUNT], 0
    jne syscall_python
    and r11d, HOST_FLAGS
    or r11, [rsp+IF]
    or r11, [rsp+SYSTEM_FLAGS]
    and r11d, ~FLAG_RF
    mov rcx, [r10]
    add rcx, 2
    mov [rsp+GPR_R11], r11
    mov r10, [rsp+FMASK]
    not r10
    and r11, r10
    mov r10d, r11d
    and r10d, FLAG_IF
    mov [rsp+IF], r10
    mov r10d, r11d
    and r10d, SYSTEM_MASK
    or r10d, 2
    mov [rsp+SYSTEM_FLAGS], r10
    and r11d, HOST_FLAGS
    mov [rsp+FLAGS], r11
    mov r10, [rsp+STAR]
    shr r10, 32
    and r10d, 0xfffc
    mov [rsp+CS_SELECTOR], r10
    add r10d, 8
    mov [rsp+SS_SELECTOR], r10
    {_flat_segments("CODE_64", "DATA_KERNEL")}
    {enter_mode("KERNEL", 0, "rsp", "r10")}
    inc qword [rsp+COUNT_SYSCALL]
    mov [rsp+FLAGS_AX+1], r11b
    shr r11d, 11
    and r11d, 1
    mov [rsp+FLAGS_AX], r11b
    push qword [rsp+FLAGS]
    popfq
    mov r10, [rsp+LSTAR]
    movzx r11d, r10w
    jmp qword [rsp+r11*8+JUMP_CACHE_KERNEL]
syscall_otherwise:
    cmp qword [rsp+SUPERVISED], 0
    jne supervised_syscall
syscall_python:
    push r11
    popfq
    mov r10, [r10]
    mov [rsp+GUEST_RIP], r10
    mov qword [rsp+EXIT], EXIT_CALL_OUT
    jmp leave_native

; call [SYSRET]; dq rip; dd length: REX.W SYSRET at CPL 0
sysret_native:
    pop r10
    pushfq
    pop r11
    cmp qword [rsp+NATIVE_EVENTS], 0
    je syscall_python
    test byte [rsp+EFER], 1
    jz syscall_python
    test dword [rsp+GPR_R11], FLAG_TF|FLAG_AC
    jnz syscall_python
    cmp qword [rsp+OPENED_COUNT], 0
    jne syscall_python
    mov [rsp+SCRATCH_0], rcx
    sar qword [rsp+SCRATCH_0], 47
    inc qword [rsp+SCRATCH_0]
    cmp qword [rsp+SCRATCH_0], 1
    ja syscall_python
    mov r11, [rsp+GPR_R11]
    mov r10d, r11d
    and r10d, SYSTEM_MASK & ~(FLAG_RF|FLAG_VM)
    or r10d, 2
    mov [rsp+SYSTEM_FLAGS], r10
    mov r10d, r11d
    and r10d, HOST_FLAGS
    mov [rsp+FLAGS], r10
    mov [rsp+FLAGS_AX+1], r10b
    shr r10d, 11
    and r10d, 1
    mov [rsp+FLAGS_AX], r10b
    and r11d, FLAG_IF
    mov [rsp+IF], r11
    mov r10, [rsp+STAR]
    shr r10, 48
    add r10d, 8
    or r10d, 3
    movzx r10d, r10w
    mov [rsp+SS_SELECTOR], r10
    add r10d, 8
    movzx r10d, r10w
    mov [rsp+CS_SELECTOR], r10
    {_flat_segments("CODE_64_USER", "DATA_USER")}
    {enter_mode("USER", 3, "rsp", "r10")}
    inc qword [rsp+COUNT_SYSRET]
    mov [rsp+GUEST_RIP], rcx
    test r11d, r11d
    jz sysret_go
    mov r10, [rsp+ARMED]
    mov [rsp+POLL], r10
    cmp r10, [rsp+POLL_BAD]
    jne sysret_go
    push qword [rsp+FLAGS]
    popfq
    mov qword [rsp+EXIT], EXIT_POLL
    jmp leave_native
sysret_go:
    push qword [rsp+FLAGS]
    popfq
    mov r10, rcx
    movzx r11d, r10w
    jmp qword [rsp+r11*8+JUMP_CACHE_USER]
"""
