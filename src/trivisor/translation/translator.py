"""Blocks of guest code into blocks of host code."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack_into

from iced_x86 import Decoder, Instruction

from trivisor.translation.block import Block, Link
from trivisor.translation.code_cache import CodeCache
from trivisor.translation.emission import Emission
from trivisor.translation.instructions import InstructionMaker
from trivisor.translation.modes import Mode
from trivisor.translation.recipe import Recipe

MAXIMUM_INSTRUCTIONS = 64
"""In one block."""

def fits(address: int) -> bool:
    """Whether code around `address` is named by sign-extended 32-bit immediates, some slack included."""
    return address < 0x7F000000 or address >= 0xFFFFFFFF81000000 - 0x1000000


class Translator:
    """Translates for one code cache; `find` gives an existing block for (rip, key)."""

    def __init__(
        self,
        cache: CodeCache,
        lookup: int,
        features: frozenset[int],
        xsave_size: int,
        find: Callable[[int, int], Block | None],
    ) -> None:
        """`lookup`: offset in the cache of the jump cache miss helper."""
        self.cache = cache
        self.lookup = lookup
        self.features = features
        self.xsave_size = xsave_size
        self.find = find
        self.links: list[Link] = []
        """By the number that their stub reports."""
        self.instructions = 0
        self.recipes_made = 0
        self._makers: dict[tuple[int, bool], InstructionMaker] = {}
        self._recipes: dict[tuple[int, bool], dict[bytes, Recipe]] = {}
        self._instruction = Instruction()

    def translate(self, mode: Mode, rip: int, page: int, code: bytes) -> Block:
        """Translate from linear `rip` in the physical page `page`.

        `code` holds the bytes from there to the end of the page, or, for an
        instruction that crosses into the next, up to 15 bytes.  Raises
        MemoryError when the code cache is full.
        """
        near = fits(rip)
        mode_key = mode.key
        which = (mode_key, near)
        maker = self._makers.get(which)
        if maker is None:
            maker = self._makers[which] = InstructionMaker(mode, near, self.features, self.xsave_size)
            self._recipes[which] = {}
        recipes = self._recipes[which]
        decoder = Decoder(mode.bits, code, ip=rip)
        instruction = self._instruction
        chosen: list[Recipe] = []
        room = min(0x1000 - (rip & 0xFFF), len(code))
        position = 0
        shadow = False
        while True:
            decoder.decode_out(instruction)
            length = instruction.len
            end = position + length
            if end >= room and chosen and (end > room or instruction.is_invalid):
                break  # it runs into the next page (or seems invalid for the bytes missing here)
            raw = code[position:end]
            recipe = recipes.get(raw)
            if recipe is None:
                recipe = recipes[raw] = maker.make(instruction, raw)
                self.recipes_made += 1
            chosen.append(recipe)
            position = end
            if recipe.ends is not None or recipe.polls or end >= room or shadow:
                break
            if len(chosen) >= MAXIMUM_INSTRUCTIONS:
                break
            shadow = recipe.shadow
        self.instructions += len(chosen)
        polls = chosen[-1].polls or (shadow and chosen[-1].ends is None)
        return self._emit(mode, near, Block(rip, page | mode_key, position), chosen, polls, single=False)

    def translate_step(self, mode: Mode, rip: int, page: int, code: bytes, prepared: int) -> Block:
        """Translate one instruction that leaves to Python when it is done; see `Recipe.prepared`."""
        instruction = Decoder(mode.bits, code, ip=rip).decode()
        maker = InstructionMaker(mode, False, self.features, self.xsave_size)
        recipe = maker.make(instruction, code[: instruction.len], prepared, single=True)
        return self._emit(mode, False, Block(rip, page | mode.key, recipe.length), [recipe], False, single=True)

    def _emit(
        self, mode: Mode, near: bool, block: Block, recipes: list[Recipe], polls: bool, *, single: bool
    ) -> Block:
        emission = Emission(mode, near, block, (self.cache.used + 15) & ~15, self.lookup, single)
        emission.emit(recipes, polls, len(self.links))
        self.cache.append(emission.out)
        for link in emission.links:
            self.links.append(link)
            target = self.find(link.target, block.key)
            if target is not None:
                self.connect(link, target)
        return block

    def connect(self, link: Link, target: Block) -> None:
        """Make the link's jump lead to `target`."""
        entry = target.polled if link.backward else target.body
        pack_into("<i", self.cache.writable, link.site, entry - link.site - 4)
        target.links.append(link)

    def disconnect(self, block: Block) -> None:
        """Send every jump that leads to `block` back to its stub."""
        for link in block.links:
            pack_into("<i", self.cache.writable, link.site, link.stub - link.site - 4)
        block.links.clear()
