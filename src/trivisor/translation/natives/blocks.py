"""Blocks: finding them, making them of templates, linking and forgetting them (see block_tables.py).

`call find`, `call connect` and `call forget_in_page` serve the other helpers; what Python calls stands at the end.
"""

from __future__ import annotations

from trivisor.translation.natives.adopt import ADOPT, ENTER_BLOCK
from trivisor.translation.natives.common import fill, spill

CHAIN = f"""
; call [CHAIN]; dd link: a direct jump that leads to no block yet.
chain:
    pushfq
    pop qword [rsp+8+FLAGS]
    {spill(8)}
    pop rbx
    mov rbp, rsp
    mov r8d, [rbx]
    mov [rbp+EXIT_A], r8
    imul rbx, r8, LINK_SIZE
    add rbx, [rbp+LINKS]
    mov rax, [rbx+L_TARGET]
    mov [rbp+GUEST_RIP], rax
    mov edx, [rbx+L_SOURCE]
    shl rdx, 6
    add rdx, [rbp+BLOCKS]
    test byte [rdx+B_FLAGS], DEAD
    jnz chain_dead
    mov rcx, [rdx+B_KEY]
    test ecx, SEGMENTED_KEYS
    jnz chain_find
    and rcx, ~PLAIN
    test dword [rbx+L_ENTRY], LINK_TO_PLAIN
    jz chain_find
    or rcx, PLAIN
chain_find:
    push rbx
    call find
    pop rbx
    test eax, eax
    jz chain_leave
    cmp dword [rbx+L_TO], 0
    jne chain_go
    mov r8d, [rbp+EXIT_A]
    call connect
chain_go:
    shl rax, 6
    add rax, [rbp+BLOCKS]
    mov ecx, [rax+B_START]
    movzx edx, byte [rax+B_POLLED]
    add ecx, edx
    add rcx, [rbp+CODE_BASE]
    mov [rbp+SCRATCH_3], rcx
    push qword [rbp+FLAGS]
    popfq
    {fill()}
    jmp qword [rsp+SCRATCH_3]
chain_leave:
    mov qword [rbp+EXIT], EXIT_CHAIN
    jmp leave_spilled
chain_dead:
    ; the block was forgotten while it ran
    and qword [rbp+FLAGS], HOST_FLAGS
    jmp dispatch
"""

FIND = """
; find: rax = rip, rcx = physical page | mode -> eax = the block's number, 0 for none; it is in the block table then.
; Templates count.  Keeps rbp alone.
find:
    mov r12, rax
    mov r13, rcx
    mov rdx, rax
    shr rdx, 16
    xor edx, eax
    and edx, BLOCK_TABLE_ENTRIES-1
    mov esi, edx
    shl esi, 5
    lea rsi, [rbp+rsi+BLOCK_TABLE]
    cmp [rsi], rax
    jne find_in_page
    cmp [rsi+8], rcx
    jne find_in_page
    mov eax, [rbp+rdx*4+BLOCK_NUMBERS]
    ret
find_in_page:
    mov rdi, rcx
    and rdi, -4096
    call is_ram
    jc find_none
    ; every block was in the table once, so where nothing ever was there is none
    cmp qword [rsi+16], 0
    je adopt
    ; nor where the line has no code
    shr rdi, 12
    mov rdx, [rbp+CODE_LINES]
    mov rdx, [rdx+rdi*8]
    mov ecx, r12d
    shr ecx, 6
    bt rdx, rcx
    jnc adopt
    mov rdx, [rbp+PAGE_BLOCKS]
    mov eax, [rdx+rdi*4]
find_next:
    test eax, eax
    jz adopt
    mov r9d, eax
    mov rsi, rax
    shl rsi, 6
    add rsi, [rbp+BLOCKS]
    mov eax, [rsi+B_NEXT]
    cmp [rsi+B_RIP], r12
    jne find_next
    cmp [rsi+B_KEY], r13
    jne find_next
    test byte [rsi+B_FLAGS], DEAD+ALIAS
    jnz find_next
; into the block table: rsi = the block, r9d = its number, which is returned
enter_in_table:
    mov rax, [rsi+B_RIP]
    mov rdx, rax
    shr rdx, 16
    xor edx, eax
    and edx, BLOCK_TABLE_ENTRIES-1
    mov [rbp+rdx*4+BLOCK_NUMBERS], r9d
    shl edx, 5
    lea rdi, [rbp+rdx+BLOCK_TABLE]
    mov [rdi], rax
    mov rax, [rsi+B_KEY]
    mov [rdi+8], rax
    mov eax, [rsi+B_START]
    add rax, [rbp+CODE_BASE]
    mov [rdi+16], rax
    mov rax, [rsi+B_SECOND]
    mov [rdi+BLOCK_SECOND], rax
    mov eax, r9d
    ret
find_none:
    xor eax, eax
    ret

; is_ram: carry unless physical page rdi is RAM; changes rax alone.
is_ram:
    cmp rdi, [rbp+RAM_LOW_END]
    jb is_ram_yes
    mov rax, 0x100000000
    cmp rdi, rax
    jb is_ram_no
    cmp rdi, [rbp+RAM_HIGH_END]
    jae is_ram_no
is_ram_yes:
    clc
    ret
is_ram_no:
    stc
    ret
"""

CONNECT = """
; connect: rbx = link, r8d = its number, eax = the block that it is to lead to, which is returned.
connect:
    mov rcx, rax
    shl rcx, 6
    add rcx, [rbp+BLOCKS]
    movzx edx, byte [rbx+L_ENTRY]
    movzx edx, byte [rcx+rdx]
    add edx, [rcx+B_START]
    mov esi, [rbx+L_SITE]
    sub edx, esi
    sub edx, 4
    mov rdi, [rbp+CODE_WRITABLE]
    mov [rdi+rsi], edx
    mov [rbx+L_TO], eax
    mov edx, [rcx+B_IN]
    mov [rbx+L_NEXT], edx
    mov dword [rbx+L_PREVIOUS], 0
    mov [rcx+B_IN], r8d
    inc qword [rbp+COUNT_LINKED]
    test edx, edx
    jz connected
    imul rdx, rdx, LINK_SIZE
    add rdx, [rbp+LINKS]
    mov [rdx+L_PREVIOUS], r8d
connected:
    ret
"""

FORGET = """
; forget: rbx = a block that must not be entered any more.  All links to it and from it lead to their stubs again.
; Keeps rbx, rdi, r10, r12 to r15.
forget:
    test byte [rbx+B_FLAGS], DEAD
    jnz forgotten
    or byte [rbx+B_FLAGS], DEAD
    inc qword [rbp+COUNT_FORGOTTEN]
    mov r11, [rbp+CODE_WRITABLE]
    mov eax, [rbx+B_IN]
forget_in:
    test eax, eax
    jz forget_out
    imul rax, rax, LINK_SIZE
    add rax, [rbp+LINKS]
    mov ecx, [rax+L_SITE]
    mov edx, [rax+L_STUB]
    sub edx, ecx
    sub edx, 4
    mov [r11+rcx], edx
    mov dword [rax+L_TO], 0
    mov eax, [rax+L_NEXT]
    jmp forget_in
forget_out:
    mov dword [rbx+B_IN], 0
    movzx r8d, byte [rbx+B_LINKS]
    mov r9d, [rbx+B_OUT]
    imul r9, r9, LINK_SIZE
    add r9, [rbp+LINKS]
forget_link:
    dec r8d
    js forget_places
    mov eax, [r9+L_TO]
    test eax, eax
    jz forget_link_done
    mov ecx, [r9+L_NEXT]
    mov edx, [r9+L_PREVIOUS]
    test ecx, ecx
    jz forget_last
    imul rsi, rcx, LINK_SIZE
    add rsi, [rbp+LINKS]
    mov [rsi+L_PREVIOUS], edx
forget_last:
    test edx, edx
    jz forget_first
    imul rsi, rdx, LINK_SIZE
    add rsi, [rbp+LINKS]
    mov [rsi+L_NEXT], ecx
    jmp forget_linked
forget_first:
    shl rax, 6
    add rax, [rbp+BLOCKS]
    mov [rax+B_IN], ecx
forget_linked:
    mov dword [r9+L_TO], 0
    mov ecx, [r9+L_SITE]
    mov edx, [r9+L_STUB]
    sub edx, ecx
    sub edx, 4
    mov [r11+rcx], edx
forget_link_done:
    add r9, LINK_SIZE
    jmp forget_link
forget_places:
    mov rax, [rbx+B_RIP]
    mov rdx, rax
    shr rdx, 16
    xor edx, eax
    and edx, BLOCK_TABLE_ENTRIES-1
    shl edx, 5
    lea rsi, [rbp+rdx+BLOCK_TABLE]
    cmp [rsi], rax
    jne forget_jumps
    mov rcx, [rbx+B_KEY]
    cmp [rsi+8], rcx
    jne forget_jumps
    mov qword [rsi+8], 0xfff
forget_jumps:
    movzx eax, ax
    mov ecx, [rbx+B_START]
    add rcx, [rbp+CODE_BASE]
    mov rdx, [rbp+LOOKUP]
    lea rsi, [rbp+rax*8]
    cmp [rsi+JUMP_CACHE_KERNEL], rcx
    jne forget_user
    mov [rsi+JUMP_CACHE_KERNEL], rdx
forget_user:
    cmp [rsi+JUMP_CACHE_USER], rcx
    jne forget_other
    mov [rsi+JUMP_CACHE_USER], rdx
forget_other:
    cmp [rsi+JUMP_CACHE_OTHER], rcx
    jne forgotten
    mov [rsi+JUMP_CACHE_OTHER], rdx
forgotten:
    ret

; forget_in_page: forget the blocks that hold any of bytes [r13d, r14d) of physical page number r12, a page of RAM.
; Keeps rbp, r12, r13, r14.
forget_in_page:
    mov rax, [rbp+PAGE_BLOCKS]
    lea r15, [rax+r12*4]
    xor edi, edi            ; the lines that still hold code
forget_next:
    mov eax, [r15]
    test eax, eax
    jz forget_page_done
    mov rbx, rax
    shl rbx, 6
    add rbx, [rbp+BLOCKS]
    mov r10, rbx            ; the block, or the alias that stands for it
    mov al, [rbx+B_FLAGS]
    test al, ALIAS
    jz forget_master
    mov ebx, [rbx+B_MASTER]
    shl rbx, 6
    add rbx, [rbp+BLOCKS]
    mov al, [rbx+B_FLAGS]
forget_master:
    test al, DEAD
    jnz forget_unlist
    mov ecx, [r10+B_RIP]
    and ecx, 0xfff
    movzx edx, word [r10+B_LENGTH]
    add edx, ecx
    cmp ecx, r14d
    jae forget_keep
    cmp edx, r13d
    jbe forget_keep
    call forget
forget_unlist:
    mov eax, [r10+B_NEXT]
    mov [r15], eax
    jmp forget_next
forget_keep:
    dec edx
    shr edx, 6
    shr ecx, 6
    mov rax, -1
    shl rax, cl
    mov ecx, 63
    sub ecx, edx
    mov rdx, -1
    shr rdx, cl
    and rax, rdx
    or rdi, rax
    lea r15, [r10+B_NEXT]
    jmp forget_next
forget_page_done:
    mov rax, [rbp+CODE_LINES]
    mov [rax+r12*8], rdi
    ret
"""

_ENTER = """
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rbp, rdi
"""
_LEAVE = """
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"""

FOR_PYTHON = f"""
; uint32 find_block(state, rip, key)
find_block:
    {_ENTER}
    mov rax, rsi
    mov rcx, rdx
    call find
    {_LEAVE}

; uint32 take_up(state, template, rip, key, start, second): the block of a template whose code stands at start.
take_up:
    {_ENTER}
    mov rbx, rsi
    shl rbx, 6
    add rbx, [rbp+TEMPLATES]
    mov r12, rdx
    mov r13, rcx
    mov r14, r8
    mov r15, r9
    call enter_block
    {_LEAVE}

; void connect_link(state, link, block)
connect_link:
    {_ENTER}
    mov r8, rsi
    imul rbx, rsi, LINK_SIZE
    add rbx, [rbp+LINKS]
    mov rax, rdx
    call connect
    {_LEAVE}

; void forget_block(state, block)
forget_block:
    {_ENTER}
    mov rbx, rsi
    shl rbx, 6
    add rbx, [rbp+BLOCKS]
    call forget
    {_LEAVE}

; void forget_bytes(state, page number, first, end): see forget_in_page.
forget_bytes:
    {_ENTER}
    mov r12, rsi
    mov r13, rdx
    mov r14, rcx
    call forget_in_page
    {_LEAVE}
"""

BLOCKS = CHAIN + FIND + ADOPT + ENTER_BLOCK + CONNECT + FORGET + FOR_PYTHON
