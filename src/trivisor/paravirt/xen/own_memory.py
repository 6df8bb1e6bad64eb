"""Xen's own part of the machine's memory: what the guest sees of it, and the page tables that show it.

It lies at the bottom of the machine: the page shared with the domain, the
grant table's frames and those of its status, Xen's page of the GDT, the
machine-to-physical table, and the page tables for Xen's entries of every
level-4 table: the machine-to-physical table, read-only, and the domain's
descriptor tables.
"""

from __future__ import annotations

from trivisor.machine.memory import LOW_RAM_LIMIT, PAGE_SIZE, GuestMemory
from trivisor.paravirt.xen.abi import (
    FIRST_RESERVED_GDT_ENTRY,
    FIRST_XEN_SLOT,
    FLAT_RING3_CS32,
    FLAT_RING3_CS64,
    FLAT_RING3_SS,
    HYPERVISOR_CS,
    HYPERVISOR_DS,
    LAST_XEN_SLOT,
    MACH2PHYS_VIRT_START,
)
from trivisor.paravirt.xen.frames import XEN, Frames
from trivisor.paravirt.xen.grants import status_frames

GRANT_FRAMES = 64
"""Of the grant table, at most: Xen's own default."""
STATUS_FRAMES = status_frames(GRANT_FRAMES)
"""Of the grant table's status, in its version 2."""
NO_FRAME = (1 << 64) - 1
"""What the machine-to-physical table has for frames that are not the domain's memory."""

_TABLE = 0x67  # present, writable, user, accessed, dirty: the rights of Xen's own tables down to the last level
_READ_ONLY_USER = 0x65
_READ_ONLY_SUPERVISOR = 0x61
_DOMAIN_SLOT = FIRST_XEN_SLOT + 4
GDT_ADDRESS = MACH2PHYS_VIRT_START + ((_DOMAIN_SLOT - FIRST_XEN_SLOT) << 39)
"""Linear address of the domain's descriptor table, in a part that only the processor reads."""
_GDT_PAGES = 16
_ASIDE = 256
"""By how many pages the place of the machine-to-physical table that the guest is told is not a multiple of 2 MiB.

What is looked up there is mostly looked up next in the guest's own table of the other way, at about the same distance
from its start, and comes from a page table that is among others at a multiple of 2 MiB.  A direct-mapped TLB could not
have two of them at a time, were all three so.
"""
ENGINE_SLOT = FIRST_XEN_SLOT + 8
"""The level-4 entry in which an engine may have ring-0 code of its own."""

_CODE64, _CODE32, _DATA = 0x00AFFB000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF
_RING0_CODE, _RING0_DATA = 0x00AF9B000000FFFF, 0x00CF93000000FFFF


def own_size(domain_size: int) -> int:
    """Bytes of memory that Xen needs beside a domain of that size: a whole number of pages."""
    span = domain_size + (1 << 30 if domain_size + (64 << 20) > LOW_RAM_LIMIT else 0)
    table = span // PAGE_SIZE * 8
    return (GRANT_FRAMES + STATUS_FRAMES + 16 + 2 * (table // PAGE_SIZE) + table // (PAGE_SIZE * 512)) * PAGE_SIZE


class OwnMemory:
    """Xen's frames, from frame 0 on, laid out in `memory` and entered in `frames`."""

    def __init__(self, memory: GuestMemory, frames: Frames) -> None:
        self._memory = memory
        self._frames = frames
        self._next = 1  # frame 0 stays zeros: as a page-table root it means none, as a page of the GDT an empty one
        self.shared_info = self._take()
        self.grant_frames = [self._take() for _ in range(GRANT_FRAMES)]
        for frame in (self.shared_info, *self.grant_frames):
            frames.share(frame, writable=True)
        self.status_frames = [self._take() for _ in range(STATUS_FRAMES)]
        """Shared only while the grant table is of version 2."""
        gdt = self._gdt = self._take()
        self._map_at = self._take(-(-8 * frames.count // PAGE_SIZE)) * 512
        self.entries = frames.count
        """How many frames the machine-to-physical table tells of."""
        frames.words[self._map_at : self._map_at + self.entries] = memoryview(
            b"\xff" * 8 * self.entries
        ).cast("Q")
        self.slots = [0] * (LAST_XEN_SLOT - FIRST_XEN_SLOT + 1)
        """Xen's entries of a level-4 table."""
        pages = range(self._map_at // 512, self._map_at // 512 + -(-8 * frames.count // PAGE_SIZE))
        shown = [page << 12 | _READ_ONLY_USER for page in pages]
        again = -(-len(pages) // 512) * 512 + _ASIDE
        self.slots[0] = self.slots[1] = self._tables([*shown, *[0] * (again - len(shown)), *shown])
        self.map_address = MACH2PHYS_VIRT_START + (1 << 39) + again * PAGE_SIZE
        """Where a guest is told that the machine-to-physical table is, which is shown there again, whatever the engine.

        Guests that have its usual address built in find it there too, but not where the host's KVM has the first
        512 GiB of the upper half to itself (kvm-pvm).
        """
        for page in pages:
            frames.share(page, writable=False)
        descriptors = {
            FLAT_RING3_CS32: _CODE32, FLAT_RING3_SS: _DATA, FLAT_RING3_CS64: _CODE64,
            HYPERVISOR_CS: _RING0_CODE, HYPERVISOR_DS: _RING0_DATA,
        }  # fmt: skip
        for selector, raw in descriptors.items():
            frames.words[gdt * 512 + (selector >> 3) - FIRST_RESERVED_GDT_ENTRY] = raw
        tables = [_READ_ONLY_SUPERVISOR] * _GDT_PAGES
        tables[FIRST_RESERVED_GDT_ENTRY // 512] = gdt << 12 | _READ_ONLY_SUPERVISOR
        self.slots[_DOMAIN_SLOT - FIRST_XEN_SLOT] = self._tables(tables)
        self._gdt_entries = (self._next - 3) * 512
        self.end = self._next
        """The first frame that is not Xen's."""
        self.spare = range(self.end, own_size(memory.size) // PAGE_SIZE)

    def private(self) -> list[tuple[int, bytes]]:
        """(physical address, content) of what is Xen's alone: the guest's entries of it are as they were at first."""
        after = self._map_at // 512 + -(-8 * self.entries // PAGE_SIZE)
        parts = ((0, 1), (self._gdt, self._gdt + 1), (after, self.end))
        places = [(first * PAGE_SIZE, (end - first) * PAGE_SIZE) for first, end in parts]
        return [(at, self._memory.read(at, length)) for at, length in places]

    def give_slot(self, entry: int) -> None:
        """Have `ENGINE_SLOT` of every level-4 table be `entry`."""
        self.slots[ENGINE_SLOT - FIRST_XEN_SLOT] = entry

    def _take(self, count: int = 1) -> int:
        first = self._next
        self._next += count
        for frame in range(first, self._next):
            self._frames.owner[frame] = XEN
        return first

    def _tables(self, leaves: list[int]) -> int:
        """Page tables of levels 1 to 3 that map `leaves` from the start of a slot; returns the slot's entry.

        Level 1 comes first, then levels 2 and 3.
        """
        words = self._frames.words
        entries = leaves
        for _ in range(3):
            tables = []
            for start in range(0, len(entries), 512):
                table = self._take()
                part = entries[start : start + 512]
                words[table * 512 : table * 512 + len(part)] = memoryview(
                    b"".join(entry.to_bytes(8, "little") for entry in part)
                ).cast("Q")
                tables.append(table << 12 | _TABLE)
            entries = tables
        (entry,) = entries
        return entry

    def set_physical(self, frame: int, physical: int) -> None:
        """Enter in the machine-to-physical table which of the domain's pages `frame` is."""
        self._frames.words[self._map_at + frame] = physical

    def set_physical_run(self, first: int, pages: memoryview) -> None:
        """The same for frames in a row, from `first` on; `pages` are 64-bit words."""
        at = self._map_at + first
        self._frames.words[at : at + len(pages)] = pages

    def physical(self, frame: int) -> int:
        """What the machine-to-physical table says of a frame."""
        return self._frames.words[self._map_at + frame]

    @property
    def gdt_entries(self) -> range:
        """Physical addresses of the page-table entries that show the domain's pages of the GDT."""
        first = 8 * self._gdt_entries
        return range(first, first + 8 * (FIRST_RESERVED_GDT_ENTRY // 512), 8)

    def set_gdt(self, gdt_frames: list[int]) -> None:
        """Show these frames as the domain's pages of the GDT, and where there is none, empty ones."""
        for index in range(FIRST_RESERVED_GDT_ENTRY // 512):
            frame = gdt_frames[index] if index < len(gdt_frames) else 0
            self._frames.words[self._gdt_entries + index] = frame << 12 | _READ_ONLY_SUPERVISOR
