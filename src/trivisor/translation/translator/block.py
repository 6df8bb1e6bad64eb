"""What the translator makes: the host code of a run of guest instructions, and what it takes to put it elsewhere."""

from __future__ import annotations

from array import array
from struct import Struct

from trivisor.translation.block_tables import BLOCK, LINK_DESCRIPTION, LINK_TO_PLAIN, RELOCATIONS, TEMPLATE_FORMAT

ADDRESS_64, ADDRESS_32, TO_HELPER, JUMP_SLOT, CONSTANT_32, CONSTANT_64 = (
    number << 24 for number in RELOCATIONS.values()
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

    __slots__ = (
        "body", "code", "constants", "length", "links", "locations", "parked", "parks_first", "polled", "relocations",
        "rip", "sites",
    )  # fmt: skip

    def __init__(self, rip: int, length: int) -> None:
        self.rip = rip
        """Linear address of the first instruction."""
        self.length = length
        """Bytes of guest code."""
        self.code = bytearray()
        """It begins with the entry that checks r10 against `rip`."""
        self.parked = 0
        """Offset of the same without the check: flags are parked, and looked for interrupts."""
        self.parks_first = False
        """All its entries lead to where flags are parked."""
        self.polled = 0
        """... of the entry that looks for interrupts."""
        self.body = 0
        """... of the first instruction."""
        self.links: list[Link] = []
        self.relocations = array("I")
        """Ascending or not: offset | kind (`ADDRESS_64` and its like)."""
        self.constants: list[tuple[int, int, int]] = []
        """(offset in the code, offset in the guest's code, width) of constants that may have any value."""
        self.locations = array("I")
        """Of pieces of code, ascending: offset from the body | flags parked << 21 | offset of guest rip << 22."""

        self.sites: list[tuple[int, int]] = []
        """Of a tuned block: (offset of the guest instruction from `rip`, number of its site cache)."""

    @property
    def crosses(self) -> bool:
        """Whether it is an instruction that runs into the next page."""
        return (self.rip & 0xFFF) + self.length > 0x1000

    def copy_constants(self, start: int, end: int, distance: int) -> None:
        """The code in [start, end) stands a second time, `distance` on."""
        for at, guest, width in self.constants.copy():
            if start <= at < end:
                self.constants.append((at + distance, guest, width))

    def keep(self, mode: int, base: int, guest: bytes) -> tuple[bytes, bytes]:
        """(record, image) of a template, as block_tables.py describes them, whose image will stand at `base`.

        `base` is an offset in the code cache, and `guest` what it was translated from.
        """
        relocations, mask = self.relocations, b""
        if self.constants:
            relocations = relocations[:]
            masked, kept = bytearray(guest), bytearray(b"\xff" * len(guest))
            for at, where, width in self.constants:
                relocations.append(at | (CONSTANT_64 if width == 8 else CONSTANT_32))
                relocations.append(where)
                masked[where : where + width] = kept[where : where + width] = bytes(width)
            guest, mask = bytes(masked), bytes(kept)
        code = self.code
        image = b"".join(
            (
                code, bytes(-len(code) & 3), relocations.tobytes(),
                b"".join([link.described(self.rip) for link in self.links]), self.locations.tobytes(), mask, guest,
            )
        )  # fmt: skip
        record = _TEMPLATE(
            int.from_bytes(guest[:8], "little"), self.rip, 0, base, len(code), base, mode, self.length,
            len(relocations), len(self.locations), len(self.links), self.parked, self.polled, self.body, 0, len(image),
            0, bool(mask), 0, int.from_bytes(mask[:8], "little") if mask else (1 << 8 * min(len(guest), 8)) - 1,
        )  # fmt: skip
        return record, image
