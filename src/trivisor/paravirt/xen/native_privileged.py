"""Instructions that a PV kernel may still use though they trap, as native code: `privileged.py` has every case."""

from __future__ import annotations

from trivisor.paravirt.xen.abi import FORCED_EMULATION
from trivisor.x86.exceptions import INVALID_OPCODE

_CPUID = b"\x0f\xa2"
_FORCED_CPUID = FORCED_EMULATION + _CPUID
assert len(_FORCED_CPUID) == 7

PRIVILEGED = f"""
; An exception that is no page fault: CPUID of the kernel's behind the forced-emulation prefix.
xen_instruction_fault:
    cmp qword [rbp+EXIT_A], {INVALID_OPCODE}
    jne xen_python
    cmp qword [rbx+X_IN_KERNEL], 0
    je xen_python
    mov r13, [rbp+GUEST_RIP]
    mov eax, r13d
    and eax, 0xfff
    cmp eax, 4096-8
    ja xen_python
    xor r12d, r12d
    call guest_page
    jnz xen_python
    mov rax, [rdi]
    shl rax, 8
    mov rcx, {int.from_bytes(_FORCED_CPUID, "little") << 8:#x}
    cmp rax, rcx
    jne xen_python
    call guest_cpuid
    jnz xen_python
    inc qword [rbx+X_FORCED]
    add qword [rbp+GUEST_RIP], {len(_FORCED_CPUID)}
xen_instruction_done:
    call xen_event
    jnz xen_upcall
    jmp supervised_resume

; IN and OUT of a kernel that may use ports: none is there, so all of them read as ones.
supervisor_instruction:
    mov rbx, [rbp+SUPERVISOR_TABLE]
    cmp qword [rbp+IGNORE_CLI], 0
    je xen_python
    cmp qword [rbx+X_BREAKPOINTS], 0
    jne xen_python
    mov r13, [rbp+GUEST_RIP]
    mov eax, r13d
    and eax, 0xfff
    cmp eax, 4096-4
    ja xen_python
    xor r12d, r12d
    call guest_page
    jnz xen_python
    mov eax, [rdi]
    mov ecx, 1 ; the instruction's length
    mov edx, 0xffffffff ; what EAX gets
    cmp al, 0x66
    jne xen_port_opcode
    inc ecx
    movzx edx, dx
    shr eax, 8
xen_port_opcode:
    mov esi, eax
    and esi, 0xf4
    cmp esi, 0xe4
    jne xen_python
    test al, 8
    jnz xen_port_sized ; by DX
    inc ecx
xen_port_sized:
    test al, 2
    jnz xen_port_done ; OUT
    test al, 1
    jnz xen_port_in
    movzx edx, dl
xen_port_in:
    mov esi, [rbp+GPR_RAX]
    or esi, edx
    mov [rbp+GPR_RAX], esi
    inc edx
    jnz xen_port_done
    mov [rbp+GPR_RAX+4], edx ; all of RAX
xen_port_done:
    inc qword [rbx+X_PORTS]
    add [rbp+GUEST_RIP], rcx
    jmp xen_instruction_done
"""
