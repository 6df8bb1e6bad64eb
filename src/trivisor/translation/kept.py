"""Translations kept between runs: templates in a file, read at the start of a run and written at its end.

A file holds the templates of one guest on one kind of host.  It is taken only
if this very translator made it for this guest and these host features, its
checksum is right, and nobody else could have written it: it holds machine
code.  Every template is compared with the guest's memory, byte for byte, before
it becomes a block (natives/blocks.py), so a file of a guest that has changed
costs time, never correctness.

    header | templates | heads of the lists of templates | images      (block_tables.py has the formats)
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import stat
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from struct import Struct, iter_unpack

import iced_x86

from trivisor.machine.memory import host_map, host_unmap, prefer_huge_pages
from trivisor.translation.block_tables import (
    ARCHIVED,
    MAXIMUM_TEMPLATES,
    TEMPLATE_FORMAT,
    TEMPLATE_HEADS,
    TEMPLATE_SIZE,
)
from trivisor.translation.modes import SEGMENTED_KEYS

_MAGIC = b"trivisor"
_HEADER = Struct("<8s32sQQI")
"""Magic, identity, how many templates (with the empty one that has number 0), bytes of images, CRC-32 of the rest.

A digest would take twice as long, and is no better against damage.
"""
_SUFFIX = ".kept"
_HEADS_SIZE = TEMPLATE_HEADS * 4

LIMIT = 48 << 20
"""Bytes of images in one file; beyond, what was not used in the last run is left out."""
TOTAL_LIMIT = 512 << 20
"""Bytes of all files; beyond, those that were not used for the longest time are removed."""
_LEFT_OVER_SECONDS = 3600.0
_UNUSED_SECONDS = 30 * 86400.0
"""After which files that small are removed."""
_DIGEST_SIZE = 32
_record = Struct(TEMPLATE_FORMAT).pack_into


class Ignored(Exception):
    """Why a file is not taken, in a few words."""


@cache
def translator_version() -> bytes:
    """A digest of all that translated code depends on besides the guest and the host: the translator's sources."""
    # Which iced-x86 it is: its version would be nicer, but takes a twentieth of a second to ask for.
    found = Path(iced_x86.__file__).parent.glob("_iced_x86_py*")
    library = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(found)]
    digest = hashlib.sha256(repr(library).encode())
    package = Path(__file__).parent
    for room in (package, package.parent / "x86"):
        for source in sorted(_sources(str(room))):
            with FileIO(source) as file:
                content = file.read()
            digest.update(f"{source.removeprefix(str(room))} {len(content)} ".encode())
            digest.update(content)
    return digest.digest()


def _sources(directory: str) -> Iterator[str]:
    """All Python files in it and below; `Path.rglob` takes longer than to read them."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                yield entry.path
            elif entry.name != "__pycache__" and entry.is_dir():
                yield from _sources(entry.path)


class Archive:
    """Templates of an earlier run, in memory of their own."""

    def __init__(self, count: int, at: int, length: int) -> None:
        self.count = count
        """Of templates, the empty one with number 0 included."""
        self._at = at
        self._length = length
        self.bytes = memoryview((ctypes.c_ubyte * length).from_address(at)).cast("B")
        records = count * TEMPLATE_SIZE
        self.records = self.bytes[:records]
        self.heads = self.bytes[records : records + _HEADS_SIZE]
        self.images = self.bytes[records + _HEADS_SIZE :]
        self.address = at + records + _HEADS_SIZE
        """Host address of the images."""

    def close(self) -> None:
        """Give the memory back to the host."""
        if self._length:
            for view in (self.records, self.heads, self.images, self.bytes):
                view.release()
            host_unmap(self._at, self._length)
            self._length = 0


def file_for(directory: Path, guest: bytes, host: bytes) -> Path:
    """The file of a guest on a kind of host, both named by digests."""
    return directory / (hashlib.sha256(guest + host).hexdigest()[:32] + _SUFFIX)


def identity(guest: bytes, host: bytes) -> bytes:
    """What a file's translations must have been made by, for and on."""
    return hashlib.sha256(translator_version() + guest + host).digest()


def load(path: Path, wanted: bytes) -> Archive | None:
    """The file's templates; None when there is none.  Raises Ignored."""
    try:
        archive = _load(path, wanted)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Ignored(error.strerror or str(error)) from None
    with suppress(OSError):
        os.utime(path)
    return archive


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not be waited for


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    """A file that nobody else could have written, and its length; raises OSError or Ignored."""
    with FileIO(str(path), opener=_open) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Ignored("not a file")
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Ignored("others may write to it")
        yield file, found.st_size


def _load(path: Path, wanted: bytes) -> Archive:
    with opened(path) as (file, file_size):
        header = file.read(_HEADER.size)
        if len(header) != _HEADER.size or not header.startswith(_MAGIC):
            raise Ignored("damaged")
        _, made_by, count, images, checksum = _HEADER.unpack(header)
        if made_by != wanted:
            raise Ignored("another version, host or guest")
        length = count * TEMPLATE_SIZE + _HEADS_SIZE + images
        if not 0 < count <= MAXIMUM_TEMPLATES // 2 or file_size != _HEADER.size + length:
            raise Ignored("damaged")
        at = host_map(length, mmap.PROT_READ | mmap.PROT_WRITE)
        archive = Archive(count, at, length)
        prefer_huge_pages(at, length)
        try:
            if not _read_whole(file, archive.bytes) or zlib.crc32(archive.bytes) != checksum:
                raise Ignored("damaged")
        except BaseException:
            archive.close()
            raise
    return archive


def _read_whole(file: FileIO, into: memoryview) -> bool:
    """Fill `into` from a file; whether there was enough."""
    at = 0
    while at < len(into):
        done = file.readinto(into[at:])
        if not done:
            return False
        at += done
    return True


def save(path: Path, made_by: bytes, records: array[int], heads: array[int], images: Iterable[bytes]) -> None:
    """Write a file, whole or not at all, and remove what is too much beside it; raises OSError."""
    parts = [records.tobytes(), heads.tobytes(), *images]
    payload = b"".join(parts)
    count = len(parts[0]) // TEMPLATE_SIZE
    header = _HEADER.pack(
        _MAGIC, made_by, count, len(payload) - len(parts[0]) - _HEADS_SIZE, zlib.crc32(payload)
    )
    write_whole(path, header, payload)
    _clean(path)


def write_whole(path: Path, *parts: bytes) -> None:
    """Write a file aside and rename it; raises OSError."""
    import tempfile

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="writing-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def read_checked(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes that begins with the digest of the rest; raises OSError or Ignored."""
    with opened(path) as (file, length):
        if length > limit:
            raise Ignored("too long")
        content = file.read()
    digest, body = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if hashlib.sha256(body).digest() != digest:
        raise Ignored("damaged")
    return body


def write_checked(path: Path, body: bytes) -> None:
    """Write what `read_checked` reads, and remove such files beside it of versions that are gone; raises OSError."""
    write_whole(path, hashlib.sha256(body).digest(), body)
    for file in path.parent.glob("*" + path.suffix):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > _UNUSED_SECONDS:
                file.unlink()


def _clean(newest: Path) -> None:
    """Remove the files that were not used for the longest time, as far as all are too much, and left-overs."""
    found = []
    for file in newest.parent.iterdir():
        with suppress(OSError):
            state = file.stat()
            if file.name.startswith("writing-") and time.time() - state.st_mtime > _LEFT_OVER_SECONDS:
                file.unlink()
            elif file.suffix == _SUFFIX and file != newest:
                found.append((state.st_mtime, state.st_size, file))
    room = TOTAL_LIMIT - newest.stat().st_size
    for _, size, file in sorted(found, reverse=True):
        room -= size
        if room < 0:
            with suppress(OSError):
                file.unlink()


def collect(
    templates: bytes, image: Callable[[int], bytes], *, used_only: bool
) -> tuple[array[int], array[int], list[bytes]]:
    """What `save` wants of a run: records, heads and images of the templates that another run's look-ups can find.

    `image` gives the image of a template by number; `used_only`: leave out what no block of this run was made of.
    """
    heads = array("I", bytes(_HEADS_SIZE))
    records = bytearray(TEMPLATE_SIZE)
    images: list[bytes] = []
    number = 0
    at = 0
    record = bytearray(TEMPLATE_SIZE)
    for old, fields in enumerate(iter_unpack(TEMPLATE_FORMAT, templates)):
        prefix, rip, _, _, code, base, mode, length, *counts, uses, size, lasting, masked, bucket, mask = fields
        if not lasting or mode >= SEGMENTED_KEYS or (used_only and not uses):
            continue
        number += 1
        _record(
            record, 0, prefix, rip, heads[bucket], ARCHIVED | at, code, base, mode, length, *counts, 0, size, 1,
            masked, bucket, mask,
        )  # fmt: skip
        records += record
        heads[bucket] = number
        images.append(image(old))
        at += size
    return array("I", bytes(records)), heads, images
