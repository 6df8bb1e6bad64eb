"""Which blocks are worth a better translation: found by looking now and then where the code is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trivisor.translation.block_store import BlockStore
from trivisor.translation.block_tables import Block, BlockTables
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
        self._found_at: dict[tuple[int, int], int] = {}
        """Samples by block key and the linear address of the segment of a trace, or of the block."""
        self._sites: dict[int, list[tuple[int, int]]] = {}
        """Of tuned blocks: (offset of the instruction, site cache)."""
        self._paths: dict[int, tuple[int, ...]] = {}
        """Of tuned blocks: where the segments of their traces begin."""

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
                self._found(block, address)

    def _found(self, block: Block, address: int) -> None:
        """The block was found running at this host address."""
        self._notice_flush()
        mode = self._modes.get(block.key & 0xFFF)
        if mode is None or mode.bits != 64:  # plain ones are among those that are no mode
            return
        number = block.number
        heat = self._heat[number] = self._heat.get(number, 0) + 1
        path = self._paths.get(number, (block.rip,))
        rip, _ = self._blocks.locate(block, address)
        place = block.key, path[bisect_right(path, rip) - 1]
        self._found_at[place] = self._found_at.get(place, 0) + 1
        scattered = self._note_scattered(block)
        if heat >= _HOT and (scattered or heat & (heat - 1) == 0):
            self.tune(block, mode, anew=scattered)

    def _notice_flush(self) -> None:
        """Block numbers begin anew when the code cache was full."""
        if self._flushes != self._blocks.flushes:
            self._flushes = self._blocks.flushes
            for table in (self._heat, self._found_at, self._sites, self._paths):
                table.clear()

    def _note_scattered(self, block: Block) -> bool:
        """Whether some of the block's site caches miss too often; begins to count anew."""
        found = False
        sites = self._sites.get(block.number, ())
        for offset, site in sites:
            if self._misses[_SITE_MISSES + site] >= _SCATTERED:
                if len(self._scattered) >= _MOST_SCATTERED:
                    self._scattered.clear()
                self._scattered.add(block.rip + offset)
                found = True
        for _, site in sites:
            self._misses[_SITE_MISSES + site] = 0
        return found

    def tune(self, block: Block, mode: Mode, *, anew: bool = False) -> None:
        """Have the block made anew, as the trace that it begins, or the loop around it.

        That is done if there is anything better, or if `anew` is wanted.
        """
        path, way, known = self._trace(block, mode)
        if way is not None and way < block.rip and known.get(way):
            head = Block(self._blocks.tables, known[way])
            whole, _, _ = self._trace(head, mode)
            if block.rip in whole:
                block, path = head, whole
        if path == self._paths.get(block.number) and not anew:
            return
        made = self._blocks.tune(block, mode, path, self._scattered)
        if made is None:
            return
        tuned, self._sites[tuned.number] = made
        self._paths[tuned.number] = path
        self._heat[tuned.number] = self._heat.get(block.number, 0)

    def traces(self) -> list[tuple[int, ...]]:
        """Where the segments of the traces that there are begin."""
        tables = self._blocks.tables
        return [path for number, path in self._paths.items() if not Block(tables, number).dead]

    def _trace(self, block: Block, mode: Mode) -> tuple[tuple[int, ...], int | None, dict[int, int]]:
        """The trace from a block, where it goes on, and what the evidence knew."""
        evidence = _Evidence(self._blocks.tables, block, self._paths, self._found_at)
        path, way = self._blocks.trace(block, mode, evidence)
        return path, way, evidence.known


class _Evidence:
    """Which ways code takes from a block on: those that were ever taken, and of these the ones found running most."""

    def __init__(
        self,
        tables: BlockTables,
        block: Block,
        paths: Mapping[int, tuple[int, ...]],
        found_at: Mapping[tuple[int, int], int],
    ) -> None:
        """`paths`, `found_at`: as the tuner has them."""
        self._tables = tables
        self._key = block.key
        self._paths = paths
        self._found_at = found_at
        self.known: dict[int, int] = {}
        """Linear addresses that were gone to, and the blocks there (0 where only a trace goes through)."""
        self._take(block)

    def _take(self, block: Block) -> None:
        """Know what the block's links and trace tell."""
        for start in self._paths.get(block.number, ())[1:]:
            self.known.setdefault(start, 0)
        self.known.update(self._tables.linked(block))

    def __call__(self, ways: tuple[int, ...]) -> int | None:
        """See `traces.Judge`."""
        taken = [(self._found_at.get((self._key, way), 0), way == ways[-1], way) for way in ways if way in self.known]
        if not taken:
            return None
        heat, _, way = max(taken)
        if len(taken) > 1 and not heat:
            return None
        if self.known[way]:
            self._take(Block(self._tables, self.known[way]))
        return way
