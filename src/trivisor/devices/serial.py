"""The 16550A UART (National Semiconductor PC16550D data sheet, June 1995).

Transmission takes no time: a byte goes out as it is written and the
transmitter is empty again.  Reception is paced by the programmed baud rate,
so that a driver's interrupt handler always comes to an end of the data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from trivisor.devices.bytewise import ByteDevice
from trivisor.machine.clock import Clock, Timer
from trivisor.machine.fast_ports import QUEUES, READS, FastPorts, FastRegister
from trivisor.machine.interrupts import Line
from trivisor.machine.saving import Remembers

CRYSTAL = 1_843_200
"""Hz of the clock input; the baud rate is a sixteenth of it over the divisor."""
FIFO_SIZE = 16
BACKLOG_SIZE = 65536
"""Bytes of input kept for a guest that does not read."""

_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)
_IER_RX, _IER_THRE, _IER_LINE, _IER_MODEM = 1, 2, 4, 8
_LCR_DLAB = 0x80
_MCR_OUT2, _MCR_LOOP = 0x08, 0x10
_LSR_DATA, _LSR_OVERRUN, _LSR_ERRORS, _LSR_EMPTY = 0x01, 0x02, 0x1E, 0x60
_IIR_NONE, _IIR_LINE, _IIR_RX, _IIR_TIMEOUT, _IIR_THRE, _IIR_MODEM = 1, 6, 4, 12, 2, 0
_MSR_CONNECTED = 0xB0  # CTS, DSR and DCD: somebody listens at the other end
_TRIGGERS = (1, 4, 8, 14)
_BYTES = tuple(bytes((value,)) for value in range(256))


class Uart16550(ByteDevice, Remembers):
    """One serial port; eight byte registers.

    `output` is called with each byte as the guest sends it.  All methods
    belong to the vCPU's thread.
    """

    length = 8
    remembered = (
        "_level", "_backlog", "_fifo", "_quiet_since", "_timed_out", "_thre", "_divisor", "_ier", "_lcr", "_mcr",
        "_scr", "_fcr", "_lsr", "_msr", "_direct",
    )  # fmt: skip

    def __init__(self, clock: Clock, irq: Line, output: Callable[[bytes], None]) -> None:
        self._clock = clock
        self._irq = irq
        self._output = output
        self._level = False
        self._backlog: deque[int] = deque()
        self._fifo: deque[int] = deque()
        self._timer: Timer | None = None
        self._quiet_since = 0  # guest ns of the last movement in the receive FIFO
        self._timed_out = False  # the character timeout indication
        self._thre = False  # the THRE interrupt is pending (only while enabled)
        self._divisor = 1
        self._ier = self._lcr = self._mcr = self._scr = self._fcr = 0
        self._lsr = _LSR_EMPTY
        self._msr = _MSR_CONNECTED
        self._direct = True  # a write at offset 0 does nothing but send
        self._fast: FastPorts | None = None
        self._fast_data = self._fast_lsr = FastRegister.alone()

    def reveal(self, fast: FastPorts, base: int) -> None:
        """Let engines go by the line status without asking, and queue what is sent; the device stands at `base`."""
        self._fast = fast
        self._fast_data = fast.queue(base + _DATA, self._output)
        self._fast_lsr = fast.register(base + _LSR)
        self._publish()

    def _publish(self) -> None:
        self._fast_data.set(QUEUES if self._direct else 0)
        self._fast_lsr.set(0 if self._lsr & _LSR_ERRORS else READS, self._lsr)

    def loaded(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._publish()
        self._arm()

    # The host's side

    @property
    def room(self) -> int:
        """How many bytes `feed` would take now."""
        return BACKLOG_SIZE - len(self._backlog)

    def feed(self, data: bytes) -> int:
        """Put `data` on the receive line and return how many bytes of it there was room for."""
        taken = min(len(data), self.room)
        self._backlog.extend(data[:taken])
        if len(self._backlog) == taken:  # else the line is at work already
            self._receive()
        return taken

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        if offset == _LSR and size == 1:
            lsr = self._lsr
            if lsr & _LSR_ERRORS:
                self._lsr = lsr & ~_LSR_ERRORS
                self._publish()
                self._update()
            return lsr
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _DATA and size == 1 and self._direct:
            self._output(_BYTES[value & 0xFF])
            if self._fast is not None:
                self._fast.wrote_slowly()
        else:
            super().write(offset, size, value)

    def read_byte(self, offset: int) -> int:
        if offset == _DATA:
            return self._divisor & 0xFF if self._lcr & _LCR_DLAB else self._take()
        if offset == _IER:
            return self._divisor >> 8 if self._lcr & _LCR_DLAB else self._ier
        if offset == _IIR:
            return self._identify()
        if offset == _LCR:
            return self._lcr
        if offset == _MCR:
            return self._mcr
        if offset == _LSR:
            return self.read(offset, 1)
        if offset == _MSR:
            msr = self._msr
            self._msr = msr & 0xF0
            self._update()
            return msr
        return self._scr

    def write_byte(self, offset: int, value: int) -> None:
        if offset == _DATA:
            if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
                self._arm()
            else:
                self._send(value)
        elif offset == _IER:
            if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
                self._arm()
            else:
                self._enable_interrupts(value & 0x0F)
        elif offset == _IIR:
            self._control_fifo(value)
        elif offset == _LCR:
            self._lcr = value
            self._arm()  # characters have another length
        elif offset == _MCR:
            self._control_modem(value & 0x1F)
        elif offset == _SCR:
            self._scr = value
        self._direct = not (self._lcr & _LCR_DLAB or self._ier & _IER_THRE or self._mcr & _MCR_LOOP)
        self._publish()

    # Transmitter

    def _send(self, value: int) -> None:
        if self._mcr & _MCR_LOOP:
            self._loop_back(value & 0xFF >> 3 - (self._lcr & 3))
        else:
            self._output(_BYTES[value])
        if self._ier & _IER_THRE:
            # The holding register was full for a moment: an edge-triggered controller must see that.
            self._thre = False
            self._update()
            self._thre = True
        self._update()

    def _enable_interrupts(self, value: int) -> None:
        if (value ^ self._ier) & _IER_THRE:
            self._thre = bool(value & _IER_THRE)  # the holding register is always empty
        self._ier = value
        self._update()
        self._arm()

    # Receiver

    def _capacity(self) -> int:
        return FIFO_SIZE if self._fcr & 1 else 1

    def _trigger(self) -> int:
        return _TRIGGERS[self._fcr >> 6] if self._fcr & 1 else 1

    def _character_time(self) -> int:
        """Nanoseconds that a character takes: a start bit, the data, parity, stop bits (section 8.1)."""
        bits = 7 + (self._lcr & 3) + (self._lcr >> 2 & 1) + (self._lcr >> 3 & 1)
        return bits * 16 * (self._divisor or 0x10000) * 1_000_000_000 // CRYSTAL

    def _receive(self) -> None:
        """Move what the FIFO has room for from the line into it."""
        fifo, backlog = self._fifo, self._backlog
        if not self._mcr & _MCR_LOOP:
            for _ in range(min(self._capacity() - len(fifo), len(backlog))):
                fifo.append(backlog.popleft())
                self._quiet_since = self._clock.now()
        self._fifo_changed()

    def _loop_back(self, value: int) -> None:
        if len(self._fifo) < self._capacity():
            self._fifo.append(value)
            self._quiet_since = self._clock.now()
            self._fifo_changed()
        else:
            self._lsr |= _LSR_OVERRUN
            self._publish()

    def _take(self) -> int:
        if not self._fifo:
            return 0
        value = self._fifo.popleft()
        self._timed_out = False
        self._quiet_since = self._clock.now()
        self._fifo_changed()
        return value

    def _fifo_changed(self) -> None:
        if self._fifo:
            self._lsr |= _LSR_DATA
        else:
            self._lsr &= ~_LSR_DATA
            self._timed_out = False
        self._publish()
        self._update()
        self._arm()

    def _arm(self) -> None:
        """Have a timer run by the next event; one that runs too early finds nothing to do."""
        deadline = self._next_event()
        timer = self._timer
        if deadline is None or (timer is not None and timer.deadline <= deadline):
            return
        if timer is not None:
            timer.cancel()
        self._timer = self._clock.at(deadline, self._on_timer)

    def _next_event(self) -> int | None:
        """When the character timeout comes (section 8.10), or more input."""
        if self._fifo:
            if not self._ier & _IER_RX or self._timed_out or len(self._fifo) >= self._trigger():
                return None
            return self._quiet_since + 4 * self._character_time()
        if self._backlog and not self._mcr & _MCR_LOOP:
            return self._quiet_since + max(1, self._capacity() // 4) * self._character_time()
        return None

    def _on_timer(self) -> None:
        self._timer = None
        deadline = self._next_event()
        if deadline is not None and deadline <= self._clock.now():
            if self._fifo:
                self._timed_out = True
                self._update()
            else:
                self._receive()
        self._arm()

    def _control_fifo(self, value: int) -> None:
        """FCR: its other bits count only while bit 0 is written as 1; changing bit 0 empties the FIFOs."""
        if (value ^ self._fcr) & 1 or value & 3 == 3:
            self._fifo.clear()
        self._fcr = value & 0xC9 if value & 1 else 0
        self._fifo_changed()

    # Modem lines and interrupts

    def _control_modem(self, value: int) -> None:
        was_looping = self._mcr & _MCR_LOOP
        self._mcr = value
        lines = _MSR_CONNECTED
        if value & _MCR_LOOP:  # RTS, DTR, OUT1, OUT2 come back as CTS, DSR, RI, DCD
            lines = (value & 2) << 3 | (value & 1) << 5 | (value & 0x0C) << 4
        changed = (lines ^ self._msr) >> 4
        ring_ended = self._msr & ~lines & 0x40  # RI is reported on its trailing edge only
        self._msr = lines | self._msr & 0x0F | changed & 0x0B | (4 if ring_ended else 0)
        self._update()
        if was_looping and not value & _MCR_LOOP:
            self._receive()

    def _source(self) -> int:
        """The most urgent interrupt, as in IIR bits 0 to 3 (table III)."""
        enabled = self._ier
        if enabled & _IER_LINE and self._lsr & _LSR_ERRORS:
            return _IIR_LINE
        if enabled & _IER_RX and self._fifo:
            if len(self._fifo) >= self._trigger():
                return _IIR_RX
            if self._timed_out:
                return _IIR_TIMEOUT
        if self._thre:
            return _IIR_THRE
        if enabled & _IER_MODEM and self._msr & 0x0F:
            return _IIR_MODEM
        return _IIR_NONE

    def _identify(self) -> int:
        source = self._source()
        if source == _IIR_THRE:
            self._thre = False
            self._update()
        return source | (0xC0 if self._fcr & 1 else 0)

    def _update(self) -> None:
        """Drive the interrupt wire, which OUT2 gates on a PC (and the loop-back mode holds OUT2 inactive)."""
        gate = self._mcr & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2
        level = gate and self._source() != _IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)
