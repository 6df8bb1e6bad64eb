"""MTRR formats and the firmware's settings."""

from __future__ import annotations

import pytest

from trivisor.x86 import msr, mtrr


def test_validity() -> None:
    assert mtrr.types_are_valid(0x0606060606060606) and not mtrr.types_are_valid(0x02)
    assert mtrr.default_type_is_valid(0xC06) and not mtrr.default_type_is_valid(0x1006)
    assert not mtrr.default_type_is_valid(0xC07)
    assert mtrr.base_is_valid(0xC0000006, 40) and not mtrr.base_is_valid(0xC0000106, 40)
    assert not mtrr.base_is_valid(1 << 40, 40)
    assert mtrr.mask_is_valid(0xFFC0000800, 40) and not mtrr.mask_is_valid(0xFFC0000001, 40)


def test_firmware_settings() -> None:
    settings = mtrr.firmware_settings(0xC0000000, 40)
    assert settings[msr.IA32_MTRR_DEF_TYPE] == 0xC06
    assert settings[msr.IA32_MTRR_PHYSBASE0] == 0xC0000000
    assert settings[msr.IA32_MTRR_PHYSMASK0] == 0xFFC0000800
    assert settings[msr.IA32_MTRR_FIX16K_A0000] == 0
    assert settings[msr.IA32_MTRR_FIX4K_F8000] == 0x0505050505050505
    assert all(mtrr.types_are_valid(settings[index]) for index in msr.MTRR_FIXED)
    for base in (0xD0000001, 0xB0000000, 1 << 32):
        with pytest.raises(ValueError, match="cannot cover"):
            mtrr.firmware_settings(base, 40)
