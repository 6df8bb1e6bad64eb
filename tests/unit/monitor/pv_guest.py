"""A PV domain for tests of native hypercalls: its guest makes the hypercalls of a list, and stores to page tables."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from trivisor.boot.image import Image
from trivisor.boot.xen_notes import read_xen_kernel
from trivisor.machine import tsc
from trivisor.machine.clock import Clock
from trivisor.machine.exits import Hypercall
from trivisor.machine.memory import MIB
from trivisor.machine.vcpu import Vcpu
from trivisor.monitor.techniques import TechniqueUnavailable
from trivisor.monitor.xen_processor import xen_processor
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.paravirt.xen.machine import XenMachine
from trivisor.x86.assembler import assemble

BASE = 0xFFFFFFFF80000000
RECORDS, DATA = BASE + 0x1100000, BASE + 0x1200000
UPPER = 0xFFFF900000000000
"""Linear address of what the kernel's half maps by the first of the test's level-1 tables."""
NOTES = {
    6: b"test\0", 5: b"xen-3.0\0", 3: struct.pack("<Q", BASE), 4: bytes(8), 1: struct.pack("<Q", BASE + 0x1000000),
}  # fmt: skip
LOAD = (1 << 64) - 2
END, STORE, CALL = (1 << 64) - 1, (1 << 64) - 3, (1 << 64) - 4

STORES = (
    "mov [rdi], rdx", "xchg [rdi], rdx", "lock cmpxchg [rdi], rdx", "lock and byte [rdi], 0xfd",
    "lock or byte [rdi], 2", "lock btr qword [rdi], 5", "mov [rdi+64], rdx", "xchg [rdi+0x400], rdx",
    "mov [r12], r8", "xchg [r12], r8", "xchg [r13], r8", "xchg [rdi], rdi", "mov dword [rdi], edx", "xchg [rdi+rcx], rdx",
    "lock xor [rdi], rdx", "lock and byte [rdi], 0x9f", "mov [rdi], dl", "lock inc qword [rdi]", "mov [rdi], edx",
)  # fmt: skip
"""Stores to rdi, r12 and r13 alike, of rdx and r8 alike; rcx is 0."""

# Each record: number, four arguments, result, and for a store rdx and flags.  Number LOAD is a load from the first
# argument; STORE is the store to it whose number is the second, of the third, with rax = the fourth; CALL calls it.
GUEST = f"""
    jmp start
fault:
    mov rsp, r14
    mov rax, -14
    jmp result
start:
    mov r14, rsp
    mov rbx, {RECORDS:#x}
next:
    mov rax, [rbx]
    cmp rax, -1
    je done
    mov rdi, [rbx+8]
    cmp rax, -2
    je load
    mov rsi, [rbx+16]
    mov rdx, [rbx+24]
    mov r10, [rbx+32]
    cmp rax, -3
    je store
    cmp rax, -4
    je code
    syscall
    jmp result
store:
    mov r12, rdi
    mov r13, rdi
    mov r8, rdx
    mov rax, r10
    xor ecx, ecx
    {"".join(f'''
    cmp esi, {number}
    je store{number}''' for number in range(len(STORES)))}
{"".join(f'''
store{number}:
    cmp ecx, 1
    {store}
    jmp stored
''' for number, store in enumerate(STORES))}
stored:
    pushfq
    pop qword [rbx+56]
    xor rdx, rdi
    xor rdx, r8
    mov [rbx+48], rdx
    jmp result
code:
    call rdi
    jmp result
load:
    mov rax, [rdi]
result:
    mov [rbx+40], rax
    add rbx, 64
    jmp next
done:
    mov edi, {abi.SCHEDOP_SHUTDOWN}
    mov rsi, {DATA + 0x8000:#x}
    mov eax, {HYPERCALL_NUMBERS["sched_op"]}
    syscall
    ud2
"""


PROGRAM = assemble(GUEST, origin=BASE + 0x1000000)
FAULT = PROGRAM.labels["fault"]
"""The handler of page faults: the result is -14."""


def image() -> bytes:
    """A PV kernel of the code above, with 4 MiB of its own memory."""
    notes = b""
    for kind, value in NOTES.items():
        notes += struct.pack("<3I4s", 4, len(value), kind, b"Xen\0") + value + bytes(-len(value) % 4)
    code = PROGRAM.code
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    at = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 7, at, BASE + 0x1000000, 0x1000000, len(code), 0x400000, 1)
    note = struct.pack("<IIQQQQQQ", 4, 4, at + len(code), 0, 0, len(notes), len(notes), 4)
    return header + load + note + code + notes


ENGINES = ("translation", "direct")
ANSWERED_IN_RING_3 = ("vcpu_op", "stack_switch", "set_segment_base")
"""Hypercalls that direct execution may not hear of."""


class Machine:
    """One domain on one of `ENGINES`, ready for its first instruction; `watched` if Python is to do everything."""

    def __init__(self, path: Path, *, watched: bool, engine: str = "translation") -> None:
        stopped: list[int] = []
        self.xen = XenMachine(
            64 * MIB, Clock(), console_output=lambda _: None, tsc=tsc.read, tsc_frequency=tsc.frequency(),
            on_stop=lambda: stopped.append(1),
        )  # fmt: skip
        self.domain = self.xen.domain
        self.engine = engine
        self.vcpu: Vcpu
        try:
            self.vcpu, cpu = xen_processor(self.xen, engine)
        except TechniqueUnavailable as error:
            self.xen.close()
            pytest.skip(str(error))
        self.domain.observers = lambda kind: self.vcpu.observed.get(kind, [])
        with Image(path) as kernel:
            state = self.xen.start(cpu, read_xen_kernel(kernel), None, "")
        self.vcpu.state = state
        cpu.enter_space(state.cr3, True)
        if watched:
            self.vcpu.observed[Hypercall] = [lambda _: None]
        self.frames = self.domain.frames
        self.own = range(self.frames.count - 400, self.frames.count - 400 + 24)
        """Frames of the domain's that nothing uses."""

    def frame_of(self, linear: int) -> int:
        """The frame that the kernel's own mapping has at a linear address."""
        words, table = self.frames.words, self.domain.state.kernel_root
        for shift in (39, 30, 21, 12):
            table = (words[table * 512 + (linear >> shift & 511)] & (1 << 52) - 1) >> 12
        return table

    def put(self, linear: int, data: bytes) -> None:
        for at in range(0, len(data), 4096):
            self.xen.memory.write(self.frame_of(linear + at) << 12, data[at : at + 4096])

    def run(self, records: list[tuple[int, ...]]) -> list[int]:
        """Have the guest make these hypercalls; returns what it got."""
        raw = b"".join(struct.pack("<5Q24x", *record, *(0,) * (5 - len(record))) for record in records)
        self.put(RECORDS, raw + struct.pack("<Q", END))
        self.vcpu.run()
        assert type(self.xen.platform.stop_reason).__name__ == "PowerOff"
        results = b"".join(
            self.xen.memory.read(self.frame_of(RECORDS + at) << 12, 4096) for at in range(0, len(raw), 4096)
        )
        self.after = [struct.unpack_from("<QQ", results, 64 * number + 48) for number in range(len(records))]
        return [struct.unpack_from("<Q", results, 64 * number + 40)[0] for number in range(len(records))]

    def left(self) -> dict[str, Any]:
        """Everything that hypercalls may have changed."""
        domain, frames = self.domain, self.frames
        domain.tables.drop_lingering()
        state = domain.state
        return {
            "owner": bytes(frames.owner), "kind": bytes(frames.kind), "kinds": frames.kind_count.tolist(),
            "references": frames.references.tolist(), "pinned": bytes(frames.pinned),
            "free": frames.free_frames(), "owned": frames.owned, "entries": domain.statistics()["into the guest's kernel"],
            "tables": [bytes(self.xen.memory.read(frame << 12, 4096)).hex() for frame in self.own],
            "roots": (state.kernel_root, state.user_root), "stack": (state.kernel_stack, state.kernel_stack_selector),
            "bases": [domain.cpu.base(segment) for segment in (4, 5)] + [domain.cpu.other_gs],
            "calls": {
                name: count
                for name, count in domain.statistics()["hypercalls"].items()
                if self.engine == "translation" or name not in ANSWERED_IN_RING_3
            },
        }  # fmt: skip

    def close(self) -> None:
        self.vcpu.close()
        self.xen.close()
