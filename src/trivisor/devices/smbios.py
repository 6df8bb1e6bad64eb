"""The SMBIOS structures that name the machine (DMTF DSP0134, System Management BIOS specification 3.6).

As small as virtual machine monitors keep them: the firmware, the system and the end of the table.
"""

from __future__ import annotations

import struct

_ENTRY_POINT_LENGTH = 24
_TABLE_OFFSET = 32
_FIRMWARE, _SYSTEM, _END = 0, 1, 127
_NAME = "trivisor"
_FIRMWARE_VERSION = "1.0"
_FIRMWARE_DATE = "01/01/2026"

_CHARACTERISTICS_NOT_TOLD = 1 << 3
_VIRTUAL_MACHINE = 1 << 4
"""Of the second extension byte of the firmware's characteristics (7.1.2.2)."""
_WAKE_UP_BY_POWER_SWITCH = 6


def build(address: int) -> bytes:
    """Make the entry point and the table, to lie at `address`.

    Kernels look for the entry point at multiples of 16 from 0xf0000 to 1 MiB (5.2.2).
    """
    if address % 16:
        raise ValueError(f"an SMBIOS entry point cannot lie at {address:#x}")
    table = _firmware(0, address >> 4) + _system(1) + _structure(_END, 2, b"")
    return _entry_point(address + _TABLE_OFFSET, len(table)).ljust(_TABLE_OFFSET, b"\0") + table


def _entry_point(table: int, length: int) -> bytes:
    """The 64-bit entry point, 5.2.2, for version 3.6 with no document revision."""
    entry = bytearray(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, _ENTRY_POINT_LENGTH, 3, 6, 0, 1, 0, length, table))
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry)


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """A structure with its strings, which `body` names by number from 1 (6.1.2, 6.1.3)."""
    text = b"".join(string.encode("ascii") + b"\0" for string in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"


def _firmware(handle: int, segment: int) -> bytes:
    """Platform firmware information, 7.1: vendor, version and release date, and that this is a virtual machine."""
    body = struct.pack("<BBHBBQBB", 1, 2, segment, 3, 0, _CHARACTERISTICS_NOT_TOLD, 0, _VIRTUAL_MACHINE)
    body += bytes([1, 0, 0xFF, 0xFF])  # release 1.0; no embedded controller
    return _structure(_FIRMWARE, handle, body, _NAME, _FIRMWARE_VERSION, _FIRMWARE_DATE)


def _system(handle: int) -> bytes:
    """System information, 7.2: manufacturer and product; no serial number, no UUID."""
    body = struct.pack("<BBBB16sBBB", 1, 2, 0, 0, bytes(16), _WAKE_UP_BY_POWER_SWITCH, 0, 0)
    return _structure(_SYSTEM, handle, body, _NAME, "virtual machine")
