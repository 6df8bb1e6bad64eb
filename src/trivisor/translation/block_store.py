"""All blocks of one processor: found by address, made when missing, forgotten when their code is written to."""

from __future__ import annotations

import ctypes
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from iced_x86 import Decoder, DecoderError, Instruction

from trivisor.translation.block_tables import (
    ALIAS,
    ARCHIVED,
    BLOCK,
    BLOCK_SIZE,
    LINK_TO_PLAIN,
    MAXIMUM_BLOCKS,
    MAXIMUM_LINKS,
    MAXIMUM_TEMPLATES,
    PLAIN,
    STEP,
    TEMPLATE_SIZE,
    Block,
    BlockTables,
    template_bucket,
)
from trivisor.translation.core import Core
from trivisor.translation.kept import Archive, collect
from trivisor.translation.layout import BLOCK_TABLE_ENTRIES, BLOCK_TABLE_ENTRY_SIZE, OFFSETS
from trivisor.translation.mmu import Mmu
from trivisor.translation.modes import Mode
from trivisor.translation.native_code import NativeCode
from trivisor.translation.shapes import WANTS_SHAPE, WANTS_VARIANT, ShapeTables
from trivisor.translation.translator.block import Translation
from trivisor.translation.translator.traces import Judge, any_way
from trivisor.translation.translator.translator import Translator, fits
from trivisor.x86 import LONGEST_INSTRUCTION
from trivisor.x86.exceptions import GuestException

_NOTHING = b"\xff" * 0x1000
_TABLE = OFFSETS["BLOCK_TABLE"] // 8
_FORGOTTEN, _COMPOSED, _COMPOSED_INSTRUCTIONS = (
    OFFSETS[name] // 8 for name in ("COUNT_FORGOTTEN", "COUNT_COMPOSED", "COMPOSED_INSTRUCTIONS")
)
_WANTS = OFFSETS["COMPOSER_WANTS"] // 8
_MAXIMUM_REMEMBERED = 1 << 16
"""Decoded instructions and single-step blocks."""


class BlockStore:
    """Finds and makes blocks.

    Templates of forgotten blocks stay: the same bytes at the same place in a page become a block again without
    being translated.
    """

    def __init__(
        self, core: Core, mmu: Mmu, native: NativeCode, features: frozenset[int], xsave_size: int
    ) -> None:
        self.core = core
        self.mmu = mmu
        self.native = native
        self.cache = native.cache
        self.tables = BlockTables(core, mmu.memory.span >> 12)
        self._steps: dict[tuple[int, int, int, int], tuple[bytes, Block]] = {}
        """Single-step blocks by linear and physical address, mode and what is prepared, with their guest bytes."""
        self._decoded: dict[tuple[int, int], tuple[bytes, Instruction]] = {}
        self._archive: Archive | None = None
        self._helpers_end = self.cache.used
        self.core.words[_TABLE + 1] = 0xFFF
        lookup = native.address("lookup") - self.cache.base
        self.shapes = ShapeTables(core)
        self.translator = Translator(self.cache, lookup, features, xsave_size, self.shapes)
        self._made_here = 0
        self.tuned = 0
        self._tunes_at_once = False
        self.flushes = 0
        self.on_flush: Callable[[], None] = lambda: None
        """Called before everything is forgotten."""
        self.translating = 0
        """Nanoseconds spent translating."""

    @property
    def invalidated(self) -> int:
        """Blocks that were forgotten because their code was written to or mapped otherwise."""
        return self.core.words[_FORGOTTEN]

    @property
    def tunes_at_once(self) -> bool:
        """Every new block is tuned, hot or not, with traces on any way, and so passes through Python: for tests."""
        return self._tunes_at_once

    @tunes_at_once.setter
    def tunes_at_once(self, at_once: bool) -> None:
        self._tunes_at_once = at_once
        self.shapes.composing = not at_once

    @property
    def made(self) -> int:
        """Blocks that were translated."""
        return self._made_here + self.core.words[_COMPOSED]

    @property
    def instructions(self) -> int:
        """Instructions in them."""
        return self.translator.instructions + self.core.words[_COMPOSED_INSTRUCTIONS]

    def close(self) -> None:
        """Give the tables' memory back to the host."""
        self.tables.close()
        self.shapes.close()

    # -- finding and making ---------------------------------------------------------------------------------

    def block(self, mode: Mode, rip: int, plain: int = 0) -> Block:
        """The block at linear `rip`, made if need be; raises GuestException for a fetch that faults.

        With `plain` = PLAIN it is the one that stands in for a tuned block there.
        """
        page, _ = self.mmu.fetch(rip, mode.user_view)
        while number := self._find(rip, page | mode.key | plain):
            found = Block(self.tables, number)
            if not found.second or self._has_second(found, mode):
                return found
            self.native.forget_block(number)
        made = self._make(mode, rip, page, plain)
        if self.tunes_at_once and not plain and mode.bits == 64:
            path, _ = self.trace(made, mode, any_way)
            if (tuned := self.tune(made, mode, path, ())) is not None:
                return tuned[0]
        return made

    def _has_second(self, block: Block, mode: Mode) -> bool:
        """Whether the page that the block's instruction runs into is still the same; raises GuestException."""
        second, _ = self.mmu.fetch((block.rip | 0xFFF) + 1 & mode.linear_mask, mode.user_view)
        return bool(second | 1 == block.second)

    def _make(self, mode: Mode, rip: int, page: int, plain: int) -> Block:
        started = time.perf_counter_ns()
        code, second = self.code_at(mode, rip, page)
        key = page | mode.key | plain
        number = self._compose(mode, rip, key, code)
        if not number:
            made = self.translator.translate(mode, rip, code)
            if not self._has_room(made, len(code)):
                self.flush()
                made = self.translator.translate(mode, rip, code)
            is_ram = self.mmu.memory.is_ram
            movable = mode.bits == 64 and is_ram(second, 0x1000) if made.crosses else True
            lasting = movable and not mode.debug and is_ram(page, 0x1000)
            template, start = self._keep(made, mode.key | plain, code, lasting=lasting)
            number = self.native.take_up(template, rip, key, start, second | 1 if made.crosses else 0)
            self._made_here += 1
        self.translating += time.perf_counter_ns() - started
        return Block(self.tables, number)

    def _find(self, rip: int, key: int) -> int:
        """The number of a block that is there or can be composed; 0 if there is none."""
        self.core.words[_WANTS] = 0
        return self.native.find_block(rip, key)

    def _compose(self, mode: Mode, rip: int, key: int, code: bytes) -> int:
        """The block's number after the composer was taught what it has wanted when `_find` failed; or 0."""
        words = self.core.words
        while wants := words[_WANTS]:
            if wants == WANTS_SHAPE:
                at = words[_WANTS + 1]
                taught = self.translator.learn(mode, fits(rip), rip + at, code[at:])
            else:
                taught = self.shapes.add_variant(words[_WANTS + 1], wants - WANTS_VARIANT)
            if not taught:
                return 0
            if number := self._find(rip, key):
                return number
        return 0

    def trace(self, block: Block, mode: Mode, judge: Judge) -> tuple[tuple[int, ...], int | None]:
        """Where the block's code goes on: see `Translator.trace`; only its own start if it is none to be tuned."""
        if not self._is_tunable(block, mode):
            return (block.rip,), None
        started = time.perf_counter_ns()
        found = self.translator.trace(mode, block.rip, self._rest_of_page(block), judge)
        self.translating += time.perf_counter_ns() - started
        return found

    def tune(
        self, block: Block, mode: Mode, path: Sequence[int], scattered: Container[int]
    ) -> tuple[Block, list[tuple[int, int]]] | None:
        """A better block in place of this one, with its site caches (see `Translator.tune`); None if there is none."""
        if not self._is_tunable(block, mode):
            return None
        started = time.perf_counter_ns()
        rip, key, code = block.rip, block.key, self._rest_of_page(block)
        made = self.translator.tune(mode, path, code, scattered)
        tuned = None
        if made is not None and self._has_room(made, made.length):
            template, start = self._keep(made, mode.key, code, lasting=False)
            self.native.forget_block(block.number)
            tuned = Block(self.tables, self.native.take_up(template, rip, key, start, 0)), made.sites
            self.tuned += 1
        self.translating += time.perf_counter_ns() - started
        return tuned

    def _is_tunable(self, block: Block, mode: Mode) -> bool:
        plainly = not (block.second or block.flags & STEP or mode.debug or mode.aligned)
        return plainly and self.mmu.memory.is_ram(block.key & ~0xFFF, 0x1000)

    def _rest_of_page(self, block: Block) -> bytes:
        """The block's physical page from the block on."""
        page = block.key & ~0xFFF
        return bytes(self.mmu.memory.view[page | block.rip & 0xFFF : page + 0x1000])

    def _has_room(self, made: Translation, guest: int) -> bool:
        """Whether the code cache and the tables can take it (links are counted generously)."""
        tables = self.tables
        words = len(made.relocations) + len(made.locations) + 5 * len(made.links) + 2 * len(made.constants)
        size = len(made.code) + 4 * words + 2 * guest + 32
        return (
            self.cache.used + size <= self.cache.size
            and tables.block_count < MAXIMUM_BLOCKS - 2
            and tables.link_count < MAXIMUM_LINKS - 256
            and tables.template_count < MAXIMUM_TEMPLATES - 1
        )

    def _keep(self, made: Translation, mode: int, code: bytes, *, lasting: bool) -> tuple[int, int]:
        """Put it into the code cache; (number of its template, offset of its code).

        A `lasting` template can become other blocks later: those with the same bytes at the same place in a page.
        """
        guest = code[: made.length]
        start = (self.cache.used + 15) & ~15
        record, image = made.keep(mode, start, guest)
        self.cache.append(image)
        tables = self.tables
        number = tables.template_count
        tables.template_count = number + 1
        tables.templates[number * TEMPLATE_SIZE : (number + 1) * TEMPLATE_SIZE] = record
        if lasting:
            tables.list_template(number, template_bucket(made.rip, mode, code))
        return number, start

    def code_at(self, mode: Mode, rip: int, page: int) -> tuple[bytes, int]:
        """(bytes from rip on to the end of the page, 0), or those of an instruction that crosses into another.

        Then the other physical page is the second value.  Raises GuestException.
        """
        code = self._contents(page)[rip & 0xFFF :]
        if len(code) >= LONGEST_INSTRUCTION:
            return code, 0
        decoder = Decoder(mode.bits, code, ip=rip)
        decoder.decode()
        if decoder.last_error != DecoderError.NO_MORE_BYTES:
            return code, 0
        beyond = (rip | 0xFFF) + 1 & mode.linear_mask
        second, _ = self.mmu.fetch(beyond, mode.user_view)
        return code + self._contents(second)[: LONGEST_INSTRUCTION - len(code)], second

    def _stands_at(self, physical: int, code: bytes) -> bool:
        """Whether these bytes are there in RAM and within a page."""
        end, memory = physical + len(code), self.mmu.memory
        if end > (physical | 0xFFF) + 1 or not (end <= memory.low_end or memory.is_ram(physical, len(code))):
            return False
        return bytes(memory.view[physical:end]) == code

    def _contents(self, page: int) -> bytes:
        """A physical page as code is fetched from it: all ones where there is no memory."""
        memory = self.mmu.memory
        if memory.is_ram(page, 0x1000):
            return bytes(memory.view[page : page + 0x1000])
        return self.mmu.mmio.contents(page, 0x1000) or _NOTHING

    def around(self, mode: Mode, rip: int) -> tuple[int, int] | None:
        """(address, length) of the longest known block that holds or ends at `rip`."""
        try:
            page, _ = self.mmu.fetch(rip, mode.user_view)
        except GuestException:
            return None
        if not self.mmu.memory.is_ram(page, 0x1000):
            return None
        found = []
        number = self.tables.page_blocks[page >> 12]
        while number:
            block = Block(self.tables, number)
            if not block.flags and block.key == page | mode.key:
                length = self.tables.template_length(block.template)
                if block.rip <= rip <= block.rip + length:
                    found.append((block.rip, length))
            number = block.next
        return min(found, default=None)

    def step_block(self, mode: Mode, rip: int, prepared: int) -> Block:
        """A block of the one instruction at `rip`; see `Recipe.prepared`."""
        page, _ = self.mmu.fetch(rip, mode.user_view)
        key = (rip, page, mode.key, prepared)
        known = self._steps.get(key)
        if known is not None and self._stands_at(page | rip & 0xFFF, known[0]):
            return known[1]
        code, _ = self.code_at(mode, rip, page)
        if known is not None and code.startswith(known[0]):
            return known[1]
        made = self.translator.translate_step(mode, rip, code, prepared)
        if not self._has_room(made, made.length) or len(self._steps) >= _MAXIMUM_REMEMBERED:
            self.flush()
            made = self.translator.translate_step(mode, rip, code, prepared)
        template, start = self._keep(made, mode.key, code, lasting=False)
        block = self.tables.add_step(rip, page | mode.key, template, start, len(made.code))
        self._steps[key] = (code[: made.length], block)
        return block

    def instruction(self, mode: Mode, rip: int) -> Instruction:
        """The decoded instruction at `rip`; raises GuestException."""
        page, _ = self.mmu.fetch(rip, mode.user_view)
        known = self._decoded.get((rip, mode.bits))
        if known is not None and self._stands_at(page | rip & 0xFFF, known[0]):
            return known[1]
        code, _ = self.code_at(mode, rip, page)
        if known is not None and code.startswith(known[0]):
            return known[1]
        instruction = Decoder(mode.bits, code[:LONGEST_INSTRUCTION], ip=rip).decode()
        if len(self._decoded) >= _MAXIMUM_REMEMBERED:
            self._decoded.clear()
        self._decoded[rip, mode.bits] = (code[: instruction.len], instruction)
        return instruction

    def at_host(self, address: int) -> Block | None:
        """The block whose code holds host `address`."""
        offset = address - self.cache.base
        tables = self.tables
        # Block 0 is none; blocks are made in the order of their code.
        starts = tables.block_words[BLOCK["B_START"] // 4 :: BLOCK_SIZE // 4]
        number = bisect_right(starts, offset, 1, tables.block_count) - 1
        if number == 0:
            return None
        block = Block(tables, number)
        if block.flags & ALIAS:
            block = Block(tables, block.master)
        return block if offset < block.start + block.size else None

    def locate(self, block: Block, address: int) -> tuple[int, bool]:
        """(guest rip, flags parked) of the instruction of the block whose code holds host `address`."""
        offset = address - self.cache.base - block.body
        if offset < 0:
            return block.rip, False  # at a poll, most often
        table = self._locations(block.template)
        starts = [word & 0x1FFFFF for word in table]
        index = bisect_right(starts, offset) - 1
        if index < 0:
            return block.rip, False
        word = table[index]
        return block.rip + (word >> 22), bool(word >> 21 & 1)

    def _locations(self, template: int) -> memoryview:
        """A template's `Translation.locations`."""
        size, length, count = self.tables.template_sizes(template)
        end = size - length
        return memoryview(self.image(template)[end - 4 * count : end]).cast("I")

    def image(self, template: int) -> bytes:
        """A template's image."""
        at = self.tables.template_image(template)
        size = self.tables.template_sizes(template)[0]
        source = self.cache.writable
        if at & ARCHIVED:
            assert self._archive is not None
            source, at = self._archive.images, at & ~ARCHIVED
        return bytes(source[at : at + size])

    # -- keeping --------------------------------------------------------------------------------------------

    def adopt(self, archive: Archive) -> None:
        """Begin with the templates of an earlier run; no block was made yet, and `archive` must outlive this."""
        self._archive = archive
        self.tables.adopt(archive)

    def collect(self, limit: int) -> tuple[array[int], array[int], list[bytes]]:
        """The templates as `kept.save` wants them: at most `limit` bytes of images, if those used now are not more."""
        templates = bytes(self.tables.templates[: self.tables.template_count * TEMPLATE_SIZE])
        found = collect(templates, self.image, used_only=False)
        if sum(map(len, found[2])) > limit:
            found = collect(templates, self.image, used_only=True)
        return found

    # -- links ----------------------------------------------------------------------------------------------

    def follow(self, mode: Mode, link: int) -> Block:
        """The block that a link's jump wants, made if need be, and the link led there; raises GuestException."""
        flushes = self.flushes
        entry = self.tables.link_entry(link)
        block = self.block(mode, self.core.linear_rip, PLAIN if entry & LINK_TO_PLAIN else 0)
        if flushes == self.flushes:  # else the link is gone
            self.native.connect_link(link, block.number)
        return block

    # -- forgetting -----------------------------------------------------------------------------------------

    def written(self, address: int, length: int) -> None:
        """Physical [address, address + length) is about to change: forget what was made from it."""
        first, end = address & ~0xFFF, address + length
        far = length >> 12 > self.tables.block_count
        for page in self._pages_with_blocks() if far else range(first, end, 0x1000):
            if not first <= page < end:
                continue
            if self.mmu.memory.is_ram(page, 0x1000) and self.tables.page_blocks[page >> 12]:
                self.native.forget_bytes(page >> 12, max(address - page, 0), min(end - page, 0x1000))

    def _pages_with_blocks(self) -> set[int]:
        """The physical pages that any block stands on."""
        quads, step = self.tables.block_quads, BLOCK_SIZE // 8
        rows = range(step, self.tables.block_count * step, step)
        return {quads[at + BLOCK[field] // 8] & ~0xFFF for at in rows for field in ("B_KEY", "B_SECOND")}

    def forget_page(self, page: int) -> None:
        """The whole page is about to be overwritten."""
        self.written(page, 0x1000)

    def code(self) -> Iterator[tuple[int, int, Block]]:
        """(host address, bytes, block) of all code that was made since the last flush, in the order of its making."""
        for number in range(1, self.tables.block_count):
            block = Block(self.tables, number)
            if not block.flags & ALIAS:
                yield self.cache.base + block.start, block.size, block

    def flush(self) -> None:
        """Forget everything, because the code cache is full."""
        self.on_flush()
        self.flushes += 1
        tables, lines = self.tables, self.mmu.code_lines
        memory = self.mmu.memory
        for page in self._pages_with_blocks():
            if memory.is_ram(page, 0x1000):
                lines[page >> 12] = tables.page_blocks[page >> 12] = 0
        tables.clear()
        self._steps.clear()
        self.cache.used = self._helpers_end
        self.clear_table()
        self.native.flush_everything()

    def forget_modes(self) -> None:
        """Forget everything, because the modes' numbers begin anew."""
        self.flush()
        self.translator.forget_modes()

    def set_breakpoints(self, addresses: Iterable[int]) -> None:
        """Have blocks of `Mode.debug` end before these linear addresses.

        Going back to where the last ones were is free, so that a guest may switch them on and off with its tasks.
        """
        wanted = frozenset(addresses)
        if wanted and wanted != self.translator.breakpoints:
            if self.translator.breakpoints:
                self.flush()
            self.translator.breakpoints = wanted

    def clear_table(self) -> None:
        """Empty the native block table."""
        start, size = OFFSETS["BLOCK_TABLE"], BLOCK_TABLE_ENTRIES * BLOCK_TABLE_ENTRY_SIZE
        ctypes.memset(self.core.address + start, 0, size)
        # Zeros are an entry for address 0 of page 0, which has its place in the first one.
        self.core.words[_TABLE + 1] = 0xFFF
