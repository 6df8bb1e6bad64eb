"""A virtual machine of KVM's: its memory slots, its chips, its way of handing MSRs to us."""

from __future__ import annotations

import ctypes

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.handle import Handle
from trivisor.hardware.kvm.system import System
from trivisor.machine.memory import GuestMemory

_BITMAP_BYTES = 0x2000 // 8  # for a range of 0x2000 MSRs, which is where processors have theirs
_MSR_RANGES = (0x0, 0xC0000000)


class Vm(Handle):
    """The guest's physical memory is `memory`'s own host mapping, so that every engine sees the same bytes."""

    def __init__(self, system: System, memory: GuestMemory) -> None:
        super().__init__(system.create_vm())
        self.system = system
        try:
            if system.capability("SET_TSS_ADDR"):
                self.control(abi.SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(abi.INTERNAL_SLOTS_ADDRESS))
                self.control(abi.SET_TSS_ADDR, abi.INTERNAL_SLOTS_ADDRESS + 0x1000)
            for slot, (start, length) in enumerate(memory.regions()):
                region = abi.UserspaceMemoryRegion(slot, 0, start, length, memory.base + start)
                self.control(abi.SET_USER_MEMORY_REGION, region)
        except BaseException:
            self.close()
            raise

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
