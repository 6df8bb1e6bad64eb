"""Segments of 16- and 32-bit code: descriptors that both sides have in their tables, under the same selectors.

Flat ones are Linux's own; the others are put in the local descriptor table,
with modify_ldt(2) on the native side.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trivisor.insight.differential.case import CODE_NEAR, CODE_PAGES, DATA, DATA_END, PAGE
from trivisor.machine.state import Segment
from trivisor.x86 import descriptors
from trivisor.x86.descriptors import build_segment

FLAT_CODE32, FLAT_DATA, FLAT_CODE64 = 0x23, 0x2B, 0x33
"""Linux's selectors for programs (asm/segment.h)."""
_EVERYTHING = 0xFFFFFFFF
_PROGRAM = descriptors.S | descriptors.DPL | descriptors.PRESENT | descriptors.TYPE_ACCESSED
_CODE = _PROGRAM | descriptors.TYPE_CODE
_READABLE_CODE = _CODE | descriptors.TYPE_READABLE
_READ_ONLY_DATA = _PROGRAM
_DATA = _PROGRAM | descriptors.TYPE_WRITABLE
_DOWN = _DATA | descriptors.TYPE_EXPAND_DOWN
_WIDE, _PAGES = descriptors.DB, descriptors.GRANULARITY


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A segment as it is in the table; `limit` in bytes, `attributes` as in `x86.descriptors`."""

    selector: int
    base: int
    limit: int
    attributes: int

    @property
    def segment(self) -> Segment:
        """The segment register that was loaded with it."""
        return Segment(self.selector, self.base, self.limit, self.attributes)

    @property
    def raw(self) -> int:
        """The eight bytes of the table."""
        return build_segment(self.base, self.limit, self.attributes)

    @property
    def stack_mask(self) -> int:
        """The bits of ESP in use when it is SS."""
        return 0xFFFFFFFF if self.attributes & descriptors.DB else 0xFFFF

    @property
    def user_desc(self) -> tuple[int, int, int, int]:
        """struct user_desc of modify_ldt(2): entry, base, limit as in the descriptor, and bits."""
        attributes = self.attributes
        pages = bool(attributes & descriptors.GRANULARITY)
        bits = (
            bool(attributes & descriptors.DB)
            | (attributes >> 2 & 3) << 1
            | (not attributes & 2) << 3
            | pages << 4
            | (not attributes & descriptors.PRESENT) << 5
        )
        return self.selector >> 3, self.base, self.limit >> 12 if pages else self.limit, bits


_NEAR_END = CODE_NEAR + CODE_PAGES * PAGE - 1
_CODE16 = [(CODE_NEAR, 0xFFFF), (CODE_NEAR - 0x7F30, 0xFFFF), (CODE_NEAR - 0xE000, 0xFFFF)]
_CODE32 = [(CODE_NEAR, 0xFFFF), (CODE_NEAR - 0x12345, 0xFFFFF), (0x1000, _EVERYTHING), (0, _NEAR_END | 0xFFF)]
_TOP = DATA_END - 0x10000
_DATA16 = [
    (DATA, 0xFFFF, _DATA), (DATA - 0x100, 0xFFFF, _DATA), (DATA - 0x7FF3, 0xFFFF, _DATA), (_TOP, 0xFFFF, _DATA),
    (DATA, 0x2FFF, _DATA), (DATA - 0x1001, 0x2803, _DATA), (DATA, 0x17FE, _READ_ONLY_DATA),
    (_TOP, 0xC7FF, _DOWN), (DATA - 0x8000, 0x8005, _DOWN), (DATA, 0xFFFF, _READABLE_CODE),
]  # fmt: skip
_DATA32 = [
    (0, _EVERYTHING, _DATA), (0x1000, _EVERYTHING, _DATA), (DATA, 0x2FFF, _DATA), (DATA - 0x123, 0x2124, _DATA),
    (DATA - 0x1000, 0xFFFFF, _DATA), (DATA, 0x1FFFFF, _READ_ONLY_DATA), (DATA - 0x10000, 0x10803, _DOWN),
    (DATA_END, 0xFFFEFFFF, _DOWN), (0xFFFFF000, _EVERYTHING, _DATA),
]  # fmt: skip


def _attributes(kind: int, wide: bool, limit: int) -> int:
    return kind | (_WIDE if wide else 0) | (_PAGES if limit > 0xFFFFF else 0)


def _table() -> list[Descriptor]:
    rows: list[tuple[int, int, int]] = []
    for base, limit in _CODE16:
        rows.append((base, limit, _attributes(_READABLE_CODE, False, limit)))
    for base, limit in _CODE32:
        rows.append((base, limit, _attributes(_READABLE_CODE, True, limit)))
    rows.append((CODE_NEAR, 0xFFFF, _attributes(_CODE, False, 0)))
    rows.append((CODE_NEAR, 0xFFFF, _attributes(_CODE, True, 0)))
    for wide, segments in ((False, _DATA16), (True, _DATA32)):
        for base, limit, kind in segments:
            rows.append((base, limit, _attributes(kind, wide, limit)))
    rows.append((DATA, 0xFFFF, _attributes(_DATA, True, 0) & ~descriptors.PRESENT))
    return [Descriptor(number << 3 | 7, *row) for number, row in enumerate(rows)]


LOCAL = _table()
"""The local descriptor table."""
FLAT = {
    FLAT_CODE32: Descriptor(FLAT_CODE32, 0, _EVERYTHING, _READABLE_CODE | _WIDE | _PAGES),
    FLAT_DATA: Descriptor(FLAT_DATA, 0, _EVERYTHING, _DATA | _WIDE | _PAGES),
    FLAT_CODE64: Descriptor(FLAT_CODE64, 0, _EVERYTHING, _READABLE_CODE | descriptors.LONG | _PAGES),
}
NULL = Descriptor(0, 0, 0, 0)
_BY_SELECTOR = {0: NULL, **FLAT, **{one.selector: one for one in LOCAL}}

Segments = dict[str, Descriptor]
"""What the segment registers hold, by name."""


def by_selector(selector: int) -> Descriptor:
    """The descriptor of one of the selectors in use."""
    return _BY_SELECTOR[selector]


def flat() -> Segments:
    """The segments of an ordinary 32-bit program."""
    data = FLAT[FLAT_DATA]
    return {"es": data, "cs": FLAT[FLAT_CODE32], "ss": data, "ds": data, "fs": NULL, "gs": NULL}


def choose(random: Random, bits: int) -> Segments:
    """Local segments for `bits`-bit code in the near page."""
    code = [one for one in LOCAL if one.attributes & descriptors.TYPE_CODE and _is_code_for(one, bits)]
    data = [one for one in LOCAL if _is_usable(one) and (bits == 32 or one.limit <= 0xFFFFF)]
    narrow = [one for one in data if not one.attributes & descriptors.DB]
    usual = [one for one in data if bool(one.attributes & descriptors.DB) == (bits == 32)]
    stacks = [one for one in (usual if random.random() < 0.8 else data) if one.attributes & TYPE_WRITABLE_DATA == 2]

    def pick() -> Descriptor:
        return random.choice(usual if random.random() < 0.7 else narrow)

    return {
        "es": pick(), "cs": random.choice(code), "ss": random.choice(stacks),
        "ds": pick(), "fs": pick(), "gs": random.choice((pick(), NULL)),
    }  # fmt: skip


TYPE_WRITABLE_DATA = descriptors.TYPE_CODE | descriptors.TYPE_WRITABLE


def _is_code_for(one: Descriptor, bits: int) -> bool:
    reaches = one.base <= CODE_NEAR and one.base + one.limit >= _NEAR_END
    return reaches and bool(one.attributes & descriptors.DB) == (bits == 32)


def _is_usable(one: Descriptor) -> bool:
    """Whether it can be loaded as data and reaches some of the data pages."""
    readable = not one.attributes & descriptors.TYPE_CODE or one.attributes & descriptors.TYPE_READABLE
    return bool(readable and one.attributes & descriptors.PRESENT) and one.base != CODE_NEAR
