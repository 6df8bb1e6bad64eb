"""What the hypervisor and its native code (`native.py`) both know: one table of 64-bit words."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

ARGUMENTS = ("RDI", "RSI", "RDX", "R10", "R8", "R9")
"""The registers that hypercalls take their arguments in."""
_NAMES = (
    "FRAME_COUNT",  # the frame table (frames.py): how long it is, and host addresses of its columns
    "FRAME_OWNER",
    "FRAME_KIND",
    "FRAME_KIND_COUNT",
    "FRAME_REFERENCES",
    "FRAME_WRITABLE_UNTIL",
    "FRAME_PINNED",
    "FRAME_FREE",
    "FREE_COUNT",
    "OWNED",
    "EPOCH",
    "IN_KERNEL",  # the virtual processor (vcpu_state.py)
    "KERNEL_ROOT",
    "USER_ROOT",
    "KERNEL_STACK",
    "KERNEL_STACK_SELECTOR",
    "IOPL",
    "CR2",
    "BREAKPOINTS",  # those that DR7 has on
    "IOPL_IN_FRAMES",  # 1: frames show the I/O privilege level (VMASST_TYPE_architectural_iopl)
    "EVENT_ADDRESS",  # where the guest's kernel is entered, and whether that masks events
    "EVENT_MASKS",
    "SYSCALL_ADDRESS",
    "SYSCALL_MASKS",
    "PAGE_FAULT_ADDRESS",
    "PAGE_FAULT_MASKS",
    "FLAT_PAIR",  # selectors of flat code and stack segments that were found good last: code | stack << 16; 0: none
    "VCPU_INFO",  # host address of struct vcpu_info
    "STARTED",  # of the hypercall that is being made: the host's TSC, its number
    "NUMBER",
    "MADE",  # how many operations of its list are done
    "TABLES",  # how many page tables it has validated or given up
    "CALLS_AT",  # of the multicall that native code is at: its entry, how many there are with that, its own arguments
    "CALLS_LEFT",
    *(f"CALLS_{name}" for name in ARGUMENTS),
    "CALLS_BEGUN",  # what Python has to know of the first entry of those left (native_multicall.py)
    "CALL_RAX",  # that entry: its number or result, its arguments
    *(f"CALL_{name}" for name in ARGUMENTS),
    "LINGERING_KERNEL",  # frames of level-4 tables that are kept validated for a while (page_tables.py); 0: none
    "LINGERING_USER",
    "STALE",  # 1: TLBs may have what page tables do not have any more (`DeprivilegedCpu.entry_changed`)
    "ENTRY",  # what native_traps.py enters the kernel with
    "ENTRY_MASKS",
    "ENTRY_ERROR",
    "ENTRY_RIP",
    "ENTRY_CLEAR",
    "SAVED_RCX",
    "SAVED_R11",
    "SAVED_CS",
    "SAVED_SS",
    "TIME_START",  # the PV clock (time.py): the TSC at its beginning; nanoseconds are counts, shifted, times / 2^32
    "TIME_LEFT",
    "TIME_RIGHT",
    "TIME_MULTIPLIER",
    "SINGLE",  # the deadline that native code has given the singleshot timer (timers.py)
    "SINGLE_CHANGE",  # what it has done to it since Python looked last
    "UPCALLS",  # what was done natively
    "PAGE_FAULTS",
    "TABLE_WRITES",
    "SYSCALLS",
    "FORCED",  # CPUID behind the forced-emulation prefix
    "PORTS",  # IN and OUT
    "PRIVILEGED",  # other instructions that had raised #GP
)
COUNTED = 64
"""Hypercalls with lower numbers are counted natively."""
INDEX = {name: number for number, name in enumerate(_NAMES)}
COUNTS = len(_NAMES)
TICKS = COUNTS + COUNTED
_SIZE = TICKS + COUNTED
SYMBOLS = {
    **{f"X_{name}": 8 * number for number, name in enumerate(_NAMES)},
    "X_COUNTS": 8 * COUNTS,
    "X_TICKS": 8 * TICKS,
}
"""For the native code: offsets in bytes."""


class SharedTable:
    """The table, all zeros at first."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_uint64 * _SIZE)()
        self.words = memoryview(self._memory).cast("B").cast("Q")
        self.address = ctypes.addressof(self._memory)
        """Host address."""


class _Sharing(Protocol):
    table: SharedTable


class SharedWord:
    """An attribute that is a word of its object's `table`."""

    def __init__(self, name: str) -> None:
        self._index = INDEX[name]

    def __get__(self, instance: _Sharing, owner: type | None = None) -> int:
        return instance.table.words[self._index]

    def __set__(self, instance: _Sharing, value: int) -> None:
        instance.table.words[self._index] = value


class SharedFlag(SharedWord):
    """The same for a truth value."""

    def __get__(self, instance: _Sharing, owner: type | None = None) -> bool:
        return super().__get__(instance, owner) != 0

    def __set__(self, instance: _Sharing, value: int) -> None:
        super().__set__(instance, 1 if value else 0)


def host_address(column: Any) -> int:
    """Where an array or bytearray that never changes its length has its elements."""
    return ctypes.addressof((ctypes.c_ubyte * 1).from_buffer(column))
