"""Random 16- and 32-bit code among random segments, gates and tasks: an exit comes out of it, never a Python exception."""

from __future__ import annotations

import random
import threading

import pytest

from tests.unit.translation.engine.guest import CODE, DATA, GDT, IDT, KERNEL_CS32, TSS, Make
from tests.unit.translation.engine.real_guest import REAL_CODE, RealMachine
from tests.unit.translation.engine.test_random_code import random_code
from trivisor.machine.exits import DebugStop, Halt, Kicked, Shutdown, Unsupported
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.translation.cpu import TranslationVcpu
from trivisor.x86.descriptors import Gate, build_gate, build_segment

PROGRAMS, STEPS = 40, 12
_SELECTORS = range(0x50, 0x100, 8)
_KINDS = (0x4093, 0x0093, 0x4097, 0x0097, 0x4091, 0x409B, 0x009B, 0x4099, 0x409F, 0xC093, 0xC09B, 0x40F3, 0x00FB, 0x0082)
_NAMES = ("es", "ss", "ds", "fs", "gs")


def descriptor(rng: random.Random) -> int:
    """A segment, a TSS or a gate, mostly a sensible one."""
    kind = rng.randrange(8)
    if kind == 0:
        return build_segment(TSS + 0x100 * rng.randrange(4), 0x67, rng.choice((0x89, 0x8B, 0x81, 0x83, 0xE9)))
    if kind == 1:
        selector = rng.choice((KERNEL_CS32, *_SELECTORS))
        return build_gate(Gate(rng.choice((4, 5, 6, 7, 0xC, 0xE, 0xF)), selector, CODE, 3, True, 0, rng.randrange(4)))
    if kind == 2:
        return rng.getrandbits(64)
    attributes = rng.choice(_KINDS)
    limit = 0xFFFFFFFF if attributes & 0x8000 else rng.choice((0xFF, 0x1FFF, 0xFFFF, 0xFFFFF))
    return build_segment(rng.choice((0, CODE, DATA, DATA + 0xFF8)), limit, attributes | rng.choice((0, 0x60)))


def randomize(rng: random.Random, state: CpuState) -> None:
    for number in {*range(16)} - {1, 4}:
        state.gpr[number] = rng.choice((DATA, DATA + 0x40, rng.getrandbits(32), rng.getrandbits(16), rng.getrandbits(6)))
    state.gpr[1] = rng.randrange(40)
    state.gpr[4] = rng.choice((0x800, 0x1FFE, 0xFFFE, 1, 0x10000, rng.getrandbits(32)))


def go_on(vcpu: TranslationVcpu, rng: random.Random) -> int:
    """Some steps, then a run that is kicked; how many steps there were."""
    steps = 0
    for _ in range(STEPS):
        exit_ = vcpu.step()
        assert isinstance(exit_, DebugStop | Halt | Kicked | Shutdown | Unsupported)
        steps += 1
        if not isinstance(exit_, DebugStop):
            break
    else:
        timer = threading.Timer(0.02, vcpu.kick)
        timer.start()
        assert isinstance(vcpu.run(), Halt | Kicked | Shutdown | Unsupported)
        timer.join()
    vcpu.state = vcpu.state
    return steps


@pytest.mark.parametrize("kind", ["32-bit", "16-bit", "virtual-8086"])
def test_protected_mode(machine: Make, kind: str) -> None:
    rng = random.Random(kind)
    m = machine("hlt", 32)
    tables = m.memory.read(0x1000, 0x9000)
    steps = 0
    for _ in range(PROGRAMS):
        m.memory.write(0x1000, tables)
        for selector in _SELECTORS:
            m.memory.write_u64(GDT + selector, descriptor(rng))
        for vector in range(16):
            m.memory.write_u64(IDT + 8 * vector, descriptor(rng) if rng.random() < 0.3 else m.memory.read_u64(IDT + 8))
        m.memory.write(TSS + 0x20, rng.randbytes(0x300))
        state = m.initial_state()
        randomize(rng, state)
        state.gdtr = Table(GDT, 0xFF)
        base = CODE & ~0xFFFF
        if kind == "virtual-8086":
            state.rflags = 2 | 1 << 17 | rng.choice((0, 0x3000))
            for name in ("cs", *_NAMES):
                selector = base >> 4 if name == "cs" else rng.choice((0, base >> 4, 0x2000, 0xFFFF))
                setattr(state, name, Segment(selector & 0xFFFF, (selector & 0xFFFF) << 4, 0xFFFF, 0xF3))
        else:
            cpl = rng.choice((0, 0, 3))
            state.rflags = 2 | rng.choice((0, 0x4000, 0x40000))
            code = (0x409B if kind == "32-bit" else 0x009B) | cpl << 5
            state.cs = Segment(KERNEL_CS32 | cpl, base, 0xFFFF, code)
            for name in _NAMES:
                attributes = rng.choice((0x4093, 0x0093, 0xC093)) if name == "ss" else rng.choice(_KINDS)
                limit = rng.choice((0xFFFF, 0xFFF, 0xFFFFFFFF))
                attributes = attributes & ~0x60 | cpl << 5
                setattr(state, name, Segment(rng.choice((0, *_SELECTORS)), rng.choice((0, DATA)), limit, attributes))
        state.cr0 |= rng.choice((0, 4, 8))
        state.cs.base = 0xA0000 if kind == "virtual-8086" else state.cs.base
        at = state.cs.base + rng.choice((0, 0xFF0, 0xFFF0))
        code_bytes = random_code(rng, 32 if kind == "32-bit" else 16)
        m.memory.write(at, code_bytes)
        m.vcpu.memory_written(at, len(code_bytes))
        state.rip = at - state.cs.base
        m.vcpu.state = state
        steps += go_on(m.vcpu, rng)
        m.board.stop_reason = None
    assert steps > PROGRAMS


def test_real_mode() -> None:
    rng = random.Random(16)
    m = RealMachine("hlt")
    tables = m.memory.read(0x1000, 0x9000)
    steps = 0
    for _ in range(PROGRAMS):
        m.memory.write(0x1000, tables)
        state = m.initial_state()
        randomize(rng, state)
        at = rng.choice((0, 0xFF0, 0xFFF0))
        code = random_code(rng, 16)
        m.memory.write(REAL_CODE + at, code)
        m.vcpu.memory_written(REAL_CODE + at, len(code))
        state.rip = at
        for name in _NAMES:
            getattr(state, name).limit = rng.choice((0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFF))
        m.vcpu.state = state
        steps += go_on(m.vcpu, rng)
        m.board.stop_reason = None
    assert steps > PROGRAMS
    m.close()
