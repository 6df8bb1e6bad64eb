"""What translated code must know of segment registers outside 64-bit mode (Intel SDM 3A 5.3 to 5.5; 3B 20.1).

Accesses by a segment that is not flat are held against a window in the state
block: the first offset that may be accessed, the last that may be read and the
last that may be written.  A segment that expands down begins above its limit;
one that may not be read or written at all has a last offset of -1.
"""

from __future__ import annotations

from functools import lru_cache

from trivisor.translation.core import CS, DS, ES, MASK64, SS, Core
from trivisor.translation.layout import OFFSETS, SEGMENT_ORDER
from trivisor.translation.modes import FLAT_LIMIT, Segmentation
from trivisor.x86.control import CR0_PE
from trivisor.x86.descriptors import (
    DB,
    PRESENT,
    TYPE_CODE,
    TYPE_EXPAND_DOWN,
    TYPE_READABLE,
    TYPE_WRITABLE,
)
from trivisor.x86.flags import VM

_WINDOWS = [OFFSETS[f"{name}_FIRST"] // 8 for name in SEGMENT_ORDER[:6]]
_DATA = ((ES, "ES"), (SS, "SS"), (DS, "DS"))
_NONE = MASK64  # -1


@lru_cache(maxsize=1 << 12)
def window(limit: int, attributes: int, real: bool) -> tuple[int, int, int]:
    """(first, last to read, last to write) of a segment's offsets; `real`: types do not count."""
    first, last = 0, limit
    if attributes & (TYPE_CODE | TYPE_EXPAND_DOWN) == TYPE_EXPAND_DOWN:
        first, last = limit + 1, FLAT_LIMIT if attributes & DB else 0xFFFF
    if real:
        return first, last, last
    if not attributes & PRESENT:
        return first, _NONE, _NONE
    if attributes & TYPE_CODE:
        return first, last if attributes & TYPE_READABLE else _NONE, _NONE
    return first, last, last if attributes & TYPE_WRITABLE else _NONE


def set_windows(core: Core) -> None:
    """Bring the windows of all segment registers up to date."""
    real = not core.cr0 & CR0_PE
    words = core.words
    for at, view in zip(_WINDOWS, core.segments[:6], strict=True):
        words[at], words[at + 1], words[at + 2] = window(view.limit, view.attributes, real)


_FLAT_WINDOW = (0, FLAT_LIMIT, FLAT_LIMIT)


def segmentation(core: Core) -> Segmentation | None:
    """What of the segments 16- and 32-bit code depends on; None when it is all flat."""
    protected = bool(core.cr0 & CR0_PE)
    real = not protected or bool(core.rflags & VM)
    cs = core.segments[CS]
    checked = frozenset(
        name
        for index, name in _DATA
        if real or (view := core.segments[index]).base or window(view.limit, view.attributes, False) != _FLAT_WINDOW
    )
    if not checked and not cs.base and cs.limit == FLAT_LIMIT:
        return None
    return Segmentation(cs.base, cs.limit, checked, real)
