"""The alarm that brings Python back for timers, set by native code (`translation/alarm.py`)."""

from __future__ import annotations

from trivisor.machine.host_timer import SYS_TIMER_SETTIME

_SECOND = 1_000_000_000
_LONGEST = 1 << 40
"""Nanoseconds; Python sets a longer one anew."""

ALARM = f"""
; Have Python look at timers rdi nanoseconds from now at the latest.  Keeps rbx, rbp, r12 to r15.
set_alarm:
    cmp rdi, AT_ONCE
    jbe set_alarm_now
    mov rax, {_LONGEST}
    cmp rdi, rax
    cmova rdi, rax
    mov rax, rdi
    mul qword [rbp+TSC_FREQUENCY]
    mov ecx, {_SECOND}
    div rcx
    mov rsi, rax
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rsi, rax
    mov rdx, [rbp+ALARM]
    cmp rdx, rax
    jbe set_alarm_timer ; that one is over
    cmp rdx, rsi
    jbe set_alarm_done
set_alarm_timer:
    mov [rbp+ALARM], rsi
    mov qword [rbp+ALARM_FOR], -1
    mov rax, rdi
    xor edx, edx
    div rcx
    xor r10d, r10d
    mov [rbp+ALARM_VALUE], r10
    mov [rbp+ALARM_VALUE+8], r10
    mov [rbp+ALARM_VALUE+16], rax
    mov [rbp+ALARM_VALUE+24], rdx
    mov rdi, [rbp+HOST_TIMER]
    xor esi, esi
    lea rdx, [rbp+ALARM_VALUE]
    mov eax, {SYS_TIMER_SETTIME}
    syscall
set_alarm_done:
    ret
set_alarm_now:
    mov rax, [rbp+POLL_BAD]
    mov qword [rbp+PENDING], 1
    mov [rbp+ARMED], rax
    mov [rbp+POLL], rax
    ret
"""
