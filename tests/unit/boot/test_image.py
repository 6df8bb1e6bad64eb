"""What an image is, and the one clear line about a file that is none."""

from __future__ import annotations

import gzip
import os
import random
from pathlib import Path

import pytest

from trivisor.boot import Image, ImageError, ImageKind, load_image

HEADER = b"\x02\xb0\xad\x1b\0\0\0\0\xfe\x4f\x52\xe4"


def recognised(path) -> ImageKind:
    with Image(path) as image:
        return image.kind


def test_kinds(write_image, bzimage, elf, multiboot_header):
    assert recognised(write_image(bzimage())) is ImageKind.BZIMAGE
    assert recognised(write_image(elf(64, 0x100000, [(0, 0x100000, b"\xf4", 1)]))) is ImageKind.VMLINUX
    elf32 = elf(32, 0x100000, [(0, 0x100000, multiboot_header(), 12)], machine=3)
    assert recognised(write_image(elf32)) is ImageKind.MULTIBOOT
    assert recognised(write_image(b"\0" * 64 + multiboot_header(1 << 16, (0,) * 5))) is ImageKind.MULTIBOOT


def test_multiboot_header_must_be_aligned_checksummed_and_within_8_kib(write_image):
    assert recognised(write_image(bytes(8192 - 12) + HEADER)) is ImageKind.MULTIBOOT
    for other in (bytes(8192 - 8) + HEADER, b"\0\0" + HEADER, HEADER[:-1] + b"\0", bytes(9000) + HEADER):
        with pytest.raises(ImageError, match="not a kernel"):
            Image(write_image(other))


def test_header_after_a_false_one_is_found(write_image):
    assert recognised(write_image(HEADER[:8] + bytes(8) + HEADER)) is ImageKind.MULTIBOOT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\n", "not a kernel"),
        (gzip.compress(b"x"), "compressed with gzip"),
        (b"070701", "--initrd"),
        (bytes(510) + b"\x55\xaa", "boot sector"),
        (b"\x7fELF", "truncated"),
        (b"\x7fELF\2\1\1" + bytes(20), "truncated"),
        (b"\x7fELF\2\1\1" + bytes(11) + b"\xb7\0" + bytes(60), "machine 183"),
        (b"\x7fELF\1\1\1" + bytes(11) + b"\3\0" + bytes(60), "without a multiboot header"),
    ],
)
def test_what_is_no_kernel(write_image, data, message):
    with pytest.raises(ImageError, match=message) as caught:
        Image(write_image(data))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(write_image(data))


def test_what_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "absent", "no such file"),
        (tmp_path, "is a directory"),
        (tmp_path / "pipe", "not a regular file"),
        ("nul\0character", "cannot be opened"),
    ):
        with pytest.raises(ImageError, match=message):
            Image(path)


def test_file_is_closed_after_success_and_failure(write_image, bzimage):
    before = len(os.listdir("/proc/self/fd"))
    with Image(write_image(bzimage())):
        assert len(os.listdir("/proc/self/fd")) == before + 1
    with pytest.raises(ImageError):
        Image(write_image(b"x"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_wrong_protocol_for_initrd_and_modules(memory, e820, write_image, bzimage, multiboot_header):
    with Image(write_image(bzimage())) as image, pytest.raises(ImageError, match="--initrd"):
        load_image(memory, image, modules=[("m", "")], e820=e820)
    data = multiboot_header(1 << 16, (0x100000, 0x100000, 0, 0, 0x100000))
    with Image(write_image(data)) as image, pytest.raises(ImageError, match="--module"):
        load_image(memory, image, initrd=b"x", e820=e820)


def test_damaged_images_raise_nothing_but_image_error(
    memory, e820, write_image, bzimage, elf, multiboot_header
):
    chance = random.Random(1)
    seeds = [
        bzimage(),
        elf(64, 0x100000, [(0, 0x100000, b"\xf4" * 64, 64), (0, 0x200000, b"\xf4" * 64, 4096)]),
        elf(32, 0x100000, [(0, 0x100000, multiboot_header() + b"\xf4" * 64, 80)], machine=3),
        multiboot_header(1 << 16, (0x100000, 0x100000, 0, 0, 0x100000)) + bytes(100),
    ]
    loaded = refused = 0
    for _ in range(400):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 6)):
            value = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
            data[chance.randrange(min(len(data), 0x280))] = value
        del data[chance.choice((len(data), len(data), chance.randrange(len(data)))) :]
        try:
            with Image(write_image(bytes(data))) as image:
                load_image(memory, image, e820=e820)
            loaded += 1
        except ImageError as error:
            assert "\n" not in str(error)
            refused += 1
    assert loaded > 20
    assert refused > 100
