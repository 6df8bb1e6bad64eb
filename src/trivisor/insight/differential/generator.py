"""Random cases, each from its seed."""

from __future__ import annotations

from random import Random

from iced_x86 import Instruction

from trivisor.insight.differential.case import (
    CODE_DATA_SIZE,
    CODE_FAR,
    CODE_NEAR,
    DATA,
    DATA_PAGES,
    MANNERS,
    PAGE,
    ROUNDS,
    Case,
    Item,
    State,
    lay_out,
)
from trivisor.insight.differential.catalogue import SCALAR, VECTOR, X87, Groups, catalogue
from trivisor.insight.differential.draft import RSP, Draft, Impossible
from trivisor.insight.differential.flow import add_branch, add_nest, add_special
from trivisor.insight.differential.operands import add_ordinary
from trivisor.insight.differential.segments import Segments, choose, flat
from trivisor.insight.differential.tables import SAVE_X87, XSAVE_FAMILY
from trivisor.insight.differential.values import fpu_image, integer, pool_slice

_LENGTHS = (1, 1, 2, 2, 3, 3, 4, 5, 6, 8)
_STACKS = (0x1800, 0x1000, 0x2000, 0x1004)


class Generator:
    """Makes cases of `bits`-bit code for a processor with the decoder's `features`."""

    def __init__(self, features: frozenset[int], bits: int) -> None:
        self.bits = bits
        self.width = 64 if bits == 64 else 32
        self.groups: Groups = catalogue(features, bits)
        """Codes in play, by group and mnemonic."""

    @property
    def codes(self) -> int:
        """How many of the decoder's codes are in play."""
        return sum(len(codes) for group in self.groups.values() for codes in group)

    def case(self, seed: str) -> Case:
        """The case that belongs to `seed`."""
        random = Random(seed)
        segments = self._segments(random)
        fs_base, gs_base = self._segment_base(random), self._segment_base(random)
        if segments:
            bases = {name: one.base for name, one in segments.items() if one.selector}
        else:
            bases = {"es": 0, "cs": 0, "ss": 0, "ds": 0, "fs": fs_base, "gs": gs_base}
        gpr = [self._register(random, bases["ds"]) for _ in range(16)]
        gpr[RSP] = DATA + random.choice((*_STACKS, random.randrange(64, 0x2FC0))) - bases["ss"]
        if self.bits != 64:
            gpr[RSP] &= 0xFFFFFFFF
        page = CODE_NEAR if self.bits != 64 or random.random() < 0.7 else CODE_FAR
        offset = random.randrange(0, 0x400) if random.random() < 0.85 else random.randrange(0xF80, 0x1000)
        length = random.choice(_LENGTHS)
        if offset < 0x200 and random.random() < 0.1:
            length = random.randrange(10, 40)
        draft = Draft(random, self.bits, page + offset, gpr, bases)
        self._fill(draft, length)
        _move_targets(draft.items, draft.nests)
        manner = random.choice(MANNERS)
        if draft.used_x87 or any(_leaves_holes(item.instruction) for item in draft.items):
            # These may leave what they write to as it was, and a device is not asked what it has.
            manner = random.choice(("", "tuned"))
        return Case(
            self.bits, draft.items, self._states(random, gpr, draft.pinned), segments, fs_base, gs_base,
            page, offset, random.random() < 0.5, manner, draft.pokes,
        )  # fmt: skip

    def _states(self, random: Random, gpr: list[int], pinned: set[int]) -> list[State]:
        """States to run from: the first with these registers, the others with those of them that are pinned."""
        states = []
        code_data = pool_slice(random, CODE_DATA_SIZE)
        for number in range(ROUNDS):
            registers = list(gpr)
            if number:
                for free in set(range(16)) - pinned:
                    registers[free] = integer(random, self.width)
            flags = random.getrandbits(12) & 0x8D5 | 0x202 | (0x400 if random.random() < 0.2 else 0)
            data = pool_slice(random, DATA_PAGES * PAGE)
            states.append(State(registers, flags, fpu_image(random), data, code_data))
        return states

    def _segments(self, random: Random) -> Segments:
        if self.bits == 64:
            return {}
        return flat() if self.bits == 32 and random.random() < 0.5 else choose(random, self.bits)

    def _segment_base(self, random: Random) -> int:
        if self.bits != 64:
            return 0
        return random.choice(
            (0, DATA, DATA + 0x123, 0x1000, random.getrandbits(31), (1 << 47) - 0x2000,
             0xFFFF800000000000 | random.getrandbits(30))
        )  # fmt: skip

    def _register(self, random: Random, base: int) -> int:
        """An initial value: an offset near the data in a segment with this base, a small number, or anything."""
        mask = (1 << self.width) - 1
        kind = random.random()
        if kind < 0.4:
            return DATA - base + random.randrange(-64, DATA_PAGES * PAGE + 64) & mask
        if kind < 0.6:
            return random.randrange(-40, 70) & mask
        return integer(random, self.width)

    def _fill(self, draft: Draft, length: int, *, nested: bool = False) -> None:
        """Add `length` instructions or pieces, as far as that is possible."""
        drawn = attempts = 0
        while drawn < length and attempts < 4 * length + 40:
            attempts += 1
            before = draft.snapshot()
            start, known = len(draft.items), before[2]
            try:
                self._one(draft, nested)
                lay_out(draft.items, draft.rip, self.bits)
                drawn += 1
                if start < draft.skipped_to:  # it may not run
                    draft.known = {n: value for n, value in draft.known.items() if known.get(n) == value}
            except (Impossible, ValueError):
                draft.restore(before)

    def _one(self, draft: Draft, nested: bool) -> None:
        random = draft.random
        kind = random.random()
        if kind < 0.1:
            add_branch(draft)
        elif kind < 0.14 and not nested:
            add_nest(draft, lambda length: self._fill(draft, length, nested=True))
        elif kind < 0.18:
            add_special(draft)
        else:
            self._ordinary(draft, SCALAR if kind < 0.7 else VECTOR if kind < 0.9 else X87)

    def _ordinary(self, draft: Draft, group: str) -> None:
        add_ordinary(draft, draft.random.choice(draft.random.choice(self.groups[group])))


def _leaves_holes(instruction: Instruction) -> bool:
    """Whether it writes only parts of its memory operand."""
    return instruction.code in XSAVE_FAMILY or instruction.mnemonic in SAVE_X87


def _move_targets(items: list[Item], nests: list[tuple[int, int]]) -> None:
    """Have no branch lead into the middle of what belongs together."""
    for number, item in enumerate(items):
        target = item.target
        if target is None or target <= number or item.keep or item.group:
            continue
        while target < len(items) and items[target - 1].keep:
            target += 1
        for start, end in nests:
            if start < target < end and not start <= number < end:
                target = end
        item.target = target
