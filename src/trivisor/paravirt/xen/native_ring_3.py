"""Hypercalls that need no hypervisor: answered in ring 3 by code of ours (`NativeSupervision.ring_3`).

What tells nothing new is told; what changes only what counts when the kernel is
left is noted, and minded then.  The kernel could write any note itself, so
notes are looked at as a hypercall's arguments are.
"""

from __future__ import annotations

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS

_VCPU_OP = HYPERCALL_NUMBERS["vcpu_op"]
_USER_ADDRESSES = 1 << 47

RING_3 = f"""
    cmp byte [rel in_kernel], 1
    jne ring_3_call
    cmp eax, {_VCPU_OP}
    je xen_ring_3_up
    cmp eax, {HYPERCALL_NUMBERS["stack_switch"]}
    je xen_ring_3_stack
    cmp eax, {HYPERCALL_NUMBERS["set_segment_base"]}
    jne ring_3_call
    cmp rdi, {abi.SEGBASE_GS_USER}
    jne ring_3_call
    cmp rsi, [rel xen_ring_3_last]
    ja ring_3_call
    mov [rel notes+32], rsi
    mov qword [rel notes+8], 1
    jmp ring_3_push
xen_ring_3_stack:
    mov [rel notes+16], rdi
    mov [rel notes+24], rsi
    mov qword [rel notes], 1
    jmp ring_3_push
xen_ring_3_up:
    ; whether a virtual processor is up: Linux asks once for each that it could have
    cmp rdi, {abi.VCPUOP_IS_UP}
    jne ring_3_call
ring_3_push:
    push r11
    cmp eax, {_VCPU_OP}
    mov eax, 0
    jne ring_3_answered
    inc eax
    test rsi, rsi
    jz ring_3_answered
    mov rax, -{abi.ENOENT}
    jmp ring_3_answered
xen_ring_3_last: dq {_USER_ADDRESSES - 1:#x}
"""

NOTES = f"""
; Ring 3 has noted the kernel's stack or the user's GS base, or both; rsi is where.
supervisor_notes:
    mov rbx, [rbp+SUPERVISOR_TABLE]
    cmp qword [rsi], 0
    je xen_notes_gs
    movzx eax, word [rsi+16]
    or eax, 3
    mov [rbx+X_KERNEL_STACK_SELECTOR], rax
    mov rax, [rsi+24]
    mov [rbx+X_KERNEL_STACK], rax
xen_notes_gs:
    cmp qword [rsi+8], 0
    je xen_notes_done
    mov rax, [rsi+32]
    mov rcx, {_USER_ADDRESSES:#x}
    cmp rax, rcx
    jae xen_notes_done
    mov [rbp+KERNEL_GS_BASE], rax
xen_notes_done:
    ret
"""
