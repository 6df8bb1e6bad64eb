"""A raw disk in a file or a block device of the host's: what is written has to stay there.

Data goes to the file at once, so that it outlives this process; `flush` has
the host put it on its own disk (fdatasync(2)).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

SECTOR = 512
"""Bytes; what sizes and positions on a disk are counted in."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_Transfer = Callable[[int, list[memoryview], int], int]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class DiskError(ValueError):
    """A file that cannot be a disk; the message is one line for the user."""


class DiskFile:
    """An open disk; `read`, `write`, `flush` and `discard` raise OSError, and may be called from any thread.

    No other machine can have it meanwhile, unless all only read.  Raises
    OSError for a file that cannot be opened, and DiskError.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        # Opening must not wait for the other end of a FIFO.
        mode = os.O_RDONLY if readonly else os.O_RDWR
        self._descriptor = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.sectors = self._measure()
            """The size in sectors."""
            self._lock()
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def written_at(self) -> int:
        """When the file was last written to, in ns since the epoch; 0 for a device, of which nobody knows."""
        found = os.fstat(self._descriptor)
        return max(found.st_mtime_ns, 0) if stat.S_ISREG(found.st_mode) else 0

    def _measure(self) -> int:
        kind = os.fstat(self._descriptor).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise DiskError(f"{self.path}: a disk is a file or a block device")
        size = os.lseek(self._descriptor, 0, os.SEEK_END)
        if not size or size % SECTOR:
            raise DiskError(f"{self.path}: {size} bytes are no whole number of sectors of {SECTOR} bytes")
        return size // SECTOR

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if self.readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DiskError(f"{self.path} is in use as another machine's disk") from None

    def read(self, position: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` with the bytes from `position` on."""
        self._all(os.preadv, position, buffers)

    def write(self, position: int, buffers: Sequence[memoryview]) -> None:
        """Write `buffers` from byte `position` on."""
        self._all(os.pwritev, position, buffers)

    def _all(self, transfer: _Transfer, position: int, buffers: Sequence[memoryview]) -> None:
        rest = list(buffers)
        while rest:
            done = transfer(self._descriptor, rest, position)
            if not done:
                raise OSError(f"{self.path}: the file has become shorter")
            position += done
            while rest and done >= len(rest[0]):
                done -= len(rest.pop(0))
            if rest and done:
                rest[0] = rest[0][done:]

    def flush(self) -> None:
        """Have the host put everything written on its own disk."""
        os.fdatasync(self._descriptor)

    def discard(self, position: int, length: int) -> None:
        """These bytes read as zero from now on, and take no room where the host can do that."""
        if _libc.fallocate(self._descriptor, _PUNCH_HOLE | _KEEP_SIZE, position, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)
