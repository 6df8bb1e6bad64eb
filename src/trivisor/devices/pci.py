"""PCI configuration space by mechanism #1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2).

The reset control register of the PIIX3 (82371SB data sheet, RC) lies within
the same eight ports, so it is here too.
"""

from __future__ import annotations

from collections.abc import Callable

from trivisor.machine.saving import Remembers

CONFIG_SIZE = 256


class PciFunction(Remembers):
    """One function's configuration space with its header of type 0 (section 6.1).

    A subclass, or the maker, fills `config` and sets in `writable` the bits
    that the guest may change; base address registers size themselves by that.
    `class_code` is base class, sub-class and interface, 24 bits.
    """

    remembered = ("config",)

    def __init__(self, vendor: int, device: int, class_code: int, revision: int = 0) -> None:
        self.config = bytearray(CONFIG_SIZE)
        self.writable = bytearray(CONFIG_SIZE)
        self.set_config(0x00, 2, vendor)
        self.set_config(0x02, 2, device)
        self.set_config(0x08, 1, revision)
        self.set_config(0x09, 3, class_code)
        self.writable[0x3C] = 0xFF  # interrupt line: a note from firmware to drivers

    def set_config(self, register: int, size: int, value: int) -> None:
        """Set a register as the device itself does, read-only bits too; the registers must exist."""
        self.config[register : register + size] = value.to_bytes(size, "little")

    def read_config(self, register: int, size: int) -> int:
        """The guest's read of `size` bytes within an aligned doubleword."""
        return int.from_bytes(self.config[register : register + size], "little")

    def write_config(self, register: int, size: int, value: int) -> None:
        """The guest's write; then `written` is told."""
        for index in range(register, register + size):
            mask = self.writable[index]
            self.config[index] = self.config[index] & ~mask | value & mask
            value >>= 8
        self.written(register, size)

    def written(self, register: int, size: int) -> None:
        """Called after the guest wrote; a device with base addresses follows them here."""


class HostBridge(PciFunction):
    """The 440FX host bridge, 82441FX (Intel 290549), as far as a kernel looks at it.

    The attribute and SMRAM registers are kept but do nothing: guest memory is
    RAM from end to end.
    """

    def __init__(self) -> None:
        super().__init__(0x8086, 0x1237, 0x060000, revision=0x02)
        self.set_config(0x04, 2, 0x0006)  # memory and bus mastering, always on
        self.set_config(0x06, 2, 0x0280)  # fast back-to-back, medium decode
        self.set_config(0x72, 1, 0x02)  # SMRAM
        self.writable[0x05] = 0x01
        self.writable[0x59:0x60] = bytes([0x33] * 7)  # PAM0 to PAM6
        self.writable[0x72] = 0x78


class PciConfig(Remembers):
    """The eight ports of CONFIG_ADDRESS (offset 0) and CONFIG_DATA (offset 4).

    `on_reset` is called when the guest pulls the reset through offset 1.
    """

    _ADDRESS_BITS = 0x80FFFFFC
    remembered = ("_address", "_reset_control", "functions")

    def __init__(self, on_reset: Callable[[], None] | None = None) -> None:
        self._functions: dict[int, PciFunction] = {}
        self._address = 0
        self._on_reset = on_reset
        self._reset_control = 0

    def add(self, bus: int, device: int, function: int, item: PciFunction) -> None:
        """Put `item` at (bus, device, function); ValueError when that is no place or taken.

        A device with more than one function must say so in the header type (0x0E, bit 7) of function 0.
        """
        if not (0 <= bus < 256 and 0 <= device < 32 and 0 <= function < 8):
            raise ValueError(f"{bus:02x}:{device:02x}.{function} is not a PCI address")
        key = bus << 8 | device << 3 | function
        if key in self._functions:
            raise ValueError(f"{bus:02x}:{device:02x}.{function} is taken")
        self._functions[key] = item

    @property
    def functions(self) -> tuple[PciFunction, ...]:
        """All functions, in the order of their addresses."""
        return tuple(self._functions[key] for key in sorted(self._functions))

    @functions.setter
    def functions(self, functions: tuple[PciFunction, ...]) -> None:
        if functions != self.functions:
            raise ValueError("other functions on the bus")

    def read(self, offset: int, size: int) -> int:
        ones = (1 << 8 * size) - 1
        if offset == 0 and size == 4:
            return self._address
        if offset == 1 and size == 1:
            return self._reset_control
        function = self._selected()
        if offset < 4 or function is None:
            return ones
        inside = min(size, 8 - offset)
        if inside <= 0:
            return ones
        value = function.read_config((self._address & 0xFC) + offset - 4, inside)
        return value | ones & ~((1 << 8 * inside) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 4:
            self._address = value & self._ADDRESS_BITS
        elif offset == 1 and size == 1:
            self._write_reset_control(value)
        elif offset >= 4 and (function := self._selected()) is not None:
            function.write_config((self._address & 0xFC) + offset - 4, max(0, min(size, 8 - offset)), value)

    def _selected(self) -> PciFunction | None:
        address = self._address
        return self._functions.get(address >> 8 & 0xFFFF) if address >> 31 else None

    def _write_reset_control(self, value: int) -> None:
        pulled = value & ~self._reset_control & 4
        self._reset_control = value & 0x06
        if pulled and self._on_reset is not None:
            self._on_reset()
