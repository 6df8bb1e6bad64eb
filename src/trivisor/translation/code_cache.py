"""The code cache: host machine code, in memory that is mapped twice, writable here and executable there."""

from __future__ import annotations

import ctypes
import mmap
import os

_PROT_READ_EXECUTE = mmap.PROT_READ | mmap.PROT_EXEC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class CodeCache:
    """An append-only region of machine code; `writable` and `base` are two views of the same bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        descriptor = os.memfd_create("trivisor-code")
        try:
            os.ftruncate(descriptor, size)
            self._mapping = mmap.mmap(descriptor, size)
            base = _libc.mmap(None, size, _PROT_READ_EXECUTE, mmap.MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if base is None or base == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "this host does not let a program map executable memory")
        self.base: int = base
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
            _libc.munmap(self.base, self.size)
            self.base = 0
            self.writable.release()
            self._mapping.close()
