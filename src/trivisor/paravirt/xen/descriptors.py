"""Segment descriptors as a guest may have them: none that leads out of ring 3 (Xen, check_descriptor)."""

from __future__ import annotations

from trivisor.paravirt.xen.abi import EINVAL
from trivisor.paravirt.xen.errors import HypercallError

_PRESENT = 1 << 47
_NOT_SYSTEM = 1 << 44
_TYPE = 0xF << 40
_DPL = 3 << 45
_ACCESSED = 1 << 40


def check_descriptor(raw: int) -> int:
    """The 8 bytes of a descriptor as they may stand in a table: present segments get DPL 3 and are accessed.

    EINVAL for gates and other system descriptors, whose fields would not be checked when they are used.
    """
    if not raw & _PRESENT:
        return raw
    if raw & _NOT_SYSTEM:
        return raw | _DPL | _ACCESSED
    if raw & _TYPE == 0:  # the second half of something, or nothing
        return raw
    raise HypercallError(EINVAL, f"descriptor {raw:#018x} is none of a segment")
