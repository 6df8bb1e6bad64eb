"""The Linux/x86 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

A bzImage is entered 0x200 bytes into its protected-mode part and decompresses
itself; a vmlinux is entered at startup_64.  Both get the same processor: long
mode, the first 4 GiB mapped to themselves, rsi at the zero page (zero-page.rst).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from trivisor.boot.image import Image, ImageError, ImageKind
from trivisor.boot.placement import E820Map, find_room, usable
from trivisor.machine.memory import GIB, MIB, PAGE_SIZE, GuestMemory
from trivisor.machine.state import CpuState, Segment, Table

# Where the loader's own structures stand; all of it below 256 KiB.
BOOT_PARAMS = 0x10000
COMMAND_LINE = 0x20000
PAGE_TABLES = 0x30000
GDT = 0x36000
STACK_TOP = 0x40000

_MAPPED_GIB = 4
_HIGH_MEMORY = MIB
_COMMAND_LINE_ROOM = PAGE_TABLES - COMMAND_LINE

# Offsets in the setup header, the same in the file and in the zero page.
_SETUP_SECTS = 0x1F1
_SYSSIZE = 0x1F4
_BOOT_FLAG = 0x1FE
_HEADER_LENGTH = 0x201
_HEADER_MAGIC = 0x202
_VERSION = 0x206
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_CODE32_START = 0x214
_RAMDISK_IMAGE = 0x218
_RAMDISK_SIZE = 0x21C
_CMD_LINE_PTR = 0x228
_INITRD_ADDR_MAX = 0x22C
_KERNEL_ALIGNMENT = 0x230
_XLOADFLAGS = 0x236
_CMDLINE_SIZE = 0x238
_PREF_ADDRESS = 0x258
_INIT_SIZE = 0x260
_HEADER_END = 0x290
# Offsets in the zero page alone.
_ACPI_RSDP_ADDR = 0x070
_E820_ENTRIES = 0x1E8
_E820_TABLE = 0x2D0
_E820_MOST = 128

_LOADED_HIGH = 1
_XLF_KERNEL_64 = 1
_LOADER_UNDEFINED = 0xFF
_OLDEST_VERSION = 0x20C
_ENTRY_64 = 0x200
_VMLINUX_INITRD_ADDR_MAX = 0x7FFFFFFF
_VMLINUX_COMMAND_LINE_SIZE = 2047
_VMLINUX_ALIGNMENT = 2 * MIB

_CR0_PG_NE_ET_MP_PE = 0x80000033
_CR4_PAE = 0x20
_EFER_LMA_LME = 0x500
_RFLAGS_RESERVED = 2
_CODE_64 = 0x00AF9B000000FFFF
_DATA = 0x00CF93000000FFFF
_CODE_SELECTOR = 0x10
_DATA_SELECTOR = 0x18


def load(
    memory: GuestMemory,
    image: Image,
    *,
    initrd: bytes | None = None,
    command_line: str = "",
    e820: E820Map,
    rsdp_address: int = 0,
) -> CpuState:
    """Put a bzImage or vmlinux with its initrd into `memory`; return the processor ready to run it.

    Raises ImageError.
    """
    if image.kind is ImageKind.BZIMAGE:
        zero_page, entry, kernel = _load_bzimage(memory, image, e820)
    else:
        zero_page, entry, kernel = _load_vmlinux(memory, image)
    _set_command_line(memory, image, zero_page, command_line)
    if initrd:
        _place_initrd(memory, image, zero_page, initrd, kernel, e820)
    zero_page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    struct.pack_into("<Q", zero_page, _ACPI_RSDP_ADDR, rsdp_address)
    _set_e820(zero_page, e820)
    memory.write(BOOT_PARAMS, zero_page)
    _write_page_tables(memory)
    memory.write(GDT, struct.pack("<4Q", 0, 0, _CODE_64, _DATA))
    return _long_mode(entry)


def _load_bzimage(
    memory: GuestMemory, image: Image, e820: E820Map
) -> tuple[bytearray, int, tuple[int, int]]:
    """Load the protected-mode part; return the zero page, the entry and what the kernel will take up."""
    header = image.read(0, _HEADER_END)
    (version,) = struct.unpack_from("<H", header, _VERSION)
    (xloadflags,) = struct.unpack_from("<H", header, _XLOADFLAGS)
    if not header[_LOADFLAGS] & _LOADED_HIGH:
        raise image.fail("is a zImage; build a bzImage")
    if version < _OLDEST_VERSION or not xloadflags & _XLF_KERNEL_64:
        raise image.fail("is a 32-bit kernel or older than Linux 3.8; it takes a 64-bit one")
    header_end = _HEADER_MAGIC + header[_HEADER_LENGTH]
    if not _INIT_SIZE + 4 <= header_end <= _HEADER_END:
        raise image.fail(f"is damaged: its setup header ends at {header_end:#x}")
    zero_page = bytearray(PAGE_SIZE)
    zero_page[_SETUP_SECTS:header_end] = header[_SETUP_SECTS:header_end]

    offset = ((header[_SETUP_SECTS] or 4) + 1) * 512
    length = struct.unpack_from("<I", header, _SYSSIZE)[0] * 16
    (address,) = struct.unpack_from("<Q", header, _PREF_ADDRESS)
    (init_size,) = struct.unpack_from("<I", header, _INIT_SIZE)
    extent = max(length, init_size)
    if address < _HIGH_MEMORY or address % PAGE_SIZE or length <= _ENTRY_64:
        raise image.fail("is damaged: its setup header makes no sense; get a whole copy")
    if not any(start <= address and address + extent <= end for start, end in usable(e820)):
        raise image.too_large(memory, address, extent)
    image.load(memory, address, offset, length)
    struct.pack_into("<I", zero_page, _CODE32_START, address & 0xFFFFFFFF)
    return zero_page, address + _ENTRY_64, (address, address + extent)


def _load_vmlinux(memory: GuestMemory, image: Image) -> tuple[bytearray, int, tuple[int, int]]:
    """Load an ELF kernel's segments, and make up the setup header that its bzImage would have had."""
    from trivisor.boot.elf import load_segments, read_elf

    elf = read_elf(image)
    start = min(segment.physical for segment in elf.segments)
    end = max(segment.end for segment in elf.segments)
    if start < _HIGH_MEMORY:
        raise image.fail(f"has a segment at {start:#x}: a Linux kernel loads at 1 MiB or above")
    if elf.entry >= _MAPPED_GIB * GIB:
        raise image.fail(f"has its entry at {elf.entry:#x}: it must lie below 4 GiB")
    load_segments(memory, image, elf.segments)
    zero_page = bytearray(PAGE_SIZE)
    struct.pack_into("<H", zero_page, _BOOT_FLAG, 0xAA55)
    zero_page[_HEADER_MAGIC : _HEADER_MAGIC + 4] = b"HdrS"
    struct.pack_into("<H", zero_page, _VERSION, _OLDEST_VERSION)
    zero_page[_LOADFLAGS] = _LOADED_HIGH
    struct.pack_into("<I", zero_page, _INITRD_ADDR_MAX, _VMLINUX_INITRD_ADDR_MAX)
    struct.pack_into("<I", zero_page, _KERNEL_ALIGNMENT, _VMLINUX_ALIGNMENT)
    struct.pack_into("<H", zero_page, _XLOADFLAGS, _XLF_KERNEL_64)
    struct.pack_into("<I", zero_page, _CMDLINE_SIZE, _VMLINUX_COMMAND_LINE_SIZE)
    return zero_page, elf.entry, (start, end)


def _set_command_line(memory: GuestMemory, image: Image, zero_page: bytearray, command_line: str) -> None:
    text = os.fsencode(command_line)
    longest = min(struct.unpack_from("<I", zero_page, _CMDLINE_SIZE)[0], _COMMAND_LINE_ROOM - 1)
    if len(text) > longest:
        raise image.fail(f"takes a command line of {longest} bytes, not {len(text)}; shorten --append")
    if b"\0" in text:
        raise ImageError("a kernel command line cannot hold a NUL character; change --append")
    memory.write(COMMAND_LINE, text + b"\0")
    struct.pack_into("<I", zero_page, _CMD_LINE_PTR, COMMAND_LINE)


def _place_initrd(
    memory: GuestMemory,
    image: Image,
    zero_page: bytearray,
    initrd: bytes,
    kernel: tuple[int, int],
    e820: E820Map,
) -> None:
    """As high as the kernel allows, out of the way of what it unpacks."""
    ceiling = struct.unpack_from("<I", zero_page, _INITRD_ADDR_MAX)[0] + 1
    address = find_room(
        e820, [kernel], len(initrd), floor=_HIGH_MEMORY, ceiling=min(ceiling, _MAPPED_GIB * GIB), highest=True
    )
    if address is None:
        raise ImageError(
            f"the initrd of {-(-len(initrd) // MIB)} MiB does not fit beside {image.path} in "
            f"{memory.size // MIB} MiB of RAM; give it more --memory"
        )
    memory.write(address, initrd)
    struct.pack_into("<II", zero_page, _RAMDISK_IMAGE, address, len(initrd))


def _set_e820(zero_page: bytearray, e820: Iterable[tuple[int, int, int]]) -> None:
    entries = list(e820)
    if len(entries) > _E820_MOST:
        raise ValueError(f"an e820 map has at most {_E820_MOST} entries here, not {len(entries)}")
    zero_page[_E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", zero_page, _E820_TABLE + 20 * index, *entry)


def _write_page_tables(memory: GuestMemory) -> None:
    """Map the first 4 GiB to themselves in 2 MiB pages (Intel SDM 3A 4.5)."""
    present_writable, large = 0x003, 0x083
    directories = PAGE_TABLES + 2 * PAGE_SIZE
    pointers = [directories + index * PAGE_SIZE | present_writable for index in range(_MAPPED_GIB)]
    pages = [index * 2 * MIB | large for index in range(512 * _MAPPED_GIB)]
    memory.write(PAGE_TABLES, bytes(2 * PAGE_SIZE))
    memory.write_u64(PAGE_TABLES, PAGE_TABLES + PAGE_SIZE | present_writable)
    memory.write(PAGE_TABLES + PAGE_SIZE, struct.pack(f"<{len(pointers)}Q", *pointers))
    memory.write(directories, struct.pack(f"<{len(pages)}Q", *pages))


def _long_mode(entry: int) -> CpuState:
    def data() -> Segment:
        return Segment(_DATA_SELECTOR, 0, 0xFFFFFFFF, 0xC093)

    state = CpuState(
        rip=entry,
        rflags=_RFLAGS_RESERVED,
        cs=Segment(_CODE_SELECTOR, 0, 0xFFFFFFFF, 0xA09B),
        ss=data(),
        ds=data(),
        es=data(),
        fs=data(),
        gs=data(),
        gdtr=Table(GDT, 31),
        idtr=Table(0, 0),
        cr0=_CR0_PG_NE_ET_MP_PE,
        cr3=PAGE_TABLES,
        cr4=_CR4_PAE,
        efer=_EFER_LMA_LME,
    )
    state.gpr[4] = STACK_TOP
    state.gpr[6] = BOOT_PARAMS
    return state
