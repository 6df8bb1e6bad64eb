"""The output of a guest's command, taken out of the serial line's bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivisor.guests.command import CommandOutput, begin_mark, end_mark, new_marker

MARKER = b"abababac"
"""One whose beginnings repeat, so that a partial match can start inside another."""


def line(output: bytes, status: int = 0) -> bytes:
    return b"[    0.1] noise abab\r\n" + begin_mark(MARKER) + output + end_mark(MARKER, status) + b"bye"


def parse(pieces) -> tuple[bytes, CommandOutput]:
    got = bytearray()
    channel = CommandOutput(MARKER, got.extend)
    for piece in pieces:
        channel.feed(piece)
    return bytes(got), channel


OUTPUTS = [b"", b"hi\n", b"no line feed", bytes(range(256)), MARKER, MARKER + b":end:", MARKER + b":end:x"]


@pytest.mark.parametrize("output", [*OUTPUTS, MARKER + b":end:1234\n", b"abab" * 9])
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_output_is_exact_however_it_arrives(output, step):
    data = line(output, 7)
    got, channel = parse(data[at : at + step] for at in range(0, len(data), step))
    assert got == output
    assert channel.status == 7


@given(st.lists(st.sampled_from([b"ab", b"abababac", b":end:", b"1", b"\n", b"ac", b"x"])), st.data())
def test_awkward_output_in_random_pieces(parts, data):
    output = b"".join(parts)
    if any(MARKER + b":end:" + b"1" * count + b"\n" in output for count in (1, 2, 3)):
        return  # that is an end mark
    whole = line(output, 255)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    got, channel = parse(whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True))
    assert got == output
    assert channel.status == 255


def test_output_is_passed_on_at_once():
    got = bytearray()
    channel = CommandOutput(MARKER, got.extend)
    channel.feed(begin_mark(MARKER) + b"progress")
    assert got == b"progress"
    assert (channel.started, channel.status) == (True, None)


def test_status_is_exact():
    for status in (0, 1, 9, 10, 127, 139, 255):
        assert parse([line(b"", status)])[1].status == status


def test_nothing_before_or_after_the_marks_is_output():
    got, channel = parse([line(b"x"), line(b"y", 3)])
    assert got == b"x"
    assert channel.status == 0
    assert bytes(channel.preamble) == b"[    0.1] noise abab\r\n"


def test_guest_that_never_begins():
    got, channel = parse([b"Kernel panic\r\n" * 10_000])
    assert got == b""
    assert not channel.started
    assert channel.preamble.endswith(b"Kernel panic\r\n")
    assert len(channel.preamble) <= 16384


def test_line_that_ends_in_the_middle():
    got = bytearray()
    channel = CommandOutput(MARKER, got.extend)
    channel.feed(begin_mark(MARKER) + b"half" + MARKER[:4])
    assert got == b"half"
    channel.finish()
    assert got == b"half" + MARKER[:4]
    assert channel.status is None


def test_markers_differ():
    assert len({new_marker() for _ in range(50)}) == 50
    assert new_marker().isalnum()
    with pytest.raises(ValueError, match="empty"):
        CommandOutput(b"", lambda data: None)
