"""CPUID's answers where the native helper finds them, once Python has given them."""

from __future__ import annotations

import ctypes
from struct import pack_into

from trivisor.translation.core import Core
from trivisor.translation.layout import CPUID_ENTRIES, OFFSETS

_ENTRY_SIZE = 32  # leaf, subleaf, EAX, EBX, ECX, EDX, whether there is anything


class CpuidTable:
    """A direct-mapped cache by EAX and ECX."""

    def __init__(self, core: Core) -> None:
        self._entries = (ctypes.c_ubyte * (CPUID_ENTRIES * _ENTRY_SIZE))()
        self._view = memoryview(self._entries).cast("B")
        self.closed = False
        """While nothing may be found in it."""
        core.words[OFFSETS["CPUID_TABLE"] // 8] = ctypes.addressof(self._entries)

    def enter(self, leaf: int, subleaf: int, answer: tuple[int, int, int, int]) -> None:
        """Remember what was answered, which holds until `clear`."""
        if not self.closed:
            place = (leaf ^ leaf >> 26 ^ subleaf << 5) % CPUID_ENTRIES
            pack_into("<7I", self._view, place * _ENTRY_SIZE, leaf, subleaf, *answer, 1)

    def clear(self) -> None:
        """Something has changed that answers depend on."""
        ctypes.memset(self._entries, 0, len(self._entries))
