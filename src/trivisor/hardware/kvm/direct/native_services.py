"""What the supervisor's native code calls under direct execution (`machine.deprivileged.NativeSupervision`)."""

from __future__ import annotations

from typing import Final

from trivisor.hardware.kvm.direct.native_words import CHANGED, MOST_CHANGED
from trivisor.machine.memory import PAGE_SIZE
from trivisor.x86.flags import FIXED, IF
from trivisor.x86.paging import ACCESSED, DIRTY, PRESENT, USER, WRITABLE

SLOT_BITS: Final = 39
"""What a level-4 entry covers, as a power of two."""
_ADDRESS: Final = (1 << 52) - PAGE_SIZE

SERVICES = f"""
FORGETS_AT_ONCE equ 0
gather_flags:
    mov rax, [rbp+FLAGS]
    or rax, [rbp+SYSTEM_FLAGS]
    or eax, {IF | FIXED}
    ret

supervised_enter:
    mov [rbp+GUEST_CR3], rdi
    mov [rbp+GUEST_KERNEL], rsi
    mov rax, [rbp+IN_KERNEL_AT]
    mov [rax], sil
    test esi, esi
    jz supervised_entered
    mov [rbp+ROOT_KERNEL], rdi
supervised_entered:
    ret

supervised_flush:
supervised_flush_lower:
invalidate_page:
    mov qword [rbp+FLUSH_WANTED], 1
    ret

supervised_changed_upper:
    mov qword [rbp+AT_ONCE], 1
supervised_changed:
    mov rax, [rdi]
    xor rax, r10
    test rax, {~(ACCESSED | DIRTY)}
    jz supervised_unchanged
    mov rax, rdi
    sub rax, [rbp+RAM_BASE]
    mov r8, [rbp+CHANGED_COUNT]
    cmp r8, {MOST_CHANGED}
    jae supervised_changed_table
    mov [rbp+r8*8+{8 * CHANGED}], rax
    inc qword [rbp+CHANGED_COUNT]
supervised_unchanged:
    mov eax, 1
    ret
supervised_changed_table:
    ; no more entries can be noted: the whole table
    mov rcx, rax
    shr rcx, 12
    mov rax, [rbp+TABLES]
    cmp byte [rax+rcx], 2
    je supervised_unchanged
    call note_table
    jmp supervised_unchanged

; `Deprivileged.memory_written` of frame rcx.
supervised_table:
    mov rax, [rbp+TABLES]
    cmp byte [rax+rcx], 1
    ja supervised_table_noted
    je note_table
    mov byte [rax+rcx], 1
supervised_table_noted:
    ret

; KVM is to forget the table in frame rcx, whose byte is at rax+rcx.  Loses rax.
note_table:
    mov byte [rax+rcx], 2
    mov qword [rbp+AT_ONCE], 1
    push r8
    mov r8, [rbp+CHANGED_TABLES_COUNT]
    mov rax, [rbp+CHANGED_TABLES]
    mov [rax+r8*8], rcx
    inc qword [rbp+CHANGED_TABLES_COUNT]
    pop r8
    ret

supervised_alarm:
    mov qword [rbp+LOOK_WANTED], 1
    ret

guest_cpuid:
    or eax, 1
    ret

; As `RingThreeMemory.physical`.
guest_page:
    mov rax, r13
    sar rax, 47
    inc rax
    cmp rax, 1
    ja guest_page_not
    mov rdx, [rbp+GUEST_CR3]
    mov r8d, {USER | WRITABLE}
    mov r9, {_ADDRESS:#x}
    mov ecx, {SLOT_BITS}
    mov rax, r13
    shr rax, cl
    and eax, 511
    cmp rax, [rbp+OWN_SLOT]
    je guest_page_not
guest_page_level:
    and rdx, r9
    cmp rdx, [rbp+RAM_SPAN]
    jae guest_page_not
    add rdx, [rbp+RAM_BASE]
    mov rax, r13
    shr rax, cl
    and eax, 511
    lea rdi, [rdx+rax*8]
    mov rdx, [rdi]
    test dl, {PRESENT}
    jz guest_page_not
    and r8d, edx
    sub ecx, 9
    cmp ecx, 12
    jae guest_page_level
    test r8b, {USER}
    jz guest_page_not
    mov eax, {ACCESSED}
    test r12d, r12d
    jz guest_page_mark
    test r8b, {WRITABLE}
    jz guest_page_not
    mov eax, {ACCESSED | DIRTY}
guest_page_mark:
    and r9, rdx
    cmp r9, [rbp+RAM_SPAN]
    jae guest_page_not
    and edx, eax
    cmp edx, eax
    je guest_page_marked
    or [rdi], rax
guest_page_marked:
    mov rdi, r9
    add rdi, [rbp+RAM_BASE]
    mov eax, r13d
    and eax, {PAGE_SIZE - 1}
    add rdi, rax
    xor eax, eax
    ret
guest_page_not:
    or eax, 1
    ret
"""
