"""The slow, exact side of memory: page walks, loads and stores in Python, and filling the software TLBs."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from trivisor.machine.bus import Bus
from trivisor.machine.exits import MmioRead, MmioWrite
from trivisor.machine.memory import GuestMemory, host_map, host_unmap
from trivisor.translation.core import Core
from trivisor.translation.layout import (
    EXEC_TLB_ENTRIES,
    INFO_KEYED,
    INFO_OPENED,
    KEYED_PAGES,
    LOCAL_ENTRIES,
    OFFSETS,
    OPENED_PAGES,
    TLB_ENTRIES,
    TLB_ENTRY_SIZE,
    large_place,
)
from trivisor.translation.translator.recipe import KIND_USER, KIND_WRITE
from trivisor.x86 import paging
from trivisor.x86.control import CR4_PKE, CR4_PKS, CR4_SMAP, EFER_LMA
from trivisor.x86.exceptions import PAGE_FAULT, GuestException
from trivisor.x86.paging import NO_KEYS, Access, PagingMode, ProtectionKeys, Translation

GENERAL_PROTECTION = 13
_CR0_WP = 1 << 16
_OPENED_COUNT, _LOCAL_COUNT = OFFSETS["OPENED_COUNT"] // 8, OFFSETS["LOCAL_COUNT"] // 8
_KEYS, _KEYED_COUNT = OFFSETS["KEYS"] // 8, OFFSETS["KEYED_COUNT"] // 8
_KINDS = {Access.READ: 0, Access.WRITE: KIND_WRITE, Access.EXECUTE: 8}
_EXEC_TLBS = OFFSETS["EXEC_TLB_KERNEL"] // 8, OFFSETS["EXEC_TLB_USER"] // 8
_WALKED_TO_A_DEVICE = 4
"""The native walker's outcome for a page that is not RAM."""
_PAGING_NATIVE, _WALKED_PHYSICAL, _WALKED_LEAF, _WALKED_RIGHTS, _WALKED_NX, _WALKED_INFO = (
    OFFSETS[name] // 8
    for name in ("PAGING_NATIVE", "WALKED_PHYSICAL", "WALKED_LEAF", "WALKED_RIGHTS", "WALKED_NX", "WALKED_INFO")
)


class _Tables:
    """Guest memory for page walks: what is not RAM reads as all ones and takes no writes."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def read_u32(self, address: int) -> int:
        return self._memory.read_u32(address) if self._memory.is_ram(address, 4) else 0xFFFFFFFF

    def read_u64(self, address: int) -> int:
        return self._memory.read_u64(address) if self._memory.is_ram(address, 8) else (1 << 64) - 1

    def write_u32(self, address: int, value: int) -> None:
        if self._memory.is_ram(address, 4):
            self._memory.write_u32(address, value)

    def write_u64(self, address: int, value: int) -> None:
        if self._memory.is_ram(address, 8):
            self._memory.write_u64(address, value)


class Mmu:
    """Translates addresses for the Python side, and reads and writes memory as instructions do."""

    def __init__(self, core: Core, memory: GuestMemory, mmio: Bus, physical_bits: int) -> None:
        self.core = core
        self.memory = memory
        self.mmio = mmio
        self.physical_bits = physical_bits
        self.observed: dict[type, list[Callable[[object], None]]] = {}
        self.on_code_write: Callable[[int, int], None] = lambda address, length: None
        """Called before a store of (physical address, length) into a page that code was translated from."""
        self._tables = _Tables(memory)
        self._words = core.words
        self.native_walker: Callable[[int, int], int] = lambda linear, kind: 2
        """`walk_for_python` of the native helpers, once they are there."""
        self._paging: tuple[tuple[int, int, int, int], PagingMode] | None = None
        pages = memory.span >> 12
        self._map_length = (pages * 8 + 4095) & ~4095
        self._map_at = host_map(self._map_length, mmap.PROT_READ | mmap.PROT_WRITE)
        whole = (ctypes.c_ubyte * self._map_length).from_address(self._map_at)
        self.code_lines = memoryview(whole).cast("B").cast("Q")
        """64 bits per physical page: which of its 64-byte lines hold code that was translated."""
        words = core.words
        words[OFFSETS["CODE_LINES"] // 8] = self._map_at
        words[OFFSETS["RAM_BASE"] // 8] = memory.base
        words[OFFSETS["RAM_LOW_END"] // 8] = memory.low_end
        words[OFFSETS["RAM_HIGH_END"] // 8] = memory.high_end

    def close(self) -> None:
        """Give the page map back to the host."""
        if self._map_at:
            self.code_lines.release()
            host_unmap(self._map_at, self._map_length)
            self._map_at = 0

    # -- translation ----------------------------------------------------------------------------------------

    def paging(self) -> PagingMode:
        """The paging mode that the control registers select now."""
        core = self.core
        key = (core.cr0, core.cr3, core.cr4, core.efer)
        if self._paging is None or self._paging[0] != key:
            mode = PagingMode.from_registers(*key, physical_bits=self.physical_bits)
            self._paging = (key, mode)
        return self._paging[1]

    def physical(self, linear: int, access: Access, user: bool, *, implicit: bool = False) -> int:
        """The physical address, by a page walk; raises GuestException."""
        return self.walk(linear, access, user, implicit=implicit).physical

    def walk(
        self, linear: int, access: Access, user: bool, *, implicit: bool = False
    ) -> Translation:
        """A page walk with accessed and dirty bits set; raises GuestException.

        `implicit`: the processor's own access to its tables, whatever the privilege level.
        """
        implicit = implicit and bool(self.core.cr4 & CR4_SMAP)  # else it is like the supervisor's others
        if self._words[_PAGING_NATIVE] and not implicit:
            found = self._native_walk(linear, access, user)
            if found is not None:
                return found
        mode = self.paging()
        if mode.mode is paging.Mode.LEVEL4 and not paging.is_canonical(linear):
            raise GuestException(GENERAL_PROTECTION, 0)
        if mode.mode is not paging.Mode.LEVEL4:
            linear &= 0xFFFFFFFF if mode.mode is not paging.Mode.NONE or self.core.efer & 0x400 == 0 else -1
        ac = bool(self.core.rflags & 0x40000)
        keys = self._keys() if self.core.cr4 & (CR4_PKE | CR4_PKS) else NO_KEYS
        return paging.walk(self._tables, mode, linear, access, user=user, ac=ac, implicit=implicit, keys=keys)

    def _keys(self) -> ProtectionKeys:
        """The protection keys that count: in long mode alone (section 4.6.2)."""
        core = self.core
        if not core.efer & EFER_LMA:
            return NO_KEYS
        return ProtectionKeys(core.pkru if core.cr4 & CR4_PKE else None, core.pkrs if core.cr4 & CR4_PKS else None)

    def _native_walk(self, linear: int, access: Access, user: bool) -> Translation | None:
        """The same by the native walker; None for what it leaves to the exact one."""
        kind = _KINDS[access] | (KIND_USER if user else 0)
        status = self.native_walker(linear, kind)
        words = self._words
        if status in (0, _WALKED_TO_A_DEVICE):
            info, rights = words[_WALKED_INFO], words[_WALKED_RIGHTS]
            return Translation(
                words[_WALKED_PHYSICAL] | linear & 0xFFF,
                0x40000000 if info & 4 else 0x200000 if info & 2 else 0x1000, bool(rights & 2),
                bool(rights & 4), not words[_WALKED_NX] >> 63, bool(info & 1), bool(words[_WALKED_LEAF] & 0x40), 0,
            )  # fmt: skip
        if status == 1:
            raise GuestException(PAGE_FAULT, words[_WALKED_LEAF], linear)
        return None

    # -- loads and stores -----------------------------------------------------------------------------------

    def load(self, linear: int, size: int, user: bool, *, implicit: bool = False) -> int:
        """Read up to 64 bytes as the guest would."""
        room = 0x1000 - (linear & 0xFFF)
        if size <= room:
            return self._read(self.physical(linear, Access.READ, user, implicit=implicit), size)
        low = self.physical(linear, Access.READ, user, implicit=implicit)
        high = self.physical(linear + room & self._mask(), Access.READ, user, implicit=implicit)
        return self._read(low, room) | self._read(high, size - room) << 8 * room

    def store(self, linear: int, size: int, value: int, user: bool) -> None:
        """Write up to 64 bytes, all or nothing."""
        room = 0x1000 - (linear & 0xFFF)
        if size <= room:
            self._write(self.physical(linear, Access.WRITE, user), size, value)
            return
        low = self.physical(linear, Access.WRITE, user)
        high = self.physical(linear + room & self._mask(), Access.WRITE, user)
        self._write(low, room, value & ((1 << 8 * room) - 1))
        self._write(high, size - room, value >> 8 * room)

    def probe_write(self, linear: int, size: int, user: bool) -> None:
        """Raise what `store` would raise."""
        self.physical(linear, Access.WRITE, user)
        if (linear & 0xFFF) + size > 0x1000:
            self.physical((linear | 0xFFF) + 1 & self._mask(), Access.WRITE, user)

    def _mask(self) -> int:
        return (1 << 64) - 1 if self.core.efer & 0x400 else 0xFFFFFFFF

    def _read(self, address: int, size: int) -> int:
        if self.memory.is_ram(address, size):
            return int.from_bytes(self.memory.view[address : address + size], "little")
        return self.read_device(address, size)

    def _write(self, address: int, size: int, value: int) -> None:
        if self.memory.is_ram(address, size):
            if self.code_lines[address >> 12]:
                self.on_code_write(address, size)
            self.memory.view[address : address + size] = value.to_bytes(size, "little")
        else:
            self.write_device(address, size, value)

    def read_physical(self, address: int, size: int) -> bytes:
        """`size` bytes within a page of RAM or of a device."""
        return self._read(address, size).to_bytes(size, "little")

    def write_physical(self, address: int, data: bytes) -> None:
        """Store within a page of RAM or of a device."""
        self._write(address, len(data), int.from_bytes(data, "little"))

    def read_device(self, address: int, size: int) -> int:
        """A load from physical memory that is not RAM, in pieces that devices take."""
        value = shift = 0
        while size:
            piece = 1 << min(size.bit_length() - 1, 3)
            part = self.mmio.read(address, piece)
            for subscriber in self.observed.get(MmioRead, ()):
                subscriber(MmioRead(address, piece, part))
            value |= part << shift
            shift += 8 * piece
            address += piece
            size -= piece
        return value

    def write_register(self, address: int, value: int) -> None:
        """A store of 32 bits to physical memory that is not RAM."""
        for subscriber in self.observed.get(MmioWrite, ()):
            subscriber(MmioWrite(address, 4, value))
        self.mmio.write(address, 4, value)

    def write_device(self, address: int, size: int, value: int) -> None:
        """A store to physical memory that is not RAM."""
        while size:
            piece = 1 << min(size.bit_length() - 1, 3)
            part = value & ((1 << 8 * piece) - 1)
            for subscriber in self.observed.get(MmioWrite, ()):
                subscriber(MmioWrite(address, piece, part))
            self.mmio.write(address, piece, part)
            value >>= 8 * piece
            address += piece
            size -= piece

    # -- the TLBs -------------------------------------------------------------------------------------------

    def entry(self, linear: int, user: bool) -> int:
        """Index into the state block's words of the data TLB entry that `linear` belongs to."""
        table = OFFSETS["TLB_USER" if user else "TLB_KERNEL"]
        return (table + (linear >> 12) % TLB_ENTRIES * TLB_ENTRY_SIZE) // 8

    def fill(self, linear: int, user: bool, found: Translation) -> None:
        """Enter a page of RAM into a data TLB, with the rights that it has."""
        words, page = self.core.words, linear & ~0xFFF & ((1 << 64) - 1)
        physical = found.physical & ~0xFFF
        writable = (found.writable or (not user and not self.core.cr0 & _CR0_WP)) and found.dirty
        paged = self.paging().mode is not paging.Mode.NONE
        if not paged:
            writable = True
        elif found.key_forbids_writing and (user or self.core.cr0 & _CR0_WP):
            writable = False
        if self.code_lines[physical >> 12]:
            writable = False
        at = self.entry(linear, user)
        words[at] = page
        words[at + 1] = page if writable else page ^ 0x1000
        words[at + 2] = self.memory.base + physical
        info = self._info(linear, found)
        if paged and not user and found.user and self.core.cr4 & CR4_SMAP:
            # To be closed again when RFLAGS.AC, which has let it through, is cleared.
            info |= INFO_OPENED
            count = words[_OPENED_COUNT]
            if count < OPENED_PAGES:
                words[OFFSETS["OPENED_0"] // 8 + count] = self.core.address + 8 * at
            words[_OPENED_COUNT] = count + 1
        if paged and words[_KEYS]:
            # To be dropped when the page's key forbids more; not worth a place among those that are noted.
            info |= INFO_KEYED
            words[_KEYED_COUNT] = KEYED_PAGES + 1
        words[at + 3] = info
        if not info & 1:
            self._note_local(self.core.address + 8 * at)

    def _note_local(self, entry: int) -> None:
        """Have the next MOV to CR3 find an entry by its host address; bit 0: one for fetches."""
        words = self.core.words
        count = words[_LOCAL_COUNT]
        if count < LOCAL_ENTRIES:
            words[OFFSETS["LOCAL"] // 8 + count] = entry
        words[_LOCAL_COUNT] = count + 1

    def _info(self, linear: int, found: Translation) -> int:
        """TLB_INFO of an entry; INVLPG must look for all pieces of a large page."""
        info = 1 if found.global_ else 0
        if found.page_size <= 0x1000:
            return info
        if found.page_size <= 0x200000:
            words, at = self.core.words, OFFSETS["LARGE_PIECES"] // 8 + large_place(linear)
            piece = linear & ~0xFFF & (1 << 64) - 1 | 1
            words[at] = piece if words[at] in (0, piece) else (1 << 64) - 1
            return info | 2
        self.core.bytes[OFFSETS["HUGE_PIECES"] + (linear >> 30 & 255)] = 1
        return info | 6

    def fetch(self, linear: int, user: bool) -> tuple[int, bool]:
        """(physical page, global) for executing at `linear`, through the fetch TLB; raises GuestException."""
        words = self._words
        at = _EXEC_TLBS[user] + (linear >> 12) % EXEC_TLB_ENTRIES * 2
        page = linear & ~0xFFF
        if words[at] == page:
            return words[at + 1] & ~0xFFF, bool(words[at + 1] & 1)
        found = self.walk(linear, Access.EXECUTE, user)
        physical = found.physical & ~0xFFF
        words[at] = page
        words[at + 1] = physical | self._info(linear, found)
        if not found.global_:
            self._note_local(self.core.address + 8 * at | 1)
        return physical, found.global_
