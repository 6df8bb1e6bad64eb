"""Console bytes to and from host files, by threads, so that no slow reader or writer holds up the vCPU."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

OUTPUT_AHEAD = 1 << 20
"""Bytes that the guest may be ahead of whoever reads its console."""
_CHUNK = 4096


class Writer:
    """Writes what it is given to a descriptor, in a thread of its own.

    `hurry` tells that the machine is wanted back; `put` then does not wait for
    a full buffer.  `failed` is called once when the descriptor takes no more,
    and `error` says why.
    """

    def __init__(self, descriptor: int, hurry: Callable[[], bool], failed: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._hurry = hurry
        self._failed = failed
        self._pending = bytearray()
        self._changed = threading.Condition()
        self._closing = False
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="console output", daemon=True)
        self._thread.start()

    def put(self, data: bytes) -> None:
        """Have `data` written; waits while too much is pending."""
        with self._changed:
            if self.error is not None:
                return
            self._pending += data
            self._changed.notify_all()
            while len(self._pending) > OUTPUT_AHEAD and self.error is None and not self._hurry():
                self._changed.wait(0.1)

    def close(self, patience: float | None = None) -> None:
        """Write what is pending and end; give up after `patience` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)

    def _work(self) -> None:
        while data := self._next():
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                with self._changed:
                    self.error = error
                    self._pending.clear()
                    self._changed.notify_all()
                self._failed()
                return

    def _next(self) -> bytes:
        """All that is pending, as soon as there is something; empty at the end."""
        with self._changed:
            while not self._pending and not self._closing:
                self._changed.wait()
            data = bytes(self._pending)
            self._pending.clear()
            self._changed.notify_all()
            return data


class Reader:
    """Reads a descriptor to its end, in a thread of its own, and hands the bytes to `take`."""

    def __init__(self, descriptor: int, take: Callable[[bytes], None], ready: Callable[[], bool]) -> None:
        self._descriptor = descriptor
        self._take = take
        self._ready = ready
        self._stop_reader, self._stop_writer = os.pipe()
        self._thread = threading.Thread(target=self._work, name="console input", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what was not read stays for others."""
        os.close(self._stop_writer)
        self._thread.join()
        os.close(self._stop_reader)

    def _work(self) -> None:
        while True:
            # While the guest has enough to read, look again soon instead of reading on.
            wanted = [self._descriptor] if self._ready() else []
            readable, _, _ = select.select([*wanted, self._stop_reader], [], [], None if wanted else 0.01)
            if self._stop_reader in readable:
                return
            if self._descriptor not in readable:
                continue
            try:
                data = os.read(self._descriptor, _CHUNK)
            except OSError:  # a terminal that hung up
                return
            if not data:
                return
            self._take(data)
