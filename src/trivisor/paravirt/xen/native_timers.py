"""The singleshot timer as native code: the deadline waits in the shared table until Python looks at timers."""

from __future__ import annotations

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.native_memory import guest_bytes
from trivisor.paravirt.xen.timers import SET, STOPPED

TIMERS = f"""
; vcpu_op of the one processor: whether it is up, and its singleshot timer.
xen_vcpu_op:
    mov rcx, [rbp+GPR_RDI]
    cmp rcx, {abi.VCPUOP_IS_UP}
    je xen_is_up
    cmp qword [rbp+GPR_RSI], 0
    jne xen_python
    cmp rcx, {abi.VCPUOP_SET_SINGLESHOT_TIMER}
    je xen_set_single
    cmp rcx, {abi.VCPUOP_STOP_SINGLESHOT_TIMER}
    jne xen_python
    mov qword [rbx+X_SINGLE_CHANGE], {STOPPED}
    xor eax, eax
    jmp xen_done
xen_is_up:
    mov eax, 1
    mov rcx, -{abi.ENOENT}
    cmp qword [rbp+GPR_RSI], 0
    cmovne rax, rcx
    jmp xen_done

xen_set_single:
    {guest_bytes("[rbp+GPR_RDX]", 12)}
    mov r14, [rdi]
    test dword [rdi+8], {abi.VCPU_SSHOTTMR_FUTURE}
    jnz xen_python
    ; the system time, as `SystemTime.now`
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rax, [rbp+TSC_OFFSET]
    sub rax, [rbx+X_TIME_START]
    mov ecx, [rbx+X_TIME_LEFT]
    shl rax, cl
    mov ecx, [rbx+X_TIME_RIGHT]
    shr rax, cl
    mul qword [rbx+X_TIME_MULTIPLIER]
    shrd rax, rdx, 32
    mov [rbx+X_SINGLE], r14
    mov qword [rbx+X_SINGLE_CHANGE], {SET}
    mov rdi, r14
    xor ecx, ecx
    sub rdi, rax
    cmovb rdi, rcx
    call supervised_alarm
    xor eax, eax
    jmp xen_done
"""
