"""The native run loop (`native_loop.py`) in place: its memory, and what Python tells it and takes from it."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

from trivisor.hardware.kvm.direct.hidden import HIDDEN
from trivisor.hardware.kvm.direct.native_loop import native_loop
from trivisor.hardware.kvm.direct.native_words import CHANGED, INDEX, RUN, WORDS
from trivisor.hardware.kvm.direct.registers import Blob
from trivisor.hardware.kvm.direct.stub import VECTORS, Stub
from trivisor.hardware.kvm.vcpu import VcpuHandle
from trivisor.machine.deprivileged import NativeSupervision
from trivisor.machine.memory import PAGE_SIZE, GuestMemory, host_map, host_unmap
from trivisor.x86.exceptions import GENERAL_PROTECTION, PAGE_FAULT

_CHANGED_COUNT, _CHANGED_TABLES_COUNT, _FLUSH_WANTED, _FLUSH_IS_PYTHONS, _AT_ONCE, _LOOK_WANTED, _TSC_OFFSET = (
    INDEX[name]
    for name in (
        "CHANGED_COUNT", "CHANGED_TABLES_COUNT", "FLUSH_WANTED", "FLUSH_IS_PYTHONS", "AT_ONCE", "LOOK_WANTED",
        "TSC_OFFSET",
    )
)  # fmt: skip
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_NO_HIDDEN: Final = (1 << 64) - 1


class NativeWord:
    """An attribute that is a word of its object's `words`."""

    def __init__(self, name: str) -> None:
        self._index = INDEX[name]

    def __get__(self, instance: NativeRun, owner: type | None = None) -> int:
        return instance.words[self._index]

    def __set__(self, instance: NativeRun, value: int) -> None:
        instance.words[self._index] = value


class NativeRun:
    """One processor's loop."""

    other_gs = NativeWord("KERNEL_GS_BASE")
    calls = NativeWord("CALLS")
    """System calls that were done natively."""
    stub_runs = NativeWord("STUB_RUNS")
    rewritten = NativeWord("REWRITTEN")
    """How often the stub was sent to write changed entries once more, and how many."""

    def __init__(
        self, handle: VcpuHandle, memory: GuestMemory, own_slot: int, stub: Stub, supervision: NativeSupervision
    ) -> None:
        """For the processor `handle`, with `stub` in the level-4 entry `own_slot`."""
        self._mapped: list[tuple[int, int]] = []
        size = RUN + len(handle.run_bytes)
        self._base = self._map(size)
        host_map(size - RUN, _READ_WRITE, at=self._base + RUN, descriptor=handle.descriptor)
        self.words = memoryview((ctypes.c_uint64 * WORDS).from_address(self._base)).cast("B").cast("Q")
        frames = memory.span // PAGE_SIZE
        tables = self._map(frames)
        self.tables = memoryview((ctypes.c_ubyte * frames).from_address(tables)).cast("B")
        """Of each frame: 1 if it was a page table that KVM may remember."""
        again = self._map(8 * frames)
        self._again = memoryview((ctypes.c_uint64 * frames).from_address(again)).cast("B").cast("Q")
        self._in_kernel = ctypes.c_ubyte.from_address(stub.in_kernel_at)
        self._set(
            DESCRIPTOR=handle.descriptor, SUPERVISOR_TABLE=supervision.table, OWN_SLOT=own_slot,
            RAM_BASE=memory.base, RAM_SPAN=memory.span, CODE_LINES=self._map(8 * frames),
            TABLES=tables, CHANGED_TABLES=again,
            STOP=stub.stops[0], BEHIND_STOP=stub.stops[1], FAULT_STOP=stub.vectors + PAGE_FAULT + 1,
            PROTECTION_STOP=stub.vectors + GENERAL_PROTECTION + 1,
            STACK_END=stub.host + stub.stack_at, STUB_STACK=stub.stack, STUB_MAP=stub.map,
            ENTRIES_END=stub.entries_end, ENTRY_STEP=stub.step, STUB_LEAVE=stub.leave,
            ENTRY_PAGE=stub.entry, IN_KERNEL_AT=stub.in_kernel_at,
            NOTES_AT=stub.notes_at,
            HIDDEN=HIDDEN.start >> 39 if stub.stays_in_ring_3 else _NO_HIDDEN,
        )  # fmt: skip
        self._function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)(self._place(native_loop(supervision.source)))

    def _map(self, size: int) -> int:
        address = host_map(size, _READ_WRITE)
        self._mapped.append((address, size))
        return address

    def _place(self, code: bytes) -> int:
        """The host address at which `code` can be run, and not written."""
        file = os.memfd_create("native run loop")
        try:
            os.pwrite(file, code, 0)
            address = host_map(len(code), mmap.PROT_READ | mmap.PROT_EXEC, descriptor=file)
        finally:
            os.close(file)
        self._mapped.append((address, len(code)))
        return address

    def close(self) -> None:
        """Give the memory back to the host; nothing may be called afterwards."""
        for view in (self.words, self.tables, self._again):
            view.release()
        for address, size in self._mapped:
            host_unmap(address, size)
        self._mapped.clear()

    def exceptions(self) -> list[int]:
        """How many of each vector were done natively."""
        at = INDEX["EXCEPTIONS_0"]
        return self.words[at : at + VECTORS].tolist()

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self.words[INDEX[name]] = value

    def set_segments(self, flat: tuple[Blob, Blob], ring_0: tuple[Blob, Blob]) -> None:
        """What code and stack segments are to KVM: flat ones of ring 3, with any selectors, and the stub's."""
        names = ("CODE_SEGMENT", "STACK_SEGMENT", "RING_0_CODE", "RING_0_STACK")
        for name, blob in zip(names, (*flat, *ring_0), strict=True):
            at = INDEX[name]
            self.words[at : at + 3] = memoryview(blob).cast("Q")

    def enter_space(self, root: int, kernel: bool) -> None:
        """As `DeprivilegedCpu.enter_space`."""
        self._set(GUEST_KERNEL=kernel)
        if kernel:
            self._set(ROOT_KERNEL=root)

    def answer_nothing(self) -> None:
        """Have ring 3's code leave every call to the supervisor, until the next `run`."""
        self._in_kernel.value = 0

    def run(self, tsc_offset: int, *, flush_is_pythons: bool) -> int:
        """Run the guest until there is something for Python: one of `native_loop`'s ends, or a negative error number.

        `flush_is_pythons`: forgetting translations takes more than to know of no change.
        """
        words = self.words
        words[_FLUSH_IS_PYTHONS] = flush_is_pythons
        words[_TSC_OFFSET] = tsc_offset
        return int(self._function(self._base))

    def take(self) -> tuple[list[int], list[int], bool, bool]:
        """What native code has noted since the last time, all of which is for KVM to forget.

        Physical addresses of entries, those of tables, whether at once, and whether translations are to be forgotten.
        """
        words = self.words
        entries = words[CHANGED : CHANGED + words[_CHANGED_COUNT]].tolist()
        frames = self._again[: words[_CHANGED_TABLES_COUNT]].tolist()
        for frame in frames:
            self.tables[frame] = 1
        at_once, flush = bool(words[_AT_ONCE]), bool(words[_FLUSH_WANTED])
        words[_CHANGED_COUNT] = words[_CHANGED_TABLES_COUNT] = words[_AT_ONCE] = words[_FLUSH_WANTED] = 0
        words[_LOOK_WANTED] = 0
        return entries, [frame * PAGE_SIZE for frame in frames], at_once, flush
