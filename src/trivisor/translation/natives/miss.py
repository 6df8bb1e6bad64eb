"""TLB misses of translated code."""

from __future__ import annotations

from trivisor.translation.natives.common import fill, spill

MISS = f"""
; call [MISS]; dd retry; dw kind; dw size; dq rip; dd resume; dd crossing
; retry, resume: distances back to where the access starts, and to after its check.  crossing: distance on to a
; copy of what follows the check that ends in CROSSED, or 0.
; r10 = linear address xor the tag, r11 = the entry's offset in the TLB.  Returns to the code, or leaves.
miss:
    {spill(8)}
    pop rbx
    mov rbp, rsp
    movzx r12d, word [rbx+4]
    lea rax, [rbp+r11+TLB_KERNEL]
    lea rcx, [rbp+r11+TLB_USER]
    test r12b, KIND_USER
    cmovnz rax, rcx
    mov rcx, [rax+TLB_READ]
    mov rdx, [rax+TLB_WRITE]
    test r12b, KIND_WRITE
    cmovnz rcx, rdx
    xor r10, rcx
    mov r13, r10
    mov qword [rbp+MISS_DEVICE], -1
    cmp qword [rbp+PAGING_NATIVE], 0
    je miss_slow
    cmp qword [rbp+WATCHING], 0
    jne miss_slow
    mov eax, r13d
    and eax, 0xfff
    movzx ecx, word [rbx+6]
    add eax, ecx
    cmp eax, 4096
    ja miss_crossing
    inc qword [rbp+COUNT_TLB_MISS]
    call fill_tlb
    test eax, eax
    jnz miss_failed
    mov eax, [rbx]
    sub rbx, rax
miss_go:
    mov [rbp+SCRATCH_3], rbx
    {fill()}
    jmp qword [rsp+SCRATCH_3]

miss_failed:
    cmp eax, 1
    je miss_fault
    cmp eax, 4
    je miss_device
    cmp eax, 3
    jne miss_slow
    ; a write to a page with translated code: harmless when its lines have none
    test r12d, KIND_CHUNK
    jnz miss_chunk
    movzx ecx, word [rbx+6]
    cmp ecx, 64
    ja miss_slow
    mov rax, [r11+rdi*8]
    mov edx, r13d
    and edx, 0xfff
    lea ecx, [rcx+rdx-1]
    mov r10, [r14+TLB_HOST]
    add r10, rdx
    mov r8d, edx
    lea r9d, [rcx+1]
    shr edx, 6
    shr ecx, 6
    bt rax, rdx
    jc miss_code
    bt rax, rcx
    jc miss_code
miss_written:
    inc qword [rbp+COUNT_CODE_PAGE_WRITE]
    mov eax, [rbx+16]
    sub rbx, rax
    jmp miss_go
miss_code:
    ; forget what was made of the bytes, unless it may be the very code that is running
    mov rax, [rbx+8]
    mov rdx, rax
    shr rdx, 12
    and edx, EXEC_TLB_ENTRIES-1
    shl edx, 4
    lea rcx, [rbp+rdx+EXEC_TLB_KERNEL]
    lea rsi, [rbp+rdx+EXEC_TLB_USER]
    test byte [rbp+MODE], MODE_IS_USER
    cmovnz rcx, rsi
    and rax, -4096
    cmp [rcx], rax
    jne miss_slow
    mov rax, [rcx+8]
    shr rax, 12
    cmp rax, rdi
    je miss_slow
    push rbx
    push r10
    push r12
    mov r12, rdi
    mov r13d, r8d
    mov r14d, r9d
    call forget_in_page
    pop r12
    pop r10
    pop rbx
    inc qword [rbp+COUNT_CODE_WRITE]
    test r12d, KIND_CHUNK
    jz miss_written
    mov eax, [rbx]
    sub rbx, rax
    jmp miss_go
miss_chunk:
    ; a string instruction, which often overwrites the whole page
    xor r8d, r8d
    mov r9d, 4096
    jmp miss_code

miss_fault:
    test r12d, KIND_JUDGED
    jnz miss_judged
miss_page_fault:
    mov [rbp+GUEST_CR2], r13
    mov [rbp+EXIT_B], rdx
    mov qword [rbp+EXIT_A], 14
    inc qword [rbp+COUNT_PAGE_FAULT]
    call miss_flags
    jmp deliver

; Of 16, 32 and 64 bytes it is the alignment alone that comes before a page fault (`priority.py`).
miss_judged:
    movzx ecx, word [rbx+6]
    cmp ecx, 16
    je miss_judged_alignment
    cmp ecx, 32
    je miss_judged_alignment
    cmp ecx, 64
    jne miss_slow
miss_judged_alignment:
    dec ecx
    test ecx, r13d
    jz miss_page_fault

miss_slow:
    mov [rbp+EXIT_A], r13
    mov eax, [rbx+4]
    mov [rbp+EXIT_B], rax
    mov qword [rbp+EXIT], EXIT_SLOW_ACCESS
    call miss_flags
    mov rcx, rbx
    mov eax, [rbx+16]
    sub rcx, rax
    mov [rbp+RESUME], rcx
    mov eax, [rbx]
    sub rbx, rax
    mov [rbp+EXIT_C], rbx
    jmp leave_spilled

; An access across two pages of RAM goes through a buffer, where it is aligned as it is in memory.
; Where the pages follow each other on the host it needs none, however long it is.
miss_crossing:
    test r12d, KIND_CHUNK
    jnz miss_slow
    mov r15, r13
    call fill_tlb
    test eax, eax
    jnz miss_cross_not
    mov rax, r13
    and eax, 0xfff
    mov ecx, 4096
    sub ecx, eax
    add rax, [r14+TLB_HOST]
    mov [rbp+CROSS_LOW], rax
    mov [rbp+CROSS_LOW_LENGTH], rcx
    or r13, 0xfff
    inc r13
    call fill_tlb
    test eax, eax
    jnz miss_cross_not
    mov rdx, [r14+TLB_HOST]
    mov rcx, [rbp+CROSS_LOW_LENGTH]
    mov r10, [rbp+CROSS_LOW]
    lea rax, [r10+rcx]
    cmp rax, rdx
    je miss_cross_straight
    call miss_cross_fits
    jnz miss_cross_slow
    inc qword [rbp+COUNT_PAGE_CROSSING]
    movzx eax, word [rbx+6]
    sub rax, rcx
    mov [rbp+CROSS_HIGH], rdx
    mov [rbp+CROSS_HIGH_LENGTH], rax
    pushfq
    cld
    mov rsi, [rbp+CROSS_LOW]
    mov r8d, ecx
    neg r8d
    and r8d, 63
    lea rdi, [rbp+r8+CROSS]
    rep movsb
    mov rsi, rdx
    mov rcx, rax
    rep movsb
    popfq
    lea r10, [rbp+r8+CROSS]
    test r12b, KIND_WRITE
    jnz miss_cross_write
    mov eax, [rbx+16]
    sub rbx, rax
    jmp miss_go
miss_cross_write:
    mov eax, [rbx+20]
    add rbx, rax
    jmp miss_go
miss_cross_straight:
    inc qword [rbp+COUNT_PAGE_CROSSING]
    mov eax, [rbx+16]
    sub rbx, rax
    jmp miss_go
miss_cross_not:
    cmp eax, 1
    jne miss_cross_slow
    test r12d, KIND_JUDGED
    jnz miss_cross_slow
    call miss_cross_fits
    jz miss_fault
miss_cross_slow:
    mov r13, r15
    jmp miss_slow

; ZF set: the access fits the buffer, and a write has code that ends in CROSSED.  Loses rax.
miss_cross_fits:
    cmp word [rbx+6], 64
    ja miss_cross_fits_not
    test r12b, KIND_WRITE
    jz miss_cross_fits_done
    cmp dword [rbx+20], 1
    sbb eax, eax
    ret
miss_cross_fits_not:
    or eax, 1
miss_cross_fits_done:
    ret

; call [CROSSED]: the buffer's bytes to where they belong; keeps every register and flag.
crossed:
    pushfq
    push rsi
    push rdi
    push rcx
    cld
    mov rcx, [rsp+40+CROSS_LOW_LENGTH]
    mov esi, ecx
    neg esi
    and esi, 63
    lea rsi, [rsp+rsi+40+CROSS]
    mov rdi, [rsp+40+CROSS_LOW]
    rep movsb
    mov rdi, [rsp+40+CROSS_HIGH]
    mov rcx, [rsp+40+CROSS_HIGH_LENGTH]
    rep movsb
    pop rcx
    pop rdi
    pop rsi
    popfq
    ret

; Put the guest's flags and rip of a missed access into the state block.
miss_flags:
    mov rax, [rbx+8]
    mov [rbp+GUEST_RIP], rax
    pushfq
    pop rcx
    test r12b, KIND_PARKED
    jz miss_flags_host
    movzx eax, word [rbp+FLAGS_AX]
    mov edx, eax
    shr edx, 8
    and eax, 1
    shl eax, 11
    or eax, edx
    and ecx, 0x400
    or ecx, eax
miss_flags_host:
    and ecx, HOST_FLAGS
    mov [rbp+FLAGS], rcx
    ret
"""
