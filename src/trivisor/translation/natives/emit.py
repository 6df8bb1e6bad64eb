"""Writing the code of a composed block: entries, instructions, the end, and what stands out of line.

What comes out is what `translator/emission.py` makes of the same instructions, byte for byte; whoever changes one
changes the other.  `emit` is where `compose` (choose.py) goes when it knows every instruction; it too gives up when it
does not know a variant, and goes on to `keep` (compose.py).

Throughout: rbp = the state block, rbx = the tables, r12 = rip, r13 = physical page | mode, r14 = host address of the
guest's code, rdi = where code goes, r8 = where the block begins, r9 and r10 = the ends of the lists of relocations and
locations, r11 = the shape of the instruction being done, r15 = what is known of it in the list of instructions.
"""

from __future__ import annotations

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
