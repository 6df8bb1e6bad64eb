"""Tiny kernels, made byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trivisor.machine.memory import MIB, GuestMemory

E820 = [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (0x100000, 31 * MIB - 0x20000, 1), (0x1FE0000, 0x20000, 3)]
"""32 MiB with ACPI tables in the last 128 KiB."""


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(32 * MIB)
    yield memory
    memory.close()


@pytest.fixture
def e820() -> list[tuple[int, int, int]]:
    return list(E820)


@pytest.fixture
def write_image(tmp_path: Path) -> Callable[[bytes], str]:
    def write(data: bytes) -> str:
        path = tmp_path / "kernel"
        path.write_bytes(data)
        return str(path)

    return write


def elf_file(
    bits: int,
    entry: int,
    segments: list[tuple[int, int, bytes, int]],
    *,
    kind: int = 2,
    machine: int = 62,
    program_header_type: int = 1,
) -> bytes:
    """An ELF file of (virtual, physical, content, size in memory) segments, executable all."""
    header_size, entry_size = (64, 56) if bits == 64 else (52, 32)
    identity = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    sizes = (header_size, entry_size, len(segments), 0, 0, 0)
    form = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    header = identity + struct.pack(form, kind, machine, 1, entry, header_size, 0, 0, *sizes)
    offset = header_size + entry_size * len(segments)
    table, contents = b"", b""
    for virtual, physical, content, size in segments:
        at = offset + len(contents)
        if bits == 64:
            fields = (program_header_type, 7, at, virtual, physical, len(content), size, 1)
            table += struct.pack("<IIQQQQQQ", *fields)
        else:
            fields = (program_header_type, at, virtual, physical, len(content), size, 7, 1)
            table += struct.pack("<IIIIIIII", *fields)
        contents += content
    return header + table + contents


@pytest.fixture
def elf() -> Callable[..., bytes]:
    return elf_file


@pytest.fixture
def bzimage() -> Callable[..., bytes]:
    def build(
        payload: bytes = b"\xf4" * 0x400,
        *,
        version: int = 0x20F,
        xloadflags: int = 1,
        pref_address: int = 2 * MIB,
        init_size: int = MIB,
        initrd_addr_max: int = 0x7FFFFFFF,
        cmdline_size: int = 255,
    ) -> bytes:
        setup = bytearray(2 * 512)
        setup[0x1F1] = 1
        struct.pack_into("<I", setup, 0x1F4, len(payload) // 16)
        setup[0x1FE:0x206] = b"\x55\xaa\xeb\x6aHdrS"
        struct.pack_into("<H", setup, 0x206, version)
        setup[0x211] = 1
        struct.pack_into("<I", setup, 0x22C, initrd_addr_max)
        struct.pack_into("<HI", setup, 0x236, xloadflags, cmdline_size)
        struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
        return bytes(setup) + payload

    return build


@pytest.fixture
def multiboot_header() -> Callable[..., bytes]:
    def build(flags: int = 0, addresses: tuple[int, ...] = ()) -> bytes:
        checksum = -(0x1BADB002 + flags) & 0xFFFFFFFF
        return struct.pack(f"<{3 + len(addresses)}I", 0x1BADB002, flags, checksum, *addresses)

    return build
