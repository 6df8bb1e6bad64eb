"""What an exit costs, Python included: the same few instructions under translation and under KVM, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from rich.console import Console

from bench.process import Failed
from bench.report import titled_table
from trivisor.hardware.kvm.cpu import KvmVcpu
from trivisor.hardware.kvm.guest_cpuid import ring_0_is_emulated
from trivisor.hardware.kvm.system import KvmUnavailable, System
from trivisor.machine import tsc
from trivisor.machine.clock import Clock
from trivisor.machine.exits import Halt
from trivisor.machine.memory import MINIMUM_RAM, GuestMemory
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.machine.vcpu import Vcpu
from trivisor.pc import Pc
from trivisor.translation.cpu import TranslationVcpu
from trivisor.x86.assembler import assemble
from trivisor.x86.descriptors import Gate, build_gate64, build_segment

_CODE, _STACK, _GDT, _IDT = 0x10000, 0x20000, 0x5000, 0x6000
_PORT: Final = 0x500
_DEVICE: Final = 0xD0000000
_APIC: Final = 0xFEE00000
_VECTOR: Final = 0x40
_PML4, _PDPT, _DIRECTORIES = 0x1000, 0x2000, 0x30000
_TABLE, _PAGE = 0x3, 0x83
"""Present and writable; a large page."""
_CS, _DS = 8, 16
_FLAT: Final = {_CS: 0xA09B, _DS: 0xC093}

KERNELS: Final = {
    "nothing": "",
    "port out": "out dx, al",
    "port in": "in al, dx",
    "device read": "mov eax, [rsi]",
    "device write": "mov [rsi], eax",
    "cpuid": "xor eax, eax\n cpuid",
    "rdmsr": "mov ecx, 0x200\n rdmsr",
    # from the processor to itself, through the local APIC
    "interrupt": f"mov ecx, ebx\n mov dword [rdi+0x300], {0x40000 | _VECTOR:#x}\n .wait: cmp ecx, ebx\n je .wait",
    "hlt and interrupt": f"cli\n mov dword [rdi+0x300], {0x40000 | _VECTOR:#x}\n sti\n hlt",
}
"""What each round does; the first is what all have in common, and is taken off."""
HAND_OVER: Final = "state out and in"
_ROUNDS: Final = 400
_PROGRAM: Final = """
    lidt [rel idt_pointer]
    mov dword [rdi+0xF0], 0x1FF    ; the local APIC on
    sti
    mov ebp, ROUNDS
.again:
    mov edx, PORT
    {operation}
    dec ebp
    jnz .again
    cli
    hlt

handler:
    inc ebx
    mov dword [rdi+0xB0], 0        ; end of interrupt
    o64 iret

idt_pointer:
    dw 0xFFF
    dq IDT
"""


class _Nothing:
    """A device that does as little as a device can."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


@dataclass
class Exits:
    """Microseconds an operation, by processor and operation."""

    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: str = ""
    """Why there is no KVM to compare with."""

    def as_json(self) -> dict[str, Any]:
        return {"microseconds": self.costs, "no KVM": self.absent}


def run_exits(runs: int, said: Callable[[str], None]) -> Exits:
    """Medians of so many runs, of the processor time that they took; raises `Failed`."""
    found = Exits()
    makers: dict[str, Callable[[Pc], Vcpu]] = {"translation": TranslationVcpu}
    try:
        with System() as system:
            system.require()
            name = "KVM, ring 0 emulated" if ring_0_is_emulated(system) else "KVM"
        makers[name] = lambda board: KvmVcpu(board, substitute=_substitute(board))
    except KvmUnavailable as reason:
        found.absent = str(reason)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in makers}
    for number in range(1, runs + 1):
        for name, make in makers.items():
            said(f"exits, {number} of {runs}: {name}")
            for kernel in KERNELS:
                taken[name].setdefault(kernel, []).append(_time(make, kernel))
            taken[name].setdefault(HAND_OVER, []).append(_time_hand_over(make))
    for name, kernels in taken.items():
        medians = {kernel: median(seconds) * 1e6 for kernel, seconds in kernels.items()}
        common = medians.pop("nothing")
        hand_over = medians.pop(HAND_OVER)
        found.costs[name] = {kernel: max(us - common, 0) for kernel, us in medians.items()} | {HAND_OVER: hand_over}
    return found


def _substitute(board: Pc) -> Callable[[Any], Vcpu]:
    return lambda cpuid: TranslationVcpu(board, cpuid=cpuid)


def _machine(make: Callable[[Pc], Vcpu], kernel: str) -> tuple[GuestMemory, Vcpu, CpuState]:
    memory = GuestMemory(MINIMUM_RAM)
    board = Pc(
        memory, Clock(), serial_output=lambda data: None, tsc=tsc.read, tsc_frequency=tsc.frequency(),
        on_stop=lambda: None,
    )  # fmt: skip
    board.ports.attach(_PORT, 4, _Nothing())
    board.mmio.attach(_DEVICE, 0x1000, _Nothing())
    program = assemble(
        _PROGRAM.format(operation=KERNELS[kernel]), bits=64, origin=_CODE,
        symbols={"ROUNDS": _ROUNDS, "PORT": _PORT, "IDT": _IDT},
    )  # fmt: skip
    memory.write(_CODE, program.code)
    for selector, attributes in _FLAT.items():
        memory.write_u64(_GDT + selector, build_segment(0, 0xFFFFFFFF, attributes))
    gate = build_gate64(Gate(0xE, _CS, program.labels["handler"], 0, True))
    memory.write(_IDT + 16 * _VECTOR, gate.to_bytes(16, "little"))
    memory.write_u64(_PML4, _PDPT | _TABLE)
    for gib in range(4):
        memory.write_u64(_PDPT + 8 * gib, _DIRECTORIES + 0x1000 * gib | _TABLE)
    for page in range(2048):
        memory.write_u64(_DIRECTORIES + 8 * page, page << 21 | _PAGE)
    state = CpuState(rip=_CODE, gdtr=Table(_GDT, 0x17), cr0=0x80000013, cr3=_PML4, cr4=0x620, efer=0x500)
    state.cs = Segment(_CS, 0, 0xFFFFFFFF, _FLAT[_CS])
    for name in ("ss", "ds", "es", "fs", "gs"):
        setattr(state, name, Segment(_DS, 0, 0xFFFFFFFF, _FLAT[_DS]))
    state.gpr[4], state.gpr[6], state.gpr[7] = _STACK, _DEVICE, _APIC
    try:
        vcpu = make(board)
    except BaseException:
        memory.close()
        raise
    return memory, vcpu, state


def _time(make: Callable[[Pc], Vcpu], kernel: str) -> float:
    """Seconds a round: the second run, when what is translated once has been."""
    memory, vcpu, state = _machine(make, kernel)
    with closing(memory), closing(vcpu):
        for _ in range(2):
            vcpu.state = state
            started = time.process_time()
            exit_ = vcpu.run()
            taken = time.process_time() - started
            if exit_ != Halt(False):
                raise Failed(f"the exits' kernel {kernel!r} ended with {exit_}")
    return taken / _ROUNDS


def _time_hand_over(make: Callable[[Pc], Vcpu]) -> float:
    """Seconds to get the whole state and to set it."""
    memory, vcpu, state = _machine(make, "nothing")
    with closing(memory), closing(vcpu):
        vcpu.state = state
        started = time.process_time()
        for _ in range(_ROUNDS // 4):
            vcpu.state = vcpu.state
        return (time.process_time() - started) / (_ROUNDS // 4)


def print_exits(console: Console, found: Exits) -> None:
    """The costs side by side."""
    columns = list(found.costs)
    table = titled_table(console, "An exit, Python included: microseconds of processor time (medians)", "", *columns)
    for kernel in found.costs[columns[0]]:
        table.add_row(kernel, *(f"{found.costs[name][kernel]:.1f}" for name in columns))
    console.print(table)
    if found.absent:
        console.print(f"KVM is not here: {found.absent}.", highlight=False)
