"""All blocks of one processor: found by address, made when missing, forgotten when their code is written to."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from iced_x86 import Decoder, DecoderError, Instruction

from trivisor.translation.code_cache import CodeCache
from trivisor.translation.core import Core
from trivisor.translation.layout import BLOCK_TABLE_ENTRIES, BLOCK_TABLE_ENTRY_SIZE, OFFSETS
from trivisor.translation.mmu import Mmu
from trivisor.translation.modes import Mode
from trivisor.translation.translator.block import Block
from trivisor.translation.translator.translator import Translator
from trivisor.x86.exceptions import GuestException

_TABLE = OFFSETS["BLOCK_TABLE"] // 8
_JUMP_CACHES = tuple(OFFSETS[f"JUMP_CACHE_{name}"] // 8 for name in ("KERNEL", "USER", "OTHER"))


def _place(rip: int) -> int:
    """Where in the state block's words the native block table has `rip`'s entry."""
    return _TABLE + ((rip ^ rip >> 16) & BLOCK_TABLE_ENTRIES - 1) * (BLOCK_TABLE_ENTRY_SIZE // 8)


class _Page:
    """What was made from one physical page."""

    __slots__ = ("blocks", "decoded", "steps")

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int, Block]] = []
        """(first byte, end, block), as offsets in the page."""
        self.steps: dict[tuple[int, int, int], Block] = {}
        self.decoded: dict[tuple[int, int], Instruction] = {}


class BlockStore:
    """Finds and makes blocks; `lookup` is the host address of the jump cache miss helper."""

    def __init__(
        self,
        core: Core,
        mmu: Mmu,
        cache: CodeCache,
        lookup: int,
        features: frozenset[int],
        xsave_size: int,
        purge_writes: Callable[[int], object],
        forget_jumps: Callable[[], object],
    ) -> None:
        self.core = core
        self.mmu = mmu
        self.cache = cache
        self.lookup = lookup
        self._purge_writes = purge_writes
        self._forget_jumps = forget_jumps
        self._blocks: dict[tuple[int, int], Block] = {}
        self._pages: dict[int, _Page] = {}
        self._starts: list[int] = []
        self._in_order: list[Block] = []
        self._helpers_end = cache.used
        self.core.words[_TABLE + 1] = 0xFFF
        self.translator = Translator(
            cache, lookup - cache.base, features, xsave_size, lambda rip, key: self._blocks.get((rip, key))
        )
        self.made = 0
        self.invalidated = 0
        self.flushes = 0
        self.translating = 0
        """Nanoseconds spent translating."""

    # -- finding and making ---------------------------------------------------------------------------------

    def block(self, mode: Mode, rip: int) -> Block:
        """The block at linear `rip`, made if need be; raises GuestException for a fetch that faults."""
        page, _ = self.mmu.fetch(rip, mode.user)
        key = page | mode.key
        found = self._blocks.get((rip, key))
        if found is not None and found.second >= 0 and not self._has_second(found, mode):
            self._forget(found)
            found = None
        if found is None:
            found = self._make(mode, rip, page)
        at = _place(rip)
        words = self.core.words
        words[at] = rip
        words[at + 1] = key
        words[at + 2] = self.cache.base + found.checked
        words[at + 3] = found.second | 1 if found.second >= 0 else 0
        return found

    def _has_second(self, block: Block, mode: Mode) -> bool:
        """Whether the page that the block's instruction runs into is still the same; raises GuestException."""
        second, _ = self.mmu.fetch((block.rip | 0xFFF) + 1 & ((1 << mode.bits) - 1), mode.user)
        return second == block.second

    def _make(self, mode: Mode, rip: int, page: int) -> Block:
        started = time.perf_counter_ns()
        code, second = self.code_at(mode, rip, page)
        try:
            block = self.translator.translate(mode, rip, page, code)
        except MemoryError:
            self.flush()
            block = self.translator.translate(mode, rip, page, code)
        self._blocks[rip, block.key] = block
        self._add(block)
        first = rip & 0xFFF
        last = first + block.length
        if last <= 0x1000:
            self._own(page).blocks.append((first, last, block))
            self._mark(page, first, last)
        else:
            block.second = second
            self._own(page).blocks.append((first, 0x1000, block))
            self._mark(page, first, 0x1000)
            self._own(second).blocks.append((0, last - 0x1000, block))
            self._mark(second, 0, last - 0x1000)
        self.made += 1
        self.translating += time.perf_counter_ns() - started
        return block

    def code_at(self, mode: Mode, rip: int, page: int) -> tuple[bytes, int]:
        """(bytes from rip on to the end of the page, 0), or those of an instruction that crosses into another.

        Then the other physical page is the second value.  Raises GuestException.
        """
        memory = self.mmu.memory
        address = page | (rip & 0xFFF)
        if not memory.is_ram(page, 0x1000):
            return b"\xff" * 15, page
        code = bytes(memory.view[address : page + 0x1000])
        if len(code) >= 15:
            return code, 0
        decoder = Decoder(mode.bits, code, ip=rip)
        decoder.decode()
        if decoder.last_error != DecoderError.NO_MORE_BYTES:
            return code, 0
        beyond = (rip | 0xFFF) + 1 & ((1 << mode.bits) - 1)
        second, _ = self.mmu.fetch(beyond, mode.user)
        if not memory.is_ram(second, 0x1000):
            return code + b"\xff" * 15, second
        return code + bytes(memory.view[second : second + 15 - len(code)]), second

    def around(self, mode: Mode, rip: int) -> tuple[int, int] | None:
        """(address, length) of the longest known block that holds or ends at `rip`."""
        try:
            page, _ = self.mmu.fetch(rip, mode.user)
        except GuestException:
            return None
        own = self._pages.get(page)
        blocks = [block for _, _, block in own.blocks] if own is not None else []
        found = [b for b in blocks if b.key == page | mode.key and b.rip <= rip <= b.rip + b.length]
        longest = min(found, key=lambda block: block.rip, default=None)
        return None if longest is None else (longest.rip, longest.length)

    def step_block(self, mode: Mode, rip: int, prepared: int) -> Block:
        """A block of the one instruction at `rip`; see `Recipe.prepared`."""
        page, _ = self.mmu.fetch(rip, mode.user)
        own = self._own(page)
        key = (rip, mode.key, prepared)
        block = own.steps.get(key)
        if block is None or (block.crosses and not self._has_second(block, mode)):
            code, second = self.code_at(mode, rip, page)
            try:
                block = self.translator.translate_step(mode, rip, page, code, prepared)
            except MemoryError:
                self.flush()
                own = self._own(page)
                block = self.translator.translate_step(mode, rip, page, code, prepared)
            self._add(block)
            own.steps[key] = block
            self._mark(page, rip & 0xFFF, min((rip & 0xFFF) + block.length, 0x1000))
            if block.crosses:
                block.second = second
                self._own(second).steps[key] = block
                self._mark(second, 0, 15)
        return block

    def instruction(self, mode: Mode, rip: int) -> Instruction:
        """The decoded instruction at `rip`; raises GuestException."""
        page, _ = self.mmu.fetch(rip, mode.user)
        own = self._pages.get(page)
        if own is not None and (found := own.decoded.get((rip, mode.bits))) is not None:
            return found
        code, second = self.code_at(mode, rip, page)
        instruction = Decoder(mode.bits, code[:15], ip=rip).decode()
        if own is not None and not second:
            own.decoded[rip, mode.bits] = instruction
        return instruction

    def _own(self, page: int) -> _Page:
        own = self._pages.get(page)
        if own is None:
            own = self._pages[page] = _Page()
            if self.mmu.memory.is_ram(page, 0x1000):
                self._purge_writes(self.mmu.memory.base + page)
        return own

    def _mark(self, page: int, start: int, end: int) -> None:
        """Note that code was translated from bytes [start, end) of a page."""
        if self.mmu.memory.is_ram(page, 0x1000):
            lines = (1 << ((end - 1) >> 6) + 1) - (1 << (start >> 6))
            self.mmu.code_lines[page >> 12] |= lines

    def _add(self, block: Block) -> None:
        self._starts.append(block.checked)
        self._in_order.append(block)

    def at_host(self, address: int) -> Block | None:
        """The block whose code holds host `address`."""
        from bisect import bisect_right

        offset = address - self.cache.base
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or offset >= self._in_order[index].end:
            return None
        return self._in_order[index]

    # -- forgetting -----------------------------------------------------------------------------------------

    def written(self, address: int, length: int) -> None:
        """Physical [address, address + length) is about to change: forget what was made from it."""
        for page in range(address & ~0xFFF, address + length, 0x1000):
            own = self._pages.get(page)
            if own is not None:
                self._written_page(page, own, max(address, page), min(address + length, page + 0x1000))

    def _written_page(self, page: int, own: _Page, start: int, end: int) -> None:
        only_blocks = not own.steps
        own.steps.clear()
        own.decoded.clear()
        start -= page
        end -= page
        hit = [block for first, last, block in own.blocks if first < end and last > start]
        if not hit and own.blocks and only_blocks:
            return
        own.blocks = [entry for entry in own.blocks if entry[0] >= end or entry[1] <= start]
        for block in hit:
            self._forget(block)
        lines = 0
        for first, last, _ in own.blocks:
            lines |= (2 << (last - 1 >> 6)) - (1 << (first >> 6))
        self.mmu.code_lines[page >> 12] = lines
        if not lines:
            del self._pages[page]

    def forget_page(self, page: int) -> None:
        """The whole page is about to be overwritten."""
        self.written(page, 0x1000)

    def _forget(self, block: Block) -> None:
        if block.dead:
            return
        block.dead = True
        self.invalidated += 1
        self._blocks.pop((block.rip, block.key), None)
        self.translator.disconnect(block)
        if block.crosses:  # its other page still has it
            for page in (block.key & ~0xFFF, block.second):
                own = self._pages.get(page)
                if own is not None:
                    own.blocks = [entry for entry in own.blocks if entry[2] is not block]
        words = self.core.words
        at = _place(block.rip)
        if words[at] == block.rip:
            words[at + 1] = 0xFFF
        entry = self.cache.base + block.checked
        for table in _JUMP_CACHES:
            slot = table + (block.rip & 0xFFFF)
            if words[slot] == entry:
                words[slot] = self.lookup

    def flush(self) -> None:
        """Forget everything, because the code cache is full."""
        self.flushes += 1
        for page in self._pages:
            if self.mmu.memory.is_ram(page, 0x1000):
                self.mmu.code_lines[page >> 12] = 0
        self._blocks.clear()
        self._pages.clear()
        self._starts.clear()
        self._in_order.clear()
        self.translator.links.clear()
        self.cache.used = self._helpers_end
        self.clear_table()
        self._forget_jumps()

    def clear_table(self) -> None:
        """Empty the native block table."""
        start, size = OFFSETS["BLOCK_TABLE"], BLOCK_TABLE_ENTRIES * BLOCK_TABLE_ENTRY_SIZE
        ctypes.memset(self.core.address + start, 0, size)
        # Zeros are an entry for address 0 of page 0, which has its place in the first one.
        self.core.words[_TABLE + 1] = 0xFFF
