"""Putting blocks together from known instructions, without Python: see shapes.py.

What comes out is what `translator/emission.py` makes of the same instructions, byte for byte; whoever changes one
changes the other.  `compose` is where `adopt` goes when no template fits.  It gives up (`find_none`, nothing was
changed) as soon as it meets something that it does not know, and Python translates the block.

Throughout: rbp = the state block, rbx = the tables, r12 = rip, r13 = physical page | mode, r14 = host address of the
guest's code.  While code is written: rdi = where to, r8 = where the block begins, r9 and r10 = the ends of the lists
of relocations and locations, r11 = the shape of the instruction being done.
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

EMIT = """
emit:
    ; ecx = the flags that live on the way in
    mov rdi, [rbp+CODE_WRITABLE]
    add rdi, [rbx+C_START]
    mov r8, rdi
    lea r9, [rbx+C_RELOCATIONS]
    lea r10, [rbx+C_LOCATIONS]
    lea rax, [rbx+C_LINKS]
    mov [rbx+C_LINK_END], rax
    lea rax, [rbx+C_MISSES]
    mov [rbx+C_MISS_END], rax
    lea rax, [rbx+C_CONSTANTS]
    mov [rbx+C_CONSTANT_END], rax
    ; the checked entry
    test dword [rbx+C_MODE], NEAR
    jz emit_far_entry
    mov dword [rdi], 0xfa8149           ; cmp r10, rip
    mov [rdi+3], r12d
    mov dword [r9], 3+RELOCATE_ADDRESS_32*0x1000000
    add rdi, 7
    jmp emit_entry
emit_far_entry:
    mov word [rdi], 0xbb49              ; mov r11, rip
    mov [rdi+2], r12
    mov dword [rdi+10], 0xda394d        ; cmp r10, r11
    mov dword [r9], 2+RELOCATE_ADDRESS_64*0x1000000
    add rdi, 13
emit_entry:
    mov rax, rdi
    sub rax, r8
    add eax, 2+RELOCATE_TO_HELPER*0x1000000
    mov [r9+4], eax
    add r9, 8
    mov word [rdi], 0x850f              ; jne lookup
    mov rax, [rbp+LOOKUP]
    sub rax, [rbp+CODE_BASE]
    add rax, [rbp+CODE_WRITABLE]
    sub rax, rdi
    sub rax, 6
    mov [rdi+2], eax
    add rdi, 6
    mov rax, rdi
    sub rax, r8
    mov [rbx+C_ENTRIES], al
    test ecx, ecx
    jz emit_polled
    lea rsi, [rbx+Q_RESTORE]
    call put
emit_polled:
    mov rax, rdi
    sub rax, r8
    mov [rbx+C_ENTRIES+1], al
    lea rsi, [rbx+Q_POLL_CODE]
    call put
    mov rax, rdi
    sub rax, r8
    mov [rbx+C_ENTRIES+2], al
    mov [rbx+C_BODY], rdi
    mov qword [rbx+C_STATE], 0
    lea r15, [rbx+C_INSTRUCTIONS]

emit_instruction:
    mov r11d, [r15+I_SHAPE]
    add r11, rbx
    mov eax, [rbx+C_STATE]
    shl eax, 2
    add eax, [r15+I_WAY]
    mov edx, [r11+rax*4+S_VARIANTS]
    test edx, edx
    jz emit_unknown
    add rdx, rbx
    mov [rbx+C_VARIANT], rdx
    mov [rbx+C_AT], rdi
    mov eax, [r15+I_POSITION]
    mov [rbx+C_HERE], rax
    shl eax, 22
    movzx ecx, byte [rdx+V_STATE]
    shr ecx, 1
    shl ecx, 21
    or eax, ecx
    mov rcx, rdi
    sub rcx, [rbx+C_BODY]
    or eax, ecx
    mov [r10], eax
    add r10, 4
    lea rsi, [rdx+V_BYTES]
    movzx ecx, word [rdx+V_CODE]
    mov eax, ecx
    rep movsb
    neg eax
    and eax, 7
    add rsi, rax
    movzx ecx, byte [rdx+V_ABSOLUTES]
    test ecx, ecx
    jz emit_patches
emit_absolute:
    push rcx
    movsxd rax, dword [rsi+4]
    cmp byte [rsi+3], 0
    je emit_absolute_own
    call relative
emit_absolute_own:
    movzx ecx, byte [r11+S_LENGTH]
    add rax, rcx
    add rax, [rbx+C_HERE]
    add rax, r12
    movzx ecx, word [rsi]
    add rcx, [rbx+C_AT]
    mov rdx, rcx
    sub rdx, r8
    cmp byte [rsi+2], 4
    jne emit_absolute_64
    or edx, RELOCATE_ADDRESS_32*0x1000000
    mov [r9], edx
    movsxd rdx, eax
    cmp rdx, rax
    jne emit_far_target
    mov [rcx], eax
    jmp emit_absolute_done
emit_far_target:
    pop rcx
    jmp find_none
emit_absolute_64:
    mov [r9], edx
    mov [rcx], rax
emit_absolute_done:
    add r9, 4
    add rsi, 8
    pop rcx
    dec ecx
    jnz emit_absolute
emit_patches:
    mov rdx, [rbx+C_VARIANT]
    movzx ecx, byte [rdx+V_PATCHES]
    test ecx, ecx
    jz emit_fields
emit_patch:
    push rcx
    mov eax, [r11+S_PLACES]
    cmp byte [rsi+3], 0
    je emit_patch_displacement
    shr eax, 16
emit_patch_displacement:
    movzx eax, al
    add rax, [rbx+C_HERE]
    movzx ecx, word [rsi]
    add rcx, [rbx+C_AT]
    movzx edx, byte [rsi+2]
    cmp edx, 4
    ja emit_patch_64
    je emit_patch_32
    cmp edx, 2
    je emit_patch_16
    mov dl, [r14+rax]
    mov [rcx], dl
    jmp emit_patched
emit_patch_16:
    mov dx, [r14+rax]
    mov [rcx], dx
    jmp emit_patched
emit_patch_64:
    mov rdx, [r14+rax]
    mov [rcx], rdx
    sar rdx, 32
    cmp rdx, -1
    jne emit_patched
    mov edx, 8
    jmp emit_patch_address
emit_patch_32:
    mov edx, [r14+rax]
    mov [rcx], edx
    mov edx, 4
emit_patch_address:
    ; it may be an address: see recipe.may_be_address
    cmp byte [rcx+3], 0x80
    jb emit_patched
    cmp byte [rcx+3], 0xff
    je emit_patched
    cmp byte [r11+S_KIND], KIND_EXACT
    je emit_patched
    sub rcx, r8
    call note_constant
emit_patched:
    add rsi, 4
    pop rcx
    dec ecx
    jnz emit_patch
emit_fields:
    mov rdx, [rbx+C_VARIANT]
    movzx ecx, byte [rdx+V_FIELDS]
    test ecx, ecx
    jz emit_misses
emit_field:
    push rcx
    movzx ecx, word [rsi]
    add rcx, [rbx+C_AT]
    movzx edx, byte [r15+I_MODRM]
    add rdx, r14
    add rdx, [rbx+C_HERE]               ; the guest's ModRM
    movzx eax, byte [r15+I_REX]
    test eax, eax
    jz emit_field_rex
    push rdx
    mov rdx, [rbx+C_HERE]
    add rdx, r14
    movzx eax, byte [rdx+rax-1]
    pop rdx
emit_field_rex:
    cmp byte [rsi+2], FIELD_ADDRESS
    jb emit_field_raw
    je emit_field_address
    cmp byte [rsi+2], FIELD_OPERAND
    je emit_field_operand
    shr eax, 2
    and eax, 1
    and byte [rcx], 0xfe
    or [rcx], al
    movzx eax, byte [rsi+3]
    add rcx, rax
    mov al, [rdx]
    shr al, 3
    and al, 7
    and byte [rcx], 0xf8
    or [rcx], al
    jmp emit_field_done
emit_field_operand:
    and eax, 4
    and byte [rcx], 0xfb
    or [rcx], al
    movzx eax, byte [rsi+3]
    add rcx, rax
    mov al, [rdx]
    and al, 0x38
    and byte [rcx], 0xc7
    or [rcx], al
    jmp emit_field_done
emit_field_address:
    and eax, 3
    and byte [rcx], 0xfc
    or [rcx], al
    mov al, [rdx]
    and al, 7
    and byte [rcx+2], 0xf8
    or [rcx+2], al
    cmp al, 4
    jne emit_field_done
    mov al, [rdx+1]
    mov [rcx+3], al
    jmp emit_field_done
emit_field_raw:
    push rsi
    push rdi
    mov rdi, rcx
    mov rsi, [rbx+C_HERE]
    add rsi, r14
    movzx ecx, byte [r11+S_LENGTH]
    rep movsb
    pop rdi
    pop rsi
emit_field_done:
    add rsi, 4
    pop rcx
    dec ecx
    jnz emit_field
emit_misses:
    add rsi, 7
    and rsi, -8
    mov rdx, [rbx+C_VARIANT]
    movzx ecx, byte [rdx+V_MISSES]
    test ecx, ecx
    jz emit_next
    mov rax, [rbx+C_MISS_END]
emit_miss:
    mov rdx, [rbx+C_AT]
    sub rdx, r8
    mov [rax+O_START], edx
    mov rdx, rdi
    sub rdx, r8
    mov [rax+O_END], edx
    mov rdx, rsi
    sub rdx, rbx
    mov [rax+O_MISS], edx
    mov edx, [rbx+C_HERE]
    mov [rax+O_POSITION], dx
    mov rdx, [rbx+C_VARIANT]
    movzx edx, byte [rdx+V_STATE]
    shr edx, 1
    mov [rax+O_PARKED], dx
    add rax, 16
    add rsi, MISS_SIZE
    dec ecx
    jnz emit_miss
    mov [rbx+C_MISS_END], rax
emit_next:
    mov rdx, [rbx+C_VARIANT]
    movzx eax, byte [rdx+V_STATE]
    and eax, 1
    mov [rbx+C_STATE], rax
    add r15, 16
    dec qword [rbx+C_LEFT]
    jnz emit_instruction
    cmp byte [r11+S_POLLS], 0
    je emit_ending
    call in_host
    mov qword [rbx+C_STATE], 0
    mov eax, [rbx+C_POSITION]
    shl eax, 22
    mov rcx, rdi
    sub rcx, [rbx+C_BODY]
    or eax, ecx
    mov [r10], eax
    add r10, 4
    lea rsi, [rbx+Q_POLL_CODE]
    call put
    jmp emit_ending
emit_unknown:
    add eax, WANTS_VARIANT
    mov [rbp+COMPOSER_WANTS], rax
    sub r11, rbx
    mov [rbp+COMPOSER_WANTS_WHAT], r11
    jmp find_none

emit_ending:
    mov rax, [rbx+C_POSITION]
    add rax, r12
    movzx ecx, byte [r11+S_ENDS]
    cmp ecx, ENDS_JUMP
    jb emit_on
    je emit_jump
    cmp ecx, ENDS_INDIRECT
    jb emit_branch
    je emit_indirect
    call in_host
    movzx ecx, byte [r11+S_ENDS]
    cmp ecx, ENDS_NATIVE
    jb emit_call_out
    je emit_native
    lea rsi, [rbx+Q_CALL_RAISE]
    call put
    call put_here
    movzx eax, byte [r11+S_VECTOR]
    mov [rdi], eax
    mov eax, [r11+S_ARGUMENT]
    mov [rdi+4], eax
    add rdi, 8
    jmp emit_out_of_line
emit_call_out:
    lea rsi, [rbx+Q_CALL_CALL_OUT]
    call put
    call put_here
    jmp emit_out_of_line
emit_native:
    mov dword [rdi], 0x2494ff           ; call [rsp+field]
    mov eax, [r11+S_ARGUMENT]
    mov [rdi+3], eax
    add rdi, 7
    call put_here
    movzx eax, byte [r11+S_LENGTH]
    mov [rdi], eax
    add rdi, 4
    jmp emit_out_of_line
emit_indirect:
    call in_park
    lea rsi, [rbx+Q_JUMP_KERNEL]
    test r13b, 4
    jz emit_indexed
    lea rsi, [rbx+Q_JUMP_USER]
emit_indexed:
    call put
    jmp emit_out_of_line
emit_jump:
    call target
emit_on:
    call go
    jmp emit_out_of_line
emit_branch:
    mov byte [rdi], 0x0f
    mov al, [r11+S_VECTOR]
    or al, 0x80
    mov [rdi+1], al
    add rdi, 2
    call target
    call linkable
    jc emit_branch_out
    call put_link
    mov rax, [rbx+C_POSITION]
    add rax, r12
    jmp emit_on
emit_branch_out:
    push rax
    add rdi, 4
    push rdi
    mov rax, [rbx+C_POSITION]
    add rax, r12
    call go
    pop rdx
    mov rcx, rdi
    sub rcx, rdx
    mov [rdx-4], ecx
    pop rax
    jmp emit_on

emit_out_of_line:
    lea r15, [rbx+C_MISSES]
emit_way_out:
    cmp r15, [rbx+C_MISS_END]
    jae emit_stubs
    mov esi, [r15+O_MISS]
    add rsi, rbx
    movzx eax, word [rsi+M_JUMP_END]
    add eax, [r15+O_START]
    mov rdx, rdi
    sub rdx, r8
    mov ecx, edx
    sub ecx, eax
    mov [r8+rax-4], ecx
    sub ecx, 4
    mov [rdi+20], ecx                   ; where it goes on after the check
    mov ecx, [rbx+Q_CALL_MISS]
    mov [rdi], ecx
    lea ecx, [rdx+4]
    sub ecx, [r15+O_START]
    movzx r11d, word [rsi+M_RETRY]
    sub ecx, r11d
    mov [rdi+4], ecx
    mov ecx, [rsi+M_KIND]
    mov [rdi+8], ecx
    movzx ecx, word [r15+O_POSITION]
    add rcx, r12
    mov [rdi+12], rcx
    lea ecx, [rdx+12+RELOCATE_ADDRESS_64*0x1000000]
    mov [r9], ecx
    add r9, 4
    mov dword [rdi+24], 0
    add rdi, 28
    movzx ecx, word [rsi+M_CROSSING]
    test ecx, ecx
    jz emit_way_done
    mov dword [rdi-4], 24
    movzx edx, word [r15+O_POSITION]
    shl edx, 22
    movzx r11d, word [r15+O_PARKED]
    shl r11d, 21
    or edx, r11d
    mov r11, rdi
    sub r11, [rbx+C_BODY]
    or edx, r11d
    mov [r10], edx
    add r10, 4
    add eax, 8                          ; the code after the check, which is there again
    call copy_constants
    push rsi
    lea rsi, [r8+rax]
    rep movsb
    lea rsi, [rbx+Q_CALL_CROSSED]
    call put
    pop rsi
    mov byte [rdi], 0xe9
    mov eax, [r15+O_END]
    movzx ecx, word [rsi+M_REJOIN]
    test ecx, ecx
    jz emit_rejoin
    mov eax, [r15+O_START]
    add eax, ecx
emit_rejoin:
    add rdi, 5
    mov rcx, rdi
    sub rcx, r8
    sub eax, ecx
    mov [rdi-4], eax
emit_way_done:
    add r15, 16
    jmp emit_way_out
emit_stubs:
    lea r15, [rbx+C_LINKS]
emit_stub:
    cmp r15, [rbx+C_LINK_END]
    jae keep
    mov rcx, rdi
    sub rcx, r8
    mov [r15+4], ecx
    mov eax, [r15]
    sub ecx, eax
    sub ecx, 4
    mov [r8+rax], ecx
    cmp dword [r15+16], B_PARKED
    jne emit_stub_call
    lea rsi, [rbx+Q_RESTORE]
    call put
emit_stub_call:
    lea rsi, [rbx+Q_CALL_CHAIN]
    call put
    mov rcx, rdi
    sub rcx, r8
    mov [r15+8], ecx
    mov dword [rdi], 0
    add rdi, 4
    add r15, LINK_DESCRIPTION_SIZE
    jmp emit_stub
"""

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

KEEP = """
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
    mov [r11+T_MASKED], r15w
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
    mov word [r11+T_LASTING], 1
    mov ecx, r13d
    and ecx, 0xfff
    mov [r11+T_MODE], cx
    ; into the list where look-ups find it
    shl ecx, 5
    mov edx, r12d
    and edx, 0xfff
    xor ecx, edx
    movzx edx, byte [r14]
    shl edx, 8
    xor ecx, edx
    and ecx, TEMPLATE_HEADS_MASK
    mov rdx, [rbp+TEMPLATE_HEADS]
    lea rdx, [rdx+rcx*4]
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
