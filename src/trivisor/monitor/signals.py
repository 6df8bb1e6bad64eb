"""Host signals while a vCPU runs.

The vCPU sits in one long native call, during which Python runs no signal
handlers.  So the C-level handler's byte on the wakeup descriptor is read by a
thread, which kicks the vCPU; back in Python, the handler runs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def attention(kick: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    """Call `kick` for every signal that has a Python handler; `stop` for an unhandled Ctrl-C.

    KeyboardInterrupt is not raised in the middle of a device's work but at the
    end of the block.  Does nothing outside the main thread, where Python
    handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = threading.Event()

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        interrupted.set()
        stop()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    unhandled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if unhandled:
        signal.signal(signal.SIGINT, on_interrupt)
    watcher = threading.Thread(target=_watch, args=(reader, kick), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        if unhandled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(writer)
        watcher.join()
        os.close(reader)
    if interrupted.is_set():
        raise KeyboardInterrupt


def _watch(reader: int, kick: Callable[[], None]) -> None:
    while os.read(reader, 64):
        kick()
