"""Sensitive instructions that need no end of the block: helpers that translated code calls in the middle of it.

`call [HELPER]; jmp on; dq rip; dd kind; on:` with r10 as the helper says; flags may be lost.  The rest
of the guest's registers are in the host's.  What a helper leaves to Python goes to `escape`, with everything as it was.
"""

from __future__ import annotations

from trivisor.translation.natives.common import fill, spill
from trivisor.translation.natives.flush import LARGE_HASH

ASSISTS = f"""
; Python does it.
assist_escape:
    add qword [rsp], 2
    jmp escape

; INVLPG of r10, linear.
invalidate:
    cmp byte [rsp+8+CPL], 0
    jne assist_escape
    mov r11, [rsp]
    mov r11, [r11+2]
    xor r11, r10
    shr r11, 30
    jz assist_escape ; the code that runs may be what is invalidated
    push rdi
    push rsi
    push rax
    push rcx
    push rdx
    pushfq ; DF is the guest's
    lea rdi, [rsp+56]
    mov rsi, r10
    inc qword [rdi+COUNT_INVALIDATION]
    mov rdx, rsi
    shr rdx, 12
    movzx edx, dx
    cmp byte [rdi+rdx+JUMP_PAGES], 0
    jne invalidate_whole
    {LARGE_HASH}
    cmp qword [rdi+rdx*8+LARGE_PIECES], 0
    jne invalidate_whole
    mov rdx, rsi
    shr rdx, 30
    movzx edx, dl
    cmp byte [rdi+rdx+HUGE_PIECES], 0
    jne invalidate_whole
    call flush_sites
    call invalidate_entries
    popfq
    pop rdx
    pop rcx
    pop rax
    pop rsi
    pop rdi
    ret
invalidate_whole:
    push r8
    push r9
    call invalidate_page
    pop r9
    pop r8
    popfq
    pop rdx
    pop rcx
    pop rax
    pop rsi
    pop rdi
    ret

; IN AL from port r10.
port_in:
    cmp byte [rsp+8+CPL], 0
    jne assist_escape
    mov r11, [rsp+8+PORTS]
    movzx r11d, word [r11+r10*2]
    test r11d, PORT_READS
    jz assist_escape
    inc qword [rsp+8+COUNT_PORT_IN]
    mov al, r11b
    ret

; OUT of AL to port r10.
port_out:
    cmp byte [rsp+8+CPL], 0
    jne assist_escape
    mov r11, [rsp+8+PORTS]
    lea r11, [r11+r10*2]
    test word [r11], PORT_LATCHES | PORT_DROPS | PORT_QUEUES
    jz assist_escape
    test word [r11], PORT_LATCHES
    jz port_out_on
    mov [r11], al
port_out_done:
    inc qword [rsp+8+COUNT_PORT_OUT]
    ret
port_out_on:
    test word [r11], PORT_DROPS
    jnz port_out_done
    cmp r10, [rsp+8+QUEUE_PORT]
    jne assist_escape
    mov r11, [rsp+8+PORT_QUEUED]
    cmp r11, PORT_QUEUE_SIZE
    jae assist_escape
    inc qword [rsp+8+PORT_QUEUED]
    add r11, [rsp+8+PORT_QUEUE]
    mov [r11], al
    jmp port_out_done

; RDMSR of the bases and the time-stamp counter.
read_msr:
    cmp qword [rsp+8+NATIVE_MSRS], 0
    je assist_escape
    cmp byte [rsp+8+CPL], 0
    jne read_msr_supervised
    cmp ecx, 0x10
    je read_tsc
    lea r10d, [rcx+0x3fffff00]
    cmp r10d, 2
    ja assist_escape
read_msr_of_base:
    inc qword [rsp+8+COUNT_READ_MSR]
    lea r11, [rsp+8+FS_BASE]
    cmp r10d, 1
    jb read_msr_base
    lea r11, [rsp+8+GS_BASE]
    je read_msr_base
    lea r11, [rsp+8+KERNEL_GS_BASE]
read_msr_base:
    mov eax, [r11]
    mov edx, [r11+4]
    ret
read_msr_supervised:
    ; a kernel in ring 3: its hypervisor would say the same of the bases
    cmp qword [rsp+8+SUPERVISED], 0
    je assist_escape
    cmp qword [rsp+8+GUEST_KERNEL], 0
    je assist_escape
    lea r10d, [rcx+0x3fffff00]
    cmp r10d, 2
    ja assist_escape
    jmp read_msr_of_base
read_tsc:
    inc qword [rsp+8+COUNT_READ_MSR]
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rax, [rsp+8+TSC_OFFSET]
    mov rdx, rax
    shr rdx, 32
    mov eax, eax
    ret

; WRMSR of the bases.
write_msr:
    cmp qword [rsp+8+NATIVE_MSRS], 0
    je assist_escape
    cmp byte [rsp+8+CPL], 0
    jne assist_escape
    lea r11d, [rcx+0x3fffff00]
    cmp r11d, 2
    ja write_apic_msr
    mov r10d, edx
    shl r10, 32
    mov r11d, eax
    or r10, r11
    mov r11, r10
    sar r11, 47
    inc r11
    cmp r11, 1
    ja assist_escape
    inc qword [rsp+8+COUNT_WRITE_MSR]
    cmp ecx, 0xc0000101
    jb write_fs_base
    je write_gs_base
    mov [rsp+8+KERNEL_GS_BASE], r10
    ret
write_fs_base:
    mov [rsp+8+FS_BASE], r10
    ret
write_gs_base:
    mov [rsp+8+GS_BASE], r10
    ret

; CPUID: what Python has answered before.
cpuid:
    mov r11, [rsp+8+CPUID_TABLE]
    call find_cpuid
    jnz assist_escape
    inc qword [rsp+8+COUNT_CPUID]
    mov eax, [r10+8]
    mov ebx, [r10+12]
    mov ecx, [r10+16]
    mov edx, [r10+20]
    ret

; What is known of CPUID's leaf eax, subleaf ecx, in the table r11: ZF set and r10 = its entry.  Keeps all but r11.
find_cpuid:
    mov r10d, eax
    push rax
    shr eax, 26
    xor r10d, eax
    imul eax, ecx, CPUID_SPREAD
    shr eax, 24
    xor r10d, eax
    pop rax
    and r10d, CPUID_ENTRIES-1
    shl r10d, 5
    add r10, r11
    cmp dword [r10+24], 0
    je find_cpuid_empty
    cmp [r10], eax
    jne find_cpuid_empty
    cmp [r10+4], ecx
    je find_cpuid_done
find_cpuid_empty:
    lea r10, [r11+CPUID_ENTRIES*32]
    mov r11d, eax
    sub r11d, [r10]
    cmp [r10+4], r11d ; none while the table is closed
    jbe find_cpuid_done_not
    cmp r11d, r11d
find_cpuid_done:
    ret
find_cpuid_done_not:
    test r10, r10
    ret

; RDPKRU.
read_pkru:
    test dword [rsp+8+GUEST_CR4], CR4_PKE
    jz assist_escape
    test ecx, ecx
    jnz assist_escape
    inc qword [rsp+8+COUNT_PKRU]
    mov eax, [rsp+8+PKRU]
    xor edx, edx
    ret

; WRPKRU.
write_pkru:
    test dword [rsp+8+GUEST_CR4], CR4_PKE
    jz assist_escape
    mov r10d, ecx
    or r10d, edx
    jnz assist_escape
    inc qword [rsp+8+COUNT_PKRU]
    mov r10d, eax
set_pkru:
    ; r10 = the new value.  Where a right comes, a miss in the TLB finds out; what goes must be dropped.
    mov r11d, [rsp+8+PKRU]
    mov [rsp+8+PKRU], r10
    test dword [rsp+8+EFER], EFER_LMA
    jz set_pkru_done
    test dword [rsp+8+GUEST_CR4], CR4_PKE
    jz set_pkru_done
    mov [rsp+8+KEYS_USER], r10
    not r11d
    and r11d, r10d
    jz set_pkru_done
    push rax
    push rcx
    push rdx
    push rdi
    push r8
    push r9
    pushfq ; DF is the guest's
    lea rdi, [rsp+64]
    call forbid_keys
    popfq
    pop r9
    pop r8
    pop rdi
    pop rdx
    pop rcx
    pop rax
set_pkru_done:
    ret

; MOV to DS, ES, FS or GS in 64-bit code: r10 = selector | segment's number << 16.  A descriptor that Python has
; loaded before with this selector at this privilege level is good, if it is the one in the GDT.
load_segment:
    cmp qword [rsp+8+NATIVE_EVENTS], 0
    je assist_escape
    {spill(8)}
    lea rbp, [rsp+8]
    pop qword [rbp+SCRATCH_3]
    movzx eax, r10w
    shr r10d, 16
    shl r10d, 5
    mov [rbp+SCRATCH_0], r10
    mov [rbp+SCRATCH_1], rax
    test eax, 0xfffc
    jz load_segment_null
    test al, 4
    jnz load_segment_python
    mov ecx, eax
    shl ecx, 3
    and ecx, (KNOWN_DATA_ENTRIES-1)*64
    lea r15, [rbp+rcx+KNOWN_DATA]
    mov rcx, [rbp+CPL]
    shl ecx, 16
    or ecx, eax
    cmp [r15], rcx
    jne load_segment_python
    mov rbx, [r15+8]
    call same_descriptor
    jnz load_segment_python
    test byte [r14+TLB_INFO], INFO_OPENED
    jnz load_segment_python ; by AC, which does not count here
    mov rcx, [rbp+SCRATCH_0]
    lea rcx, [rbp+rcx+ES_SELECTOR]
    mov rax, [rbp+SCRATCH_1]
    mov [rcx], rax
    mov rax, [r15+16]
    mov [rcx+8], rax
    mov rax, [r15+24]
    mov [rcx+16], rax
    mov rax, [r15+32]
    mov [rcx+24], rax
load_segment_done:
    inc qword [rbp+COUNT_LOAD_SEGMENT]
    {fill()}
    jmp qword [rsp+SCRATCH_3]
load_segment_null:
    lea rcx, [rbp+r10+ES_SELECTOR]
    xor edx, edx
    mov [rcx], rax
    mov [rcx+8], rdx
    mov [rcx+16], rdx
    mov [rcx+24], rdx
    jmp load_segment_done
load_segment_python:
    {fill()}
    push qword [rsp+SCRATCH_3]
    jmp assist_escape

; call [RAISE]; dq rip; dd vector; dd error: an exception; error code -1 for none.
raise:
    pushfq
    pop qword [rsp+8+FLAGS]
    {spill(8)}
    pop rbx
    mov rbp, rsp
    and qword [rbp+FLAGS], HOST_FLAGS
    mov rax, [rbx]
    mov [rbp+GUEST_RIP], rax
    mov eax, [rbx+8]
    mov [rbp+EXIT_A], rax
    movsxd rax, dword [rbx+12]
    mov [rbp+EXIT_B], rax
    jmp deliver
"""
