"""The helpers' assembly, put together of its parts: imported only where it is to be assembled."""

from __future__ import annotations

from trivisor.translation.block_tables import TABLE_SYMBOLS
from trivisor.translation.layout import SYMBOLS
from trivisor.translation.natives import (
    alarm,
    apic,
    assists,
    blocks,
    compose,
    entry,
    events,
    flush,
    lookup,
    miss,
    supervised,
    walk,
)
from trivisor.translation.natives.common import CONSTANTS
from trivisor.translation.shapes import SHAPE_SYMBOLS


def helpers_source(xsave_mask: int, supervision: str) -> tuple[str, dict[str, int]]:
    """The text and its symbols; see `assembled_helpers`."""
    source = "\n".join(
        (
            CONSTANTS,
            entry.ENTER_LEAVE,
            lookup.LOOKUP,
            blocks.BLOCKS,
            compose.COMPOSE,
            walk.WALK,
            walk.FILL_TLB,
            walk.WALK_FOR_PYTHON,
            miss.MISS,
            events.EVENTS,
            assists.ASSISTS,
            apic.APIC,
            alarm.ALARM,
            supervised.SUPERVISED,
            supervision or supervised.NONE,
            flush.C_FUNCTIONS,
            flush.JUMP_FLUSHES,
        )
    )
    source = source.replace("RESTORE_FPU", "xrstor" if xsave_mask else "fxrstor")
    source = source.replace("SAVE_FPU", "xsave" if xsave_mask else "fxsave")
    source = source.replace("CLEAN_UPPER", "vzeroupper" if xsave_mask & 4 else "")
    return source, {**SYMBOLS, **TABLE_SYMBOLS, **SHAPE_SYMBOLS, "XSAVE_MASK": xsave_mask or 3}
