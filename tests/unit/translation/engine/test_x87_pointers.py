"""What the x87's last instruction and operand pointers say is nothing: the host's own addresses stay hidden."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import DATA, Make


@pytest.mark.parametrize(
    ("store", "pointers"),
    [
        (f"fnstenv [{DATA}]", ((12, 4), (20, 6))),
        (f"db 0x66\n fnstenv [{DATA}]", ((6, 4), (10, 4))),
        (f"fnsave [{DATA}]", ((12, 4), (20, 6))),
        (f"fxsave [{DATA}]", ((8, 16),)),
        (f"mov eax, 3\n xor edx, edx\n xsave [{DATA}]", ((8, 16),)),
    ],
)
def test_stored_state_has_no_pointers(machine: Make, store: str, pointers: tuple[tuple[int, int], ...]) -> None:
    # an unmasked exception that waits, so that every processor stores the pointers
    m = machine(f"fninit\n push 0x37b\n fldcw [rsp]\n fldz\n fld1\n fdiv st0, st1\n {store}\n hlt")
    state = m.vcpu.state
    state.cr4 |= 1 << 18
    state.xcr0 = 3
    m.vcpu.state = state
    m.memory.write(DATA, b"\xee" * 1024)
    m.halt()
    for at, size in pointers:
        assert m.memory.read(DATA + at, size) == bytes(size)
    assert m.memory.read(DATA, 2) != b"\xee\xee", "the rest is there"


def test_xsave_without_x87_leaves_its_bytes_alone(machine: Make) -> None:
    m = machine(f"mov eax, 2\n xor edx, edx\n xsave [{DATA}]\n hlt")
    state = m.vcpu.state
    state.cr4 |= 1 << 18
    state.xcr0 = 3
    m.vcpu.state = state
    m.memory.write(DATA, b"\xee" * 24)
    m.halt()
    assert m.memory.read(DATA + 8, 16) == b"\xee" * 16
