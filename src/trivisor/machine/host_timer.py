"""A timer of the host that sends a signal to the thread that made it (timer_create(2), SIGEV_THREAD_ID)."""

from __future__ import annotations

import ctypes

_SYS_GETTID = 186
_SYS_TIMER_CREATE = 222
SYS_TIMER_SETTIME = 223
_SYS_TIMER_DELETE = 226
_CLOCK_MONOTONIC = 1
_SIGEV_THREAD_ID = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _SigEvent(ctypes.Structure):
    """struct sigevent."""

    _fields_ = (
        ("value", ctypes.c_uint64),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("padding", ctypes.c_int * 11),
    )


class HostTimer:
    """Sends `signal_number`, with `value` in its siginfo, to the calling thread when it fires; raises OSError."""

    def __init__(self, signal_number: int, value: int = 0) -> None:
        event = _SigEvent(value, signal_number, _SIGEV_THREAD_ID, _libc.syscall(_SYS_GETTID))
        self._timer = ctypes.c_int()
        if _libc.syscall(
            _SYS_TIMER_CREATE, _CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
        ):
            raise OSError(ctypes.get_errno(), "cannot create a host timer")
        self._specification = (ctypes.c_int64 * 4)()
        self._pointer = ctypes.addressof(self._specification)

    @property
    def number(self) -> int:
        """The kernel's timer_t, for timer_settime(2) by others."""
        return self._timer.value

    def arm(self, delay: int) -> None:
        """Fire once, `delay` nanoseconds from now (at least one)."""
        self._specification[0] = self._specification[1] = 0
        self._specification[2], self._specification[3] = divmod(max(delay, 1), 1_000_000_000)
        self._set()

    def every(self, period: int) -> None:
        """Fire each `period` nanoseconds from now on; 0 stops it."""
        self._specification[:] = [*divmod(period, 1_000_000_000)] * 2
        self._set()

    def _set(self) -> None:
        _libc.syscall(SYS_TIMER_SETTIME, self._timer.value, 0, ctypes.c_void_p(self._pointer), None)

    def close(self) -> None:
        """Delete the host timer."""
        _libc.syscall(_SYS_TIMER_DELETE, self._timer.value)
