"""The code cache: host machine code, in memory that is mapped twice, writable here and executable there."""

from __future__ import annotations

import mmap
import os

from trivisor.machine.memory import host_map, host_unmap


class CodeCache:
    """An append-only region of machine code; `writable` and `base` are two views of the same bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        descriptor = os.memfd_create("trivisor-code")
        try:
            os.ftruncate(descriptor, size)
            self._mapping = mmap.mmap(descriptor, size)
            try:
                self.base = host_map(size, mmap.PROT_READ | mmap.PROT_EXEC, descriptor=descriptor)
            except OSError as error:
                raise OSError(error.errno, "this host does not let a program map executable memory") from None
        finally:
            os.close(descriptor)
        """Host address that the code runs at."""
        self.writable = memoryview(self._mapping)
        self.used = 0

    def append(self, code: bytes | bytearray) -> int:
        """Add `code`, 16-byte aligned, and return its offset; MemoryError when the cache is full."""
        offset = (self.used + 15) & ~15
        end = offset + len(code)
        if end > self.size:
            raise MemoryError("code cache full")
        self.writable[offset:end] = code
        self.used = end
        return offset

    def close(self) -> None:
        """Unmap both views."""
        if self.base:
            host_unmap(self.base, self.size)
            self.base = 0
            self.writable.release()
            self._mapping.close()
