"""What holds of the translation engine's TLBs while a PV guest runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trivisor.paravirt.xen.frames import L1, L4, Frames
from trivisor.paravirt.xen.shared_table import INDEX
from trivisor.translation.layout import (
    DISTANT_SITES,
    EMPTY_SITE,
    EXEC_TLB_ENTRIES,
    EXEC_TLB_ENTRY_SIZE,
    OFFSETS,
    SITE_SIZE,
    SITES,
    TLB_ENTRIES,
    TLB_ENTRY_SIZE,
)

P, W = 1, 2
_ADDRESS = (1 << 52) - 4096
VIEWS = ("KERNEL", "USER")


def mapped(frames: Frames, root: int, linear: int) -> tuple[int, bool] | None:
    """(frame, writable) of what page tables map at a linear address."""
    table, rights = root >> 12, W
    for shift in (39, 30, 21, 12):
        entry = frames.words[table * 512 + (linear >> shift & 511)]
        if not entry & P:
            return None
        table, rights = (entry & _ADDRESS) >> 12, rights & entry
    return table, bool(rights & W)


def known(machine: Any, view: str) -> Iterator[tuple[int, int, bool]]:
    """(linear page, frame, writable) of what the data TLB of a view and its site caches have."""
    words, base = machine.vcpu.core.words, machine.vcpu.board.memory.base
    for number in range(TLB_ENTRIES):
        at = (OFFSETS[f"TLB_{view}"] + number * TLB_ENTRY_SIZE) // 8
        for tag in (words[at], words[at + 1]):
            if tag >> 12 & TLB_ENTRIES - 1 == number and not tag & 0xFFF:
                yield tag, words[at + 2] - base >> 12, tag == words[at + 1]
    for number in range(SITES):
        at = (OFFSETS[f"SITES_{view}"] + number * SITE_SIZE) // 8
        if words[at] != EMPTY_SITE:
            host = words[at + 1] + (words[at] if number < DISTANT_SITES else 0) & (1 << 64) - 1
            yield words[at], host - base >> 12, False


def fetched(machine: Any, view: str) -> Iterator[tuple[int, int]]:
    """(linear page, frame) of what the fetch TLB of a view has."""
    words = machine.vcpu.core.words
    for number in range(EXEC_TLB_ENTRIES):
        at = (OFFSETS[f"EXEC_TLB_{view}"] + number * EXEC_TLB_ENTRY_SIZE) // 8
        if not words[at] & 0xFFF:
            yield words[at], words[at + 1] >> 12


def check_tlbs(machine: Any) -> int:
    """No page table is writable; and unless TLBs may be stale they have nothing but what is mapped.  How much it is."""
    frames, words = machine.frames, machine.vcpu.core.words
    stale = machine.domain.table.words[INDEX["STALE"]]
    count = 0
    for view in VIEWS:
        root = words[OFFSETS[f"ROOT_{view}"] // 8]
        frame = root >> 12
        if frame >= frames.count or frames.kind[frame] != L4 or not frames.kind_count[frame]:
            continue  # it must be validated before anything runs in it again
        for linear, target, writable in known(machine, view):
            count += 1
            found = mapped(frames, root, linear)
            is_table = L1 <= frames.kind[target] <= L4 and frames.kind_count[target]
            assert not (writable and is_table), f"{linear:#x}: table {target:#x} can be written to"
            if not stale:
                assert found is not None and found[0] == target, f"{linear:#x}: {target:#x} but {found}"
                assert found[1] or not writable, f"{linear:#x}: writable"
        for linear, target in fetched(machine, view):
            found = mapped(frames, root, linear)
            assert stale or (found is not None and found[0] == target), f"{linear:#x}: code of {target:#x} but {found}"
    return count
