"""Every program does what the architecture says under every technique present, and the same under each."""

from __future__ import annotations

import pytest

from tests.conformance.machine import EMULATED, TECHNIQUES, UNAVAILABLE, Observation, Program, observe, prepare
from tests.conformance.programs import LINEAR, PROGRAMS
from trivisor.machine.exits import Halt
from trivisor.x86.control import XCR0_AVX512
from trivisor.x86.cpuid import host_xgetbv


def why_not(technique: str, program: Program) -> str:
    """Why it cannot be tried here."""
    if technique in UNAVAILABLE:
        return f"{technique}: {UNAVAILABLE[technique]}"
    if technique in ("hardware", "hardware, KVM's APIC") and EMULATED and program.unless_emulated:
        return f"this host's KVM emulates ring 0: {program.unless_emulated}"
    return ""


def run(technique: str, program: Program) -> tuple[Observation, dict[str, int]]:
    """(What is to be seen, the program's labels)."""
    if reason := why_not(technique, program):
        pytest.skip(reason)
    guest = prepare(technique, program)
    try:
        exit_ = guest.watched_run()
        for address, value in program.memory.items():
            assert guest.memory.read_u32(address) == value, hex(address)
        return observe(guest, exit_), guest.labels
    finally:
        guest.close()


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_architecture(program: Program, technique: str) -> None:
    seen, labels = run(technique, program)
    assert seen.exit == Halt(False), seen
    if program.vector is None:
        assert seen.frame is None, seen.frame
    else:
        assert seen.frame is not None, hex(seen.rip)
        assert (seen.frame.vector, seen.frame.error) == (program.vector, program.error)
        if program.at:
            assert hex(seen.frame.rip) == hex(labels[program.at])
    assert {name: hex(seen.registers[name]) for name in program.registers} == {
        name: hex(value) for name, value in program.registers.items()
    }
    if program.ports is not None:
        assert seen.ports == program.ports
    if program.device is not None:
        assert seen.device == program.device


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_equal_results(program: Program) -> None:
    first, _ = run(TECHNIQUES[0], program)
    compared = 0
    for technique in TECHNIQUES[1:]:
        if not why_not(technique, program):
            other, _ = run(technique, program)
            assert other == first, technique
            compared += 1
    if not compared:
        pytest.skip("; ".join(why_not(technique, program) for technique in TECHNIQUES[1:]))


@pytest.mark.skipif("hardware, ring 3" in UNAVAILABLE, reason=UNAVAILABLE.get("hardware, ring 3", ""))
@pytest.mark.skipif(not host_xgetbv() & XCR0_AVX512, reason="the host has no AVX-512")
def test_exceptions_of_instructions_that_translation_lacks() -> None:
    """Ring 3 has AVX-512 where KVM shows it what the host has."""
    store = "db 0x62, 0xe1, 0xfe, 0x28, 0x7f, 0x07"  # vmovdqu64 [rdi], ymm16
    program = Program("a page fault of AVX-512", "", f"mov rdi, {LINEAR:#x}\n at: {store}\n ud2", cpl=3)
    seen, labels = run("hardware, ring 3", program)
    assert seen.frame is not None and (seen.frame.vector, seen.frame.error) == (14, 6)
    assert (hex(seen.frame.rip), hex(seen.cr2)) == (hex(labels["at"]), hex(LINEAR))
