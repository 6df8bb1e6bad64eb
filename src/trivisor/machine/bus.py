"""The two address spaces of devices: I/O ports and memory-mapped I/O.

A device is given offsets from the start of its window and never learns where
the board put it.  Reads of what nobody claims give all ones, writes to it
vanish, as on a PC.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol, runtime_checkable


class Device(Protocol):
    """Something with registers.  `size` is 1, 2, 4 or 8 bytes; values are unsigned and fit in `size`."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


@runtime_checkable
class Executable(Protocol):
    """A device that is memory, whose bytes can be fetched as code."""

    def contents(self, offset: int, length: int) -> bytes: ...


class Bus:
    """Maps address windows to devices."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._starts: list[int] = []
        self._windows: list[tuple[int, int, Device]] = []
        self.on_attach: Callable[[int, int], None] = lambda base, length: None
        """Called with each window that a device is given."""

    def attach(self, base: int, length: int, device: Device) -> None:
        """Give [base, base + length) to `device`; ValueError when a part of it is taken."""
        position = bisect_right(self._starts, base)
        before = self._windows[position - 1] if position else None
        after = self._windows[position] if position < len(self._windows) else None
        if (before and before[0] + before[1] > base) or (after and base + length > after[0]):
            raise ValueError(f"{self.name} {base:#x}+{length:#x} overlaps another device")
        self._starts.insert(position, base)
        self._windows.insert(position, (base, length, device))
        self.on_attach(base, length)

    def detach(self, base: int) -> None:
        """Take away what was attached at `base`; ValueError when there is nothing."""
        position = bisect_right(self._starts, base) - 1
        if position < 0 or self._starts[position] != base:
            raise ValueError(f"{self.name} {base:#x}: nothing is attached there")
        del self._starts[position], self._windows[position]

    def find(self, address: int) -> tuple[Device, int] | None:
        """Return (device, offset) for `address`, or None where nothing answers."""
        position = bisect_right(self._starts, address) - 1
        if position < 0:
            return None
        base, length, device = self._windows[position]
        offset = address - base
        return (device, offset) if offset < length else None

    def contents(self, address: int, length: int) -> bytes | None:
        """What lies there in memory that code can be fetched from; None where there is no such."""
        found = self.find(address)
        if found is None or not isinstance(found[0], Executable):
            return None
        return found[0].contents(found[1], length)

    def read(self, address: int, size: int) -> int:
        found = self.find(address)
        if found is None:
            return (1 << 8 * size) - 1
        return found[0].read(found[1], size) & ((1 << 8 * size) - 1)

    def write(self, address: int, size: int, value: int) -> None:
        found = self.find(address)
        if found is not None:
            found[0].write(found[1], size, value)
