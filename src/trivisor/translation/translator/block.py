"""What the translator makes: the host code of a run of guest instructions, and what it takes to put it elsewhere."""

from __future__ import annotations

from array import array
from struct import Struct

from trivisor.translation.block_tables import BLOCK, LINK_DESCRIPTION, LINK_TO_PLAIN, RELOCATIONS, TEMPLATE_FORMAT

ADDRESS_64, ADDRESS_32, TO_HELPER, JUMP_SLOT = (
    RELOCATIONS[name] << 24 for name in ("ADDRESS_64", "ADDRESS_32", "TO_HELPER", "JUMP_SLOT")
)

_TEMPLATE = Struct(TEMPLATE_FORMAT).pack


class Link:
    """A direct jump that can lead straight to another block.

    `site` is the offset in the code of the jump's 32-bit displacement, `stub`
    that of the code that asks for the link, `number` that of the link's number
    there.  `backward` jumps go to the target's poll, and those with the flags
    parked to its entry for that.
    """

    __slots__ = ("backward", "number", "parked", "plain", "site", "stub", "target")

    def __init__(self, site: int, target: int, backward: bool, parked: bool, plain: bool = False) -> None:
        self.site = site
        self.stub = 0
        self.number = 0
        self.target = target
        """Linear address, in the page of the block that jumps."""
        self.backward = backward
        self.parked = parked
        self.plain = plain
        """The target must be a plain block: a tuned one asks for it when a check of several accesses fails."""

    def described(self, rip: int) -> bytes:
        """The link of a block at `rip` as its image has it."""
        entry = BLOCK["B_PARKED" if self.parked else "B_POLLED" if self.backward else "B_BODY"]
        entry |= LINK_TO_PLAIN if self.plain else 0
        return LINK_DESCRIPTION.pack(self.site, self.stub, self.number, self.target - rip, entry)


class Translation:
    """Translated code of one run of guest instructions within a page (or of one that crosses pages).

    Everything that depends on where it stands is noted: see `block_tables`.
    """

    __slots__ = ("body", "code", "length", "links", "locations", "parked", "polled", "relocations", "rip", "sites")

    def __init__(self, rip: int, length: int) -> None:
        self.rip = rip
        """Linear address of the first instruction."""
        self.length = length
        """Bytes of guest code."""
        self.code = bytearray()
        """It begins with the entry that checks r10 against `rip`."""
        self.parked = 0
        """Offset of the same without the check: flags are parked, and looked for interrupts."""
        self.polled = 0
        """... of the entry that looks for interrupts."""
        self.body = 0
        """... of the first instruction."""
        self.links: list[Link] = []
        self.relocations = array("I")
        """Ascending or not: offset | kind (`ADDRESS_64` and its like)."""
        self.locations = array("I")
        """Of pieces of code, ascending: offset from the body | flags parked << 21 | offset of guest rip << 22."""

        self.sites: list[tuple[int, int]] = []
        """Of a tuned block: (offset of the guest instruction from `rip`, number of its site cache)."""

    @property
    def crosses(self) -> bool:
        """Whether it is an instruction that runs into the next page."""
        return (self.rip & 0xFFF) + self.length > 0x1000

    def image(self, guest: bytes) -> bytes:
        """Everything that a template needs, as block_tables.py describes it; `guest` is what it was translated from."""
        links = b"".join([link.described(self.rip) for link in self.links])
        code = self.code
        return b"".join(
            (code, bytes(-len(code) & 3), self.relocations.tobytes(), links, self.locations.tobytes(), guest)
        )

    def template(self, mode: int, base: int, size: int, guest: bytes) -> bytes:
        """The record of a template whose image of `size` bytes stands at offset `base` of the code cache."""
        counts = len(self.relocations), len(self.locations), len(self.links)
        return _TEMPLATE(
            int.from_bytes(guest[:8], "little"), self.rip, 0, base, len(self.code), base, mode, self.length,
            *counts, self.parked, self.polled, self.body, 0, size, 0,
        )  # fmt: skip
