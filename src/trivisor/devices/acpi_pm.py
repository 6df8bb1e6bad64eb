"""ACPI fixed hardware: PM1a event and control blocks, and the PM timer.

ACPI specification 6.4, 4.8.3; Intel PIIX4 data sheet, 7.1, for the order of
the blocks.  The board is always in ACPI mode: there is no SMI command port
and SCI_EN reads as one.
"""

from __future__ import annotations

from collections.abc import Callable

from trivisor.machine.clock import Clock
from trivisor.machine.interrupts import Line
from trivisor.machine.saving import Remembers

EVENT_BLOCK, CONTROL_BLOCK, TIMER_BLOCK = 0, 4, 8
"""Offsets of PM1a_EVT_BLK (4 bytes), PM1a_CNT_BLK (2) and PM_TMR_BLK (4)."""
WINDOW_LENGTH = 16
TIMER_FREQUENCY = 3_579_545
SLEEP_TYPE_S5 = 0
"""SLP_TYP of power off.  Zero, so that the well-known `outw 0x2000` works as on other monitors' boards."""

_TIMER_STATUS, _GLOBAL_STATUS, _POWER_BUTTON, _SLEEP_BUTTON, _RTC_STATUS = 1, 1 << 5, 1 << 8, 1 << 9, 1 << 10
_ENABLES = _TIMER_STATUS | _GLOBAL_STATUS | _POWER_BUTTON | _SLEEP_BUTTON | _RTC_STATUS
_SCI_ENABLE, _SLEEP_ENABLE = 1, 1 << 13
_CONTROL_KEPT = 0x1C02
_SECOND = 1_000_000_000
_CARRY_SHIFT = 23
"""The timer has 24 bits; its status bit is set whenever the highest changes."""


class AcpiPm(Remembers):
    """The power management window.  `sci` is level-triggered; `on_power_off()` is called on entry to S5."""

    remembered = ("_status", "_enabled", "_control", "_half")

    def __init__(self, clock: Clock, sci: Line, on_power_off: Callable[[], None]) -> None:
        self._clock = clock
        self._sci = sci
        self._on_power_off = on_power_off
        self._status = 0
        self._enabled = 0
        self._control = 0
        self._half = 0
        """The timer's half turn (ticks >> 23) that the status bit has taken note of."""
        self._carry_awaited = False

    def loaded(self) -> None:
        self._carry_awaited = False  # a timer that was set before finds nothing to do
        self._await_carry()

    def press_power_button(self) -> None:
        """Ask the guest to shut down: an SCI, if it listens."""
        self._status |= _POWER_BUTTON
        self._update_sci()

    def read(self, offset: int, size: int) -> int:
        block = offset & ~3
        if block == TIMER_BLOCK:
            value = self._ticks() & 0xFFFFFF
        elif block == EVENT_BLOCK:
            self._note_carry()
            value = self._enabled << 16 | self._status
        elif block == CONTROL_BLOCK:
            value = self._control | _SCI_ENABLE
        else:
            value = 0
        return value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        shift = 8 * (offset & 3)
        lanes = ((1 << 8 * size) - 1) << shift & 0xFFFFFFFF
        value = value << shift & lanes
        block = offset & ~3
        if block == EVENT_BLOCK:
            self._note_carry()
            self._status &= ~value
            self._enabled = (self._enabled & ~(lanes >> 16) | value >> 16) & _ENABLES
            self._update_sci()
        elif block == CONTROL_BLOCK:
            self._control = (self._control & ~lanes | value) & _CONTROL_KEPT
            if value & _SLEEP_ENABLE and self._control >> 10 & 7 == SLEEP_TYPE_S5:
                self._on_power_off()

    def _ticks(self) -> int:
        return self._clock.now() * TIMER_FREQUENCY // _SECOND

    def _note_carry(self) -> None:
        half = self._ticks() >> _CARRY_SHIFT
        if half != self._half:
            self._half = half
            self._status |= _TIMER_STATUS

    def _update_sci(self) -> None:
        self._sci(bool(self._status & self._enabled))
        self._await_carry()

    def _await_carry(self) -> None:
        if self._enabled & _TIMER_STATUS and not self._carry_awaited:
            self._carry_awaited = True
            next_carry = (self._ticks() >> _CARRY_SHIFT) + 1 << _CARRY_SHIFT
            self._clock.at(-(-next_carry * _SECOND // TIMER_FREQUENCY), self._carry)

    def _carry(self) -> None:
        self._carry_awaited = False
        self._note_carry()
        self._update_sci()
