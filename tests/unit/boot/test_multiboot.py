"""Multiboot 1: what the specification promises the kernel, read back from guest memory."""

from __future__ import annotations

import struct

import pytest

from trivisor.boot import Image, ImageError, multiboot
from trivisor.machine.memory import MIB


def boot(memory, path, e820, **options):
    with Image(path) as image:
        return multiboot.load(memory, image, e820=e820, **options)


def string(memory, address):
    return memory.read(address, 256).split(b"\0")[0]


def info(memory, state, offset, count=1):
    return struct.unpack(f"<{count}I", memory.read(state.rbx + offset, 4 * count))


@pytest.fixture
def kernel32(elf, multiboot_header):
    def build(flags=0, at=MIB, size=100):
        content = multiboot_header(flags) + b"\xf4" * 20
        return elf(32, at + 12, [(at, at, content, size)], machine=3)

    return build


def test_processor_state(memory, e820, write_image, kernel32):
    state = boot(memory, write_image(kernel32()), e820)
    assert state.rax == 0x2BADB002
    assert state.rip == MIB + 12
    assert state.cr0 & 0x80000001 == 1, "protected mode, no paging"
    assert state.rflags & 0x20200 == 0, "VM and IF clear"
    assert (state.efer, state.cr4) == (0, 0)
    gdt = struct.unpack("<3Q", memory.read(state.gdtr.base, state.gdtr.limit + 1))
    assert state.cs.attributes == 0xC09B
    assert state.cs.attributes == gdt[state.cs.selector >> 3] >> 40 & 0xF0FF
    for segment in (state.ds, state.es, state.fs, state.gs, state.ss):
        assert (segment.base, segment.limit, segment.attributes) == (0, 0xFFFFFFFF, 0xC093)
        assert segment.attributes == gdt[segment.selector >> 3] >> 40 & 0xF0FF


def test_information(memory, e820, write_image, kernel32):
    path = write_image(kernel32())
    state = boot(memory, path, e820, command_line="a=1 b")
    (flags,) = info(memory, state, 0)
    assert flags == 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert info(memory, state, 4, 2) == (639, 30 * 1024 + 1024 - 128)
    assert string(memory, *info(memory, state, 16)) == f"{path} a=1 b".encode()
    assert info(memory, state, 20) == (0,), "no modules"
    assert string(memory, *info(memory, state, 64)) == b"trivisor"
    length, address = info(memory, state, 44, 2)
    entries, end = [], address + length
    while address < end:
        size, *entry = struct.unpack("<IQQI", memory.read(address, 24))
        entries.append(tuple(entry))
        address += size + 4
    assert entries == e820
    assert state.rbx < 0xA0000


def test_modules(memory, e820, write_image, kernel32, tmp_path):
    (tmp_path / "one").write_bytes(b"first" * 1000)
    (tmp_path / "two").write_bytes(b"")
    modules = [(tmp_path / "one", "x y"), (tmp_path / "two", "")]
    state = boot(memory, write_image(kernel32(flags=3, size=10000)), e820, modules=modules)
    count, address = info(memory, state, 20, 2)
    first, second = (struct.unpack("<4I", memory.read(address + 16 * index, 16)) for index in range(count))
    start, end, text, reserved = first
    assert memory.read(start, end - start) == b"first" * 1000
    assert start % 4096 == 0
    assert start >= MIB + 10000, "clear of the kernel's bss"
    assert string(memory, text) == f"{tmp_path}/one x y".encode()
    assert reserved == 0
    assert second[0] == second[1] > end
    assert string(memory, second[2]) == f"{tmp_path}/two".encode()


def test_module_that_is_missing_or_too_large(memory, e820, write_image, kernel32, tmp_path):
    path = write_image(kernel32())
    with pytest.raises(ImageError, match="module cannot be opened"):
        boot(memory, path, e820, modules=[(tmp_path / "absent", "")])
    with pytest.raises(ImageError, match="module cannot be opened"):
        boot(memory, path, e820, modules=[(tmp_path, "")])
    with (tmp_path / "large").open("wb") as file:
        file.truncate(31 * MIB)
    with pytest.raises(ImageError, match="module of 31 MiB does not fit in 32 MiB"):
        boot(memory, path, e820, modules=[(tmp_path / "large", "")])


def test_information_keeps_clear_of_a_low_kernel(memory, e820, write_image, kernel32):
    state = boot(memory, write_image(kernel32(at=0x9000, size=0x8000)), e820)
    assert state.rbx >= 0x11000
    assert string(memory, *info(memory, state, 64)) == b"trivisor"
    with pytest.raises(ImageError, match="below 640 KiB"):
        boot(memory, write_image(kernel32(at=0x8000, size=0x97C00)), e820)


def test_address_fields(memory, e820, write_image, multiboot_header):
    memory.write(0x200000, b"\xff" * 8192)
    header = multiboot_header(1 << 16, (0x200010, 0x200000, 0x200040, 0x201000, 0x200030))
    image = b"before the kernel..." + b"\xaa" * 16 + header + b"\xf4" * 200
    state = boot(memory, write_image(image), e820)
    assert memory.read(0x200000, 0x40) == (b"\xaa" * 16 + header + b"\xf4" * 200)[:0x40]
    assert memory.read(0x200040, 0xFC1) == bytes(0xFC0) + b"\xff", "bss is cleared, and no more"
    assert state.rip == 0x200030


def test_address_fields_without_ends_load_the_whole_file(memory, e820, write_image, multiboot_header):
    image = multiboot_header(1 << 16, (0x200000, 0x200000, 0, 0, 0x200020)) + b"\x90" * 5000
    boot(memory, write_image(image), e820)
    assert memory.read(0x200000, len(image)) == image


def test_address_fields_go_before_the_elf_header(memory, e820, write_image, elf, multiboot_header):
    header = multiboot_header(1 << 16, (0x300054, 0x300000, 0, 0, 0x300060))
    image = elf(32, MIB, [(MIB, MIB, header, 100)], machine=3)
    assert image.index(header) == 0x54
    assert boot(memory, write_image(image), e820).rip == 0x300060


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ((0x1FFFFF, 0x200000, 0, 0, 0x200000), "lies outside"),
        ((0x200100, 0x200000, 0, 0, 0x200000), "lies outside"),
        ((0x200000, 0x200000, 0x1FFFFF, 0, 0x200000), "out of order"),
        ((0x200000, 0x200000, 0x200020, 0x200010, 0x200000), "out of order"),
        ((0x200000, 0x200000, 0, 0, 0x1000), "entry point 0x1000"),
        ((0x200000, 0x200000, 0x200100, 0, 0x200000), "truncated"),
        ((0x4000000, 0x4000000, 0, 0, 0x4000000), "--memory 66M or more"),
    ],
)
def test_address_fields_that_make_no_sense(memory, e820, write_image, multiboot_header, addresses, message):
    with pytest.raises(ImageError, match=message):
        boot(memory, write_image(multiboot_header(1 << 16, addresses)), e820)


def test_header_flags(memory, e820, write_image, kernel32):
    for flags in (1, 2, 4, 7, 0x00020000):
        boot(memory, write_image(kernel32(flags)), e820)
    for flags in (8, 0x8000):
        with pytest.raises(ImageError, match="requires multiboot features"):
            boot(memory, write_image(kernel32(flags)), e820)


def test_elf64_with_a_32_bit_entry(memory, e820, write_image, elf, multiboot_header):
    content = multiboot_header() + b"\xf4" * 20
    virtual = 0xFFFFFFFF80100000
    image = elf(64, virtual + 12, [(virtual, MIB, content, 64)])
    state = boot(memory, write_image(image), e820)
    assert state.rip == MIB + 12
    assert state.cs.attributes & 0x2000 == 0, "32-bit code"
    high = elf(64, 1 << 33, [(1 << 33, 1 << 33, content, 64)])
    with pytest.raises(ImageError, match="below 4 GiB"):
        boot(memory, write_image(high), e820)
