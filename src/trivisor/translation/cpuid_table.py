"""CPUID's answers where the native helper finds them, once Python has given them."""

from __future__ import annotations

import ctypes
from struct import pack_into

from trivisor.translation.core import Core
from trivisor.translation.layout import CPUID_ENTRIES, CPUID_SPREAD, OFFSETS

_ENTRY_SIZE = 32  # leaf, subleaf, EAX, EBX, ECX, EDX, whether there is anything
_EMPTY = CPUID_ENTRIES * _ENTRY_SIZE
"""The last one: the first of many leaves of zeros, and how many they are in the subleaf's place."""


class CpuidTable:
    """A direct-mapped cache by EAX and ECX."""

    def __init__(self, core: Core, empty: range) -> None:
        """`empty`: leaves of zeros."""
        self._entries = (ctypes.c_ubyte * (_EMPTY + _ENTRY_SIZE))()
        self._view = memoryview(self._entries).cast("B")
        self._empty = empty
        self._closed = False
        self._depends: tuple[int, ...] = ()
        self.clear()
        core.words[OFFSETS["CPUID_TABLE"] // 8] = ctypes.addressof(self._entries)

    def enter(self, leaf: int, subleaf: int, answer: tuple[int, int, int, int]) -> None:
        """Remember what was answered, which holds until `clear`."""
        if not self._closed:
            place = (leaf ^ leaf >> 26 ^ (subleaf * CPUID_SPREAD & 0xFFFFFFFF) >> 24) % CPUID_ENTRIES
            pack_into("<7I", self._view, place * _ENTRY_SIZE, leaf, subleaf, *answer, 1)

    def clear(self) -> None:
        """Something has changed that answers depend on."""
        ctypes.memset(self._entries, 0, len(self._entries))
        if not self._closed:
            pack_into("<2I16xI", self._view, _EMPTY, self._empty.start, len(self._empty), 1)

    def depend(self, *on: int) -> None:
        """What answers depend on, as it is: those that were given when it was otherwise are forgotten."""
        if on != self._depends:
            self._depends = on
            self.clear()

    def close(self, closed: bool) -> None:
        """Whether nothing may be found here."""
        if closed != self._closed:
            self._closed = closed
            self.clear()
