"""Near jumps to addresses that are not canonical: #GP(0) at the jump, with the stack as it was before."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import DATA, STACK, Make

WILD = 0xAAAAAAAAAAAAAAAA


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    ("jump", "depth"),
    [
        ("jmp rax", 0),
        ("call rax", 0),
        (f"jmp [{DATA}]", 0),
        (f"call [{DATA}]", 0),
        ("push rax\n here: ret", 8),
        ("push rax\n here: ret 16", 8),
        ("mov r11, rax\n here: jmp r11", 0),
    ],
)
def test_the_jump_faults(machine: Make, jump: str, depth: int, stepped: bool) -> None:
    m = machine((jump if "here:" in jump else f"here: {jump}") + "\n nop")
    m.memory.write_u64(DATA, WILD)
    m.set(rax=WILD)
    if stepped:
        while not (0x9000 <= m.core.rip < 0xA000):
            m.step()
        m.core.rip &= ~15
        m.run()
    frame = m.frame() if stepped else m.fault()
    assert (frame.vector, frame.error, frame.rip, frame.rsp) == (13, 0, m.labels["here"], STACK - depth)


def test_a_later_jump_from_the_same_place_works(machine: Make) -> None:
    m = machine("again: jmp rax\n there: hlt")
    assert m.fault(rax=WILD).rip == m.labels["again"]
    m.restart_at("again", rax=m.labels["there"])
    m.halt()


def test_running_off_the_end_of_the_canonical_addresses(machine: Make) -> None:
    """No jump has led there, so it is the next instruction that faults, at its own address."""
    m = machine("jmp rax")
    m.map(0x7FFFFFFFF000, DATA)
    m.memory.write_u8(DATA + 0xFFF, 0x90)
    frame = m.fault(rax=0x7FFFFFFFFFFF)
    assert (frame.vector, frame.error, frame.rip) == (13, 0, 0x800000000000)
