"""Floating-point kernels: a matrix product in scalar SSE2, vector loops with SSE and AVX2, and the x87."""

SOURCE = """
; ---- product of 80 by 80 matrices of doubles ----
ORDER equ 80
MATRIX equ ORDER * ORDER * 8

align 16
matrix_prepare:                    ; small whole numbers, so that every sum is exact
    mov eax, 5
    lea rcx, [rdi + 2 * MATRIX]
.number:
    imul eax, eax, 1664525
    add eax, 1013904223
    mov edx, eax
    sar edx, 24
    cvtsi2sd xmm0, edx
    movsd [rdi], xmm0
    add rdi, 8
    cmp rdi, rcx
    jne .number
    ret

align 16
matrix_run:
    push rbx
    lea rsi, [rdi + MATRIX]
    lea rdx, [rdi + 2 * MATRIX]
    mov rbx, rdx
    call multiply
    xor eax, eax
    xor ecx, ecx
.sum:
    rol rax, 1
    add rax, [rbx + rcx*8]
    inc rcx
    cmp rcx, ORDER * ORDER
    jne .sum
    pop rbx
    ret

align 16
multiply:                          ; void multiply(double *a, double *b, double *c)
    push r12
    push rbp
    push rbx
    mov r8d, ORDER
.row:
    mov rbx, rsi
    mov r9d, ORDER
.column:
    mov rax, rdi
    mov rcx, rbx
    lea rbp, [rdi + ORDER * 8]
    pxor xmm1, xmm1
.inner:
    movsd xmm0, [rax]
    add rax, 8
    mulsd xmm0, [rcx]
    add rcx, ORDER * 8
    addsd xmm1, xmm0
    cmp rax, rbp
    jne .inner
    movsd [rdx], xmm1
    add rdx, 8
    add rbx, 8
    dec r9d
    jne .column
    add rdi, ORDER * 8
    dec r8d
    jne .row
    pop rbx
    pop rbp
    pop r12
    ret

; ---- arrays of floats and of 16-bit samples, four and eight at a time ----
VECTOR equ 0x8000                  ; bytes of each array
VECTOR_PASSES equ 24

align 16
sse_prepare:
    xor ecx, ecx
.number:
    lea eax, [rcx + rcx*2]
    and eax, 1023
    cvtsi2ss xmm0, eax
    mulss xmm0, [rel thousandth]
    movss [rdi + rcx*4], xmm0
    inc ecx
    cmp ecx, VECTOR / 2            ; two arrays of floats
    jne .number
    mov eax, 3
    xor ecx, ecx
.sample:
    imul eax, eax, 69069
    inc eax
    mov edx, eax
    sar edx, 18
    mov [rdi + rcx*2 + VECTOR * 2], dx
    inc ecx
    cmp ecx, VECTOR
    jne .sample
    ret

align 16
sse_run:                           ; y = min(a*x + y, 2), then a dot product of the samples
    lea rsi, [rdi + VECTOR]
    movss xmm4, [rel half]
    shufps xmm4, xmm4, 0
    movss xmm5, [rel two]
    shufps xmm5, xmm5, 0
    pxor xmm3, xmm3
    mov ecx, VECTOR_PASSES
.pass:
    xor eax, eax
.floats:
    movaps xmm0, [rdi + rax]
    mulps xmm0, xmm4
    addps xmm0, [rsi + rax]
    minps xmm0, xmm5
    movaps [rsi + rax], xmm0
    add rax, 16
    cmp rax, VECTOR
    jne .floats
    xor eax, eax
.samples:
    movdqu xmm0, [rdi + rax + VECTOR * 2]
    movdqu xmm1, [rdi + rax + VECTOR * 3]
    pmaddwd xmm0, xmm1
    psrad xmm0, 4
    paddd xmm3, xmm0
    add rax, 16
    cmp rax, VECTOR
    jne .samples
    dec ecx
    jne .pass
    pshufd xmm0, xmm3, 0x4E
    paddd xmm3, xmm0
    pshufd xmm0, xmm3, 0xB1
    paddd xmm3, xmm0
    movd eax, xmm3
    jmp sum_floats

align 16
sum_floats:                        ; of the array at rsi, by their bits, into rax
    xor ecx, ecx
.number:
    mov edx, [rsi + rcx]
    rol rax, 1
    add rcx, 4
    add rax, rdx
    cmp rcx, VECTOR
    jne .number
    ret

avx_prepare: jmp sse_prepare

align 16
avx_run:                           ; the same with 32-byte vectors, one multiply-add, and a byte shuffle
    lea rsi, [rdi + VECTOR]
    vbroadcastss ymm4, [rel half]
    vbroadcastss ymm5, [rel two]
    vbroadcasti128 ymm6, [rel swap_bytes]
    vpxor xmm3, xmm3, xmm3
    mov ecx, VECTOR_PASSES
.pass:
    xor eax, eax
.floats:
    vmovups ymm0, [rsi + rax]
    vfmadd231ps ymm0, ymm4, [rdi + rax]
    vminps ymm0, ymm0, ymm5
    vmovups [rsi + rax], ymm0
    add rax, 32
    cmp rax, VECTOR
    jne .floats
    xor eax, eax
.samples:
    vmovdqu ymm0, [rdi + rax + VECTOR * 2]
    vpshufb ymm0, ymm0, ymm6
    vpmaddwd ymm0, ymm0, [rdi + rax + VECTOR * 3]
    vpsrad ymm0, ymm0, 4
    vpaddd ymm3, ymm3, ymm0
    add rax, 32
    cmp rax, VECTOR
    jne .samples
    dec ecx
    jne .pass
    vextracti128 xmm0, ymm3, 1
    vpaddd xmm3, xmm3, xmm0
    vpshufd xmm0, xmm3, 0x4E
    vpaddd xmm3, xmm3, xmm0
    vpshufd xmm0, xmm3, 0xB1
    vpaddd xmm3, xmm3, xmm0
    vmovd eax, xmm3
    vzeroupper
    jmp sum_floats

align 16
swap_bytes: db 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
half: dd 0x3F000000
two: dd 0x40000000
thousandth: dd 0x3A83126F

; ---- x87: a polynomial, a quotient and a root of each number, as 32-bit compilers did it ----
NUMBERS equ 8192

align 16
x87_prepare:
    mov ecx, 1
    mov dword [rdi], 0
.number:
    mov [rdi], ecx
    fild dword [rdi]
    fmul qword [rel ratio]
    fstp qword [rdi]
    add rdi, 8
    inc ecx
    cmp ecx, NUMBERS + 1
    jne .number
    ret

align 16
x87_run:
    sub rsp, 24
    xor ecx, ecx
    fldz
.number:
    fld qword [rdi + rcx*8]        ; x
    fld st0
    fmul qword [rel coefficients]
    fadd qword [rel coefficients + 8]
    fmul st0, st1
    fadd qword [rel coefficients + 16]
    fmul st0, st1
    fadd qword [rel coefficients + 24]
    fxch st0, st1
    fadd qword [rel coefficients + 24]
    fdivp st1, st0
    fld st0
    fmul st0, st0
    fsqrt
    faddp st1, st0
    fstp qword [rsp]
    fadd qword [rsp]
    inc ecx
    cmp ecx, NUMBERS
    jne .number
    fstp qword [rsp]
    mov rax, [rsp]
    add rsp, 24
    ret

align 8
ratio: dq 0x3F60624DD2F1A9FC
coefficients: dq 0x3FD5555555555555, 0xBFE0000000000000, 0x3FF8000000000000, 0x3FF0000000000000
"""
