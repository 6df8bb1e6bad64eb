"""The host's time-stamp counter: reading it, and how fast it counts (Intel SDM 3B 18.17)."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from functools import cache

from trivisor.x86.cpuid import host_cpuid

_CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx,32; or rax,rdx; ret
_SETTLE_NS = 20_000_000
"""Shortest span to measure over: the clocks are read to about 50 ns, so 20 ms give a few parts in 10^6."""
_HYPERVISOR_TIMING_LEAF = 0x40000010
"""Where hypervisors that follow VMware tell the TSC frequency in kHz (EAX)."""


def _load_code() -> Callable[[], int]:
    """Place `_CODE` in executable memory; it stays for the life of the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    if libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "cannot make memory executable")
    _keep.append(page)
    # PYFUNCTYPE keeps the GIL: the code is far shorter than giving it up would be.
    return ctypes.PYFUNCTYPE(ctypes.c_uint64)(address)


_keep: list[mmap.mmap] = []
_read = _load_code()


def read() -> int:
    """The counter's value now, 64 bits."""
    return _read()


def _sample() -> tuple[int, int]:
    """The counter and the raw monotonic clock (ns) at the same moment, the closest pair of several."""
    best: tuple[int, int, int] | None = None
    for _ in range(20):
        before = _read()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        after = _read()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, now)
    assert best is not None
    return best[1], best[2]


_first = _sample()


def _measured() -> int:
    """Hz against CLOCK_MONOTONIC_RAW, over the time since this module was loaded but at least 20 ms."""
    tsc_start, start = _first
    elapsed = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - start
    if elapsed < _SETTLE_NS:
        time.sleep((_SETTLE_NS - elapsed) / 1e9)
    tsc_end, end = _sample()
    return (tsc_end - tsc_start) * 1_000_000_000 // (end - start)


def _told() -> int | None:
    """Hz as CPUID tells it exactly, or None: leaf 0x15 with its crystal, or the hypervisor's leaf."""
    if host_cpuid(0)[0] >= 0x15:
        denominator, numerator, crystal, _ = host_cpuid(0x15)
        if denominator and numerator and crystal:
            return crystal * numerator // denominator
    under_hypervisor = host_cpuid(1)[2] >> 31
    if under_hypervisor and host_cpuid(0x40000000)[0] >= _HYPERVISOR_TIMING_LEAF:
        return host_cpuid(_HYPERVISOR_TIMING_LEAF)[0] * 1000 or None
    return None


@cache
def frequency() -> int:
    """Counts per second (Hz).

    What CPUID tells when it tells and it is within 1 % of what is measured (a
    hypervisor may have moved this machine to another host); else as measured.
    The first call may sleep for up to 20 ms.
    """
    measured = _measured()
    told = _told()
    return told if told is not None and abs(told - measured) * 100 < measured else measured
