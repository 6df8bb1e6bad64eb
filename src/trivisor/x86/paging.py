"""Paging: the entries' bits and the exact, slow reference walker (Intel SDM 3A chapter 4).

Engines have fast walkers of their own; this one is what they are tested
against, and what monitors use to look into a guest.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Final, NamedTuple, Protocol

from trivisor.x86 import control, exceptions
from trivisor.x86.exceptions import GuestException

PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
USER: Final = 1 << 2
WRITE_THROUGH: Final = 1 << 3
CACHE_DISABLE: Final = 1 << 4
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
PAGE_SIZE: Final = 1 << 7
"""In an entry above the last level: it maps a large page."""
PAT: Final = 1 << 7
"""In an entry of the last level."""
GLOBAL: Final = 1 << 8
PAT_LARGE: Final = 1 << 12
NO_EXECUTE: Final = 1 << 63


class Memory(Protocol):
    """Physical memory.  Reads where nothing answers must give all ones, and writes there must vanish."""

    def read_u32(self, address: int) -> int: ...

    def read_u64(self, address: int) -> int: ...

    def write_u32(self, address: int, value: int) -> None: ...

    def write_u64(self, address: int, value: int) -> None: ...


class Mode(Enum):
    """Table 4-1."""

    NONE = "no paging"
    BITS32 = "32-bit"
    PAE = "PAE"
    LEVEL4 = "4-level"


class Access(StrEnum):  # whose hash is no Python function
    READ = "read"
    WRITE = "write"
    EXECUTE = "execute"


class ProtectionKeys(NamedTuple):
    """The rights by protection key (section 4.6.2): two bits a key, of which the lower forbids all data accesses.

    None where CR4.PKE (user pages) or CR4.PKS (the supervisor's) does not have them count.
    """

    user: int | None = None
    """PKRU."""
    supervisor: int | None = None
    """IA32_PKRS."""

    def forbids(self, entry: int, may_user: bool) -> tuple[bool, bool]:
        """Whether data on the page that a leaf entry maps must not be accessed, and not be written."""
        rights = self.user if may_user else self.supervisor
        if rights is None:
            return False, False
        bits = rights >> 2 * (entry >> 59 & 15)
        return bool(bits & 1), bool(bits & 2)


NO_KEYS: Final = ProtectionKeys()


class PagingMode(NamedTuple):
    """All that address translation depends on besides the tables and the access."""

    mode: Mode
    cr3: int = 0
    physical_bits: int = 40
    """MAXPHYADDR: physical address bits from here up are reserved in entries."""
    wp: bool = False
    pse: bool = False
    pge: bool = False
    smep: bool = False
    smap: bool = False
    nxe: bool = False
    gigabyte_pages: bool = True
    pdptes: tuple[int, int, int, int] | None = None
    """PAE: the four entries as the last MOV to CR3 read them; None has them read from memory."""

    @classmethod
    def from_registers(
        cls, cr0: int, cr3: int, cr4: int, efer: int, *, physical_bits: int = 40, gigabyte_pages: bool = True
    ) -> PagingMode:
        """The mode that these registers select."""
        if not cr0 & control.CR0_PG:
            mode = Mode.NONE
        elif not cr4 & control.CR4_PAE:
            mode = Mode.BITS32
        else:
            mode = Mode.LEVEL4 if efer & control.EFER_LME else Mode.PAE
        return cls(
            mode=mode,
            cr3=cr3,
            physical_bits=physical_bits,
            wp=bool(cr0 & control.CR0_WP),
            pse=bool(cr4 & control.CR4_PSE),
            pge=bool(cr4 & control.CR4_PGE),
            smep=bool(cr4 & control.CR4_SMEP),
            smap=bool(cr4 & control.CR4_SMAP),
            nxe=bool(efer & control.EFER_NXE),
            gigabyte_pages=gigabyte_pages,
        )


class Translation(NamedTuple):
    """Where a linear address leads, and what the entries on the way allow.

    `writable`, `user` and `executable` combine all levels, before CR0.WP, SMEP
    and SMAP have their say.
    """

    physical: int
    page_size: int
    writable: bool
    user: bool
    executable: bool
    global_: bool
    dirty: bool
    pat_index: int
    """Which of the eight entries of IA32_PAT gives the memory type."""
    key_forbids_writing: bool = False
    """By its protection key; the supervisor minds it under CR0.WP only."""


class _Level(NamedTuple):
    """One step of a walk."""

    shift: int
    """The lowest linear address bit that indexes the table."""
    index_bits: int
    has_rights: bool = True
    """The R/W, U/S and A bits exist (not so in a PDPTE of PAE paging)."""


_LEVELS: Final = {
    Mode.BITS32: (_Level(22, 10), _Level(12, 10)),
    Mode.PAE: (_Level(30, 2, has_rights=False), _Level(21, 9), _Level(12, 9)),
    Mode.LEVEL4: (_Level(39, 9), _Level(30, 9), _Level(21, 9), _Level(12, 9)),
}


def is_canonical(address: int, bits: int = 48) -> bool:
    """Whether bits 63 down to `bits` - 1 of a 64-bit address are all alike."""
    top = address >> (bits - 1)
    return top == 0 or top == (1 << (65 - bits)) - 1


def pdptes_are_valid(pdptes: tuple[int, int, int, int], physical_bits: int) -> bool:
    """Whether MOV to CR3 takes these entries under PAE paging; it raises #GP if not (section 4.4.1)."""
    reserved = 0x1E6 | _bits(physical_bits, 64)
    return not any(entry & PRESENT and entry & reserved for entry in pdptes)


def read_pdptes(memory: Memory, cr3: int) -> tuple[int, int, int, int]:
    """The four PDPTEs that CR3 points at."""
    base = cr3 & 0xFFFFFFE0
    read = memory.read_u64
    return (read(base), read(base + 8), read(base + 16), read(base + 24))


def walk(
    memory: Memory,
    paging: PagingMode,
    linear: int,
    access: Access,
    *,
    user: bool,
    ac: bool = False,
    implicit: bool = False,
    set_bits: bool = True,
    keys: ProtectionKeys = NO_KEYS,
) -> Translation:
    """Translate `linear` for one access, or raise GuestException(#PF, error code, linear).

    `user` means an access made at CPL 3; `implicit` one that the processor
    makes on its own (descriptor tables, the TSS), which is never a user access and
    that RFLAGS.AC (`ac`) does not exempt from SMAP.  With `set_bits` the accessed and
    dirty bits are written to memory, once the access is known to be allowed.
    Whether `linear` is canonical is the caller's business.
    """
    if paging.mode is Mode.NONE:
        return Translation(linear & 0xFFFFFFFF, 4096, True, True, True, False, True, 0)
    user = user and not implicit
    levels = _LEVELS[paging.mode]
    last = len(levels) - 1
    entry_size = 4 if paging.mode is Mode.BITS32 else 8
    table = _root(paging)
    writable = may_user = executable = True
    steps: list[tuple[int, int]] = []
    for depth, level in enumerate(levels):
        index = linear >> level.shift & ((1 << level.index_bits) - 1)
        address = table + index * entry_size
        entry = _read_entry(memory, paging, depth, index, address)
        if not entry & PRESENT:
            raise _fault(paging, linear, access, user, 0)
        leaf = depth == last or _maps_page(paging, level, entry)
        if entry & _reserved_bits(paging, level, depth, leaf):
            raise _fault(paging, linear, access, user, exceptions.PF_PRESENT | exceptions.PF_RESERVED)
        if level.has_rights:
            writable &= bool(entry & WRITABLE)
            may_user &= bool(entry & USER)
            executable &= not (paging.nxe and entry & NO_EXECUTE)
            steps.append((address, entry))
        if leaf:
            break
        table = entry & _bits(12, paging.physical_bits)
    key_forbids, key_forbids_writing = keys.forbids(entry, may_user)
    if access is not Access.EXECUTE and (
        key_forbids or (key_forbids_writing and access is Access.WRITE and (user or paging.wp))
    ):
        raise _fault(paging, linear, access, user, exceptions.PF_PRESENT | exceptions.PF_KEY)
    if not _allowed(paging, access, user, ac and not implicit, writable, may_user, executable):
        raise _fault(paging, linear, access, user, exceptions.PF_PRESENT)
    if set_bits:
        _set_accessed(memory, entry_size, steps, access)
    size = 1 << level.shift
    return Translation(
        physical=_frame(paging, level, entry) | linear & (size - 1),
        page_size=size,
        writable=writable,
        user=may_user,
        executable=executable,
        global_=paging.pge and bool(entry & GLOBAL),
        dirty=bool(entry & DIRTY) or (set_bits and access is Access.WRITE),
        pat_index=_pat_index(entry, large=level.shift > 12),
        key_forbids_writing=key_forbids_writing,
    )


def _bits(low: int, high: int) -> int:
    """A mask of bits `low` to `high` - 1."""
    return (1 << high) - (1 << low) if high > low else 0


def _root(paging: PagingMode) -> int:
    if paging.mode is Mode.BITS32:
        return paging.cr3 & 0xFFFFF000
    if paging.mode is Mode.PAE:
        return paging.cr3 & 0xFFFFFFE0
    return paging.cr3 & _bits(12, paging.physical_bits)


def _read_entry(memory: Memory, paging: PagingMode, depth: int, index: int, address: int) -> int:
    if paging.mode is Mode.BITS32:
        return memory.read_u32(address)
    if paging.mode is Mode.PAE and depth == 0 and paging.pdptes is not None:
        return paging.pdptes[index]
    return memory.read_u64(address)


def _maps_page(paging: PagingMode, level: _Level, entry: int) -> bool:
    """Whether an entry above the last level has a PS bit, and it is set."""
    if not entry & PAGE_SIZE:
        return False
    if paging.mode is Mode.BITS32:
        return paging.pse
    return level.shift == 21 or (level.shift == 30 and paging.mode is Mode.LEVEL4 and paging.gigabyte_pages)


def _reserved_bits(paging: PagingMode, level: _Level, depth: int, leaf: bool) -> int:
    """The bits of a present entry that must be zero (tables 4-4 to 4-20)."""
    width = paging.physical_bits
    if paging.mode is Mode.BITS32:
        # PSE-36: bits 13-20 of a 4 MiB page's entry are address bits 32-39.
        return _bits(min(width, 40) - 19, 22) if leaf and level.shift == 22 else 0
    if not level.has_rights:
        return 0x1E6 | _bits(width, 64)
    reserved = _bits(width, 63) if paging.mode is Mode.PAE else _bits(width, 52)
    if not paging.nxe:
        reserved |= NO_EXECUTE
    if leaf:
        return reserved | _bits(13, level.shift)
    if depth == 0 or (level.shift == 30 and not paging.gigabyte_pages):
        reserved |= PAGE_SIZE
    return reserved


def _allowed(
    paging: PagingMode, access: Access, user: bool, ac: bool, writable: bool, may_user: bool, executable: bool
) -> bool:
    """Section 4.6.1, given the combined rights of all levels."""
    if user and not may_user:
        return False
    if access is Access.EXECUTE:
        return executable and (user or not (may_user and paging.smep))
    if not user and may_user and paging.smap and not ac:
        return False
    return access is Access.READ or writable or not (user or paging.wp)


def _fault(paging: PagingMode, linear: int, access: Access, user: bool, code: int) -> GuestException:
    """A page fault with the bits of `code` and those that tell of the access (figure 4-12)."""
    if access is Access.WRITE:
        code |= exceptions.PF_WRITE
    if user:
        code |= exceptions.PF_USER
    if access is Access.EXECUTE and (paging.smep or (paging.nxe and paging.mode is not Mode.BITS32)):
        code |= exceptions.PF_FETCH
    return GuestException(exceptions.PAGE_FAULT, code, linear)


def _set_accessed(memory: Memory, entry_size: int, steps: list[tuple[int, int]], access: Access) -> None:
    """Set A in every entry used and, for a write, D in the last."""
    for position, (address, entry) in enumerate(steps):
        leaf = position == len(steps) - 1
        updated = entry | ACCESSED | (DIRTY if leaf and access is Access.WRITE else 0)
        if updated == entry:
            continue
        if entry_size == 4:
            memory.write_u32(address, updated)
        else:
            memory.write_u64(address, updated)


def _frame(paging: PagingMode, level: _Level, entry: int) -> int:
    """The physical address that a leaf entry maps."""
    if paging.mode is not Mode.BITS32:
        return entry & _bits(level.shift, paging.physical_bits)
    if level.shift == 12:
        return entry & 0xFFFFF000
    return entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32


def _pat_index(entry: int, *, large: bool) -> int:
    """PAT, PCD, PWT of a leaf entry as a number (section 4.9.2)."""
    pat = entry & (PAT_LARGE if large else PAT)
    return (4 if pat else 0) | (entry & (WRITE_THROUGH | CACHE_DISABLE)) >> 3
