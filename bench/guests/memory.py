"""Kernels of memory: a pointer chase, and string instructions with rep."""

SOURCE = """
; ---- a linked list of 16,384 cache lines in scattered order, walked four times ----
NODE_BITS equ 14
NODE equ 64

align 16
chase_prepare:                     ; struct { struct node *next; long value; }, in the order of a generator
    xor eax, eax
    mov ecx, 1 << NODE_BITS
.node:
    imul edx, eax, 12869           ; the generator runs through all of them: Knuth, TAOCP 2, 3.2.1.2
    add edx, 6925
    and edx, (1 << NODE_BITS) - 1
    mov esi, eax
    shl esi, 6
    mov r8d, edx
    shl r8d, 6
    add rsi, rdi
    add r8, rdi
    mov [rsi], r8
    mov [rsi + 8], rcx
    mov eax, edx
    dec ecx
    jne .node
    mov qword [rsi], 0             ; the last
    ret

align 16
chase_run:
    xor eax, eax
    mov ecx, 4
.pass:
    mov rdx, rdi
.node:
    add rax, [rdx + 8]
    mov rdx, [rdx]
    test rdx, rdx
    jne .node
    rol rax, 3
    dec ecx
    jne .pass
    ret

; ---- copies and fills of 0 to 1,023 bytes from and to anywhere, as a kernel's memcpy and memset are ----
AREA equ 0x20000
COPIES equ 8000

align 16
strings_prepare:
    mov eax, 99
    lea rcx, [rdi + AREA * 2]
.word:
    imul eax, eax, 1664525
    add eax, 1013904223
    mov [rdi], eax
    add rdi, 4
    cmp rdi, rcx
    jne .word
    ret

align 16
strings_run:
    push r13
    push r12
    push rbp
    push rbx
    sub rsp, 8
    mov rbp, rdi
    mov ebx, 4711
    mov r12d, COPIES
    xor r13d, r13d
.copy:
    imul ebx, ebx, 1664525
    add ebx, 1013904223
    mov eax, ebx
    shr eax, 15
    mov edx, ebx
    shr edx, 4
    and edx, 0x3FF
    lea rsi, [rbp + rax]
    imul ebx, ebx, 1664525
    add ebx, 1013904223
    mov eax, ebx
    shr eax, 16
    lea rdi, [rbp + rax + AREA + 0x400]
    test ebx, 0x1000
    jne .fill
    call copy
    jmp .next
.fill:
    movzx esi, bl
    call set
.next:
    movzx eax, byte [rdi - 1]
    lea r13, [r13 + r13*4]
    add r13, rax
    dec r12d
    jne .copy
    mov rax, r13
    add rsp, 8
    pop rbx
    pop rbp
    pop r12
    pop r13
    ret

align 16
copy:                              ; (to, from, length): whole words, then the rest
    mov ecx, edx
    shr ecx, 3
    and edx, 7
    rep movsq
    mov ecx, edx
    rep movsb
    ret

align 16
set:                               ; (to, byte, length)
    movzx eax, sil
    mov rcx, rdx
    imul eax, eax, 0x01010101
    shr ecx, 2
    and edx, 3
    rep stosd
    mov ecx, edx
    rep stosb
    ret
"""
