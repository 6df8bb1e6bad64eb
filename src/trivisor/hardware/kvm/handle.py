"""A file descriptor of KVM's and the ioctls on it."""

from __future__ import annotations

import ctypes
import fcntl
import os
from typing import Any, Self

_libc = ctypes.CDLL(None, use_errno=True)


class Handle:
    """Owns `descriptor`; `control` raises OSError as the kernel says."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def control(self, request: int, argument: Any = 0) -> int:
        """ioctl with a number or with a buffer (a ctypes structure, a bytearray) that the kernel may change."""
        if isinstance(argument, int) and argument >> 31:
            return self._control_wide(request, argument)
        result = fcntl.ioctl(self.descriptor, request, argument)
        assert isinstance(result, int)
        return result

    def _control_wide(self, request: int, argument: int) -> int:
        """The same for numbers beyond the C int that `fcntl.ioctl` takes."""
        result = int(_libc.ioctl(self.descriptor, ctypes.c_ulong(request), ctypes.c_ulong(argument)))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def close(self) -> None:
        """Give the descriptor back; harmless the second time."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
