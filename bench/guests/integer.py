"""Integer kernels: the byte sieve, quicksort, a table-driven CRC-32 and a hash table."""

SOURCE = """
; ---- sieve of Eratosthenes, a byte a number ----
SIEVE_SIZE equ 0x40000

sieve_prepare:
    ret

align 16
sieve_run:                         ; int sieve(char *flags)
    push rbp
    push rbx
    sub rsp, 8
    mov rbx, rdi
    mov esi, 1
    mov edx, SIEVE_SIZE
    call fill
    xor eax, eax
    mov ecx, 2
.number:
    cmp byte [rbx + rcx], 0
    je .composite
    inc eax
    lea rdx, [rcx + rcx]
    cmp rdx, SIEVE_SIZE
    jae .composite
.strike:
    mov byte [rbx + rdx], 0
    add rdx, rcx
    cmp rdx, SIEVE_SIZE
    jb .strike
.composite:
    inc rcx
    cmp rcx, SIEVE_SIZE
    jne .number
    add rsp, 8
    pop rbx
    pop rbp
    ret

align 16
fill:                              ; void fill(char *to, int byte, size_t length), vectorised
    movd xmm0, esi
    punpcklbw xmm0, xmm0
    pshuflw xmm0, xmm0, 0
    punpcklqdq xmm0, xmm0
    lea rax, [rdi + rdx]
.line:
    movups [rdi], xmm0
    add rdi, 16
    cmp rdi, rax
    jb .line
    ret

; ---- quicksort of 32-bit integers ----
SORTED equ 0x4000

align 16
quicksort_prepare:                 ; numbers of a linear congruential generator
    mov eax, 12345
    lea rcx, [rdi + SORTED * 4]
.number:
    imul eax, eax, 1664525
    add eax, 1013904223
    mov edx, eax
    sar edx, 8
    mov [rdi], edx
    add rdi, 4
    cmp rdi, rcx
    jne .number
    ret

align 16
quicksort_run:                     ; sorts, then sums up each number times its place
    push rbx
    mov rbx, rdi
    lea rsi, [rdi + SORTED * 4 - 4]
    call quicksort
    xor eax, eax
    xor ecx, ecx
.number:
    movsxd rdx, dword [rbx + rcx*4]
    imul rdx, rcx
    inc rcx
    add rax, rdx
    cmp rcx, SORTED
    jne .number
    pop rbx
    ret

align 16
quicksort:                         ; void quicksort(int *low, int *high), Hoare's partition
    cmp rdi, rsi
    jae .leaf
    push r12
    push rbp
    push rbx
    mov rbp, rsi
.part:
    mov rax, rbp
    sub rax, rdi
    sar rax, 3
    mov ecx, [rdi + rax*4]
    lea rax, [rdi - 4]
    lea rdx, [rbp + 4]
.up:
    add rax, 4
    mov r8d, [rax]
    cmp r8d, ecx
    jl .up
.down:
    sub rdx, 4
    mov r9d, [rdx]
    cmp r9d, ecx
    jg .down
    cmp rax, rdx
    jae .split
    mov [rax], r9d
    mov [rdx], r8d
    jmp .up
.split:
    lea rbx, [rdx + 4]
    mov rsi, rdx
    call quicksort
    mov rdi, rbx
    cmp rbx, rbp
    jb .part
    pop rbx
    pop rbp
    pop r12
.leaf:
    ret

; ---- CRC-32, a table look-up a byte ----
CRC_TABLE equ 0
CRC_DATA equ 0x1000
CRC_LENGTH equ 0x20000

align 16
crc_prepare:
    xor ecx, ecx
.entry:
    mov eax, ecx
    mov edx, 8
.bit:
    mov esi, eax
    shr eax, 1
    and esi, 1
    neg esi
    and esi, 0xEDB88320
    xor eax, esi
    dec edx
    jne .bit
    mov [rdi + rcx*4 + CRC_TABLE], eax
    inc ecx
    cmp ecx, 256
    jne .entry
    xor ecx, ecx
    mov eax, 1
.byte:
    imul eax, eax, 69069
    inc eax
    mov edx, eax
    shr edx, 16
    mov [rdi + rcx + CRC_DATA], dl
    inc ecx
    cmp ecx, CRC_LENGTH
    jne .byte
    ret

align 16
crc_run:
    mov r8, rdi
    add rdi, CRC_DATA
    lea rsi, [rdi + CRC_LENGTH]
    mov eax, -1
.byte:
    movzx edx, byte [rdi]
    inc rdi
    xor edx, eax
    shr eax, 8
    movzx edx, dl
    xor eax, [r8 + rdx*4 + CRC_TABLE]
    cmp rdi, rsi
    jne .byte
    not eax
    ret

; ---- a hash table with open addressing: counting 32,768 keys, of which 8,192 differ ----
SLOT_BITS equ 14
KEYS equ 0x8000

align 16
hash_prepare:
    lea rcx, [rdi + (16 << SLOT_BITS)]
    pxor xmm0, xmm0
.slot:
    movaps [rdi], xmm0
    add rdi, 16
    cmp rdi, rcx
    jne .slot
    ret

align 16
hash_run:
    push r12
    push rbp
    push rbx
    mov rbx, rdi
    mov ebp, 1
    mov r12d, KEYS
.key:
    imul ebp, ebp, 1103515245
    add ebp, 12345
    mov esi, ebp
    shr esi, 8
    and esi, 0x1FFF
    inc rsi
    mov rdi, rbx
    call hash_count
    dec r12d
    jne .key
    mov rdi, rbx
    lea rdx, [rbx + (16 << SLOT_BITS)]
    xor eax, eax
.sum:
    mov rcx, [rdi]
    imul rcx, [rdi + 8]
    rol rax, 1
    add rdi, 16
    add rax, rcx
    cmp rdi, rdx
    jne .sum
    pop rbx
    pop rbp
    pop r12
    ret

align 16
hash_count:                        ; void hash_count(struct { long key, count; } *table, long key)
    mov rax, 0x9E3779B97F4A7C15
    imul rax, rsi
    shr rax, 64 - SLOT_BITS
.probe:
    mov rdx, rax
    shl rdx, 4
    add rdx, rdi
    mov rcx, [rdx]
    cmp rcx, rsi
    je .found
    test rcx, rcx
    je .new
    inc eax
    and eax, (1 << SLOT_BITS) - 1
    jmp .probe
.new:
    mov [rdx], rsi
.found:
    inc qword [rdx + 8]
    ret
"""
