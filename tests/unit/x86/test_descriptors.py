"""Descriptors: known encodings, and that building undoes parsing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivisor.x86 import descriptors as d


def test_flat_code_segments_of_linux() -> None:
    code64 = d.parse_segment(0x00AF9B000000FFFF)
    assert (code64.base, code64.limit, code64.attributes) == (0, 0xFFFFFFFF, 0xA09B)
    assert code64.is_code and code64.is_readable and not code64.is_conforming and code64.present
    assert code64.attributes & d.LONG and not code64.attributes & d.DB
    user_data = d.parse_segment(0x00CFF3000000FFFF)
    assert (user_data.attributes, user_data.dpl, user_data.type) == (0xC0F3, 3, 3)
    assert user_data.is_data and user_data.is_writable and not user_data.is_system


def test_base_and_limit_are_scattered() -> None:
    segment = d.parse_segment(0x12_40_93_345678_9ABC | 0x5 << 48)
    assert segment.base == 0x12345678
    assert segment.limit == 0x59ABC
    assert segment.attributes == 0x4093


def test_long_mode_tss() -> None:
    raw = d.build_system_segment(0xFFFFFE0000003000, 0x206F, d.PRESENT | d.TSS)
    assert raw >> 64 == 0xFFFFFE00
    tss = d.parse_system_segment(raw)
    assert (tss.base, tss.limit, tss.type, tss.is_system) == (0xFFFFFE0000003000, 0x206F, d.TSS, True)
    assert d.upper_half_is_valid(raw)
    assert not d.upper_half_is_valid(raw | 1 << 104)


def test_limits_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="does not end a page"):
        d.build_segment(0, 0x12345, d.GRANULARITY)
    with pytest.raises(ValueError, match="do not fit"):
        d.build_segment(0, 0x100000, 0)
    with pytest.raises(ValueError, match="do not fit"):
        d.build_segment(1 << 32, 0, 0)


@given(st.integers(0, 2**64 - 1))
def test_segment_round_trip(raw: int) -> None:
    segment = d.parse_segment(raw)
    assert d.build_segment(segment.base, segment.limit, segment.attributes) == raw


def test_interrupt_gate_with_ist() -> None:
    raw = 0x00000000_FFFFFFFF_8180_8E03_0010_0B40
    gate = d.parse_gate64(raw)
    assert gate == d.Gate(d.INTERRUPT_GATE, 0x10, 0xFFFFFFFF81800B40, 0, True, ist=3)
    assert d.build_gate64(gate) == raw


def test_legacy_gates() -> None:
    call = d.parse_gate(0x0012_EC05_0008_3456)
    assert call == d.Gate(d.CALL_GATE, 8, 0x123456, 3, True, parameters=5)
    assert d.build_gate(call) == 0x0012_EC05_0008_3456
    assert d.parse_gate(0xFFFF_8600_0008_1234).offset == 0x1234
