"""The native helpers: machine code that translated code calls for what must be fast but is too long to inline.

They are written in the project's assembler and assembled once per process.
Convention inside a helper, after `spill`: every guest register is in its slot
of `GPR`, rbp is the state pointer, and all host registers may be used.  rsp is
the state pointer too, so pushes go to the stack below the state block.
"""

from __future__ import annotations

from functools import cache

from trivisor.translation.layout import OFFSETS, SYMBOLS, TLB_ENTRIES, TLB_ENTRY_SIZE
from trivisor.x86.assembler import Program, assemble

_SPILLED = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r12", "r13", "r14")


def _spill(depth: int) -> str:
    """Store the guest's registers, with `depth` bytes pushed on top of the state pointer."""
    lines = [f"mov [rsp+{depth}+GPR_{name.upper()}], {name}" for name in _SPILLED]
    return "\n".join([*lines, f"mov [rsp+{depth}+GPR_RSP], r15"])


def _fill() -> str:
    """Load the guest's registers again; rsp is the state pointer."""
    lines = [f"mov {name}, [rsp+GPR_{name.upper()}]" for name in _SPILLED]
    return "\n".join([*lines, "mov r15, [rsp+GPR_RSP]"])


# Access kinds, in a miss's description: bit 0 write, bit 1 user, bit 2 flags are parked, bit 3 fetch.
_CONSTANTS = """
KIND_WRITE   equ 1
KIND_USER    equ 2
KIND_PARKED  equ 4
KIND_FETCH   equ 8
HOST_FLAGS   equ 0xcd5
CR0_WP       equ 0x10000
CR4_PGE      equ 0x80
CR4_SMEP     equ 0x100000
EFER_NXE     equ 0x800
FRAME_MASK_HI equ 0x000fffff
"""

_ENTER_LEAVE = f"""
; enter(rdi = state, rsi = where): C calling convention; returns the exit's number
enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rdi+HOST_RSP], rsp
    mov rsp, rdi
    mov [rsp+SCRATCH_3], rsi
    mov eax, XSAVE_MASK
    xor edx, edx
    RESTORE_FPU [rsp+FPU]
    push qword [rsp+FLAGS]
    popfq
    {_fill()}
    mov r10, [rsp+GUEST_RIP]
    jmp qword [rsp+SCRATCH_3]

; Leave to Python: EXIT and RIP are set, guest registers are in the host's.
leave_native:
    pushfq
    pop qword [rsp+FLAGS]
    {_spill(0)}
leave_spilled:
    cld
    and qword [rsp+FLAGS], HOST_FLAGS
    mov eax, XSAVE_MASK
    xor edx, edx
    SAVE_FPU [rsp+FPU]
    CLEAN_UPPER
    fninit
    ldmxcsr [rel default_mxcsr]
    mov eax, [rsp+EXIT]
    mov rsp, [rsp+HOST_RSP]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    align 4
default_mxcsr: dd 0x1f80

; A host signal struck translated code; the signal handler sent us here with all registers as they were.
fault_leave:
    mov qword [rsp+EXIT], EXIT_HOST_FAULT
    jmp leave_native

; call [CALL_OUT]; dq rip: Python does the instruction at rip.
call_out:
    pushfq
    pop qword [rsp+8+FLAGS]
    {_spill(8)}
    pop rbx
    mov rax, [rbx]
    mov [rsp+GUEST_RIP], rax
    mov qword [rsp+EXIT], EXIT_CALL_OUT
    jmp leave_spilled

; call [ESCAPE]; dq rip; dd kind: the same from the middle of an instruction, with the flags maybe parked.
escape:
    {_spill(8)}
    pop rbx
    mov rbp, rsp
    mov r12d, [rbx+8]
    sub rbx, 8
    call miss_flags
    mov qword [rbp+EXIT], EXIT_CALL_OUT
    jmp leave_spilled

; call [CHAIN]; dd link: a direct jump whose target has no translation yet, or is not linked.
chain:
    pushfq
    pop qword [rsp+8+FLAGS]
    {_spill(8)}
    pop rbx
    mov eax, [rbx]
    mov [rsp+EXIT_A], rax
    mov qword [rsp+EXIT], EXIT_CHAIN
    jmp leave_spilled
"""

_LOOKUP = f"""
; r10 = the guest's rip to go on at; every other register is the guest's.
lookup:
    pushfq
    pop qword [rsp+FLAGS]
    {_spill(0)}
    mov rbp, rsp
    mov [rbp+GUEST_RIP], r10
; RIP and all registers are in the state block: find the translation and run it, or leave.
dispatch:
    inc qword [rbp+COUNT_LOOKUP]
    mov rax, [rbp+GUEST_RIP]
    mov rdx, rax
    shr rdx, 12
    and edx, EXEC_TLB_ENTRIES-1
    shl edx, 4
    lea rdi, [rbp+rdx+EXEC_TLB_KERNEL]
    lea rsi, [rbp+rdx+EXEC_TLB_USER]
    cmp qword [rbp+CPL], 3
    cmove rdi, rsi
    mov rcx, rax
    and rcx, -4096
    cmp [rdi], rcx
    jne dispatch_fetch
dispatch_found:
    mov r8, [rdi+8]
    mov rcx, r8
    and rcx, -4096
    or rcx, [rbp+MODE]
    movzx edx, ax
    shl edx, 5
    lea rsi, [rbp+rdx+BLOCK_TABLE]
    cmp [rsi], rax
    jne dispatch_leave
    cmp [rsi+8], rcx
    jne dispatch_leave
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
    test r8b, 1
    jnz dispatch_go
    cmp qword [rbp+CPL], 3
    je dispatch_go
    mov qword [rbp+KERNEL_JUMPS_LOCAL], 1
dispatch_go:
    mov [rbp+SCRATCH_3], rdx
    push qword [rbp+FLAGS]
    popfq
    {_fill()}
    mov r10, [rsp+GUEST_RIP]
    jmp qword [rsp+SCRATCH_3]
dispatch_fetch:
    ; the page is not in the fetch TLB: walk
    cmp qword [rbp+PAGING_NATIVE], 0
    je dispatch_leave
    mov r13, rdi
    mov r12d, KIND_FETCH
    cmp qword [rbp+CPL], 3
    jne dispatch_walk
    or r12d, KIND_USER
dispatch_walk:
    inc qword [rbp+COUNT_EXEC_TLB_MISS]
    mov rax, [rbp+GUEST_RIP]
    mov r15, rax
    call walk
    test eax, eax
    jnz dispatch_leave
    mov rcx, r15
    and rcx, -4096
    mov [r13], rcx
    or rdi, rsi
    mov [r13+8], rdi
    mov rdi, r13
    mov rax, [rbp+GUEST_RIP]
    jmp dispatch_found
dispatch_leave:
    inc qword [rbp+COUNT_LOOKUP_MISS]
    mov qword [rbp+EXIT], EXIT_LOOKUP
    mov rsp, rbp
    jmp leave_spilled
"""


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
    jnz walk_slow
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


_WALK = f"""
; walk 4-level paging: rax = linear, r12 = kind.
; eax = 0: rdi = physical page, rdx = leaf entry (A and D now as they must be), esi = 2 for a piece of a large page
;          or 0, plus bit 0 when global, r9 = all entries anded (W, U)
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
    jnz walk_slow
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
    jnz walk_slow
    and r8, rdx
    and r8, -0x40000000
    mov rcx, rax
    and ecx, 0x3ffff000
    or r8, rcx
    mov esi, 2
    jmp walk_permission
walk_large:
    test edx, 0x1fe000
    jnz walk_slow
    and r8, rdx
    and r8, -0x200000
    mov rcx, rax
    and ecx, 0x1ff000
    or r8, rcx
    mov esi, 2
walk_permission:
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
    cmp rdi, [rbp+RAM_LOW_END]
    jb walk_is_ram
    mov rcx, 0x100000000
    cmp rdi, rcx
    jb walk_slow
    cmp rdi, [rbp+RAM_HIGH_END]
    jae walk_slow
walk_is_ram:
    bt edx, 8
    jnc walk_ok
    test dword [rbp+GUEST_CR4], CR4_PGE
    jz walk_ok
    or esi, 1
walk_ok:
    xor eax, eax
    ret
walk_absent:
    xor edx, edx
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

_FILL_TLB = """
; Walk for the data access (r13 = linear, r12 = kind) and enter it in the TLB.  eax as from walk; 2 also when
; the page may be entered but this access must not use it (a write to a page with translated code).
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
    mov r11, [rbp+CODE_PAGES]
    cmp byte [r11+rdi], 0
    jne fill_has_code
    mov [r14+TLB_WRITE], rcx
    ret
fill_has_code:
    test r12b, KIND_WRITE
    jz fill_done
    mov eax, 2
fill_done:
    ret
"""

_MISS = f"""
; call [MISS]; dd retry_distance; dw kind; dw size; dq rip
; r10 = linear address xor the tag, r11 = the entry's offset in the TLB.  Returns to the check, or does not.
miss:
    {_spill(8)}
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
    mov eax, r13d
    and eax, 0xfff
    movzx ecx, word [rbx+6]
    add eax, ecx
    cmp eax, 4096
    ja miss_slow
    cmp qword [rbp+PAGING_NATIVE], 0
    je miss_slow
    inc qword [rbp+COUNT_TLB_MISS]
    call fill_tlb
    test eax, eax
    jnz miss_failed
    mov eax, [rbx]
    sub rbx, rax
    mov [rbp+SCRATCH_3], rbx
    {_fill()}
    jmp qword [rsp+SCRATCH_3]
miss_failed:
    cmp eax, 1
    jne miss_slow
    mov [rbp+GUEST_CR2], r13
    mov [rbp+EXIT_B], rdx
    mov qword [rbp+EXIT_A], 14
    mov qword [rbp+EXIT], EXIT_EXCEPTION
    inc qword [rbp+COUNT_PAGE_FAULT]
    call miss_flags
    jmp deliver
miss_slow:
    mov [rbp+EXIT_A], r13
    mov eax, [rbx+4]
    mov [rbp+EXIT_B], rax
    mov qword [rbp+EXIT], EXIT_SLOW_ACCESS
    call miss_flags
    mov eax, [rbx]
    sub rbx, rax
    mov [rbp+EXIT_C], rbx
    jmp leave_spilled

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

_DELIVER = """
; Exception EXIT_A with error code EXIT_B; registers, FLAGS and RIP are in the state block.
deliver:
    mov rsp, rbp
    jmp leave_spilled
"""

_LAST_ENTRY = (TLB_ENTRIES - 1) * TLB_ENTRY_SIZE

_C_FUNCTIONS = f"""
; void flush_everything(state, lookup): both TLBs, fetch TLBs and all jump caches.
flush_everything:
    push rdi
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
    pop rdi
    ret

; void flush_local(state): everything that is not global (a CR3 write).
flush_local:
    push rdi
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
    ret

; void invalidate_page(state, linear): INVLPG.
invalidate_page:
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
    mov r11d, 0
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
    ; the fetch TLB: any piece within 1 GiB goes, and with a large one all jumps
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
    test byte [rdi+8], 2
    jz invalidate_exec_keep
    mov r11d, 1
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

; void purge_writes(state, host page): code was translated from the page, so writes to it must miss.
purge_writes:
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
    cmp r8d, 128
    jne flush_{name.lower()}_chunk
    ret
"""




@cache
def helpers(xsave_mask: int) -> Program:
    """Assemble all helpers; `xsave_mask` is the guest-visible XCR0 on this host, or 0 without XSAVE."""
    source = "\n".join(
        (
            _CONSTANTS, _ENTER_LEAVE, _LOOKUP, _WALK, _FILL_TLB, _MISS, _DELIVER, _C_FUNCTIONS,
            _flush_jumps("KERNEL", 0), _flush_jumps("USER", 1), _flush_jumps("OTHER", 2),
        )
    )  # fmt: skip
    source = source.replace("RESTORE_FPU", "xrstor" if xsave_mask else "fxrstor")
    source = source.replace("SAVE_FPU", "xsave" if xsave_mask else "fxsave")
    source = source.replace("CLEAN_UPPER", "vzeroupper" if xsave_mask & 4 else "")
    return assemble(source, bits=64, symbols={**SYMBOLS, "XSAVE_MASK": xsave_mask or 3})


POINTERS = {
    "LEAVE": "leave_native",
    "LOOKUP": "lookup",
    "CHAIN": "chain",
    "CALL_OUT": "call_out",
    "ESCAPE": "escape",
    "MISS": "miss",
    "DISPATCH": "dispatch",
}
"""Fields of the state block that hold the address of a helper."""
assert all(name in OFFSETS for name in POINTERS)
