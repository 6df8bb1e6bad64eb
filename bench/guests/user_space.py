"""A static program for Linux: the compute kernels and system kernels of user space, as /init or on the host itself."""

from __future__ import annotations

from collections.abc import Sequence

from bench.guests.fork import static_elf
from bench.guests.kernels import NAMES, program
from bench.guests.long_mode import USER, USER_SIZE

FIRST, LAST = b"bench: userspace", b"bench: done"
"""What the program prints before anything else, and at its end; a record is "record: " and its words."""
OPERATIONS = {"system call": 100, "page fault": 64, "process switch": 20, "fork": 10}
"""Those of Linux, and how many operations a repetition has."""
_LABELS = {name: name.replace(" ", "_") for name in OPERATIONS}
ALL_NAMES = (*NAMES, *OPERATIONS)

_SOURCE = """
; system calls: Linux, arch/x86/entry/syscalls/syscall_64.tbl
READ equ 0
WRITE equ 1
CLOSE equ 3
MMAP equ 9
MUNMAP equ 11
PIPE equ 22
PAUSE equ 34
GETPID equ 39
FORK equ 57
EXIT equ 60
WAIT4 equ 61
SYSLOG equ 103
CONSOLE_OFF equ 6
GETPPID equ 110
PRIVATE_ANONYMOUS equ 0x22
READ_WRITE equ 3
PAGES equ 256                      ; that a process which forks has touched
WRITTEN equ 8                      ; that its child writes to

start:
    mov rsi, first
    lea rdx, [last - first]
    call write
    mov edi, CONSOLE_OFF           ; no word of the kernel's within a record
    mov eax, SYSLOG
    syscall
    call main
    mov r13d, USER + RESULTS
    mov r14d, KERNELS
.record:
    mov rdi, words
    mov r15d, RECORD
.word:
    mov rdx, [r13]
    add r13, 8
    mov r8d, 16
.digit:
    rol rdx, 4
    mov eax, edx
    and eax, 15
    mov rcx, digits
    mov al, [rcx + rax]
    stosb
    dec r8d
    jnz .digit
    mov al, ' '
    stosb
    dec r15d
    jnz .word
    mov al, 10
    stosb
    mov rsi, record
    mov edx, words - record + RECORD * 17 + 1
    call write
    dec r14d
    jnz .record
    xor ebx, ebx
finish:                            ; ebx = status
    mov rsi, last
    lea rdx, [digits - last]
    call write
    mov eax, GETPID
    syscall
    mov edi, ebx
    cmp eax, 1
    jne leave
.wait:                             ; an /init must not end
    mov eax, PAUSE
    syscall
    jmp .wait

leave:                             ; edi = status
    mov eax, EXIT
    syscall

write:                             ; rsi, rdx
    mov edi, 1
    mov eax, WRITE
    syscall
    ret

system_call_prepare:
    ret
system_call_run:
    push rbx
    mov ebx, SYSTEM_CALLS
.again:
    mov eax, GETPPID
    syscall
    dec ebx
    jnz .again
    xor eax, eax
    pop rbx
    ret

page_fault_prepare:
    ret
page_fault_run:
    xor edi, edi
    mov esi, PAGE_FAULTS << 12
    mov edx, READ_WRITE
    mov r10d, PRIVATE_ANONYMOUS
    mov r8, -1
    xor r9d, r9d
    mov eax, MMAP
    syscall
    test rax, rax
    js failed
    mov edx, PAGE_FAULTS
    mov rdi, rax
.page:
    mov [rax], rdx
    add rax, 4096
    dec edx
    jnz .page
    mov esi, PAGE_FAULTS << 12
    mov eax, MUNMAP
    syscall
    ret

process_switch_prepare:            ; a child that echoes bytes
    cmp dword [rel there], 0
    jne .done
    mov rdi, there
    mov eax, PIPE
    syscall
    mov rdi, back
    mov eax, PIPE
    syscall
    mov eax, FORK
    syscall
    test rax, rax
    js failed
    jnz .done
    mov edi, [rel there + 4]
    mov eax, CLOSE
    syscall
.echo:
    mov edi, [rel there]
    mov eax, READ
    call byte_of
    xor edi, edi
    cmp eax, 1
    jne leave                      ; the other end is gone
    mov edi, [rel back + 4]
    mov eax, WRITE
    call byte_of
    jmp .echo
.done:
    ret
process_switch_run:
    push rbx
    mov ebx, PROCESS_SWITCHES / 2
.again:
    mov edi, [rel there + 4]
    mov eax, WRITE
    call byte_of
    mov edi, [rel back]
    mov eax, READ
    call byte_of
    cmp eax, 1
    jne failed
    dec ebx
    jnz .again
    pop rbx
    ret

byte_of:                           ; eax = READ or WRITE, edi = descriptor
    mov rsi, letter
    mov edx, 1
    syscall
    ret

fork_prepare:                      ; rdi = data
    mov ecx, PAGES
.touch:
    mov [rdi], rdi
    add rdi, 4096
    dec ecx
    jnz .touch
    ret
fork_run:
    push rbx
    push rbp
    push r12
    mov r12, rdi
    xor ebp, ebp
    mov ebx, FORKS
.again:
    mov eax, FORK
    syscall
    test rax, rax
    jz .child
    js failed
    mov rdi, rax
    mov rsi, status
    xor edx, edx
    xor r10d, r10d
    mov eax, WAIT4
    syscall
    test rax, rax
    js failed
    movzx eax, byte [rel status + 1]
    add ebp, eax
    dec ebx
    jnz .again
    mov eax, ebp
    pop r12
    pop rbp
    pop rbx
    ret
.child:
    mov ecx, WRITTEN
.write:
    mov [r12 + 8], r12
    add r12, 4096
    dec ecx
    jnz .write
    mov edi, 7
    jmp leave

failed:                            ; too few records tell of it
    mov ebx, 1
    jmp finish

first: db 10, "bench: userspace", 10
last: db 10, "bench: done", 10
digits: db "0123456789abcdef"
record: db 10, "record: "
words: times RECORD * 17 + 1 db 0
letter: db 0
align 8
there: dd 0, 0
back: dd 0, 0
status: dq 0
"""


def user_space_program(names: Sequence[str] = ALL_NAMES) -> bytes:
    """The executable with these kernels."""
    constants = {"system call": "SYSTEM_CALLS", "page fault": "PAGE_FAULTS", "process switch": "PROCESS_SWITCHES"}
    constants["fork"] = "FORKS"
    lines = [f"{constants[name]} equ {count}" for name, count in OPERATIONS.items()]
    made = program([_LABELS.get(name, name) for name in names], "\n".join([*lines, _SOURCE]))
    assert made.start is not None
    return static_elf(made.code, USER, USER + made.start, USER_SIZE)
