"""Hypercalls with hostile arguments, made by a guest: by native code where an engine has some, and by its memory."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from tests.unit.paravirt.xen.accounts import check_accounts
from trivisor.machine.stop import PowerOff
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.paravirt.xen.domain import Domain
from trivisor.paravirt.xen.frames import WRITABLE, Frames
from trivisor.translation.cpu import TranslationVcpu
from trivisor.translation.layout import OFFSETS, TLB_ENTRIES, TLB_ENTRY_SIZE

BASE = 0xFFFFFFFF80000000
CODE = BASE + 0x100000
RECORDS, STRUCTURES, DATA, PAGE = CODE + 0x1000, CODE + 0x5000, CODE + 0x4000, CODE + 0xB000
_RECORD = struct.Struct("<8Q")
_MOST = 180
_LONGEST = 1_000_000_000
"""For which a guest may loop that has sent itself back to its beginning, in ns."""
_ENDS = {(HYPERCALL_NUMBERS[name], 2) for name in ("sched_op", "sched_op_compat")} | {
    (HYPERCALL_NUMBERS["vcpu_op"], abi.VCPUOP_DOWN)
}
"""What ends a domain that means it."""

# Each record: number, six arguments, and the stack pointer, where the result goes then.  Number STORE and those above
# it are accesses by instructions: to the first argument, of the second.
STORE, EXCHANGE, COMPARE, HALF, LOAD = range((1 << 64) - 6, (1 << 64) - 1)
PROGRAM = f"""
start:
    mov rdi, traps
    mov eax, set_trap_table
    syscall
    mov rbx, {RECORDS - (1 << 64)}
next:
    mov rax, [rbx]
    cmp rax, -1
    je shutdown
    mov rdi, [rbx + 8]
    mov rsi, [rbx + 16]
    cmp rax, -6
    jae access
    mov rdx, [rbx + 24]
    mov r10, [rbx + 32]
    mov r8, [rbx + 40]
    mov r9, [rbx + 48]
    mov rsp, [rbx + 56]
    syscall
    mov rsp, STACK
    mov [rbx + 56], rax
    add rbx, 64
    inc qword [DATA + 8]
    jmp next
access:
    mov rsp, STACK
    add rbx, 64
    lea rcx, [rax + 6]
    mov rax, [rdi]
    cmp ecx, 1
    jb store
    je exchange
    cmp ecx, 3
    jb compare
    ja next
    mov [rdi], esi
    jmp next
store:
    mov [rdi], rsi
    jmp next
exchange:
    xchg [rdi], rsi
    jmp next
compare:
    lock cmpxchg [rdi], rsi
    jmp next
fault:                              ; whatever came: on with the next record
    mov rsp, STACK
    add rbx, 64
    jmp next
traps:
    dq 0xe033000d, fault, 0xe033000e, fault, 0xe0330006, fault, 0, 0
"""


class Arguments:
    """What hostile guests pass, of a guest whose frames are known."""

    def __init__(self, guest: Any, seed: int) -> None:
        self.rng = random.Random(seed)
        places = [CODE, RECORDS, DATA, STRUCTURES, PAGE]
        own = guest.domain.own
        tables = [guest.table_of(place) for place in places]
        self.frames = [
            *map(guest.frame_of, places), *(table >> 12 for table in tables), guest.domain.state.kernel_root,
            0, own.shared_info, own.grant_frames[0], own._map_at // 512, guest.domain.frames.count,
        ]  # fmt: skip
        self.tables = tables
        # Where the guest sees its frames: as one piece from BASE on.
        frames = [*map(guest.frame_of, places), *(table >> 12 for table in tables), guest.domain.state.kernel_root]
        self.linear = [BASE + own.physical(frame) * 4096 for frame in frames]
        self.linear += [BASE + own.physical(table >> 12) * 4096 + table % 4096 for table in tables]

    def pointer(self) -> int:
        return self.rng.choice([
            STRUCTURES, STRUCTURES + 8, STRUCTURES + 0xFF8, STRUCTURES + 0x1FFC, RECORDS, PAGE + 0x1FF0, DATA, CODE, 0,
            BASE - 4, abi.HYPERVISOR_VIRT_START, (1 << 64) - 8, 1 << 47, 1 << 63,
        ])  # fmt: skip

    def value(self) -> int:
        rng = self.rng
        match rng.randrange(8):
            case 0 | 1:
                return self.pointer()
            case 2:
                return rng.choice(self.frames)
            case 3:
                return rng.choice(self.tables) + rng.choice([0, 1, 2, 3, 8])
            case 4:
                return rng.choice(self.frames) << 12 | rng.choice([0, 1, 3, 5, 7, 0x67, 0x87, 1 << 63 | 7])
            case 5:
                return (1 << rng.choice([16, 31, 32, 47, 52, 63, 64])) - rng.choice([0, 1, 8]) & (1 << 64) - 1
            case _:
                return rng.randrange(32)

    def record(self) -> bytes:
        """Those that native code does come more often."""
        rng = self.rng
        if rng.random() < 0.3:
            at = rng.choice([rng.choice(self.linear) + 8 * rng.randrange(8), self.pointer(), self.value()])
            return _RECORD.pack(rng.choice([STORE, EXCHANGE, COMPARE, HALF, LOAD]), at, self.value(), 0, 0, 0, 0, 0)
        names = [name for name in HYPERCALL_NUMBERS if name != "iret" or rng.random() < 0.1]
        names += ["mmu_update", "mmuext_op", "multicall", "vcpu_op", "set_segment_base", "stack_switch"] * 4
        number = HYPERCALL_NUMBERS[rng.choice(names)]
        count = rng.choice([0, 1, 2, 3, 600, self.value()])
        first = rng.choice([rng.randrange(14), self.pointer(), self.value()])
        if number in (HYPERCALL_NUMBERS["mmu_update"], HYPERCALL_NUMBERS["mmuext_op"]):
            first = self.pointer()
        second = rng.choice([count, self.pointer(), self.value()])
        third = rng.choice([count, 0, self.pointer()])
        fourth = rng.choice([abi.DOMID_SELF, abi.DOMID_SELF, self.value()])
        stack = rng.choice([STRUCTURES, PAGE + 0x800, STRUCTURES + 0x1000, self.value()])
        if (number, first & 0xFFFFFFFF) in _ENDS:
            first = 0
        return _RECORD.pack(number, first, second, third, fourth, self.value(), self.value(), stack)

    def structures(self) -> bytes:
        """Pairs of words, and among them entries of a multicall."""
        parts = b"".join(struct.pack("<QQ", self.value(), self.value()) for _ in range(256))
        return b"".join(self.record() if self.rng.random() < 0.3 else parts[at : at + 64] for at in range(0, 4096, 64)) * 2


def last_longer(domain: Domain) -> None:
    """The guest keeps its first trap table, since without one it ends so soon, and goes on where nobody would wake it."""
    number = HYPERCALL_NUMBERS["set_trap_table"]
    set_trap_table = domain._handlers[number]

    def once(*arguments: int) -> int:
        return 0 if domain.state.traps else set_trap_table(*arguments)

    domain._handlers[number] = once
    domain.block = lambda: None  # type: ignore[method-assign]


def check_tlbs(vcpu: TranslationVcpu, frames: Frames) -> None:
    """No translation that is still known leads to what is not the domain's, or for writing to a page table."""
    words, ram = vcpu.core.words, vcpu.board.memory.base
    for table in (OFFSETS["TLB_KERNEL"], OFFSETS["TLB_USER"]):
        for index in range(TLB_ENTRIES):
            at = (table + index * TLB_ENTRY_SIZE) // 8
            readable, writable = (words[at + n] >> 12 & TLB_ENTRIES - 1 == index for n in range(2))
            frame = words[at + 2] - ram >> 12
            assert not (readable or writable) or frames.owns(frame), f"frame {frame:#x} is not the domain's"
            assert not writable or not frames.kind_count[frame] or frames.kind[frame] == WRITABLE, hex(frame)


@pytest.mark.parametrize("seed", range(8))
def test_a_guest_that_asks_for_anything_harms_itself_alone(boot: Any, seed: int) -> None:
    """It goes on to its end or is ended; no exception of ours, nothing unsupported, and the frame table is true."""
    guest = boot(PROGRAM)
    domain = guest.domain
    last_longer(domain)
    clock = guest.xen.platform.clock
    clock.at(clock.now() + _LONGEST, lambda: guest.xen.platform.stop(PowerOff()))
    arguments = Arguments(guest, seed)
    guest.cpu.store(RECORDS, b"".join(arguments.record() for _ in range(_MOST)) + b"\xff" * 64)
    guest.cpu.store(STRUCTURES, arguments.structures())
    exit_ = guest.run()
    reason = type(guest.xen.platform.stop_reason).__name__
    assert reason in ("PowerOff", "Crash", "Reset"), (exit_, reason, hex(guest.cpu.rip))
    check_accounts(domain, (guest.xen._rings[0], guest.xen._rings[2]))
    if isinstance(guest.vcpu, TranslationVcpu):
        check_tlbs(guest.vcpu, domain.frames)
