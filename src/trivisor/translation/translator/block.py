"""What the translator makes: blocks, and the links between them."""

from __future__ import annotations

from bisect import bisect_right


class Link:
    """A direct jump in a block's code that can lead straight to another block.

    `site` is the offset in the code cache of the jump's 32-bit displacement and
    `stub` the offset of the code that asks for the link; `backward` jumps go to
    the target's poll, and those with the flags parked to its entry for that.
    """

    __slots__ = ("backward", "key", "parked", "site", "stub", "target")

    def __init__(self, site: int, target: int, backward: bool, parked: bool, key: int) -> None:
        self.site = site
        self.stub = 0
        self.target = target
        """Linear address, in the page of the block that jumps."""
        self.backward = backward
        self.parked = parked
        self.key = key
        """The target's key, being the jumping block's own."""


class Block:
    """Translated code of one run of guest instructions within a page (or of one that crosses pages)."""

    __slots__ = ("body", "checked", "dead", "end", "key", "length", "links", "map", "parked", "polled", "rip", "second")

    def __init__(self, rip: int, key: int, length: int) -> None:
        self.rip = rip
        """Linear address of the first instruction."""
        self.key = key
        """Physical page address | mode key."""
        self.length = length
        """Bytes of guest code."""
        self.checked = 0
        """Offset in the code cache of the entry that checks r10 against `rip`."""
        self.parked = 0
        """... of the same without the check: flags are parked, and looked for interrupts."""
        self.polled = 0
        """... of the entry that looks for interrupts."""
        self.body = 0
        """... of the first instruction."""
        self.end = 0
        self.links: list[Link] = []
        """Jumps of other blocks that lead here."""
        self.map = b""
        self.dead = False
        self.second = -1
        """Physical address of the next page, for an instruction that runs into it."""

    @property
    def physical(self) -> int:
        """Physical address of the first instruction."""
        return (self.key & ~0xFFF) | (self.rip & 0xFFF)

    @property
    def crosses(self) -> bool:
        """Whether it is an instruction that runs into the next page."""
        return (self.rip & 0xFFF) + self.length > 0x1000

    def locate(self, offset: int) -> tuple[int, bool]:
        """(guest rip, flags parked) of the instruction whose code holds code cache `offset`."""
        table = memoryview(self.map).cast("I")
        starts = [word & 0x1FFFFF for word in table]
        index = bisect_right(starts, offset - self.body) - 1
        if index < 0:
            return self.rip, False
        word = table[index]
        return self.rip + (word >> 22), bool(word >> 21 & 1)
