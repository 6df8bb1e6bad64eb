"""Flushing TLBs and jump caches: C functions that Python and the other helpers call."""

from __future__ import annotations

from trivisor.translation.layout import SITE_SIZE, SITES, TLB_ENTRIES, TLB_ENTRY_SIZE

_LAST_ENTRY = (TLB_ENTRIES - 1) * TLB_ENTRY_SIZE

C_FUNCTIONS = f"""
; void flush_sites(state): the site caches, which hold nothing that a TLB may not; keeps rdi, rsi, r8 to r11.
; The page that an empty entry matches is not canonical, and leads to a host address that is not either.
flush_sites:
    cld
    mov rdx, rdi
    lea rdi, [rdx+SITES_KERNEL]
    mov rax, 0x8000000000000000
    mov ecx, {2 * SITES * SITE_SIZE // 8}
    rep stosq
    mov rdi, rdx
    ret

; void flush_everything(state, lookup): both TLBs, fetch TLBs and all jump caches.
flush_everything:
    push rdi
    call flush_sites
    call flush_kernel_jumps
    mov rdi, [rsp]
    call flush_user_jumps
    mov rdi, [rsp]
    call flush_other_jumps
    mov rdx, [rsp]
    cld
    mov rax, -1
    lea rdi, [rdx+TLB_KERNEL]
    mov ecx, {(TLB_ENTRIES * TLB_ENTRY_SIZE * 2 + 2 * 512 * 16) // 8}
    rep stosq
    xor eax, eax
    mov [rdx+TLB_KERNEL+{_LAST_ENTRY}+TLB_READ], rax
    mov [rdx+TLB_KERNEL+{_LAST_ENTRY}+TLB_WRITE], rax
    mov [rdx+TLB_USER+{_LAST_ENTRY}+TLB_READ], rax
    mov [rdx+TLB_USER+{_LAST_ENTRY}+TLB_WRITE], rax
    mov [rdx+KERNEL_JUMPS_LOCAL], rax
    mov [rdx+LOCAL_COUNT], rax
    lea rdi, [rdx+LARGE_PIECES]
    mov ecx, 512
    rep stosq
    lea rdi, [rdx+HUGE_PIECES]
    mov ecx, 32
    rep stosq
    pop rdi
    ret

; void flush_local(state): everything that is not global (a CR3 write).
flush_local:
    push rdi
    call flush_sites
    cmp qword [rdi+KERNEL_JUMPS_LOCAL], 0
    je flush_local_user
    mov qword [rdi+KERNEL_JUMPS_LOCAL], 0
    call flush_kernel_jumps
    mov rdi, [rsp]
flush_local_user:
    call flush_user_jumps
    mov rdi, [rsp]
    call flush_other_jumps
    pop rdx
    mov rcx, [rdx+LOCAL_COUNT]
    mov qword [rdx+LOCAL_COUNT], 0
    cmp rcx, LOCAL_ENTRIES
    ja flush_local_all
    lea r9, [rdx+TLB_KERNEL]
flush_local_listed:
    dec rcx
    js flush_local_done
    mov rdi, [rdx+rcx*8+LOCAL]
    test edi, 1
    jnz flush_local_listed_exec
    test byte [rdi+TLB_INFO], 1
    jnz flush_local_listed ; another page has come there since
    mov rax, rdi
    sub rax, r9
    shl rax, 7
    xor eax, 0x1000 ; an address of the neighbouring set never matches here
    mov [rdi+TLB_READ], rax
    mov [rdi+TLB_WRITE], rax
    jmp flush_local_listed
flush_local_listed_exec:
    test byte [rdi+7], 1
    jnz flush_local_listed
    mov qword [rdi-1], -1
    jmp flush_local_listed
flush_local_all:
    ; user view: everything that is not global; in practice nothing of it is global
    xor r8d, r8d
    lea rdi, [rdx+TLB_KERNEL]
    mov ecx, {2 * TLB_ENTRIES}
flush_local_next:
    test byte [rdi+TLB_INFO], 1
    jnz flush_local_keep
    ; an address of the neighbouring set never matches here
    mov eax, r8d
    xor eax, 1
    shl eax, 12
    mov [rdi+TLB_READ], rax
    mov [rdi+TLB_WRITE], rax
flush_local_keep:
    inc r8d
    and r8d, TLB_ENTRIES-1
    add rdi, {TLB_ENTRY_SIZE}
    dec ecx
    jnz flush_local_next
    lea rdi, [rdx+EXEC_TLB_KERNEL]
    mov ecx, 2*EXEC_TLB_ENTRIES
    mov rax, -1
flush_local_exec:
    test byte [rdi+8], 1
    jnz flush_local_exec_keep
    mov [rdi], rax
flush_local_exec_keep:
    add rdi, 16
    dec ecx
    jnz flush_local_exec
flush_local_done:
    ret

; void invalidate_page(state, linear): INVLPG.
invalidate_page:
    call flush_sites
    push rdi
    push rsi
    mov r9, rdi
    mov rdx, rsi
    shr rdx, 12
    movzx edx, dx
    cmp byte [rdi+rdx+JUMP_PAGES], 0
    je invalidate_tlb
    mov byte [rdi+rdx+JUMP_PAGES], 0
    ; jump cache entries of the page, and of an instruction that runs into it
    movzx edx, si
    and edx, 0xf000
    mov ecx, 4096
    mov r8, [rdi+LOOKUP]
invalidate_jump:
    lea r10, [rdi+rdx*8]
    mov [r10+JUMP_CACHE_KERNEL], r8
    mov [r10+JUMP_CACHE_USER], r8
    mov [r10+JUMP_CACHE_OTHER], r8
    inc edx
    dec ecx
    jnz invalidate_jump
    movzx edx, si
    and edx, 0xf000
    mov ecx, 16
invalidate_jump_before:
    dec dx
    movzx edx, dx
    lea r10, [rdi+rdx*8]
    mov [r10+JUMP_CACHE_KERNEL], r8
    mov [r10+JUMP_CACHE_USER], r8
    mov [r10+JUMP_CACHE_OTHER], r8
    dec ecx
    jnz invalidate_jump_before
invalidate_tlb:
    ; pieces of a large page around the address go too
    mov rdx, rsi
    shr rdx, 21
    and edx, 4095
    cmp byte [rdi+rdx+LARGE_PIECES], 0
    jne invalidate_large
    mov rdx, rsi
    shr rdx, 30
    movzx edx, dl
    cmp byte [rdi+rdx+HUGE_PIECES], 0
    jne invalidate_large
    call invalidate_entries
    pop rsi
    pop rdi
    ret
invalidate_large:
    ; ... and with code in large pages there all jumps
    mov rdx, rsi
    shr rdx, 30
    movzx edx, dl
    movzx r11d, byte [rdi+rdx+JUMP_LARGE]
    mov byte [rdi+rdx+JUMP_LARGE], 0
    lea rdi, [r9+TLB_KERNEL]
    mov ecx, {2 * TLB_ENTRIES}
    xor r8d, r8d
invalidate_next:
    mov rax, [rdi+TLB_READ]
    xor rax, rsi
    mov edx, 0x1000
    test byte [rdi+TLB_INFO], 2
    jz invalidate_small
    mov edx, 0x40000000
invalidate_small:
    cmp rax, rdx
    jae invalidate_keep
    mov eax, r8d
    xor eax, 1
    shl eax, 12
    mov [rdi+TLB_READ], rax
    mov [rdi+TLB_WRITE], rax
    mov qword [rdi+TLB_INFO], 0
invalidate_keep:
    inc r8d
    and r8d, TLB_ENTRIES-1
    add rdi, {TLB_ENTRY_SIZE}
    dec ecx
    jnz invalidate_next
    ; the fetch TLB: any large piece within 1 GiB goes
    lea rdi, [r9+EXEC_TLB_KERNEL]
    mov ecx, 2*EXEC_TLB_ENTRIES
    mov r8, -1
invalidate_exec:
    mov rax, [rdi]
    xor rax, rsi
    mov edx, 0x1000
    test byte [rdi+8], 2
    jz invalidate_exec_small
    mov edx, 0x40000000
invalidate_exec_small:
    cmp rax, rdx
    jae invalidate_exec_keep
    mov [rdi], r8
invalidate_exec_keep:
    add rdi, 16
    dec ecx
    jnz invalidate_exec
    pop rsi
    pop rdi
    test r11d, r11d
    jz invalidate_done
    push rdi
    call flush_kernel_jumps
    mov rdi, [rsp]
    call flush_user_jumps
    pop rdi
    jmp flush_other_jumps
invalidate_done:
    ret

; The one entry of each TLB that rsi, linear, can have.  Keeps all but rax, rcx, rdx.
invalidate_entries:
    mov rdx, rsi
    and rdx, -4096
    mov rcx, rdx
    shr ecx, 7
    and ecx, (TLB_ENTRIES-1)*32
    mov rax, rdx
    xor rax, 0x1000 ; an address of the neighbouring set never matches here
    cmp [rdi+rcx+TLB_KERNEL+TLB_READ], rdx
    jne invalidate_entries_user
    mov [rdi+rcx+TLB_KERNEL+TLB_READ], rax
    mov [rdi+rcx+TLB_KERNEL+TLB_WRITE], rax
invalidate_entries_user:
    cmp [rdi+rcx+TLB_USER+TLB_READ], rdx
    jne invalidate_entries_exec
    mov [rdi+rcx+TLB_USER+TLB_READ], rax
    mov [rdi+rcx+TLB_USER+TLB_WRITE], rax
invalidate_entries_exec:
    mov rcx, rdx
    shr rcx, 12
    and ecx, EXEC_TLB_ENTRIES-1
    shl ecx, 4
    mov rax, -1
    cmp [rdi+rcx+EXEC_TLB_KERNEL], rdx
    jne invalidate_entries_exec_user
    mov [rdi+rcx+EXEC_TLB_KERNEL], rax
invalidate_entries_exec_user:
    cmp [rdi+rcx+EXEC_TLB_USER], rdx
    jne invalidate_entries_done
    mov [rdi+rcx+EXEC_TLB_USER], rax
invalidate_entries_done:
    ret

; void close_pages(state): RFLAGS.AC is clear, so user pages must not stay in the kernel's TLB (CR4.SMAP).
close_pages:
    call flush_sites
    mov rcx, [rdi+OPENED_COUNT]
    mov qword [rdi+OPENED_COUNT], 0
    lea r9, [rdi+TLB_KERNEL]
    cmp rcx, OPENED_PAGES
    ja close_all
close_next:
    dec rcx
    js close_done
    mov rdx, [rdi+rcx*8+OPENED_0]
    test byte [rdx+TLB_INFO], INFO_OPENED
    jz close_next
    mov rax, rdx
    sub rax, r9
    shl rax, 7
    xor eax, 0x1000
    mov [rdx+TLB_READ], rax
    mov [rdx+TLB_WRITE], rax
    jmp close_next
close_all:
    mov ecx, TLB_ENTRIES
    xor r8d, r8d
    mov rdx, r9
close_all_next:
    test byte [rdx+TLB_INFO], INFO_OPENED
    jz close_all_keep
    mov eax, r8d
    xor eax, 1
    shl eax, 12
    mov [rdx+TLB_READ], rax
    mov [rdx+TLB_WRITE], rax
close_all_keep:
    inc r8d
    add rdx, 32
    dec ecx
    jnz close_all_next
close_done:
    ret

; call [CLOSE]: the same from translated code; keeps every register, not the flags
close_inline:
    push rax
    push rcx
    push rdx
    push rdi
    push r8
    push r9
    lea rdi, [rsp+56]
    call close_pages
    pop r9
    pop r8
    pop rdi
    pop rdx
    pop rcx
    pop rax
    ret

; void purge_writes(state, host page): code was translated from the page, so writes to it must miss.
purge_writes:
    call flush_sites
    xor r8d, r8d
    lea rdx, [rdi+TLB_KERNEL]
    mov ecx, {2 * TLB_ENTRIES}
purge_next:
    cmp [rdx+TLB_HOST], rsi
    jne purge_keep
    mov eax, r8d
    xor eax, 1
    shl eax, 12
    mov [rdx+TLB_WRITE], rax
purge_keep:
    inc r8d
    and r8d, TLB_ENTRIES-1
    add rdx, {TLB_ENTRY_SIZE}
    dec ecx
    jnz purge_next
    ret
"""


def _flush_jumps(name: str, number: int) -> str:
    """A C function that empties one jump cache, touching only the 4 KiB chunks in use."""
    return f"""
flush_{name.lower()}_jumps:
    lea r9, [rdi+JUMP_CACHE_USED+{128 * number}]
    lea rdx, [rdi+JUMP_CACHE_{name}]
    mov rax, [rdi+LOOKUP]
    xor r8d, r8d
    cld
flush_{name.lower()}_chunks:
    cmp qword [r9+r8], 0
    je flush_{name.lower()}_eight
flush_{name.lower()}_chunk:
    cmp byte [r9+r8], 0
    je flush_{name.lower()}_clean
    mov byte [r9+r8], 0
    mov rdi, r8
    shl rdi, 12
    add rdi, rdx
    mov ecx, 512
    rep stosq
flush_{name.lower()}_clean:
    inc r8d
    test r8d, 7
    jnz flush_{name.lower()}_chunk
    sub r8d, 8
flush_{name.lower()}_eight:
    add r8d, 8
    cmp r8d, 128
    jne flush_{name.lower()}_chunks
    ret
"""


JUMP_FLUSHES = _flush_jumps("KERNEL", 0) + _flush_jumps("USER", 1) + _flush_jumps("OTHER", 2)
