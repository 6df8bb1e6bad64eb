"""The keyboard controller of a PC with an AT keyboard on it, and the fast reset port.

Sources: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and auxiliary
device controller" and "Keyboard"; PIIX3 data sheet for port 0x92.  It is a controller
without an auxiliary (mouse) port: drivers that look for one are told so at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from trivisor.devices.bytewise import ByteDevice
from trivisor.machine.interrupts import Line
from trivisor.machine.saving import Remembers

_STATUS_FULL, _STATUS_SYSTEM, _STATUS_COMMAND = 0x01, 0x04, 0x08
_STATUS_UNLOCKED, _STATUS_TIMEOUT = 0x10, 0x40
_MODE_INTERRUPT, _MODE_SYSTEM, _MODE_DISABLED, _MODE_NO_AUX, _MODE_TRANSLATE = 0x01, 0x04, 0x10, 0x20, 0x40
_ACK, _RESEND, _PASSED = 0xFA, 0xFE, 0xAA
_SELF_TEST_PASSED, _TEST_PASSED, _CLOCK_STUCK_LOW = 0x55, 0x00, 0x01
_INPUT_PORT = 0x80  # the keyboard is not locked
_OUTPUT_RESET, _OUTPUT_A20 = 0x01, 0x02
_QUEUE_SIZE = 16
_TRANSLATED = {0x01: 0x43, 0x02: 0x41, 0x03: 0x3F, 0x83: 0x41}
"""From scan code set 2 to 1, as far as it changes the answers of a keyboard."""


class Keyboard(Remembers):
    """An AT keyboard that answers every command; nobody presses its keys."""

    remembered = ("_parameter_of", "_scan_code_set", "_last")
    _WITH_PARAMETER = (0xED, 0xF0, 0xF3)  # lamps, scan code set, typematic rate

    def __init__(self) -> None:
        self._parameter_of = 0
        self._scan_code_set = 2
        self._last = _ACK

    def command(self, value: int) -> bytes:
        """The bytes that the keyboard sends back for `value`."""
        reply = self._reply(value)
        self._last = reply[-1]
        return reply

    def _reply(self, value: int) -> bytes:
        parameter_of, self._parameter_of = self._parameter_of, 0
        if parameter_of and value < 0x80:
            if parameter_of == 0xF0 and value == 0:
                return bytes((_ACK, self._scan_code_set))
            if parameter_of == 0xF0 and value <= 3:
                self._scan_code_set = value
            return bytes((_ACK,))
        if value in self._WITH_PARAMETER:
            self._parameter_of = value
            return bytes((_ACK,))
        if value == 0xFF:
            self._scan_code_set = 2
            return bytes((_ACK, _PASSED))
        if value == 0xFE:
            return bytes((self._last,))
        if value == 0xF2:
            return bytes((_ACK, 0xAB, 0x83))
        if value == 0xEE:
            return bytes((0xEE,))
        return bytes((_ACK if 0xF4 <= value <= 0xFD else _RESEND,))


class I8042(Remembers):
    """The controller: `data` is the window of port 0x60, `command` that of port 0x64.

    `on_reset` is called when the guest pulls the processor's reset line.
    Without a keyboard, commands to it time out at once.  The A20 gate is kept
    but does nothing: address line 20 is always on.  Starts as a BIOS leaves it.
    """

    remembered = ("_ram", "_status", "_output_port", "_output", "_queue", "_parameter_of", "_level", "_keyboard")

    def __init__(self, irq1: Line, on_reset: Callable[[], None], keyboard: bool = True) -> None:
        self._irq1 = irq1
        self._on_reset = on_reset
        self._keyboard = Keyboard() if keyboard else None
        self._ram = bytearray(32)
        self._ram[0] = _MODE_INTERRUPT | _MODE_SYSTEM | _MODE_NO_AUX | _MODE_TRANSLATE
        self._status = _STATUS_SYSTEM | _STATUS_UNLOCKED
        self._output_port = _OUTPUT_RESET | _OUTPUT_A20
        self._output = 0
        self._queue: deque[int] = deque(maxlen=_QUEUE_SIZE)  # what the keyboard has yet to send
        self._parameter_of = 0
        self._level = False
        self.data = _Window(self._read_data, self._write_data)
        self.command = _Window(self._read_status, self._write_command)

    def _read_status(self) -> int:
        return self._status

    def _read_data(self) -> int:
        value = self._output
        self._status &= ~(_STATUS_FULL | _STATUS_TIMEOUT)
        self._update()
        self._next_from_keyboard()
        return value

    def _write_data(self, value: int) -> None:
        self._status &= ~_STATUS_COMMAND
        command, self._parameter_of = self._parameter_of, 0
        if 0x60 <= command < 0x80:
            self._ram[command & 0x1F] = value
            self._next_from_keyboard()
            self._update()
        elif command == 0xD1:
            self._write_output_port(value)
        elif command in (0xD2, 0xD3):
            self._answer(value)
        elif command != 0xD4:  # what is meant for the auxiliary device goes nowhere
            self._to_keyboard(value)

    def _write_command(self, value: int) -> None:
        self._status |= _STATUS_COMMAND
        self._parameter_of = 0
        if value < 0x20:
            return
        if value < 0x40:
            self._answer(self._ram[value & 0x1F])
        elif 0x60 <= value < 0x80 or 0xD1 <= value <= 0xD4:
            self._parameter_of = value
        elif value in (0xA7, 0xA8):
            self._set_mode(_MODE_NO_AUX, value == 0xA7)
        elif value == 0xA9:
            self._answer(_CLOCK_STUCK_LOW)
        elif value == 0xAA:
            self._status |= _STATUS_SYSTEM
            self._answer(_SELF_TEST_PASSED)
        elif value == 0xAB:
            self._answer(_TEST_PASSED if self._keyboard else _CLOCK_STUCK_LOW)
        elif value in (0xAD, 0xAE):
            self._set_mode(_MODE_DISABLED, value == 0xAD)
            self._next_from_keyboard()
        elif value == 0xC0:
            self._answer(_INPUT_PORT)
        elif value == 0xD0:
            self._answer(self._output_port)
        elif value >= 0xF0 and not value & _OUTPUT_RESET:  # pulse output port bits low
            self._on_reset()

    def _set_mode(self, bit: int, on: bool) -> None:
        self._ram[0] = self._ram[0] & ~bit | (bit if on else 0)

    def _write_output_port(self, value: int) -> None:
        self._output_port = value
        if not value & _OUTPUT_RESET:
            self._on_reset()

    def _answer(self, value: int) -> None:
        """Put a byte of the controller's own into the output buffer, over whatever was there."""
        self._status &= ~_STATUS_TIMEOUT
        self._fill(value)

    def _fill(self, value: int) -> None:
        self._status &= ~_STATUS_FULL
        self._update()  # let an edge-triggered interrupt controller see each byte
        self._output = value
        self._status |= _STATUS_FULL
        self._update()

    def _to_keyboard(self, value: int) -> None:
        self._set_mode(_MODE_DISABLED, False)  # sending to the keyboard enables it
        if self._keyboard is None:
            self._status |= _STATUS_TIMEOUT
            self._fill(_RESEND)
        else:
            self._queue.clear()  # a command interrupts what the keyboard was sending
            self._queue.extend(self._keyboard.command(value))
            self._next_from_keyboard()

    def _next_from_keyboard(self) -> None:
        if self._queue and not self._status & _STATUS_FULL and not self._ram[0] & _MODE_DISABLED:
            value = self._queue.popleft()
            if self._ram[0] & _MODE_TRANSLATE:
                value = _TRANSLATED.get(value, value)
            self._fill(value)

    def _update(self) -> None:
        level = bool(self._status & _STATUS_FULL and self._ram[0] & _MODE_INTERRUPT)
        if level != self._level:
            self._level = level
            self._irq1(level)


class _Window(ByteDevice):
    """One port that reads and writes through the controller."""

    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read = read
        self._write = write

    def read_byte(self, offset: int) -> int:
        return self._read()

    def write_byte(self, offset: int, value: int) -> None:
        self._write(value)


class SystemControlPortA(ByteDevice, Remembers):
    """Port 0x92: bit 0 resets the processor when it goes to 1; bit 1 is an A20 gate, kept without effect."""

    remembered = ("_value",)

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = _OUTPUT_A20

    def read_byte(self, offset: int) -> int:
        return self._value

    def write_byte(self, offset: int, value: int) -> None:
        pulled = value & ~self._value & 1
        self._value = value & 3
        if pulled:
            self._on_reset()
