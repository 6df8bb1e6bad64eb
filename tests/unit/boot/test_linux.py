"""The Linux 64-bit boot protocol: boot.rst and zero-page.rst, field by field."""

from __future__ import annotations

import struct

import pytest

from trivisor.boot import Image, ImageError, linux
from trivisor.machine.memory import MIB


def boot(memory, path, e820, **options):
    with Image(path) as image:
        return linux.load(memory, image, e820=e820, **options)


def zero_page(memory, state, form, offset):
    return struct.unpack("<" + form, memory.read(state.rsi + offset, struct.calcsize(form)))


def translate(memory, cr3, address):
    """Walk 4-level page tables (Intel SDM 3A 4.5.4), 2 MiB pages only."""
    table = cr3
    for shift in (39, 30, 21):
        entry = memory.read_u64(table + 8 * (address >> shift & 511))
        assert entry & 3 == 3
        table = entry & 0x000FFFFFFFFFF000
    assert entry & 0x80
    return table | address & 0x1FFFFF


def test_bzimage_is_loaded_where_it_prefers(memory, e820, write_image, bzimage):
    payload = bytes(range(256)) * 8
    state = boot(memory, write_image(bzimage(payload, pref_address=4 * MIB)), e820)
    assert memory.read(4 * MIB, len(payload)) == payload
    assert state.rip == 4 * MIB + 0x200


def test_processor_state(memory, e820, write_image, bzimage):
    state = boot(memory, write_image(bzimage()), e820)
    assert (state.cs.selector, state.ds.selector, state.es.selector, state.ss.selector) == (16, 24, 24, 24)
    gdt = struct.unpack("<4Q", memory.read(state.gdtr.base, state.gdtr.limit + 1))
    for segment in (state.cs, state.ss):
        descriptor = gdt[segment.selector >> 3]
        assert segment.attributes == descriptor >> 40 & 0xF0FF
        assert (segment.base, segment.limit) == (0, 0xFFFFFFFF)
    assert state.cs.attributes & 0x6000 == 0x2000, "64-bit code: L set, D clear"
    assert state.rflags == 2, "interrupts off"
    assert state.cr0 & 0x80000001 == 0x80000001
    assert state.cr0 & 0x60000000 == 0, "caches on"
    assert state.cr4 == 0x20
    assert state.efer == 0x500
    for address in (0, 0x12345, 2 * MIB, state.rip, 0xC0000000, 0xFEE00000, 0xFFFFFFFF):
        assert translate(memory, state.cr3, address) == address
    assert memory.read_u64(memory.read_u64(state.cr3) & ~0xFFF | 32) == 0, "nothing mapped above 4 GiB"


def test_zero_page(memory, e820, write_image, bzimage):
    image = bzimage(cmdline_size=2047)
    state = boot(memory, write_image(image), e820, command_line="console=ttyS0 é", rsdp_address=0xE0010)
    assert memory.read(state.rsi + 0x202, 14) == image[0x202:0x210], "the setup header is the file's"
    assert zero_page(memory, state, "Q", 0x70) == (0xE0010,)
    assert zero_page(memory, state, "B", 0x210) == (0xFF,)
    assert zero_page(memory, state, "BB", 0x1EF) == (0, 0), "the sentinel says that the page was cleared"
    (pointer,) = zero_page(memory, state, "I", 0x228)
    assert memory.read(pointer, 17) == "console=ttyS0 é\0".encode()
    (entries,) = zero_page(memory, state, "B", 0x1E8)
    table = [zero_page(memory, state, "QQI", 0x2D0 + 20 * index) for index in range(entries)]
    assert table == e820
    assert zero_page(memory, state, "II", 0x218) == (0, 0), "no initrd"


def test_initrd_is_high_but_below_reserved_memory(memory, e820, write_image, bzimage):
    initrd = b"070701" * 1000
    state = boot(memory, write_image(bzimage()), e820, initrd=initrd)
    address, size = zero_page(memory, state, "II", 0x218)
    assert size == len(initrd)
    assert memory.read(address, size) == initrd
    assert address == 0x1FE0000 - 0x2000


def test_initrd_stays_within_what_the_kernel_allows(memory, e820, write_image, bzimage):
    state = boot(memory, write_image(bzimage(initrd_addr_max=0x7FFFFF)), e820, initrd=b"x" * 5000)
    address, size = zero_page(memory, state, "II", 0x218)
    assert address + size <= 0x800000
    assert address == 0x800000 - 0x2000


def test_initrd_goes_below_the_kernel_where_there_is_no_other_room(memory, e820, write_image, bzimage):
    image = bzimage(pref_address=16 * MIB, init_size=14 * MIB)
    state = boot(memory, write_image(image), e820, initrd=b"x" * 3 * MIB)
    assert zero_page(memory, state, "I", 0x218) == (13 * MIB,)
    with pytest.raises(ImageError, match="initrd of 16 MiB does not fit"):
        boot(memory, write_image(image), e820, initrd=b"x" * 16 * MIB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0x20B}, "32-bit kernel"),
        ({"xloadflags": 0}, "32-bit kernel"),
        ({"pref_address": 16 * MIB, "init_size": 17 * MIB}, "--memory 34M or more"),
        ({"pref_address": 0}, "makes no sense"),
    ],
)
def test_kernels_that_cannot_run(memory, e820, write_image, bzimage, change, message):
    with pytest.raises(ImageError, match=message):
        boot(memory, write_image(bzimage(**change)), e820)


def test_truncated_bzimage(memory, e820, write_image, bzimage):
    whole = bzimage()
    boot(memory, write_image(whole), e820)
    for length in (0x208, 0x28F, 1024, len(whole) - 1):
        with pytest.raises(ImageError, match="truncated"):
            boot(memory, write_image(whole[:length]), e820)


def test_command_line_limits(memory, e820, write_image, bzimage):
    path = write_image(bzimage(cmdline_size=10))
    boot(memory, path, e820, command_line="x" * 10)
    with pytest.raises(ImageError, match="10 bytes, not 11"):
        boot(memory, path, e820, command_line="x" * 11)
    with pytest.raises(ImageError, match="NUL"):
        boot(memory, path, e820, command_line="a\0b")


def test_vmlinux_segments_go_to_physical_addresses(memory, e820, write_image, elf):
    memory.write(4 * MIB, b"\xff" * 8192)
    text, data = b"\xf4" * 100, b"data"
    image = elf(
        64, 2 * MIB, [(0xFFFFFFFF81000000, 2 * MIB, text, 100), (0xFFFFFFFF81200000, 4 * MIB, data, 8000)]
    )
    state = boot(memory, write_image(image), e820, initrd=b"i" * 100, command_line="a")
    assert memory.read(2 * MIB, 100) == text
    assert memory.read(4 * MIB, 8001) == data + bytes(7996) + b"\xff", "the rest of a segment is zero"
    assert state.rip == 2 * MIB
    assert zero_page(memory, state, "4s", 0x202) == (b"HdrS",)
    assert zero_page(memory, state, "H", 0x1FE) == (0xAA55,)
    assert zero_page(memory, state, "II", 0x218) == (0x1FE0000 - 0x1000, 100)


def test_vmlinux_with_a_virtual_entry(memory, e820, write_image, elf):
    image = elf(64, 0xFFFFFFFF81000010, [(0xFFFFFFFF81000000, 2 * MIB, b"\xf4" * 100, 100)])
    assert boot(memory, write_image(image), e820).rip == 2 * MIB + 0x10


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "no loadable segment"),
        ([(0, 0x10000, b"\xf4", 1)], "1 MiB or above"),
        ([(0, 2 * MIB, b"\xf4" * 16, 4)], "larger in the file"),
        ([(0, 2 * MIB, b"\xf4", 64), (0, 2 * MIB + 32, b"\xf4", 64)], "overlap"),
        ([(0, 2 * MIB, b"\xf4", 40 * MIB)], "--memory 43M or more"),
        ([(0, 3 << 30, b"\xf4", 1)], "no machine has RAM"),
        ([(0, 1 << 40, b"\xf4", 1)], "below 4 GiB"),
    ],
)
def test_vmlinux_that_cannot_be_loaded(memory, e820, write_image, elf, segments, message):
    entry = segments[0][1] if segments else 0
    with pytest.raises(ImageError, match=message):
        boot(memory, write_image(elf(64, entry, segments)), e820)


def test_vmlinux_entry_must_be_in_a_segment(memory, e820, write_image, elf):
    with pytest.raises(ImageError, match="entry point 0x300000"):
        boot(memory, write_image(elf(64, 0x300000, [(0, 2 * MIB, b"\xf4", 1)])), e820)


def test_a_program_is_no_kernel(memory, e820, write_image, elf):
    program = elf(64, 0x400000, [(0x400000, 0x400000, b"/lib/ld.so\0", 11)], program_header_type=3)
    with pytest.raises(ImageError, match="not a kernel"):
        boot(memory, write_image(program), e820)
