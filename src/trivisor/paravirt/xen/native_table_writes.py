"""Writes to page tables by ordinary instructions, as native code: `page_table_writes.py` does those of every form.

Here are Linux's: of whole entries MOV, XCHG, CMPXCHG and BTR of a bit by number, and of a byte AND and OR with a
constant, where the entry's address is a register and a displacement.
"""

from __future__ import annotations

from trivisor.paravirt.xen.frames import DOMAIN, L1
from trivisor.paravirt.xen.native_frames import frame_of_entry
from trivisor.paravirt.xen.page_tables import PRESENT
from trivisor.x86.flags import STATUS, TF

_LONGEST = 16
_LOCK, _DS, _TWO_BYTES = 0xF0, 0x3E, 0x0F
"""Prefixes: with one processor Linux makes DS of LOCK."""
_REX, _REX_MASK, _REX_W, _REX_R, _REX_X, _REX_B = 0x40, 0xF0, 8, 4, 2, 1
_MOV, _XCHG, _LOGIC_BYTE, _CMPXCHG, _BIT = 0x89, 0x87, 0x80, 0x1B1, 0x1BA
"""Opcodes; those after 0F have bit 8 set."""
_OR, _AND, _BTR = 1, 4, 6
"""What the register field of the last two says."""
_BASE_ALONE = 0x24
"""The SIB byte of no index and base rsp or r12."""
_AF = 0x10

TABLE_WRITES = f"""
; The guest's kernel wrote to what it may not write to: maybe an entry of level 1.
xen_table_write:
    mov rsi, [rbp+GUEST_CR2]
    call xen_find_entry
    jc xen_kernel_page_fault
    mov rax, [rdi]
    test al, {PRESENT}
    jz xen_kernel_page_fault
    {frame_of_entry("rax", "rcx")}
    call xen_columns
    cmp rcx, [rbx+X_FRAME_COUNT]
    jae xen_kernel_page_fault
    cmp byte [r12+rcx], {DOMAIN}
    jne xen_kernel_page_fault
    cmp byte [r13+rcx], {L1}
    jne xen_kernel_page_fault
    test dword [rbp+SYSTEM_FLAGS], {TF}
    jnz xen_python
    mov r15, [rbp+GUEST_CR2]
    and r15d, 0xff8
    shl rcx, 12
    add r15, rcx
    add r15, [rbp+RAM_BASE] ; the entry
    mov r13, [rbp+GUEST_RIP]
    mov eax, r13d
    and eax, 0xfff
    cmp eax, {4096 - _LONGEST}
    ja xen_python
    xor r12d, r12d
    call guest_page
    jnz xen_python
    mov rsi, rdi
    movzx eax, byte [rsi]
    inc rsi
    cmp al, {_LOCK}
    je xen_write_prefix
    cmp al, {_DS}
    jne xen_write_rex
xen_write_prefix:
    movzx eax, byte [rsi]
    inc rsi
xen_write_rex:
    xor r8d, r8d
    mov ecx, eax
    and ecx, {_REX_MASK}
    cmp ecx, {_REX}
    jne xen_write_opcode
    mov r8d, eax
    movzx eax, byte [rsi]
    inc rsi
xen_write_opcode:
    cmp al, {_TWO_BYTES}
    jne xen_write_operand
    movzx eax, byte [rsi]
    inc rsi
    or eax, 0x100
xen_write_operand:
    mov r14d, eax
    movzx edx, byte [rsi] ; ModRM
    inc rsi
    mov ecx, edx
    and ecx, 7
    cmp ecx, 4
    jne xen_write_base
    cmp byte [rsi], {_BASE_ALONE}
    jne xen_python
    inc rsi
    test r8b, {_REX_X}
    jnz xen_python
xen_write_base:
    test r8b, {_REX_B}
    jz xen_write_displacement
    or ecx, 8
xen_write_displacement:
    mov r10, [rbp+rcx*8+GPR_RAX]
    xor ecx, ecx
    mov eax, edx
    and eax, 0xc7
    cmp eax, 5 ; relative to rip
    je xen_python
    shr eax, 6
    jz xen_write_address
    cmp eax, 2
    ja xen_python
    je xen_write_displacement32
    movsx rcx, byte [rsi]
    inc rsi
    jmp xen_write_address
xen_write_displacement32:
    movsxd rcx, dword [rsi]
    add rsi, 4
xen_write_address:
    add r10, rcx
    cmp r10, [rbp+GUEST_CR2]
    jne xen_python
    shr edx, 3
    and edx, 7
    ; r14 = opcode, edx = register field, rsi = after the operand; to be found: r9 = the entry as it will be,
    ; r12 = where the old one goes or 0, r11 = flags
    mov r9, [r15]
    xor r12d, r12d
    mov r11, [rbp+FLAGS]
    mov rcx, [rbp+GUEST_CR2]
    and ecx, 7
    cmp r14d, {_LOGIC_BYTE}
    je xen_write_logic
    test ecx, ecx
    jnz xen_python
    test r8b, {_REX_W}
    jz xen_python
    cmp r14d, {_BIT}
    je xen_write_bit
    test r8b, {_REX_R}
    jz xen_write_register
    or edx, 8
xen_write_register:
    lea rdx, [rbp+rdx*8+GPR_RAX]
    cmp r14d, {_XCHG}
    je xen_write_exchange
    cmp r14d, {_MOV}
    je xen_write_move
    cmp r14d, {_CMPXCHG}
    jne xen_python
    cmp [rbp+GPR_RAX], r9
    pushfq
    pop rax
    and r11, {~STATUS}
    and eax, {STATUS}
    or r11, rax
    cmp [rbp+GPR_RAX], r9
    je xen_write_move
    lea r12, [rbp+GPR_RAX]
    jmp xen_write_do
xen_write_exchange:
    mov r12, rdx
xen_write_move:
    mov r9, [rdx]
    jmp xen_write_do
xen_write_bit:
    cmp edx, {_BTR}
    jne xen_python
    movzx eax, byte [rsi]
    inc rsi
    and r11, -2
    btr r9, rax
    adc r11, 0 ; CF is the bit
    jmp xen_write_do
xen_write_logic:
    movzx eax, byte [rsi]
    inc rsi
    shl ecx, 3
    ror r9, cl
    cmp edx, {_AND}
    je xen_write_and
    cmp edx, {_OR}
    jne xen_python
    or r9b, al
    jmp xen_write_logic_flags
xen_write_and:
    and r9b, al
xen_write_logic_flags:
    pushfq
    pop rax
    rol r9, cl
    and r11, {~STATUS}
    and eax, {STATUS & ~_AF}
    or r11, rax
xen_write_do:
    sub rsi, rdi
    add rsi, [rbp+GUEST_RIP]
    push rsi
    push r11
    push qword [r15]
    push r12
    mov rdi, r15
    call xen_columns
    mov edx, {L1}
    call xen_change
    jc xen_python
    pop rcx
    pop rax
    test rcx, rcx
    jz xen_written
    mov [rcx], rax
xen_written:
    pop qword [rbp+FLAGS]
    pop qword [rbp+GUEST_RIP]
    inc qword [rbx+X_TABLE_WRITES]
    call xen_event
    jnz xen_upcall
    jmp supervised_resume
"""
