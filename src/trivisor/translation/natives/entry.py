"""Between Python and translated code: the way in, and the ways out."""

from __future__ import annotations

from trivisor.translation.natives.common import fill, spill

ENTER_LEAVE = f"""
; enter(rdi = state, rsi = where): C calling convention; returns the exit's number
enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rdi+HOST_RSP], rsp
    mov rsp, rdi
    mov [rsp+SCRATCH_3], rsi
    mov eax, XSAVE_MASK
    xor edx, edx
    RESTORE_FPU [rsp+FPU]
    push qword [rsp+FLAGS]
    popfq
    {fill()}
    mov r10, [rsp+HOST_R10]
    jmp qword [rsp+SCRATCH_3]

; Leave to Python: EXIT and RIP are set, guest registers are in the host's.
leave_native:
    pushfq
    pop qword [rsp+FLAGS]
    {spill(0)}
leave_spilled:
    cld
    and qword [rsp+FLAGS], HOST_FLAGS
    mov eax, XSAVE_MASK
    xor edx, edx
    SAVE_FPU [rsp+FPU]
    CLEAN_UPPER
    fninit
    ldmxcsr [rel default_mxcsr]
    mov eax, [rsp+EXIT]
    mov rsp, [rsp+HOST_RSP]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    align 4
default_mxcsr: dd 0x1f80

; A host signal struck translated code; the signal handler sent us here with all registers as they were.
fault_leave:
    mov qword [rsp+EXIT], EXIT_HOST_FAULT
    jmp leave_native

; call [CALL_OUT]; dq rip: Python does the instruction at rip.
call_out:
    pushfq
    pop qword [rsp+8+FLAGS]
    {spill(8)}
    pop rbx
    mov rax, [rbx]
    mov [rsp+GUEST_RIP], rax
    mov qword [rsp+EXIT], EXIT_CALL_OUT
    cmp qword [rsp+SUPERVISED], 0
    jne supervised_instruction
    jmp leave_spilled

; call [ESCAPE]; dq rip; dd kind: the same from the middle of an instruction, with the flags maybe parked.
escape:
    {spill(8)}
    pop rbx
    mov rbp, rsp
    mov r12d, [rbx+8]
    sub rbx, 8
    call miss_flags
    mov qword [rbp+EXIT], EXIT_CALL_OUT
    jmp leave_spilled

; call [FAULT_GP]; dq rip; dd kind: the instruction raises #GP(0), as a check has found; #SS(0), #DE,
; #UD and #NM likewise.
fault_gp:
    mov qword [rsp+8+EXIT_A], 13
    jmp fault_inside
fault_de:
    mov qword [rsp+8+EXIT_A], 0
    jmp fault_inside
fault_ud:
    mov qword [rsp+8+EXIT_A], 6
    jmp fault_inside
fault_nm:
    mov qword [rsp+8+EXIT_A], 7
    jmp fault_inside
fault_ss:
    mov qword [rsp+8+EXIT_A], 12
fault_inside:
    {spill(8)}
    pop rbx
    mov rbp, rsp
    mov r12d, [rbx+8]
    sub rbx, 8
    call miss_flags
    cmp qword [rbp+EXIT_A], 7
    ja fault_of_segment
    mov qword [rbp+EXIT_B], -1
    jmp deliver
fault_of_segment:
    mov qword [rbp+EXIT], EXIT_SEGMENT_FAULT
    jmp leave_spilled
"""
