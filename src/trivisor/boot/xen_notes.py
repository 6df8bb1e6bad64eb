"""A kernel for Xen's PV interface: its segments and what its ELF notes say (xen/include/public/elfnote.h)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from trivisor.boot.image import Image, ImageError, ImageKind
from trivisor.boot.payload import kernel_payload

# Types of notes whose owner is "Xen".
_ENTRY, _HYPERCALL_PAGE, _VIRT_BASE, _PADDR_OFFSET, _XEN_VERSION = 1, 2, 3, 4, 5
_GUEST_OS, _FEATURES = 6, 10
_INIT_P2M, _MOD_START_PFN = 15, 16
_ELF_HEADER, _SEGMENT, _SECTION = map(struct.Struct, ("<16sHHIQQQIHHHHHH", "<IIQQQQQQ", "<IIQQQQIIQQ"))
_ELF64_LITTLE = b"\x7fELF\2\1"
_X86_64 = 62
_PT_LOAD, _PT_NOTE, _SHT_NOTE = 1, 4, 7
_LARGEST_NOTES = 1 << 20
"""Bytes of all notes, Xen's and others; a kernel has some hundreds."""
_NUMBERS = frozenset({_ENTRY, _HYPERCALL_PAGE, _VIRT_BASE, _PADDR_OFFSET, _INIT_P2M, _MOD_START_PFN})


class XenKernel(NamedTuple):
    """What a domain builder needs of a kernel; addresses without "linear" are the domain's own physical ones."""

    segments: tuple[tuple[int, memoryview], ...]
    """(address, content) of each loaded part; what lies between them and follows up to `end` is zero."""
    start: int
    end: int
    entry: int
    """Linear."""
    virtual_base: int
    """Linear address of the domain's page 0."""
    hypercall_page: int | None
    """Linear; None for a kernel that makes its hypercalls itself."""
    p2m_base: int | None
    """Linear address where the list of frames is to be mapped."""
    unmapped_module: bool
    """The kernel takes a ramdisk by its page number."""
    features: frozenset[str] = frozenset()
    """What it cannot run without."""
    guest_os: str = ""
    path: str = ""
    """The image file, as the user gave it."""

    def fail(self, what: str) -> ImageError:
        """Return the error to raise about it."""
        return ImageError(f"{self.path}: {what}")

    def address(self, physical: int) -> int:
        """The linear address of the domain's physical one."""
        return self.virtual_base + physical


def read_xen_kernel(image: Image) -> XenKernel:
    """Read an ELF kernel, or that in a bzImage; raises ImageError saying what makes it no PV kernel."""
    if image.kind is ImageKind.BZIMAGE:
        data = kernel_payload(image)
    else:
        with image.stream() as stream:
            data = memoryview(stream.read())
    try:
        entry, loads, notes = _parse(lambda offset, length: bytes(_part(data, offset, length)))
        segments = tuple((load.address, _part(data, load.offset, load.in_file)) for load in loads if load.in_file)
    except ValueError as error:
        raise image.fail("has a damaged or truncated ELF header; get a whole copy") from error
    if not notes:
        raise image.fail("has no Xen notes: it is no kernel for Xen (Linux: CONFIG_XEN_PV=y)")
    numbers = {kind: _number(value) for kind, value in notes.items() if kind in _NUMBERS}
    if _ENTRY not in numbers and _GUEST_OS not in notes:
        raise image.fail("has no Xen PV entry: it knows Xen only as a fully virtualised guest (PVH)")
    version = _text(notes.get(_XEN_VERSION, b""))
    if version and version != "xen-3.0":
        raise image.fail(f'is for Xen\'s interface "{version}", not "xen-3.0"')
    base = numbers.get(_VIRT_BASE, 0)
    offset = numbers.get(_PADDR_OFFSET, base)
    if not loads:
        raise image.fail("has no loadable segment (PT_LOAD): it is an object file, not a linked kernel")
    start, end = min(one.address for one in loads) - offset, max(one.address + one.size for one in loads) - offset
    if start < 0 or end > 1 << 40:
        raise image.fail("is damaged: its segments lie outside of what its notes tell of")
    return XenKernel(
        segments=tuple((address - offset, part) for address, part in segments),
        start=start,
        end=end,
        entry=numbers.get(_ENTRY, entry),
        virtual_base=base,
        hypercall_page=numbers.get(_HYPERCALL_PAGE),
        p2m_base=numbers.get(_INIT_P2M),
        unmapped_module=bool(numbers.get(_MOD_START_PFN, 0)),
        features=_required(notes),
        guest_os=_text(notes.get(_GUEST_OS, b"")),
        path=image.path,
    )


def guest_os(image: Image) -> str:
    """What an ELF kernel's Xen notes call the system that it is of, "linux" say; empty if nothing says so."""
    if image.kind is not ImageKind.VMLINUX:
        return ""
    try:
        _, _, notes = _parse(image.read)
    except ValueError:
        return ""  # whoever boots it says what is wrong
    return _text(notes.get(_GUEST_OS, b""))


def _part(data: memoryview, offset: int, length: int) -> memoryview:
    """The `length` bytes from `offset` on; raises ValueError past the end."""
    if offset + length > len(data):
        raise ValueError(f"it ends after {len(data)} bytes, not {offset + length}")
    return data[offset : offset + length]


class _Load(NamedTuple):
    """A PT_LOAD segment: its physical address, where the file has what of it, its size in memory."""

    address: int
    offset: int
    in_file: int
    size: int


def _parse(read: Callable[[int, int], bytes]) -> tuple[int, list[_Load], dict[int, bytes]]:
    """(entry, what is loaded, Xen's notes by type) of a file that `read(offset, length)` reads.

    Raises ValueError (System V gABI, chapters 4 and 5).
    """
    header = _ELF_HEADER.unpack(read(0, _ELF_HEADER.size))
    identity, _, machine, _, entry, segments, sections = header[:7]
    segment_size, count, section_size, section_count = header[9:13]
    if not identity.startswith(_ELF64_LITTLE) or machine != _X86_64 or (count and segment_size != _SEGMENT.size):
        raise ValueError("not an x86-64 file")
    loads: list[_Load] = []
    places: list[tuple[int, int]] = []
    for kind, _, offset, _, physical, in_file, in_memory, _ in _SEGMENT.iter_unpack(
        read(segments, count * _SEGMENT.size)
    ):
        if kind == _PT_LOAD and in_memory:
            if in_file > in_memory:
                raise ValueError("a segment is larger in the file than in memory")
            loads.append(_Load(physical, offset, in_file, in_memory))
        elif kind == _PT_NOTE:
            places.append((offset, in_file))
    notes = _notes(read, places)
    if not notes and section_count:  # older kernels and small ones have them in a section alone
        if section_size != _SECTION.size:
            raise ValueError("not an x86-64 file")
        table = _SECTION.iter_unpack(read(sections, section_count * _SECTION.size))
        notes = _notes(read, [(offset, size) for _, kind, _, _, offset, size, *_ in table if kind == _SHT_NOTE])
    return entry, loads, notes


def _notes(read: Callable[[int, int], bytes], places: list[tuple[int, int]]) -> dict[int, bytes]:
    """Xen's notes at all these (offset, length); raises ValueError."""
    if sum(length for _, length in places) > _LARGEST_NOTES:
        raise ValueError("its notes are too large")
    found: dict[int, bytes] = {}
    for offset, length in places:
        found |= _notes_in(read(offset, length))
    return found


def _notes_in(data: bytes) -> dict[int, bytes]:
    """Xen's notes in a run of them: name size, content size, type, name, content, each padded to 4 bytes."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<3I", data, at)
        name = data[at + 12 : at + 12 + name_size]
        at += 12 + (name_size + 3 & ~3)
        if name == b"Xen\0":
            found[kind] = data[at : at + size]
        at += size + 3 & ~3
    return found


def _number(value: bytes) -> int:
    """A note's number, in 4 or 8 bytes."""
    return int.from_bytes(value[:8], "little")


def _text(value: bytes) -> str:
    return value.split(b"\0")[0].decode("ascii", "replace")


def _required(notes: dict[int, bytes]) -> frozenset[str]:
    """The features marked with "!" in the list of them."""
    words = _text(notes.get(_FEATURES, b"")).split("|")
    return frozenset(word[1:] for word in words if word.startswith("!"))
