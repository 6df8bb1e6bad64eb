"""The code cache: host machine code, in memory that is mapped twice, writable here and executable there."""

from __future__ import annotations

import ctypes
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
        self._used = memoryview(bytearray(8)).cast("Q")

    @property
    def used(self) -> int:
        """Bytes in use, from the start."""
        return self._used[0]

    @used.setter
    def used(self, used: int) -> None:
        self._used[0] = used

    @property
    def writable_base(self) -> int:
        """Host address of the writable view."""
        with memoryview(self._mapping) as view:
            return ctypes.addressof(ctypes.c_char.from_buffer(view))

    def share_used(self, word: memoryview) -> None:
        """Keep the count of bytes in use in `word`, one 64-bit item, from now on; native code may then append too."""
        word[0] = self.used
        self._used = word

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
            self._used.release()
            self.writable.release()
            self._mapping.close()
