"""A guest image file: opened, and recognised from its first bytes."""

from __future__ import annotations

import os
import stat
import struct
from enum import Enum
from types import TracebackType
from typing import BinaryIO, Self

from trivisor.machine.memory import HIGH_RAM_START, LOW_RAM_LIMIT, MAXIMUM_RAM, MIB, GuestMemory

HEAD_SIZE = 8192
"""Bytes that recognition looks at; a multiboot header has to lie in them."""
MULTIBOOT_MAGIC = 0x1BADB002

_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER_SIZE = {1: 52, 2: 64}
_MACHINE_386 = 3
_MACHINE_X86_64 = 62
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x02\x21\x4c\x18": "lz4",
}


class ImageError(ValueError):
    """The guest cannot be loaded; the message is one line: what is wrong and what to do."""


class ImageKind(Enum):
    """What an image file is, by the protocol that boots it."""

    BZIMAGE = "Linux bzImage"
    VMLINUX = "64-bit ELF kernel"
    MULTIBOOT = "multiboot kernel"


class Image:
    """An open image file; a context manager that closes it.

    `path` is as the user gave it, `size` in bytes, `head` the first 8 KiB.
    """

    def __init__(self, path: str | os.PathLike[str], *, recognise: bool = True) -> None:
        """Open the file and, for a kernel, recognise it; raises ImageError."""
        self.path = os.fspath(path)
        self._descriptor = _open(self.path)
        self.kind: ImageKind | None
        try:
            self.size = os.fstat(self._descriptor).st_size
            self.head = self.read(0, min(self.size, HEAD_SIZE))
            self.kind = _recognise(self) if recognise else None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; reading is an error from here on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fail(self, what: str) -> ImageError:
        """Return the error to raise about this file."""
        return ImageError(f"{self.path}: {what}")

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`; raises ImageError where the file is shorter."""
        self._expect(offset, length)
        try:
            data = os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise self.fail(f"cannot be read: {error.strerror}") from error
        if len(data) < length:  # at its end, or because the host gives no more than 2 GiB at once
            rest = bytearray(length - len(data))
            self._read_into(memoryview(rest), offset + len(data))
            data += rest
        return data

    def stream(self) -> BinaryIO:
        """Return a file object of its own on the file, from its beginning; the caller closes it."""
        stream = os.fdopen(os.dup(self._descriptor), "rb")
        stream.seek(0)
        return stream

    def load(self, memory: GuestMemory, address: int, offset: int, length: int) -> None:
        """Put `length` bytes from `offset` at guest physical `address`; raises ImageError."""
        self._expect(offset, length)
        if not memory.is_ram(address, length):
            raise self.too_large(memory, address, length)
        self._read_into(memory.view[address : address + length], offset)

    def too_large(self, memory: GuestMemory, address: int, length: int) -> ImageError:
        """Return the error for a part of the guest that the machine has no RAM for."""
        end = address + length
        what = f"does not fit in {memory.size // MIB} MiB of RAM: it takes up {address:#x} to {end - 1:#x}"
        if end <= LOW_RAM_LIMIT:
            return self.fail(f"{what}; give it --memory {-(-end // MIB) + 1}M or more")
        if HIGH_RAM_START <= address < end <= MAXIMUM_RAM:
            return self.fail(f"{what}; give it more --memory")
        return self.fail(f"{what}, where no machine has RAM; link it to a lower address")

    def _expect(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.fail(
                f"truncated: it should have {offset + length} bytes and has {self.size}; get a whole copy"
            )

    def _read_into(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise self.fail(f"cannot be read: {error.strerror}") from error
            if count == 0:
                raise self.fail("was cut short while it was being read")
            done += count


def multiboot_header_offset(head: bytes) -> int | None:
    """Find the multiboot 1 header: aligned, and its first three words add up to 0 (specification 3.1.1)."""
    head = head[:HEAD_SIZE]
    at = head.find(struct.pack("<I", MULTIBOOT_MAGIC))
    while 0 <= at <= len(head) - 12:
        if at % 4 == 0 and sum(struct.unpack_from("<III", head, at)) & 0xFFFFFFFF == 0:
            return at
        at = head.find(struct.pack("<I", MULTIBOOT_MAGIC), at + 1)
    return None


def _open(path: str) -> int:
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; check the path of the image") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path}: cannot be opened: {reason}") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    raise ImageError(f"{path}: is {what}; name a kernel image file")


def _recognise(image: Image) -> ImageKind:
    head = image.head
    if not head:
        raise image.fail("is empty; get a whole copy")
    if head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS":
        return ImageKind.BZIMAGE
    if multiboot_header_offset(head) is not None:
        return ImageKind.MULTIBOOT
    if head.startswith(_ELF_MAGIC):
        return _recognise_elf(image)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise image.fail(f"is compressed with {name}; unpack it first")
    if head.startswith(b"070701"):
        raise image.fail("is a cpio archive, not a kernel; it may be an --initrd")
    if head[0x1FE:0x200] == b"\x55\xaa":
        raise image.fail("is a disk or boot sector image, not a kernel; give the kernel file itself")
    raise image.fail("is not a kernel: neither a Linux bzImage, nor an ELF file, nor multiboot")


def _recognise_elf(image: Image) -> ImageKind:
    head = image.head
    bits, order = (head[4], head[5]) if len(head) > 5 else (2, 1)
    image.read(0, _ELF_HEADER_SIZE.get(bits, 64))
    machine = int.from_bytes(head[18:20], "little" if order == 1 else "big")
    if bits not in _ELF_HEADER_SIZE or order not in (1, 2):
        raise image.fail("has a damaged ELF header; get a whole copy")
    if order != 1 or machine not in (_MACHINE_386, _MACHINE_X86_64):
        raise image.fail(f"is an ELF file for another processor (machine {machine}); it takes one for x86")
    if bits == 1 or machine != _MACHINE_X86_64:
        raise image.fail("is a 32-bit ELF file without a multiboot header in its first 8 KiB; give it one")
    return ImageKind.VMLINUX
