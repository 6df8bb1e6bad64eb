"""Blocks of guest code into blocks of host code."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from iced_x86 import ConstantOffsets, Decoder, Instruction, OpKind

from trivisor.translation.code_cache import CodeCache
from trivisor.translation.modes import Breakpoint, Mode, Raise
from trivisor.translation.shapes import MAXIMUM_INSTRUCTIONS, ShapeTables
from trivisor.translation.translator.block import Translation
from trivisor.translation.translator.counted import run_forward
from trivisor.translation.translator.emission import Emission, FarTarget
from trivisor.translation.translator.instructions import InstructionMaker
from trivisor.translation.translator.recipe import Constants, Entry, Recipe, may_be_address
from trivisor.translation.translator.traces import Judge, Segment, follow
from trivisor.translation.translator.tuned import FIRST_SITES, PLAIN_CHECK, Decoded, Tuning
from trivisor.x86.exceptions import GENERAL_PROTECTION

_MASK64 = (1 << 64) - 1


def fits(address: int) -> bool:
    """Whether code around `address` is named by sign-extended 32-bit immediates, some slack included."""
    return address < 0x7F000000 or address >= 0xFFFFFFFF81000000 - 0x1000000


class _Known(NamedTuple):
    """What is known of the instructions of one mode: by their bytes, and by their bytes without constants."""

    maker: InstructionMaker
    entries: dict[bytes, Entry]
    shapes: dict[bytes, Recipe]


def _constants(instruction: Instruction, raw: bytes, offsets: ConstantOffsets) -> Constants:
    at, size = offsets.displacement_offset, offsets.displacement_size
    displacement = raw[at : at + size]
    places = at, offsets.immediate_offset
    at, size = offsets.immediate_offset, offsets.immediate_size
    immediate = raw[at : at + size]
    relative = 0
    if instruction.is_ip_rel_memory_operand:
        relative = (instruction.ip_rel_memory_address - instruction.next_ip + (1 << 63) & _MASK64) - (1 << 63)
    elif instruction.op0_kind in _NEAR_BRANCHES:
        relative = (instruction.near_branch_target - instruction.next_ip + (1 << 63) & _MASK64) - (1 << 63)
        if instruction.op0_kind == OpKind.NEAR_BRANCH16:
            relative = (relative + 0x8000 & 0xFFFF) - 0x8000
    has_address = may_be_address(displacement) or may_be_address(immediate)
    return Constants(displacement, immediate, relative, places, has_address)


_NEAR_BRANCHES = {OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64}


class Translator:
    """Translates for the place in the code cache that is free next."""

    def __init__(
        self, cache: CodeCache, lookup: int, features: frozenset[int], xsave_size: int, shapes: ShapeTables
    ) -> None:
        """`lookup`: offset in the cache of the jump cache miss helper; `shapes`: what the composer knows."""
        self.cache = cache
        self.lookup = lookup
        self.features = features
        self.xsave_size = xsave_size
        self.shapes = shapes
        self.breakpoints: frozenset[int] = frozenset()
        """Linear addresses before which blocks of `Mode.debug` end."""
        self.instructions = 0
        self.recipes_made = 0
        self._known: dict[tuple[int, bool], _Known] = {}
        self._instruction = Instruction()
        self._next_sites = FIRST_SITES

    def translate(self, mode: Mode, rip: int, code: bytes) -> Translation:
        """Translate from linear `rip`.

        `code` holds the bytes from there to the end of the page, or, for an
        instruction that crosses into the next, up to 15 bytes.
        """
        near = fits(rip)
        try:
            return self._translate(mode, near, rip, code)
        except FarTarget:
            return self._translate(mode, False, rip, code)

    def _translate(self, mode: Mode, near: bool, rip: int, code: bytes) -> Translation:
        if mode.debug and rip in self.breakpoints:
            return self._only(mode, rip, Breakpoint(), single=False)
        known = self._known_for(mode, near)
        chosen, position, polls = self._choose(known, mode, rip, code)
        if not chosen:
            return self._beyond_limit(mode, rip, single=False)
        self.instructions += len(chosen)
        return self._emit(mode, near, Translation(rip, position), chosen, polls, single=False)

    def _known_for(self, mode: Mode, near: bool) -> _Known:
        known = self._known.get((mode.key, near))
        if known is None:
            known = self._known[mode.key, near] = _Known(
                InstructionMaker(mode, near, self.features, self.xsave_size), {}, {}
            )
        return known

    def _choose(self, known: _Known, mode: Mode, rip: int, code: bytes) -> tuple[list[Entry], int, bool]:
        """The instructions of the block at `rip`, the bytes that they are, and whether to look for interrupts after.

        There are none if the first one lies beyond the code segment's limit.
        """
        entries = known.entries
        decoder = Decoder(mode.bits, code, ip=rip)
        decode = decoder.decode_out
        instruction = self._instruction
        chosen: list[Entry] = []
        room = min(0x1000 - (rip & 0xFFF), len(code))
        position = 0
        shadow = False
        wide, base = mode.bits == 64, mode.code_base
        breakpoints = self.breakpoints if mode.debug else ()
        while True:
            if chosen and rip + position in breakpoints:
                break
            decode(instruction)
            end = decoder.position
            if not wide and (rip - base & 0xFFFFFFFF) + end - 1 > mode.code_limit:
                break
            if end >= room and chosen and (end > room or instruction.is_invalid):
                break  # it runs into the next page (or seems invalid for the bytes missing here)
            raw = code[position:end]
            entry = entries.get(raw)
            if entry is None:
                entry = entries[raw] = self._entry(known, decoder, instruction, raw)
            chosen.append(entry)
            position = end
            recipe = entry[0]
            if recipe.ends is not None or recipe.polls or end >= room or shadow:
                break
            if len(chosen) >= MAXIMUM_INSTRUCTIONS:
                break
            shadow = recipe.shadow
        if not chosen:
            return chosen, 0, False
        if recipe.shadow and not (len(chosen) > 1 and chosen[-2][0].shadow):
            # Nothing that its shadow could cover follows here: Python knows shadows across blocks.
            shadow = False
            if len(chosen) > 1:
                chosen.pop()
                position -= recipe.length
            else:
                decoder = Decoder(mode.bits, raw, ip=rip)
                decoder.decode_out(instruction)
                offsets = decoder.get_constant_offsets(instruction)
                chosen[0] = known.maker.make(instruction, raw, offsets, single=True).entry(Constants())
        return chosen, position, chosen[-1][0].polls or (shadow and chosen[-1][0].ends is None)

    def trace(self, mode: Mode, rip: int, code: bytes, judge: Judge) -> tuple[tuple[int, ...], int | None]:
        """(starts of the segments of the trace from linear `rip` on, where it would go on); see `traces.follow`.

        `code` is the page's from `rip` on, which is the start of a block within the page.
        """
        known = self._known_for(mode, fits(rip))
        segments, way = follow(rip, lambda at: self._segment(known, mode, at, code[at - rip :]), judge)
        return tuple(segment.rip for segment in segments), way

    def _segment(self, known: _Known, mode: Mode, rip: int, code: bytes) -> Segment:
        return Segment(rip, *self._choose(known, mode, rip, code))

    def tune(
        self, mode: Mode, path: Sequence[int], code: bytes, scattered: Container[int] = ()
    ) -> Translation | None:
        """A better translation of the block at path[0], or None if there is none.

        It is the trace whose segments begin at the addresses of `path`.  `code` is the page's from there on;
        `scattered` has the linear addresses of instructions whose accesses are all over the place.
        """
        near = fits(path[0])
        try:
            return self._tune(mode, near, path, code, scattered)
        except FarTarget:
            return self._tune(mode, False, path, code, scattered)

    def _tune(
        self, mode: Mode, near: bool, path: Sequence[int], code: bytes, scattered: Container[int]
    ) -> Translation | None:
        known = self._known_for(mode, near)
        rip = path[0]
        segments = [self._segment(known, mode, at, code[at - rip :]) for at in path]
        if any(segment.has_shadow for segment in segments):
            return None
        decoded, starts, turns = [], [], {}
        for segment, then in zip_longest(segments, path[1:]):
            decoder = Decoder(mode.bits, code[segment.rip - rip : segment.end - rip], ip=segment.rip)
            for instruction in decoder:
                at = instruction.ip - rip
                raw = code[at : at + instruction.len]
                decoded.append(Decoded(instruction, raw, decoder.get_constant_offsets(instruction)))
                starts.append(at)
            if then is not None:
                turns[len(decoded) - 1] = then
        apart = {index for index, start in enumerate(starts) if rip + start in scattered}
        chosen = [entry for segment in segments for entry in segment.entries]
        recipes = [recipe for recipe, _, _ in chosen]
        tuning = Tuning(known.maker, decoded, recipes, self._next_sites, apart, turns)
        self._next_sites = tuning.next_sites
        better = [
            entry if form is None else tuning.recipe(index).entry(_constants(*decoded[index]))
            for index, (entry, form) in enumerate(zip(chosen, tuning.forms, strict=True))
        ]
        forward = run_forward([instruction for instruction, _, _ in decoded], turns)
        if forward is not None:
            head = Recipe(mode.user_view, near)
            head.clobber(forward)
            better.insert(0, head.entry(Constants()))
            turns = {index + 1: way for index, way in turns.items()}
        last = segments[-1]
        made = self._emit(mode, near, Translation(rip, last.end - rip), better, last.polls, single=False, turns=turns)
        if not (turns or tuning.pays or apart or made.parks_first or forward):
            return None
        made.sites = [
            (start, site)
            for start, form in zip(starts, tuning.forms, strict=True)
            if form is not None
            for site in form.sites
            if site != PLAIN_CHECK
        ]
        return made

    def _entry(
        self, known: _Known, decoder: Decoder, instruction: Instruction, raw: bytes
    ) -> Entry:
        """The recipe of an instruction seen for the first time: that of one like it, if there was one."""
        offsets = decoder.get_constant_offsets(instruction)
        constants = _constants(instruction, raw, offsets)
        shape = bytearray(raw)
        for at, size in (
            (offsets.displacement_offset, offsets.displacement_size),
            (offsets.immediate_offset, offsets.immediate_size),
        ):
            shape[at : at + size] = bytes(size)
        key = bytes(shape)
        recipe = known.shapes.get(key)
        if recipe is None:
            recipe = known.maker.make(instruction, raw, offsets)
            self.recipes_made += 1
            if recipe.shared:
                known.shapes[key] = recipe
        return recipe.entry(constants)

    def _beyond_limit(self, mode: Mode, rip: int, *, single: bool) -> Translation:
        """An instruction that does not lie within its code segment faults (Intel SDM 3A 5.3)."""
        return self._only(mode, rip, Raise(GENERAL_PROTECTION, 0), single=single)

    def _only(self, mode: Mode, rip: int, ends: object, *, single: bool) -> Translation:
        """A block that is nothing but an end."""
        recipe = Recipe(mode.user_view, False, length=1, ends=ends)
        recipe.finish()
        return self._emit(mode, False, Translation(rip, 1), [recipe.entry(Constants())], False, single=single)

    def forget_modes(self) -> None:
        """Forget every mode's recipes, because their keys get other meanings."""
        self._known.clear()
        self.shapes.clear()

    def learn(self, mode: Mode, near: bool, rip: int, code: bytes) -> bool:
        """Tell the composer of the instruction at linear `rip`, whose bytes begin `code`; whether it knows it now.

        `near`: as the block that it is for has it.
        """
        known = self._known_for(mode, near)
        decoder = Decoder(mode.bits, code, ip=rip)
        decoder.decode_out(self._instruction)
        if self._instruction.is_invalid:
            return False
        raw = code[: decoder.position]
        entry = known.entries.get(raw)
        if entry is None:
            entry = known.entries[raw] = self._entry(known, decoder, self._instruction, raw)
        recipe, constants, _ = entry
        return self.shapes.tell(mode, near, recipe, constants, raw)

    def translate_step(self, mode: Mode, rip: int, code: bytes, prepared: int) -> Translation:
        """Translate one instruction that leaves to Python when it is done; see `Recipe.prepared`."""
        decoder = Decoder(mode.bits, code, ip=rip)
        instruction = decoder.decode()
        if mode.bits != 64 and (rip - mode.code_base & 0xFFFFFFFF) + instruction.len - 1 > mode.code_limit:
            return self._beyond_limit(mode, rip, single=True)
        offsets = decoder.get_constant_offsets(instruction)
        maker = InstructionMaker(mode, False, self.features, self.xsave_size)
        raw = code[: instruction.len]
        recipe = maker.make(instruction, raw, offsets, prepared, single=True)
        chosen = [recipe.entry(_constants(instruction, raw, offsets))]
        return self._emit(mode, False, Translation(rip, recipe.length), chosen, False, single=True)

    def _emit(
        self,
        mode: Mode,
        near: bool,
        block: Translation,
        chosen: list[Entry],
        polls: bool,
        *,
        single: bool,
        turns: Mapping[int, int] | None = None,
    ) -> Translation:
        """`turns`: of a tuned block."""
        emission = Emission(mode, near, block, (self.cache.used + 15) & ~15, self.lookup, single)
        emission.emit(chosen, polls, turns or {}, tuned=turns is not None)
        return block
