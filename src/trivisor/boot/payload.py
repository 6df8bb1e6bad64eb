"""The ELF kernel within a bzImage: found by the setup header, decompressed by what it begins with.

Linux, Documentation/x86/boot.rst, "payload_offset": the payload ends with its
length when unpacked, in four bytes that are no part of the compressed data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import partial

from trivisor.boot.image import Image
from trivisor.boot.pieces import Pieces
from trivisor.machine.jobs import Jobs

_SETUP_SECTORS = 0x1F1
_VERSION = 0x206
_PAYLOAD_OFFSET = 0x248
_OLDEST_WITH_PAYLOAD = 0x208
_SECTOR = 512
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20
"""The legacy format's blocks unpack to this, but for the last (LZ4 frame format, "Legacy frame")."""
_LARGEST = 1 << 30
_THREADS = min(max(len(os.sched_getaffinity(0)) - 1, 1), 4)
"""Unpacking gives up the GIL, and goes on beside what the main thread does; each has memory of its own to fill."""


def kernel_payload(image: Image) -> Pieces:
    """The ELF file that a bzImage unpacks when it boots; raises ImageError."""
    head = image.head
    (version,) = struct.unpack_from("<H", head, _VERSION)
    if version < _OLDEST_WITH_PAYLOAD:
        raise image.fail(f"is too old to tell where its kernel is (boot protocol {version >> 8}.{version & 255:02})")
    offset, length = struct.unpack_from("<II", head, _PAYLOAD_OFFSET)
    start = (head[_SETUP_SECTORS] + 1) * _SECTOR + offset
    payload = image.read(start, length)
    if len(payload) < 8:
        raise image.fail("is damaged: it has no payload; get a whole copy")
    (size,) = struct.unpack("<I", payload[-4:])
    if size > _LARGEST:
        raise image.fail(f"is damaged: its kernel would be {size >> 20} MiB; get a whole copy")
    try:
        packed = memoryview(payload)[:-4]
        if payload.startswith(_LZ4_LEGACY):
            return Pieces(_unpack_lz4(packed, size))
        return Pieces([_unpack(image, packed, size)])
    except (OSError, ValueError, RuntimeError, EOFError, struct.error) as error:
        raise image.fail(f"is damaged: its kernel cannot be unpacked ({error}); get a whole copy") from error


def _unpack(image: Image, data: memoryview, size: int) -> bytes:
    begin = bytes(data[:6])
    if begin.startswith(b"\x7fELF"):
        return bytes(data)
    if begin.startswith(b"\x1f\x8b"):
        import zlib

        try:
            return zlib.decompressobj(wbits=31).decompress(data, size)
        except zlib.error as error:
            raise ValueError(str(error)) from error
    if begin.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        import lzma

        try:
            return lzma.LZMADecompressor().decompress(data, size)
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from error
    if begin.startswith(b"BZh"):
        import bz2

        return bz2.BZ2Decompressor().decompress(data, size)
    if begin.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        try:
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)[:size]
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
    raise image.fail(f"has a kernel packed in a way that is not known here (it begins with {begin[:4].hex(' ')})")


def _unpack_lz4(data: memoryview, size: int) -> list[bytes]:
    """The blocks, each unpacked in one of a few threads."""
    work: list[Callable[[], bytes]] = []
    at = len(_LZ4_LEGACY)
    while at + 4 <= len(data) and len(work) * _LZ4_BLOCK < size:
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        work.append(partial(_unpack_lz4_block, data[at : at + length]))
        at += length
    return Jobs(work, _THREADS).results()


def _unpack_lz4_block(data: memoryview) -> bytes:
    import lz4.block

    try:
        block: bytes = lz4.block.decompress(data, uncompressed_size=_LZ4_BLOCK)
    except lz4.block.LZ4BlockError as error:
        raise ValueError(str(error)) from error
    return block
