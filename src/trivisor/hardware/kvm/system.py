"""/dev/kvm itself: what this host's KVM can do, and making virtual machines."""

from __future__ import annotations

import errno
import os
import struct
from ctypes import sizeof
from enum import Enum
from typing import Final

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.handle import Handle
from trivisor.x86.cpuid import Query, Registers

DEVICE = "/dev/kvm"
REQUIRED: Final = (
    "USER_MEMORY", "EXT_CPUID", "SET_GUEST_DEBUG", "VCPU_EVENTS", "DEBUGREGS", "XSAVE", "XCRS",
    "IMMEDIATE_EXIT", "X86_USER_SPACE_MSR", "X86_MSR_FILTER",
)  # fmt: skip
"""Capabilities without which there is no `KvmVcpu`; the newest of them are Linux 5.10's."""
_MAXIMUM_ENTRIES = 256
_ENTRY = struct.Struct("<3I4I3I")


class Trouble(Enum):
    """Why a host's KVM cannot be used."""

    ABSENT = "there is no device"
    FORBIDDEN = "no right to open it"
    FOREIGN = "it is no KVM, or another one than ours"
    LACKS = "it lacks what we need"
    FAILS = "it does not run a virtual machine"


class KvmUnavailable(Exception):
    """This host has no KVM that we could use; the message says why, in one line."""

    def __init__(self, message: str, trouble: Trouble = Trouble.FAILS) -> None:
        super().__init__(message)
        self.trouble = trouble


class System(Handle):
    """An open /dev/kvm; raises `KvmUnavailable`."""

    def __init__(self, path: str = DEVICE) -> None:
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            raise KvmUnavailable(f"there is no {path}", Trouble.ABSENT) from None
        except PermissionError:
            raise KvmUnavailable(f"no permission to open {path}", Trouble.FORBIDDEN) from None
        except OSError as error:  # ENXIO and ENODEV: the device is there, its driver is not
            gone = error.errno in (errno.ENXIO, errno.ENODEV)
            trouble = Trouble.ABSENT if gone else Trouble.FAILS
            raise KvmUnavailable(f"{path}: {error.strerror}", trouble) from None
        try:
            version = self.control(abi.GET_API_VERSION)
        except OSError:
            self.close()
            raise KvmUnavailable(f"{path} is no KVM device", Trouble.FOREIGN) from None
        if version != abi.API_VERSION:
            self.close()
            raise KvmUnavailable(f"KVM has API version {version}, not {abi.API_VERSION}", Trouble.FOREIGN)

    def require(self) -> None:
        """Raise `KvmUnavailable` unless all capabilities that a processor of ours stands on are there."""
        if missing := [name for name in REQUIRED if not self.capability(name)]:
            what = f"KVM lacks {', '.join(missing)}: Linux 5.10 or later has them"
            raise KvmUnavailable(what, Trouble.LACKS)

    def capability(self, name: str) -> int:
        """What KVM_CHECK_EXTENSION says of one of `abi.CAPABILITIES`: 0 for missing."""
        return self.control(abi.CHECK_EXTENSION, abi.CAPABILITIES[name])

    def supported_cpuid(self) -> Query:
        """CPUID as KVM can offer it to a guest at the most."""
        buffer = bytearray(sizeof(abi.CpuidHeader) + _MAXIMUM_ENTRIES * _ENTRY.size)
        struct.pack_into("<I", buffer, 0, _MAXIMUM_ENTRIES)
        self.control(abi.GET_SUPPORTED_CPUID, buffer)
        (count,) = struct.unpack_from("<I", buffer)
        answers: dict[tuple[int, int], Registers] = {}
        for number in range(count):
            leaf, subleaf, _, a, b, c, d, *_ = _ENTRY.unpack_from(
                buffer, sizeof(abi.CpuidHeader) + number * _ENTRY.size
            )
            answers[leaf, subleaf] = (a, b, c, d)
        return lambda leaf, subleaf: answers.get((leaf, subleaf), (0, 0, 0, 0))

    def create_vm(self) -> int:
        """A new virtual machine's descriptor; raises `KvmUnavailable`."""
        while True:
            try:
                return self.control(abi.CREATE_VM, 0)
            except OSError as error:
                if error.errno != errno.EINTR:
                    raise KvmUnavailable(f"KVM makes no virtual machine: {error.strerror}") from None


def cpuid_table(leaves: dict[tuple[int, int], Registers], with_subleaves: frozenset[int]) -> bytearray:
    """`leaves` as the argument of KVM_SET_CPUID2."""
    buffer = bytearray(struct.pack("<2I", len(leaves), 0))
    for (leaf, subleaf), registers in leaves.items():
        flags = abi.CPUID_SIGNIFICANT_INDEX if leaf in with_subleaves else 0
        buffer += _ENTRY.pack(leaf, subleaf, flags, *registers, 0, 0, 0)
    return buffer
