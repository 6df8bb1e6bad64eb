"""The POST code port of a PC, which kernels also write to for a short delay."""

from __future__ import annotations


class PostCode:
    """Remembers the last byte written, as the scratch register behind port 0x80 does."""

    def __init__(self) -> None:
        self.code = 0
        """The last code."""

    def read(self, offset: int, size: int) -> int:
        return self.code

    def write(self, offset: int, size: int, value: int) -> None:
        self.code = value & 0xFF
