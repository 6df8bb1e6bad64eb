"""Kernels of calls and jumps: recursion, virtual calls, and a bytecode interpreter."""

SOURCE = """
; ---- recursive Fibonacci numbers, about 250,000 calls ----
fibonacci_prepare:
    ret

align 16
fibonacci_run:
    mov edi, 24
    call fibonacci
    mov eax, eax
    ret

align 16
fibonacci:                         ; int fibonacci(int n)
    push rbp
    push rbx
    sub rsp, 8
    mov ebx, edi
    mov eax, edi
    cmp edi, 1
    jle .done
    lea edi, [rdi - 1]
    call fibonacci
    mov ebp, eax
    lea edi, [rbx - 2]
    call fibonacci
    add eax, ebp
.done:
    add rsp, 8
    pop rbx
    pop rbp
    ret

; ---- virtual calls: objects of eight classes, their methods on two pages ----
OBJECTS equ 1024
PASSES equ 32

align 16
indirect_prepare:                  ; struct { void **class; long value; } objects[], and pointers to them behind it
    lea rsi, [rdi + OBJECTS * 16]
    mov eax, 7
    mov ecx, OBJECTS
    lea r8, [rel classes]
.object:
    imul eax, eax, 1664525
    add eax, 1013904223
    mov edx, eax
    shr edx, 29
    shl edx, 4
    add rdx, r8
    mov [rdi], rdx
    mov [rdi + 8], rax
    mov [rsi], rdi
    add rdi, 16
    add rsi, 8
    dec ecx
    jne .object
    ret

align 16
indirect_run:
    push r13
    push r12
    push rbp
    push rbx
    sub rsp, 8
    xor r12d, r12d
    lea r13, [rdi + OBJECTS * 16]
    lea rbp, [r13 + OBJECTS * 8]
    mov dword [rsp], PASSES
.pass:
    mov rbx, r13
.object:
    mov rdi, [rbx]
    mov rsi, r12
    mov rax, [rdi]
    add rbx, 8
    call [rax + 8]
    add r12, rax
    cmp rbx, rbp
    jne .object
    sub dword [rsp], 1
    jne .pass
    mov rax, r12
    add rsp, 8
    pop rbx
    pop rbp
    pop r12
    pop r13
    ret

align 8
classes:                           ; a destructor that is never called, and the method
    dq 0, methods.add, 0, methods.xor, 0, methods.multiply, 0, methods.shift
    dq 0, other_methods.compare, 0, other_methods.frame, 0, other_methods.swap, 0, other_methods.keep

methods:
.add:
    mov rax, [rdi + 8]
    add rax, rsi
    mov [rdi + 8], rax
    ret
.xor:
    mov rax, rsi
    xor rax, [rdi + 8]
    ret
.multiply:
    mov rax, [rdi + 8]
    imul rax, rax, 31
    inc rax
    mov [rdi + 8], rax
    ret
.shift:
    mov rax, [rdi + 8]
    mov ecx, esi
    rol rax, cl
    ret

; ---- an interpreter of register bytecode, threaded through a table ----
; registers at rbp, bytecode at rbx (operation and three registers, a byte each), memory at r13
ROUNDS equ 16000

align 16
interpreter_prepare:
    ret

align 16
interpreter_run:
    push r13
    push r12
    push rbp
    push rbx
    sub rsp, 8
    mov rbp, rdi
    lea r13, [rdi + 0x1000]
    lea rbx, [rel bytecode]
    lea r12, [rel operations]
    pxor xmm0, xmm0
    xor eax, eax
.clear:
    movups [rdi + rax], xmm0
    add rax, 16
    cmp rax, 0x1800
    jne .clear
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]

align 8
operations: dq operation.halt, operation.load_constant, operation.add, operation.xor, operation.multiply
    dq operation.shift, operation.load, operation.store, operation.decrement_branch

operation:
.load_constant:
    movzx eax, byte [rbx + 1]
    movzx edx, word [rbx + 2]
    mov [rbp + rax*8], rdx
    add rbx, 4
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]
.add:
    movzx eax, byte [rbx + 2]
    movzx edx, byte [rbx + 3]
    mov rcx, [rbp + rax*8]
    movzx eax, byte [rbx + 1]
    add rcx, [rbp + rdx*8]
    add rbx, 4
    mov [rbp + rax*8], rcx
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]
.xor:
    movzx eax, byte [rbx + 2]
    movzx edx, byte [rbx + 3]
    mov rcx, [rbp + rax*8]
    movzx eax, byte [rbx + 1]
    xor rcx, [rbp + rdx*8]
    add rbx, 4
    mov [rbp + rax*8], rcx
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]
.multiply:
    movzx eax, byte [rbx + 2]
    movzx edx, byte [rbx + 3]
    mov rcx, [rbp + rax*8]
    movzx eax, byte [rbx + 1]
    imul rcx, [rbp + rdx*8]
    add rbx, 4
    mov [rbp + rax*8], rcx
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]
.shift:
    movzx eax, byte [rbx + 2]
    movzx ecx, byte [rbx + 3]
    mov rdx, [rbp + rax*8]
    movzx eax, byte [rbx + 1]
    shr rdx, cl
    add rbx, 4
    mov [rbp + rax*8], rdx
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]
.load:
    movzx eax, byte [rbx + 2]
    mov rdx, [rbp + rax*8]
    movzx eax, byte [rbx + 1]
    and edx, 0xFF
    mov rdx, [r13 + rdx*8]
    add rbx, 4
    mov [rbp + rax*8], rdx
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]
.store:
    movzx eax, byte [rbx + 2]
    mov rdx, [rbp + rax*8]
    movzx eax, byte [rbx + 1]
    and edx, 0xFF
    mov rcx, [rbp + rax*8]
    add rbx, 4
    mov [r13 + rdx*8], rcx
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]
.decrement_branch:
    movzx eax, byte [rbx + 1]
    movsx rdx, byte [rbx + 2]
    mov rcx, [rbp + rax*8]
    dec rcx
    mov [rbp + rax*8], rcx
    lea rsi, [rbx + 4]
    lea rbx, [rbx + rdx*4]
    test rcx, rcx
    cmove rbx, rsi
    movzx eax, byte [rbx]
    jmp [r12 + rax*8]
.halt:
    mov rax, [rbp]
    add rsp, 8
    pop rbx
    pop rbp
    pop r12
    pop r13
    ret

bytecode:
    db 1, 1
    dw ROUNDS
    db 1, 2
    dw 40503
    db 2, 0, 0, 2                  ; r0 += r2
    db 4, 3, 0, 2                  ; r3 = r0 * r2
    db 5, 4, 3, 16                 ; r4 = r3 >> 16
    db 3, 0, 0, 4                  ; r0 ^= r4
    db 7, 0, 4, 0                  ; memory[r4] = r0
    db 6, 5, 3, 0                  ; r5 = memory[r3]
    db 2, 0, 0, 5                  ; r0 += r5
    db 8, 1, -7, 0                 ; if (--r1) again
    db 0, 0, 0, 0

; ---- more methods of the virtual calls, on a page of their own ----
align 4096
other_methods:
.compare:
    mov rax, [rdi + 8]
    cmp rax, rsi
    cmovl rax, rsi
    ret
.frame:
    push rbp
    mov rbp, rsp
    sub rsp, 16
    mov [rbp - 8], rsi
    mov rax, [rdi + 8]
    sub rax, [rbp - 8]
    leave
    ret
.swap:
    mov rax, [rdi + 8]
    bswap rax
    mov [rdi + 8], rax
    ret
.keep:
    mov [rdi + 8], rsi
    xor eax, eax
    ret
"""
