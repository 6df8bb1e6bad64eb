"""The SMBIOS table, read back as DSP0134 has a kernel read it."""

from __future__ import annotations

import struct

import pytest

from trivisor.devices.smbios import build

ADDRESS = 0xF0000


def structures(table: bytes) -> list[tuple[int, bytes, list[str]]]:
    """(type, formatted area, strings) of each structure, up to the end-of-table one."""
    found = []
    at = 0
    while True:
        kind, length = table[at], table[at + 1]
        end = table.index(b"\0\0", at + length)
        strings = table[at + length : end].decode("ascii").split("\0")
        found.append((kind, table[at : at + length], strings))
        at = end + 2
        if kind == 127:
            assert at == len(table)
            return found


def test_the_entry_point_leads_to_the_table() -> None:
    area = build(ADDRESS)
    anchor, _, length, major, _, _, revision, _, size, table = struct.unpack_from("<5sBBBBBBBIQ", area)
    assert (anchor, length, major, revision) == (b"_SM3_", 24, 3, 1)
    assert sum(area[:length]) & 0xFF == 0
    assert ADDRESS + length <= table
    assert table + size == ADDRESS + len(area)


def test_what_it_tells() -> None:
    firmware, system, end = structures(build(ADDRESS)[32:])
    assert (firmware[0], len(firmware[1]), firmware[2]) == (0, 0x18, ["trivisor", "1.0", "01/01/2026"])
    assert firmware[1][4:6] == b"\x01\x02" and firmware[1][8] == 3  # its strings, by number
    assert firmware[1][0x13] == 0x10  # a virtual machine
    assert (system[0], len(system[1]), system[2]) == (1, 0x1B, ["trivisor", "virtual machine"])
    assert (end[0], len(end[1])) == (127, 4)
    handles = [struct.unpack_from("<H", area, 2)[0] for _, area, _ in (firmware, system, end)]
    assert len(set(handles)) == 3


def test_kernels_look_at_multiples_of_16_only() -> None:
    with pytest.raises(ValueError, match="0xf0008"):
        build(ADDRESS + 8)
