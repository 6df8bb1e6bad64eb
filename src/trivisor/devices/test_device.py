"""The test device of kvm-unit-tests, as QEMU's `pc-testdev` has it: scratch ports and memory, lines to drive."""

from __future__ import annotations

from collections.abc import Sequence

from trivisor.machine.interrupts import Line
from trivisor.machine.saving import Remembers

SCRATCH_PORT, SCRATCH_LENGTH = 0xE0, 16
LINES_PORT = 0x2000
LINES = 24
MEMORY_BASE, MEMORY_LENGTH = 0xFF000000, 0x10000

_VALUE_LENGTH = 4


class ScratchPorts(Remembers):
    """Four bytes that keep what is written, at whatever size, and twelve that take anything.

    A write to the second four asks for a page to be flushed from the host's mappings: nothing that a guest
    could see comes of it.
    """

    remembered = ("_value",)

    def __init__(self) -> None:
        self._value = bytearray(_VALUE_LENGTH)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._value[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        end = min(offset + size, _VALUE_LENGTH)
        if offset < end:
            self._value[offset:end] = value.to_bytes(size, "little")[: end - offset]


class DeviceMemory(Remembers):
    """Memory that is reached as a device, so that every access to it is emulated."""

    remembered = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = bytearray(MEMORY_LENGTH)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        end = min(offset + size, MEMORY_LENGTH)
        self._bytes[offset:end] = value.to_bytes(size, "little")[: end - offset]


class LinePorts:
    """A port for each line of `lines`: a write drives it, up unless the value is zero."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = lines

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset < len(self._lines):
            self._lines[offset](bool(value & 0xFF))
