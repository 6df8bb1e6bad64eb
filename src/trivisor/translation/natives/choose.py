"""Choosing the instructions of a block to be composed: where each ends, which shape it is of, what flags it meets.

See shapes.py.  `compose` is where `adopt` goes when no template fits.  It gives up (`find_none`, nothing was changed)
as soon as it meets something that it does not know, says what (`COMPOSER_WANTS`), and goes on to `emit`.

Throughout: rbp = the state block, rbx = the tables, r12 = rip, r13 = physical page | mode, r14 = host address of the
guest's code.
"""

from __future__ import annotations

CHOOSE = """
compose:
    test r13d, SEGMENTED_KEYS
    jnz find_none
    test r13b, 2            ; 64-bit code alone
    jz find_none
    mov ecx, 0x1000
    mov eax, r12d
    and eax, 0xfff
    sub ecx, eax
    cmp ecx, 15
    jb find_none
    mov rbx, [rbp+SHAPES]
    test rbx, rbx
    jz find_none
    mov [rbx+C_ROOM], rcx
    mov rax, [rbp+CODE_USED]
    add rax, 15
    and rax, -16
    mov [rbx+C_START], rax
    add rax, MAXIMUM_BLOCK_CODE
    cmp rax, [rbp+CODE_SIZE]
    ja find_none
    cmp qword [rbp+BLOCK_COUNT], MAXIMUM_BLOCKS-2
    jae find_none
    cmp qword [rbp+LINK_COUNT], MAXIMUM_LINKS-256
    jae find_none
    cmp qword [rbp+TEMPLATE_COUNT], MAXIMUM_TEMPLATES-1
    jae find_none
    mov eax, r13d
    and eax, 0xfff-PLAIN
    cmp r12, 0x7f000000     ; as translator.fits
    jb compose_near
    cmp r12, -0x80000000
    jb compose_far
compose_near:
    or eax, NEAR
compose_far:
    mov [rbx+C_MODE], rax
    xor r15d, r15d          ; guest bytes so far
    xor r11d, r11d          ; instructions so far
compose_next:
    ; where does the instruction end, and where are its constants?
    lea rsi, [r14+r15]
    mov rdi, rsi
    xor r8d, r8d            ; 1: operand-size prefix, 2: REX.W, 4: VEX; offsets of ModRM and of REX + 1, bytes
    xor r9d, r9d            ; its places
    mov byte [rbx+C_FORM], 0
length_prefix:
    movzx eax, byte [rdi]
    inc rdi
    movzx edx, byte [rbx+rax+C_ONE_BYTE]
    test dl, 128
    jz length_one_byte
    cmp dl, LENGTH_PREFIX
    je length_prefix
    cmp dl, LENGTH_OPERAND_SIZE
    je length_operand_size
    cmp dl, LENGTH_REX
    je length_rex
    cmp dl, LENGTH_ESCAPE
    je length_escape
    cmp dl, LENGTH_VEX_2
    je length_vex_2
    cmp dl, LENGTH_VEX_3
    je length_vex_3
    jmp find_none
length_operand_size:
    or r8d, 1
    jmp length_prefix
length_rex:
    shr eax, 2
    and eax, 2
    or r8d, eax
    mov rax, rdi
    sub rax, rsi
    shl eax, 16
    or r8d, eax
    movzx eax, byte [rdi]
    inc rdi
    movzx edx, byte [rbx+rax+C_ONE_BYTE]
    cmp dl, LENGTH_ESCAPE
    je length_escape
    test dl, 128
    jnz find_none
length_one_byte:
    mov al, [rbx+rax+C_ONE_BYTE_FORMS]
    mov [rbx+C_FORM], al
    jmp length_opcode
length_vex_3:
    movzx eax, byte [rdi]
    add rdi, 3
    mov edx, LENGTH_MODRM
    and eax, 0x1f
    cmp eax, 2
    je length_opcode
    mov edx, LENGTH_MODRM+LENGTH_IMMEDIATE_8
    cmp eax, 3
    je length_opcode
    cmp eax, 1
    jne find_none
    sub rdi, 2
length_vex_2:
    inc rdi
    or r8d, 4
    jmp length_two_bytes
length_escape:
    movzx eax, byte [rdi]
    mov edx, LENGTH_MODRM
    cmp al, 0x38
    je length_three_bytes
    cmp al, 0x3a
    jne length_two_bytes
    mov edx, LENGTH_MODRM+LENGTH_IMMEDIATE_8
length_three_bytes:
    add rdi, 2
    jmp length_opcode
length_two_bytes:
    movzx eax, byte [rdi]
    inc rdi
    movzx edx, byte [rbx+rax+C_TWO_BYTES]
    test dl, 128
    jnz find_none
    test r8d, 4
    jnz length_opcode
    mov al, [rbx+rax+C_TWO_BYTES_FORMS]
    mov [rbx+C_FORM], al
length_opcode:
    test dl, LENGTH_MODRM
    jz length_immediate
    mov rax, rdi
    sub rax, rsi
    shl eax, 8
    or r8d, eax
    movzx eax, byte [rdi]
    inc rdi
    test dl, LENGTH_TEST_GROUP
    jz length_mod
    test al, 0x30
    jz length_mod
    and dl, LENGTH_MODRM
length_mod:
    mov ecx, eax
    shr ecx, 6
    cmp ecx, 3
    je length_immediate
    and eax, 7
    cmp eax, 4
    jne length_base
    movzx eax, byte [rdi]
    inc rdi
    and eax, 7
length_base:
    test ecx, ecx
    jnz length_by_mod
    cmp eax, 5              ; no base but a displacement, or rip
    jne length_immediate
length_wide:
    mov ecx, 4
length_displacement:
    mov r9d, ecx
    shl r9d, 8
    mov rax, rdi
    sub rax, rsi
    or r9d, eax
    add rdi, rcx
    jmp length_immediate
length_by_mod:
    cmp ecx, 1
    je length_displacement
    jmp length_wide
length_immediate:
    test dl, 0x7e           ; any but ModRM's
    jz length_done
    mov ecx, 1
    test dl, LENGTH_IMMEDIATE_8
    jnz length_has_immediate
    mov ecx, 2
    test dl, LENGTH_IMMEDIATE_16
    jnz length_has_immediate
    mov ecx, 4
    test dl, LENGTH_NEAR_BRANCH
    jnz length_near_branch
    test r8d, 2
    jnz length_wide_immediate
    test r8d, 1
    jz length_has_immediate
    mov ecx, 2
    jmp length_has_immediate
length_wide_immediate:
    test dl, LENGTH_IMMEDIATE_V
    jz length_has_immediate
    mov ecx, 8
    jmp length_has_immediate
length_near_branch:
    test r8d, 1             ; processors differ
    jnz find_none
length_has_immediate:
    test byte [rbx+C_FORM], FORM_COUNT
    jnz length_count
    mov rax, rdi
    sub rax, rsi
    shl eax, 16
    or r9d, eax
    mov eax, ecx
    shl eax, 24
    or r9d, eax
length_count:
    add rdi, rcx
length_done:
    mov rcx, rdi
    sub rcx, rsi
    cmp ecx, 15
    ja find_none
    lea eax, [r15+rcx]
    cmp eax, [rbx+C_ROOM]
    ja compose_page_end
    ; the shape: its bytes without the constants
    mov edi, ecx
    shl edi, 4
    mov rax, [rsi]
    and rax, [rbx+rdi+C_LENGTH_MASKS]
    mov rdx, [rsi+8]
    and rdx, [rbx+rdi+C_LENGTH_MASKS+8]
    mov [rbx+C_KEY], rax
    mov [rbx+C_KEY+8], rdx
    mov [rbx+C_WHERE], r8
    mov eax, r9d
    test ah, ah
    jz blank_immediate
    movzx edx, al
    cmp ah, 1
    je blank_displacement_8
    mov dword [rbx+rdx+C_KEY], 0
    jmp blank_immediate
blank_displacement_8:
    mov byte [rbx+rdx+C_KEY], 0
blank_immediate:
    shr eax, 16
    test ah, ah
    jz blank_done
    movzx edx, al
    cmp ah, 2
    jb blank_8
    je blank_16
    cmp ah, 4
    je blank_32
    mov qword [rbx+rdx+C_KEY], 0
    jmp blank_done
blank_8:
    mov byte [rbx+rdx+C_KEY], 0
    jmp blank_done
blank_16:
    mov word [rbx+rdx+C_KEY], 0
    jmp blank_done
blank_32:
    mov dword [rbx+rdx+C_KEY], 0
blank_done:
    cmp byte [rbx+C_FORM], 0
    je compose_look
    call blank_registers
    jc compose_look
    mov edi, KIND_FAMILY
    call find_shape
    test edi, edi
    jnz compose_found
compose_look:
    mov rax, [rbx+C_KEY]
    mov rdx, [rbx+C_KEY+8]
    xor edi, edi
    call find_shape
    test edi, edi
    jnz compose_found
    test r9d, r9d
    jz compose_unknown
    ; maybe one with just these constants
    mov edi, ecx
    shl edi, 4
    mov rax, [rsi]
    and rax, [rbx+rdi+C_LENGTH_MASKS]
    mov rdx, [rsi+8]
    and rdx, [rbx+rdi+C_LENGTH_MASKS+8]
    mov edi, KIND_EXACT
    call find_shape
    test edi, edi
    jnz compose_found
compose_unknown:
    mov [rbp+COMPOSER_WANTS_WHAT], r15
    mov qword [rbp+COMPOSER_WANTS], WANTS_SHAPE
    jmp find_none
compose_found:
    mov eax, r11d
    shl eax, 4
    mov [rbx+rax+C_INSTRUCTIONS+I_SHAPE], edi
    mov [rbx+rax+C_INSTRUCTIONS+I_POSITION], r15d
    mov edx, [rbx+C_WHERE]
    mov [rbx+rax+C_INSTRUCTIONS+I_WHERE], edx
    inc r11d
    add r15d, ecx
    add rdi, rbx
    cmp byte [rdi+S_ENDS], 0
    jne compose_chosen
    cmp byte [rdi+S_POLLS], 0
    jne compose_chosen
    cmp r15d, [rbx+C_ROOM]
    jae compose_chosen
    cmp r11d, MAXIMUM_INSTRUCTIONS
    jb compose_next
    jmp compose_chosen
compose_page_end:
    test r11d, r11d
    jz find_none

compose_chosen:
    ; liveness of the flags, backwards, and so the way in which each instruction meets them
    mov [rbx+C_COUNT], r11
    mov [rbx+C_LEFT], r11
    mov [rbx+C_POSITION], r15
    mov ecx, 0x3f
    mov esi, r11d
    shl esi, 4
    lea rsi, [rbx+rsi+C_INSTRUCTIONS-16]
compose_live:
    mov edi, [rsi+I_SHAPE]
    add rdi, rbx
    movzx eax, byte [rdi+S_WRITES]
    movzx edx, byte [rdi+S_READS]
    mov r8d, eax
    or r8d, edx
    not eax
    and ecx, eax
    mov eax, WAY_DEAD
    or ecx, edx
    jz compose_way
    mov eax, WAY_WANTED
    test r8d, r8d
    jnz compose_way
    mov eax, WAY_KEPT
    cmp byte [rdi+S_CLOBBERS], 0
    jne compose_way
    mov eax, WAY_UNTOUCHED
compose_way:
    mov [rsi+I_WAY], eax
    sub rsi, 16
    dec r11d
    jnz compose_live
    jmp emit

; blank_registers: rsi = the instruction, r8d = C_WHERE -> rax and rdx = C_KEY without its open register numbers; carry
; if it has none (families.registers_of).  Keeps rcx, rsi, r9, r11.
blank_registers:
    mov rax, [rbx+C_KEY]
    mov [rbx+C_FAMILY], rax
    mov rax, [rbx+C_KEY+8]
    mov [rbx+C_FAMILY+8], rax
    mov byte [rbx+C_OPEN], 0
    xor edi, edi            ; REX, if it has one
    mov eax, r8d
    shr eax, 16
    jz blank_modrm
    movzx edi, byte [rsi+rax-1]
blank_modrm:
    mov [rbx+C_REX], edi
    mov eax, r8d
    shr eax, 8
    and eax, 0xff
    movzx edx, byte [rsi+rax]
    test byte [rbx+C_FORM], FORM_REG
    jz blank_rm
    mov r10d, edi
    and r10d, 4
    add r10d, r10d
    mov r8d, edx
    shr r8d, 3
    and r8d, 7
    or r10d, r8d
    bt dword [rbx+C_SPECIAL], r10d
    jc blank_reg_not
    test byte [rbx+C_FORM], FORM_BYTE
    jz blank_reg
    cmp edx, 0xc0
    jae blank_reg
    test edi, edi
    jnz blank_reg
    cmp r10d, 4
    jae blank_reg_not       ; AH to BH
blank_reg:
    and byte [rbx+rax+C_FAMILY], 0xc7
    and dword [rbx+C_REX], ~4
    mov byte [rbx+C_OPEN], 1
    jmp blank_rm
blank_reg_not:
    cmp edx, 0xc0
    jae blank_none
blank_rm:
    mov r8d, edx
    and r8d, 7
    cmp edx, 0xc0
    jae blank_base
    cmp r8d, 4
    je blank_sib
    cmp edx, 0x40
    jae blank_base
    cmp r8d, 5
    je blank_rm_not
blank_base:
    test edi, 2             ; REX.X means nothing here
    jnz blank_rm_not
    mov r10d, edi
    and r10d, 1
    shl r10d, 3
    or r10d, r8d
    bt dword [rbx+C_SPECIAL], r10d
    jc blank_rm_not
    and byte [rbx+rax+C_FAMILY], 0xf8
    jmp blank_address
blank_sib:
    movzx r8d, byte [rsi+rax+1]
    mov r10d, r8d
    and r10d, 7
    cmp edx, 0x40
    jae blank_sib_base
    cmp r10d, 5
    je blank_rm_not
blank_sib_base:
    mov edx, edi
    and edx, 1
    shl edx, 3
    or r10d, edx
    bt dword [rbx+C_SPECIAL], r10d
    jc blank_rm_not
    and edi, 2
    shl edi, 2
    mov r10d, r8d
    shr r10d, 3
    and r10d, 7
    or r10d, edi
    bt dword [rbx+C_SPECIAL], r10d
    jc blank_rm_not
    and byte [rbx+rax+C_FAMILY+1], 0xc0
blank_address:
    and dword [rbx+C_REX], ~3
    jmp blank_found
blank_rm_not:
    cmp edx, 0xc0
    jae blank_none
    cmp byte [rbx+C_OPEN], 0
    je blank_none
blank_found:
    mov eax, [rbx+C_WHERE]
    shr eax, 16
    jz blank_done_registers
    mov dl, [rbx+C_REX]
    mov [rbx+rax+C_FAMILY-1], dl
blank_done_registers:
    mov rax, [rbx+C_FAMILY]
    mov rdx, [rbx+C_FAMILY+8]
    clc
    ret
blank_none:
    stc
    ret

; find_shape: rax and rdx = its bytes, ecx = length, r9d = places, edi = its kind -> edi = its offset, or 0.
; Keeps rcx, rsi, r9, r11.
find_shape:
    push rsi
    mov rsi, HASH_LOW
    imul rsi, rax
    mov r10, HASH_HIGH
    imul r10, rdx
    xor rsi, r10
    mov r8, [rbx+C_MODE]
    mov r10, r8
    shl r10, 48
    add rsi, r10
    shr rsi, 48
    mov esi, [rbx+rsi*4]
find_shape_next:
    test esi, esi
    jz find_shape_none
    lea r10, [rbx+rsi]
    cmp [r10+S_BYTES], rax
    jne find_shape_other
    cmp [r10+S_BYTES+8], rdx
    jne find_shape_other
    cmp [r10+S_PLACES], r9d
    jne find_shape_other
    cmp [r10+S_MODE], r8w
    jne find_shape_other
    cmp [r10+S_LENGTH], cl
    jne find_shape_other
    cmp [r10+S_KIND], dil
    je find_shape_done
find_shape_other:
    mov esi, [r10+S_NEXT]
    jmp find_shape_next
find_shape_none:
    xor esi, esi
find_shape_done:
    mov edi, esi
    pop rsi
    ret
"""
