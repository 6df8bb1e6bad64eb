"""Hypercalls that change page tables, as native code: `hypercalls/mmu.py` has the same for every case.

A list of operations is done one after the other.  Before one that is Python's,
those that are done are taken off the hypercall's arguments.
"""

from __future__ import annotations

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.frames import DOMAIN, L1, L4, WRITABLE
from trivisor.paravirt.xen.native_frames import frame_of_entry
from trivisor.paravirt.xen.page_tables import ACCESSED, DIRTY, LARGE, LINGERING, PRESENT, TABLES_AT_A_TIME

_AT_A_TIME = 512
_UPDATE_SIZE, _OPERATION_SIZE = 16, 24


def _operation(size: int) -> str:
    """rdi = host address of the first struct, of `size` bytes, that the hypercall's arguments have left."""
    return f"""
    mov r13, [rbp+GPR_RDI]
    imul rax, [rbx+X_MADE], {size}
    add r13, rax
    mov eax, r13d
    and eax, 0xfff
    cmp eax, {4096 - size}
    ja xen_rest_{size}
    xor r12d, r12d
    call guest_page
    jnz xen_rest_{size}
    """


def _next(size: int, label: str) -> str:
    """Go on with the next operation; what is left is Python's if it is to give way (`PageTables.gives_way`)."""
    return f"""
    mov rax, [rbx+X_MADE]
    inc eax
    mov [rbx+X_MADE], rax
    sub eax, [rbp+GPR_RSI]
    jz xen_done
    cmp qword [rbx+X_TABLES], {TABLES_AT_A_TIME}
    jb {label}
    jmp xen_rest_{size}
    """


def _rest(size: int) -> str:
    """Python is to do what is left."""
    return f"""
xen_rest_{size}:
    mov rcx, [rbx+X_MADE]
    sub [rbp+GPR_RSI], rcx
    imul rcx, rcx, {size}
    add [rbp+GPR_RDI], rcx
    jmp xen_python
    """


_LIST = f"""
    mov qword [rbx+X_MADE], 0
    cmp qword [rbp+GPR_RDX], 0
    jne xen_python
    mov eax, [rbp+GPR_RSI]
    and eax, {~abi.MMU_UPDATE_PREEMPTED & 0xFFFFFFFF:#x} ; which is about how many were done
    mov [rbp+GPR_RSI], rax
    dec eax
    cmp eax, {_AT_A_TIME - 1}
    ja xen_python
    cmp qword [rbp+GPR_R10], {abi.DOMID_SELF}
    jne xen_python
"""
"""Of how many operations a hypercall is, for whom, and that it need not tell how many were done."""


def _next_table(shift: int) -> str:
    return f"""
    shl rcx, 12
    add rcx, [rbp+RAM_BASE]
    mov rax, rsi
    shr rax, {shift}
    and eax, 511
    mov rax, [rcx+rax*8]
    test al, {PRESENT}
    jz xen_refused
    test al, {LARGE}
    jnz xen_refused
    {frame_of_entry("rax", "rcx")}
    cmp rcx, [rbx+X_FRAME_COUNT]
    jae xen_refused
    """


PAGE_TABLES = f"""
; The entry of level 1 for linear rsi in the kernel's space: rdi = its host address, rcx = the table's frame.  CF set:
; there is no table.  Loses rax.
xen_find_entry:
    mov rcx, [rbx+X_KERNEL_ROOT]
    {"".join(_next_table(shift) for shift in (39, 30, 21))}
    mov rax, rsi
    shr rax, 12
    and eax, 511
    mov rdi, rcx
    shl rdi, 12
    add rdi, [rbp+RAM_BASE]
    lea rdi, [rdi+rax*8]
    clc
    ret

xen_mmu_update:
    {_LIST}
xen_mmu_update_next:
    {_operation(_UPDATE_SIZE)}
    mov r8, [rdi]
    mov r9, [rdi+8]
    call xen_columns
    call xen_update
    jc xen_rest_{_UPDATE_SIZE}
    {_next(_UPDATE_SIZE, "xen_mmu_update_next")}
{_rest(_UPDATE_SIZE)}

; One update: r8 = the entry's physical address and command, r9 = what is written.  CF as for `xen_change`.
xen_update:
    test r8b, 5 ; a command other than a page table's, or no entry's address
    jnz xen_refused
    mov rcx, r8
    shr rcx, 12
    cmp rcx, [rbx+X_FRAME_COUNT]
    jae xen_refused
    cmp byte [r12+rcx], {DOMAIN}
    jne xen_refused
    mov rdi, r8
    and rdi, -8
    add rdi, [rbp+RAM_BASE]
    test r8b, {abi.MMU_PT_UPDATE_PRESERVE_AD}
    jz xen_update_as_is
    mov eax, [rdi]
    and eax, {ACCESSED | DIRTY}
    or r9, rax
xen_update_as_is:
    cmp qword [r14+rcx*8], 0
    je xen_update_memory
    movzx edx, byte [r13+rcx]
    lea eax, [rdx-1]
    cmp eax, {L4 - 1}
    jbe xen_change
    cmp edx, {WRITABLE}
    jne xen_refused
xen_update_memory:
    ; no page table, or not yet
    mov rax, [rbp+CODE_LINES]
    cmp qword [rax+rcx*8], 0
    jne xen_refused
    mov [rdi], r9
    clc
    ret

xen_update_va_mapping:
    mov rsi, [rbp+GPR_RDI]
    call xen_find_entry
    jc xen_python
    call xen_columns
    cmp qword [r14+rcx*8], 0
    je xen_python
    cmp byte [r13+rcx], {L1}
    jne xen_python
    mov edx, {L1}
    mov r9, [rbp+GPR_RSI]
    call xen_change
    jc xen_python
    mov eax, [rbp+GPR_RDX]
    and eax, {abi.UVMF_FLUSHTYPE_MASK}
    cmp eax, {abi.UVMF_INVLPG}
    jb xen_update_va_flush
    ja xen_updated_va
    mov rsi, [rbp+GPR_RDI]
    call xen_forget_page
    jmp xen_updated_va
xen_update_va_flush:
    test eax, eax
    jz xen_updated_va
    call xen_forget
xen_updated_va:
    xor eax, eax
    jmp xen_done

; mmuext_op of pins, which may be followed by others.
xen_pins:
    {_LIST}
xen_pins_next:
    {_operation(_OPERATION_SIZE)}
    mov edx, [rdi]
    mov rcx, [rdi+8]
    cmp edx, {abi.MMUEXT_UNPIN_TABLE}
    ja xen_pins_others
    push rcx
    call xen_drop_lingering
    pop rcx
    cmp rcx, [rbx+X_FRAME_COUNT]
    jae xen_rest_{_OPERATION_SIZE}
    mov rsi, [rbx+X_FRAME_PINNED]
    add rsi, rcx
    cmp edx, {abi.MMUEXT_UNPIN_TABLE}
    je xen_unpin
    cmp byte [rsi], 0
    jne xen_rest_{_OPERATION_SIZE}
    inc edx ; the level
    call xen_get_table
    jc xen_rest_{_OPERATION_SIZE}
    mov byte [rsi], 1
    jmp xen_pinned
xen_unpin:
    cmp byte [rsi], 0
    je xen_rest_{_OPERATION_SIZE}
    mov byte [rsi], 0
    call xen_put_table
xen_pinned:
    {_next(_OPERATION_SIZE, "xen_pins_next")}
xen_pins_others:
    mov rcx, [rbx+X_MADE]
    test rcx, rcx
    jz xen_python
    sub [rbp+GPR_RSI], rcx
    imul rcx, rcx, {_OPERATION_SIZE}
    add [rbp+GPR_RDI], rcx
    jmp xen_mmuext_op
{_rest(_OPERATION_SIZE)}

; Give up tables that are only kept validated (`PageTables.drop_lingering`); loads columns, keeps rdx.
xen_drop_lingering:
    push rdx
    call xen_columns
    {"".join(f'''
    mov rcx, [rbx+{8 * place}]
    test rcx, rcx
    jz xen_lingers_not_{place}
    mov qword [rbx+{8 * place}], 0
    call xen_put_table
xen_lingers_not_{place}:''' for place in LINGERING)}
    pop rdx
    ret
"""
