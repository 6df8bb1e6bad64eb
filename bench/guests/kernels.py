"""The compute kernels as one program, the same machine code wherever it runs.

`main` is a C function without arguments.  For each kernel it calls `prepare` and then, timed by RDTSC, `run`,
`REPETITIONS` times, and leaves a record in memory (`bench.records`): a status, the checksum that `run`
returned, and the cycles of each repetition.  The first repetition is a warm-up: it is where translators translate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.guests import control_flow, floating_point, integer, memory
from bench.guests.long_mode import USER, long_mode_kernel
from bench.records import ABSENT, OK, UNSTEADY
from trivisor.x86.assembler import assemble

REPETITIONS = 21
"""The first of them is the warm-up."""
RESULTS = 0x10000
"""Where the records are, from `USER` on."""
_DATA = 0x20000
STACK_TOP = 0x1F000
RECORD = 2 + REPETITIONS
"""Words of one of them."""

NAMES = (
    "sieve", "quicksort", "crc", "hash", "fibonacci", "indirect", "interpreter", "chase", "strings", "matrix",
    "sse", "avx", "x87",
)  # fmt: skip
"""Each has the labels NAME_prepare and NAME_run, functions of the address of the data area (rdi)."""
_NEEDS_AVX = {"avx"}

_MAIN = """
main:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 8
    fninit
    ldmxcsr [rel mxcsr]
    call has_avx
    mov ebp, eax
    lea r12, [rel table]
    mov r13d, USER + RESULTS
.kernel:
    cmp qword [r12], 0
    je .done
    cmp [r12 + 16], rbp
    ja .absent
    mov qword [r13], OK
    xor r14d, r14d
.repetition:
    mov edi, USER + DATA
    call [r12]
    lfence
    rdtsc
    shl rdx, 32
    lea r15, [rax + rdx]
    mov edi, USER + DATA
    call [r12 + 8]
    mov rbx, rax
    lfence
    rdtsc
    shl rdx, 32
    add rax, rdx
    sub rax, r15
    mov [r13 + r14*8 + 16], rax
    test r14d, r14d
    jz .first
    cmp [r13 + 8], rbx
    je .same
    mov qword [r13], UNSTEADY
.first:
    mov [r13 + 8], rbx
.same:
    inc r14d
    cmp r14d, REPETITIONS
    jne .repetition
    jmp .next
.absent:
    mov qword [r13], ABSENT
.next:
    add r12, 24
    add r13, RECORD * 8
    jmp .kernel
.done:
    add rsp, 8
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

has_avx:                           ; 1 if AVX2 and FMA can be used, else 0
    push rbx
    mov eax, 1
    xor ecx, ecx
    cpuid
    and ecx, 1 << 12 | 1 << 27 | 1 << 28
    cmp ecx, 1 << 12 | 1 << 27 | 1 << 28
    jne .no
    xor ecx, ecx
    xgetbv
    and eax, 6
    cmp eax, 6
    jne .no
    mov eax, 7
    xor ecx, ecx
    cpuid
    shr ebx, 5
    and ebx, 1
    mov eax, ebx
    pop rbx
    ret
.no:
    xor eax, eax
    pop rbx
    ret

align 8
mxcsr: dd 0x1F80
align 8
table:
"""

_KERNEL_MAIN = """
kernel_main:
    mov rax, .back
    call set_lstar
    mov eax, USER + STACK_TOP - 16
    mov rcx, USER + USER_EXIT      ; what main returns to
    mov [rax], rcx
    mov [kernel_rsp], rsp
    mov rsp, rax
    mov ecx, USER + USER_MAIN
    jmp enter_user
.back:
    mov rsp, [kernel_rsp]
    mov r13d, USER + RESULTS
    mov r14d, KERNELS
.record:
    mov r15d, RECORD
.word:
    mov rax, [r13]
    call print_hex
    add r13, 8
    dec r15d
    jnz .word
    call new_line
    dec r14d
    jnz .record
    ret
align 8
kernel_rsp: dq 0
"""


@dataclass(frozen=True, slots=True)
class Program:
    """The kernels in `names`, as machine code for the address `USER`."""

    names: tuple[str, ...]
    code: bytes
    main: int
    """The function's offset."""
    exit: int
    """Offset of the code that ends the program in the guest."""
    start: int | None = None
    """Offset of `start`, for programs that have one of their own."""

    def image(self) -> bytes:
        """A multiboot kernel that runs the program in ring 3 and prints the records, one a line."""
        symbols = {
            "RESULTS": RESULTS,
            "RECORD": RECORD,
            "KERNELS": len(self.names),
            "STACK_TOP": STACK_TOP,
            "USER_MAIN": self.main,
            "USER_EXIT": self.exit,
        }
        return long_mode_kernel(_KERNEL_MAIN, self.code, symbols)

    def records(self, memory: memoryview) -> str:
        """What the image prints, from the memory at `USER`."""
        words = memory[RESULTS : RESULTS + len(self.names) * RECORD * 8].cast("Q").tolist()
        lines = (words[at : at + RECORD] for at in range(0, len(words), RECORD))
        return "".join(" ".join(f"{word:016x}" for word in line) + " \n" for line in lines)


def program(names: Sequence[str] = NAMES, more: str = "") -> Program:
    """Assemble the program with these kernels; `more` is source that has those which are not of `NAMES`."""
    rows = [f"dq {name}_prepare, {name}_run, {int(name in _NEEDS_AVX)}" for name in names]
    families = [integer.SOURCE, control_flow.SOURCE, memory.SOURCE, floating_point.SOURCE, more]
    source = "\n".join([_MAIN, *rows, "dq 0", "exit: syscall", *families])
    symbols = {
        "USER": USER, "RESULTS": RESULTS, "DATA": _DATA, "RECORD": RECORD, "REPETITIONS": REPETITIONS,
        "OK": OK, "ABSENT": ABSENT, "UNSTEADY": UNSTEADY, "KERNELS": len(names),
    }  # fmt: skip
    assembled = assemble(source, bits=64, origin=USER, symbols=symbols)
    if len(assembled.code) > RESULTS:
        raise ValueError(f"the kernels are {len(assembled.code)} bytes and run into their results")
    labels = assembled.labels
    start = labels["start"] - USER if "start" in labels else None
    return Program(tuple(names), assembled.code, labels["main"] - USER, labels["exit"] - USER, start)
