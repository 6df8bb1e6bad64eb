"""The local APIC of one processor (Intel SDM 3A, chapter 10), in xAPIC and x2APIC mode.

Registers are known by their x2APIC number (MSR 0x800 + number); in the xAPIC
window register n stands at offset 16 n.  The three 256-bit vectors IRR, ISR
and TMR are plain integers: bit n is vector n.

Left out: SMI, INIT and start-up messages (there is one processor, and nobody
to start it), and the level-triggered mode of LINT0/LINT1.
"""

from __future__ import annotations

from collections.abc import Callable

from trivisor.devices.apic_timer import ApicTimer
from trivisor.machine.clock import Clock
from trivisor.machine.interrupts import InterruptSource, Message
from trivisor.machine.memory import PHYSICAL_ADDRESS_BITS
from trivisor.machine.saving import Remembers, Saved
from trivisor.machine.vcpu import GeneralProtection
from trivisor.machine.virtual_apic import END_ASK, END_NOTHING, END_READY, VirtualApic

APIC_BASE = 0xFEE00000
"""Where the window stands after RESET; `IA32_APIC_BASE` moves it."""
BSP, X2APIC_ENABLE, GLOBAL_ENABLE = 1 << 8, 1 << 10, 1 << 11

# Delivery modes (10.5.1, 10.6.1).
FIXED, LOWEST_PRIORITY, SMI, NMI, INIT, STARTUP, EXTINT = 0, 1, 2, 4, 5, 6, 7

# Register numbers (table 10-6).
ID, VERSION, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR = 2, 3, 8, 9, 0xA, 0xB, 0xC, 0xD, 0xE, 0xF
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x10, 0x18, 0x20, 0x28, 0x30, 0x31
LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE, LVT_LINT0, LVT_LINT1, LVT_ERROR = range(0x32, 0x38)
INITIAL_COUNT, CURRENT_COUNT, DIVIDE, SELF_IPI = 0x38, 0x39, 0x3E, 0x3F

MASKED = 1 << 16
SOFTWARE_ENABLE = 1 << 8
_EVERYBODY = 0xFF
"""The destination of a broadcast, but for the ICR in x2APIC mode."""
_VERSION_VALUE = 0x14 | (LVT_ERROR - LVT_TIMER) << 16

# Error status (10.5.3).
SEND_ILLEGAL_VECTOR, RECEIVED_ILLEGAL_VECTOR, ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7

_LVT_WRITABLE = {
    LVT_TIMER: 0x700FF,
    LVT_THERMAL: 0x107FF,
    LVT_PERFORMANCE: 0x107FF,
    LVT_LINT0: 0x1A7FF,
    LVT_LINT1: 0x1A7FF,
    LVT_ERROR: 0x100FF,
}
_ICR_WRITABLE = 0xCCFFF
_DELIVERY_STATUS, _REMOTE_IRR = 1 << 12, 1 << 14

_X2APIC_ACCEPTED = {
    TPR: 0xFF,
    EOI: 0,
    SVR: 0x1FF,
    ESR: 0,
    **{number: mask | _DELIVERY_STATUS for number, mask in _LVT_WRITABLE.items()},
    LVT_LINT0: _LVT_WRITABLE[LVT_LINT0] | _DELIVERY_STATUS | _REMOTE_IRR,
    LVT_LINT1: _LVT_WRITABLE[LVT_LINT1] | _DELIVERY_STATUS | _REMOTE_IRR,
    INITIAL_COUNT: 0xFFFFFFFF,
    DIVIDE: 0xB,
    SELF_IPI: 0xFF,
    ICR_LOW: 0xFFFFFFFF_00000000 | _ICR_WRITABLE | _DELIVERY_STATUS,
}
"""What WRMSR takes without #GP: the registers that can be written, and their bits that are not reserved."""


def _stay(base: int) -> bool:
    """The window of an APIC that is on no bus."""
    return True


def _nothing() -> None:
    """A hook nobody listens to."""


def _ignore_vector(vector: int) -> None:
    """An EOI nobody waits for."""


class LocalApic(Remembers):
    """One processor's interrupt controller; also what the processor sees as its `InterruptController`.

    `tsc()` is the guest's time-stamp counter, which runs at `tsc_frequency` Hz;
    `crystal_frequency` Hz feeds the timer's count modes.  As a `Device` it is
    the 4 KiB xAPIC window.  After construction it is in its reset state.
    """

    remembered = (
        "_base", "_id", "_tpr", "_ldr", "_dfr", "_svr", "_esr", "_errors", "_icr", "_destination",
        "_irr", "_isr", "_tmr", "_lvt", "_ready", "_extint_message", "_extint_open", "_lint0_level", "_lint1_level",
        "timer",
    )  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        apic_id: int,
        tsc: Callable[[], int],
        tsc_frequency: int,
        crystal_frequency: int,
        physical_bits: int = PHYSICAL_ADDRESS_BITS,
        *,
        has_x2apic: bool = True,
    ) -> None:
        self.apic_id = apic_id
        self._address_mask = (1 << physical_bits) - 0x1000
        self._base_known = self._address_mask | GLOBAL_ENABLE | BSP | (X2APIC_ENABLE if has_x2apic else 0)
        self.pic: InterruptSource | None = None
        """The 8259 pair whose INTR pin is wired to LINT0."""
        self.on_pending: Callable[[], None] = _nothing
        """Called when an interrupt becomes deliverable that was not before."""
        self.on_nmi: Callable[[], None] = _nothing
        self.on_moved: Callable[[int], bool] = _stay
        """Called with the window's new physical address; returns whether it can be seen there."""
        self.on_end_of_interrupt: Callable[[int], None] = _ignore_vector
        """The EOI message for a level-triggered vector, for the I/O APICs."""
        self._elsewhere: Message | None = None
        self.timer = ApicTimer(clock, tsc, tsc_frequency, crystal_frequency, self._timer_expired)
        self.virtual = VirtualApic()
        """The task priority is kept there, and some EOIs arrive there."""
        self._base = APIC_BASE | GLOBAL_ENABLE | BSP
        self._visible = True  # nothing else hides the window
        self._lint0_level = self._lint1_level = False
        self._extint_open = False
        """Whether the 8259's INTR reaches the processor."""
        self._readers: dict[int, Callable[[], int]] = {
            ID: self._read_id,
            VERSION: lambda: _VERSION_VALUE,
            TPR: lambda: self.virtual.tpr,
            PPR: self._priority,
            LDR: self._read_ldr,
            SVR: lambda: self._svr,
            ESR: lambda: self._esr,
            ICR_LOW: lambda: self._icr,
            INITIAL_COUNT: lambda: self.timer.initial_count,
            CURRENT_COUNT: self.timer.current_count,
            DIVIDE: lambda: self.timer.divide_config,
        }
        self._xapic_readers: dict[int, Callable[[], int]] = {
            APR: lambda: 0,
            EOI: lambda: 0,
            RRD: lambda: 0,
            DFR: lambda: self._dfr,
            ICR_HIGH: lambda: self._destination,
        }
        self._writers: dict[int, Callable[[int], None]] = {
            TPR: self._write_tpr,
            EOI: self._write_eoi,
            SVR: self._write_svr,
            ESR: self._write_esr,
            INITIAL_COUNT: self.timer.start,
            DIVIDE: self.timer.set_divide,
        }
        self._xapic_writers: dict[int, Callable[[int], None]] = {
            ID: self._write_id,
            LDR: self._write_ldr,
            DFR: self._write_dfr,
            ICR_LOW: self._write_icr,
            ICR_HIGH: self._write_icr_high,
        }
        self._reset()

    def _reset(self) -> None:
        """The state after power-up or INIT (10.4.7.1)."""
        self._id = self.apic_id & 0xFF
        self._place()
        self.virtual.tpr = self._ldr = self._esr = self._errors = self._icr = self._destination = 0
        self._dfr = 0xFFFFFFFF
        self._svr = 0xFF
        self._irr = self._isr = self._tmr = 0
        self.virtual.take_end()
        self._lvt = dict.fromkeys(_LVT_WRITABLE, MASKED)
        self._ready = False
        self._extint_message = False
        self.timer.reset()
        self._update()

    @property
    def _tpr(self) -> int:
        return self.virtual.tpr

    @_tpr.setter
    def _tpr(self, value: int) -> None:
        self.virtual.tpr = value & 0xFF

    @property
    def _icr(self) -> int:
        return self.virtual.command

    @_icr.setter
    def _icr(self, value: int) -> None:
        self.virtual.command = value & 0xFFFFFFFF

    @property
    def _destination(self) -> int:
        """Of the xAPIC's only the top byte counts."""
        return self.virtual.destination & (0xFFFFFFFF if self._base & X2APIC_ENABLE else 0xFF000000)

    @_destination.setter
    def _destination(self, value: int) -> None:
        self.virtual.destination = value & 0xFFFFFFFF

    def save(self) -> Saved:
        """As `Remembers` has it, with every interrupt ended that the processor has ended."""
        self._catch_up()
        return super().save()

    def loaded(self) -> None:
        self._elsewhere = None
        self.virtual.take_end()
        self._visible = self.on_moved(self._base & self._address_mask)
        self._place()
        self._update()

    def retire(self, elsewhere: Message) -> None:
        """Leave the work to another local APIC, which has this one's state, until `load` gives it back.

        Meanwhile messages go to `elsewhere`, and the 8259's INTR goes past this one to the processor.
        """
        self._base &= ~(GLOBAL_ENABLE | X2APIC_ENABLE)
        self._reset()
        self._elsewhere = elsewhere

    def enter_virtual_wire_mode(self) -> None:
        """Put the APIC in the state firmware leaves it in: 8259 through LINT0, NMI on LINT1."""
        self._write_svr(SOFTWARE_ENABLE | 0xFF)
        self._write_lvt(LVT_LINT0, EXTINT << 8)
        self._write_lvt(LVT_LINT1, NMI << 8)

    # The processor's side.

    def pending(self) -> bool:
        """Whether an interrupt waits that the processor would take with IF set."""
        return self._ready or (self._extint_open and self.pic is not None and self.pic.pending())

    def acknowledge(self) -> int:
        """The interrupt acknowledge cycle: the vector to deliver, now in service."""
        if self._extint_open and self.pic is not None and self.pic.pending():
            self._extint_message = False
            self._update()
            return self.pic.acknowledge()
        if not self._ready:
            return self._svr & 0xFF  # withdrawn since (10.9): the spurious vector, without a bit in ISR
        vector = self._irr.bit_length() - 1
        self._irr &= ~(1 << vector)
        self._isr |= 1 << vector
        self._judge()
        return vector

    @property
    def cr8(self) -> int:
        """The task priority as CR8 shows it, 0 to 15 (10.8.6)."""
        return self.virtual.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self._write_tpr((value & 0xF) << 4)

    # The buses' side.

    def deliver(self, vector: int, mode: int, level_triggered: bool) -> bool:
        """Take an interrupt message; return whether it was accepted.  `matches` tells whom it is for."""
        if self._elsewhere is not None:
            return self._elsewhere(_EVERYBODY, False, vector, mode, level_triggered)
        if not self._base & GLOBAL_ENABLE:
            return False
        if mode in (FIXED, LOWEST_PRIORITY):
            return bool(self._svr & SOFTWARE_ENABLE) and self._accept(vector, level_triggered)
        if mode == NMI:
            self.on_nmi()
        elif mode == EXTINT:
            self._extint_message = True
            self._update()
            self._extint_raised()
        return True

    def message(self, destination: int, logical: bool, vector: int, mode: int, level_triggered: bool) -> bool:
        """A message on the bus, of an I/O APIC or MSI; return whether it was accepted."""
        if self._elsewhere is not None:
            return self._elsewhere(destination, logical, vector, mode, level_triggered)
        return self.matches(destination, logical) and self.deliver(vector, mode, level_triggered)

    def matches(self, destination: int, logical: bool) -> bool:
        """Whether a message from an I/O APIC or MSI (8-bit `destination`) is for this processor (10.6.2)."""
        return self._matches(destination, logical, broadcast=_EVERYBODY)

    def lint0(self, level: bool) -> None:
        """The LINT0 pin, wired to the 8259's INTR."""
        rising = level and not self._lint0_level
        self._lint0_level = level
        if level and self._extint_open:
            self._extint_raised()
        elif rising:
            self._local_interrupt(LVT_LINT0)

    def lint1(self, level: bool) -> None:
        """The LINT1 pin, wired to the board's NMI sources; plainly NMI while the APIC is off."""
        rising = level and not self._lint1_level
        self._lint1_level = level
        if not rising:
            return
        if self._base & GLOBAL_ENABLE:
            self._local_interrupt(LVT_LINT1)
        else:
            self.on_nmi()

    # The register windows.

    def read(self, offset: int, size: int) -> int:
        """Read the xAPIC window.  Of a register's 16 bytes the first four count (10.4.1)."""
        if self._base & (GLOBAL_ENABLE | X2APIC_ENABLE) != GLOBAL_ENABLE:
            return (1 << 8 * size) - 1
        lane = offset & 0xF
        if lane > 3:
            return 0
        number = offset >> 4
        value = self._read(number)
        if value is None:
            reader = self._xapic_readers.get(number)
            if reader is None:
                self._error(ILLEGAL_REGISTER)
                return 0
            value = reader()
        return value >> 8 * lane & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the xAPIC window; only aligned accesses of 32 bits or more do anything."""
        if size < 4 or offset & 0xF or self._base & (GLOBAL_ENABLE | X2APIC_ENABLE) != GLOBAL_ENABLE:
            return
        number = offset >> 4
        value &= 0xFFFFFFFF
        if number in _LVT_WRITABLE:
            self._write_lvt(number, value)
            return
        writer = self._writers.get(number) or self._xapic_writers.get(number)
        if writer is not None:
            writer(value)
        elif self._read(number) is None and number not in self._xapic_readers:
            self._error(ILLEGAL_REGISTER)

    def read_msr(self, index: int) -> int:
        """RDMSR of 0x800 to 0x83f (table 10-6); `GeneralProtection` outside x2APIC mode or if unreadable."""
        if not self._base & X2APIC_ENABLE:
            raise GeneralProtection
        if index == 0x800 + ICR_LOW:
            return self._destination << 32 | self._icr
        value = self._read(index - 0x800)
        if value is None:
            raise GeneralProtection
        return value

    def write_msr(self, index: int, value: int) -> None:
        """WRMSR of 0x800 to 0x83f; `GeneralProtection` also for reserved bits."""
        number = index - 0x800
        accepted = _X2APIC_ACCEPTED.get(number)
        if accepted is None or value & ~accepted or not self._base & X2APIC_ENABLE:
            raise GeneralProtection
        if number in _LVT_WRITABLE:
            self._write_lvt(number, value)
        elif number == ICR_LOW:
            self._destination = value >> 32
            self._write_icr(value & 0xFFFFFFFF)
        elif number == SELF_IPI:
            self._write_icr(0x40000 | value)
        else:
            self._writers[number](value)

    def read_base(self) -> int:
        """RDMSR of IA32_APIC_BASE, 0x1b (10.4.4)."""
        return self._base

    def write_base(self, value: int) -> None:
        """WRMSR of IA32_APIC_BASE: the mode changes of figure 10-27; `GeneralProtection` for all others."""
        mode = value & (GLOBAL_ENABLE | X2APIC_ENABLE)
        old = self._base & (GLOBAL_ENABLE | X2APIC_ENABLE)
        address = value & self._address_mask
        if value & ~self._base_known or mode == X2APIC_ENABLE:
            raise GeneralProtection
        if (mode & X2APIC_ENABLE and not old) or (mode == GLOBAL_ENABLE and old & X2APIC_ENABLE):
            raise GeneralProtection
        if address != self._base & self._address_mask:
            self._visible = self.on_moved(address)
        self._base = address | BSP | mode
        self._place()
        if not mode:
            self._reset()
        elif mode & ~old & X2APIC_ENABLE:
            self._icr = self._destination = 0
        self._update()

    def _place(self) -> None:
        """Say where the registers are."""
        mode = self._base & (GLOBAL_ENABLE | X2APIC_ENABLE)
        window = self._base & self._address_mask if mode == GLOBAL_ENABLE and self._visible else None
        x2apic = bool(mode & X2APIC_ENABLE)
        self.virtual.place(window, x2apic=x2apic, identity=self.apic_id if x2apic else self._id)

    def read_tsc_deadline(self) -> int:
        """RDMSR of IA32_TSC_DEADLINE, 0x6e0: 0 when not armed (10.5.4.1)."""
        return self.timer.deadline

    def write_tsc_deadline(self, value: int) -> None:
        """WRMSR of IA32_TSC_DEADLINE, in TSC ticks; 0 disarms, the past fires at once."""
        self.timer.set_deadline(value)

    def tsc_changed(self) -> None:
        """The guest set its TSC: work out again when the armed deadline is."""
        self.timer.set_deadline(self.timer.deadline)

    # Registers.

    def _read(self, number: int) -> int | None:
        """A register that both modes have; None for one that this mode may not know."""
        if number in self._lvt:
            return self._lvt[number]
        if ISR <= number < ESR:
            self._catch_up()
            bank = (self._isr, self._tmr, self._irr)[(number - ISR) >> 3]
            return bank >> 32 * (number & 7) & 0xFFFFFFFF
        reader = self._readers.get(number)
        return None if reader is None else reader()

    def _read_id(self) -> int:
        return self.apic_id if self._base & X2APIC_ENABLE else self._id << 24

    def _read_ldr(self) -> int:
        if self._base & X2APIC_ENABLE:
            return self.apic_id >> 4 << 16 | 1 << (self.apic_id & 0xF)
        return self._ldr << 24

    def _write_id(self, value: int) -> None:
        self._id = value >> 24
        self._place()

    def _write_ldr(self, value: int) -> None:
        self._ldr = value >> 24

    def _write_dfr(self, value: int) -> None:
        self._dfr = value | 0x0FFFFFFF

    def _write_tpr(self, value: int) -> None:
        self.virtual.tpr = value & 0xFF
        self._update()

    def _write_eoi(self, value: int) -> None:
        """End the most urgent interrupt in service (10.8.5)."""
        self._catch_up()
        if not self._isr:
            return
        vector = self._isr.bit_length() - 1
        self._isr &= ~(1 << vector)
        self._update()
        if self._tmr >> vector & 1:
            self.on_end_of_interrupt(vector)

    def _write_svr(self, value: int) -> None:
        self._svr = value & 0x1FF
        if not value & SOFTWARE_ENABLE:
            for number in self._lvt:
                self._lvt[number] |= MASKED
            self._update()

    def _write_esr(self, value: int) -> None:
        self._esr, self._errors = self._errors, 0

    def _write_lvt(self, number: int, value: int) -> None:
        value &= _LVT_WRITABLE[number]
        if not self._svr & SOFTWARE_ENABLE:
            value |= MASKED
        self._lvt[number] = value
        if number == LVT_TIMER:
            self.timer.set_mode(value >> 17 & 3)
        elif number == LVT_LINT0:
            self._update()

    def _write_icr_high(self, value: int) -> None:
        self._destination = value

    def _write_icr(self, value: int) -> None:
        """Send an interprocessor interrupt (10.6.1)."""
        self._icr = value & _ICR_WRITABLE
        vector, mode, shorthand = value & 0xFF, value >> 8 & 7, value >> 18 & 3
        if mode in (FIXED, LOWEST_PRIORITY) and vector < 16:
            self._error(SEND_ILLEGAL_VECTOR)
        elif mode not in (FIXED, LOWEST_PRIORITY, NMI):
            return  # the rest means nothing to the processor that sends it, and there is no other
        elif shorthand in (1, 2) or (not shorthand and self._addressed(bool(value & 0x800))):
            self.deliver(vector, mode, False)

    # The machinery.

    def _addressed(self, logical: bool) -> bool:
        """Whether the ICR's destination names this processor."""
        if self._base & X2APIC_ENABLE:
            return self._matches(self._destination, logical, broadcast=0xFFFFFFFF)
        return self._matches(self._destination >> 24, logical, broadcast=_EVERYBODY)

    def _matches(self, destination: int, logical: bool, broadcast: int) -> bool:
        if destination == broadcast:
            return True
        if self._base & X2APIC_ENABLE:
            if not logical:
                return destination == self.apic_id
            own = self._read_ldr()
            return destination >> 16 == own >> 16 and bool(destination & own & 0xFFFF)
        if not logical:
            return destination == self._id
        if self._dfr >> 28 == 0xF:  # flat
            return bool(destination & self._ldr)
        return destination >> 4 in (self._ldr >> 4, 0xF) and bool(destination & self._ldr & 0xF)

    def _accept(self, vector: int, level_triggered: bool) -> bool:
        if vector < 16:
            self._error(RECEIVED_ILLEGAL_VECTOR)
            return False
        bit = 1 << vector
        self._irr |= bit
        if level_triggered:
            self._tmr |= bit
        else:
            self._tmr &= ~bit
        self._judge()
        return True

    def _update(self) -> None:
        """Work out again what the processor may be interrupted with, after any change (10.8.3)."""
        enabled = bool(self._base & GLOBAL_ENABLE)
        self._judge()
        was_open = self._extint_open
        self._extint_open = (
            not enabled or self._extint_message or self._lvt[LVT_LINT0] & (MASKED | 0x700) == EXTINT << 8
        )
        if self._extint_open and not was_open:
            self._extint_raised()

    def _judge(self) -> None:
        """Whether the most urgent request may interrupt what is in service, after a change of either or of the TPR."""
        virtual, irr, isr = self.virtual, self._irr, self._isr
        if virtual.take_end():
            isr = self._isr = isr & ~(1 << isr.bit_length() - 1)
        if not irr:
            self._ready = False
            self._allow()
            return
        was_ready = self._ready
        priority = max(virtual.tpr, isr.bit_length() - 1)
        self._ready = (irr.bit_length() - 1) >> 4 > priority >> 4 and bool(self._base & GLOBAL_ENABLE)
        virtual.allow(tpr=False, end=END_ASK)
        if self._ready and not was_ready:
            self.on_pending()

    def _priority(self) -> int:
        """The processor priority (10.8.3.1)."""
        self._catch_up()
        tpr, in_service = self.virtual.tpr, max(self._isr.bit_length() - 1, 0)
        return tpr if tpr >> 4 >= in_service >> 4 else in_service & 0xF0

    def _catch_up(self) -> None:
        """An interrupt may have been ended without our being asked."""
        if self.virtual.take_end():
            self._isr &= ~(1 << self._isr.bit_length() - 1)
            self._allow()

    def _allow(self) -> None:
        """Say what may be done without asking, as nothing would come of it."""
        end = END_ASK
        if not self._irr:
            vector = self._isr.bit_length() - 1
            end = END_NOTHING if vector < 0 else END_ASK if self._tmr >> vector & 1 else END_READY
        self.virtual.allow(tpr=not self._irr, end=end)

    def _extint_raised(self) -> None:
        if self.pic is not None and self.pic.pending():
            self.on_pending()

    def _local_interrupt(self, number: int) -> None:
        """An event of the local vector table (10.5.1)."""
        entry = self._lvt[number]
        if not entry & MASKED:
            mode = FIXED if number in (LVT_TIMER, LVT_ERROR) else entry >> 8 & 7
            if mode in (FIXED, NMI):
                self.deliver(entry & 0xFF, mode, False)

    def _timer_expired(self) -> None:
        entry = self._lvt[LVT_TIMER]
        if not entry & MASKED and self._base & GLOBAL_ENABLE and self._svr & SOFTWARE_ENABLE:
            self._accept(entry & 0xFF, False)

    def _error(self, error: int) -> None:
        if not self._errors & error:  # also ends the recursion through an illegal vector in LVT_ERROR
            self._errors |= error
            self._local_interrupt(LVT_ERROR)
