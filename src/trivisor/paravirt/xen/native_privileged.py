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
    jne supervised_python
    cmp qword [rbx+X_IN_KERNEL], 0
    je supervised_python
    mov r13, [rbp+GUEST_RIP]
    mov eax, r13d
    and eax, 0xfff
    cmp eax, 4096-8
    ja supervised_python
    xor r12d, r12d
    call guest_page
    jnz supervised_python
    mov rax, [rdi]
    shl rax, 8
    mov rcx, {int.from_bytes(_FORCED_CPUID, "little") << 8:#x}
    cmp rax, rcx
    jne supervised_python
    call guest_cpuid
    jnz supervised_python
    inc qword [rbx+X_FORCED]
    add qword [rbp+GUEST_RIP], {len(_FORCED_CPUID)}
    call xen_event
    jnz xen_upcall
    jmp supervised_resume
"""
