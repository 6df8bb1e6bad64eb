"""Instructions that a PV kernel may still use though they trap, as native code: `privileged.py` has every case."""

from __future__ import annotations

from trivisor.paravirt.xen.abi import FORCED_EMULATION
from trivisor.paravirt.xen.native_memory import guest_bytes
from trivisor.x86 import msr
from trivisor.x86.exceptions import GENERAL_PROTECTION, INVALID_OPCODE

_CPUID = b"\x0f\xa2"
_FORCED_CPUID = FORCED_EMULATION + _CPUID
assert len(_FORCED_CPUID) == 7

_CLI, _RDMSR = 0xFA, 0x320F
assert (msr.IA32_FS_BASE + 1, msr.IA32_FS_BASE + 2) == (msr.IA32_GS_BASE, msr.IA32_KERNEL_GS_BASE)

PRIVILEGED = f"""
; An exception that is no page fault: maybe of an instruction of the kernel's that is done for it.
xen_instruction_fault:
    cmp qword [rbx+X_IN_KERNEL], 0
    je xen_python
    cmp qword [rbp+EXIT_A], {GENERAL_PROTECTION}
    je xen_general_protection
    cmp qword [rbp+EXIT_A], {INVALID_OPCODE}
    jne xen_python
    ; CPUID behind the forced-emulation prefix
    {guest_bytes("[rbp+GUEST_RIP]", 8)}
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

; CLI and STI, which do nothing where ports may be used, and RDMSR of the bases of FS and GS.
xen_general_protection:
    cmp qword [rbp+EXIT_B], 0
    jne xen_python
    {guest_bytes("[rbp+GUEST_RIP]", 2)}
    movzx eax, word [rdi]
    cmp eax, {_RDMSR}
    je xen_rdmsr
    and al, 0xfe
    cmp al, {_CLI}
    jne xen_python
    mov rax, [rbx+X_IOPL]
    or rax, [rbx+X_IOPL_IN_FRAMES]
    jz xen_python
    inc qword [rbp+GUEST_RIP]
    jmp xen_privileged_done
xen_rdmsr:
    mov ecx, [rbp+GPR_RCX]
    sub ecx, {msr.IA32_FS_BASE}
    mov rax, [rbp+FS_BASE]
    jz xen_rdmsr_value
    mov rax, [rbp+GS_BASE]
    dec ecx
    jz xen_rdmsr_value
    mov rax, [rbp+KERNEL_GS_BASE]
    dec ecx
    jnz xen_python
xen_rdmsr_value:
    mov ecx, eax
    mov [rbp+GPR_RAX], rcx
    shr rax, 32
    mov [rbp+GPR_RDX], rax
    add qword [rbp+GUEST_RIP], 2
xen_privileged_done:
    inc qword [rbx+X_PRIVILEGED]
    jmp xen_instruction_done

; IN and OUT of a kernel that may use ports: none is there, so all of them read as ones.
supervisor_instruction:
    mov rbx, [rbp+SUPERVISOR_TABLE]
    cmp qword [rbp+IGNORE_CLI], 0
    je xen_python
    cmp qword [rbx+X_BREAKPOINTS], 0
    jne xen_python
    {guest_bytes("[rbp+GUEST_RIP]", 4)}
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
