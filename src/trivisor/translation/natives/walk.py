"""The native page walker for 4-level paging (Intel SDM 3A 4.5), and what fills the data TLBs with it."""

from __future__ import annotations

from trivisor.translation.layout import LARGE_PIECES


def _read_entry(level: int) -> str:
    """Read the level's entry of the table at physical rdi for linear rax into rdx; rdi becomes its host address."""
    return f"""
    mov rsi, rax
    shr rsi, {12 + 9 * (level - 1)}
    and esi, 0x1ff
    lea rdi, [rdi+rsi*8]
    cmp rdi, [rbp+RAM_LOW_END]
    jb walk_ram{level}
    mov rsi, 0x100000000
    cmp rdi, rsi
    jb walk_slow
    cmp rdi, [rbp+RAM_HIGH_END]
    jae walk_slow
walk_ram{level}:
    add rdi, [rbp+RAM_BASE]
    mov rdx, [rdi]
    test dl, 1
    jz walk_absent
    test rdx, [rbp+PHYSICAL_LIMIT_MASK]
    jnz walk_reserved
    and r9, rdx
    or r14, rdx
"""


def _next_table() -> str:
    """Mark the entry accessed and go on to the table it names."""
    return """
    or dword [rdi], 0x20
    mov rdi, rdx
    and rdi, r8
"""


WALK = f"""
; walk 4-level paging: rax = linear, r12 = kind.
; eax = 0: rdi = physical page, rdx = leaf entry (A and D now as they must be), esi = bits of TLB_INFO,
;          r9 = all entries anded (W, U)
; eax = 4: the same, but the page is not RAM
; eax = 1: page fault, edx = error code;  eax = 2: not for us.
; Keeps rbx, rbp, r12, r13, r15.  Accessed bits are set on the way, as the processor may.
walk:
    mov rcx, rax
    sar rcx, 47
    inc rcx
    cmp rcx, 1
    ja walk_slow
    mov r8, 0x000ffffffffff000
    mov r9, -1
    xor r14d, r14d
    mov rdi, [rbp+GUEST_CR3]
    and rdi, r8
    {_read_entry(4)}
    test dl, 0x80
    jnz walk_reserved
    {_next_table()}
    {_read_entry(3)}
    test dl, 0x80
    jnz walk_huge
    {_next_table()}
    {_read_entry(2)}
    test dl, 0x80
    jnz walk_large
    {_next_table()}
    {_read_entry(1)}
    and r8, rdx
    xor esi, esi
    jmp walk_permission
walk_huge:
    test edx, 0x3fffe000
    jnz walk_reserved
    and r8, rdx
    and r8, -0x40000000
    mov rcx, rax
    and ecx, 0x3ffff000
    or r8, rcx
    mov esi, 6
    jmp walk_permission
walk_large:
    test edx, 0x1fe000
    jnz walk_reserved
    and r8, rdx
    and r8, -0x200000
    mov rcx, rax
    and ecx, 0x1ff000
    or r8, rcx
    mov esi, 2
walk_permission:
    cmp qword [rbp+KEYS], 0
    jne walk_keys
walk_keys_allow:
    test r12b, KIND_USER
    jz walk_supervisor
    test r9b, 4
    jz walk_denied
    test r12b, KIND_WRITE
    jz walk_fetch
    test r9b, 2
    jz walk_denied
    jmp walk_mark_dirty
walk_supervisor:
    test dword [rbp+GUEST_CR4], CR4_SMAP
    jnz walk_smap
walk_supervisor_may:
    test r12b, KIND_WRITE
    jz walk_fetch
    test r9b, 2
    jnz walk_mark_dirty
    test dword [rbp+GUEST_CR0], CR0_WP
    jnz walk_denied
walk_mark_dirty:
    or dword [rdi], 0x60
    or edx, 0x60
    jmp walk_done
walk_fetch:
    test r12b, KIND_FETCH
    jz walk_mark_accessed
    bt r14, 63
    jc walk_denied
    test r12b, KIND_USER
    jnz walk_mark_accessed
    test dword [rbp+GUEST_CR4], CR4_SMEP
    jz walk_mark_accessed
    test r9b, 4
    jnz walk_denied
walk_mark_accessed:
    test dl, 0x20
    jnz walk_done
    or dword [rdi], 0x20
walk_done:
    mov rdi, r8
    test r12b, KIND_USER
    jnz walk_local
    mov rcx, rax
    and rcx, [rbp+KEPT_HALF]
    shr rcx, 63
    or esi, ecx
walk_local:
    test esi, 6
    jnz walk_note_large
walk_noted:
    xor eax, eax
    cmp rdi, [rbp+RAM_LOW_END]
    jb walk_is_ram
    mov rcx, 0x100000000
    cmp rdi, rcx
    jb walk_device
    cmp rdi, [rbp+RAM_HIGH_END]
    jb walk_is_ram
walk_device:
    mov eax, 4
walk_is_ram:
    bt edx, 8
    jnc walk_ok
    test dword [rbp+GUEST_CR4], CR4_PGE
    jz walk_ok
    or esi, 1
walk_ok:
    ret
walk_note_large:
    ; INVLPG must look for all pieces of a large page
    mov rcx, rax
    test esi, 4
    jnz walk_note_huge
    shr rcx, 21
    mov r10, rax
    shr r10, 33
    xor ecx, r10d
    and ecx, {LARGE_PIECES - 1}
    lea rcx, [rbp+rcx*8+LARGE_PIECES]
    mov r10, rax
    and r10, -4096
    inc r10
    cmp [rcx], r10
    je walk_noted
    cmp qword [rcx], 0
    je walk_note_single
    mov r10, -1
walk_note_single:
    mov [rcx], r10
    jmp walk_noted
walk_note_huge:
    shr rcx, 30
    movzx ecx, cl
    mov byte [rbp+rcx+HUGE_PIECES], 1
    jmp walk_noted
walk_keys:
    ; data on the page is subject to its protection key (section 4.6.2)
    test r12b, KIND_FETCH
    jnz walk_keys_allow
    mov rcx, rdx
    shr rcx, 58
    and ecx, 0x1e
    jz walk_keys_of
    or esi, INFO_KEYED
walk_keys_of:
    mov r10, [rbp+KEYS_USER]
    test r9b, 4
    jnz walk_keys_look
    mov r10, [rbp+KEYS_SUPERVISOR]
walk_keys_look:
    shr r10, cl
    test r10b, 3
    jz walk_keys_allow
    test r10b, 1
    jnz walk_keys_denied
    test r12b, KIND_WRITE
    jz walk_keys_read_only
    test r12b, KIND_USER
    jnz walk_keys_denied
    test dword [rbp+GUEST_CR0], CR0_WP
    jz walk_keys_allow
walk_keys_denied:
    mov edx, 0x21
    jmp walk_error
walk_keys_read_only:
    ; as if the entries forbade writing, which CR0.WP has count for the supervisor alike
    and r9, -3
    jmp walk_keys_allow
walk_smap:
    ; data on user pages is out of reach unless RFLAGS.AC is set
    test r9b, 4
    jz walk_supervisor_may
    test r12b, KIND_FETCH
    jnz walk_supervisor_may
    test dword [rbp+SYSTEM_FLAGS], FLAG_AC
    jz walk_denied
    or esi, INFO_OPENED
    jmp walk_supervisor_may
walk_absent:
    xor edx, edx
    jmp walk_error
walk_reserved:
    mov edx, 9
    jmp walk_error
walk_denied:
    mov edx, 1
walk_error:
    test r12b, KIND_WRITE
    jz walk_error_user
    or edx, 2
walk_error_user:
    test r12b, KIND_USER
    jz walk_error_fetch
    or edx, 4
walk_error_fetch:
    test r12b, KIND_FETCH
    jz walk_error_done
    test dword [rbp+GUEST_CR4], CR4_SMEP
    jnz walk_error_is_fetch
    test dword [rbp+EFER], EFER_NXE
    jz walk_error_done
walk_error_is_fetch:
    or edx, 16
walk_error_done:
    mov eax, 1
    ret
walk_slow:
    mov eax, 2
    ret
"""

FILL_TLB = """
; Walk for the data access (r13 = linear, r12 = kind) and enter it in the TLB.  eax as from walk, or 3:
; the page has translated code and this is a write (rdi = page number, r11 = the lines' bits, one word a page).
; r14 = the entry.
fill_tlb:
    mov rax, r13
    call walk
    test eax, eax
    jnz fill_done
; rdi = physical page, edx = leaf, esi = info, r9 = rights
    mov rcx, r13
    and rcx, -4096
    mov r8, rcx
    shr r8d, 7
    and r8d, (TLB_ENTRIES-1)*32
    lea r14, [rbp+r8+TLB_KERNEL]
    lea r11, [rbp+r8+TLB_USER]
    test r12b, KIND_USER
    cmovnz r14, r11
    mov [r14+TLB_READ], rcx
    mov [r14+TLB_INFO], rsi
    test esi, 1
    jnz fill_global
    mov r8, [rbp+LOCAL_COUNT]
    inc qword [rbp+LOCAL_COUNT]
    cmp r8, LOCAL_ENTRIES
    jae fill_global
    mov [rbp+r8*8+LOCAL], r14
fill_global:
    test esi, INFO_OPENED | INFO_KEYED
    jnz fill_note
fill_noted:
    mov r11, rdi
    add r11, [rbp+RAM_BASE]
    mov [r14+TLB_HOST], r11
    ; writable without coming here again: right to write, dirty already, and no translated code in it
    mov r10, rcx
    xor r10, 0x1000
    mov [r14+TLB_WRITE], r10
    test dl, 0x40
    jz fill_done
    test r9b, 2
    jnz fill_may_write
    test r12b, KIND_USER
    jnz fill_done
    test dword [rbp+GUEST_CR0], CR0_WP
    jnz fill_done
fill_may_write:
    shr rdi, 12
    mov r11, [rbp+CODE_LINES]
    cmp qword [r11+rdi*8], 0
    jne fill_has_code
    mov [r14+TLB_WRITE], rcx
    ret
fill_has_code:
    test r12b, KIND_WRITE
    jz fill_done
    mov eax, 3
fill_done:
    ret
fill_note:
    test esi, INFO_KEYED
    jz fill_opened
    ; to be dropped when the key forbids more
    mov r8, [rbp+KEYED_COUNT]
    cmp r8, KEYED_PAGES
    jae fill_too_many_keyed
    mov [rbp+r8*8+KEYED_0], r14
fill_too_many_keyed:
    inc qword [rbp+KEYED_COUNT]
    test esi, INFO_OPENED
    jz fill_noted
fill_opened:
    ; to be closed again when AC is cleared
    mov r8, [rbp+OPENED_COUNT]
    cmp r8, OPENED_PAGES
    jae fill_too_many
    mov [rbp+r8*8+OPENED_0], r14
fill_too_many:
    inc qword [rbp+OPENED_COUNT]
    jmp fill_noted
"""

WALK_FOR_PYTHON = """
; int walk_for_python(state, linear, kind): the walk's outcome, with its findings in the state block
walk_for_python:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rbp, rdi
    mov rax, rsi
    mov r12, rdx
    call walk
    mov [rbp+WALKED_PHYSICAL], rdi
    mov [rbp+WALKED_LEAF], rdx
    mov [rbp+WALKED_RIGHTS], r9
    mov [rbp+WALKED_NX], r14
    mov [rbp+WALKED_INFO], rsi
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"""
