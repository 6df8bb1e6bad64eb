"""The native page walker and the TLBs against the slow reference of x86/paging.py, on random page tables."""

from __future__ import annotations

import random

import pytest

from tests.unit.translation.engine.guest import (
    CODE,
    HANDLERS,
    LARGE,
    NX,
    PD,
    PML4,
    Machine,
    Make,
    P,
    U,
    W,
)
from trivisor.x86 import paging
from trivisor.x86.control import CR4_PKE, CR4_PKS
from trivisor.x86.exceptions import GuestException
from trivisor.x86.paging import Access, PagingMode, ProtectionKeys

TABLES = 0x60000
"""Where the random tables lie: 0x60000 the PDPT, and so on."""
BASE = 0x80_0000_0000
"""The second PML4 entry's: 512 GiB of random mappings begin here."""
TARGETS = 0x400000
"""Physical memory that they lead to, up to 60 MiB."""
_A_D = paging.ACCESSED | paging.DIRTY


def _entry(rng: random.Random, target: int, *, large: bool = False) -> int:
    """A random entry: mostly present and mostly permissive, so that walks come to their end often enough."""
    value = target
    for bit, chance in ((P, 0.93), (W, 0.75), (U, 0.75), (paging.ACCESSED, 0.4), (paging.DIRTY, 0.4),
                        (paging.GLOBAL, 0.3), (NX, 0.15), (8, 0.1), (16, 0.1), (1 << 9, 0.2), (1 << 55, 0.1)):  # fmt: skip
        if rng.random() < chance:
            value |= bit
    if large:
        value |= LARGE
        if rng.random() < 0.1:
            value |= paging.PAT_LARGE
        if rng.random() < 0.05:
            value |= 1 << 13  # reserved in a large page
    if rng.random() < 0.04:
        value |= 1 << rng.choice((40, 45, 51))  # beyond MAXPHYADDR
    if rng.random() < 0.5:
        value |= rng.randrange(16) << 59  # a protection key, where it is a leaf
    return value


def _tables(m: Machine, rng: random.Random) -> list[int]:
    """Random tables below the second PML4 entry; returns linear addresses worth a look."""
    memory, addresses = m.memory, []
    pdpt, pd, pt = TABLES, TABLES + 0x1000, TABLES + 0x2000
    memory.write(TABLES, bytes(0x3000))
    top = _entry(rng, pdpt) | P
    memory.write_u64(PML4 + 8, top | (LARGE if rng.random() < 0.02 else 0))
    for i in range(3):
        if rng.random() < 0.25:
            memory.write_u64(pdpt + 8 * i, _entry(rng, rng.choice((0, 0, 1 << 32)), large=True))
        else:
            memory.write_u64(pdpt + 8 * i, _entry(rng, pd))
    for i in range(4):
        if rng.random() < 0.4:
            memory.write_u64(pd + 8 * i, _entry(rng, TARGETS + (rng.randrange(28) << 21), large=True))
        else:
            memory.write_u64(pd + 8 * i, _entry(rng, pt))
    for i in range(8):
        memory.write_u64(pt + 8 * i, _entry(rng, TARGETS + (rng.randrange(56 << 8) << 12)))
    for _ in range(12):
        where = rng.randrange(4) << 30 | rng.randrange(5) << 21 | rng.randrange(9) << 12
        addresses.append(BASE + where + rng.randrange(0, 0xFF0, 16))
    return addresses


def _snapshot(m: Machine) -> tuple[bytes, int]:
    return m.memory.read(TABLES, 0x3000), m.memory.read_u64(PML4 + 8)


def _restore(m: Machine, saved: tuple[bytes, int]) -> None:
    m.memory.write(TABLES, saved[0])
    m.memory.write_u64(PML4 + 8, saved[1])


def _reference(m: Machine, linear: int, access: Access, user: bool) -> tuple[int, int] | GuestException:
    """(physical address, global), or the exception."""
    core = m.core
    mode = PagingMode.from_registers(core.cr0, core.cr3, core.cr4, core.efer, physical_bits=m.vcpu.mmu.physical_bits)
    keys = ProtectionKeys(core.pkru if core.cr4 & CR4_PKE else None, core.pkrs if core.cr4 & CR4_PKS else None)
    try:
        found = paging.walk(m.vcpu.mmu._tables, mode, linear, access, user=user, keys=keys)
    except GuestException as fault:
        return fault
    return found.physical, found.global_


def _without_accessed(tables: tuple[bytes, int]) -> tuple[list[int], int]:
    """The tables without A bits: the processor may set them on the way to a fault, or not."""
    raw, top = tables
    mask = ~paging.ACCESSED
    entries = [int.from_bytes(raw[i : i + 8], "little") & mask for i in range(0, len(raw), 8)]
    return entries, top & mask


def _control(m: Machine, rng: random.Random) -> None:
    """Random WP, SMEP, PGE, NXE, PKE and PKS, and rights by protection key."""
    m.core.pkru = rng.choice((0, rng.getrandbits(32), rng.getrandbits(32) & rng.getrandbits(32))) & ~3
    m.core.pkrs = rng.choice((0, rng.getrandbits(32) & rng.getrandbits(32))) & ~3
    state = m.vcpu.state
    state.cr0 = state.cr0 & ~0x10000 | rng.choice((0, 0x10000))
    state.cr4 = state.cr4 & ~0x100080 | rng.choice((0, 0x80)) | rng.choice((0, 0x100000))
    state.cr4 = state.cr4 & ~(CR4_PKE | CR4_PKS) | rng.choice((0, CR4_PKE)) | rng.choice((0, CR4_PKS))
    state.efer = state.efer & ~0x800 | rng.choice((0, 0x800))
    m.vcpu.state = state


@pytest.mark.parametrize("seed", range(3))
def test_the_native_walker_agrees_with_the_reference(machine: Make, seed: int) -> None:
    rng = random.Random(seed)
    m = machine("hlt")
    faults = 0
    for _ in range(25):
        _control(m, rng)
        for linear in _tables(m, rng):
            user, access = rng.random() < 0.5, rng.choice(list(Access))
            before = _snapshot(m)
            expected = _reference(m, linear, access, user)
            want = _snapshot(m)
            _restore(m, before)
            what = f"{access.value} at {linear:#x}, user {user}"
            try:
                found = m.vcpu.mmu.walk(linear, access, user)
            except GuestException as fault:
                faults += 1
                assert isinstance(expected, GuestException), (what, str(fault), expected)
                assert (fault.vector, fault.error_code, fault.address) == (14, expected.error_code, linear), what
                assert _without_accessed(_snapshot(m)) == _without_accessed(before), what
            else:
                assert (found.physical, found.global_) == expected, what
                assert _snapshot(m) == want, what
    assert 60 < faults < 280


_INSTRUCTIONS = {
    Access.READ: "mov rax, [rbx]\n hlt",
    Access.WRITE: "mov [rbx], rcx\n hlt",
    Access.EXECUTE: "jmp rbx",
}


@pytest.mark.parametrize("user", [False, True])
def test_guest_accesses_agree_with_the_reference(machine: Make, user: bool) -> None:
    """Twice each: by way of a miss, and by what the miss has left in the TLB."""
    rng = random.Random(user)
    m = machine("align 16\n read: mov rax, [rbx]\n int 0x80\n write: mov [rbx], rcx\n int 0x80\n execute: jmp rbx")
    for vector in (14, 0x80):
        m.gate(vector, HANDLERS + 16 * vector, dpl=3, ist=1)
    for i in range(32):  # the kernel's own pages, for SMEP's sake
        m.memory.write_u64(PD + 8 * i, i << 21 | P | W | LARGE)
    m.map(CODE, CODE, P | W | (U if user else 0))
    outcomes = {"done": 0, "fault": 0}
    for _ in range(14):
        m.restart(3 if user else 0)
        _control(m, rng)
        code_at_target = b"\xcd\x80"  # int 0x80
        for linear in _tables(m, rng):
            access = rng.choice(list(Access))
            before = _snapshot(m)
            expected = _reference(m, linear, access, user)
            want = _snapshot(m)
            _restore(m, before)
            m.flush()
            value = rng.getrandbits(64)
            if not isinstance(expected, GuestException):
                physical = expected[0]
                if physical + 16 > m.memory.size or physical < TARGETS:
                    continue
                m.memory.write_u64(physical, value)
                if access is Access.EXECUTE:
                    m.memory.write(physical, code_at_target)
                    m.vcpu.memory_written(physical, 16)
            for attempt in range(2):
                m.restart_at(access.value, 3 if user else 0, rbx=linear, rcx=value + attempt)
                frame = m.fault()
                if isinstance(expected, GuestException):
                    rip = linear if access is Access.EXECUTE else m.labels[access.value]
                    assert (frame.vector, frame.error, m.core.cr2) == (14, expected.error_code, linear)
                    assert frame.rip == rip
                    assert _without_accessed(_snapshot(m)) == _without_accessed(before)
                    outcomes["fault"] += 1
                    continue
                assert frame.vector == 0x80, (hex(linear), access, frame)
                outcomes["done"] += 1
                assert _snapshot(m) == want
                if access is Access.READ:
                    assert m["rax"] == value
                elif access is Access.WRITE:
                    assert m.memory.read_u64(expected[0]) == (value + attempt) & (1 << 64) - 1
                else:
                    assert frame.rip == linear + 2
    assert min(outcomes.values()) > 15


def test_a_write_after_a_read_sets_the_dirty_bit(machine: Make) -> None:
    m = machine("mov eax, [rbx]\n mov [rbx], eax\n hlt\n write: mov [rbx], eax\n hlt")
    at = m.map(TARGETS, TARGETS)
    m.halt(rbx=TARGETS)
    assert m.memory.read_u64(at) & _A_D == _A_D


def test_a_read_modify_write_sets_no_dirty_bit_when_it_faults(machine: Make) -> None:
    m = machine("add [rbx], eax\n hlt")
    at = m.map(TARGETS, TARGETS, P | U)
    m.fault(rbx=TARGETS)
    assert m.memory.read_u64(at) & paging.DIRTY == 0
