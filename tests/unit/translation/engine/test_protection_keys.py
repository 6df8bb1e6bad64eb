"""Protection keys (Intel SDM 3A 4.6.2): PKRU for user pages, IA32_PKRS for the supervisor's; data accesses alone."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import CODE, DATA, HANDLERS, LARGE, PD, Machine, Make, P, U, W
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


def _wrpkru(rights: int) -> str:
    return f"mov eax, {rights}\n wrpkru\n"


TAKEN = [(2 << 2 * KEY, "mov [rsi], eax", 3), (1 << 2 * KEY, "mov ebx, [rsi]", 1), (2, "mov [rdi], eax", 3), (1, "mov ebx, [rdi]", 1)]


@pytest.mark.parametrize("tunes", [False, True])
@pytest.mark.parametrize(("rights", "access", "error"), TAKEN)
@pytest.mark.parametrize("cpl", [0, 3])
def test_rights_that_are_taken_away(
    machine: Make, rights: int, access: str, error: int, cpl: int, tunes: bool
) -> None:
    """Of a page that the TLBs know; key 0 too, which most pages have.  By the very access that has worked before."""
    source = f"again: {access}\n {_wrpkru(rights)} dec r8d\n jnz again\n int 0x80"
    m = guest(machine, source, cr4=PKE, page=P | W | U, cpl=cpl)
    m.gate(14, HANDLERS + 14 * 16, ist=1)
    for i in range(32):  # what the processor itself reads must stay the supervisor's; and code is not data
        m.memory.write_u64(PD + 8 * i, i << 21 | P | W | LARGE)
    m.map(CODE, CODE)
    m.map(PAGE, DATA, P | W | U | KEY << 59)
    m.map(PAGE + 0x1000, DATA)
    m.vcpu.blocks.tunes_at_once = tunes
    m.core.regs[8] = 2
    frame = m.fault(rsi=PAGE, rdi=PAGE + 0x1000, rcx=0, rdx=0, r8=2)
    assert (frame.vector, frame.error, frame.rip) == (14, 0x20 | error | (4 if cpl else 0), m.labels["again"])
    assert m.vcpu.statistics()["native helpers"]["pkru"] == 1


def test_rights_that_come_back(machine: Make) -> None:
    source = _wrpkru(2 << 2 * KEY) + "mov ebx, [rsi]\n" + _wrpkru(0) + "mov [rsi], eax\n" + _wrpkru(1 << 2 * KEY)
    m = guest(machine, source + _wrpkru(0) + "mov ebp, [rsi]\n hlt", cr4=PKE, page=P | W | U)
    m.halt(rsi=PAGE, rcx=0, rdx=0)
    assert m.vcpu.statistics()["exits"]["call_out"] == 1  # the HLT


def test_more_pages_than_are_noted(machine: Make) -> None:
    """All of 40 pages fault after rights are taken, read by read; the handler steps over the access."""
    reads = "\n".join(f"mov ebx, [rsi+{0x1000 * i}]" for i in range(40))
    source = f"{reads}\n {_wrpkru(1 << 2 * KEY)} {reads}\n hlt\n handler: inc ebp\n add qword [rsp+8], 6\n add rsp, 8\n iretq"
    m = guest(machine, source, cr4=PKE, page=P | W | U)
    for i in range(40):
        m.map(PAGE + 0x1000 * i, DATA + 0x1000 * i, P | W | U | KEY << 59)
    m.gate(14, "handler")
    m.halt(rsi=PAGE + 0x80, rbp=0, rcx=0, rdx=0)  # a displacement of 32 bits each but the first
    assert m["rbp"] >= 39


def test_wrpkru_keeps_the_flags(machine: Make) -> None:
    source = "std\n mov ebx, [rsi]\n cmp edx, 1\n" + _wrpkru(1 << 2 * KEY) + "pushfq\n pop rbx\n cld\n hlt"
    m = guest(machine, source, cr4=PKE, page=P | W | U)
    m.halt(rsi=PAGE, rcx=0, rdx=0)
    assert m["rbx"] & 0x4D5 == 0x495  # DF, SF, AF, PF, CF


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
