"""The firmware configuration device that QEMU's guests know (QEMU docs/specs/fw_cfg), its numbered items alone.

A 16-bit write selects an item, byte reads of the next port give its bytes one
after the other, and zeros after its end.  There is no file directory and no DMA.
"""

from __future__ import annotations

from trivisor.machine.saving import Remembers

PORT, LENGTH = 0x510, 2

_SIGNATURE, _INTERFACES, _RAM_SIZE, _CPUS, _MAXIMUM_CPUS = 0x00, 0x01, 0x03, 0x05, 0x0F
_TRADITIONAL_INTERFACE = 1


class FwCfg(Remembers):
    """Items for a machine with `ram_size` bytes and `cpus` processors."""

    remembered = ("_item", "_at")

    def __init__(self, ram_size: int, cpus: int) -> None:
        self._items = {
            _SIGNATURE: b"QEMU",
            _INTERFACES: _TRADITIONAL_INTERFACE.to_bytes(4, "little"),
            _RAM_SIZE: ram_size.to_bytes(8, "little"),
            _CPUS: cpus.to_bytes(2, "little"),
            _MAXIMUM_CPUS: cpus.to_bytes(2, "little"),
        }
        self._item = b""
        self._at = 0

    def read(self, offset: int, size: int) -> int:
        if offset != 1 or size != 1:
            return 0
        self._at += 1
        return self._item[self._at - 1] if self._at <= len(self._item) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 2:
            self._item = self._items.get(value, b"")
            self._at = 0
