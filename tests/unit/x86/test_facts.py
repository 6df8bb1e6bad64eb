"""Flags, control registers and exceptions against the manual's tables."""

from __future__ import annotations

import pytest

from trivisor.x86 import control, exceptions, flags
from trivisor.x86.exceptions import GuestException, Outcome, combine


def test_flags_text() -> None:
    assert flags.describe(0x246) == "PF ZF IF"
    assert flags.describe(0x3002) == "IOPL=3"
    assert flags.describe(2) == "-"
    assert flags.VALID == 0x3F7FD5


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (0x60000010, True),
        (0x80050033, True),
        (control.CR0_PG, False),
        (control.CR0_NW, False),
        (control.CR0_NW | control.CR0_CD, True),
        (1 << 32, False),
    ],
)
def test_cr0(value: int, valid: bool) -> None:
    assert control.cr0_is_valid(value) is valid


def test_cr4_bits_come_with_features() -> None:
    assert control.cr4_mask(frozenset()) == 0x7FC
    with_both = control.cr4_mask(frozenset({"smep", "xsave", "sha"}))
    assert with_both == 0x7FC | control.CR4_SMEP | control.CR4_OSXSAVE


@pytest.mark.parametrize(
    ("value", "supported", "valid"),
    [(1, 7, True), (3, 7, True), (7, 7, True), (5, 7, False), (2, 7, False), (0, 7, False), (7, 3, False),
     (0xE7, 0xE7, True), (0x67, 0xE7, False), (0xE3, 0xE7, False), (0x1B, 0x1F, True), (0xB, 0x1F, False)],
)  # fmt: skip
def test_xcr0(value: int, supported: int, valid: bool) -> None:
    assert control.xcr0_is_valid(value, supported) is valid


PF, GP, UD, DF, NP, DE = (
    exceptions.PAGE_FAULT,
    exceptions.GENERAL_PROTECTION,
    exceptions.INVALID_OPCODE,
    exceptions.DOUBLE_FAULT,
    exceptions.SEGMENT_NOT_PRESENT,
    exceptions.DIVIDE_ERROR,
)


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (None, GP, Outcome.SERIAL),
        (UD, PF, Outcome.SERIAL),
        (UD, GP, Outcome.SERIAL),
        (GP, UD, Outcome.SERIAL),
        (DE, NP, Outcome.DOUBLE_FAULT),
        (GP, PF, Outcome.SERIAL),
        (PF, UD, Outcome.SERIAL),
        (PF, GP, Outcome.DOUBLE_FAULT),
        (PF, PF, Outcome.DOUBLE_FAULT),
        (DF, GP, Outcome.SHUTDOWN),
        (DF, PF, Outcome.SHUTDOWN),
        (DF, exceptions.DEBUG, Outcome.SERIAL),
    ],
)
def test_double_fault_rule(first: int | None, second: int, outcome: Outcome) -> None:
    assert combine(first, second) is outcome


def test_error_codes() -> None:
    assert sorted(exceptions.PUSHES_ERROR_CODE) == [8, 10, 11, 12, 13, 14, 17, 21]


def test_exception_text() -> None:
    assert str(GuestException(PF, 2, 0xFFFF0000)) == "#PF(0x2) at 0xffff0000"
    assert str(GuestException(UD)) == "#UD"
    assert str(GuestException(30, 0)) == "vector 30(0x0)"
