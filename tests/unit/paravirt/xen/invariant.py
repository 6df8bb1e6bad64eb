"""What holds of a domain's frames and page tables at every time."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.frames import L1, L4, WRITABLE, Frames

P, W, LARGE = 1, 2, 0x80
_ADDRESS = (1 << 52) - 4096


def entries(frames: Frames, table: int) -> list[int]:
    return frames.words[table * 512 : table * 512 + 512].tolist()


def check(guest: Any, held: Container[int] = ()) -> None:
    """The invariant, and that every count is what the tables in use make it; Xen itself writes to frames `held`."""
    frames = guest.frames
    kinds: dict[int, int] = {}
    writable: dict[int, int] = {}
    for table in range(frames.count):
        if not (L1 <= frames.kind[table] <= L4 and frames.kind_count[table]):
            continue
        level = frames.kind[table]
        for at, entry in enumerate(entries(frames, table)):
            if not entry & P or (level == L4 and abi.FIRST_XEN_SLOT <= at <= abi.LAST_XEN_SLOT):
                continue
            target = (entry & _ADDRESS) >> 12
            assert frames.owns(target), f"level {level} entry leads to {target:#x}, which is not the domain's"
            if level > 1:
                assert frames.kind[target] == level - 1 and not entry & LARGE
                kinds[target] = kinds.get(target, 0) + 1
            elif entry & W:
                assert frames.kind[target] == WRITABLE
                writable[target] = writable.get(target, 0) + 1
    for frame in range(frames.count):
        kind, count = frames.kind[frame], frames.kind_count[frame]
        if not count or frame < guest.domain.own.end:
            continue
        root = frame == guest.domain.state.kernel_root
        if L1 <= kind <= L4:
            assert count == kinds.get(frame, 0) + frames.pinned[frame] + root
        elif kind == WRITABLE:
            assert count == writable.get(frame, 0) + (frame in held)
