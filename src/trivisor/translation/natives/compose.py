"""Composing blocks of known instructions without Python: see shapes.py.

Here are the pieces that `emit` (emit.py) uses, with its registers, and `keep`, which makes a template of what it has
written and has `enter_block` make the block.
"""

from __future__ import annotations

from trivisor.translation.natives.adopt import TEMPLATE_BUCKET
from trivisor.translation.natives.choose import CHOOSE
from trivisor.translation.natives.emit import EMIT

PIECES = """
; put: append the sequence at rsi; changes rax.
put:
    mov rax, [rsi]
    mov [rdi], rax
    mov rax, [rsi+8]
    mov [rdi+8], rax
    mov rax, [rsi+16]
    mov [rdi+16], rax
    mov rax, [rsi+24]
    mov [rdi+24], rax
    shr rax, 56
    add rdi, rax
    ret

; in_host, in_park: have the flags there.
in_host:
    cmp byte [rbx+C_STATE], 0
    je in_place
    lea rsi, [rbx+Q_RESTORE]
    jmp put
in_park:
    cmp byte [rbx+C_STATE], 0
    jne in_place
    lea rsi, [rbx+Q_PARK]
    jmp put
in_place:
    ret

; put_here: append the address of the instruction being done.
put_here:
    mov rax, rdi
    sub rax, r8
    mov [r9], eax
    add r9, 4
    mov rax, [rbx+C_HERE]
    add rax, r12
    mov [rdi], rax
    add rdi, 8
    ret

; relative: rax = the distance that the instruction names; changes flags.
relative:
    movsxd rax, dword [r11+S_DISTANCE]
    cmp byte [r11+S_RELATIVE], RELATIVE_IMMEDIATE
    ja relative_done
    push rcx
    mov eax, [r11+S_PLACES]
    jb relative_displacement
    shr eax, 16
relative_displacement:
    movzx ecx, al
    add rcx, [rbx+C_HERE]
    cmp ah, 1
    je relative_8
    cmp ah, 4
    jne relative_none
    movsxd rax, dword [r14+rcx]
    pop rcx
    ret
relative_8:
    movsx rax, byte [r14+rcx]
    pop rcx
    ret
relative_none:
    xor eax, eax
    pop rcx
relative_done:
    ret

; target: rax = the address that the last instruction jumps to.
target:
    call relative
    add rax, [rbx+C_POSITION]
    add rax, r12
    ret

; linkable: carry unless a direct jump from here may lead to rax; rcx = the address of the instruction being done.
linkable:
    mov rcx, [rbx+C_HERE]
    add rcx, r12
    mov rdx, rax
    xor rdx, rcx
    shr rdx, 12
    jnz linkable_not
    mov edx, eax
    and edx, 0xfff
    cmp edx, 0x1000-15+1
    cmc
    ret
linkable_not:
    stc
    ret

; go: on at rax, by a link or by the jump cache.
go:
    call linkable
    jc go_far
    mov byte [rdi], 0xe9
    inc rdi
; put_link: append the distance of a link to rax, from rcx.
put_link:
    mov rsi, [rbx+C_LINK_END]
    mov rdx, rdi
    sub rdx, r8
    mov [rsi], edx
    mov rdx, rax
    sub rdx, r12
    mov [rsi+12], edx
    mov edx, B_PARKED
    cmp byte [rbx+C_STATE], 0
    jne put_link_entry
    mov edx, B_BODY
    cmp rax, rcx
    ja put_link_entry
    mov edx, B_POLLED
put_link_entry:
    mov [rsi+16], edx
    add rsi, LINK_DESCRIPTION_SIZE
    mov [rbx+C_LINK_END], rsi
    add rdi, 4
    ret
go_far:
    push rax
    call in_park
    pop rax
    mov rcx, rdi
    sub rcx, r8
    movsxd rdx, eax
    cmp rdx, rax
    jne go_wide
    mov dword [rdi], 0xc2c749           ; mov r10, rip
    mov [rdi+3], eax
    add ecx, 3+RELOCATE_ADDRESS_32*0x1000000
    add rdi, 7
    jmp go_slot
go_wide:
    mov word [rdi], 0xba49
    mov [rdi+2], rax
    add ecx, 2+RELOCATE_ADDRESS_64*0x1000000
    add rdi, 10
go_slot:
    mov [r9], ecx
    mov rcx, rdi
    sub rcx, r8
    add ecx, 3+RELOCATE_JUMP_SLOT*0x1000000
    mov [r9+4], ecx
    add r9, 8
    mov dword [rdi], 0x24a4ff           ; jmp [rsp+slot]
    movzx eax, ax
    lea edx, [rax*8+JUMP_CACHE_KERNEL]
    test r13b, 4
    jz go_kernel
    lea edx, [rax*8+JUMP_CACHE_USER]
go_kernel:
    mov [rdi+3], edx
    add rdi, 7
    ret

; note_constant: ecx = offset in the code, eax = in the guest's, edx = bytes.  Changes rcx, rdx.
note_constant:
    push rsi
    mov rsi, [rbx+C_CONSTANT_END]
    mov [rsi], ecx
    mov [rsi+4], eax
    mov [rsi+8], edx
    add rsi, 12
    mov [rbx+C_CONSTANT_END], rsi
    pop rsi
    ret

; copy_constants: the ecx bytes of code at offset eax are there again at rdi.  Keeps rax, rcx, rsi.
copy_constants:
    push rax
    push rcx
    push rsi
    lea rsi, [rbx+C_CONSTANTS]
    mov r11, [rbx+C_CONSTANT_END]
    push r13
    mov r13, rdi
    sub r13, r8
    sub r13d, eax                       ; how far on
    push r14
    lea r14d, [rax+rcx]
    push r15
    mov r15d, eax
copy_constant:
    cmp rsi, r11
    jae copy_constants_done
    mov ecx, [rsi]
    cmp ecx, r15d
    jb copy_constant_next
    cmp ecx, r14d
    jae copy_constant_next
    add ecx, r13d
    mov eax, [rsi+4]
    mov edx, [rsi+8]
    call note_constant
copy_constant_next:
    add rsi, 12
    jmp copy_constant
copy_constants_done:
    pop r15
    pop r14
    pop r13
    pop rsi
    pop rcx
    pop rax
    ret
"""

KEEP = f"""
keep:
    ; the image's other parts, and the template's record: see block_tables.py
    mov r11, [rbp+TEMPLATE_COUNT]
    shl r11, 6
    add r11, [rbp+TEMPLATES]
    mov rcx, rdi
    sub rcx, r8
    mov [r11+T_CODE], ecx
    mov dword [rdi], 0
    add rdi, 3
    and rdi, -4
    lea rsi, [rbx+C_CONSTANTS]
keep_constant:
    cmp rsi, [rbx+C_CONSTANT_END]
    jae keep_relocations
    mov eax, [rsi]
    mov edx, RELOCATE_CONSTANT_32*0x1000000
    cmp dword [rsi+8], 8
    jne keep_constant_kind
    mov edx, RELOCATE_CONSTANT_64*0x1000000
keep_constant_kind:
    or eax, edx
    mov [r9], eax
    mov eax, [rsi+4]
    mov [r9+4], eax
    add r9, 8
    add rsi, 12
    jmp keep_constant
keep_relocations:
    lea rsi, [rbx+C_RELOCATIONS]
    mov rcx, r9
    sub rcx, rsi
    mov eax, ecx
    shr eax, 2
    mov [r11+T_RELOCATIONS], ax
    rep movsb
    lea rsi, [rbx+C_LINKS]
    xor eax, eax
keep_link:
    cmp rsi, [rbx+C_LINK_END]
    jae keep_locations
    mov ecx, LINK_DESCRIPTION_SIZE
    rep movsb
    inc eax
    jmp keep_link
keep_locations:
    mov [r11+T_LINKS], al
    lea rsi, [rbx+C_LOCATIONS]
    mov rcx, r10
    sub rcx, rsi
    mov eax, ecx
    shr eax, 2
    mov [r11+T_LOCATIONS], ax
    rep movsb
    mov edx, [rbx+C_POSITION]
    mov [r11+T_LENGTH], dx
    xor r15d, r15d
    lea r9, [rbx+C_CONSTANTS]
    mov rsi, rdi                        ; where the guest's bytes will be
    cmp r9, [rbx+C_CONSTANT_END]
    je keep_guest
    inc r15d
    mov ecx, edx
    mov al, 0xff
    rep stosb
    mov rsi, rdi
keep_guest:
    mov [r11+T_MASKED], r15b
    push rsi
    mov rdi, rsi
    mov rsi, r14
    mov ecx, edx
    rep movsb
    pop rsi
keep_blank:
    cmp r9, [rbx+C_CONSTANT_END]
    jae keep_record
    mov eax, [r9+4]
    mov ecx, [r9+8]
    add rax, rsi
keep_blank_byte:
    mov byte [rax], 0
    sub rax, rdx
    mov byte [rax], 0
    add rax, rdx
    inc rax
    dec ecx
    jnz keep_blank_byte
    add r9, 12
    jmp keep_blank
keep_record:
    mov eax, 8
    cmp edx, eax
    cmovb eax, edx
    shl eax, 4
    mov rax, [rbx+rax+C_LENGTH_MASKS]
    mov rcx, rax
    and rcx, [rsi]
    mov [r11+T_PREFIX], rcx
    test r15d, r15d
    jz keep_mask
    sub rsi, rdx
    and rax, [rsi]
keep_mask:
    mov [r11+T_MASK], rax
    mov [r11+T_RIP], r12
    mov rcx, rdi
    sub rcx, r8
    mov [r11+T_SIZE], ecx
    mov rax, [rbx+C_START]
    mov [r11+T_IMAGE], eax
    mov [r11+T_BASE], eax
    add rcx, rax
    mov [rbp+CODE_USED], rcx
    mov ecx, [rbx+C_ENTRIES]
    mov [r11+T_PARKED], cl
    shr ecx, 8
    mov [r11+T_POLLED], cl
    shr ecx, 8
    mov [r11+T_BODY], cl
    mov dword [r11+T_USES], 0
    mov byte [r11+T_LASTING], 1
    mov r8d, r13d
    and r8d, 0xfff
    mov [r11+T_MODE], r8w
    ; into the list where look-ups find it
    mov r9d, r12d
    and r9d, 0xfff
    mov ecx, eax
    {TEMPLATE_BUCKET.replace("%", "keep")}
    mov [r11+T_BUCKET], ax
    mov rdx, [rbp+TEMPLATE_HEADS]
    lea rdx, [rdx+rax*4]
    mov eax, ecx
    mov ecx, [rdx]
    mov [r11+T_NEXT], ecx
    mov ecx, [rbp+TEMPLATE_COUNT]
    mov [rdx], ecx
    inc qword [rbp+TEMPLATE_COUNT]
    inc qword [rbp+COUNT_COMPOSED]
    mov rcx, [rbx+C_COUNT]
    add [rbp+COMPOSED_INSTRUCTIONS], rcx
    mov rbx, r11
    mov r14d, eax
    xor r15d, r15d
    jmp enter_block
"""

COMPOSE = CHOOSE + EMIT + PIECES + KEEP
