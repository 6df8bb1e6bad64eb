"""The most frequent hypercalls, as native code of the engine's (`machine.deprivileged.NativeSupervision`).

Each does the common case, and leaves everything else to Python before
anything has changed; Python does all cases, and says what is right.  Page
tables have files of their own.
Conventions: rbp is the processor's state, rbx the shared table.
"""

from __future__ import annotations

from trivisor.machine.deprivileged import NativeSupervision
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import FLAT_RING3_CS64, FLAT_RING3_SS, HYPERCALL_NUMBERS, LAST_XEN_SLOT
from trivisor.paravirt.xen.cpuid import VERSION
from trivisor.paravirt.xen.frames import DOMAIN, L4
from trivisor.paravirt.xen.native_frames import FRAMES
from trivisor.paravirt.xen.native_memory import guest_bytes
from trivisor.paravirt.xen.native_multicall import multicall
from trivisor.paravirt.xen.native_page_tables import PAGE_TABLES
from trivisor.paravirt.xen.native_privileged import PRIVILEGED
from trivisor.paravirt.xen.native_ring_3 import NOTES, RING_3
from trivisor.paravirt.xen.native_table_writes import TABLE_WRITES
from trivisor.paravirt.xen.native_timers import TIMERS
from trivisor.paravirt.xen.native_traps import SET_FLAT, TRAPS
from trivisor.paravirt.xen.page_tables import ACCESSED, DIRTY
from trivisor.paravirt.xen.shared_table import SYMBOLS, SharedTable


def _equ(symbols: dict[str, int]) -> str:
    return "\n".join(f"{name} equ {value}" for name, value in symbols.items())


_DISPATCH = (
    "mmu_update", "mmuext_op", "update_va_mapping", "vcpu_op", "set_segment_base", "stack_switch", "xen_version",
)  # fmt: skip
"""Hypercalls that are done natively, in a multicall too."""

_CALL = f"""
; SYSCALL by the guest's kernel: a hypercall.
supervisor_call:
    mov rbx, [rbp+SUPERVISOR_TABLE]
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov [rbx+X_STARTED], rax
    mov eax, [rbp+GPR_RAX]
    mov [rbx+X_NUMBER], rax
    mov qword [rbx+X_TABLES], 0
    {"".join(f'''
    cmp eax, {HYPERCALL_NUMBERS[name]}
    je xen_{name}''' for name in (*_DISPATCH, "iret", "multicall"))}
    jmp xen_python

; The hypercall is done with result rax.
xen_done:
    cmp qword [rbx+X_CALLS_LEFT], 0
    jne xen_multicall_done
    mov [rbp+GPR_RAX], rax
    mov qword [rbp+CS_SELECTOR], {FLAT_RING3_CS64}
    mov qword [rbp+SS_SELECTOR], {FLAT_RING3_SS}
    {SET_FLAT}
    call xen_account
    call xen_event
    je supervised_following
    ; the upcall comes after the SYSCALL, too
    call gather_flags
    mov [rbp+GPR_R11], rax
    mov rax, [rbp+GUEST_RIP]
    add rax, 2
    mov [rbp+GPR_RCX], rax
    mov [rbp+GUEST_RIP], rax
    jmp xen_upcall

; Count the hypercall and its time.
xen_account:
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [rbx+X_STARTED]
    mov ecx, [rbx+X_NUMBER]
    add [rbx+rcx*8+X_TICKS], rax
    inc qword [rbx+rcx*8+X_COUNTS]
    ret

; ZF clear if an event waits and is not masked.
xen_event:
    mov rdx, [rbx+X_VCPU_INFO]
    cmp byte [rdx], 0
    je xen_event_none
    cmp byte [rdx+1], 0
    sete al
    test al, al
xen_event_none:
    ret

xen_xen_version:
    cmp qword [rbp+GPR_RDI], {abi.XENVER_VERSION}
    jne xen_python
    mov eax, {VERSION[0] << 16 | VERSION[1]}
    jmp xen_done

xen_stack_switch:
    movzx eax, word [rbp+GPR_RDI]
    or eax, 3
    mov [rbx+X_KERNEL_STACK_SELECTOR], rax
    mov rax, [rbp+GPR_RSI]
    mov [rbx+X_KERNEL_STACK], rax
    xor eax, eax
    jmp xen_done

xen_set_segment_base:
    mov rax, [rbp+GPR_RSI]
    cmp qword [rbp+GPR_RDI], {abi.SEGBASE_GS_USER_SEL}
    je xen_gs_user_selector
    mov rcx, rax
    sar rcx, 47
    inc rcx
    cmp rcx, 1
    ja xen_python
    mov rcx, [rbp+GPR_RDI]
    cmp rcx, {abi.SEGBASE_FS}
    je xen_fs_base
    cmp rcx, {abi.SEGBASE_GS_USER}
    je xen_gs_user_base
    cmp rcx, {abi.SEGBASE_GS_KERNEL}
    jne xen_python
    mov [rbp+GS_BASE], rax
    xor eax, eax
    jmp xen_done
xen_fs_base:
    mov [rbp+FS_BASE], rax
    xor eax, eax
    jmp xen_done
xen_gs_user_base:
    mov [rbp+KERNEL_GS_BASE], rax
    xor eax, eax
    jmp xen_done
xen_gs_user_selector:
    test eax, 0xfffc ; only the null ones
    jnz xen_python
    movzx eax, ax
    mov [rbp+GS_SELECTOR], rax
    xor eax, eax
    mov [rbp+GS_LIMIT], rax
    mov [rbp+GS_ATTRIBUTES], rax
    mov [rbp+KERNEL_GS_BASE], rax
    jmp xen_done
"""

_COMPARED = 8
"""Entries at a time."""
assert (511 - LAST_XEN_SLOT) % _COMPARED == 0

_SPACES = f"""
; mmuext_op: one or two operations that change the address space, flush, or forget a page.
xen_mmuext_op:
    mov r15d, [rbp+GPR_RSI]
    lea eax, [r15-1]
    cmp eax, 1
    ja xen_pins
    cmp qword [rbp+GPR_RDX], 0
    jne xen_python
    cmp qword [rbp+GPR_R10], {abi.DOMID_SELF}
    jne xen_python
    {guest_bytes("[rbp+GPR_RDI]", 48)}
    mov r8, [rbx+X_FRAME_KIND_COUNT]
    mov r9, [rbx+X_FRAME_REFERENCES]
    ; first see whether all can be done
    mov rsi, rdi
    mov ecx, r15d
xen_extended_look:
    mov eax, [rsi]
    mov rdx, [rsi+8]
    cmp eax, {abi.MMUEXT_NEW_BASEPTR}
    je xen_extended_root
    cmp eax, {abi.MMUEXT_NEW_USER_BASEPTR}
    je xen_extended_user_root
    cmp eax, {abi.MMUEXT_TLB_FLUSH_LOCAL}
    je xen_extended_next
    cmp eax, {abi.MMUEXT_INVLPG_LOCAL}
    jne xen_pins
    jmp xen_extended_next
xen_extended_root:
    mov r10, [rbx+X_KERNEL_ROOT]
    lea r11, [rbx+X_LINGERING_KERNEL]
    jmp xen_extended_table
xen_extended_user_root:
    mov r10, [rbx+X_USER_ROOT]
    lea r11, [rbx+X_LINGERING_USER]
    test rdx, rdx
    jz xen_extended_old
xen_extended_table:
    cmp rdx, r10
    je xen_extended_next
    ; the new one is a validated table; the old one stays one without this reference, or lingers
    cmp rdx, [rbx+X_FRAME_COUNT]
    jae xen_python
    mov rax, [rbx+X_FRAME_OWNER]
    cmp byte [rax+rdx], {DOMAIN}
    jne xen_python
    mov rax, [rbx+X_FRAME_KIND]
    cmp byte [rax+rdx], {L4}
    jne xen_python
    cmp qword [r8+rdx*8], 0
    je xen_python
xen_extended_old:
    test r10, r10
    jz xen_extended_next
    mov rax, [rbx+X_USER_ROOT]
    cmp rax, [rbx+X_KERNEL_ROOT]
    je xen_python
    cmp qword [r8+r10*8], 2
    jae xen_extended_next
    cmp qword [r11], 0
    jne xen_python
xen_extended_next:
    add rsi, 24
    dec ecx
    jnz xen_extended_look
    mov r12, rdi
xen_extended_do:
    mov eax, [r12]
    mov rdx, [r12+8]
    cmp eax, {abi.MMUEXT_NEW_BASEPTR}
    je xen_new_root
    cmp eax, {abi.MMUEXT_NEW_USER_BASEPTR}
    je xen_new_user_root
    cmp eax, {abi.MMUEXT_TLB_FLUSH_LOCAL}
    je xen_flush
    mov rsi, rdx
    sar rdx, 47
    inc rdx
    cmp rdx, 1
    ja xen_extended_done
    call xen_forget_page
    jmp xen_extended_done
xen_new_root:
    mov r10, [rbx+X_KERNEL_ROOT]
    mov [rbx+X_KERNEL_ROOT], rdx
    lea rsi, [rbx+X_LINGERING_KERNEL]
    call xen_exchange
    shl rdx, 12
    mov [rbp+GUEST_CR3], rdx
    mov [rbp+ROOT_KERNEL], rdx
    ; the kernel's half is the same: what TLBs have of it is as good as it was
    cmp qword [rbx+X_STALE], 0
    jne xen_flush
    shl r10, 12
    add r10, [rbp+RAM_BASE]
    add rdx, [rbp+RAM_BASE]
    lea rsi, [r10+8*{LAST_XEN_SLOT + 1}]
    lea rdi, [rdx+8*{LAST_XEN_SLOT + 1}]
    mov ecx, {(511 - LAST_XEN_SLOT) // _COMPARED}
xen_same_half:
    xor eax, eax
    {"".join(f'''
    mov r8, [rsi+{at}]
    xor r8, [rdi+{at}]
    or rax, r8''' for at in range(0, 8 * _COMPARED, 8))}
    and rax, {~(ACCESSED | DIRTY)}
    jnz xen_other_half
    add rsi, {8 * _COMPARED}
    add rdi, {8 * _COMPARED}
    dec ecx
    jnz xen_same_half
    call supervised_flush_lower
    jmp xen_extended_done
xen_other_half:
    mov qword [rbx+X_STALE], 1
xen_flush:
    call xen_forget
    jmp xen_extended_done
xen_new_user_root:
    mov r10, [rbx+X_USER_ROOT]
    mov [rbx+X_USER_ROOT], rdx
    lea rsi, [rbx+X_LINGERING_USER]
    call xen_exchange
xen_extended_done:
    add r12, 24
    dec r15d
    jnz xen_extended_do
    xor eax, eax
    jmp xen_done

; The processor's reference goes from the table in frame r10 to the one in frame rdx (0: none).  If it was the last
; use as a table, it goes to the place at rsi instead.
xen_exchange:
    cmp r10, rdx
    je xen_exchanged
    mov r8, [rbx+X_FRAME_KIND_COUNT]
    mov r9, [rbx+X_FRAME_REFERENCES]
    test rdx, rdx
    jz xen_exchange_old
    inc qword [r8+rdx*8]
    inc qword [r9+rdx*8]
xen_exchange_old:
    test r10, r10
    jz xen_exchanged
    cmp qword [r8+r10*8], 1
    je xen_lingers
    dec qword [r8+r10*8]
    dec qword [r9+r10*8]
xen_exchanged:
    ret
xen_lingers:
    mov [rsi], r10
    ret
"""

def native_supervision(table: SharedTable) -> NativeSupervision:
    """The hypervisor's native code, over `table`."""
    parts = (
        _equ(SYMBOLS), _CALL, multicall(_DISPATCH), _SPACES, PAGE_TABLES, FRAMES, TABLE_WRITES, TRAPS, PRIVILEGED,
        TIMERS, NOTES,
    )  # fmt: skip
    return NativeSupervision("\n".join(parts), table.address, RING_3)
