"""Read-only memory on the memory bus."""

from __future__ import annotations


class Rom:
    """Holds `data`; writes are lost.  Its bytes can be executed (`machine.bus.Bus.contents`)."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        pass

    def contents(self, offset: int, length: int) -> bytes:
        """The bytes there, as code is fetched."""
        return self._data[offset : offset + length]
