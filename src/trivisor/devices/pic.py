"""Two 8259A interrupt controllers as a PC has them, with edge/level control registers.

Sources: Intel 8259A data sheet (231468-003); 82371SB PIIX3 data sheet for the
ELCR and for ICW1's LTIM bit having no effect beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from trivisor.devices.bytewise import ByteDevice
from trivisor.machine.interrupts import Line, no_line
from trivisor.machine.saving import Remembers

_CASCADE = 2
_CASCADE_BIT = 1 << _CASCADE


class Pic8259(ByteDevice, Remembers):
    """One 8259A: offset 0 takes ICW1, OCW2 and OCW3; offset 1 the other ICWs and the mask.

    `slaves` has a bit for each input with a slave on it; `changed` is called
    whenever the INT output may have changed.
    """

    length = 2
    remembered = (
        "level_inputs", "vector", "irr", "isr", "imr", "_inputs", "_awaited", "_first", "_auto_eoi",
        "_rotate_on_auto_eoi", "_special_mask", "_fully_nested_slave", "_read_isr", "_poll",
    )  # fmt: skip

    def __init__(self, vector: int, slaves: int, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._slaves = slaves
        # A slave's INT is taken as a level, so that a request is never lost between two of its interrupts.
        self.level_inputs = slaves
        """Inputs that are level-triggered, one bit each."""
        self.vector = vector
        self.irr = 0
        self.isr = 0
        self.imr = 0xFF
        self._inputs = 0
        self._awaited: tuple[int, ...] = ()  # the ICWs that the initialization still wants
        self._first = 0  # the input of highest priority
        self._auto_eoi = False
        self._rotate_on_auto_eoi = False
        self._special_mask = False
        self._fully_nested_slave = 0  # the slaves' inputs, in special fully nested mode
        self._read_isr = False
        self._poll = False

    def drive(self, bit: int, level: bool) -> bool:
        """Set the input of `bit`; return whether a request came or went.

        A request that ends before it is acknowledged is withdrawn, in edge
        mode too (data sheet, "Edge and level triggered modes").
        """
        if level == bool(self._inputs & bit) and not self.level_inputs & bit:
            return False
        before = self.irr
        if level:
            self._inputs |= bit
            self.irr |= bit
        else:
            self._inputs &= ~bit
            self.irr &= ~bit
        return self.irr != before

    def set_level_inputs(self, inputs: int) -> None:
        self.level_inputs = inputs | self._slaves
        self.irr = self.irr & ~self.level_inputs | self._inputs & self.level_inputs
        self._changed()

    def request(self) -> int | None:
        """The input that INT now stands for, or None while INT is low."""
        requests = self.irr & ~self.imr
        if not requests or self._awaited:
            return None
        urgent = self._most_urgent(requests)
        serviced = self.isr & ~self.imr if self._special_mask else self.isr
        if serviced:
            if 1 << urgent & self._fully_nested_slave:
                serviced &= ~(1 << urgent)
            if serviced and self._rank(self._most_urgent(serviced)) <= self._rank(urgent):
                return None
        return urgent

    def accept(self, level: int) -> None:
        """The acknowledge cycle for input `level`."""
        bit = 1 << level
        if not self.level_inputs & bit:
            self.irr &= ~bit
        if not self._auto_eoi:
            self.isr |= bit
        elif self._rotate_on_auto_eoi:
            self._first = level + 1 & 7

    def read_byte(self, offset: int) -> int:
        if self._poll:
            return self._poll_cycle()
        if offset:
            return self.imr
        return self.isr if self._read_isr else self.irr

    def write_byte(self, offset: int, value: int) -> None:
        if offset == 0:
            if value & 0x10:
                self._initialize(value)
            elif value & 0x08:
                self._operation_3(value)
            else:
                self._operation_2(value)
        elif self._awaited:
            self._initialization_word(value)
        else:
            self.imr = value
        self._changed()

    def _rank(self, level: int) -> int:
        """0 for the input of highest priority to 7 for the lowest."""
        return level - self._first & 7

    def _most_urgent(self, bits: int) -> int:
        rotated = (bits << 8 | bits) >> self._first & 0xFF
        return (rotated & -rotated).bit_length() - 1 + self._first & 7

    def _poll_cycle(self) -> int:
        self._poll = False
        level = self.request()
        if level is None:
            return 0
        self.accept(level)
        self._changed()
        return 0x80 | level

    def _initialize(self, icw1: int) -> None:
        single, with_icw4 = icw1 & 2, icw1 & 1
        self._awaited = (2,) + (() if single else (3,)) + ((4,) if with_icw4 else ())
        # The edge sense is reset: an input that is high now must fall first.
        self.irr = self._inputs & self.level_inputs
        self.isr = self.imr = 0
        self._first = 0
        self._auto_eoi = self._rotate_on_auto_eoi = False
        self._special_mask = self._read_isr = self._poll = False
        self._fully_nested_slave = 0

    def _initialization_word(self, value: int) -> None:
        word, self._awaited = self._awaited[0], self._awaited[1:]
        if word == 2:
            self.vector = value & 0xF8
        elif word == 4:
            self._auto_eoi = bool(value & 0x02)
            self._fully_nested_slave = self._slaves if value & 0x10 else 0
        # ICW3 tells how the chips are wired, which the board fixes.

    def _operation_2(self, value: int) -> None:
        rotate, specific, end = value & 0x80, value & 0x40, value & 0x20
        level = value & 7
        if not end:
            if specific:
                self._first = level + 1 & 7 if rotate else self._first
            else:
                self._rotate_on_auto_eoi = bool(rotate)
            return
        if not specific:
            serviced = self.isr & ~self.imr if self._special_mask else self.isr
            if not serviced:
                return
            level = self._most_urgent(serviced)
        self.isr &= ~(1 << level)
        if rotate:
            self._first = level + 1 & 7

    def _operation_3(self, value: int) -> None:
        if value & 0x40:
            self._special_mask = bool(value & 0x20)
        if value & 0x04:
            self._poll = True
        elif value & 0x02:
            self._read_isr = bool(value & 0x01)


class _EdgeLevelControl(ByteDevice, Remembers):
    """ELCR1 and ELCR2: a 1 makes the input level-triggered; the system board's own inputs stay on edges."""

    length = 2
    _WRITABLE = (0xF8, 0xDE)
    remembered = ("_values",)

    def __init__(self, master: Pic8259, slave: Pic8259) -> None:
        self._chips = (master, slave)
        self._values = [0, 0]

    def read_byte(self, offset: int) -> int:
        return self._values[offset]

    def write_byte(self, offset: int, value: int) -> None:
        self._values[offset] = value & self._WRITABLE[offset]
        self._chips[offset].set_level_inputs(self._values[offset])


class DualPic(Remembers):
    """A master with a slave on input 2.  `output` is the processor's INTR pin.

    Starts masked, with the vectors that a BIOS gives (8 and 0x70).
    """

    remembered = ("_level", "master", "slave", "elcr")

    def __init__(self, output: Line) -> None:
        self._output = output
        self._level = False
        self.master = Pic8259(0x08, _CASCADE_BIT, self._update)
        self.slave = Pic8259(0x70, 0, self._update)
        self.elcr = _EdgeLevelControl(self.master, self.slave)

    def line(self, number: int) -> Line:
        """The wire of IRQ `number`, 0 to 15; IRQ 2 is taken by the cascade and leads nowhere."""
        if not 0 <= number < 16:
            raise ValueError(f"IRQ {number} is not between 0 and 15")
        if number == _CASCADE:
            return no_line
        chip = self.master if number < 8 else self.slave
        bit = 1 << (number & 7)

        def drive(level: bool) -> None:
            if chip.drive(bit, level):
                self._update()

        return drive

    def pending(self) -> bool:
        """Whether INTR is asserted."""
        return self._level

    def acknowledge(self) -> int:
        """The INTA cycle: the vector to take; with nothing pending, that of input 7 (spurious)."""
        chip = self.master
        level = chip.request()
        if level == _CASCADE:
            chip.accept(level)
            chip = self.slave
            level = chip.request()
        if level is None:
            vector = chip.vector | 7
        else:
            chip.accept(level)
            vector = chip.vector | level
        self._update()
        return vector

    def _update(self) -> None:
        self.master.drive(_CASCADE_BIT, self.slave.request() is not None)
        level = self.master.request() is not None
        if level != self._level:
            self._level = level
            self._output(level)
