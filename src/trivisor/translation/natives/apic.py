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

; WRMSR of x2APIC registers: EOI, TPR, and ICR for an NMI to this processor that has to wait.
write_apic_msr:
    mov r11, [rsp+8+VIRTUAL_APIC]
    cmp qword [r11+APIC_X2APIC], 0
    je assist_escape
    cmp ecx, 0x830
    je write_apic_command
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

write_apic_command:
    mov r10d, eax
    and r10d, ~0x40ff
    cmp r10d, 0x400
    jne assist_escape
    cmp [r11+APIC_IDENTITY], edx
    jne assist_escape
    cmp qword [rsp+8+NMI_BLOCKED], 0
    je assist_escape
    mov r10d, eax
    mov [r11+APIC_COMMAND], r10
    mov r10d, edx
    mov [r11+APIC_DESTINATION], r10
    mov qword [rsp+8+NMI_WAITING], 1
    jmp write_apic_done

; A missed access whose page is not RAM: rdi = physical page.  That of the xAPIC's registers goes on with a host
; address where they have one: TPR's own, those of the ICR's halves, of which the first is hardly written here, and a
; place that nobody looks at for EOI, whose value does not matter.
miss_device:
    mov [rbp+MISS_DEVICE], rdi
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
    cmp eax, 0x300
    je miss_command
    cmp eax, 0x310
    je miss_destination
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
miss_command:
    lea r10, [r8+APIC_COMMAND]
    test r12b, KIND_WRITE
    jz miss_apic_done
    ; an NMI to this processor that has to wait, if a plain MOV's register says so
    cmp qword [rbp+NMI_BLOCKED], 0
    je miss_slow
    test byte [rbp+MODE], MODE_IS_USER
    jnz miss_slow
    mov rax, [rbx+8]
    mov rdx, rax
    and rax, -4096
    mov ecx, edx
    shr ecx, 12
    and ecx, EXEC_TLB_ENTRIES-1
    shl ecx, 4
    cmp [rbp+rcx+EXEC_TLB_KERNEL], rax
    jne miss_slow
    mov rsi, [rbp+rcx+EXEC_TLB_KERNEL+8]
    and rsi, -4096
    cmp rsi, [rbp+RAM_LOW_END]
    jae miss_slow
    add rsi, [rbp+RAM_BASE]
    and edx, 0xfff
    cmp edx, 4093
    ja miss_slow
    add rsi, rdx
    xor ecx, ecx
    movzx eax, byte [rsi]
    mov edx, eax
    and edx, 0xf0
    cmp edx, 0x40
    jne miss_command_opcode
    lea ecx, [rax+rax]
    and ecx, 8 ; REX.R
    movzx eax, byte [rsi+1]
    inc rsi
miss_command_opcode:
    xor edx, edx
    cmp eax, 0xa3 ; the accumulator, to an address of its own
    je miss_command_value
    cmp eax, 0x89
    jne miss_slow
    movzx edx, byte [rsi+1]
    shr edx, 3
    and edx, 7
    or edx, ecx
miss_command_value:
    mov eax, [rbp+rdx*8+GPR]
    and eax, ~0x40ff
    cmp eax, 0x40400
    je miss_command_waits
    cmp eax, 0x400
    jne miss_slow
    mov eax, [r8+APIC_DESTINATION]
    shr eax, 24
    cmp eax, [r8+APIC_IDENTITY]
    jne miss_slow
miss_command_waits:
    mov qword [rbp+NMI_WAITING], 1
    jmp miss_apic_done
miss_destination:
    lea r10, [r8+APIC_DESTINATION]
    and dword [r10], 0xff000000 ; what may be read of it
    jmp miss_apic_done
miss_tpr:
    lea r10, [r8+APIC_TPR]
    cmp qword [r8+APIC_TPR_FREE], 0
    jne miss_apic_done
    test r12b, KIND_WRITE
    jnz miss_slow
    jmp miss_apic_done
"""
