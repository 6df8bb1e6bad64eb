"""What a snapshot keeps of a domain's use of its memory, and how the frame table comes of it again.

Neither kinds nor counts are kept: they follow from which frames are the domain's and which page tables it has
pinned or loaded, by the same validation that it passed when it first used them.  So a file can say what it
likes, and the domain still has nothing that no domain could have got by hypercalls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivisor.machine.memory import PAGE_SIZE
from trivisor.machine.saved_values import number, number_list, rows
from trivisor.machine.saving import Saved
from trivisor.paravirt.xen.abi import FIRST_RESERVED_GDT_ENTRY
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.frames import DESCRIPTORS, L1, L4

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain

_GDT_PAGES = FIRST_RESERVED_GDT_ENTRY // 512
_FRAME = 40
"""Bits of a frame's number."""


def save_memory(domain: Domain) -> Saved:
    """Which frames the domain has, and what holds page tables and descriptors."""
    domain.tables.drop_lingering()
    frames, state = domain.frames, domain.state
    owned, given_back = frames.holdings(domain.own.end)
    return {
        "owned": [[*run] for run in owned],
        "given_back": given_back,
        "pinned": [[frame, frames.kind[frame]] for frame, pinned in enumerate(frames.pinned) if pinned],
        "kernel_root": state.kernel_root,
        "user_root": state.user_root,
        "gdt": state.gdt_frames,
    }


def load_memory(domain: Domain, ram: list[range], saved: Saved, written: list[int]) -> None:
    """Into a domain that has nothing yet, but all its memory's content, and can have frames of `ram`.

    `written` are frames that Xen writes to.

    ValueError for what cannot be.
    """
    frames, tables, state, own = domain.frames, domain.tables, domain.state, domain.own
    owned = rows(saved, "owned", [_FRAME, _FRAME], frames.count)
    given_back = number_list(saved, "given_back", _FRAME, frames.count)
    if owned and min(first for first, _ in owned) < own.end:
        raise ValueError("what is Xen's is not the domain's")
    frames.take_over(ram, [(first, length) for first, length in owned], given_back)
    if frames.owned > domain.pages:
        raise ValueError("the domain has more memory than it may")
    gdt = number_list(saved, "gdt", _FRAME, _GDT_PAGES)
    kernel_root = number(saved.get("kernel_root"), "kernel_root", _FRAME)
    user_root = number(saved.get("user_root"), "user_root", _FRAME)
    if not (state.in_kernel or user_root):
        raise ValueError("it runs in user mode without page tables for that")
    try:
        for frame in written:
            frames.hold(frame, writable=True)
        for frame, level in rows(saved, "pinned", [_FRAME, 3], frames.count):
            if not L1 <= level <= L4:
                raise ValueError(f"there are no page tables of level {level}")
            tables.pin(frame, level)
        tables.get_kind(kernel_root, L4)
        if user_root:
            tables.get_kind(user_root, L4)
        for frame in gdt:
            tables.get_kind(frame, DESCRIPTORS)
        if domain.events.vcpu_info // PAGE_SIZE != own.shared_info:
            frames.hold(domain.events.vcpu_info // PAGE_SIZE, writable=True)
    except HypercallError as error:
        raise ValueError(f"no domain can use its memory so: {error}") from None
    state.kernel_root, state.user_root, state.gdt_frames = kernel_root, user_root, gdt
    own.set_gdt(gdt)


def check_memory(domain: Domain, saved: Saved) -> None:
    """Once everything that takes references is loaded: what was given back is in use, or it would be free."""
    domain.frames.check_held(number_list(saved, "given_back", _FRAME, domain.frames.count))
