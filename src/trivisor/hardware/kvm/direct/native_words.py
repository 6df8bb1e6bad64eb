"""What the native run loop and Python both know: a page of words, and the run structure behind it."""

from __future__ import annotations

from typing import Final

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.direct.registers import PLACES
from trivisor.hardware.kvm.direct.stub import VECTORS
from trivisor.machine.memory import PAGE_SIZE
from trivisor.machine.state import GPR_NAMES

GENERAL: Final = tuple(name.upper() for name in GPR_NAMES)
_NAMES: Final = (
    *(f"GPR_{name}" for name in GENERAL),
    "FLAGS", "SYSTEM_FLAGS", "GUEST_RIP", "CS_SELECTOR", "SS_SELECTOR", "GS_SELECTOR",
    # hidden parts of segments: those that native code loads are flat or null, so nobody looks at them
    "CS_BASE", "CS_LIMIT", "CS_ATTRIBUTES", "SS_BASE", "SS_LIMIT", "SS_ATTRIBUTES", "GS_LIMIT", "GS_ATTRIBUTES",
    "KERNEL_GS_BASE", "ROOT_KERNEL",
    "GUEST_KERNEL",  # 1: the guest's kernel runs
    "SUPERVISOR_TABLE", "RAM_BASE", "TSC_OFFSET", "EXIT_A", "EXIT_B",
    "IGNORE_CLI",  # 0
    "CODE_LINES",  # host address of a zero for each frame: there is no translated code
    "RAM_SPAN", "OWN_SLOT",
    "IN_KERNEL_AT",  # host address of the byte for ring 3's code
    "NOTES_AT",  # host address of what that has noted
    "DESCRIPTOR",
    "STOP", "BEHIND_STOP",  # rip at a system call
    "FAULT_STOP", "PROTECTION_STOP",  # rip at #PF and #GP
    "STACK_END", "STUB_STACK",  # the end of the stub's stack, as host address and as the stub knows it
    "STUB_MAP", "ENTRIES_END", "ENTRY_STEP", "STUB_LEAVE",  # see `Stub`
    "ENTRY_PAGE",  # page faults there are Python's
    "HIDDEN",  # and those on addresses that begin so
    "HOST_RSP",
    "CODE_SEGMENT", "CODE_SEGMENT_1", "CODE_SEGMENT_2",  # struct kvm_segment of flat segments
    "STACK_SEGMENT", "STACK_SEGMENT_1", "STACK_SEGMENT_2",
    "RING_0_CODE", "RING_0_CODE_1", "RING_0_CODE_2", "RING_0_STACK", "RING_0_STACK_1", "RING_0_STACK_2",  # the stub's
    "SHOWN_FS", "SHOWN_GS", "SHOWN_CR3",  # as KVM knows them
    "FLUSH_WANTED",  # translations are to be forgotten
    "FLUSH_IS_PYTHONS",
    "AT_ONCE",  # changes are to be told to KVM before the guest goes on
    "LOOK_WANTED",  # at timers
    "CHANGED_COUNT",
    "TABLES",  # host address of a byte for each frame: 1, it was a page table; 2, and is noted as one that is again
    "CHANGED_TABLES",  # host address of the list of those
    "CHANGED_TABLES_COUNT",
    "STUB_RUNS", "REWRITTEN",  # entries that the stub has written, without Python's doing
    "CALLS",  # system calls done natively
    *(f"EXCEPTIONS_{vector}" for vector in range(VECTORS)),
    "COUNTER",  # host address of the one that counts what is being done
)  # fmt: skip
INDEX: Final = {name: number for number, name in enumerate(_NAMES)}
WORDS: Final = 1024
CHANGED: Final = 256
"""Index of the first of the addresses of changed entries."""
MANY_CHANGED: Final = 64
"""With so many they are told to KVM before the guest goes on."""
MOST_CHANGED: Final = WORDS - CHANGED
"""As many as one hypercall can note; further ones are noted as tables."""
assert len(_NAMES) <= CHANGED
RUN: Final = 8 * WORDS
"""Offset of the run structure, in bytes."""
assert RUN % PAGE_SIZE == 0

_REGS: Final = RUN + abi.RUN_SYNC_REGS
_SREGS: Final = _REGS + abi.SyncRegs.sregs.offset


def _special(name: str) -> int:
    return _SREGS + int(getattr(abi.SpecialRegs, name).offset)


RUN_GENERAL: Final = {f"RUN_{name}": _REGS + 8 * place for name, place in zip(GENERAL, PLACES, strict=True)}
SYMBOLS: Final = {
    **{name: 8 * number for name, number in INDEX.items()},
    "RUN_RIP": _REGS + abi.Regs.rip.offset,
    "RUN_FLAGS": _REGS + abi.Regs.rflags.offset,
    "RUN_CS": _special("cs"), "RUN_SS": _special("ss"), "RUN_GS": _special("gs"),
    "FS_BASE": _special("fs"), "GS_BASE": _special("gs"), "GUEST_CR2": _special("cr2"), "GUEST_CR3": _special("cr3"),
    "EXCEPTIONS": 8 * INDEX["EXCEPTIONS_0"],
    "SELECTOR": abi.Segment.selector.offset,
    "EXIT_REASON": RUN + abi.RunHeader.exit_reason.offset,
    "DIRTY_REGS": RUN + abi.RUN_DIRTY_REGS,
}  # fmt: skip
"""Offsets in bytes from the first word."""
