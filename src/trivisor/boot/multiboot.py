"""Multiboot 1 (Multiboot Specification 0.6.96, chapter 3), with what `qemu -kernel` makes of it.

The kernel is an ELF file, or any file whose header carries load addresses; it
starts in 32-bit protected mode without paging, with eax holding the boot
loader's magic number and ebx pointing to the information structure.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from trivisor.boot.elf import Executable, load_segments, read_elf
from trivisor.boot.elf import Segment as LoadSegment
from trivisor.boot.image import Image, ImageError, multiboot_header_offset
from trivisor.boot.placement import E820Map, find_room, usable
from trivisor.machine.memory import GIB, MIB, GuestMemory
from trivisor.machine.state import CpuState, Segment, Table

BOOTLOADER_MAGIC = 0x2BADB002
_BOOT_LOADER_NAME = b"trivisor\0"

# Header flags (3.1.2). Modules are always aligned, the memory map always given,
# and a wish for a video mode is left unfulfilled, as in QEMU.
_KNOWN_REQUIREMENTS = 0x0007
_REQUIREMENTS = 0xFFFF
_HAS_ADDRESSES = 1 << 16

# Information flags (3.3).
_INFO_MEMORY = 1 << 0
_INFO_COMMAND_LINE = 1 << 2
_INFO_MODULES = 1 << 3
_INFO_MEMORY_MAP = 1 << 6
_INFO_LOADER_NAME = 1 << 9
_INFO_SIZE = 116

_INFO_FLOOR = 0x9000
_LOW_MEMORY_END = 0xA0000
_CODE_32 = 0x00CF9B000000FFFF
_DATA_32 = 0x00CF93000000FFFF
_CODE_SELECTOR = 0x08
_DATA_SELECTOR = 0x10
_CR0_ET_PE = 0x11
_RFLAGS_RESERVED = 2


class _Module(NamedTuple):
    start: int
    end: int
    text: bytes


def load(
    memory: GuestMemory,
    image: Image,
    *,
    modules: Sequence[tuple[str | os.PathLike[str], str]] = (),
    command_line: str = "",
    e820: E820Map,
    rsdp_address: int = 0,
) -> CpuState:
    """Put the kernel and its modules, (path, command line) each, into `memory`.

    As in QEMU, command lines begin with the file's name.  `rsdp_address` goes
    unused: a multiboot kernel searches for the ACPI tables itself.  Returns the
    processor ready to run; raises ImageError.
    """
    kernel = _kernel(image)
    for segment in kernel.segments:
        if segment.end > 4 * GIB:
            raise image.fail(f"loads at {segment.physical:#x}: a multiboot kernel must lie below 4 GiB")
    load_segments(memory, image, kernel.segments)
    taken = [(segment.physical, segment.end) for segment in kernel.segments]
    loaded = _load_modules(memory, modules, max(end for _, end in taken), taken, e820)
    info, gdt = _write_information(memory, image, command_line, loaded, taken, e820)
    return _protected_mode(kernel.entry, info, gdt)


def _kernel(image: Image) -> Executable:
    """Read the header, and find out what goes where."""
    at = multiboot_header_offset(image.head)
    if at is None:
        raise image.fail("has no multiboot header in its first 8 KiB")
    (flags,) = struct.unpack_from("<I", image.head, at + 4)
    unknown = flags & _REQUIREMENTS & ~_KNOWN_REQUIREMENTS
    if unknown:
        raise image.fail(f"requires multiboot features that are not there (header flags {unknown:#06x})")
    return _by_addresses(image, at) if flags & _HAS_ADDRESSES else read_elf(image)


def _by_addresses(image: Image, at: int) -> Executable:
    """The header's address fields, "a.out kludge" (3.1.3); they go before an ELF header."""
    if at + 32 > len(image.head):
        raise image.fail("truncated: its multiboot header is not whole; get a whole copy")
    header_address, load, load_end, bss_end, entry = struct.unpack_from("<5I", image.head, at + 12)
    offset = at - (header_address - load)
    if load > header_address or offset < 0:
        raise image.fail("is damaged: its multiboot header lies outside of what it has loaded")
    file_size = (load_end - load) if load_end else image.size - offset
    memory_size = (bss_end - load) if bss_end else file_size
    if file_size <= 0 or memory_size < file_size:
        raise image.fail("is damaged: the load addresses in its multiboot header are out of order")
    if not load <= entry < load + memory_size:
        raise image.fail(f"its entry point {entry:#x} lies outside of what it has loaded")
    return Executable(entry, (LoadSegment(load, load, offset, file_size, memory_size, True),))


def _load_modules(
    memory: GuestMemory,
    modules: Sequence[tuple[str | os.PathLike[str], str]],
    floor: int,
    taken: list[tuple[int, int]],
    e820: E820Map,
) -> list[_Module]:
    """Load each module on pages of its own above the kernel, and add them to `taken`."""
    loaded = []
    for path, command_line in modules:
        name = os.fspath(path)
        with _open_module(name) as file:
            size = os.fstat(file.fileno()).st_size
            address = find_room(e820, taken, max(size, 1), floor=max(floor, MIB), ceiling=4 * GIB)
            if address is None:
                raise ImageError(
                    f"{name}: a module of {-(-size // MIB)} MiB does not fit in {memory.size // MIB} MiB "
                    "of RAM; give it more --memory"
                )
            end = address + size
            if file.readinto(memory.view[address:end]) != size:
                raise ImageError(f"{name}: was cut short while it was being read")
        taken.append((address, address + max(size, 1)))
        loaded.append(_Module(address, end, _text(name, command_line)))
    return loaded


def _open_module(name: str) -> io.FileIO:
    try:
        return io.FileIO(name)
    except OSError as error:
        raise ImageError(f"{name}: module cannot be opened: {error.strerror}") from error


def _text(name: str, command_line: str) -> bytes:
    """A zero-terminated command line that begins with the file's name."""
    text = os.fsencode(f"{name} {command_line}".rstrip())
    if b"\0" in text:
        raise ImageError("a kernel command line cannot hold a NUL character; change it")
    return text + b"\0"


def _write_information(
    memory: GuestMemory,
    image: Image,
    command_line: str,
    modules: Sequence[_Module],
    taken: Sequence[tuple[int, int]],
    e820: E820Map,
) -> tuple[int, int]:
    """Write the information structure, all that it points to, and a GDT; return where it and the GDT are."""
    text = _text(image.path, command_line)
    size = len(_information(0, text, modules, e820)[0])
    address = find_room(e820, taken, size, floor=_INFO_FLOOR, ceiling=_LOW_MEMORY_END)
    if address is None:
        raise image.fail(f"leaves no {size} bytes below 640 KiB for the boot information; load it higher")
    block, gdt = _information(address, text, modules, e820)
    memory.write(address, block)
    return address, gdt


def _information(
    address: int, command_line: bytes, modules: Sequence[_Module], e820: E820Map
) -> tuple[bytes, int]:
    """Lay out the block for `address` (3.3); return it and the GDT's address."""
    block = bytearray(_INFO_SIZE)

    def append(data: bytes) -> int:
        block.extend(bytes(-len(block) % 8))
        block.extend(data)
        return address + len(block) - len(data)

    command_line_at = append(command_line)
    name_at = append(_BOOT_LOADER_NAME)
    module_list = b"".join(struct.pack("<4I", m.start, m.end, append(m.text), 0) for m in modules)
    modules_at = append(module_list)
    memory_map = b"".join(struct.pack("<IQQI", 20, start, length, kind) for start, length, kind in e820)
    memory_map_at = append(memory_map)
    gdt_at = append(struct.pack("<3Q", 0, _CODE_32, _DATA_32))

    flags = _INFO_MEMORY | _INFO_COMMAND_LINE | _INFO_MODULES | _INFO_MEMORY_MAP | _INFO_LOADER_NAME
    lower = min(_usable_from(e820, 0), _LOW_MEMORY_END) // 1024
    upper = _usable_from(e820, MIB) // 1024
    struct.pack_into("<3I", block, 0, flags, lower, upper)
    struct.pack_into("<3I", block, 16, command_line_at, len(modules), modules_at)
    struct.pack_into("<2I", block, 44, len(memory_map), memory_map_at)
    struct.pack_into("<I", block, 64, name_at)
    return bytes(block), gdt_at


def _usable_from(e820: E820Map, address: int) -> int:
    """How many bytes of usable memory there are from `address` to the first hole."""
    return next((end - address for start, end in usable(e820) if start <= address < end), 0)


def _protected_mode(entry: int, information: int, gdt: int) -> CpuState:
    """The machine state of 3.2."""

    def data() -> Segment:
        return Segment(_DATA_SELECTOR, 0, 0xFFFFFFFF, 0xC093)

    state = CpuState(
        rip=entry,
        rflags=_RFLAGS_RESERVED,
        cs=Segment(_CODE_SELECTOR, 0, 0xFFFFFFFF, 0xC09B),
        ss=data(),
        ds=data(),
        es=data(),
        fs=data(),
        gs=data(),
        gdtr=Table(gdt, 23),
        idtr=Table(0, 0),
        cr0=_CR0_ET_PE,
    )
    state.gpr[0] = BOOTLOADER_MAGIC
    state.gpr[3] = information
    return state
