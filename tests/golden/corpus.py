"""Guest code, by what it is to show: assembly, whether the block is tuned, and as which trace."""

from __future__ import annotations

from typing import NamedTuple


class Sample(NamedTuple):
    """One block of 64-bit guest code."""

    name: str
    source: str
    user: bool = True
    tuned: bool = False
    ways: tuple[int, ...] = ()
    """Of a trace: which of the ways each of its jumps goes (`Segment.ways`)."""


SAMPLES = (
    Sample("registers alone", "mov rax, rbx\n add rax, 5\n lea rcx, [rax+rbx*4+8]\n jmp next\n next:"),
    Sample("registers in slots", "add r10, r11\n mov rsp, r15\n xor r10d, r10d\n jmp next\n next:"),
    Sample("a load", "mov rax, [rbx+16]\n ret"),
    Sample("a store", "mov [rbx+rcx*8], edx\n jmp next\n next:"),
    Sample("flags live across a load", "cmp rax, rbx\n mov rcx, [rdx]\n jb next\n nop\n next:"),
    Sample("flags dead across a load", "cmp rax, rbx\n mov rcx, [rdx]\n test rcx, rcx\n je next\n nop\n next:"),
    Sample("an address relative to rip", "mov eax, [rel next+64]\n jmp next\n next:"),
    Sample("a segment's base", "mov rax, [gs:0x28]\n jmp next\n next:"),
    Sample("a constant in memory", "add dword [rdi], 7\n jmp next\n next:"),
    Sample("push and pop", "push rax\n pop rbx\n jmp next\n next:"),
    Sample("call", "call next\n nop\n next:"),
    Sample("return", "ret"),
    Sample("indirect jump", "jmp [rax]"),
    Sample("a backward loop", "again: dec ecx\n jnz again"),
    Sample("a jump to another page", "jmp $+0x5000"),
    Sample("vectors", "vaddps ymm0, ymm1, [rsi]\n jmp next\n next:"),
    Sample("repeated stores", "rep stosd\n jmp next\n next:"),
    Sample("cli and sti", "cli\n sti\n nop\n jmp next\n next:", user=False),
    Sample("pushf", "pushfq\n jmp next\n next:", user=False),
    Sample("system call", "syscall"),
    Sample("a call-out", "lgdt [rax]", user=False),
    Sample("tuned: a site cache", "mov rax, [rbx+rcx*4]\n jmp next\n next:", tuned=True),
    Sample("tuned: pushes", "push rbp\n push rbx\n sub rsp, 24\n mov [rsp+8], rax\n jmp next\n next:", tuned=True),
    Sample("tuned: pops and the return", "add rsp, 8\n pop rbx\n pop rbp\n ret", tuned=True),
    Sample("tuned: fields of a structure", "mov rax, [rdi+8]\n mov rdx, [rdi+16]\n add [rdi+24], rax\n ret", tuned=True),
    Sample(
        "tuned: a table by a computed index",
        "movzx edx, al\n mov ecx, [r8+rdx*4+64]\n add ecx, [r8+rdx*4]\n inc r8\n add ecx, [rsi+r8*4]\n ret",
        tuned=True,
    ),
    Sample("tuned: a carry across a store", "add rax, [rsi]\n mov [rdi], rax\n adc rdx, 0\n ret", tuned=True),
    Sample(
        "a trace: a loop",
        "again: cmp rdi, rsi\n jae on\n mov rax, [rbx]\n on: xor eax, eax\n jmp end\n ud2\n"
        "end: inc edi\n cmp edi, ecx\n jne again",
        tuned=True,
        ways=(0, 0),
    ),
    Sample(
        "a trace: a group, and a way out to another page",
        "cmp rax, [rdi+8]\n js $+0x5000\n mov rdx, [rdi+16]\n je next\n mov [rdi+24], rdx\n next: ret",
        tuned=True,
        ways=(1, 1),
    ),
)
