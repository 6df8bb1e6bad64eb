"""The frame table: who owns each machine frame, what it is used as, and how often (Xen's struct page_info).

A frame's **kind** is what it is used as: a page table of one level, a page of
segment descriptors, or writable memory.  It can change only while nothing
uses it as that (its kind count is 0), so a frame that is a page table has no
writable mapping, and the other way round.  References count every use.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

from trivisor.machine.memory import PAGE_SIZE, GuestMemory
from trivisor.paravirt.xen.abi import EBUSY, EINVAL, ENOMEM, EPERM
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.shared_table import INDEX, SharedTable, SharedWord, host_address

NOBODY, XEN, DOMAIN = range(3)
"""Owners.  A frame of Xen's that the domain may map is `DOMAIN`'s too, with a kind that never goes away."""

NONE, L1, L2, L3, L4, DESCRIPTORS, WRITABLE = range(7)
"""Kinds; those of page tables are their levels."""

_ADDRESS = (1 << 59) - 4096
_PRESENT_WRITABLE = 3
_OF_RUNS = 0x9B
"""Bits of level-1 entries that must be as in _PRESENT_WRITABLE: the user's, accessed and dirty bits may be either."""


def split(runs: list[range], count: int) -> tuple[list[range], list[range]]:
    """The first `count` frames of some runs, and the rest."""
    taken, rest = [], []
    for run in runs:
        taken.append(run[:count])
        rest.append(run[count:])
        count -= len(taken[-1])
    return list(filter(None, taken)), list(filter(None, rest))


def numbers(count: int) -> memoryview:
    """0, 1, 2 and so on as 64-bit words; by their bytes, since `array("Q", range(count))` takes ten times as long."""
    assert count <= 1 << 24
    words = bytearray(8 * count)
    for place in range(3):
        length = 256**place
        pattern = b"".join(bytes([value]) * length for value in range(min(256, -(-count // length))))
        words[place::8] = (pattern * -(-count // len(pattern)))[:count]
    return memoryview(words).cast("Q")


def _one_more(counts: array[int]) -> array[int]:
    if counts.count(counts[0]) == len(counts):
        return array("L", [counts[0] + 1]) * len(counts)
    return array("L", [count + 1 for count in counts])


class Frames:
    """The frames of one machine, by number."""

    epoch = SharedWord("EPOCH")
    """Counts flushes of the TLBs."""
    owned = SharedWord("OWNED")
    """How many frames the domain has."""
    free = SharedWord("FREE_COUNT")
    """How many frames can still be allocated."""

    def __init__(self, memory: GuestMemory, table: SharedTable) -> None:
        self.memory = memory
        self.table = table
        self.count = memory.span // PAGE_SIZE
        """One more than the highest frame number; frames in the hole below 4 GiB are nobody's."""
        self.owner = bytearray(self.count)
        self.kind = bytearray(self.count)
        self.kind_count = array("L", [0]) * self.count
        self.references = array("L", [0]) * self.count
        self.pinned = bytearray(self.count)
        self.words = memory.view.cast("Q")
        """The machine's memory in 64-bit words: frame number times 512 and the word in it."""
        self._free = array("L", [0]) * self.count
        """The first `free` of them are free frames; the last of these is allocated next."""
        self._allocated = bytearray(self.count)
        """Frames that the domain has not given back; it may have given back some that are still in use."""
        self._writable_until = array("L", [0]) * self.count
        self.epoch = 1
        columns = {
            "OWNER": self.owner, "KIND": self.kind, "KIND_COUNT": self.kind_count, "REFERENCES": self.references,
            "WRITABLE_UNTIL": self._writable_until, "PINNED": self.pinned, "FREE": self._free,
        }  # fmt: skip
        for name, column in columns.items():
            table.words[INDEX[f"FRAME_{name}"]] = host_address(column)
        table.words[INDEX["FRAME_COUNT"]] = self.count

    def give_free(self, frames: list[range]) -> None:
        """These runs are free from now on, and nothing else; the first frame is allocated first."""
        free = array("L", chain.from_iterable(reversed(run) for run in reversed(frames)))
        self._free[: len(free)] = free
        self.free = len(free)

    def free_frames(self) -> list[int]:
        """Those that can still be allocated; the last is allocated next."""
        return self._free[: self.free].tolist()

    def allocate(self) -> int:
        """A free frame becomes the domain's, with one reference; ENOMEM when there is none."""
        if not self.free:
            raise HypercallError(ENOMEM)
        self.free -= 1
        frame = self._free[self.free]
        self.owner[frame] = DOMAIN
        self.references[frame] = 1
        self._allocated[frame] = 1
        self.owned += 1
        return frame

    def hand_over(self, frames: Iterable[range]) -> None:
        """These runs become the domain's, each frame with one reference; they are nobody's, and not free either."""
        for run in frames:
            first, end, length = run.start, run.stop, len(run)
            self.owner[first:end] = bytes([DOMAIN]) * length
            self.references[first:end] = array("L", [1]) * length
            self._allocated[first:end] = b"\1" * length
            self.owned += length

    # -- what a snapshot keeps: who has which frame; all uses follow from the page tables -------------------

    def holdings(self, first: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Of frames from `first` on: (runs that the domain has, what of them it has given back but still uses)."""
        found = re.finditer(bytes([DOMAIN]) + b"+", self.owner[first:])
        owned = [(first + run.start(), run.end() - run.start()) for run in found]
        given_back = [
            frame
            for start, length in owned
            if self._allocated.count(1, start, start + length) != length
            for frame in range(start, start + length)
            if not self._allocated[frame]
        ]
        return owned, given_back

    def take_over(self, ram: Iterable[range], held: Iterable[tuple[int, int]], given_back: list[int]) -> None:
        """Have runs (first, length) of `ram` be the domain's, some of them given back already, and the rest free.

        Those have no reference until something uses them: `check_held` tells.  ValueError for frames outside of `ram`.
        """
        free = bytearray(self.count)
        for run in ram:
            free[run.start : run.stop] = b"\1" * len(run)
        for first, length in held:
            end = first + length
            if not length or end > self.count or free.count(1, first, end) != length:
                raise ValueError(f"frames {first:#x} to {end:#x} are not free")
            free[first:end] = bytes(length)
            self.hand_over([range(first, end)])
        self.give_free([range(*found.span()) for found in re.finditer(rb"\x01+", free)])
        for frame in given_back:
            if frame >= self.count or not self._allocated[frame]:
                raise ValueError(f"frame {frame:#x} cannot have been given back")
            self._allocated[frame] = 0
            self.references[frame] = 0

    def check_held(self, given_back: list[int]) -> None:
        """ValueError unless all these are in use."""
        if not all(self.references[frame] for frame in given_back):
            raise ValueError("a frame that nothing uses is the domain's")

    def share(self, frame: int, *, writable: bool) -> None:
        """A frame of Xen's that the domain may map, read-only or writable, but never use as something else."""
        self.owner[frame] = DOMAIN
        self.references[frame] = 1
        self.kind[frame] = WRITABLE if writable else NONE
        self.kind_count[frame] = 1

    def unshare(self, frames: Sequence[int]) -> None:
        """What `share` shared is Xen's alone again; EBUSY, and nothing has changed, while the domain uses any of it."""
        if any(self.references[frame] != 1 for frame in frames):
            raise HypercallError(EBUSY, "a shared frame is in use")
        for frame in frames:
            self.owner[frame] = XEN
            self.references[frame] = self.kind_count[frame] = 0
            self.kind[frame] = NONE

    def hold(self, frame: int, *, writable: bool) -> None:
        """Use a frame of the domain's, which stays its, and writable memory if `writable`, until `let_go`.

        EPERM if it is not the domain's, EINVAL while it is a page table or descriptors; then nothing has changed.
        """
        self.get(frame)
        if writable:
            try:
                self.get_writable(frame)
            except HypercallError:
                self.put(frame)
                raise

    def let_go(self, frame: int, *, writable: bool) -> None:
        """What `hold` held is used no more."""
        if writable:
            self.put_writable(frame)
        self.put(frame)

    def owns(self, frame: int) -> bool:
        """Whether the domain owns a frame, or Xen shares it with the domain."""
        return frame < self.count and self.owner[frame] == DOMAIN

    def get(self, frame: int) -> None:
        """Take a reference; EPERM for a frame that is not the domain's."""
        if frame >= self.count or self.owner[frame] != DOMAIN:
            raise HypercallError(EPERM, f"frame {frame:#x} is not the domain's")
        self.references[frame] += 1

    def put(self, frame: int) -> None:
        """Give a reference back; without any the frame is free."""
        left = self.references[frame] - 1
        self.references[frame] = left
        if left == 0:
            self.owner[frame] = NOBODY
            self.owned -= 1
            self._free[self.free] = frame
            self.free += 1

    def release(self, frame: int) -> None:
        """The domain gives a frame back: EBUSY while it is a page table, EPERM if it is not the domain's to give."""
        if not self.owns(frame) or not self._allocated[frame]:
            raise HypercallError(EPERM)
        if self.pinned[frame] or (self.kind_count[frame] and self.kind[frame] != WRITABLE):
            raise HypercallError(EBUSY)
        self._allocated[frame] = 0
        self.put(frame)

    def get_writable(self, frame: int) -> None:
        """Use it as writable memory; EINVAL while it is a page table or descriptors."""
        kind = self.kind
        if self.kind_count[frame]:
            if kind[frame] != WRITABLE:
                raise HypercallError(EINVAL, f"frame {frame:#x} is in use as kind {kind[frame]}")
        else:
            kind[frame] = WRITABLE
        self.kind_count[frame] += 1

    def put_writable(self, frame: int, *, stale: bool = True) -> None:
        """One use as writable memory less; `stale` unless no TLB can have it."""
        left = self.kind_count[frame] - 1
        self.kind_count[frame] = left
        if left == 0:
            self.kind[frame] = NONE
        if stale:
            self._writable_until[frame] = self.epoch

    def take_run(self, entries: list[int]) -> bool:
        """References for a whole level-1 table that maps frames in a row, all writable; False if it is not one.

        So are most tables of a kernel's mapping of all memory; each entry by itself takes ten times as long.
        """
        start = entries[0]
        first, flags = (start & _ADDRESS) >> 12, start & 0xFFF
        end = first + len(entries)
        if flags & _OF_RUNS != _PRESENT_WRITABLE or end > self.count:
            return False
        if entries != list(range(start, start + len(entries) * PAGE_SIZE, PAGE_SIZE)):
            return False
        counts, kinds = self.kind_count[first:end], self.kind[first:end]
        usable = kinds.count(WRITABLE) == len(entries) or not any(counts)
        if not usable:
            usable = all(kind == WRITABLE or not count for kind, count in zip(kinds, counts, strict=True))
        if not usable or self.owner.count(DOMAIN, first, end) != len(entries):
            return False
        self.kind[first:end] = bytes([WRITABLE]) * len(entries)
        self.kind_count[first:end] = _one_more(counts)
        self.references[first:end] = _one_more(self.references[first:end])
        return True

    def may_be_written_stale(self, frame: int) -> bool:
        """Whether a TLB may still hold a writable mapping of it that is gone from the page tables."""
        return self._writable_until[frame] == self.epoch
