"""Protection keys (Intel SDM 3A 4.6.2): PKRU for user pages, IA32_PKRS for the supervisor's; data accesses alone."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import DATA, Machine, Make, P, U, W
from trivisor.translation.cpu import TranslationVcpu
from trivisor.x86.cpuid import parse_choice

PKE, PKS, KEY = 1 << 22, 1 << 24, 5
PAGE = 0x400000


def guest(machine: Make, source: str, *, cr4: int, page: int, wp: bool = True, cpl: int = 0) -> Machine:
    m = machine(source, cpl=cpl, processor=lambda board: TranslationVcpu(board, parse_choice("+pku,+pks")))
    m.map(PAGE, DATA, page | KEY << 59)
    state = m.initial_state(cpl)
    state.cr4 |= cr4
    if not wp:
        state.cr0 &= ~0x10000
    m.vcpu.state = state
    return m


READ, WRITE = "mov eax, [rsi]\n hlt", "mov [rsi], eax\n hlt"


@pytest.mark.parametrize(
    ("source", "rights", "wp", "error"),
    [
        (READ, 0, True, None), (READ, 1, True, 0x21), (READ, 2, True, None), (READ, 1, False, 0x21),
        (WRITE, 0, True, None), (WRITE, 1, False, 0x23), (WRITE, 2, True, 0x23), (WRITE, 2, False, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("cr4", "page", "register"), [(PKE, P | W | U, "pkru"), (PKS, P | W, "pkrs")])
def test_supervisor(
    machine: Make, source: str, rights: int, wp: bool, error: int | None, cr4: int, page: int, register: str
) -> None:
    m = guest(machine, f"mov cl, [rsi]\n {source}" if rights != 1 else source, cr4=cr4, page=page, wp=wp)
    setattr(m.core, register, rights << 2 * KEY)
    m.vcpu.mode_changed()
    if error is None:
        m.halt(rsi=PAGE)
    else:
        frame = m.fault(rsi=PAGE)
        assert (frame.vector, frame.error, m.core.cr2) == (14, error, PAGE)


@pytest.mark.parametrize(("source", "rights", "error"), [(READ, 1, 0x25), (WRITE, 2, 0x27), (WRITE, 3, 0x27)])
def test_user(machine: Make, source: str, rights: int, error: int) -> None:
    m = guest(machine, source, cr4=PKE, page=P | W | U, wp=False, cpl=3)
    m.core.pkru = rights << 2 * KEY
    m.vcpu.mode_changed()
    assert m.fault(rsi=PAGE).error == error


def test_other_keys_and_other_pages_do_not_count(machine: Make) -> None:
    m = guest(machine, f"mov [rsi], eax\n mov [{DATA + 0x1000}], eax\n hlt", cr4=PKE | PKS, page=P | W | U)
    m.core.pkru = 0xFFFFFFFF & ~(3 << 2 * KEY | 3)
    m.core.pkrs = 0xFFFFFFFC
    m.vcpu.mode_changed()
    m.halt(rsi=PAGE)


def test_wrpkru_and_rdpkru(machine: Make) -> None:
    source = f"mov eax, [rsi]\n xor ecx, ecx\n xor edx, edx\n mov eax, {2 << 2 * KEY}\n wrpkru\n mov edx, 7\n xor eax, eax\n rdpkru\n"
    m = guest(machine, source + "mov [rsi], eax", cr4=PKE, page=P | W | U)
    frame = m.fault(rsi=PAGE)
    assert (frame.vector, frame.error) == (14, 0x23)
    assert (m["rax"], m["rdx"]) == (2 << 2 * KEY, 0)


@pytest.mark.parametrize(
    ("cr4", "registers", "vector"), [(0, {}, 6), (PKE, {"rcx": 1}, 13), (PKE, {"rdx": 1}, 13)]
)
def test_wrpkru_faults(machine: Make, cr4: int, registers: dict[str, int], vector: int) -> None:
    m = guest(machine, "wrpkru", cr4=cr4, page=P | W | U)
    assert m.fault(**registers).vector == vector
