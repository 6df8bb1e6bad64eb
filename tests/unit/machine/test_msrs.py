"""The core's plain MSRs: reset values, checks on writes, saving and loading."""

from __future__ import annotations

import pytest

from trivisor.machine.cpuid import ARCH_CAPABILITIES, COPIED, EMULATED, GuestCpuid
from trivisor.machine.msrs import MACHINE_CHECK_BANKS, MsrFile
from trivisor.machine.vcpu import GeneralProtection
from trivisor.x86 import msr, mtrr


def new_file(*without: str) -> MsrFile:
    cpuid = GuestCpuid((COPIED | EMULATED) - set(without), {})
    return MsrFile(cpuid, tsc_frequency=2_300_000_000)


@pytest.fixture
def file() -> MsrFile:
    return new_file()


def refused(file: MsrFile, index: int, value: int | None = None) -> bool:
    """Whether the read, or the write of `value`, gets #GP; then nothing may have changed."""
    before = dict(file.values)
    try:
        if value is None:
            file.read(index)
        else:
            file.write(index, value)
    except GeneralProtection:
        assert file.values == before
        return True
    return False


def test_reset_values(file: MsrFile) -> None:
    assert file.read(msr.IA32_PAT) == 0x0007040600070406
    assert file.read(msr.IA32_MTRRCAP) == 0x508
    assert file.read(msr.IA32_MTRR_DEF_TYPE) == 0
    assert file.read(msr.IA32_FEATURE_CONTROL) == 1
    assert file.read(msr.IA32_MISC_ENABLE) == 0x1801
    assert file.read(msr.IA32_ARCH_CAPABILITIES) == ARCH_CAPABILITIES
    assert file.read(msr.MSR_PLATFORM_INFO) == 23 << 8
    assert file.read(msr.IA32_SYSENTER_CS) == 0


def test_what_linux_reads_unguarded_exists(file: MsrFile) -> None:
    for index in (0x8B, 0xFE, 0x10A, 0x48, 0x179, 0x17A, 0x1A0, 0x1D9, 0x277, 0x2FF, *msr.MTRR_FIXED):
        file.read(index)
    for number in range(8):
        file.read(0x200 + 2 * number)
        file.read(0x201 + 2 * number)
    for bank in range(file.read(msr.IA32_MCG_CAP) & 0xFF):
        for register in range(4):
            file.read(0x400 + 4 * bank + register)


def test_unknown_registers(file: MsrFile) -> None:
    beyond_banks = msr.IA32_MC0_CTL + 4 * MACHINE_CHECK_BANKS
    for index in (0, 0x10, 0x210, beyond_banks, msr.IA32_XSS, msr.IA32_EFER, 0x40000000, 0xFFFFFFFF):
        assert refused(file, index)
        assert refused(file, index, 0)


@pytest.mark.parametrize(
    ("index", "good", "bad"),
    [
        (msr.IA32_PAT, 0x0007010600070106, 0x02),
        (msr.IA32_PAT, 0x0506070001040607, 0x0800000000000000),
        (msr.IA32_SPEC_CTRL, 0x401, 0x4),
        (msr.IA32_SYSENTER_EIP, 0xFFFFFFFF81A01234, 0x8000_0000_0000),
        (msr.IA32_SYSENTER_ESP, 0x7FFF_FFFF_FFFF, 0xFFFF_7FFF_FFFF_FFFF),
        (msr.IA32_TSC_AUX, 0xFFFFFFFF, 1 << 32),
        (msr.IA32_DEBUGCTL, 2, 1),
        (msr.MSR_MISC_FEATURES_ENABLES, 0, 1),
        (msr.IA32_MTRR_DEF_TYPE, 0xC06, 0x206),
        (msr.IA32_MTRR_FIX64K_00000, 0x0606060606060606, 0x0606060606060603),
        (msr.IA32_MTRR_PHYSBASE0, 0xC0000000, 0xC0000100),
        (msr.IA32_MTRR_PHYSMASK0 + 14, 0xFFC0000800, 0x1FFC0000800),
        (msr.IA32_MCG_STATUS, 0, 8),
        (msr.IA32_MC0_CTL, 0xFFFFFFFFFFFFFFFF, None),
        (msr.IA32_MC0_CTL + 1, 0, 1),
    ],
)
def test_write_checks(file: MsrFile, index: int, good: int, bad: int | None) -> None:
    file.write(index, good)
    assert file.read(index) == good
    if bad is not None:
        assert refused(file, index, bad)


def test_read_only(file: MsrFile) -> None:
    for index in (0x17, 0x3A, 0xCE, 0xFE, 0x10A, 0x179, 0x198):
        assert refused(file, index, file.read(index))


def test_commands_are_write_only(file: MsrFile) -> None:
    for index in (msr.IA32_PRED_CMD, msr.IA32_FLUSH_CMD):
        file.write(index, 1)
        assert refused(file, index)
        assert refused(file, index, 2)


def test_microcode_revision_survives_the_write_before_cpuid(file: MsrFile) -> None:
    revision = file.read(msr.IA32_BIOS_SIGN_ID)
    assert revision >> 32
    file.write(msr.IA32_BIOS_SIGN_ID, 0)
    assert file.read(msr.IA32_BIOS_SIGN_ID) == revision


def test_misc_enable_cannot_hide_features(file: MsrFile) -> None:
    limit_cpuid, disable_nx = 1 << 22, 1 << 34
    file.write(msr.IA32_MISC_ENABLE, limit_cpuid | disable_nx | 1 << 3)
    assert file.read(msr.IA32_MISC_ENABLE) == 0x1808


def test_sysenter_cs_keeps_32_bits(file: MsrFile) -> None:
    file.write(msr.IA32_SYSENTER_CS, 0x12345678_00000010)
    assert file.read(msr.IA32_SYSENTER_CS) == 0x10


def test_registers_come_with_their_features() -> None:
    plain = new_file("spec_ctrl", "flush_l1d", "arch_capabilities", "mtrr", "mca")
    for index in (0x48, 0x49, 0x10A, 0x10B, 0xFE, 0x2FF, 0x200, 0x179, 0x400):
        assert refused(plain, index) and refused(plain, index, 0)
    assert refused(new_file("bhi_ctrl"), msr.IA32_SPEC_CTRL, 0x400)


def test_save_and_load(file: MsrFile) -> None:
    file.load(mtrr.firmware_settings(0xC0000000, 40))
    file.write(msr.IA32_TSC_AUX, 7)
    saved = file.save()
    assert msr.IA32_MTRRCAP not in saved and msr.IA32_PRED_CMD not in saved
    other = new_file()
    other.write(msr.IA32_SYSENTER_CS, 0x10)
    other.load(saved | {msr.IA32_LSTAR: 0x1234})
    assert other.values == file.values
    assert other.read(msr.IA32_MTRR_DEF_TYPE) == 0xC06
    with pytest.raises(GeneralProtection):
        other.load({msr.IA32_PAT: 3})


def test_amd_registers_belong_to_amd_processors() -> None:
    intel = new_file()
    amd = MsrFile(GuestCpuid(COPIED | EMULATED, {}, vendor="AuthenticAMD"), tsc_frequency=2_300_000_000)
    for index in (msr.AMD_PERFEVTSEL0, msr.AMD_PERFCTR0 + 3, msr.AMD_SYSCFG, msr.AMD_HWCR):
        assert refused(intel, index)
        assert amd.read(index) == 0
    amd.write(msr.AMD_PERFCTR0, 1 << 63 | 5)
    assert amd.read(msr.AMD_PERFCTR0) == 5, "48 bits wide"
    assert refused(amd, msr.AMD_HWCR, 1)
