"""The ELF kernel within a bzImage: found by the setup header, decompressed by what it begins with.

Linux, Documentation/x86/boot.rst, "payload_offset": the payload ends with its
length when unpacked, in four bytes that are no part of the compressed data.
"""

from __future__ import annotations

import struct

from trivisor.boot import lz4_legacy
from trivisor.boot.image import Image

_SETUP_SECTORS = 0x1F1
_VERSION = 0x206
_PAYLOAD_OFFSET = 0x248
_OLDEST_WITH_PAYLOAD = 0x208
_SECTOR = 512
_LARGEST = 1 << 30


def kernel_payload(image: Image) -> memoryview:
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
    if not 0 < size <= _LARGEST:
        raise image.fail(f"is damaged: its kernel would be {size >> 20} MiB; get a whole copy")
    try:
        if payload.startswith(lz4_legacy.MAGIC):
            return memoryview(lz4_legacy.unpack(payload, len(payload) - 4, size))
        return memoryview(_unpack(image, memoryview(payload)[:-4], size))
    except lz4_legacy.LibraryMissing as reason:
        raise image.fail(f"has a kernel packed by LZ4, and {reason}; install it (apt-get install liblz4-1)") from None
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
