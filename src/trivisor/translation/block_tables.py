"""The tables of blocks, links and templates: memory that Python and the native helpers share.

A **block** is translated code that can be entered now.  A **template** is what
translated code was made as, with all that is needed to make it again at another
place: every block has one, and templates of blocks that were forgotten, or of an
earlier run (`kept.py`), wait for the same guest bytes to turn up again.  A
**link** is a direct jump of a block that can lead straight to another block.

Records are numbered from 1; 0 is none.  A template's image lies in the code
cache or in the archive of an earlier run:

    code, padded to 4 bytes | relocations | link descriptions | locations | mask | guest bytes

The mask is there only if some of the guest's bytes may be others: constants that the code takes over as they are.
Its bytes are 0 there and 0xFF elsewhere, and those guest bytes are 0.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from struct import Struct, pack_into, unpack_from
from typing import Protocol

from trivisor.machine.memory import host_map, host_unmap
from trivisor.translation.core import Core
from trivisor.translation.layout import OFFSETS
from trivisor.translation.modes import SEGMENTED_KEYS, USER_64

MAXIMUM_BLOCKS = 1 << 18
MAXIMUM_LINKS = 1 << 19
MAXIMUM_TEMPLATES = 1 << 18
TEMPLATE_HEADS = 1 << 16

BLOCK_SIZE = 64
LINK_SIZE = 40
TEMPLATE_SIZE = 64

# Fields of a block.
BLOCK = {
    "B_RIP": 0,  # linear address of the first instruction
    "B_KEY": 8,  # physical page | mode key
    "B_SECOND": 16,  # of an instruction that runs into the next page: that one's physical address | 1; else 0
    "B_START": 24,  # offset in the code cache of the checked entry
    "B_CODE": 28,  # bytes of host code
    "B_TEMPLATE": 32,
    "B_NEXT": 36,  # the next block of the same page
    "B_IN": 40,  # the first link that leads here
    "B_OUT": 44,  # the first of its own links
    "B_LENGTH": 48,  # guest bytes in the page
    "B_LINKS": 50,  # how many links it has
    "B_PARKED": 51,  # the other entries, as distances from the checked one
    "B_POLLED": 52,
    "B_BODY": 53,
    "B_FLAGS": 54,
    "B_MASTER": 56,  # of an alias: the block that it stands for in the second page
}
DEAD, ALIAS, STEP = 1, 2, 4
"""Flags of a block: forgotten; stands in the list of its second page; one instruction on its own."""

LINK = {
    "L_TARGET": 0,  # linear address, in the page of the block that jumps
    "L_SITE": 8,  # offset in the code cache of the jump's 32-bit displacement
    "L_STUB": 12,  # ... of the code that asks for the link
    "L_SOURCE": 16,  # the block that jumps
    "L_TO": 20,  # the block that it leads to, 0 while it leads to the stub
    "L_NEXT": 24,  # neighbours among the links that lead to the same block
    "L_PREVIOUS": 28,
    "L_ENTRY": 32,  # which of the target's entries: offset of the field in its record, and LINK_TO_PLAIN
}
_LINK = "<QIIIIIII"
LINK_TO_PLAIN = 0x100
"""The link leads from a tuned block, a check of which has failed, to a plain one: `PLAIN` is part of its key."""
PLAIN = 8
"""Added to a flat mode in the key of a block that stands in for a tuned one when its checks fail (`tuned.py`).

Nothing but links `LINK_TO_PLAIN` leads to it.
"""

TEMPLATE = {
    "T_PREFIX": 0,  # the first eight guest bytes, zeros beyond the end; T_MASK has the bits that count
    "T_RIP": 8,
    "T_NEXT": 16,  # the next template with the same hash
    "T_IMAGE": 20,  # offset in the code cache, or in the archive with bit 31
    "T_CODE": 24,
    "T_BASE": 28,  # offset in the code cache where it was made
    "T_MODE": 32,
    "T_LENGTH": 34,  # guest bytes
    "T_RELOCATIONS": 36,
    "T_LOCATIONS": 38,
    "T_LINKS": 40,
    "T_PARKED": 41,
    "T_POLLED": 42,
    "T_BODY": 43,
    "T_USES": 44,  # blocks made of it in this run
    "T_SIZE": 48,  # of the image
    "T_LASTING": 52,  # 1 when look-ups find it
    "T_MASKED": 53,  # 1 when the image has a mask
    "T_BUCKET": 54,  # the list that it is in then
    "T_MASK": 56,
}
TEMPLATE_FORMAT = "<QQIIIIHHHHBBBBIIBBHQ"
ARCHIVED = 1 << 31

RELOCATIONS = {
    "ADDRESS_64": 0,  # a guest address
    "ADDRESS_32": 1,  # ... in 32 bits, to be sign-extended
    "TO_HELPER": 2,  # a relative jump to a helper
    "JUMP_SLOT": 3,  # the displacement of the jump cache's entry of a guest address
    "CONSTANT_32": 4,  # bytes of the guest's code, which may be any; a second word has their offset there
    "CONSTANT_64": 5,
}
"""What depends on where the block stands, in the guest and on the host; a relocation is offset | kind << 24."""

LINK_DESCRIPTION = Struct("<IIIiI")
"""Offsets in the code of the jump's displacement, of its stub and of the link's number; target - rip; `L_ENTRY`."""

TABLE_SYMBOLS: dict[str, int] = {
    **BLOCK,
    **LINK,
    **TEMPLATE,
    "DEAD": DEAD,
    "ALIAS": ALIAS,
    "LINK_TO_PLAIN": LINK_TO_PLAIN,
    "PLAIN": PLAIN,
    "SEGMENTED_KEYS": SEGMENTED_KEYS,
    "USER_64": USER_64,
    "BLOCK_SIZE": BLOCK_SIZE,
    "LINK_SIZE": LINK_SIZE,
    "TEMPLATE_SIZE": TEMPLATE_SIZE,
    "LINK_DESCRIPTION_SIZE": LINK_DESCRIPTION.size,
    "MAXIMUM_BLOCKS": MAXIMUM_BLOCKS,
    "MAXIMUM_LINKS": MAXIMUM_LINKS,
    "RELOCATE_ADDRESS_64": RELOCATIONS["ADDRESS_64"],
    "RELOCATE_ADDRESS_32": RELOCATIONS["ADDRESS_32"],
    "RELOCATE_TO_HELPER": RELOCATIONS["TO_HELPER"],
    "RELOCATE_JUMP_SLOT": RELOCATIONS["JUMP_SLOT"],
    "RELOCATE_CONSTANT_32": RELOCATIONS["CONSTANT_32"],
    "RELOCATE_CONSTANT_64": RELOCATIONS["CONSTANT_64"],
    "MAXIMUM_TEMPLATES": MAXIMUM_TEMPLATES,
}

_BLOCK_COUNT, _LINK_COUNT, _TEMPLATE_COUNT = (
    OFFSETS[name] // 8 for name in ("BLOCK_COUNT", "LINK_COUNT", "TEMPLATE_COUNT")
)


TEMPLATE_HASH = 0x9E3779B97F4A7C15
COMMON_START = 0x441F0F
"""The first three bytes of the NOP that functions of Linux begin with, where they can be traced."""


def template_bucket(rip: int, mode: int, code: bytes) -> int:
    """Where templates of code at `rip` in mode `mode` that begins so are found.

    Three bytes count, those after a NOP of five bytes if it begins with one, or one byte where the page ends soon.
    They need not all be the block's, and of a constant that a loader has relocated they are not what differs.
    """
    first = code[0]
    if rip & 0xFFF <= 0x1000 - 8:
        first = int.from_bytes(code[:3], "little")
        if first == COMMON_START:
            first = int.from_bytes(code[5:8], "little")
    return ((first << 24 | mode << 12 | rip & 0xFFF) * TEMPLATE_HASH & (1 << 64) - 1) >> 48


def _word(name: str) -> property:
    at = BLOCK[name] // 4
    return property(lambda block: block.tables.block_words[block.number * (BLOCK_SIZE // 4) + at])


def _quad(name: str) -> property:
    at = BLOCK[name] // 8
    return property(lambda block: block.tables.block_quads[block.number * (BLOCK_SIZE // 8) + at])


def _byte(name: str) -> property:
    at = BLOCK[name]
    return property(lambda block: block.tables.blocks[block.number * BLOCK_SIZE + at])


class Block:
    """A block's record, by its number: see `BLOCK` for the fields."""

    __slots__ = ("number", "tables")

    def __init__(self, tables: BlockTables, number: int) -> None:
        self.tables = tables
        self.number = number

    rip = _quad("B_RIP")
    key = _quad("B_KEY")
    second = _quad("B_SECOND")
    start = _word("B_START")
    size = _word("B_CODE")
    template = _word("B_TEMPLATE")
    next = _word("B_NEXT")
    flags = _byte("B_FLAGS")
    master = _word("B_MASTER")
    _polled = _byte("B_POLLED")
    _body = _byte("B_BODY")

    @property
    def polled(self) -> int:
        """Offset in the code cache of the entry that looks for interrupts."""
        entry: int = self.start + self._polled
        return entry

    @property
    def body(self) -> int:
        """... of the first instruction."""
        entry: int = self.start + self._body
        return entry

    @property
    def dead(self) -> bool:
        """Whether it was forgotten."""
        return bool(self.flags & DEAD)


class Archived(Protocol):
    """Templates of an earlier run: see kept.py."""

    count: int
    records: memoryview
    heads: memoryview
    address: int


class BlockTables:
    """The memory of the tables; numbers of blocks, links and templates in use are in the state block."""

    def __init__(self, core: Core, pages: int) -> None:
        """`pages`: of guest physical memory."""
        self._words = core.words
        self._archive: Archived | None = None
        sizes = {
            "BLOCKS": MAXIMUM_BLOCKS * BLOCK_SIZE,
            "LINKS": MAXIMUM_LINKS * LINK_SIZE,
            "TEMPLATES": MAXIMUM_TEMPLATES * TEMPLATE_SIZE,
            "TEMPLATE_HEADS": TEMPLATE_HEADS * 4,
            "PAGE_BLOCKS": (pages * 4 + 4095) & ~4095,
        }
        self._length = sum(sizes.values())
        self._at = host_map(self._length, mmap.PROT_READ | mmap.PROT_WRITE)
        self.bytes = memoryview((ctypes.c_ubyte * self._length).from_address(self._at)).cast("B")
        views = {}
        start = 0
        for name, size in sizes.items():
            self._words[OFFSETS[name] // 8] = self._at + start
            views[name] = self.bytes[start : start + size]
            start += size
        self.blocks = views["BLOCKS"]
        self.links = views["LINKS"]
        self.templates = views["TEMPLATES"]
        self.heads = views["TEMPLATE_HEADS"].cast("I")
        """Of the lists of templates with the same hash."""
        self.page_blocks = views["PAGE_BLOCKS"].cast("I")
        """The first block of each physical page, 0 for none."""
        self.block_words = self.blocks.cast("I")
        self.block_quads = self.blocks.cast("Q")
        self.template_words = self.templates.cast("I")
        self.clear()

    def clear(self) -> None:
        """Forget all blocks and links, whose pages' lists the caller empties, and all templates of this run."""
        self._words[_BLOCK_COUNT] = self._words[_LINK_COUNT] = 1
        heads = self.heads.cast("B")
        archive = self._archive
        if archive is None:
            self._words[_TEMPLATE_COUNT] = 1
            heads[:] = bytes(TEMPLATE_HEADS * 4)
        else:
            self._words[_TEMPLATE_COUNT] = archive.count
            self.templates[: len(archive.records)] = archive.records
            heads[:] = archive.heads

    def adopt(self, archive: Archived) -> None:
        """Begin with the templates of an earlier run; they outlast `clear`, `archive` the tables."""
        self._archive = archive
        self._words[OFFSETS["ARCHIVE"] // 8] = archive.address
        self.clear()

    @property
    def block_count(self) -> int:
        """One more than the number of the newest block."""
        return self._words[_BLOCK_COUNT]

    @property
    def link_count(self) -> int:
        return self._words[_LINK_COUNT]

    @property
    def template_count(self) -> int:
        return self._words[_TEMPLATE_COUNT]

    @template_count.setter
    def template_count(self, count: int) -> None:
        self._words[_TEMPLATE_COUNT] = count

    def link_entry(self, number: int) -> int:
        """`L_ENTRY` of a link."""
        entry: int = unpack_from("<I", self.links, number * LINK_SIZE + LINK["L_ENTRY"])[0]
        return entry

    def linked(self, block: Block) -> Iterator[tuple[int, int]]:
        """(linear address, number) of the blocks that the block's jumps lead to."""
        first = unpack_from("<I", self.blocks, block.number * BLOCK_SIZE + BLOCK["B_OUT"])[0]
        for number in range(first, first + self.blocks[block.number * BLOCK_SIZE + BLOCK["B_LINKS"]]):
            target, _, _, _, to, _, _, entry = unpack_from(_LINK, self.links, number * LINK_SIZE)
            if to and not entry & LINK_TO_PLAIN:
                yield target, to

    def list_template(self, number: int, bucket: int) -> None:
        """Have look-ups find a template."""
        at = number * TEMPLATE_SIZE
        self.template_words[(at + TEMPLATE["T_NEXT"]) // 4] = self.heads[bucket]
        self.templates[at + TEMPLATE["T_LASTING"]] = 1
        pack_into("<H", self.templates, at + TEMPLATE["T_BUCKET"], bucket)
        self.heads[bucket] = number

    def template_length(self, number: int) -> int:
        """Guest bytes of a template."""
        (length,) = unpack_from("<H", self.templates, number * TEMPLATE_SIZE + TEMPLATE["T_LENGTH"])
        return int(length)

    def template_image(self, number: int) -> int:
        """`T_IMAGE` of a template."""
        return self.template_words[(number * TEMPLATE_SIZE + TEMPLATE["T_IMAGE"]) // 4]

    def template_sizes(self, number: int) -> tuple[int, int, int]:
        """(bytes of the image, those of them for guest bytes and mask, locations) of a template."""
        at = number * TEMPLATE_SIZE
        record = self.templates[at : at + TEMPLATE_SIZE]
        (size,) = unpack_from("<I", record, TEMPLATE["T_SIZE"])
        (length,) = unpack_from("<H", record, TEMPLATE["T_LENGTH"])
        (locations,) = unpack_from("<H", record, TEMPLATE["T_LOCATIONS"])
        return size, length << record[TEMPLATE["T_MASKED"]], locations

    def add_step(self, rip: int, key: int, template: int, start: int, size: int) -> Block:
        """A block of one instruction, which no look-up finds."""
        number = self.block_count
        record = bytearray(BLOCK_SIZE)
        pack_into("<QQQIII", record, 0, rip, key, 0, start, size, template)
        record[BLOCK["B_FLAGS"]] = STEP
        self.blocks[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE] = record
        self._words[_BLOCK_COUNT] = number + 1
        return Block(self, number)

    def close(self) -> None:
        """Give the memory back to the host."""
        if self._at:
            views = (self.template_words, self.block_words, self.block_quads, self.blocks, self.links, self.templates)
            for view in (*views, self.heads, self.page_blocks, self.bytes):
                view.release()
            host_unmap(self._at, self._length)
            self._at = 0
