"""Random code in random circumstances: whatever a guest executes, an exit comes out of it, never a Python exception."""

from __future__ import annotations

import random

import pytest
from iced_x86 import Decoder, FlowControl

from tests.unit.translation.engine.guest import CODE, DATA, DEVICE, HANDLERS, Make
from trivisor.machine.exits import DebugStop, Halt, Kicked, Shutdown, Unsupported

PROGRAMS, STEPS = 60, 25
_BEGINNINGS = (
    "", "", "0f", "660f", "f3", "f20f", "f0", "48", "66", "0f01", "0f00", "c5", "c4", "0fae", "0fc7", "d9", "db", "df", "0f20",
)  # fmt: skip


def random_code(rng: random.Random, bits: int) -> bytes:
    """Some thirty instructions that decode, few of them branches."""
    code = bytearray()
    while len(code) < 120:
        raw = bytes.fromhex(rng.choice(_BEGINNINGS)) + rng.randbytes(14)
        instruction = Decoder(bits, raw, ip=CODE).decode()
        branches = instruction.flow_control != FlowControl.NEXT
        if not instruction.is_invalid and not (branches and rng.random() < 0.8):
            code += raw[: instruction.len]
    return bytes(code)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("cpl", [0, 3])
def test_random_code(machine: Make, bits: int, cpl: int) -> None:
    rng = random.Random(bits + cpl)
    m = machine("hlt", bits)
    m.record()
    tables = m.memory.read(0x1000, 0x9000)
    mask = (1 << bits) - 1
    steps = 0
    for _ in range(PROGRAMS):
        m.memory.write(0x1000, tables)
        m.restart(cpl)
        at = CODE + rng.choice((0, 0xFF0, 0xF80))
        code = random_code(rng, bits)
        m.memory.write(at, code)
        m.vcpu.memory_written(at, len(code))
        for number in {*range(16)} - {1, 4}:
            values = DATA, DATA + 0x40, 0x400FF8, rng.getrandbits(64), rng.getrandbits(8), DEVICE, 0xC0000080, CODE
            m.core.regs[number] = rng.choice(values) & mask
        m.set(rcx=rng.randrange(40), rip=at, rflags=2 | rng.getrandbits(12) & 0xCD5)
        for _ in range(STEPS):
            exit_ = m.step()
            assert isinstance(exit_, DebugStop | Halt | Kicked | Shutdown | Unsupported)
            steps += 1
            if not isinstance(exit_, DebugStop) or HANDLERS <= m.core.rip < HANDLERS + 0x1000:
                break
        m.board.stop_reason = None
        assert m.vcpu.state.rflags & 2
    assert steps > PROGRAMS
