"""What this host's KVM does, found out by running a few instructions on it."""

from __future__ import annotations

import errno
import struct
import time
from dataclasses import dataclass
from typing import Final

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.system import DEVICE, KvmUnavailable, System, Trouble
from trivisor.hardware.kvm.vcpu import VcpuHandle
from trivisor.hardware.kvm.vm import Vm
from trivisor.machine.memory import MINIMUM_RAM, GuestMemory
from trivisor.x86.assembler import assemble

_ORIGIN: Final = 0x1000
_PORT: Final = 0x10
_ROUNDS: Final = 2000
_TIMES: Final = 3
"""What is measured is the quickest of so many: a busy host takes the processor away now and then."""
_SLOW: Final = 50.0
"""Nanoseconds; a processor in non-root mode takes one or two for an instruction of the loop."""
_CODE: Final = f"""
start:
    mov ecx, {_ROUNDS}
.again:
    dec ecx
    jnz .again
    inc al
    out {_PORT:#x}, al
    inc al
    out {_PORT:#x}, al
    jmp start
"""


@dataclass(frozen=True, slots=True)
class Probe:
    """A KVM that runs virtual machines."""

    version: int
    """Of the API."""
    capabilities: dict[str, int]
    """What KVM_CHECK_EXTENSION says of each of `abi.CAPABILITIES`."""
    nanoseconds_an_instruction: float
    """In a loop in ring 0."""
    nanoseconds_an_exit: float
    """Out of the guest by a port and back into it, the ioctl from Python included."""

    @property
    def emulates_ring_0(self) -> bool:
        """Whether there is no VT-x or AMD-V under it: the host's kernel emulates ring 0 (kvm-pvm)."""
        return self.nanoseconds_an_instruction > _SLOW


def probe(path: str = DEVICE) -> Probe:
    """Try the KVM at `path`: takes a few milliseconds.  Raises `KvmUnavailable`."""
    with System(path) as system:
        system.require()
        capabilities = {name: system.capability(name) for name in abi.CAPABILITIES}
        memory = GuestMemory(MINIMUM_RAM)
        try:
            memory.write(_ORIGIN, assemble(_CODE, bits=32, origin=_ORIGIN).code)
            with Vm(system, memory) as vm, VcpuHandle(vm) as vcpu:
                loop, out = _measure(vcpu)
        except OSError as error:
            raise KvmUnavailable(f"KVM does not run a small guest: {error.strerror}") from None
        finally:
            memory.close()
    return Probe(abi.API_VERSION, capabilities, max(loop - out, 0) / (2 * _ROUNDS), out)


def _measure(vcpu: VcpuHandle) -> tuple[int, int]:
    """Nanoseconds for the loop and a port output, and for a port output alone."""
    _start(vcpu)
    taken = [_run(vcpu, number) for number in range(1, 2 * _TIMES + 1)]
    return min(taken[::2]), min(taken[1::2])


def _start(vcpu: VcpuHandle) -> None:
    """Flat 32-bit protected mode without paging, at the beginning of the code."""
    sregs = vcpu.get(abi.GET_SREGS, abi.SpecialRegs)
    sregs.cr0 |= 1
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        kind = 11 if name == "cs" else 3
        selector = 8 if name == "cs" else 16
        segment = abi.Segment(limit=0xFFFFFFFF, selector=selector, type=kind, present=1, db=1, s=1, g=1)
        setattr(sregs, name, segment)
    vcpu.control(abi.SET_SREGS, sregs)
    vcpu.control(abi.SET_REGS, abi.Regs(rip=_ORIGIN, rflags=2))


def _run(vcpu: VcpuHandle, expected: int) -> int:
    """Nanoseconds until the guest tells the number that is expected; raises `KvmUnavailable` for anything else."""
    started = time.perf_counter_ns()
    while True:
        try:
            vcpu.control(abi.RUN)
            break
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.EAGAIN):
                raise
    taken = time.perf_counter_ns() - started
    reason = vcpu.header.exit_reason
    if reason != abi.EXIT_IO:
        name = abi.EXIT_NAMES.get(reason, str(reason))
        raise KvmUnavailable(f"a small guest on this KVM ends with {name.replace('_', ' ')}", Trouble.FAILS)
    _, size, port, _, at = struct.unpack_from("<BBHIQ", vcpu.run_bytes, abi.EXIT_DATA)
    if (size, port, vcpu.run_bytes[at]) != (1, _PORT, expected):
        raise KvmUnavailable("this KVM runs a small guest wrongly", Trouble.FAILS)
    return taken
