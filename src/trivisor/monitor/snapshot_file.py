"""The file of a snapshot: a header, the guest's RAM in pieces, and what else the machine remembers as JSON.

    header | pieces of RAM, each compressed by zstd | the index, JSON compressed by zstd

The header says where the index is and has its digest; the index has the digest
of each piece, and which pages it holds.  Pages of zeros are left out.
Everything is held against its digest, and every number against its limits,
before it is used: a file may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import BufferedWriter
from itertools import islice
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

import zstandard

from trivisor.machine.jobs import Jobs
from trivisor.machine.memory import PAGE_SIZE, GuestMemory
from trivisor.machine.saving import Saved

FORMAT: Final = 3
"""Grows with every change that an older version would misread."""
MAGIC: Final = b"trivisor machine"
_HEADER = Struct("<16sIIQQ32s")
"""Magic, format, zero, place and length of the index, its digest."""
PIECE_PAGES: Final = 256
"""Pages of a piece, at most."""
_INDEX_LIMIT = 64 << 20
"""Bytes of an index that is not compressed: many times what a guest of 16 GiB needs."""
_LEVEL = 3
_THREADS = 2
_ZERO_PAGE = bytes(PAGE_SIZE)
_ZERO_PIECE = bytes(PIECE_PAGES * PAGE_SIZE)


class SnapshotError(ValueError):
    """Why a file is no snapshot that can be used, in one line that names it."""


class _Piece(NamedTuple):
    """One compressed piece of RAM in the file."""

    at: int
    length: int
    digest: bytes
    runs: list[tuple[int, int]]
    """(first page, pages), by physical page number."""

    @property
    def pages(self) -> int:
        return sum(count for _, count in self.runs)


def write_snapshot(path: Path, remembered: Saved, memory: GuestMemory) -> int:
    """Write a file, whole or not at all, and return its length in bytes; raises OSError.

    `remembered` is all but the RAM, in plain values.
    """
    import tempfile

    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            length = _write(file, remembered, memory)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return length


def _write(file: BufferedWriter, remembered: Saved, memory: GuestMemory) -> int:
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    file.write(bytes(_HEADER.size))
    pieces = []
    for runs in _pieces(memory):
        pages = b"".join(memory.view[page * PAGE_SIZE : (page + count) * PAGE_SIZE] for page, count in runs)
        packed = compressor.compress(pages)
        file.write(packed)
        pieces.append([len(packed), hashlib.sha256(packed).hexdigest(), [*sum(runs, ())]])
    at = file.tell()
    index = compressor.compress(json.dumps({**remembered, "ram": pieces}, separators=(",", ":")).encode())
    file.write(index)
    file.flush()
    file.seek(0)
    file.write(_HEADER.pack(MAGIC, FORMAT, 0, at, len(index), hashlib.sha256(index).digest()))
    return at + len(index)


def _pieces(memory: GuestMemory) -> Iterator[list[tuple[int, int]]]:
    """All pages that are not zero, as runs, in pieces of at most `PIECE_PAGES`."""
    used = _used_pages(memory)
    while pages := list(islice(used, PIECE_PAGES)):
        runs: list[tuple[int, int]] = []
        for page in pages:
            if runs and sum(runs[-1]) == page:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((page, 1))
        yield runs


def _used_pages(memory: GuestMemory) -> Iterator[int]:
    view = memory.view
    for start, length in memory.regions():
        for block in range(start, start + length, len(_ZERO_PIECE)):
            end = min(block + len(_ZERO_PIECE), start + length)
            if view[block:end] == _ZERO_PIECE[: end - block]:
                continue
            for at in range(block, end, PAGE_SIZE):
                if view[at : at + PAGE_SIZE] != _ZERO_PAGE:
                    yield at // PAGE_SIZE


class SnapshotFile:
    """An open file whose header and index are right; raises `SnapshotError` or OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A pipe must not be waited for.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(self._descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise self.error("no snapshot: it is not a file")
            self.remembered, at = self._index(found.st_size)
            self._pieces = self._read_pieces(at)
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def error(self, what: str) -> SnapshotError:
        """What is wrong with the file."""
        return SnapshotError(f"{self.path}: {what}")

    def _damaged(self) -> SnapshotError:
        return self.error("a damaged snapshot; make it again")

    def _index(self, size: int) -> tuple[Saved, int]:
        """What is remembered beside the RAM, and where that ends."""
        header = os.pread(self._descriptor, _HEADER.size, 0)
        if not header.startswith(MAGIC):
            raise self.error("no snapshot of a machine")
        if len(header) < _HEADER.size:
            raise self._damaged()
        _, version, zero, at, length, digest = _HEADER.unpack(header)
        if version != FORMAT:
            raise self.error(f"a snapshot of format {version}; this version reads format {FORMAT}")
        if zero or at < _HEADER.size or length > _INDEX_LIMIT or at + length != size:
            raise self._damaged()
        packed = os.pread(self._descriptor, length, at)
        if hashlib.sha256(packed).digest() != digest:
            raise self._damaged()
        try:
            index = json.loads(_unpack(packed, _INDEX_LIMIT))
        except (ValueError, RecursionError, zstandard.ZstdError):
            raise self._damaged() from None
        if not isinstance(index, dict):
            raise self._damaged()
        return index, at

    def _read_pieces(self, end: int) -> list[_Piece]:
        pieces = []
        at = _HEADER.size
        listed = self.remembered.pop("ram", None)
        try:
            for length, digest, numbers in listed:
                runs = list(zip(numbers[::2], numbers[1::2], strict=True))
                piece = _Piece(at, length, bytes.fromhex(digest), runs)
                good = all(type(number) is int and number >= 0 for number in (length, *numbers))
                if not good or not 0 < piece.pages <= PIECE_PAGES or at + length > end:
                    raise ValueError
                pieces.append(piece)
                at += length
            if at != end:
                raise ValueError
        except (TypeError, ValueError):
            raise self._damaged() from None
        return pieces

    def begin_loading(self, memory: GuestMemory) -> Jobs[None]:
        """Begin to put the RAM into `memory`, which is all zeros, in other threads."""
        return Jobs([partial(self._load, piece, memory) for piece in self._pieces], _THREADS)

    def _load(self, piece: _Piece, memory: GuestMemory) -> None:
        if not all(memory.is_ram(page * PAGE_SIZE, count * PAGE_SIZE) for page, count in piece.runs):
            raise self._damaged()
        packed = os.pread(self._descriptor, piece.length, piece.at)
        if hashlib.sha256(packed).digest() != piece.digest:
            raise self._damaged()
        runs = [memory.view[page * PAGE_SIZE : (page + count) * PAGE_SIZE] for page, count in piece.runs]
        try:
            _unpack_into(packed, runs)
        except (ValueError, zstandard.ZstdError):
            raise self._damaged() from None


def _unpack_into(packed: bytes, parts: list[memoryview]) -> None:
    """Fill `parts` from a zstd frame, which must have just so much; ValueError, ZstdError.

    So it goes where it is to be without the GIL, and without being there twice.
    """
    told = zstandard.get_frame_parameters(packed)
    if told.content_size != sum(map(len, parts)) or told.dict_id:
        raise ValueError("another length")
    with zstandard.ZstdDecompressor(max_window_size=_INDEX_LIMIT).stream_reader(packed) as reader:
        for part in parts:
            if reader.readinto(part) != len(part):
                raise ValueError("too short")


def _unpack(packed: bytes, limit: int) -> bytes:
    """A zstd frame's content, which must say that it is no longer than `limit`; ValueError, ZstdError."""
    told = zstandard.get_frame_parameters(packed)
    if told.content_size > limit or told.dict_id:
        raise ValueError("too long")
    return zstandard.ZstdDecompressor(max_window_size=_INDEX_LIMIT).decompress(packed)
