"""Making blocks of templates (see block_tables.py): the guest's bytes are compared, the code copied and relocated."""

from __future__ import annotations

from trivisor.translation.block_tables import COMMON_START, TEMPLATE_HASH
from trivisor.x86 import LONGEST_INSTRUCTION

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
    cld
    cmp r9d, 4096-{LONGEST_INSTRUCTION}
    ja adopt_across
adopt_there:
    {TEMPLATE_BUCKET.replace("%", "adopt")}
    mov rdx, [rbp+TEMPLATE_HEADS]
    mov edx, [rdx+rax*4]
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
    xor r15d, r15d
    mov ecx, r12d
    and ecx, 0xfff
    add ecx, r9d
    mov r9, r12
    sub r9, [rbx+T_RIP]
    jz adopt_here
    test r8b, 2             ; 64-bit code alone is moved, by whole pages
    jz adopt_next
    test r9d, 0xfff
    jnz adopt_next
adopt_here:
    cmp ecx, 0x1000
    jbe adopt_room
    mov r15, [rbp+ACROSS_SECOND]
    test r15, r15
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
    push r15
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
    pop r15
    pop rdx
    mov r14, r10
    mov eax, [rbx+T_CODE]
    add r10, rax
    mov [rbp+CODE_USED], r10
    inc qword [rbp+COUNT_TAKEN_UP]
    jmp enter_block
adopt_no_room_for_address:
    pop r15
    pop rdx
    jmp adopt_next

; So near to the page's end an instruction may run into the next one: put together in ACROSS what stands here and there.
; ACROSS_SECOND becomes the next page's physical address | 1, or 0 if it cannot be had.
adopt_across:
    mov qword [rbp+ACROSS_SECOND], 0
    push r12
    push r13
    push r14
    push r9
    test r8b, 2             ; in 16- and 32-bit code addresses wrap otherwise
    jz across_alone
    mov r15, r12
    or r15, 0xfff
    inc r15
    mov rdx, r15
    shr rdx, 12
    and edx, EXEC_TLB_ENTRIES-1
    shl edx, 4
    lea r13, [rbp+rdx+EXEC_TLB_KERNEL]
    lea rsi, [rbp+rdx+EXEC_TLB_USER]
    mov r12d, KIND_FETCH
    test r8b, MODE_IS_USER
    jz across_kernel
    mov r13, rsi
    or r12d, KIND_USER
across_kernel:
    mov rdi, [r13+8]
    cmp [r13], r15
    je across_known
    cmp qword [rbp+PAGING_NATIVE], 0
    je across_alone
    mov rax, r15
    call walk
    test eax, eax
    jnz across_alone
across_known:
    and rdi, -4096
    call is_ram
    jc across_alone
    lea rax, [rdi+1]
    mov [rbp+ACROSS_SECOND], rax
across_alone:
    pop r9
    pop rsi
    pop r13
    pop r12
    mov rdx, rdi
    lea rdi, [rbp+ACROSS]
    mov r14, rdi
    mov ecx, 4096
    sub ecx, r9d
    rep movsb
    cmp qword [rbp+ACROSS_SECOND], 0
    je across_made
    mov rsi, rdx
    add rsi, [rbp+RAM_BASE]
    mov ecx, {LONGEST_INSTRUCTION}
    rep movsb
across_made:
    mov r8d, r13d
    and r8d, 0xfff
    jmp adopt_there

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
