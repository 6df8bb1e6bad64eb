"""A spinner on stderr for what takes more than a second before the guest speaks."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.live import Live
    from rich.spinner import Spinner

_DELAY_SECONDS = 1.0


class Progress:
    """Says what is being done.  `say` and `stop` may come from any thread, and `stop` more than once."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()
        self._text = ""
        self._live: Live | None = None
        self._timer: threading.Timer | None = None

    def say(self, text: str, part: float | None = None) -> None:
        """`text` is being done now, of it `part` (0 to 1); shown once something has taken a second."""
        with self._lock:
            self._text = text if part is None else f"{text} {part:.0%}"
            if not self._enabled:
                return
            if self._live is not None:
                self._live.update(self._spinner(), refresh=True)
            elif self._timer is None:
                self._timer = threading.Timer(_DELAY_SECONDS, self._show)
                self._timer.daemon = True
                self._timer.start()

    def stop(self) -> None:
        """Take it off the screen for good."""
        if not self._enabled:
            return
        with self._lock:
            self._enabled = False
            if self._timer is not None:
                self._timer.cancel()
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _show(self) -> None:
        from rich.console import Console
        from rich.live import Live

        with self._lock:
            if not self._enabled:
                return
            self._live = Live(
                self._spinner(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def _spinner(self) -> Spinner:
        from rich.spinner import Spinner

        return Spinner("dots", self._text)


@contextlib.contextmanager
def progress(*, wanted: bool = True) -> Iterator[Progress]:
    """A `Progress` that is off the screen when the block is left; silent when stderr is no terminal."""
    shown = Progress(enabled=wanted and sys.stderr.isatty())
    try:
        yield shown
    finally:
        shown.stop()
