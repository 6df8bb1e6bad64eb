"""Page tables as Xen checks them: a guest reads them as it likes, and writes them through here alone.

An entry may lead to what the domain owns and to nothing else, to memory that
is not a page table if it makes it writable, and to a page table of the level
below if it is one of a table (Xen, arch/x86/mm.c, "page types").
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from trivisor.paravirt.xen.abi import EINVAL, EPERM, FIRST_XEN_SLOT, LAST_XEN_SLOT
from trivisor.paravirt.xen.descriptors import check_descriptor
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.frames import DESCRIPTORS, DOMAIN, L1, L4, NONE, WRITABLE, Frames
from trivisor.paravirt.xen.shared_table import INDEX

PRESENT, WRITE, USER, ACCESSED, DIRTY, LARGE, NO_EXECUTE = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ADDRESS = (1 << 52) - 4096
FORBIDDEN_L1 = 0x98 | (1 << 63) - (1 << 59)
"""In entries of level 1: PWT, PCD, PAT and the bits of protection keys; the global bit is allowed."""
FORBIDDEN = FORBIDDEN_L1 | 0x100
"""In entries of the other levels: large pages and the global bit too."""
_ENTRIES = 512
TABLES_AT_A_TIME = 1024
"""Tables that a hypercall validates or gives up, about, before the guest may be interrupted."""
_STALE, _TABLES = INDEX["STALE"], INDEX["TABLES"]
LINGERING = (INDEX["LINGERING_KERNEL"], INDEX["LINGERING_USER"])
"""Words of the shared table."""


def entry_frame(entry: int) -> int:
    """The frame that an entry leads to."""
    return (entry & ADDRESS) >> 12


class PageTables:
    """Validation and changes of page tables over a frame table.

    `xen_slots` are Xen's entries of every level-4 table.  `flush` empties the
    TLBs, `changed` is told of frames whose content is no longer what it was
    as memory, and `entry_changed` is `DeprivilegedCpu.entry_changed`.
    """

    def __init__(
        self,
        frames: Frames,
        xen_slots: list[int],
        flush: Callable[[], None],
        changed: Callable[[int], None],
        entry_changed: Callable[[int, int, int, int], bool],
    ) -> None:
        self._entry_changed = entry_changed
        self._frames = frames
        self._words = frames.words
        self._xen_slots = xen_slots
        self._flush = flush
        self._changed = changed

    # -- lingering tables -----------------------------------------------------------------------------------

    def drop_lingering(self) -> None:
        """Give up what is only kept validated in case that the guest comes back to it.

        Native code keeps a level-4 table so that was not pinned when the processor left it (Linux goes to one and
        back for each patch of its code).  Nobody can tell, since this is called before anything looks at kinds.
        """
        words = self._frames.table.words
        for place in LINGERING:
            if frame := words[place]:
                words[place] = 0
                self.put_kind(frame)

    # -- how long a hypercall may take -----------------------------------------------------------------------

    @property
    def gives_way(self) -> bool:
        """Whether the hypercall has looked through so many tables that what is left of it can wait."""
        return self._frames.table.words[_TABLES] >= TABLES_AT_A_TIME

    def begin(self) -> None:
        """What comes belongs to another hypercall."""
        self._frames.table.words[_TABLES] = 0

    # -- uses of frames -------------------------------------------------------------------------------------

    def get_kind(self, frame: int, kind: int) -> None:
        """Take a reference to `frame` as a page table or as descriptors, checking its content if it was not yet.

        EPERM if it is not the domain's, EINVAL if it is in use as something
        else or its content is not fit; then nothing has changed.
        """
        frames = self._frames
        frames.get(frame)
        if frames.kind_count[frame]:
            if frames.kind[frame] != kind:
                frames.put(frame)
                raise HypercallError(EINVAL, f"frame {frame:#x} is in use as kind {frames.kind[frame]}")
            frames.kind_count[frame] += 1
            return
        try:
            self._validate(frame, kind)
        except HypercallError:
            frames.put(frame)
            raise

    def put_kind(self, frame: int) -> None:
        """Give such a reference back."""
        frames = self._frames
        left = frames.kind_count[frame] - 1
        frames.kind_count[frame] = left
        if left == 0:
            frames.table.words[_TABLES] += 1
            kind = frames.kind[frame]
            frames.kind[frame] = NONE
            if kind == L1:
                self._put_entries_l1(frame, _ENTRIES)
            elif kind <= L4:
                self._put_entries(frame, kind, _ENTRIES)
        frames.put(frame)

    def _validate(self, frame: int, kind: int) -> None:
        frames = self._frames
        frames.table.words[_TABLES] += 1
        if frames.may_be_written_stale(frame):
            self._flush()
        # It counts as what it becomes while its entries are looked at, so that they cannot make it writable.
        frames.kind[frame] = kind
        frames.kind_count[frame] = 1
        try:
            if kind == L1:
                self._get_entries_l1(frame)
            elif kind == DESCRIPTORS:
                self._check_descriptors(frame)
            else:
                self._get_entries(frame, kind)
        except HypercallError:
            frames.kind[frame] = NONE
            frames.kind_count[frame] = 0
            raise
        self._changed(frame)

    def _get_entries_l1(self, frame: int) -> None:
        words, first = self._words, frame * _ENTRIES
        frames = self._frames
        entries = words[first : first + _ENTRIES].tolist()
        if frames.take_run(entries):
            if not entries[0] & USER:
                words[first : first + _ENTRIES] = array("Q", [entry | USER for entry in entries])
            return
        owner, kinds, counts, references = frames.owner, frames.kind, frames.kind_count, frames.references
        limit = frames.count
        for at, entry in enumerate(entries):
            if not entry & PRESENT:
                continue
            target = (entry & ADDRESS) >> 12
            ok = not entry & FORBIDDEN_L1 and target < limit and owner[target] == DOMAIN
            if ok and entry & WRITE:
                if not counts[target]:
                    kinds[target] = WRITABLE
                    counts[target] = 1
                elif kinds[target] == WRITABLE:
                    counts[target] += 1
                else:
                    ok = False
            if not ok:
                self._put_entries_l1(frame, at)
                raise HypercallError(EINVAL, f"entry {at} of frame {frame:#x} is {entry:#x}")
            references[target] += 1
            if not entry & USER:
                words[first + at] = entry | USER

    def _put_entries_l1(self, frame: int, number: int) -> None:
        first = frame * _ENTRIES
        put = self._put_l1
        for entry in self._words[first : first + number].tolist():
            if entry & PRESENT:
                put(entry)

    def _get_entries(self, frame: int, level: int) -> None:
        words, first = self._words, frame * _ENTRIES
        for at, entry in enumerate(words[first : first + _ENTRIES].tolist()):
            if level == L4 and FIRST_XEN_SLOT <= at <= LAST_XEN_SLOT:
                words[first + at] = self._xen_slots[at - FIRST_XEN_SLOT]
                continue
            if not entry & PRESENT:
                continue
            try:
                self._get_table(entry, level)
            except HypercallError:
                self._put_entries(frame, level, at)
                raise
            words[first + at] = entry | USER

    def _put_entries(self, frame: int, level: int, number: int) -> None:
        first = frame * _ENTRIES
        for at, entry in enumerate(self._words[first : first + number].tolist()):
            if entry & PRESENT and not (level == L4 and FIRST_XEN_SLOT <= at <= LAST_XEN_SLOT):
                self.put_kind(entry_frame(entry))

    def _check_descriptors(self, frame: int) -> None:
        words, first = self._words, frame * _ENTRIES
        checked = [check_descriptor(raw) for raw in words[first : first + _ENTRIES].tolist()]
        for at, raw in enumerate(checked):
            words[first + at] = raw

    # -- single entries -------------------------------------------------------------------------------------

    def _get_l1(self, entry: int) -> None:
        """References for a present entry of level 1."""
        if entry & FORBIDDEN_L1:
            raise HypercallError(EINVAL, f"entry {entry:#x} has bits that it may not")
        target = entry_frame(entry)
        frames = self._frames
        frames.get(target)
        if entry & WRITE:
            try:
                frames.get_writable(target)
            except HypercallError:
                frames.put(target)
                raise

    def _put_l1(self, entry: int, stale: bool = True) -> None:
        target = (entry & ADDRESS) >> 12
        frames = self._frames
        if entry & WRITE:
            frames.put_writable(target, stale=stale)
        frames.put(target)

    def _get_table(self, entry: int, level: int) -> None:
        """References for a present entry of a level above 1."""
        if entry & FORBIDDEN:
            raise HypercallError(EINVAL, f"entry {entry:#x} of level {level} has bits that it may not")
        self.get_kind(entry_frame(entry), level - 1)

    def change(self, table: int, index: int, new: int, *, preserve: bool = False) -> None:
        """Write entry `index` of `table`, a validated page table; `preserve` keeps accessed and dirty bits.

        EINVAL or EPERM for an entry that the domain may not have, and nothing has changed.
        """
        level = self._frames.kind[table]
        if level == L4 and FIRST_XEN_SLOT <= index <= LAST_XEN_SLOT:
            raise HypercallError(EINVAL, "that entry is Xen's")
        words, at = self._words, table * _ENTRIES + index
        old = words[at]
        same = False
        if new & PRESENT:
            new |= USER
            mask = ADDRESS | PRESENT | (WRITE if level == L1 else 0)
            same = not (old ^ new) & mask
            if same:
                if new & (FORBIDDEN_L1 if level == L1 else FORBIDDEN):
                    raise HypercallError(EINVAL)
            elif level == L1:
                self._get_l1(new)
            else:
                self._get_table(new, level)
        if preserve:
            new |= words[at] & (ACCESSED | DIRTY)
        words[at] = new
        if not old & PRESENT:
            return
        stale = self._entry_changed(at * 8, level, old, new)
        if stale:
            self._frames.table.words[_STALE] = 1
        if not same:
            if level == L1:
                self._put_l1(old, stale)
            else:
                self.put_kind(entry_frame(old))

    # -- pinning --------------------------------------------------------------------------------------------

    def pin(self, frame: int, level: int) -> None:
        """Keep a page table validated though nothing may use it; EINVAL if it is pinned already."""
        self.get_kind(frame, level)
        if self._frames.pinned[frame]:
            self.put_kind(frame)
            raise HypercallError(EINVAL, f"frame {frame:#x} is pinned already")
        self._frames.pinned[frame] = 1

    def unpin(self, frame: int) -> None:
        """Undo `pin`; EPERM, EINVAL for a frame that is not."""
        if not self._frames.owns(frame):
            raise HypercallError(EPERM)
        if not self._frames.pinned[frame]:
            raise HypercallError(EINVAL, f"frame {frame:#x} is not pinned")
        self._frames.pinned[frame] = 0
        self.put_kind(frame)
