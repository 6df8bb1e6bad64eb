"""Jump cache misses: from a guest address to its translated code."""

from __future__ import annotations

from trivisor.translation.natives.common import fill, spill

LOOKUP = f"""
; r10 = the guest's rip to go on at; every other register is the guest's, and its flags are parked.
lookup:
    pushfq
    pop qword [rsp+FLAGS]
    {spill(0)}
    mov rbp, rsp
    mov [rbp+GUEST_RIP], r10
    movzx eax, word [rbp+FLAGS_AX]
    mov edx, eax
    shr edx, 8
    and edx, 0xd5
    and eax, 1
    shl eax, 11
    or eax, edx
    mov rdx, [rbp+FLAGS]
    and edx, 0x400
    or eax, edx
    mov [rbp+FLAGS], rax
    jmp dispatch
; RIP and all registers are in the state block: run the translation, or leave.
resume:
    mov rax, [rbp+GUEST_RIP]
    movzx ecx, ax
    mov rdx, [rbp+JUMP_CACHE_CURRENT]
    mov rdx, [rdx+rcx*8]
    cmp rdx, [rbp+LOOKUP]
    jne dispatch_go
; The same where the jump cache is known to be of no use.
dispatch:
    inc qword [rbp+COUNT_LOOKUP]
    mov rax, [rbp+GUEST_RIP]
    mov rdx, rax
    shr rdx, 12
    and edx, EXEC_TLB_ENTRIES-1
    shl edx, 4
    lea rdi, [rbp+rdx+EXEC_TLB_KERNEL]
    lea rsi, [rbp+rdx+EXEC_TLB_USER]
    test byte [rbp+MODE], MODE_IS_USER
    cmovnz rdi, rsi
    mov rcx, rax
    and rcx, -4096
    cmp [rdi], rcx
    jne dispatch_fetch
dispatch_found:
    mov r8, [rdi+8]
    mov rcx, r8
    and rcx, -4096
    or rcx, [rbp+MODE]
    mov rdx, rax
    shr rdx, 16
    xor edx, eax
    and edx, BLOCK_TABLE_ENTRIES-1
    shl edx, 5
    lea rsi, [rbp+rdx+BLOCK_TABLE]
    cmp [rsi], rax
    jne dispatch_find
    cmp [rsi+8], rcx
    jne dispatch_find
    cmp qword [rsi+BLOCK_SECOND], 0
    jne dispatch_second
dispatch_both_found:
    mov rdx, [rsi+16]
    movzx ecx, ax
    mov rdi, [rbp+JUMP_CACHE_CURRENT]
    mov [rdi+rcx*8], rdx
    shr ecx, 9
    mov rdi, [rbp+JUMP_CACHE_USED_CURRENT]
    mov byte [rdi+rcx], 1
    mov rcx, rax
    shr rcx, 12
    movzx ecx, cx
    mov byte [rbp+rcx+JUMP_PAGES], 1
    test r8b, 2
    jz dispatch_small
    shr rax, 30
    movzx eax, al
    mov byte [rbp+rax+JUMP_LARGE], 1
dispatch_small:
    test r8b, 1
    jnz dispatch_go
    test byte [rbp+MODE], MODE_IS_USER
    jnz dispatch_go
    mov qword [rbp+KERNEL_JUMPS_LOCAL], 1
dispatch_go:
    mov [rbp+SCRATCH_3], rdx
    mov rax, [rbp+FLAGS]
    mov [rbp+FLAGS_AX+1], al
    shr eax, 11
    and eax, 1
    mov [rbp+FLAGS_AX], al
    push qword [rbp+FLAGS]
    popfq
    {fill()}
    mov r10, [rsp+GUEST_RIP]
    jmp qword [rsp+SCRATCH_3]
dispatch_fetch:
    ; the page is not in the fetch TLB: walk
    cmp qword [rbp+PAGING_NATIVE], 0
    je dispatch_leave
    mov r13, rdi
    mov r12d, KIND_FETCH
    test byte [rbp+MODE], MODE_IS_USER
    jz dispatch_walk
    or r12d, KIND_USER
dispatch_walk:
    inc qword [rbp+COUNT_EXEC_TLB_MISS]
    mov rax, [rbp+GUEST_RIP]
    mov r15, rax
    call walk
    cmp eax, 1
    je dispatch_fault
    ja dispatch_leave
    mov rcx, r15
    and rcx, -4096
    mov [r13], rcx
    call fill_exec
    mov rdi, r13
    mov rax, [rbp+GUEST_RIP]
    jmp dispatch_found
dispatch_find:
    ; not in the block table: but maybe there all the same, or kept from before
    push rdi
    call find
    pop rdi
    test eax, eax
    jz dispatch_leave
    mov rax, [rbp+GUEST_RIP]
    jmp dispatch_found
dispatch_fault:
    mov rax, [rbp+GUEST_RIP]
    mov [rbp+GUEST_CR2], rax
    mov [rbp+EXIT_B], rdx
    mov qword [rbp+EXIT_A], 14
    inc qword [rbp+COUNT_PAGE_FAULT]
    jmp deliver
dispatch_second:
    ; an instruction that runs into the next page: that must still be the one it was translated from
    mov rbx, rsi
    push r8
    lea r15, [rax+4096]
    and r15, -4096
    mov rdx, r15
    shr rdx, 12
    and edx, EXEC_TLB_ENTRIES-1
    shl edx, 4
    lea r13, [rbp+rdx+EXEC_TLB_KERNEL]
    lea rsi, [rbp+rdx+EXEC_TLB_USER]
    xor r12d, r12d
    test byte [rbp+MODE], MODE_IS_USER
    jz dispatch_second_kernel
    mov r13, rsi
    mov r12d, KIND_USER
dispatch_second_kernel:
    cmp [r13], r15
    je dispatch_second_known
    cmp qword [rbp+PAGING_NATIVE], 0
    je dispatch_leave
    or r12d, KIND_FETCH
    inc qword [rbp+COUNT_EXEC_TLB_MISS]
    mov rax, r15
    call walk
    test eax, eax
    jnz dispatch_leave
    mov [r13], r15
    call fill_exec
dispatch_second_known:
    pop r8
    mov rcx, [r13+8]
    mov rdx, rcx
    and rdx, -4096
    or rdx, 1
    cmp rdx, [rbx+BLOCK_SECOND]
    jne dispatch_leave
    ; what happens to either page counts: global only if both are, large if one is
    mov edx, r8d
    or edx, ecx
    and r8d, ecx
    and r8d, 1
    and edx, 2
    or r8d, edx
    mov rcx, r15
    shr rcx, 12
    movzx ecx, cx
    mov byte [rbp+rcx+JUMP_PAGES], 1
    mov rsi, rbx
    mov rax, [rbp+GUEST_RIP]
    jmp dispatch_both_found
; rdi = the physical page, esi = the bits of TLB_INFO, into the fetch TLB's entry r13.
fill_exec:
    or rdi, rsi
    mov [r13+8], rdi
    test edi, 1
    jnz fill_exec_global
    mov rdx, [rbp+LOCAL_COUNT]
    inc qword [rbp+LOCAL_COUNT]
    cmp rdx, LOCAL_ENTRIES
    jae fill_exec_global
    lea rdi, [r13+1]
    mov [rbp+rdx*8+LOCAL], rdi
fill_exec_global:
    ret
dispatch_leave:
    inc qword [rbp+COUNT_LOOKUP_MISS]
    mov qword [rbp+EXIT], EXIT_LOOKUP
    mov rsp, rbp
    jmp leave_spilled
"""
