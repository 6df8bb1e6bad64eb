"""Linux's format for kernels packed by LZ4: blocks of 8 MiB, each by itself (LZ4 frame format, "Legacy frame")."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from functools import cache, partial
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

from trivisor.machine.jobs import Jobs
from trivisor.machine.memory import prefer_huge_pages

MAGIC = b"\x02\x21\x4c\x18"
_LIBRARY = "liblz4.so.1"
_BLOCK = 8 << 20
"""All blocks unpack to this, but for the last."""
_THREADS = min(max(len(os.sched_getaffinity(0)) - 1, 1), 4)
"""Unpacking gives up the GIL, and goes on beside what the main thread does."""


class LibraryMissing(Exception):
    """LZ4's library is not there."""


def unpack(packed: bytes, end: int, size: int) -> mmap:
    """The `size` bytes, at most 1 GiB and at least 1, that `packed` has before `end`, unpacked in a few threads.

    Raises ValueError for what is damaged, `LibraryMissing`.
    """
    blocks, function = list(_blocks(packed, end, size)), _decompress()
    whole = mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)  # shared memory has no large pages
    target = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    prefer_huge_pages(target, size)
    source = ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value or 0
    room = [min(_BLOCK, size - done) for done in range(0, size, _BLOCK)]
    work = [
        partial(function, source + at, target + number * _BLOCK, length, room[number])
        for number, (at, length) in enumerate(blocks)
    ]
    made = Jobs(work, _THREADS).results()
    if made != room:
        raise ValueError(f"its blocks are of {made} bytes")
    return whole


def _blocks(packed: bytes, end: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the packed blocks of so much."""
    at = len(MAGIC)
    for _ in range(0, size, _BLOCK):
        if at + 4 > end:
            raise ValueError("a block is missing")
        (length,) = struct.unpack_from("<I", packed, at)
        at += 4
        if length > end - at:
            raise ValueError("a block is cut off")
        yield at, length
        at += length


@cache
def _decompress() -> Callable[[int, int, int, int], int]:
    """LZ4_decompress_safe of lz4.h: (source, target, length, room) to how much it gave, or less than 0.

    The library itself, since Python's module for it copies what it gives, twice, to memory that is new each time: the
    host's page faults for that took longer than the unpacking.
    """
    try:
        function = ctypes.CDLL(_LIBRARY).LZ4_decompress_safe
    except OSError:
        raise LibraryMissing(f"{_LIBRARY} is missing") from None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
