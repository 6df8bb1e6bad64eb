"""Direct execution is the host's processor at work: a loop of the guest's takes what it takes outside."""

from __future__ import annotations

import ctypes
import mmap
import resource
from collections.abc import Callable
from pathlib import Path

from tests.unit.paravirt.engines.conftest import Guest
from trivisor.x86.assembler import assemble

LOOP = """
    mov rcx, 40000000
    xor eax, eax
one:
    add rax, rcx
    xor rax, rdx
    rol rax, 3
    dec rcx
    jnz one
    mov rcx, 4000000
two:
    mov rdx, rcx
    and edx, 0x7f8
    add [rbx + rdx], rax
    imul rax, [rbx + rdx]
    call nothing
    dec rcx
    jnz two
"""


def seconds(what: Callable[[], object]) -> float:
    """Processor time."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    what()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_compute_runs_within_a_tenth_of_native(tmp_path: Path) -> None:
    memory = mmap.mmap(-1, 1 << 16, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    source = f"push rbx\n lea rbx, [rel nothing + 4096]\n{LOOP}\n pop rbx\n ret\nnothing: ret\n"
    code = assemble(source, origin=place).code
    memory[: len(code)] = code
    natively = ctypes.CFUNCTYPE(None)(place)
    ratios = []
    for _ in range(3):
        guest = Guest("direct", tmp_path, f"start: mov rbx, PAGE\n{LOOP}\n jmp shutdown\nnothing: ret\n")
        try:
            ratios.append(seconds(guest.finish) / seconds(natively))
        finally:
            guest.close()
    assert min(ratios) < 1.1, ratios
