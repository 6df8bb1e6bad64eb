"""A processor whose local APIC is KVM's own: its registers, timer and HLT cost no exit (KVM_CAP_SPLIT_IRQCHIP).

The 8259 pair, the I/O APIC and the 8254 stay the board's: the guest sees the
same ones under every technique, and none of them is on a hot path.  The I/O
APIC's messages go to KVM by KVM_SIGNAL_MSI; where a pin is level-triggered,
KVM is told by a route which vectors' EOI we want to hear of.  The 8259's
interrupts are injected when KVM says that its APIC lets them through.

The APIC's state is KVM's while the guest runs and the board's otherwise: it is
lent on the way into the guest, and taken back as soon as somebody asks for the
processor's state.  So snapshots, other techniques and the substitute find it
where they look for it, and its timer goes on there.

Other than with the board's own: accesses to the x2APIC's MSRs, IA32_APIC_BASE
and IA32_TSC_DEADLINE have no subscribers; LINT0 passes interrupts of the 8259
only in ExtINT mode; a HLT with interrupts off is noticed after `LOOK`; and the
time in which the guest has halted counts as the guest's.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from ctypes import sizeof
from typing import Final, Protocol

from trivisor.hardware.kvm import abi, apic_page
from trivisor.hardware.kvm.cpu import KvmVcpu
from trivisor.hardware.kvm.state_transfer import KEPT_MSRS
from trivisor.hardware.kvm.system import System
from trivisor.machine.cpuid import GuestCpuid, tsc_ratio
from trivisor.machine.exits import Exit, Halt, Unsupported
from trivisor.machine.interrupts import Message
from trivisor.machine.saving import Saved
from trivisor.machine.vcpu import GeneralProtection, Surroundings, Vcpu
from trivisor.x86 import msr
from trivisor.x86.cpuid import USUAL_CPU, CpuChoice
from trivisor.x86.flags import IF

PINS: Final = 24
"""Of the I/O APIC: as many routes are set aside for it."""
LOOK: Final = 50_000_000
"""Nanoseconds between two looks at whether the guest has halted for good, at the most."""
_RETRY: Final = 1_000_000
"""Nanoseconds after which an injected interrupt is tried again that the guest did not take."""
_MASK64: Final = (1 << 64) - 1
_NEVER: Final = 1 << 62
_SECOND: Final = 1_000_000_000
_KVM_CRYSTAL: Final = _SECOND
"""Hz of the APIC timer's input, unless KVM is told otherwise."""
_SLOWER: Final = (40, 50, 100, 125, 200, 250, 500, 1000)
"""Nanoseconds a tick: real crystals are as slow, and they are whole numbers of kHz."""
_MESSAGE_ADDRESS: Final = 0xFEE00000
_LOGICAL: Final = 1 << 2
_LEVEL: Final = 3 << 14  # level-triggered, asserted
_APIC_MSRS: Final = frozenset({msr.IA32_APIC_BASE, msr.IA32_TSC_DEADLINE, *range(0x800, 0x900)})
_NEEDED: Final = ("SPLIT_IRQCHIP", "SIGNAL_MSI", "IRQ_ROUTING", "MP_STATE", "TSC_DEADLINE_TIMER")


class _Refused(Exception):
    """By KVM, and why."""


class MovableApic(Protocol):
    """A board's local APIC, whose work another can do for a while."""

    def save(self) -> Saved: ...
    def load(self, saved: Saved) -> None: ...
    def retire(self, elsewhere: Message) -> None: ...


class RoutedIoApic(Protocol):
    on_routed: Callable[[], None]

    def level_triggered(self) -> list[tuple[int, int, bool, int, int]]: ...
    def end_of_interrupt(self, vector: int) -> None: ...


class ApicBoard(Surroundings, Protocol):
    @property
    def local_apic(self) -> MovableApic: ...
    @property
    def io_apic(self) -> RoutedIoApic: ...


def crystal_for(system: System, tsc_frequency: int) -> int:
    """The Hz of a local APIC timer's input that KVM can have, the fastest of which CPUID can tell the TSC to 1 ppm."""
    if system.capability("X86_APIC_BUS_CYCLES_NS"):
        for nanoseconds in _SLOWER:
            crystal = _SECOND // nanoseconds
            denominator, numerator = tsc_ratio(tsc_frequency, crystal)
            if abs(crystal * numerator // denominator - tsc_frequency) * 1_000_000 <= tsc_frequency:
                return crystal
    return _KVM_CRYSTAL


def why_not(system: System, crystal: int) -> str:
    """Why KVM's local APIC cannot serve a guest whose APIC timer has an input of `crystal` Hz; empty if it can."""
    if missing := [name for name in _NEEDED if not system.capability(name)]:
        return f"KVM lacks {', '.join(missing)}"
    if crystal == _KVM_CRYSTAL:
        return ""
    if _SECOND % crystal or crystal < _SECOND // _SLOWER[-1] or not system.capability("X86_APIC_BUS_CYCLES_NS"):
        return f"KVM's APIC timer cannot count at the {crystal / 1e6:g} MHz that the guest was told"
    return ""


class KernelApicVcpu(KvmVcpu):
    """See `machine.vcpu.Vcpu`; only where there is no `why_not`.  Raises `KvmUnavailable`."""

    chip = "its own local APIC"

    def __init__(
        self,
        board: ApicBoard,
        choice: CpuChoice = USUAL_CPU,
        cpuid: GuestCpuid | None = None,
        substitute: Callable[[GuestCpuid], Vcpu] | None = None,
    ) -> None:
        self._pc = board
        self._lent: Saved | None = None
        """The APIC's state as KVM got it; None while the board has it."""
        self._routes: list[tuple[int, int, bool, int, int]] = []
        super().__init__(board, choice, cpuid, substitute)
        self._handlers[abi.EXIT_IOAPIC_EOI] = self._on_end_of_interrupt

    def _make_chip(self) -> frozenset[int]:
        self._vm.enable("SPLIT_IRQCHIP", PINS)
        if (crystal := self.board.crystal_frequency) != _KVM_CRYSTAL:
            self._vm.enable("X86_APIC_BUS_CYCLES_NS", _SECOND // crystal)
        return KEPT_MSRS | {msr.IA32_APIC_BASE, msr.IA32_TSC_DEADLINE}

    # -- where the APIC's state is --------------------------------------------------------------------------

    def _complete(self) -> None:
        """Before the state is read or set: the board then has the APIC as well."""
        super()._complete()
        self._take_back()

    def _lend(self) -> None:
        """The APIC's work to KVM; raises `_Refused` for a state that only a file can have."""
        pc, handle = self._pc, self.handle
        self._lent = saved = pc.local_apic.save()
        page = apic_page.to_page(saved, pc.clock.now(), pc.crystal_frequency)
        pc.local_apic.retire(self._message)
        try:
            handle.set_msrs({msr.IA32_APIC_BASE: saved["base"] & _MASK64})
            handle.control(abi.SET_LAPIC, abi.LapicState.from_buffer_copy(page))
            if deadline := saved["timer"]["deadline"] & _MASK64:
                handle.set_msrs({msr.IA32_TSC_DEADLINE: deadline})
        except (ValueError, OSError) as error:
            self._lent = None
            pc.local_apic.load(saved)
            raise _Refused(str(error)) from None
        pc.io_apic.on_routed = self._route
        self._route()

    def _take_back(self) -> None:
        """The APIC's work, and a HLT that KVM is in, to the board."""
        if self._lent is None:
            return
        pc, handle = self._pc, self.handle
        page = bytes(handle.get(abi.GET_LAPIC, abi.LapicState).regs)
        values = handle.get_msrs((msr.IA32_APIC_BASE, msr.IA32_TSC_DEADLINE))
        base, deadline = values[msr.IA32_APIC_BASE], values[msr.IA32_TSC_DEADLINE]
        wires = {name: level for name, level in pc.local_apic.save().items() if name.startswith("lint")}
        before, self._lent = self._lent | wires, None
        pc.io_apic.on_routed = lambda: None
        pc.local_apic.load(apic_page.from_page(page, before, base, deadline, pc.clock.now(), pc.crystal_frequency))
        pc.tsc_changed()  # sets a deadline going
        if self._halted_in_kernel():
            self.halted = True
            self._end_halt()
        self._look = True

    def _halted_in_kernel(self) -> bool:
        return bool(self.handle.get(abi.GET_MP_STATE, abi.MpState).mp_state == abi.MP_HALTED)

    def _end_halt(self) -> None:
        self.handle.control(abi.SET_MP_STATE, abi.MpState(abi.MP_RUNNABLE))

    def _move_tsc(self, by: int) -> None:
        self._take_back()  # KVM would not look at its deadline again
        super()._move_tsc(by)

    # -- running --------------------------------------------------------------------------------------------

    def _serve(self) -> Exit | None:
        if self._lent is None:
            self.board.clock.run_due()  # timers of the APIC's among them
            try:
                self._lend()
            except _Refused as refusal:
                return Unsupported(f"this state of the local APIC under KVM ({refusal})", self.state.rip)
        if (exit_ := super()._serve()) is not None:
            return exit_
        if not self._run_bytes[abi.RunHeader.if_flag.offset] and self._halted_in_kernel():
            self._end_halt()
            self._look = True
            return Halt(False)
        if self.board.clock.next_deadline() is None:
            self._on_earlier(_NEVER)
        return None

    def _on_earlier(self, deadline: int) -> None:
        longest = _RETRY if self.injected else LOOK  # KVM's window opens for the 8259's interrupts alone
        super()._on_earlier(min(deadline, self.board.clock.now() + longest))

    def _may_inject(self) -> bool:
        if not self.injected:
            return super()._may_inject()
        events = self.handle.get(abi.GET_VCPU_EVENTS, abi.VcpuEvents)
        busy = events.interrupt.injected or events.interrupt.shadow or events.exception.injected or events.nmi.injected
        return not busy and bool(self.handle.get(abi.GET_REGS, abi.Regs).rflags & IF)

    def _inject(self, vector: int) -> None:
        """As one that KVM has taken from the controllers, so that it is told of again with the processor's state."""
        events = self.handle.get(abi.GET_VCPU_EVENTS, abi.VcpuEvents)
        events.interrupt.injected, events.interrupt.nr, events.interrupt.soft = 1, vector, 0
        self.handle.control(abi.SET_VCPU_EVENTS, events)
        if self._halted_in_kernel():  # which such an interrupt does not end
            self._end_halt()

    def _read_msr(self, index: int) -> int:
        if index in _APIC_MSRS:
            raise GeneralProtection  # KVM only asks after it has refused
        return super()._read_msr(index)

    def _write_msr(self, index: int, value: int) -> None:
        if index in _APIC_MSRS:
            raise GeneralProtection
        super()._write_msr(index, value)

    # -- messages -------------------------------------------------------------------------------------------

    def _message(self, destination: int, logical: bool, vector: int, mode: int, level_triggered: bool) -> bool:
        """To KVM's APIC; whether it was accepted."""
        address, data = message(destination, logical, vector, mode, level_triggered)
        self._count("message")
        try:
            return self._vm.control(abi.SIGNAL_MSI, abi.Msi(address_lo=address, data=data)) > 0
        except OSError as error:
            if error.errno != errno.EPERM:  # nobody is meant
                raise
            return False

    def _route(self) -> None:
        """Have KVM tell of the end of level-triggered interrupts."""
        routes = self._pc.io_apic.level_triggered()
        if routes == self._routes:
            return
        self._routes = routes
        buffer = bytearray(struct.pack("<2I", len(routes), 0))
        for pin, destination, logical, vector, mode in routes:
            address, data = message(destination, logical, vector, mode, True)
            entry = abi.RoutingEntry(gsi=pin, type=abi.IRQ_ROUTING_MSI)
            entry.u.msi = abi.RoutingMsi(address_lo=address, data=data)
            buffer += bytes(entry)
        assert len(buffer) == sizeof(abi.RoutingHeader) + len(routes) * sizeof(abi.RoutingEntry)
        self._vm.control(abi.SET_GSI_ROUTING, buffer)

    def _on_end_of_interrupt(self) -> Exit | None:
        self._pc.io_apic.end_of_interrupt(self._run_bytes[abi.EXIT_DATA])
        return None


def message(destination: int, logical: bool, vector: int, mode: int, level_triggered: bool) -> tuple[int, int]:
    """(address, data) of an interrupt message (Intel SDM 3A 10.11)."""
    address = _MESSAGE_ADDRESS | destination << 12 | (_LOGICAL if logical else 0)
    return address, vector | mode << 8 | (_LEVEL if level_triggered else 0)
