"""The spinner: only on a terminal, only after a while, gone when the guest speaks."""

import io
import sys
import threading
import time

import pytest

from trivisor.cli import progress as module
from trivisor.cli.progress import progress


class Screen(io.StringIO):
    """A stderr that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_DELAY_SECONDS", 0.02)
    monkeypatch.setenv("TERM", "xterm")

    def use(*, terminal: bool) -> Screen:
        made = Screen(terminal)
        monkeypatch.setattr(sys, "stderr", made)
        return made

    return use


def wait_for(screen: Screen, text: str) -> bool:
    deadline = time.monotonic() + 5
    while text not in screen.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    return text in screen.getvalue()


def test_it_shows_what_is_done_and_how_far(screen) -> None:
    shown = screen(terminal=True)
    with progress() as made:
        made.say("fetching")
        assert wait_for(shown, "fetching")
        made.say("unpacking", 0.5)
        assert wait_for(shown, "unpacking 50%")
        made.stop()
        after = shown.getvalue()
        made.say("too late")
        time.sleep(0.1)
        assert shown.getvalue() == after
    assert not [thread for thread in threading.enumerate() if "Refresh" in type(thread).__name__]


def test_what_is_quick_shows_nothing(screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DELAY_SECONDS", 0.05)
    shown = screen(terminal=True)
    with progress() as made:
        made.say("quick")
    time.sleep(0.1)
    assert shown.getvalue() == ""


def test_it_is_silent_without_a_terminal(screen) -> None:
    shown = screen(terminal=False)
    with progress() as made:
        made.say("fetching")
        time.sleep(0.1)
    assert shown.getvalue() == ""
