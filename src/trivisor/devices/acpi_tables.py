"""The ACPI tables that tell a kernel about the board (ACPI specification 6.4, chapters 5, 6, 19 and 20).

The definition block is written by a few functions that each return the AML of
one construct, named as ASL names them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from trivisor.devices.acpi_pm import CONTROL_BLOCK, EVENT_BLOCK, SLEEP_TYPE_S5, TIMER_BLOCK

_OEM_ID = b"TRIVIS"
_OEM_TABLE_ID = b"TRIVISOR"
_CREATOR_ID = b"TRIV"
_HEADER_LENGTH = 36


class BoardLayout(NamedTuple):
    """Where the things stand that the tables speak of."""

    apic_ids: Sequence[int]
    local_apic: int
    io_apic: int
    pm_base: int
    reset_port: int
    reset_value: int
    pci_window: tuple[int, int]
    """First and last address of the memory window of PCI bus 0."""
    sci: int = 9
    century: int = 0x32
    """The century's place in CMOS RAM."""


def build(address: int, board: BoardLayout) -> bytes:
    """Make the tables of `board`, RSDP first, to lie at `address` (a multiple of 64, below 4 GiB)."""
    if address % 64 or not 0 <= address < 1 << 32:
        raise ValueError(f"ACPI tables cannot lie at {address:#x}")
    area = bytearray(36)  # kept for the RSDP

    def place(table: bytes, alignment: int = 16) -> int:
        area.extend(bytes(-len(area) % alignment))
        area.extend(table)
        return address + len(area) - len(table)

    facs = place(_facs(), 64)
    dsdt = place(_dsdt(board))
    entries = [place(_fadt(board, facs, dsdt)), place(_madt(board))]
    rsdt = place(_table(b"RSDT", 1, struct.pack(f"<{len(entries)}I", *entries)))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(entries)}Q", *entries)))
    area[:36] = _rsdp(rsdt, xsdt)
    return bytes(area)


def _checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all zero."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: the common header (5.2.6), then `body`."""
    header = signature + struct.pack("<IBB", _HEADER_LENGTH + len(body), revision, 0)
    header += _OEM_ID + _OEM_TABLE_ID + struct.pack("<I4sI", 1, _CREATOR_ID, 1)
    table = bytearray(header + body)
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    """The root pointer, 5.2.5.3, with its two checksums."""
    first = bytearray(b"RSD PTR " + b"\0" + _OEM_ID + struct.pack("<BI", 2, rsdt))
    first[8] = _checksum(first)
    whole = first + struct.pack("<IQB3x", 36, xsdt, 0)
    whole[32] = _checksum(whole)
    return bytes(whole)


def _facs() -> bytes:
    """The firmware control structure, 5.2.10: no waking vector, no global lock."""
    return b"FACS" + struct.pack("<I", 64) + bytes(24) + b"\x02" + bytes(31)


def _register(address: int, width: int, access: int) -> bytes:
    """A generic address structure (5.2.3.2) in I/O space; `width` in bits, `access` 1, 2 or 3 for 8 to 32."""
    return struct.pack("<BBBBQ", 1, width, 0, access, address)


_FADT_FLAGS = (
    1 << 0  # WBINVD works
    | 1 << 2  # every processor has C1
    | 1 << 5  # no sleep button
    | 1 << 6  # no RTC wake status in the fixed registers
    | 1 << 10  # reset register
)
_BOOT_LEGACY_DEVICES, _BOOT_NO_VGA = 1 << 0, 1 << 2
_NO_REGISTER = bytes(12)
_NO_C_STATE = 0xFFF


def _fadt(board: BoardLayout, facs: int, dsdt: int) -> bytes:
    """The fixed description table, 5.2.9, in its ACPI 6.0 length of 276 bytes."""
    event, control, timer = (board.pm_base + block for block in (EVENT_BLOCK, CONTROL_BLOCK, TIMER_BLOCK))
    body = struct.pack("<IIBBH", facs, dsdt, 0, 0, board.sci)  # profile unspecified
    body += struct.pack("<IBBBB", 0, 0, 0, 0, 0)  # no SMI command: always in ACPI mode
    body += struct.pack("<IIIIIIII", event, 0, control, 0, 0, timer, 0, 0)
    body += struct.pack("<BBBBBBBB", 4, 2, 0, 4, 0, 0, 0, 0)  # lengths of those blocks
    body += struct.pack("<HHHHBB", _NO_C_STATE, _NO_C_STATE, 0, 0, 0, 0)
    body += struct.pack("<BBBHBI", 0, 0, board.century, _BOOT_LEGACY_DEVICES | _BOOT_NO_VGA, 0, _FADT_FLAGS)
    body += _register(board.reset_port, 8, 1) + struct.pack("<BHB", board.reset_value, 0, 3)  # ACPI 6.3
    body += struct.pack("<QQ", 0, dsdt)
    body += _register(event, 32, 2) + _NO_REGISTER + _register(control, 16, 2) + _NO_REGISTER
    body += _NO_REGISTER + _register(timer, 32, 3) + _NO_REGISTER * 2
    body += _NO_REGISTER * 2 + bytes(8)  # sleep registers, hypervisor vendor
    return _table(b"FACP", 6, body)


def _madt(board: BoardLayout) -> bytes:
    """The multiple APIC description table, 5.2.12."""
    body = struct.pack("<II", board.local_apic, 1)  # there are 8259s too
    for uid, apic_id in enumerate(board.apic_ids):
        body += struct.pack("<BBBBI", 0, 8, uid, apic_id, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, board.io_apic, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)  # the PIT's IRQ 0 is on pin 2, as the bus has it
    body += struct.pack("<BBBBIH", 2, 10, 0, board.sci, board.sci, 0xD)  # active high, level-triggered
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # NMI on LINT1 of every processor
    return _table(b"APIC", 5, body)


def _dsdt(board: BoardLayout) -> bytes:
    processors = [
        _device(f"C{uid:03X}", _name("_HID", _string("ACPI0007")), _name("_UID", _integer(uid)))
        for uid in range(len(board.apic_ids))
    ]
    definitions = [
        _scope("\\_SB_", *processors, _pci_root(board), _com1(), _rtc()),
        _name("\\_S5_", _package(*[_integer(value) for value in (SLEEP_TYPE_S5, SLEEP_TYPE_S5, 0, 0)])),
    ]
    return _table(b"DSDT", 2, b"".join(definitions))


def _pci_root(board: BoardLayout) -> bytes:
    first, last = board.pci_window
    resources = _resources(
        _word_space(_BUS_NUMBERS, 0, 0, 0xFF),
        _io(0xCF8, 8),
        _word_space(_IO_RANGE, 3, 0x0000, 0x0CF7),
        _word_space(_IO_RANGE, 3, 0x0D00, 0xFFFF),
        _dword_memory(first, last),
    )
    return _device(
        "PCI0", _name("_HID", _eisa_id("PNP0A03")), _name("_UID", _integer(0)), _name("_CRS", resources)
    )


def _com1() -> bytes:
    resources = _resources(_io(0x3F8, 8), _irq(4))
    return _device(
        "COM1", _name("_HID", _eisa_id("PNP0501")), _name("_UID", _integer(1)), _name("_CRS", resources)
    )


def _rtc() -> bytes:
    return _device(
        "RTC0", _name("_HID", _eisa_id("PNP0B00")), _name("_CRS", _resources(_io(0x70, 2), _irq(8)))
    )


# AML, chapter 20.


def _package_length(content: bytes) -> bytes:
    """PkgLength (20.2.4) with the content it counts; it counts itself too."""
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    for extra in (1, 2, 3):
        length = len(content) + 1 + extra
        if length < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | length & 0xF]) + (length >> 4).to_bytes(extra, "little") + content
    raise ValueError(f"an AML package of {len(content)} bytes is too long")


def _name_string(path: str) -> bytes:
    """A NameString of one segment, four characters long, after an optional root character."""
    return path.encode("ascii")


def _name(path: str, value: bytes) -> bytes:
    return b"\x08" + _name_string(path) + value


def _scope(path: str, *terms: bytes) -> bytes:
    return b"\x10" + _package_length(_name_string(path) + b"".join(terms))


def _device(name: str, *terms: bytes) -> bytes:
    return b"\x5b\x82" + _package_length(_name_string(name) + b"".join(terms))


def _package(*elements: bytes) -> bytes:
    return b"\x12" + _package_length(bytes([len(elements)]) + b"".join(elements))


def _buffer(data: bytes) -> bytes:
    return b"\x11" + _package_length(_integer(len(data)) + data)


def _string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def _integer(value: int) -> bytes:
    """ZeroOp, OneOp or the shortest constant."""
    if value < 2:
        return bytes([value])
    for prefix, size in ((b"\x0a", 1), (b"\x0b", 2), (b"\x0c", 4), (b"\x0e", 8)):
        if value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} is no AML integer")


def _eisa_id(text: str) -> bytes:
    """EISAID (19.6.37): three letters of five bits, four hexadecimal digits, most significant byte first."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + struct.pack(">HH", letters, int(text[3:], 16))


# Resource descriptors, 6.4.

_IO_RANGE, _BUS_NUMBERS = 1, 2
_FIXED_RANGE = 0x0C  # neither end can be moved


def _resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate: the descriptors and an end tag without checksum."""
    return _buffer(b"".join(descriptors) + b"\x79\x00")


def _io(base: int, length: int) -> bytes:
    """IO (Decode16, base, base, 1, length)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def _irq(number: int) -> bytes:
    """IRQNoFlags: edge-triggered, active high."""
    return struct.pack("<BH", 0x22, 1 << number)


def _word_space(kind: int, flags: int, first: int, last: int) -> bytes:
    """WordBusNumber or WordIO for a range that the bridge passes on."""
    fields = (0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB5H", 0x88, 13, kind, _FIXED_RANGE, flags, *fields)


def _dword_memory(first: int, last: int) -> bytes:
    """DWordMemory: read and write, not cacheable."""
    fields = (0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB5I", 0x87, 23, 0, _FIXED_RANGE, 1, *fields)
