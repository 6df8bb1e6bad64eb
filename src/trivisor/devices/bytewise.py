"""Access to devices whose registers are one byte wide.

The ISA bridge splits a wider access into byte cycles at consecutive ports,
lowest first; bytes beyond the device's window read as ones and vanish when
written.
"""

from __future__ import annotations

_WIDEST = 8


class ByteDevice:
    """Base of devices with byte registers: implement both `_byte` methods for offsets below `length`."""

    length = 1
    """Bytes of address space that the device decodes."""

    def read_byte(self, offset: int) -> int:
        raise NotImplementedError

    def write_byte(self, offset: int, value: int) -> None:
        raise NotImplementedError

    def read(self, offset: int, size: int) -> int:
        if size == 1 and 0 <= offset < self.length:
            return self.read_byte(offset)
        value = 0
        for index in range(min(size, _WIDEST)):
            inside = 0 <= offset + index < self.length
            value |= (self.read_byte(offset + index) if inside else 0xFF) << 8 * index
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        for index in range(min(size, _WIDEST)):
            if 0 <= offset + index < self.length:
                self.write_byte(offset + index, value >> 8 * index & 0xFF)
