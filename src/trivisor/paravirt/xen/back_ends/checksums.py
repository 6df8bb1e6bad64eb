"""Checksums of TCP and UDP that a guest leaves to its network card (RFC 1071; over IPv4)."""

from __future__ import annotations

import struct

_ETHERNET = 14
_IPV4 = 0x0800
_SHORTEST_HEADER = 20
_PLACES = {6: 16, 17: 6}
"""Where the checksum stands in the header, by protocol: TCP, UDP."""


def fill_checksum(frame: bytearray) -> None:
    """Put the checksum into a frame that holds TCP or UDP over IPv4 whole; others stay as they are."""
    if len(frame) < _ETHERNET + _SHORTEST_HEADER or frame[12] << 8 | frame[13] != _IPV4:
        return
    start = _ETHERNET + (frame[_ETHERNET] & 15) * 4
    length = (frame[_ETHERNET + 2] << 8 | frame[_ETHERNET + 3]) + _ETHERNET - start
    protocol = frame[_ETHERNET + 9]
    place = start + _PLACES.get(protocol, 1 << 16)
    end = start + length
    fragment = (frame[_ETHERNET + 6] << 8 | frame[_ETHERNET + 7]) & 0x3FFF
    if start < _ETHERNET + _SHORTEST_HEADER or fragment or place + 2 > end or end > len(frame):
        return
    frame[place : place + 2] = b"\0\0"
    pseudo = frame[_ETHERNET + 12 : _ETHERNET + 20] + struct.pack(">HH", protocol, length)
    # A sum of 16-bit words with the carries added in again is the remainder by 0xffff; 0 and 0xffff are the same.
    total = int.from_bytes(pseudo + frame[start:end] + bytes(length & 1), "big") % 0xFFFF
    frame[place : place + 2] = (0xFFFF - total).to_bytes(2, "big")
