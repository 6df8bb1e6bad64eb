"""What KVM cannot emulate is done by another engine's processor, from the same state, on the same board.

A KVM with VT-x or AMD-V under it never needs this.  One that emulates ring 0
in the host's kernel (kvm-pvm) gives up on instructions that its emulator
lacks.  A hand-over there and back takes about half a millisecond, so where one
follows the other the substitute goes on for a while.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Decoder, Mnemonic

from trivisor.machine.cpuid import GuestCpuid
from trivisor.machine.exits import DebugStop, Exit, Kicked
from trivisor.machine.state import CpuState
from trivisor.machine.vcpu import Vcpu
from trivisor.x86 import msr
from trivisor.x86.control import EFER_LMA
from trivisor.x86.descriptors import LONG

if TYPE_CHECKING:
    from trivisor.hardware.kvm.cpu import KvmVcpu

GO_ON = 20_000_000
"""Nanoseconds of guest time for which the substitute goes on, when KVM has given up less than so long ago."""
_NAMES = {number: name.lower() for name, number in vars(Mnemonic).items() if isinstance(number, int)}


class Rescue:
    """Makes the other processor when it is first needed, and counts what it did by instruction."""

    def __init__(self, cpu: KvmVcpu, make: Callable[[GuestCpuid], Vcpu]) -> None:
        self._cpu = cpu
        self._make = make
        self._other: Vcpu | None = None
        self.counts: Counter[str] = Counter()
        self.nanoseconds = 0
        self.went_on = 0
        """Times that the substitute did more than the one instruction."""
        self._last = -GO_ON

    def take_over(self, instruction: bytes, *, single: bool) -> Exit | None:
        """Have one instruction done, and perhaps what follows unless `single`; an exit when one came of it."""
        started = time.perf_counter_ns()
        cpu = self._cpu
        state = cpu.state
        self.counts[_name(instruction, 64 if state.efer & EFER_LMA and state.cs.attributes & LONG else 32)] += 1
        other = self._other
        if other is None:
            other = self._other = self._make(cpu.guest_cpuid)
            other.observed.update(cpu.observed)
            cpu.observed = other.observed  # the other's parts hold on to theirs
        other.attach()
        try:
            other.tsc_offset = cpu.tsc_offset
            other.memory_written(0, cpu.board.memory.span)  # by the guest under KVM, and nobody kept count
            _hand_over(state, other)
            exit_: Exit | None = other.step()
            if isinstance(exit_, DebugStop) and not single:
                exit_ = self._go_on(other) if started - self._last < GO_ON else None
            state = other.state
        finally:
            cpu.attach()
        cpu.forget_mappings()
        _hand_over(state, cpu)
        self._last = time.perf_counter_ns()
        self.nanoseconds += self._last - started
        return exit_

    def _go_on(self, other: Vcpu) -> Exit | None:
        """Let the substitute run for `GO_ON`."""
        self.went_on += 1
        clock = self._cpu.board.clock
        timer = clock.at(clock.now() + GO_ON, other.kick)
        try:
            exit_ = other.run()
        finally:
            timer.cancel()
        # The run loop looks itself whether anybody else wanted it.
        return None if isinstance(exit_, Kicked) else exit_

    def kick(self) -> None:
        """Have the other processor come back, if it is at work."""
        if self._other is not None:
            self._other.kick()

    def close(self) -> None:
        if self._other is not None:
            self._other.close()


def _hand_over(state: CpuState, receiver: Vcpu) -> None:
    """All but the TSC, which both processors have from the host with the same offset."""
    state.msrs.pop(msr.IA32_TIME_STAMP_COUNTER, None)
    receiver.state = state


def _name(instruction: bytes, bits: int) -> str:
    return _NAMES[Decoder(bits, instruction).decode().mnemonic] if instruction else "unknown"
