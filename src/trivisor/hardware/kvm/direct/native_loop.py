"""The run loop's frequent part as machine code: KVM_RUN, what the supervisor does natively, and KVM_RUN again.

It goes to the supervisor's own code (`machine.deprivileged.NativeSupervision`),
which comes back here; what that calls is in `native_services.py`.  Behind a
page of words (`native_words.py`) the run structure is mapped once more.  Only
system calls, page faults and #GP are looked at here; every other exit is
Python's.
"""

from __future__ import annotations

from typing import Final

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.direct.native_services import SERVICES, SLOT_BITS
from trivisor.hardware.kvm.direct.native_words import CHANGED, GENERAL, MANY_CHANGED, RUN_GENERAL, SYMBOLS
from trivisor.hardware.kvm.direct.stub import AT_A_TIME
from trivisor.machine.memory import PAGE_SIZE
from trivisor.x86.assembler import assemble
from trivisor.x86.exceptions import GENERAL_PROTECTION, PAGE_FAULT
from trivisor.x86.flags import AC, DF, ID, NT, RF, STATUS, TF

EXIT, ON, ASKS = range(3)
"""How it ends: at an exit that is Python's; with registers in the run structure that KVM is to go on with; or the same
once timers and interrupts were looked at.  A negative number is an error of KVM_RUN's."""

_IOCTL: Final = 16
_HOST_FLAGS: Final = STATUS | DF
_SYSTEM_FLAGS: Final = TF | NT | RF | AC | ID
_UNUSABLE: Final = 1 << 48
"""The last word of a null segment (struct kvm_segment)."""
_AFTER_ENTRIES: Final = 8
"""Words on the stub's stack above the entries: where to go on, rax, rdi, and the frame for ring 3 (`stub.py`)."""


def _copy(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(f"    mov rax, [rbp+{source}]\n    mov [rbp+{target}], rax" for target, source in pairs)


_FORGET_NOTES: Final = """
    xor ecx, ecx
    mov [rsi], rcx
    mov [rsi+8], rcx
"""
_TO_RUN: Final = _copy([(f"RUN_{name}", f"GPR_{name}") for name in GENERAL])
_FROM_RUN: Final = _copy([(f"GPR_{name}", f"RUN_{name}") for name in GENERAL])

_LOOP = f"""
; int run(words)
run:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rbp, rdi
    mov [rbp+HOST_RSP], rsp
    mov rsi, [rbp+NOTES_AT]
    {_FORGET_NOTES}
    mov rsi, [rbp+IN_KERNEL_AT]
    mov rax, [rbp+GUEST_KERNEL]
    mov [rsi], al
enter:
    mov edi, [rbp+DESCRIPTOR]
    mov esi, {abi.RUN}
    xor edx, edx
    mov eax, {_IOCTL}
    syscall
    mov rsi, [rbp+NOTES_AT]
    mov rcx, [rsi]
    or rcx, [rsi+8]
    jnz noted
ran:
    test rax, rax
    js leave
    mov rcx, [rbp+RUN_RIP]
    cmp dword [rbp+EXIT_REASON], {abi.EXIT_IO}
    jne stopped
    cmp rcx, [rbp+STOP]
    je system_call
    cmp rcx, [rbp+BEHIND_STOP]
    jne leave_exit
system_call:
    mov r8, [rbp+RUN_RCX]
    mov rax, r8
    sar rax, 47
    inc rax
    cmp rax, 1 ; the instruction after it has no address
    ja leave_exit
    mov rdx, [rbp+RUN_R11]
    call shown
    sub r8, 2
    mov [rbp+GUEST_RIP], r8
    lea rax, [rbp+CALLS]
    mov [rbp+COUNTER], rax
    inc qword [rax]
    cmp qword [rbp+GUEST_KERNEL], 0
    jne supervisor_call
    jmp supervisor_user_call

; Ring 3 has noted something.  Since it was entered all of it has run as the guest's kernel, or none of it.
noted:
    push rax
    cmp qword [rbp+GUEST_KERNEL], 0
    je noted_by_user
    call supervisor_notes
    mov rsi, [rbp+NOTES_AT]
noted_by_user:
    {_FORGET_NOTES}
    pop rax
    jmp ran

; At a HLT of the stub's: an exception of ring 3's?
stopped:
    cmp dword [rbp+EXIT_REASON], {abi.EXIT_HLT}
    jne leave_exit
    mov r8, [rbp+STACK_END] ; below it: error code, rip, cs, rflags, rsp, ss
    test byte [r8-32], 3
    jz leave_exit
    mov r9, [r8-40]
    mov rax, r9
    and rax, -{PAGE_SIZE}
    cmp rax, [rbp+ENTRY_PAGE]
    je leave_exit
    mov r10d, {GENERAL_PROTECTION}
    cmp rcx, [rbp+PROTECTION_STOP]
    je exception
    cmp rcx, [rbp+FAULT_STOP]
    jne leave_exit
    mov r10d, {PAGE_FAULT}
    mov rax, [rbp+GUEST_CR2]
    shr rax, {SLOT_BITS}
    cmp rax, [rbp+HIDDEN]
    je leave_exit
exception:
    mov rdx, [r8-24]
    call shown
    mov [rbp+GUEST_RIP], r9
    mov [rbp+EXIT_A], r10
    mov eax, [r8-48]
    mov [rbp+EXIT_B], rax
    movzx eax, word [r8-32]
    mov [rbp+CS_SELECTOR], rax
    movzx eax, word [r8-8]
    mov [rbp+SS_SELECTOR], rax
    mov rax, [r8-16]
    mov [rbp+GPR_RSP], rax
    lea rax, [rbp+r10*8+EXCEPTIONS]
    mov [rbp+COUNTER], rax
    inc qword [rax]
    jmp supervisor_exception

; Take the registers from where KVM shows them, and flags rdx.
shown:
    mov eax, edx
    and eax, HOST_FLAGS
    mov [rbp+FLAGS], rax
    and edx, {_SYSTEM_FLAGS}
    mov [rbp+SYSTEM_FLAGS], rdx
    {_FROM_RUN}
    movzx eax, word [rbp+RUN_CS+SELECTOR]
    mov [rbp+CS_SELECTOR], rax
    movzx eax, word [rbp+RUN_SS+SELECTOR]
    mov [rbp+SS_SELECTOR], rax
    movzx eax, word [rbp+RUN_GS+SELECTOR]
    mov [rbp+GS_SELECTOR], rax
    mov rax, [rbp+FS_BASE]
    mov [rbp+SHOWN_FS], rax
    mov rax, [rbp+GS_BASE]
    mov [rbp+SHOWN_GS], rax
    mov rax, [rbp+GUEST_CR3]
    mov [rbp+SHOWN_CR3], rax
    ret

; Python does the exit as if it were new; but of a list of operations it may be what is left.
supervised_leave:
    mov rax, [rbp+COUNTER]
    dec qword [rax]
    {_TO_RUN}
leave_exit:
    mov eax, {EXIT}
leave:
    mov rsp, [rbp+HOST_RSP]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

supervised_following:
    call gather_flags
    mov [rbp+GPR_R11], rax
    mov rax, [rbp+GUEST_RIP]
    add rax, 2
    mov [rbp+GPR_RCX], rax
    mov [rbp+GUEST_RIP], rax
supervised_resume:
    mov rsp, [rbp+HOST_RSP]
    call load
    mov rax, [rbp+GUEST_RIP]
    sar rax, 47
    inc rax
    cmp rax, 1
    ja leave_on ; to no address
    cmp qword [rbp+LOOK_WANTED], 0
    jne leave_asking
    mov ecx, [rbp+CHANGED_COUNT]
    mov rax, [rbp+FLUSH_WANTED]
    or rax, [rbp+AT_ONCE]
    jz few_changed
    mov rax, [rbp+FLUSH_IS_PYTHONS]
    or rax, [rbp+CHANGED_TABLES_COUNT]
    jnz leave_on
    test ecx, ecx
    jnz through_stub
    mov qword [rbp+FLUSH_WANTED], 0
    mov qword [rbp+AT_ONCE], 0
few_changed:
    cmp ecx, {MANY_CHANGED}
    jb enter
leave_on:
    mov eax, {ON}
    jmp leave

; As `DirectVcpu._through_stub`: have the stub write the ecx entries that have changed.
through_stub:
    cmp ecx, {AT_A_TIME}
    ja leave_on
    inc qword [rbp+STUB_RUNS]
    add [rbp+REWRITTEN], rcx
    mov qword [rbp+CHANGED_COUNT], 0
    mov qword [rbp+FLUSH_WANTED], 0
    mov qword [rbp+AT_ONCE], 0
    lea rdx, [rcx*8+{8 * _AFTER_ENTRIES}]
    mov rdi, [rbp+STACK_END]
    sub rdi, rdx
    mov rax, [rbp+STUB_STACK]
    sub rax, rdx
    mov [rbp+RUN_RSP], rax
    imul rax, rcx, -1
    imul rax, [rbp+ENTRY_STEP]
    add rax, [rbp+ENTRIES_END]
    xchg rax, [rbp+RUN_RIP]
    mov [rdi+rcx*8+24], rax
    lea rsi, [rbp+{8 * CHANGED}]
    mov r8, [rbp+STUB_MAP]
through_stub_next:
    mov rax, [rsi]
    add rax, r8
    mov [rdi], rax
    add rsi, 8
    add rdi, 8
    dec ecx
    jnz through_stub_next
    mov rax, [rbp+STUB_LEAVE]
    mov [rdi], rax
    mov rax, [rbp+GPR_RAX]
    mov [rdi+8], rax
    mov rax, [rbp+GPR_RDI]
    mov [rdi+16], rax
    mov rax, [rbp+CS_SELECTOR]
    mov [rdi+32], rax
    mov eax, 2
    xchg rax, [rbp+RUN_FLAGS]
    mov [rdi+40], rax
    mov rax, [rbp+GPR_RSP]
    mov [rdi+48], rax
    mov rax, [rbp+SS_SELECTOR]
    mov [rdi+56], rax
    mov eax, [rbp+RING_0_CODE+SELECTOR]
    lea rsi, [rbp+RING_0_CODE]
    lea rdi, [rbp+RUN_CS]
    call load_segment
    mov eax, [rbp+RING_0_STACK+SELECTOR]
    lea rsi, [rbp+RING_0_STACK]
    lea rdi, [rbp+RUN_SS]
    call load_segment
    or qword [rbp+DIRTY_REGS], rdx
    jmp enter

supervised_interrupt:
    mov rsp, [rbp+HOST_RSP]
    call load
leave_asking:
    mov eax, {ASKS}
    jmp leave

; Have KVM load the registers; all but general ones only if they have changed.
load:
    {_TO_RUN}
    call gather_flags
    mov [rbp+RUN_FLAGS], rax
    mov rax, [rbp+GUEST_RIP]
    mov [rbp+RUN_RIP], rax
    xor edx, edx
    mov rax, [rbp+CS_SELECTOR]
    cmp [rbp+RUN_CS+SELECTOR], ax
    je load_stack
    lea rsi, [rbp+CODE_SEGMENT]
    lea rdi, [rbp+RUN_CS]
    call load_segment
load_stack:
    mov rax, [rbp+SS_SELECTOR]
    cmp [rbp+RUN_SS+SELECTOR], ax
    je load_gs
    lea rsi, [rbp+STACK_SEGMENT]
    lea rdi, [rbp+RUN_SS]
    call load_segment
load_gs:
    mov rax, [rbp+GS_SELECTOR]
    cmp [rbp+RUN_GS+SELECTOR], ax
    je load_bases
    shl rax, 32 ; native code loads none but null ones
    mov [rbp+RUN_GS+8], rax
    mov rax, {_UNUSABLE:#x}
    mov [rbp+RUN_GS+16], rax
    mov edx, {abi.SYNC_SREGS}
load_bases:
    mov rax, [rbp+FS_BASE]
    cmp rax, [rbp+SHOWN_FS]
    jne load_special
    mov rax, [rbp+GS_BASE]
    cmp rax, [rbp+SHOWN_GS]
    jne load_special
    mov rax, [rbp+GUEST_CR3]
    cmp rax, [rbp+SHOWN_CR3]
    je load_known
load_special:
    mov edx, {abi.SYNC_SREGS}
load_known:
    or edx, {abi.SYNC_REGS}
    mov [rbp+DIRTY_REGS], rdx
    ret

; The segment at rdi becomes the flat one at rsi, with selector ax.
load_segment:
    mov rcx, [rsi]
    mov [rdi], rcx
    mov rcx, [rsi+8]
    mov [rdi+8], rcx
    mov rcx, [rsi+16]
    mov [rdi+16], rcx
    mov [rdi+SELECTOR], ax
    mov edx, {abi.SYNC_SREGS}
    ret
"""


def native_loop(supervision: str) -> bytes:
    """The loop with the supervisor's code; it begins with a C function of one argument, the words' address."""
    symbols = {**SYMBOLS, **RUN_GENERAL, "HOST_FLAGS": _HOST_FLAGS}
    return assemble("\n".join((_LOOP, SERVICES, supervision)), symbols=symbols).code
