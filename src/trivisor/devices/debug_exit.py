"""A port that ends the machine with a status, as QEMU's isa-debug-exit device does for test kernels."""

from __future__ import annotations

from collections.abc import Callable


class DebugExit:
    """A write of value v calls `on_exit((v << 1) | 1)`; whoever exits with it keeps the low eight bits.

    The status is odd, so that it never looks like success.  Reads give zero.
    """

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit(value << 1 | 1)
