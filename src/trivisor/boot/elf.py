"""The loadable segments of an ELF file (System V gABI, chapter 5), 32- or 64-bit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from trivisor.boot.image import Image, ImageError, ImageKind
from trivisor.machine.memory import GuestMemory

_MOST_SEGMENTS = 256
_EXECUTABLE = 1
_PROGRAM_ONLY = ("PT_INTERP", "PT_DYNAMIC", "PT_TLS", "PT_GNU_RELRO")


class Segment(NamedTuple):
    """A PT_LOAD segment: addresses and sizes in bytes; memory beyond `file_size` is zero."""

    physical: int
    virtual: int
    offset: int
    file_size: int
    memory_size: int
    executable: bool

    @property
    def end(self) -> int:
        """The physical address after the last byte."""
        return self.physical + self.memory_size


class Executable(NamedTuple):
    """What a boot loader needs of an ELF file; `entry` is a physical address."""

    entry: int
    segments: tuple[Segment, ...]


def read_elf(image: Image) -> Executable:
    """Read the program headers; raises ImageError for a file that is damaged or no kernel."""
    entry, headers = _program_headers(image)
    if image.kind is ImageKind.VMLINUX and any(header["p_type"] in _PROGRAM_ONLY for header in headers):
        raise image.fail("is a program for an operating system, not a kernel")
    segments = tuple(
        Segment(
            header["p_paddr"],
            header["p_vaddr"],
            header["p_offset"],
            header["p_filesz"],
            header["p_memsz"],
            bool(header["p_flags"] & _EXECUTABLE),
        )
        for header in headers
        if header["p_type"] == "PT_LOAD" and header["p_memsz"]
    )
    if not segments:
        raise image.fail("has no loadable segment (PT_LOAD): it is an object file, not a linked kernel")
    for segment in segments:
        if segment.file_size > segment.memory_size:
            raise image.fail("is damaged: a segment is larger in the file than in memory")
    return Executable(_physical_entry(image, entry, segments), segments)


def load_segments(memory: GuestMemory, image: Image, segments: Sequence[Segment]) -> None:
    """Copy the segments to their physical addresses and clear what follows them; raises ImageError."""
    ordered = sorted(segments, key=lambda segment: segment.physical)
    for segment, following in pairwise(ordered):
        if segment.end > following.physical:
            raise image.fail(f"is damaged: two segments overlap at {following.physical:#x}")
    for segment in ordered:
        if not memory.is_ram(segment.physical, segment.memory_size):
            raise image.too_large(memory, segment.physical, segment.memory_size)
    for segment in ordered:
        image.load(memory, segment.physical, segment.offset, segment.file_size)
        cleared = segment.physical + segment.file_size
        ctypes.memset(memory.base + cleared, 0, segment.memory_size - segment.file_size)


def _program_headers(image: Image) -> tuple[int, list[Any]]:
    from elftools.elf.elffile import ELFFile

    try:
        with image.stream() as stream:
            elf = ELFFile(stream)
            count = elf.num_segments()
            if count > _MOST_SEGMENTS:
                raise image.fail(f"is damaged: its ELF header tells of {count} segments")
            return elf.header["e_entry"], [elf.get_segment(index).header for index in range(count)]
    except ImageError:
        raise
    except Exception as error:  # pyelftools raises much besides ELFError on damaged files
        raise image.fail("has a damaged or truncated ELF header; get a whole copy") from error


def _physical_entry(image: Image, entry: int, segments: Sequence[Segment]) -> int:
    """An entry given as a virtual address moves with its segment, as QEMU and GRUB have it."""
    for segment in segments:
        if segment.executable and 0 <= entry - segment.virtual < segment.memory_size:
            return entry - segment.virtual + segment.physical
    if any(segment.physical <= entry < segment.end for segment in segments):
        return entry
    raise image.fail(f"its entry point {entry:#x} lies in none of its segments")
