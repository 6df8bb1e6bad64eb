"""A guest that is all in ring 3: what its hypervisor's own native code is called by, and may call.

See `machine.deprivileged.NativeSupervision` for the contract.
"""

from __future__ import annotations

from trivisor.translation.layout import EXEC_TLB_ENTRIES, TLB_ENTRIES, TLB_ENTRY_SIZE
from trivisor.translation.natives.common import spill
from trivisor.translation.natives.events import enter_mode

assert TLB_ENTRIES % 512 == 0 and EXEC_TLB_ENTRIES == 512  # `supervised_changed` knows

NONE = """
supervisor_call:
supervisor_user_call:
supervisor_exception:
supervisor_interrupt:
supervisor_instruction:
    jmp supervised_leave
"""
"""Without a hypervisor of that kind: nothing."""

SUPERVISED = f"""
FORGETS_AT_ONCE equ 1
; From `syscall_native`: r10 = address of the instruction's rip, r11 = flags; other registers are the guest's.
supervised_syscall:
    mov [rsp+FLAGS], r11
    {spill(0)}
    mov rbp, rsp
    and qword [rbp+FLAGS], HOST_FLAGS
    mov rax, [r10]
    mov [rbp+GUEST_RIP], rax
    mov qword [rbp+EXIT], EXIT_SYSTEM_CALL
    add rax, 2
    sar rax, 47
    inc rax
    cmp rax, 1 ; the instruction after it has no address
    ja supervised_leave
    cmp qword [rbp+GUEST_KERNEL], 0
    jne supervisor_call
    jmp supervisor_user_call

; From `call_out`: Python is to do an instruction that ends a block.
supervised_instruction:
    mov rbp, rsp
    and qword [rbp+FLAGS], HOST_FLAGS
    cmp qword [rbp+GUEST_KERNEL], 0
    je supervised_leave
    jmp supervisor_instruction

; From `deliver_event`: an exception, or an external interrupt.
supervised_event:
    mov qword [rbp+EXIT], EXIT_INTERRUPT
    cmp qword [rbp+EVENT], EVENT_EXTERNAL
    je supervisor_interrupt
    cmp qword [rbp+EVENT], EVENT_FAULT
    jne deliver_python
    mov qword [rbp+EXIT], EXIT_EXCEPTION
    jmp supervisor_exception

supervised_leave:
    mov rsp, rbp
    jmp leave_spilled

supervised_following:
    call gather_flags
    mov [rbp+GPR_R11], rax
    mov rax, [rbp+GUEST_RIP]
    add rax, 2
    mov [rbp+GPR_RCX], rax
    mov [rbp+GUEST_RIP], rax
supervised_resume:
    mov rsp, rbp
    inc qword [rbp+COUNT_SUPERVISED]
    jmp resume

supervised_interrupt:
    mov rsp, rbp
    inc qword [rbp+COUNT_SUPERVISED]
    mov qword [rbp+EXIT], EXIT_INTERRUPT
    jmp leave_spilled

guest_page:
    jmp kernel_host

supervised_alarm:
    jmp set_alarm

; CPUID of the guest's eax and ecx into its registers, if the answer is known: ZF set.
guest_cpuid:
    mov eax, [rbp+GPR_RAX]
    mov ecx, [rbp+GPR_RCX]
    mov r11, [rbp+CPUID_TABLE]
    call find_cpuid
    jnz guest_cpuid_unknown
    inc qword [rbp+COUNT_CPUID]
    mov eax, [r10+8]
    mov [rbp+GPR_RAX], rax
    mov eax, [r10+12]
    mov [rbp+GPR_RBX], rax
    mov eax, [r10+16]
    mov [rbp+GPR_RCX], rax
    mov eax, [r10+20]
    mov [rbp+GPR_RDX], rax
    xor eax, eax
guest_cpuid_unknown:
    ret

; Go on in the address space of root rdi, as the kernel if esi is 1, else as its user.
supervised_enter:
    mov [rbp+GUEST_CR3], rdi
    mov [rbp+GUEST_KERNEL], rsi
    cmp [rbp+rsi*8+ROOT_USER], rdi
    je supervised_same
    mov [rbp+rsi*8+ROOT_USER], rdi
    push rsi
    mov rdi, rbp
    test esi, esi
    jz supervised_enter_other
    call flush_everything
    pop rsi
    jmp supervised_same
supervised_enter_other:
    call flush_local
    pop rsi
supervised_same:
    test esi, esi
    jz supervised_enter_user
    {enter_mode("KERNEL", 3)}
    ret
supervised_enter_user:
    {enter_mode("USER", 3)}
    ret

; Forget all translations of linear addresses.
supervised_flush:
    mov rdi, rbp
    jmp flush_everything

; Forget those of the kernel's upper half no more than its entries' own.
supervised_flush_lower:
    mov rdi, rbp
    jmp flush_local

; The entry above level 1 at host address rdi has changed, and was r10: eax = 1 if TLBs may have what it led to.
; Through an empty table nothing is known: what was went with its entries.
supervised_changed_upper:
    mov r8, 0x000ffffffffff000
    and r8, r10
    add r8, [rbp+RAM_BASE]
    xor ecx, ecx
    mov eax, 1
supervised_upper_entries:
    mov r9, [r8+rcx*8]
    or r9, [r8+rcx*8+8]
    or r9, [r8+rcx*8+16]
    or r9, [r8+rcx*8+24]
    jnz supervised_upper_done
    add ecx, 4
    cmp ecx, 512
    jne supervised_upper_entries
    xor eax, eax
supervised_upper_done:
    ret

; The user's TLB may be of what was in frame rcx before it became a table.
supervised_table:
    mov rax, rcx
    shl rax, 12
    cmp [rbp+ROOT_USER], rax
    jne supervised_other_table
    mov qword [rbp+ROOT_USER], -1
supervised_other_table:
    ret

; int entry_changed(state, host address, old): the same from Python.
entry_changed:
    push rbp
    mov rbp, rdi
    mov rdi, rsi
    mov r10, rdx
    call supervised_changed
    pop rbp
    ret

; The level-1 entry at host address rdi has changed, and was r10: forget what TLBs have of it.  eax = 1: jumps may
; still lead to code there, so that a flush is wanted.  An entry's place in its table tells its places in the TLBs.
supervised_changed:
    mov rax, [rdi]
    xor rax, r10
    push rax
    mov esi, edi
    shr esi, 3
    and esi, 511
    mov r8, 0x000ffffffffff000
    and r8, r10
    mov rdx, r8
    add rdx, [rbp+RAM_BASE]
    mov ecx, esi
    shl ecx, 5
    lea rdi, [rbp+rcx+TLB_KERNEL]
    mov eax, esi
    xor eax, 1
    shl eax, 12
    mov ecx, {2 * TLB_ENTRIES // 512}
supervised_changed_next:
    cmp [rdi+TLB_HOST], rdx
    jne supervised_changed_other
    mov [rdi+TLB_READ], rax
    mov [rdi+TLB_WRITE], rax
supervised_changed_other:
    add rdi, {512 * TLB_ENTRY_SIZE}
    add eax, {512 << 12}
    and eax, {(TLB_ENTRIES - 1) << 12}
    dec ecx
    jnz supervised_changed_next
    mov ecx, esi
    shl ecx, 4
    xor r9d, r9d
    mov rax, [rbp+rcx+EXEC_TLB_KERNEL+8]
    and rax, -4096
    cmp rax, r8
    sete r9b
    mov rax, [rbp+rcx+EXEC_TLB_USER+8]
    and rax, -4096
    xor esi, esi
    cmp rax, r8
    sete sil
    or r9d, esi
    bt r10, 63
    jc supervised_changed_data
    shr r8, 12
    mov rax, [rbp+CODE_LINES]
    xor esi, esi
    cmp qword [rax+r8*8], 0
    setne sil
    or r9d, esi
supervised_changed_data:
    ; code that may be run as before is where it was
    pop rax
    mov rcx, 0x800ffffffffff005
    test rax, rcx
    jnz supervised_changed_code
    xor r9d, r9d
supervised_changed_code:
    mov rdi, rbp
    call flush_sites
    mov eax, r9d
    ret
"""
