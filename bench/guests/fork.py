"""An /init for Linux that forks, and waits for a child that writes to a few pages and exits."""

from __future__ import annotations

import struct

from trivisor.guests import cpio
from trivisor.x86.assembler import assemble

FORKS = 20
"""Operations of one repetition."""
_REPETITIONS = 11
_ORIGIN = 0x400000
_MEMORY = 0x100000
"""Bytes after the code, all of them touched by the parent: a process of some size."""

_SOURCE = """
WRITE equ 1                        ; system calls: Linux, arch/x86/entry/syscalls/syscall_64.tbl
FORK equ 57
EXIT equ 60
WAIT4 equ 61
PAUSE equ 34
WRITTEN equ 8                      ; pages that a child writes to

start:
    mov rdi, memory
.touch:
    mov [rdi], rdi
    add rdi, 4096
    cmp rdi, memory + MEMORY
    jb .touch
    xor r14d, r14d
.repetition:
    rdtsc
    shl rdx, 32
    lea r15, [rax + rdx]
    mov ebx, FORKS
.fork:
    mov eax, FORK
    syscall
    test rax, rax
    jz child
    js failed
    mov rdi, rax
    mov rsi, status
    xor edx, edx
    xor r10d, r10d
    mov eax, WAIT4
    syscall
    test rax, rax
    js failed
    cmp r14d, 0
    jne .known
    mov eax, [status]              ; the statuses of one repetition are its checksum
    shr eax, 8
    add [record + 8], rax
.known:
    dec ebx
    jne .fork
    rdtsc
    shl rdx, 32
    add rax, rdx
    sub rax, r15
    mov [record + 16 + r14*8], rax
    inc r14d
    cmp r14d, REPETITIONS
    jne .repetition

    mov rdi, line
    xor ecx, ecx
.word:
    mov rdx, [record + rcx*8]
    mov r8d, 16
.digit:
    rol rdx, 4
    mov eax, edx
    and eax, 15
    mov al, [digits + rax]
    stosb
    dec r8d
    jne .digit
    mov al, ' '
    stosb
    inc ecx
    cmp ecx, REPETITIONS + 2
    jne .word
    mov al, 10
    stosb
    mov rsi, greeting
    lea rdx, [line - greeting]
    call write
    mov rsi, line
    mov rdx, (REPETITIONS + 2) * 17 + 1
    call write
failed:
    mov rsi, done
    mov rdx, digits - done
    call write
.wait:
    mov eax, PAUSE
    syscall
    jmp .wait

child:
    mov rdi, memory
.page:
    mov [rdi + 8], rdi
    add rdi, 4096
    cmp rdi, memory + WRITTEN * 4096
    jb .page
    mov edi, 7
    mov eax, EXIT
    syscall

write:                             ; rsi, rdx
    mov edi, 1
    mov eax, WRITE
    syscall
    ret

done: db 10, "fork: done", 10
digits: db "0123456789abcdef"
greeting: db 10, "fork: "
line: times (REPETITIONS + 2) * 17 + 1 db 0
align 8
status: dq 0
record: dq 1
    times REPETITIONS + 1 dq 0
align 4096
memory:
"""


def fork_program() -> bytes:
    """A static ELF executable."""
    symbols = {"FORKS": FORKS, "REPETITIONS": _REPETITIONS, "MEMORY": _MEMORY}
    program = assemble(_SOURCE, origin=_ORIGIN, symbols=symbols)
    return static_elf(program.code, _ORIGIN, program.labels["start"], len(program.code) + _MEMORY)


def static_elf(code: bytes, origin: int, entry: int, size: int) -> bytes:
    """An executable for Linux of one segment, to read, write and run: `size` bytes, `code` and then zeroes."""
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 7, 4096, origin, origin, len(code), size, 4096)
    return header.ljust(4096, b"\0") + code


def fork_initramfs() -> bytes:
    """The program as /init, and the console that it writes to."""
    return initramfs_of(fork_program())


def initramfs_of(init: bytes) -> bytes:
    """An archive of this /init, and the console that it writes to."""
    return cpio.archive(
        [
            cpio.directory("dev"),
            cpio.character_device("dev/console", 5, 1),
            cpio.regular("init", init, 0o755),
        ]
    )
