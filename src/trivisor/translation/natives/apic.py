"""The task priority and the end of interrupts without Python, where nothing comes of them (machine/virtual_apic.py)."""

from __future__ import annotations

APIC = """
; CR8 into r10.
read_cr8:
    cmp byte [rsp+8+CPL], 0
    jne assist_escape
    mov r10, [rsp+8+VIRTUAL_APIC]
    movzx r10d, byte [r10+APIC_TPR]
    shr r10d, 4
    inc qword [rsp+8+COUNT_CR8]
    ret

; r10 into CR8.
write_cr8:
    cmp byte [rsp+8+CPL], 0
    jne assist_escape
    cmp r10, 15
    ja assist_escape
    mov r11, [rsp+8+VIRTUAL_APIC]
    cmp qword [r11+APIC_TPR_FREE], 0
    je assist_escape
    shl r10d, 4
    mov [r11+APIC_TPR], r10
    inc qword [rsp+8+COUNT_CR8]
    ret

; WRMSR of x2APIC registers: EOI and TPR.
write_apic_msr:
    mov r11, [rsp+8+VIRTUAL_APIC]
    cmp qword [r11+APIC_X2APIC], 0
    je assist_escape
    test edx, edx
    jnz assist_escape
    cmp ecx, 0x80b
    jne write_apic_tpr
    test eax, eax
    jnz assist_escape
    mov r10, [r11+APIC_END]
    cmp r10, END_READY
    jb assist_escape
    jne write_apic_not_ready
    mov qword [r11+APIC_END], END_DONE
write_apic_done:
    inc qword [rsp+8+COUNT_APIC]
    ret
write_apic_not_ready:
    cmp r10, END_DONE
    je assist_escape
    jmp write_apic_done
write_apic_tpr:
    cmp ecx, 0x808
    jne assist_escape
    cmp eax, 0xff
    ja assist_escape
    cmp qword [r11+APIC_TPR_FREE], 0
    je assist_escape
    mov r10d, eax
    mov [r11+APIC_TPR], r10
    jmp write_apic_done

; A missed access whose page is not RAM: rdi = physical page.  That of the xAPIC's registers goes on with a host
; address where they have one: TPR's own, and a place that nobody looks at for EOI, whose value does not matter.
miss_device:
    mov r8, [rbp+VIRTUAL_APIC]
    cmp rdi, [r8+APIC_WINDOW]
    jne miss_slow
    cmp qword [rbp+NATIVE_MMIO], 0
    je miss_slow
    test r12d, KIND_CHUNK
    jnz miss_slow
    cmp word [rbx+6], 4
    jne miss_slow
    mov eax, r13d
    and eax, 0xfff
    cmp eax, 0x80
    je miss_tpr
    cmp eax, 0xb0
    jne miss_slow
    test r12b, KIND_WRITE
    jz miss_slow
    mov rax, [r8+APIC_END]
    cmp rax, END_READY
    jb miss_slow
    jne miss_end_not_ready
    mov qword [r8+APIC_END], END_DONE
miss_end:
    mov qword [rbp+SLOT], 0
    lea r10, [rbp+SLOT]
miss_apic_done:
    inc qword [rbp+COUNT_APIC]
    mov eax, [rbx+16]
    sub rbx, rax
    jmp miss_go
miss_end_not_ready:
    cmp rax, END_DONE
    je miss_slow
    jmp miss_end
miss_tpr:
    lea r10, [r8+APIC_TPR]
    cmp qword [r8+APIC_TPR_FREE], 0
    jne miss_apic_done
    test r12b, KIND_WRITE
    jnz miss_slow
    jmp miss_apic_done
"""
