"""multicall as native code: each entry by the native code of its hypercall (`hypercalls/control.py`).

An entry that Python has to do leaves it the rest of the multicall, as if the guest had called for that.
"""

from __future__ import annotations

from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.paravirt.xen.hypercalls.control import BEGUN, CALLS_AT_A_TIME, DONE, MULTICALL_SIZE
from trivisor.paravirt.xen.native_memory import guest_bytes
from trivisor.paravirt.xen.page_tables import TABLES_AT_A_TIME
from trivisor.paravirt.xen.shared_table import ARGUMENTS

_REGISTERS = ("RAX", *ARGUMENTS)


def multicall(hypercalls: tuple[str, ...]) -> str:
    """The code for entries that are one of `hypercalls`, which begin at xen_NAME and end at xen_done or xen_python."""
    return f"""
xen_multicall:
    mov ecx, [rbp+GPR_RSI]
    xor eax, eax
    test ecx, ecx
    jz xen_done
    cmp ecx, {CALLS_AT_A_TIME}
    ja xen_python
    mov rax, [rbp+GPR_RDI]
    mov [rbx+X_CALLS_AT], rax
    {"".join(f'''
    mov rax, [rbp+GPR_{name}]
    mov [rbx+X_CALLS_{name}], rax''' for name in ARGUMENTS)}
    mov [rbx+X_CALLS_LEFT], rcx
xen_multicall_entry:
    ; that its result can be written is seen before
    {guest_bytes("[rbx+X_CALLS_AT]", MULTICALL_SIZE, write=True, otherwise="xen_multicall_rest")}
    {"".join(f'''
    mov rax, [rdi+{16 + 8 * number}]
    mov [rbp+GPR_{name}], rax''' for number, name in enumerate(ARGUMENTS))}
    mov rax, [rdi]
    mov [rbp+GPR_RAX], rax
    {"".join(f'''
    cmp rax, {HYPERCALL_NUMBERS[name]}
    je xen_{name}''' for name in hypercalls)}
    jmp xen_multicall_rest

; An entry is done with result rax.
xen_multicall_done:
    push rax
    mov r13, [rbx+X_CALLS_AT]
    mov r12d, 1
    call guest_page
    pop rax
    jnz xen_multicall_owed
    mov [rdi+8], rax
    add qword [rbx+X_CALLS_AT], {MULTICALL_SIZE}
    dec qword [rbx+X_CALLS_LEFT]
    jz xen_multicall_ends
    cmp qword [rbx+X_TABLES], {TABLES_AT_A_TIME}
    jb xen_multicall_entry
    jmp xen_multicall_rest
xen_multicall_ends:
    call xen_multicall_registers
    xor eax, eax
    jmp xen_done
xen_multicall_owed:
    ; the entry has changed what was mapped there
    mov [rbx+X_CALL_RAX], rax
    mov qword [rbx+X_CALLS_BEGUN], {DONE}
    jmp xen_multicall_rest

; Python is to do a hypercall; or an entry of a multicall, as it stands in the registers, and all that follow.
xen_python:
    cmp qword [rbx+X_CALLS_LEFT], 0
    je supervised_leave
    {"".join(f'''
    mov rax, [rbp+GPR_{name}]
    mov [rbx+X_CALL_{name}], rax''' for name in _REGISTERS)}
    mov qword [rbx+X_CALLS_BEGUN], {BEGUN}
xen_multicall_rest:
    call xen_multicall_registers
    mov rax, [rbx+X_CALLS_AT]
    mov [rbp+GPR_RDI], rax
    xor eax, eax
    xchg rax, [rbx+X_CALLS_LEFT]
    mov [rbp+GPR_RSI], rax
    jmp supervised_leave

; The guest's registers as it made the multicall.
xen_multicall_registers:
    {"".join(f'''
    mov rax, [rbx+X_CALLS_{name}]
    mov [rbp+GPR_{name}], rax''' for name in ARGUMENTS)}
    mov qword [rbp+GPR_RAX], {HYPERCALL_NUMBERS["multicall"]}
    ret
"""
