"""The I/O APIC: 24 interrupt pins, each routed by a 64-bit redirection entry (Intel 82093AA data sheet).

Version 0x20, which adds the EOI register at 0x40 (Intel ICH9 data sheet, 13.5).
A `Line` is asserted or not, so the entries' polarity bit is kept but changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from trivisor.machine.interrupts import Line, Message
from trivisor.machine.saving import Remembers

PINS = 24
VERSION = 0x20

MASKED = 1 << 16
LEVEL_TRIGGERED = 1 << 15
REMOTE_IRR = 1 << 14
_LOGICAL = 1 << 11
_LOW_WRITABLE = 0x1AFFF & ~(1 << 12)
_HIGH_WRITABLE = 0xFF000000

_SELECT, _WINDOW, _EOI = 0x00, 0x10, 0x40
_ID_REGISTER, _VERSION_REGISTER, _ARBITRATION_REGISTER, _REDIRECTION = 0, 1, 2, 0x10


class IoApic(Remembers):
    """Turns pin levels into interrupt messages.  As a `Device` it is the index and data window."""

    remembered = ("_select", "_id", "_entries", "_levels")

    def __init__(self, deliver: Message) -> None:
        self._deliver = deliver
        self.on_routed: Callable[[], None] = lambda: None
        """Called when an entry was written to: `level_triggered` may have changed."""
        self._select = 0
        self._id = 0
        self._entries = [MASKED] * PINS
        self._levels = 0

    def line(self, pin: int) -> Line:
        """The wire to `pin`, 0 to 23."""
        if not 0 <= pin < PINS:
            raise ValueError(f"the I/O APIC has no pin {pin}")
        return partial(self._set_level, pin)

    def level_triggered(self) -> list[tuple[int, int, bool, int, int]]:
        """The pins whose interrupts wait for an EOI, each as (pin, destination, logical, vector, delivery mode)."""
        return [
            (pin, entry >> 56, bool(entry & _LOGICAL), entry & 0xFF, entry >> 8 & 7)
            for pin, entry in enumerate(self._entries)
            if entry & LEVEL_TRIGGERED
        ]

    def end_of_interrupt(self, vector: int) -> None:
        """The EOI message of a local APIC: level-triggered pins with this vector may interrupt again."""
        for pin, entry in enumerate(self._entries):
            if entry & (REMOTE_IRR | 0xFF) == REMOTE_IRR | vector:
                self._entries[pin] = entry & ~REMOTE_IRR
                self._service_level(pin)

    def read(self, offset: int, size: int) -> int:
        if offset == _SELECT:
            return self._select
        if offset == _WINDOW:
            return self._read_register(self._select) & (1 << 8 * size) - 1
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _SELECT:
            self._select = value & 0xFF
        elif offset == _WINDOW:
            if size >= 4:
                self._write_register(self._select, value & 0xFFFFFFFF)
        elif offset == _EOI:
            self.end_of_interrupt(value & 0xFF)

    def _read_register(self, register: int) -> int:
        pin, high = divmod(register - _REDIRECTION, 2)
        if 0 <= pin < PINS:
            return self._entries[pin] >> 32 if high else self._entries[pin] & 0xFFFFFFFF
        if register == _VERSION_REGISTER:
            return VERSION | PINS - 1 << 16
        if register in (_ID_REGISTER, _ARBITRATION_REGISTER):
            return self._id << 24
        return 0

    def _write_register(self, register: int, value: int) -> None:
        pin, high = divmod(register - _REDIRECTION, 2)
        if register == _ID_REGISTER:
            self._id = value >> 24 & 0xF
        elif 0 <= pin < PINS:
            entry = self._entries[pin]
            if high:
                entry = entry & 0xFFFFFFFF | (value & _HIGH_WRITABLE) << 32
            else:
                entry = entry & ~_LOW_WRITABLE | value & _LOW_WRITABLE
                if not entry & LEVEL_TRIGGERED:
                    # Linux ends an interrupt on an APIC without EOI register by a turn as edge-triggered.
                    entry &= ~REMOTE_IRR
            self._entries[pin] = entry
            self.on_routed()
            self._service_level(pin)

    def _set_level(self, pin: int, level: bool) -> None:
        bit = 1 << pin
        if not level:
            self._levels &= ~bit
        elif not self._levels & bit:
            self._levels |= bit
            entry = self._entries[pin]
            if entry & LEVEL_TRIGGERED:
                self._service_level(pin)
            elif not entry & MASKED:  # an edge on a masked pin is lost (82093AA, 3.2.4)
                self._send(entry)

    def _service_level(self, pin: int) -> None:
        """Interrupt for an asserted level-triggered pin, unless an earlier one awaits its EOI."""
        entry = self._entries[pin]
        if entry & (LEVEL_TRIGGERED | REMOTE_IRR | MASKED) != LEVEL_TRIGGERED or not self._levels >> pin & 1:
            return
        takes_eoi = not entry & 0x600  # fixed and lowest priority; the other modes know no EOI
        if self._send(entry) and takes_eoi:
            self._entries[pin] |= REMOTE_IRR

    def _send(self, entry: int) -> bool:
        return self._deliver(
            entry >> 56, bool(entry & _LOGICAL), entry & 0xFF, entry >> 8 & 7, bool(entry & LEVEL_TRIGGERED)
        )
