"""Flushing TLBs and jump caches: C functions that Python and the other helpers call."""

from __future__ import annotations

from trivisor.translation.layout import EMPTY_SITE, LARGE_PIECES, SITE_SIZE, SITES, TLB_ENTRIES, TLB_ENTRY_SIZE

_LAST_ENTRY = (TLB_ENTRIES - 1) * TLB_ENTRY_SIZE

LARGE_HASH = f"""
    mov rdx, rsi
    shr rdx, 21
    mov rcx, rsi
    shr rcx, 33
    xor edx, ecx
    and edx, {LARGE_PIECES - 1}
"""
"""rdx = the place in LARGE_PIECES of rsi, linear; loses rcx (`layout.large_place`)."""

C_FUNCTIONS = f"""
; void flush_sites(state): the site caches, which hold nothing that a TLB may not; keeps rdi, rsi, r8 to r11.
; The page that an empty entry matches is not canonical, and leads to a host address that is not either.
flush_sites:
    cld
    mov rdx, rdi
    lea rdi, [rdx+SITES_KERNEL]
    mov rax, {EMPTY_SITE}
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
    mov ecx, {LARGE_PIECES}
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
    call invalidate_jumps
invalidate_tlb:
    ; pieces of a large page around the address go too, if there are others than this one
    {LARGE_HASH}
    mov rcx, [rdi+rdx*8+LARGE_PIECES]
    test rcx, rcx
    jz invalidate_maybe_huge
    cmp rcx, -1
    je invalidate_large
    mov rax, rsi
    and rax, -4096
    inc rax
    xor rax, rcx
    jz invalidate_single
    shr rax, 21
    jz invalidate_large
    jmp invalidate_maybe_huge
invalidate_single:
    mov [rdi+rdx*8+LARGE_PIECES], rax
invalidate_maybe_huge:
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

; Empty all jump caches for the page of rsi, linear, and for an instruction that runs into it.  Keeps rdi, rsi, r9.
invalidate_jumps:
    push rdi
    push rbx
    lea r10, [rdi+JUMP_CACHE_USED]
    lea r11, [rdi+JUMP_CACHE_KERNEL]
    mov rax, [rdi+LOOKUP]
    movzx r8d, si
    shr r8d, 9
    and r8d, 0x78 ; the first of the eight chunks that the page has
    mov ebx, 3
invalidate_jumps_cache:
    mov edx, 8
    cmp qword [r10+r8], 0
    je invalidate_jumps_before
invalidate_jumps_chunk:
    dec edx
    js invalidate_jumps_before
    lea ecx, [r8+rdx]
    cmp byte [r10+rcx], 0
    je invalidate_jumps_chunk
    mov byte [r10+rcx], 0
    shl ecx, 12
    lea rdi, [r11+rcx]
    mov ecx, 512
    rep stosq
    jmp invalidate_jumps_chunk
invalidate_jumps_before:
    lea ecx, [r8-1]
    and ecx, 127
    cmp byte [r10+rcx], 0
    je invalidate_jumps_next
    inc ecx
    shl ecx, 12
    lea rdi, [r11+rcx-128]
    mov ecx, 16
    rep stosq
invalidate_jumps_next:
    add r10, 128
    add r11, JUMP_CACHE_ENTRIES*8
    dec ebx
    jnz invalidate_jumps_cache
    pop rbx
    pop rdi
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
    pushfq
    lea rdi, [rsp+64]
    call close_pages
    popfq ; DF is the guest's
    pop r9
    pop r8
    pop rdi
    pop rdx
    pop rcx
    pop rax
    ret

; void forbid_keys(state): pages must not stay in the TLBs whose protection keys have rights that are taken away now,
; r11d (PKRU's bits).  Keeps rsi, r10.
forbid_keys:
    call flush_sites
    mov rcx, [rdi+KEYED_COUNT]
    mov qword [rdi+KEYED_COUNT], 0
    lea r9, [rdi+TLB_KERNEL]
    test r11d, 3
    jnz forbid_all ; key 0, which most pages have, is not noted
    cmp rcx, KEYED_PAGES
    ja forbid_all
forbid_next:
    dec rcx
    js forbid_done
    mov rdx, [rdi+rcx*8+KEYED_0]
    test byte [rdx+TLB_INFO], INFO_KEYED
    jz forbid_next
    mov rax, rdx
    sub rax, r9
    shl rax, 7
    xor eax, 0x1000
    mov [rdx+TLB_READ], rax
    mov [rdx+TLB_WRITE], rax
    jmp forbid_next
forbid_all:
    mov ecx, {2 * TLB_ENTRIES}
    xor r8d, r8d
forbid_all_next:
    test r11d, 3
    jnz forbid_all_drop
    test byte [r9+TLB_INFO], INFO_KEYED
    jz forbid_all_keep
forbid_all_drop:
    mov eax, r8d
    xor eax, 1
    shl eax, 12
    mov [r9+TLB_READ], rax
    mov [r9+TLB_WRITE], rax
forbid_all_keep:
    inc r8d
    and r8d, TLB_ENTRIES-1
    add r9, {TLB_ENTRY_SIZE}
    dec ecx
    jnz forbid_all_next
forbid_done:
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
