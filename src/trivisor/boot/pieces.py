"""A file's content in the pieces that a decompressor gave: to join them would be one more copy of a whole kernel."""

from __future__ import annotations

from collections.abc import Sequence


class Pieces:
    """Bytes in pieces that follow each other; offsets count from the first one's beginning."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self.size = sum(map(len, pieces))

    def views(self, offset: int, length: int) -> list[memoryview]:
        """The `length` bytes from `offset` on, in as many parts as they lie in; raises ValueError past the end."""
        end = offset + length
        if not length:
            return []
        if end > self.size:
            raise ValueError(f"it ends after {self.size} bytes, not {end}")
        found: list[memoryview] = []
        first = 0
        for piece in self._pieces:
            last = first + len(piece)
            if first < end and offset < last:
                found.append(memoryview(piece)[max(offset - first, 0) : min(end, last) - first])
            first = last
        return found

    def read(self, offset: int, length: int) -> bytes:
        """The same in one; raises ValueError."""
        return b"".join(self.views(offset, length))
