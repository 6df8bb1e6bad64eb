"""What the translator must know of the processor's mode, and the ways in which a block can end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

FLAT_LIMIT = 0xFFFFFFFF

USER_64 = 6
"""The three lowest bits of the keys of 64-bit modes of ring 3."""
SEGMENTED_KEYS = 0x800
"""Keys from here on have a number that the engine hands out to a `Segmentation`, and mean nothing elsewhere."""
MAXIMUM_SEGMENTED = 0xFF
"""How many numbers there are (the highest key marks an empty place in the block table)."""


class Segmentation(NamedTuple):
    """What 16- and 32-bit code must know of segments that are not flat.

    A flat segment has base 0 and all of 4 GiB, and data in it may be written.
    The rest are checked at every access, against what the state block has of
    them: their bases, limits and types are no part of the mode, but for CS.
    """

    code_base: int = 0
    code_limit: int = FLAT_LIMIT
    checked: frozenset[str] = frozenset()
    """Which of ES, SS and DS are not flat; CS as data, FS and GS always count as not flat."""
    real: bool = False
    """Real or virtual-8086 mode: a selector is the segment's base over 16."""


OTHER_TSD, OTHER_DEBUG = 1, 2
"""Bits of `Mode.other`: RDTSC is privileged; there are instruction breakpoints."""


@dataclass(frozen=True, slots=True)
class Mode:
    """What the translator must know of the processor's mode; its `key` is part of every block's key."""

    bits: int = 64
    user: bool = False
    segmentation: Segmentation | None = None
    """None when ES, CS, SS and DS are flat, as they always are in 64-bit mode."""
    guarded: bool = False
    """CR0.TS, EM or no CR4.OSFXSR: x87, MMX and SSE instructions look whether they may (`guards.py`)."""
    no_avx: bool = False
    """The same for AVX and XSAVE instructions: CR0.TS, no CR4.OSXSAVE, or XCR0 without AVX."""
    stack_bits: int = 64
    other: int = 0
    """A number that sets apart modes that differ in what else matters."""
    aligned: bool = False
    """CPL 3 with CR0.AM and RFLAGS.AC: accesses that are not aligned raise #AC."""
    guest_kernel: bool = False
    """CPL 3, but a paravirtual guest's kernel: it has the TLB and the jump cache that are a kernel's elsewhere."""
    number: int = field(default=0, compare=False)
    """Of a mode with a segmentation, or `aligned`: what sets it apart from the others of its engine."""

    key: int = field(init=False, compare=False)
    """The mode in twelve bits: part of every block's key."""

    def __post_init__(self) -> None:
        # The native helpers look at the three lowest bits; the fourth of a flat mode is `block_tables.PLAIN`.
        key = {16: 0, 32: 1, 64: 2}[self.bits] | (4 if self.user_view else 0)
        if self.segmentation is None and not self.aligned:
            key |= (16 if self.guarded else 0) | {16: 0, 32: 32, 64: 64}[self.stack_bits] | self.other << 7
            key |= (512 if self.no_avx else 0) | (1024 if self.guest_kernel else 0)
        else:
            key |= SEGMENTED_KEYS | self.number << 3
        object.__setattr__(self, "key", key)

    @property
    def code_base(self) -> int:
        """Linear address of the code segment's offset 0."""
        return 0 if self.segmentation is None else self.segmentation.code_base

    @property
    def code_limit(self) -> int:
        """The last offset in the code segment; means nothing in 64-bit mode."""
        return FLAT_LIMIT if self.segmentation is None else self.segmentation.code_limit

    @property
    def real(self) -> bool:
        """Real or virtual-8086 mode."""
        return self.segmentation is not None and self.segmentation.real

    def checks(self, segment: str) -> bool:
        """Whether accesses by a segment register are held against its base, limit and type."""
        if self.bits == 64:
            return False
        if segment in ("CS", "FS", "GS"):
            return True
        return self.segmentation is not None and segment in self.segmentation.checked

    @property
    def linear_mask(self) -> int:
        """All ones of a linear address."""
        return (1 << 64) - 1 if self.bits == 64 else 0xFFFFFFFF

    @property
    def debug(self) -> bool:
        """Blocks end before the instruction breakpoints."""
        return bool(self.other & OTHER_DEBUG)

    @property
    def user_view(self) -> bool:
        """Whether it goes through the user's TLBs."""
        return self.user and not self.guest_kernel

    @property
    def jump_cache(self) -> int:
        """Which of the jump caches it uses: 0 kernel, 1 user, 2 other."""
        return (1 if self.user_view else 0) if self.bits == 64 else 2

    @property
    def jump_cache_name(self) -> str:
        return ("KERNEL", "USER", "OTHER")[self.jump_cache]


class Jump(NamedTuple):
    """Ends a block: go on at next + the instruction's `Constants.relative`."""

    narrow: bool = False
    """The target's offset in the code segment is cut to 16 bits."""


class Branch(NamedTuple):
    """Ends a block: at next + `Constants.relative` when the condition holds, else at next.

    `condition` is the low four bits of the jcc; with a `prelude`, its last
    instruction is a short jump whose displacement byte comes last and leads to
    the taken way.
    """

    condition: int
    prelude: bytes = b""
    narrow: bool = False
    """The target's offset in the code segment is cut to 16 bits."""
    undo: bytes = b""
    """Takes back what the prelude has done, for a target beyond the segment's limit."""


class Indirect(NamedTuple):
    """Ends a block: go on at the address in r10."""


class CallOut(NamedTuple):
    """Ends a block: Python does this instruction."""


class Native(NamedTuple):
    """Ends a block: the helper whose address is in the state block's field `name` does this instruction."""

    name: str


class Raise(NamedTuple):
    """Ends a block: the instruction raises exception `vector`."""

    vector: int
    error: int = -1
    """Error code; -1 for none."""


class Breakpoint(NamedTuple):
    """Ends a block, being all of it: there is an instruction breakpoint here."""


class Missing(NamedTuple):
    """Ends a block and the run: the instruction is not supported."""


class Repeat(NamedTuple):
    """Ends a single-step block of a repeated string instruction: itself again unless the count is 0."""

    bits: int = 64
    """The count is RCX, ECX or CX."""


class RepeatCompare(NamedTuple):
    """The same for SCAS and CMPS, which also end when ZF is `until_equal`."""

    until_equal: bool
    bits: int = 64
