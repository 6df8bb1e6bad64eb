"""The processor's state and identity as plain values and back; what no processor can be in is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from trivisor.machine.cpuid import GuestCpuid, guest_cpuid
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.machine.state_values import load_cpuid, load_state, save_cpuid, save_state
from trivisor.x86.cpuid import host_cpuid, host_xgetbv

CPUID = guest_cpuid(host_cpuid, tsc_frequency=2_000_000_000, crystal_frequency=25_000_000)


def long_mode_state() -> CpuState:
    area = bytearray(576)
    area[0:2], area[24:28], area[512] = b"\x7f\x03", b"\x80\x1f\0\0", 3
    return CpuState(
        gpr=[index * 0x0123456789ABCD for index in range(16)],
        rip=0xFFFFFFFF81000000,
        rflags=0x246,
        cs=Segment(0x10, 0, 0xFFFFFFFF, 0xA09B),
        ss=Segment(0, 0, 0xFFFFFFFF, 0x10000),
        gs=Segment(0, 0xFFFF888000000000, 0xFFFFFFFF, 0xC093),
        gdtr=Table(0xFFFFFE0000001000, 0x7F),
        cr0=0x80050033,
        cr2=0x7FFF12345678,
        cr3=0x1234000,
        cr4=0x6A0,
        cr8=3,
        efer=0xD01,
        xcr0=1,
        pkru=0x55555554,
        msrs={0xC0000081: 0x23001000000000, 0x277: 0x7040600070406},
        xsave=bytes(area),
        halted=True,
        nmi_pending=True,
        interrupts_pending=[0x20, 0xEC],
        exception_pending=(14, 2),
    )


def test_nothing_of_a_state_is_left_out() -> None:
    assert {field.name for field in fields(CpuState)} == {*save_state(CpuState())}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("state", [CpuState(), long_mode_state()], ids=["reset", "64-bit"])
def test_a_state_comes_back_as_it_was(state: CpuState) -> None:
    assert load_state(plain(save_state(state)), CPUID) == state


def test_an_identity_comes_back_as_it_was() -> None:
    again: GuestCpuid = load_cpuid(plain(save_cpuid(CPUID)), host_cpuid, host_xgetbv())
    assert again == CPUID


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("rip", lambda saved: saved.pop("rip")),
        ("rip", lambda saved: saved.update(rip=-1)),
        ("RIP", lambda saved: saved.update(rip=1 << 63)),
        ("gpr", lambda saved: saved["gpr"].pop()),
        ("gpr", lambda saved: saved["gpr"].__setitem__(0, 1 << 64)),
        ("cs", lambda saved: saved.update(cs=[1, 2, 3])),
        ("CS", lambda saved: saved["cs"].__setitem__(3, 0xE09B)),
        ("base", lambda saved: saved["gs"].__setitem__(1, 1 << 50)),
        ("CR0", lambda saved: saved.update(cr0=0x80000000)),
        ("CR4", lambda saved: saved.update(cr4=0x16A0)),
        ("CR4", lambda saved: saved.update(cr4=0)),
        ("EFER", lambda saved: saved.update(efer=0xFFFF)),
        ("EFER", lambda saved: saved.update(efer=0x400)),
        ("cr3", lambda saved: saved.update(cr3=1 << 41)),
        ("XCR0", lambda saved: saved.update(xcr0=0x100 | 1)),
        ("XCR0", lambda saved: saved.update(xcr0=6)),
        ("RFLAGS", lambda saved: saved.update(rflags=0)),
        ("RFLAGS", lambda saved: saved.update(rflags=0x20002)),
        ("XSAVE", lambda saved: saved.update(xsave="00" * 100)),
        ("XSAVE", lambda saved: saved.update(xsave="ff" * 576)),
        ("XSAVE", lambda saved: saved.update(xsave="00" * 520 + "01" + "00" * 55)),
        ("xsave", lambda saved: saved.update(xsave="00" * (1 << 20))),
        ("halted", lambda saved: saved.update(halted=1)),
        ("msrs", lambda saved: saved.update(msrs=[[1]])),
        ("interrupts", lambda saved: saved.update(interrupts_pending=[256])),
        ("vector", lambda saved: saved.update(exception_pending=[99, None])),
    ],
)
def test_what_no_processor_is_in_is_refused(what: str, change: Callable[[dict[str, Any]], Any]) -> None:
    saved = plain(save_state(long_mode_state()))
    change(saved)
    with pytest.raises(ValueError, match=what):
        load_state(saved, CPUID)


@pytest.mark.parametrize("saved", [None, 3, [], {}, "x"])
def test_what_is_no_state_is_refused(saved: Any) -> None:
    with pytest.raises(ValueError):
        load_state(saved, CPUID)
    with pytest.raises(ValueError):
        load_cpuid(saved, host_cpuid, host_xgetbv())


def test_a_processor_that_this_host_cannot_stand_for() -> None:
    saved = plain(save_cpuid(CPUID))
    with pytest.raises(ValueError, match="lacks avx2"):
        load_cpuid(saved | {"features": ["avx2"]}, lambda leaf, subleaf=0: (0, 0, 0, 0), 7)
    with pytest.raises(ValueError, match="la57"):
        load_cpuid(saved | {"features": [*saved["features"], "la57"]}, host_cpuid, host_xgetbv())
    with pytest.raises(ValueError, match="registers"):
        load_cpuid(saved | {"hidden_xcr0": 1 << 18}, host_cpuid, host_xgetbv())
