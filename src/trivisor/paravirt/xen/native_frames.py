"""The frame table and the validation of page tables, as native code: `frames.py` and `page_tables.py` have the same.

Registers throughout: rbp is the processor's state, rbx the shared table, and
r12 to r15 are columns of the frame table, as `xen_columns` loads them.
"""

from __future__ import annotations

from trivisor.paravirt.xen.abi import FIRST_XEN_SLOT, LAST_XEN_SLOT
from trivisor.paravirt.xen.frames import DOMAIN, L1, L4, NOBODY, NONE, WRITABLE
from trivisor.paravirt.xen.page_tables import ADDRESS, FORBIDDEN, FORBIDDEN_L1, PRESENT, USER, WRITE


def frame_of_entry(entry: str, frame: str) -> str:
    """The frame that a page-table entry leads to; both are registers."""
    return f"""
    mov {frame}, {ADDRESS:#x}
    and {frame}, {entry}
    shr {frame}, 12
    """


FRAMES = f"""
xen_columns:
    mov r12, [rbx+X_FRAME_OWNER]
    mov r13, [rbx+X_FRAME_KIND]
    mov r14, [rbx+X_FRAME_KIND_COUNT]
    mov r15, [rbx+X_FRAME_REFERENCES]
    ret

; References for what rax leads to, a present entry of a table of level edx.  CF set: it may not be one, and nothing
; has changed.  Keeps rax, rdx, rdi, rsi and r10; r9 and r11 too if it succeeds.
xen_get_entry:
    cmp edx, {L1}
    jne xen_get_entry_table
    mov r8, {FORBIDDEN_L1:#x}
    test rax, r8
    jnz xen_refused
    {frame_of_entry("rax", "rcx")}
    cmp rcx, [rbx+X_FRAME_COUNT]
    jae xen_refused
    cmp byte [r12+rcx], {DOMAIN}
    jne xen_refused
    test al, {WRITE}
    jz xen_get_reference
    cmp qword [r14+rcx*8], 0
    je xen_get_writable
    cmp byte [r13+rcx], {WRITABLE}
    jne xen_refused
xen_get_writable:
    mov byte [r13+rcx], {WRITABLE}
    inc qword [r14+rcx*8]
xen_get_reference:
    inc qword [r15+rcx*8]
    clc
    ret
xen_get_entry_table:
    mov r8, {FORBIDDEN:#x}
    test rax, r8
    jnz xen_refused
    push rax
    push rdx
    {frame_of_entry("rax", "rcx")}
    dec edx
    call xen_get_table
    pop rdx
    pop rax
    ret
xen_refused:
    stc
    ret

; A reference to frame rcx as a page table of level edx, whose entries are looked at if it was none.  CF and registers
; as for `xen_get_entry`, but rax and rdx are lost; rcx is kept.
xen_get_table:
    cmp rcx, [rbx+X_FRAME_COUNT]
    jae xen_refused
    cmp byte [r12+rcx], {DOMAIN}
    jne xen_refused
    cmp qword [r14+rcx*8], 0
    je xen_validate
    cmp [r13+rcx], dl
    jne xen_refused
    inc qword [r14+rcx*8]
    inc qword [r15+rcx*8]
    clc
    ret
xen_validate:
    inc qword [rbx+X_TABLES]
    ; to forget translated code is Python's
    mov rax, [rbp+CODE_LINES]
    cmp qword [rax+rcx*8], 0
    jne xen_refused
    mov rax, [rbx+X_FRAME_WRITABLE_UNTIL]
    mov rax, [rax+rcx*8]
    cmp rax, [rbx+X_EPOCH]
    jne xen_validate_unseen
    call xen_flush_saving
xen_validate_unseen:
    ; it counts as what it becomes while its entries are looked at, so that they cannot make it writable
    mov [r13+rcx], dl
    mov qword [r14+rcx*8], 1
    inc qword [r15+rcx*8]
    push rcx
    push rsi
    mov rsi, rcx
    shl rsi, 12
    add rsi, [rbp+RAM_BASE]
xen_validate_entry:
    mov rax, [rsi]
    test al, {PRESENT}
    jz xen_validate_next
    call xen_get_entry
    jc xen_validate_undo
    or byte [rsi], {USER}
xen_validate_next:
    add rsi, 8
    mov eax, esi
    and eax, 0xfff
    jz xen_validated
    cmp eax, {8 * FIRST_XEN_SLOT}
    jne xen_validate_entry
    cmp edx, {L4}
    jne xen_validate_entry
    ; Xen's own entries, from the table that is in use
    mov r8, [rbx+X_KERNEL_ROOT]
    shl r8, 12
    add r8, [rbp+RAM_BASE]
    add r8, rax
    mov ecx, {LAST_XEN_SLOT - FIRST_XEN_SLOT + 1}
xen_validate_own:
    mov rax, [r8]
    mov [rsi], rax
    add r8, 8
    add rsi, 8
    dec ecx
    jnz xen_validate_own
    jmp xen_validate_entry
xen_validated:
    pop rsi
    pop rcx
    call supervised_table
    clc
    ret
xen_validate_undo:
    mov r8, rsi
    and rsi, -4096
    call xen_put_entries
    pop rsi
    pop rcx
    mov byte [r13+rcx], {NONE}
    mov qword [r14+rcx*8], 0
    dec qword [r15+rcx*8]
    stc
    ret

; Give back the references of a table's entries, of level edx, from host address rsi to r8; keeps rdx, rdi, r10.
xen_put_entries:
    cmp rsi, r8
    je xen_put_done
    mov rax, [rsi]
    add rsi, 8
    test al, {PRESENT}
    jz xen_put_entries
    cmp edx, {L4}
    jne xen_put_next
    lea ecx, [rsi-8]
    and ecx, 0xfff
    sub ecx, {8 * FIRST_XEN_SLOT}
    cmp ecx, {8 * (LAST_XEN_SLOT - FIRST_XEN_SLOT)}
    jbe xen_put_entries
xen_put_next:
    call xen_put_entry
    jmp xen_put_entries
xen_put_done:
    ret

; Give back those of entry rax, of level edx; keeps rdx, rdi, rsi, r8, r10.
xen_put_entry:
    {frame_of_entry("rax", "rcx")}
    cmp edx, {L1}
    je xen_put_page
    push rdx
    call xen_put_table
    pop rdx
    ret

; Those of entry rax of level 1, which leads to frame rcx; TLBs may still have it.
xen_put_page:
    test al, {WRITE}
    jz xen_put_reference
    mov r9, [rbx+X_FRAME_WRITABLE_UNTIL]
    mov r11, [rbx+X_EPOCH]
    mov [r9+rcx*8], r11
xen_put_writable:
    dec qword [r14+rcx*8]
    jnz xen_put_reference
    mov byte [r13+rcx], {NONE}
xen_put_reference:
    dec qword [r15+rcx*8]
    jz xen_free
    ret

; Without any reference frame rcx is free.
xen_free:
    mov byte [r12+rcx], {NOBODY}
    dec qword [rbx+X_OWNED]
    mov r9, [rbx+X_FREE_COUNT]
    inc qword [rbx+X_FREE_COUNT]
    mov r11, [rbx+X_FRAME_FREE]
    mov [r11+r9*8], rcx
    ret

; Give back a reference to frame rcx as what it is; keeps rdi, rsi, r8, r10.
xen_put_table:
    dec qword [r14+rcx*8]
    jnz xen_put_reference
    inc qword [rbx+X_TABLES]
    movzx edx, byte [r13+rcx]
    mov byte [r13+rcx], {NONE}
    cmp edx, {L4} ; descriptors lead nowhere
    ja xen_put_reference
    push rcx
    push rsi
    push r8
    mov rsi, rcx
    shl rsi, 12
    add rsi, [rbp+RAM_BASE]
    lea r8, [rsi+4096]
    call xen_put_entries
    pop r8
    pop rsi
    pop rcx
    jmp xen_put_reference

; As `xen_forget`, keeping every register but rax and r8.
xen_flush_saving:
    push rcx
    push rdx
    push rsi
    push rdi
    push r9
    push r10
    push r11
    call xen_forget
    pop r11
    pop r10
    pop r9
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    ret

; Nothing may be used any more that page tables do not have (`Domain.flush`); keeps rbx, rbp and r12 to r15.
xen_forget:
    inc qword [rbx+X_EPOCH]
    cmp qword [rbx+X_STALE], FORGETS_AT_ONCE ; if it does not, always
    jae xen_forget_all
    ret
xen_forget_all:
    mov qword [rbx+X_STALE], 0
    jmp supervised_flush

; The same for linear rsi alone.
xen_forget_page:
    cmp qword [rbx+X_STALE], FORGETS_AT_ONCE
    jb xen_knows_no_page
    mov rdi, rbp
    jmp invalidate_page
xen_knows_no_page:
    ret

; Write r9 to the entry at host address rdi, of a validated page table of level edx (`PageTables.change`).  CF set: it
; may not be done here, and nothing has changed.
xen_change:
    mov r10, [rdi]
    cmp edx, {L4}
    jne xen_change_entry
    mov eax, edi
    and eax, 0xfff
    sub eax, {8 * FIRST_XEN_SLOT}
    cmp eax, {8 * (LAST_XEN_SLOT - FIRST_XEN_SLOT)}
    jbe xen_refused
xen_change_entry:
    xor r11d, r11d ; 1: it leads where it did
    test r9b, {PRESENT}
    jz xen_change_write
    or r9, {USER}
    mov rcx, {ADDRESS | PRESENT:#x}
    mov r8, {FORBIDDEN:#x}
    cmp edx, {L1}
    jne xen_change_compare
    or rcx, {WRITE}
    and r8, {~(FORBIDDEN & ~FORBIDDEN_L1)}
xen_change_compare:
    test r9, r8
    jnz xen_refused
    mov rax, r9
    xor rax, r10
    test rax, rcx
    setz r11b
    jz xen_change_write
    mov rax, r9
    call xen_get_entry
    jc xen_refused
xen_change_write:
    mov [rdi], r9
    test r10b, {PRESENT}
    jz xen_changed
    cmp edx, {L1}
    jne xen_change_upper
    call supervised_changed
    test eax, eax
    jz xen_change_known
    mov qword [rbx+X_STALE], 1
    mov rax, r10
    test r11d, r11d
    jnz xen_changed
    {frame_of_entry("r10", "rcx")}
    call xen_put_page
    clc
    ret
xen_change_known:
    ; no TLB has it any more
    test r11d, r11d
    jnz xen_changed
    {frame_of_entry("r10", "rcx")}
    test r10b, {WRITE}
    jz xen_change_read_only
    call xen_put_writable
    clc
    ret
xen_change_read_only:
    call xen_put_reference
    clc
    ret
xen_change_upper:
    call supervised_changed_upper
    or [rbx+X_STALE], rax
    test r11d, r11d
    jnz xen_changed
    {frame_of_entry("r10", "rcx")}
    call xen_put_table
xen_changed:
    clc
    ret
"""
