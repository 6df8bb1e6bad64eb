"""Memory type range registers: their formats and what firmware leaves in them (Intel SDM 3A 11.11)."""

from __future__ import annotations

from typing import Final

from trivisor.x86 import msr

UNCACHEABLE: Final = 0
WRITE_COMBINING: Final = 1
WRITE_THROUGH: Final = 4
WRITE_PROTECTED: Final = 5
WRITE_BACK: Final = 6
TYPES: Final = frozenset({UNCACHEABLE, WRITE_COMBINING, WRITE_THROUGH, WRITE_PROTECTED, WRITE_BACK})

VARIABLE_RANGES: Final = 8
"""Pairs of base and mask registers on the processors that we model."""
CAPABILITIES: Final = VARIABLE_RANGES | msr.MTRR_CAP_FIXED | msr.MTRR_CAP_WC

VARIABLE_VALID: Final = 1 << 11
DEF_FIXED_ENABLE: Final = 1 << 10
DEF_ENABLE: Final = 1 << 11

_ALL_WRITE_BACK = int.from_bytes(bytes([WRITE_BACK] * 8), "little")
_ALL_WRITE_PROTECTED = int.from_bytes(bytes([WRITE_PROTECTED] * 8), "little")


def types_are_valid(value: int) -> bool:
    """Whether each byte of a fixed-range register names a type (table 11-8)."""
    return all(kind in TYPES for kind in value.to_bytes(8, "little"))


def default_type_is_valid(value: int) -> bool:
    """Whether IA32_MTRR_DEF_TYPE takes `value`: a type and the two enable bits (figure 11-5)."""
    return value & 0xFF in TYPES and not value & ~(0xFF | DEF_FIXED_ENABLE | DEF_ENABLE)


def base_is_valid(value: int, physical_bits: int) -> bool:
    """Whether IA32_MTRR_PHYSBASEn takes `value` (figure 11-7)."""
    return value & 0xFF in TYPES and not value & 0xF00 and not value >> physical_bits


def mask_is_valid(value: int, physical_bits: int) -> bool:
    """Whether IA32_MTRR_PHYSMASKn takes `value` (figure 11-7)."""
    return not value & 0x7FF and not value >> physical_bits


def firmware_settings(device_base: int, physical_bits: int) -> dict[int, int]:
    """The registers as a PC's firmware leaves them, by MSR number.

    Everything is write-back but the legacy video window, the ROMs from 0xC0000 to
    1 MiB (write-protected) and the devices between `device_base` and 4 GiB.  A boot
    protocol that skips the firmware must set them: a kernel that finds the MTRRs
    disabled gives up the PAT too.  `device_base` must leave a power of two below
    4 GiB that it is aligned to; ValueError if not.
    """
    length = (1 << 32) - device_base
    if length <= 0 or length & (length - 1) or device_base & (length - 1):
        raise ValueError(f"one range register cannot cover {device_base:#x} to 4 GiB")
    settings = dict.fromkeys(msr.MTRR_FIXED, _ALL_WRITE_PROTECTED)
    settings[msr.IA32_MTRR_FIX64K_00000] = _ALL_WRITE_BACK
    settings[msr.IA32_MTRR_FIX16K_80000] = _ALL_WRITE_BACK
    settings[msr.IA32_MTRR_FIX16K_A0000] = UNCACHEABLE
    settings[msr.IA32_MTRR_PHYSBASE0] = device_base | UNCACHEABLE
    settings[msr.IA32_MTRR_PHYSMASK0] = (1 << physical_bits) - length | VARIABLE_VALID
    settings[msr.IA32_MTRR_DEF_TYPE] = WRITE_BACK | DEF_FIXED_ENABLE | DEF_ENABLE
    return settings
