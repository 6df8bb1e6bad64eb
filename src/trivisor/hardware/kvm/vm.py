"""A virtual machine of KVM's: its memory slots, its chips, its way of handing MSRs to us."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator
from typing import Final

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.handle import Handle
from trivisor.hardware.kvm.system import System
from trivisor.machine.memory import GuestMemory

_BITMAP_BYTES = 0x2000 // 8  # for a range of 0x2000 MSRs, which is where processors have theirs
_MSR_RANGES = (0x0, 0xC0000000)
_NOT_ZERO = re.compile(rb"[^\0]+")
_BITS: Final = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))
_SPARE_ADDRESS: Final = abi.INTERNAL_SLOTS_ADDRESS - mmap.PAGESIZE
"""A guest physical page where the board has nothing."""


class Vm(Handle):
    """The guest's physical memory is `memory`'s own host mapping, so that every engine sees the same bytes."""

    def __init__(self, system: System, memory: GuestMemory) -> None:
        super().__init__(system.create_vm())
        self.system = system
        self._slots = list(memory.regions())
        self._base = memory.base
        self._logs: list[bytearray] = []
        self._spare = mmap.mmap(-1, mmap.PAGESIZE)
        try:
            if system.capability("SET_TSS_ADDR"):
                self.control(abi.SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(abi.INTERNAL_SLOTS_ADDRESS))
                self.control(abi.SET_TSS_ADDR, abi.INTERNAL_SLOTS_ADDRESS + 0x1000)
            self._set_slots(0)
        except BaseException:
            self.close()
            raise

    def _set_slots(self, flags: int) -> None:
        for slot, (start, length) in enumerate(self._slots):
            region = abi.UserspaceMemoryRegion(slot, flags, start, length, self._base + start)
            self.control(abi.SET_USER_MEMORY_REGION, region)

    def watch_writes(self) -> None:
        """Have KVM note from now on which pages of RAM the guest writes to."""
        self._set_slots(abi.MEM_LOG_DIRTY_PAGES)
        self._logs = [bytearray(-(-length // (mmap.PAGESIZE * 64)) * 8) for _, length in self._slots]

    def written_pages(self) -> Iterator[int]:
        """Physical addresses of the pages that the guest has written to under KVM since the last time."""
        for slot, log in enumerate(self._logs):
            address = ctypes.addressof(ctypes.c_char.from_buffer(log))
            self.control(abi.GET_DIRTY_LOG, abi.DirtyLog(slot, 0, address))
            start = self._slots[slot][0]
            for run in _NOT_ZERO.finditer(log):
                for at, byte in enumerate(run[0], run.start()):
                    for bit in _BITS[byte]:
                        yield start + (8 * at + bit) * mmap.PAGESIZE

    def forget_mappings(self) -> None:
        """Have KVM look the guest's page tables up anew: they were changed behind its back.

        KVM without nested paging keeps shadows of page tables, right for as long as only the guest
        writes to them, under KVM.  Taking a slot away drops them all, of whatever memory: a page's,
        where no guest has seen it.
        """
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._spare))
        for length in (mmap.PAGESIZE, 0):
            region = abi.UserspaceMemoryRegion(len(self._slots), 0, _SPARE_ADDRESS, length, address)
            self.control(abi.SET_USER_MEMORY_REGION, region)

    def enable(self, capability: str, *arguments: int) -> None:
        """KVM_ENABLE_CAP; raises OSError when this KVM does not have it."""
        request = abi.EnableCap(abi.CAPABILITIES[capability])
        for index, value in enumerate(arguments):
            request.args[index] = value
        self.control(abi.ENABLE_CAP, request)

    def hand_over_msrs(self, kept: frozenset[int]) -> None:
        """Have every access to an MSR outside `kept` end in an exit, and so every one that KVM would refuse."""
        self.enable(
            "X86_USER_SPACE_MSR", abi.MSR_EXIT_INVALID | abi.MSR_EXIT_UNKNOWN | abi.MSR_EXIT_FILTERED
        )
        request = abi.MsrFilter()
        maps = []
        for number, base in enumerate(_MSR_RANGES):
            bitmap = (ctypes.c_uint8 * _BITMAP_BYTES)()
            for index in kept:
                if base <= index < base + 8 * _BITMAP_BYTES:
                    bitmap[index - base >> 3] |= 1 << (index - base & 7)
            maps.append(bitmap)
            request.ranges[number] = abi.MsrFilterRange(
                abi.MSR_FILTER_READ | abi.MSR_FILTER_WRITE, 8 * _BITMAP_BYTES, base, ctypes.addressof(bitmap)
            )
        self.control(abi.X86_SET_MSR_FILTER, request)

    def create_vcpu(self, identifier: int = 0) -> int:
        """A virtual processor's descriptor."""
        return self.control(abi.CREATE_VCPU, identifier)
