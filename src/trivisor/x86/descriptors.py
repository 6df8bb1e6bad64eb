"""Segment descriptors, system descriptors and gates (Intel SDM 3A 3.4.5, 3.5, 5.8.3, 6.11, 6.14.1, 7.2).

`attributes` of a segment are bits 40-47 and 52-55 of its descriptor, as VT-x
orders them: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15.
Descriptors are integers of 8 bytes (16 for system descriptors and gates of
long mode), little endian as they lie in memory.
"""

from __future__ import annotations

from typing import Final, NamedTuple

TYPE: Final = 0xF
S: Final = 1 << 4
"""Set: code or data segment.  Clear: system segment or gate."""
DPL: Final = 3 << 5
DPL_SHIFT: Final = 5
PRESENT: Final = 1 << 7
AVL: Final = 1 << 12
LONG: Final = 1 << 13
DB: Final = 1 << 14
GRANULARITY: Final = 1 << 15
ATTRIBUTES: Final = 0xF0FF

TYPE_ACCESSED: Final = 1 << 0
TYPE_WRITABLE: Final = 1 << 1
"""Of a data segment."""
TYPE_EXPAND_DOWN: Final = 1 << 2
TYPE_READABLE: Final = 1 << 1
"""Of a code segment."""
TYPE_CONFORMING: Final = 1 << 2
TYPE_CODE: Final = 1 << 3

TSS16: Final = 0x1
LDT: Final = 0x2
TSS16_BUSY: Final = 0x3
CALL_GATE16: Final = 0x4
TASK_GATE: Final = 0x5
INTERRUPT_GATE16: Final = 0x6
TRAP_GATE16: Final = 0x7
TSS: Final = 0x9
"""32-bit TSS; in long mode the 64-bit one.  The same goes for the three gates below."""
TSS_BUSY: Final = 0xB
CALL_GATE: Final = 0xC
INTERRUPT_GATE: Final = 0xE
TRAP_GATE: Final = 0xF
TSS_BUSY_BIT: Final = 1 << 1

SELECTOR_RPL: Final = 3
SELECTOR_TI: Final = 1 << 2
SELECTOR_INDEX: Final = 0xFFF8
"""The index times eight: the descriptor's offset in its table."""


class SegmentDescriptor(NamedTuple):
    """A code, data, TSS or LDT descriptor; `limit` is the last byte's offset, scaled by G."""

    base: int
    limit: int
    attributes: int

    @property
    def type(self) -> int:
        return self.attributes & TYPE

    @property
    def dpl(self) -> int:
        return (self.attributes & DPL) >> DPL_SHIFT

    @property
    def present(self) -> bool:
        return bool(self.attributes & PRESENT)

    @property
    def is_system(self) -> bool:
        return not self.attributes & S

    @property
    def is_code(self) -> bool:
        return self.attributes & (S | TYPE_CODE) == S | TYPE_CODE

    @property
    def is_data(self) -> bool:
        return self.attributes & (S | TYPE_CODE) == S

    @property
    def is_writable(self) -> bool:
        return self.is_data and bool(self.attributes & TYPE_WRITABLE)

    @property
    def is_readable(self) -> bool:
        return self.is_data or (self.is_code and bool(self.attributes & TYPE_READABLE))

    @property
    def is_conforming(self) -> bool:
        return self.is_code and bool(self.attributes & TYPE_CONFORMING)


class Gate(NamedTuple):
    """A call, interrupt, trap or task gate; a task gate's `offset` means nothing."""

    type: int
    selector: int
    offset: int
    dpl: int
    present: bool
    ist: int = 0
    """Interrupt stack table index, long mode only; 0 for none."""
    parameters: int = 0
    """Words that a call gate copies, legacy mode only."""


def parse_segment(raw: int) -> SegmentDescriptor:
    """Take an 8-byte descriptor apart (figure 3-8)."""
    attributes = raw >> 40 & ATTRIBUTES
    limit = raw & 0xFFFF | raw >> 32 & 0xF0000
    if attributes & GRANULARITY:
        limit = limit << 12 | 0xFFF
    return SegmentDescriptor(raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000, limit, attributes)


def parse_system_segment(raw: int) -> SegmentDescriptor:
    """Take a 16-byte TSS or LDT descriptor of long mode apart (figure 7-4)."""
    low = parse_segment(raw & 0xFFFFFFFFFFFFFFFF)
    return SegmentDescriptor(low.base | (raw >> 64 & 0xFFFFFFFF) << 32, low.limit, low.attributes)


def upper_half_is_valid(raw: int) -> bool:
    """Whether bits 8-12 of the last doubleword of a 16-byte descriptor are zero, as the processor wants."""
    return not raw >> 104 & 0x1F


def build_segment(base: int, limit: int, attributes: int) -> int:
    """Make an 8-byte descriptor; ValueError when G cannot express `limit` (bytes)."""
    if attributes & GRANULARITY:
        if limit & 0xFFF != 0xFFF:
            raise ValueError(f"limit {limit:#x} does not end a page")
        limit >>= 12
    if not 0 <= limit <= 0xFFFFF or not 0 <= base <= 0xFFFFFFFF:
        raise ValueError(f"base {base:#x}, limit {limit:#x} do not fit a descriptor")
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | (attributes & ATTRIBUTES) << 40
        | (limit & 0xF0000) << 32
        | (base & 0xFF000000) << 32
    )


def build_system_segment(base: int, limit: int, attributes: int) -> int:
    """Make a 16-byte TSS or LDT descriptor of long mode."""
    return build_segment(base & 0xFFFFFFFF, limit, attributes) | (base >> 32 & 0xFFFFFFFF) << 64


def parse_gate(raw: int) -> Gate:
    """Take an 8-byte gate apart (figures 5-8 and 6-2); a 16-bit gate's offset is cut to 16 bits."""
    kind = raw >> 40 & TYPE
    offset = raw & 0xFFFF | raw >> 32 & 0xFFFF0000
    if kind in (CALL_GATE16, INTERRUPT_GATE16, TRAP_GATE16):
        offset &= 0xFFFF
    return Gate(
        type=kind,
        selector=raw >> 16 & 0xFFFF,
        offset=offset,
        dpl=raw >> 45 & 3,
        present=bool(raw >> 47 & 1),
        parameters=raw >> 32 & 0x1F if kind in (CALL_GATE16, CALL_GATE) else 0,
    )


def parse_gate64(raw: int) -> Gate:
    """Take a 16-byte gate of long mode apart (figures 5-9 and 6-8)."""
    kind = raw >> 40 & TYPE
    return Gate(
        type=kind,
        selector=raw >> 16 & 0xFFFF,
        offset=raw & 0xFFFF | raw >> 32 & 0xFFFF0000 | (raw >> 64 & 0xFFFFFFFF) << 32,
        dpl=raw >> 45 & 3,
        present=bool(raw >> 47 & 1),
        ist=raw >> 32 & 7 if kind in (INTERRUPT_GATE, TRAP_GATE) else 0,
    )


def build_gate(gate: Gate) -> int:
    """Make an 8-byte gate."""
    return (
        gate.offset & 0xFFFF
        | (gate.selector & 0xFFFF) << 16
        | (gate.parameters & 0x1F) << 32
        | (gate.type & TYPE) << 40
        | (gate.dpl & 3) << 45
        | gate.present << 47
        | (gate.offset >> 16 & 0xFFFF) << 48
    )


def build_gate64(gate: Gate) -> int:
    """Make a 16-byte gate of long mode."""
    return build_gate(gate) & ~(0x1F << 32) | (gate.ist & 7) << 32 | (gate.offset >> 32 & 0xFFFFFFFF) << 64
