"""Kernels for Xen: notes found and checked, and the payload of a bzImage unpacked however it was packed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import struct
import threading
from collections.abc import Callable

import lz4.block
import pytest
import zstandard

from trivisor.boot import lz4_legacy as boot_lz4
from trivisor.boot.image import Image, ImageError
from trivisor.boot.xen_notes import XenKernel, guest_os, read_xen_kernel
from trivisor.machine.jobs import NAME as JOB

BASE = 0xFFFFFFFF80000000
NOTES = {
    6: b"linux\0", 5: b"xen-3.0\0", 3: struct.pack("<Q", BASE), 4: struct.pack("<Q", 0),
    1: struct.pack("<Q", BASE + 0x1000010), 15: struct.pack("<Q", 1 << 39), 16: struct.pack("<I", 1),
    10: b"!writable_page_tables|pae_pgdir_above_4gb\0",
}  # fmt: skip


def kernel(notes: dict[int, bytes]) -> bytes:
    """An ELF file of one segment at 16 MiB, with a note segment."""
    raw = b""
    for kind, value in notes.items():
        raw += struct.pack("<3I4s", 4, len(value), kind, b"Xen\0") + value + bytes(-len(value) % 4)
    code = b"\xf4" * 300
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    at = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 7, at, BASE + 0x1000000, 0x1000000, len(code), 5000, 1)
    note = struct.pack("<IIQQQQQQ", 4, 4, at + len(code), 0, 0, len(raw), len(raw), 4)
    return header + load + note + code + raw


def read(write_image: Callable[[bytes], str], data: bytes) -> XenKernel:
    with Image(write_image(data)) as image:
        return read_xen_kernel(image)


def check(found: XenKernel) -> None:
    assert found.segments == ((0x1000000, b"\xf4" * 300),)
    assert (found.start, found.end) == (0x1000000, 0x1000000 + 5000)
    assert (found.entry, found.virtual_base) == (BASE + 0x1000010, BASE)
    assert found.p2m_base == 1 << 39 and found.unmapped_module and found.hypercall_page is None
    assert found.features == {"writable_page_tables"} and found.guest_os == "linux"
    assert found.address(0x2000) == BASE + 0x2000


def test_a_vmlinux(write_image) -> None:
    check(read(write_image, kernel(NOTES)))


def lz4_legacy(data: bytes) -> bytes:
    blocks = [lz4.block.compress(data[i : i + (8 << 20)], store_size=False) for i in range(0, len(data), 8 << 20)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


@pytest.mark.parametrize(
    "pack", [gzip.compress, lzma.compress, bz2.compress, lz4_legacy, zstandard.compress, bytes],
    ids=["gzip", "xz", "bzip2", "lz4", "zstd", "not packed"],
)  # fmt: skip
def test_the_payload_of_a_bzimage(write_image, bzimage, pack: Callable[[bytes], bytes]) -> None:
    elf = kernel(NOTES)
    payload = pack(elf) + struct.pack("<I", len(elf))
    image = bytearray(bzimage(b"\x90" * 64 + payload))
    struct.pack_into("<II", image, 0x248, 64, len(payload))
    check(read(write_image, bytes(image)))
    struct.pack_into("<II", image, 0x248, 64, len(payload) + 1000)
    with pytest.raises(ImageError, match="get a whole copy"):
        read(write_image, bytes(image))


@pytest.mark.parametrize(
    "changed, said",
    [
        ({}, "no Xen notes"),
        ({18: struct.pack("<I", 0x1000000)}, "no Xen PV entry"),
        (NOTES | {5: b"xen-9.0\0"}, "xen-9.0"),
        (NOTES | {4: struct.pack("<Q", 1 << 50)}, "damaged"),
    ],
)
def test_what_is_no_pv_kernel(write_image, changed: dict[int, bytes], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        read(write_image, kernel(changed))


def test_a_damaged_payload(write_image, bzimage) -> None:
    for start in (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd", b"BZh", b"????"):
        payload = start + b"\x01" * 60 + struct.pack("<I", 4096)
        image = bytearray(bzimage(payload))
        struct.pack_into("<II", image, 0x248, 0, len(payload))
        with pytest.raises(ImageError):
            read(write_image, bytes(image))


def large_kernel(blocks: int) -> bytes:
    """One whose blocks, when packed by LZ4, are each of other bytes."""
    code, raw = b"".join(bytes([n]) * (8 << 20) for n in range(blocks)), kernel(NOTES)[64 + 2 * 56 + 300 :]
    load = struct.pack("<IIQQQQQQ", 1, 7, 176, BASE + 0x1000000, 0x1000000, len(code), len(code), 1)
    note = struct.pack("<IIQQQQQQ", 4, 4, 176 + len(code), 0, 0, len(raw), len(raw), 4)
    return kernel(NOTES)[:64] + load + note + code + raw


def packed_image(bzimage: Callable[[bytes], bytes], elf: bytes, damaged: int | None = None) -> bytes:
    """A bzImage of blocks, one of them damaged."""
    payload = bytearray(lz4_legacy(elf) + struct.pack("<I", len(elf)))
    at = 4
    for _ in range(damaged or 0):
        at += 4 + struct.unpack_from("<I", payload, at)[0]
    if damaged is not None:
        payload[at + 4 : at + 8] = b"\x0f\0\0\0"  # a match before anything that it could match
    image = bytearray(bzimage(bytes(payload)))
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    return bytes(image)


def test_blocks_unpacked_in_several_threads_come_in_their_order(write_image, bzimage) -> None:
    found = read(write_image, packed_image(bzimage, large_kernel(5)))
    content = b"".join(content for _, content in found.segments)
    assert len(content) == 5 << 23
    assert all(content.count(n, n << 23, n + 1 << 23) == 1 << 23 for n in range(5))


@pytest.mark.parametrize("damaged", [0, 3, 5])
def test_one_damaged_block_of_several(write_image, bzimage, damaged: int) -> None:
    with pytest.raises(ImageError, match=r"^[^\n]*is damaged: its kernel cannot be unpacked [^\n]*$"):
        read(write_image, packed_image(bzimage, large_kernel(5), damaged))
    assert not any(thread.name == JOB for thread in threading.enumerate())


@pytest.mark.parametrize("cut", [1, 5, 9 << 10])
def test_blocks_that_are_not_there(write_image, bzimage, cut: int) -> None:
    elf = large_kernel(3)
    payload = lz4_legacy(elf)[:-cut] + struct.pack("<I", len(elf))
    image = bytearray(bzimage(payload))
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    with pytest.raises(ImageError, match="its kernel cannot be unpacked"):
        read(write_image, bytes(image))


def test_without_the_library(write_image, bzimage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot_lz4, "_LIBRARY", "libnone.so.1")
    boot_lz4._decompress.cache_clear()
    with pytest.raises(ImageError, match=r"packed by LZ4, and libnone.so.1 is missing; install it"):
        read(write_image, packed_image(bzimage, large_kernel(2)))


@pytest.mark.parametrize("wrong", [-1, 1, 8 << 20])
def test_blocks_of_another_size_than_the_kernels(write_image, bzimage, wrong: int) -> None:
    elf = large_kernel(2)
    payload = lz4_legacy(elf) + struct.pack("<I", len(elf) + wrong)
    image = bytearray(bzimage(payload))
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    with pytest.raises(ImageError, match="its kernel cannot be unpacked"):
        read(write_image, bytes(image))


def test_segments_and_notes_in_several_blocks(write_image, bzimage) -> None:
    """LZ4's blocks are 8 MiB: what crosses them is loaded whole."""
    code, raw = random.Random(1).randbytes((8 << 20) + 5000), kernel(NOTES)[64 + 2 * 56 + 300 :]
    header = kernel(NOTES)[:64]
    load = struct.pack("<IIQQQQQQ", 1, 7, 176, BASE + 0x1000000, 0x1000000, len(code), len(code) + 9, 1)
    note = struct.pack("<IIQQQQQQ", 4, 4, 176 + len(code), 0, 0, len(raw), len(raw), 4)
    elf = header + load + note + code + raw
    payload = lz4_legacy(elf) + struct.pack("<I", len(elf))
    image = bytearray(bzimage(payload))
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    found = read(write_image, bytes(image))
    assert [address for address, _ in found.segments] == [0x1000000]
    assert b"".join(content for _, content in found.segments) == code
    assert (found.start, found.end) == (0x1000000, 0x1000000 + len(code) + 9)
    assert found.guest_os == "linux"


def test_damaged_headers_are_told_in_one_line(write_image) -> None:
    good, chance = kernel(NOTES), random.Random(2)
    for _ in range(300):
        data = bytearray(good[: chance.randrange(64, len(good) + 1)])
        for _ in range(chance.randrange(4)):
            data[chance.randrange(16, min(len(data), 176))] = chance.choice((0, 1, 7, 0x80, 0xFF))
        try:
            read(write_image, bytes(data))
        except ImageError as error:
            assert "\n" not in str(error)


def test_the_system_that_a_kernel_is_of_is_told_without_reading_all_of_it(write_image, monkeypatch) -> None:
    read, lengths = Image.read, []
    with Image(write_image(large_kernel(1))) as image:
        monkeypatch.setattr(Image, "read", lambda *place: lengths.append(place[2]) or read(*place))
        assert guest_os(image) == "linux"
    assert 0 < sum(lengths) < 1000


def test_a_file_that_is_cut_short_meanwhile_tells_no_system(write_image, monkeypatch) -> None:
    """Wherever it ends: before anything is read of it, or after its header was."""
    good, read = kernel(NOTES), Image.read
    for length in range(0, len(good), 16):
        path = write_image(good)
        with Image(path) as image:
            os.truncate(path, length)
            assert guest_os(image) == ""
        write_image(good)
        with Image(path) as image, monkeypatch.context() as patched:

            def cut(image: Image, offset: int, size: int, path: str = path, length: int = length) -> bytes:
                data = read(image, offset, size)
                os.truncate(path, length)
                return data

            patched.setattr(Image, "read", cut)
            assert guest_os(image) == ""


def test_notes_larger_than_any_kernel_has(write_image) -> None:
    """Of a sparse file, say, that has more than fits in memory."""
    data = bytearray(kernel(NOTES))
    struct.pack_into("<Q", data, 64 + 56 + 8, 1 << 40)
    struct.pack_into("<QQ", data, 64 + 56 + 32, 1 << 40, 1 << 40)
    path = write_image(bytes(data))
    os.truncate(path, 2 << 40)
    with Image(path) as image:
        assert guest_os(image) == ""
    struct.pack_into("<Q", data, 64 + 56 + 8, 2 << 20)
    struct.pack_into("<QQ", data, 64 + 56 + 32, 2 << 20, 2 << 20)
    os.truncate(write_image(bytes(data)), 4 << 20)
    with pytest.raises(ImageError, match="get a whole copy"), Image(path) as image:
        read_xen_kernel(image)
