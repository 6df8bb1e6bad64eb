"""Blocks: finding them, making them of templates, linking and forgetting them (see block_tables.py).

`call find`, `call connect` and `call forget_in_page` serve the other helpers; what Python calls stands at the end.
"""

from __future__ import annotations

from trivisor.translation.block_tables import COMMON_START, TEMPLATE_HASH
from trivisor.translation.natives.common import fill, spill

TEMPLATE_BUCKET = f"""
    movzx eax, byte [r14]
    cmp r9d, 4096-8
    ja bucket_%
    mov eax, [r14]
    and eax, 0xffffff
    cmp eax, {COMMON_START}
    jne bucket_%
    mov eax, [r14+4]
    shr eax, 8
bucket_%:
    shl rax, 12
    or rax, r8
    shl rax, 12
    or rax, r9
    mov rdx, {TEMPLATE_HASH:#x}
    imul rax, rdx
    shr rax, 48
"""
"""rax = `block_tables.template_bucket` of the code at r14, r9 into its page, in mode r8; loses rdx.  %: for labels."""

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

ADOPT = f"""
; adopt: r12 = rip, r13 = physical page of RAM | mode: make the block of a template with the bytes that stand there.
; Returns as find does.  The code is copied, and what depends on its place is changed.
adopt:
    cmp qword [rbp+USER_ELSEWHERE], 0
    je adopt_any
    mov edi, r13d
    and edi, 7
    cmp edi, USER_64
    je find_none
adopt_any:
    mov rdi, r13
    and rdi, -4096
    mov r14, rdi
    add rdi, 0x1000
    call is_ram
    jc find_none            ; the last page: eight bytes are read at once
    mov r9d, r12d
    and r9d, 0xfff
    add r14, r9
    add r14, [rbp+RAM_BASE]
    mov r8d, r13d
    and r8d, 0xfff
    {TEMPLATE_BUCKET.replace("%", "adopt")}
    mov rdx, [rbp+TEMPLATE_HEADS]
    mov edx, [rdx+rax*4]
    cld
adopt_next:
    test edx, edx
    jz compose
    mov rbx, rdx
    shl rbx, 6
    add rbx, [rbp+TEMPLATES]
    mov edx, [rbx+T_NEXT]
    cmp [rbx+T_MODE], r8w
    jne adopt_next
    movzx r9d, word [rbx+T_LENGTH]
    mov rax, [r14]
    and rax, [rbx+T_MASK]
    cmp rax, [rbx+T_PREFIX]
    jne adopt_next
    cmp r9d, 8
    jbe adopt_same
    call image_address
    mov eax, [rbx+T_SIZE]
    add rdi, rax
    sub rdi, r9
    mov rsi, r14
    mov ecx, r9d
    cmp byte [rbx+T_MASKED], 0
    jne adopt_masked
    repe cmpsb
    jne adopt_next
    jmp adopt_same
adopt_masked:
    ; the mask stands before the guest bytes
    mov r10, rdi
    sub r10, r9
adopt_masked_next:
    mov al, [rsi]
    and al, [r10]
    cmp al, [rdi]
    jne adopt_next
    inc rsi
    inc rdi
    inc r10
    dec ecx
    jnz adopt_masked_next
adopt_same:
    mov r9, r12
    sub r9, [rbx+T_RIP]
    jz adopt_room
    test r8b, 2             ; 64-bit code alone is moved
    jz adopt_next
adopt_room:
    mov r10, [rbp+CODE_USED]
    add r10, 15
    and r10, -16
    mov ecx, [rbx+T_CODE]
    lea rax, [r10+rcx]
    cmp rax, [rbp+CODE_SIZE]
    ja find_none
    cmp qword [rbp+BLOCK_COUNT], MAXIMUM_BLOCKS-2
    jae find_none
    cmp qword [rbp+LINK_COUNT], MAXIMUM_LINKS-256
    jae find_none
    call image_address
    mov rsi, rdi
    mov rdi, [rbp+CODE_WRITABLE]
    add rdi, r10
    mov r11, rdi
    mov eax, ecx
    neg eax
    and eax, 3
    rep movsb
    add rsi, rax
    movzx ecx, word [rbx+T_RELOCATIONS]
    mov edi, r10d
    sub edi, [rbx+T_BASE]
    push rdx
    test ecx, ecx
    jz adopt_done
adopt_relocation:
    mov eax, [rsi]
    add rsi, 4
    mov edx, eax
    and edx, 0xffffff
    shr eax, 24
    cmp eax, RELOCATE_TO_HELPER
    je adopt_to_helper
    cmp eax, RELOCATE_CONSTANT_32
    jae adopt_constant
    test r9, r9
    jz adopt_relocated
    cmp eax, RELOCATE_ADDRESS_32
    je adopt_address_32
    ja adopt_jump_slot
    add [r11+rdx], r9
    jmp adopt_relocated
adopt_address_32:
    movsxd rax, dword [r11+rdx]
    add rax, r9
    movsxd r15, eax
    cmp r15, rax
    jne adopt_no_room_for_address
    mov [r11+rdx], eax
    jmp adopt_relocated
adopt_jump_slot:
    mov eax, JUMP_CACHE_KERNEL
    test r13b, 4
    jz adopt_slot_kernel
    mov eax, JUMP_CACHE_USER
adopt_slot_kernel:
    mov r15d, [r11+rdx]
    sub r15d, eax
    shr r15d, 3
    add r15d, r9d
    and r15d, 0xffff
    lea eax, [rax+r15*8]
    mov [r11+rdx], eax
    jmp adopt_relocated
adopt_constant:
    mov r15d, [rsi]
    lea rsi, [rsi+4]
    lea rdx, [r11+rdx]
    lea r15, [r14+r15]
    mov eax, [r15]
    je adopt_constant_half
    mov rax, [r15]
    mov [rdx], rax
    jmp adopt_constant_done
adopt_constant_half:
    mov [rdx], eax
adopt_constant_done:
    dec ecx
    jmp adopt_relocated
adopt_to_helper:
    sub [r11+rdx], edi
adopt_relocated:
    dec ecx
    jnz adopt_relocation
adopt_done:
    pop rdx
    mov r14, r10
    mov eax, [rbx+T_CODE]
    add r10, rax
    mov [rbp+CODE_USED], r10
    inc qword [rbp+COUNT_TAKEN_UP]
    xor r15d, r15d
    jmp enter_block
adopt_no_room_for_address:
    pop rdx
    jmp adopt_next

; image_address: rdi = host address of template rbx's image; changes nothing else but flags.
image_address:
    mov edi, [rbx+T_IMAGE]
    btr edi, 31
    jc image_archived
    add rdi, [rbp+CODE_WRITABLE]
    ret
image_archived:
    add rdi, [rbp+ARCHIVE]
    ret
"""

ENTER_BLOCK = """
; enter_block: rbx = template, r12 = rip, r13 = physical page | mode, r14 = offset in the code cache where its code
; stands, r15 = physical address of its second page | 1, or 0.  Returns as find does.
enter_block:
    call image_address
    mov eax, [rbx+T_CODE]
    add eax, 3
    and eax, -4
    add rdi, rax
    movzx eax, word [rbx+T_RELOCATIONS]
    lea rdi, [rdi+rax*4]
    mov r8, [rbp+LINK_COUNT]
    mov r9, [rbp+BLOCK_COUNT]
    imul rsi, r8, LINK_SIZE
    add rsi, [rbp+LINKS]
    mov rcx, [rbp+CODE_WRITABLE]
    add rcx, r14
    mov edx, r8d
    movzx r10d, byte [rbx+T_LINKS]
    test r10d, r10d
    jz enter_record
enter_link:
    movsxd rax, dword [rdi+12]
    add rax, r12
    test r13b, 2
    jnz enter_link_wide
    mov eax, eax
enter_link_wide:
    mov [rsi+L_TARGET], rax
    mov eax, [rdi]
    lea r11d, [rax+r14]
    mov [rsi+L_SITE], r11d
    mov r11d, [rdi+4]
    sub r11d, eax
    sub r11d, 4
    mov [rcx+rax], r11d
    mov eax, [rdi+4]
    add eax, r14d
    mov [rsi+L_STUB], eax
    mov [rsi+L_SOURCE], r9d
    mov eax, [rdi+16]
    mov [rsi+L_ENTRY], eax
    xor eax, eax
    mov [rsi+L_TO], eax
    mov eax, [rdi+8]
    mov [rcx+rax], edx
    inc edx
    add rdi, LINK_DESCRIPTION_SIZE
    add rsi, LINK_SIZE
    dec r10d
    jnz enter_link
enter_record:
    mov [rbp+LINK_COUNT], rdx
    mov rsi, r9
    shl rsi, 6
    add rsi, [rbp+BLOCKS]
    mov [rsi+B_RIP], r12
    mov [rsi+B_KEY], r13
    mov [rsi+B_SECOND], r15
    mov [rsi+B_START], r14d
    mov eax, [rbx+T_CODE]
    mov [rsi+B_CODE], eax
    mov rax, rbx
    sub rax, [rbp+TEMPLATES]
    shr rax, 6
    mov [rsi+B_TEMPLATE], eax
    xor eax, eax
    mov [rsi+B_IN], eax
    mov [rsi+B_OUT], r8d
    mov [rsi+B_MASTER], eax
    mov [rsi+B_FLAGS], al
    mov eax, [rbx+T_LINKS]  ; and the three distances to entries
    mov [rsi+B_LINKS], eax
    inc dword [rbx+T_USES]
    ; guest bytes in this page, and in the second
    mov ecx, r12d
    and ecx, 0xfff
    movzx edx, word [rbx+T_LENGTH]
    add edx, ecx
    mov r14d, edx
    mov eax, 0x1000
    cmp edx, eax
    cmova edx, eax
    mov eax, edx
    sub eax, ecx
    mov [rsi+B_LENGTH], ax
    mov rdi, r13
    call add_to_page
    inc qword [rbp+BLOCK_COUNT]
    test r15, r15
    jz enter_in_table
    ; the alias that stands for it in the list of its second page
    push rsi
    push r9
    mov eax, [rsi+B_START]
    mov r8d, r9d
    inc r9d
    add rsi, BLOCK_SIZE
    mov [rsi+B_START], eax
    mov [rsi+B_MASTER], r8d
    xor eax, eax
    mov [rsi+B_RIP], rax
    mov [rsi+B_KEY], rax
    mov [rsi+B_CODE], eax
    mov [rsi+B_IN], eax
    mov [rsi+B_LINKS], eax
    mov byte [rsi+B_FLAGS], ALIAS
    xor ecx, ecx
    lea edx, [r14-0x1000]
    mov [rsi+B_LENGTH], dx
    mov rdi, r15
    call add_to_page
    inc qword [rbp+BLOCK_COUNT]
    pop r9
    pop rsi
    jmp enter_in_table

; add_to_page: rsi = a block, r9d = its number, into the list of physical page rdi (low bits do not matter), of which
; it holds bytes [ecx, edx).  Keeps rsi, r9, r12 to r15.
add_to_page:
    and rdi, -4096
    mov dword [rsi+B_NEXT], 0
    call is_ram
    jc add_done
    mov rax, rdi
    shr rax, 12
    mov r10, [rbp+PAGE_BLOCKS]
    lea r10, [r10+rax*4]
    mov r11d, [r10]
    mov [rsi+B_NEXT], r11d
    mov [r10], r9d
    mov r10, [rbp+CODE_LINES]
    lea r10, [r10+rax*8]
    ; the lines from that of byte ecx to that of byte edx-1
    dec edx
    shr edx, 6
    shr ecx, 6
    mov r11, -1
    shl r11, cl
    mov ecx, 63
    sub ecx, edx
    mov rax, -1
    shr rax, cl
    and r11, rax
    cmp qword [r10], 0
    jne add_lines
    ; the first code of the page: nobody may write to it from now on without being seen
    push rsi
    mov rsi, rdi
    add rsi, [rbp+RAM_BASE]
    mov rdi, rbp
    call purge_writes
    pop rsi
add_lines:
    or [r10], r11
add_done:
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
