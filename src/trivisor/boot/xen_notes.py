"""A kernel for Xen's PV interface: its segments and what its ELF notes say (xen/include/public/elfnote.h)."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import Any

from trivisor.boot.image import Image, ImageKind
from trivisor.boot.payload import kernel_payload

# Types of notes whose owner is "Xen".
_ENTRY, _HYPERCALL_PAGE, _VIRT_BASE, _PADDR_OFFSET, _XEN_VERSION = 1, 2, 3, 4, 5
_GUEST_OS, _FEATURES = 6, 10
_INIT_P2M, _MOD_START_PFN = 15, 16
_NUMBERS = frozenset({_ENTRY, _HYPERCALL_PAGE, _VIRT_BASE, _PADDR_OFFSET, _INIT_P2M, _MOD_START_PFN})


@dataclass(frozen=True, slots=True)
class XenKernel:
    """What a domain builder needs of a kernel; addresses without "linear" are the domain's own physical ones."""

    segments: tuple[tuple[int, bytes], ...]
    """(address, content) of each loaded part; what follows up to `end` is zero."""
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
    features: frozenset[str] = field(default_factory=frozenset)
    """What it cannot run without."""
    guest_os: str = ""

    def address(self, physical: int) -> int:
        """The linear address of the domain's physical one."""
        return self.virtual_base + physical


def read_xen_kernel(image: Image) -> XenKernel:
    """Read an ELF kernel, or that in a bzImage; raises ImageError saying what makes it no PV kernel."""
    if image.kind is ImageKind.BZIMAGE:
        data = kernel_payload(image)
    else:
        with image.stream() as stream:
            data = stream.read()
    try:
        entry, loads, notes = _parse(data)
    except Exception as error:  # pyelftools raises much besides ELFError on damaged files
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
    segments = tuple((address - offset, content) for address, content, _ in loads)
    start, end = min(a for a, _ in segments), max(address - offset + size for address, _, size in loads)
    if not segments or start < 0 or end > 1 << 40:
        raise image.fail("is damaged: its segments lie outside of what its notes tell of")
    return XenKernel(
        segments=segments,
        start=start,
        end=end,
        entry=numbers.get(_ENTRY, entry),
        virtual_base=base,
        hypercall_page=numbers.get(_HYPERCALL_PAGE),
        p2m_base=numbers.get(_INIT_P2M),
        unmapped_module=bool(numbers.get(_MOD_START_PFN, 0)),
        features=_required(notes),
        guest_os=_text(notes.get(_GUEST_OS, b"")),
    )


def _parse(data: bytes) -> tuple[int, list[tuple[int, bytes, int]], dict[int, bytes]]:
    """(entry, (physical address, content, size in memory) of each PT_LOAD, Xen's notes by type)."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import NoteSection

    elf = ELFFile(io.BytesIO(data))
    if elf.elfclass != 64 or elf.header["e_machine"] != "EM_X86_64":
        raise ValueError("not an x86-64 file")
    loads: list[tuple[int, bytes, int]] = []
    notes: dict[int, bytes] = {}
    for segment in elf.iter_segments():
        header: Any = segment.header
        if header["p_type"] == "PT_LOAD" and header["p_memsz"]:
            content = data[header["p_offset"] : header["p_offset"] + header["p_filesz"]]
            if len(content) != header["p_filesz"] or header["p_filesz"] > header["p_memsz"]:
                raise ValueError("truncated")
            loads.append((header["p_paddr"], content, header["p_memsz"]))
        elif header["p_type"] == "PT_NOTE":
            notes |= _notes(data[header["p_offset"] : header["p_offset"] + header["p_filesz"]])
    if not notes:  # older kernels and small ones have them in a section alone
        for section in elf.iter_sections():
            if isinstance(section, NoteSection):
                notes |= _notes(section.data())
    return elf.header["e_entry"], loads, notes


def _notes(data: bytes) -> dict[int, bytes]:
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
