"""A virtual processor of KVM's: its mapped run structure and the ioctls on its state."""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from collections.abc import Iterable, Mapping
from ctypes import Structure
from typing import TypeVar

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.handle import Handle
from trivisor.hardware.kvm.vm import Vm

State = TypeVar("State", bound=Structure)
_MSR = struct.Struct("<IIQ")


class VcpuHandle(Handle):
    """`run_bytes` and `run_words` (32 bits each) are views on the run structure, read in place."""

    def __init__(self, vm: Vm) -> None:
        super().__init__(vm.create_vcpu())
        try:
            self._mapping = mmap.mmap(self.descriptor, vm.system.control(abi.GET_VCPU_MMAP_SIZE))
        except BaseException:
            self.close()
            raise
        self.run_bytes = memoryview(self._mapping)
        self.run_words = self.run_bytes.cast("I")
        self.header = abi.RunHeader.from_buffer(self._mapping)

    def get(self, request: int, kind: type[State]) -> State:
        """What a KVM_GET_ ioctl gives."""
        state = kind()
        self.control(request, state)
        return state

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """The MSRs that KVM knows, up to the first that it does not."""
        wanted = list(indices)
        buffer = bytearray(struct.pack("<2I", len(wanted), 0))
        for index in wanted:
            buffer += _MSR.pack(index, 0, 0)
        done = self.control(abi.GET_MSRS, buffer)
        entries = (_MSR.unpack_from(buffer, 8 + _MSR.size * number) for number in range(done))
        return {index: value for index, _, value in entries}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set all of them; ValueError names the first that KVM refuses."""
        buffer = bytearray(struct.pack("<2I", len(values), 0))
        for index, value in values.items():
            buffer += _MSR.pack(index, 0, value)
        done = self.control(abi.SET_MSRS, buffer)
        if done < len(values):
            index = list(values)[done]
            raise ValueError(f"KVM refuses {values[index]:#x} for MSR {index:#x}")

    def set_tsc_offset(self, offset: int) -> bool:
        """Have the guest's TSC be the host's plus `offset`; False when this KVM cannot be told."""
        value = ctypes.c_uint64(offset)
        attribute = abi.DeviceAttr(0, abi.VCPU_TSC_CTRL, abi.VCPU_TSC_OFFSET, ctypes.addressof(value))
        try:
            self.control(abi.SET_DEVICE_ATTR, attribute)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.EINVAL, errno.ENOTTY):
                return False
            raise
        return True

    def set_signal_mask(self, blocked: Iterable[int]) -> None:
        """The signals that do not end KVM_RUN."""
        mask = sum(1 << number - 1 for number in blocked)
        self.control(abi.SET_SIGNAL_MASK, bytearray(struct.pack("<IQ", 8, mask)))

    def close(self) -> None:
        if self.descriptor >= 0:
            del self.header
            self.run_words.release()
            self.run_bytes.release()
            self._mapping.close()
        super().close()
