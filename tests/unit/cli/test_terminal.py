"""The escape key, and the terminal's mode."""

import os
import pty
import termios

import pytest

from trivisor.cli.terminal import Action, EscapeKeys, raw_mode


@pytest.mark.parametrize(
    ("typed", "for_guest", "actions"),
    [
        (b"ls\r\x03", b"ls\r\x03", []),
        (b"a\x01xb", b"ab", [Action.END]),
        (b"\x01c\x01h\x01?", b"", [Action.HELP] * 3),
        (b"\x01\x01x", b"\x01x", []),
        (b"\x01q!", b"!", []),
        (b"\x01\x01\x01x", b"\x01", [Action.END]),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_escape_keys(typed: bytes, for_guest: bytes, actions: list[Action], whole: bool) -> None:
    keys = EscapeKeys()
    pieces = [typed] if whole else [bytes([key]) for key in typed]
    fed = [keys.feed(piece) for piece in pieces]
    assert b"".join(data for data, _ in fed) == for_guest
    assert [action for _, some in fed for action in some] == actions


@pytest.fixture
def terminal():
    master, slave = pty.openpty()
    yield slave
    os.close(master)
    os.close(slave)


def test_raw_mode_passes_keys_and_is_undone_after_an_exception(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    with pytest.raises(RuntimeError), raw_mode(terminal):
        local = termios.tcgetattr(terminal)[3]
        assert not local & (termios.ECHO | termios.ICANON | termios.ISIG)
        raise RuntimeError
    assert termios.tcgetattr(terminal) == before


def test_raw_mode_leaves_a_pipe_alone() -> None:
    reader, writer = os.pipe()
    with raw_mode(reader):
        os.write(writer, b"x")
        assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)
