"""Which blocks are worth a better translation: found by looking now and then where the code is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivisor.translation.block_store import BlockStore
from trivisor.translation.block_tables import Block
from trivisor.translation.core import Core
from trivisor.translation.host_signals import Sampler
from trivisor.translation.layout import OFFSETS

if TYPE_CHECKING:
    from trivisor.translation.modes import Mode

PERIOD = 1_000_000
"""Nanoseconds between samples."""
_HOT = 2
"""Samples that make a block hot."""
_SCATTERED = 1 << 14
"""Misses of a site cache between two looks that cost more than the TLB's plain check would."""
_MOST_SCATTERED = 1 << 16

_COUNT, _SAMPLES = OFFSETS["SAMPLE_COUNT"] // 8, OFFSETS["SAMPLES"] // 8
_SITE_MISSES = OFFSETS["SITE_MISSES"] // 4


class Tuner:
    """Has blocks that are found running again and again made anew (`translator/tuned.py`)."""

    def __init__(self, core: Core, blocks: BlockStore, modes: dict[int, Mode]) -> None:
        """`modes`: by key."""
        self._blocks = blocks
        self._modes = modes
        self._words = core.words
        self._misses = core.bytes.cast("I")
        self._state = core.address
        self._sampler: Sampler | None = None
        self._running = False
        self._scattered: set[int] = set()
        """Linear addresses of instructions whose site caches missed too often."""
        self._flushes = 0
        self._heat: dict[int, int] = {}
        """Samples by block number."""
        self._sites: dict[int, list[tuple[int, int]]] = {}
        """Of tuned blocks: (offset of the instruction, site cache)."""

    def start(self) -> None:
        """Sample the calling thread, until `stop`."""
        if self._sampler is None:
            self._sampler = Sampler(self._state)
        self._running = True
        self._sampler.every(PERIOD)

    def stop(self) -> None:
        """Sample no more."""
        self._running = False
        self.pause()

    def pause(self) -> None:
        """Let no samples wake the thread, until `go_on`."""
        if self._sampler is not None:
            self._sampler.every(0)

    def go_on(self) -> None:
        """The end of a pause; does nothing where nothing was sampled before."""
        if self._running and self._sampler is not None:
            self._sampler.every(PERIOD)

    def close(self) -> None:
        """Give the host's timer back."""
        self._misses.release()
        if self._sampler is not None:
            self._sampler.close()

    def look(self) -> None:
        """Act on the samples that were taken."""
        words = self._words
        count = words[_COUNT]
        samples = [words[_SAMPLES + i] for i in range(count)]
        words[_COUNT] = 0
        for address in samples:
            block = self._blocks.at_host(address)
            if block is not None and not block.dead:
                self._found(block)

    def _found(self, block: Block) -> None:
        """The block was found running."""
        self._notice_flush()
        number = block.number
        heat = self._heat[number] = self._heat.get(number, 0) + 1
        sites = self._sites.get(number)
        if sites is not None:
            if self._note_scattered(block, sites):
                self.tune(block)
        elif heat == _HOT:
            self.tune(block)

    def _notice_flush(self) -> None:
        """Block numbers begin anew when the code cache was full."""
        if self._flushes != self._blocks.flushes:
            self._flushes = self._blocks.flushes
            self._heat.clear()
            self._sites.clear()

    def _note_scattered(self, block: Block, sites: list[tuple[int, int]]) -> bool:
        """Whether some of the block's site caches miss too often; begins to count anew."""
        found = False
        for offset, site in sites:
            if self._misses[_SITE_MISSES + site] >= _SCATTERED:
                if len(self._scattered) >= _MOST_SCATTERED:
                    self._scattered.clear()
                self._scattered.add(block.rip + offset)
                found = True
        for _, site in sites:
            self._misses[_SITE_MISSES + site] = 0
        return found

    def tune(self, block: Block) -> Block:
        """The block made anew, or itself if that would not be better."""
        key = block.key & 0xFFF
        mode = self._modes.get(key)
        if mode is None or mode.bits != 64:  # plain ones are among those that are no mode
            return block
        made = self._blocks.tune(mode, block, self._scattered)
        if made is None:
            return block
        tuned, sites = made
        self._sites[tuned.number] = sites
        self._heat[tuned.number] = _HOT
        return tuned
