"""The plain model-specific registers of the translation engine's processor (Intel SDM 4, table 2-2).

Plain: they hold a value and do nothing, or nothing here.  Those that the engine
acts on at once (EFER, the SYSCALL ones, FS and GS bases, the TSC and its
deadline, TSC_ADJUST) and the local APIC's are kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from trivisor.machine.cpuid import AMD, ARCH_CAPABILITIES, LINEAR_BITS, GuestCpuid
from trivisor.machine.vcpu import GeneralProtection
from trivisor.x86 import msr, mtrr
from trivisor.x86.paging import is_canonical

MICROCODE_REVISION: Final = 1 << 32
"""Of IA32_BIOS_SIGN_ID; the revision is its high half."""
MACHINE_CHECK_BANKS: Final = 4
_ALL = 0xFFFFFFFFFFFFFFFF
_BUS_FREQUENCY = 100_000_000
"""Hz: what MSR_PLATFORM_INFO multiplies its ratio by."""


class _Register(NamedTuple):
    """One register: its reset value, and what a write may do."""

    reset: int = 0
    accepts: Callable[[int], bool] | None = None
    """Whether WRMSR takes a value, else #GP; None for a read-only register."""
    kept: int = _ALL
    """The bits that a write changes; the others stay as they were at reset, silently."""
    readable: bool = True


def _anything(value: int) -> bool:
    return True


def _within(mask: int) -> Callable[[int], bool]:
    """Only bits of `mask` may be set."""
    return lambda value: not value & ~mask


def _canonical(value: int) -> bool:
    return is_canonical(value, LINEAR_BITS)


def _pat_is_valid(value: int) -> bool:
    return all(kind in msr.PAT_TYPES for kind in value.to_bytes(8, "little"))


def _read_only(value: int) -> _Register:
    return _Register(value)


def _command(mask: int) -> _Register:
    """Write-only, and without effect on this processor."""
    return _Register(accepts=_within(mask), kept=0, readable=False)


class MsrFile:
    """The registers of one processor, all at their values after RESET.

    Indexes and values are what RDMSR and WRMSR were given, unchecked; both
    methods raise `GeneralProtection` where the processor raises #GP(0).
    """

    def __init__(self, cpuid: GuestCpuid, *, tsc_frequency: int) -> None:
        self._registers = _registers(cpuid, tsc_frequency)
        self.values = {index: register.reset for index, register in self._registers.items()}
        """Every register's value by its number; fit for the engine's fast look at one (TSC_AUX, SYSENTER)."""

    def read(self, index: int) -> int:
        """RDMSR."""
        register = self._registers.get(index)
        if register is None or not register.readable:
            raise GeneralProtection(f"RDMSR {index:#x}")
        return self.values[index]

    def write(self, index: int, value: int) -> None:
        """WRMSR of an unsigned 64-bit value."""
        register = self._registers.get(index)
        if register is None or register.accepts is None or not register.accepts(value):
            raise GeneralProtection(f"WRMSR {index:#x} {value:#x}")
        self.values[index] = register.reset & ~register.kept | value & register.kept

    def save(self) -> dict[int, int]:
        """The registers that a write can change, for `CpuState.msrs`."""
        return {
            index: self.values[index]
            for index, register in self._registers.items()
            if register.accepts is not None and register.kept
        }

    def load(self, values: Mapping[int, int]) -> None:
        """Reset, then take from `values` all that belongs here; the rest of it is somebody else's.

        Raises `GeneralProtection` for a value that the register cannot hold.
        """
        self.values.update({index: register.reset for index, register in self._registers.items()})
        for index, value in values.items():
            register = self._registers.get(index)
            if register is not None and register.accepts is not None:
                self.write(index, value)


def _registers(cpuid: GuestCpuid, tsc_frequency: int) -> dict[int, _Register]:
    ratio = min(tsc_frequency // _BUS_FREQUENCY, 0xFF)
    registers = {
        msr.IA32_PLATFORM_ID: _read_only(0),
        # Locked with VMX and SGX off.
        msr.IA32_FEATURE_CONTROL: _read_only(msr.FEATURE_CONTROL_LOCK),
        msr.IA32_BIOS_UPDT_TRIG: _command(_ALL),
        # Software writes zero and runs CPUID, which puts the revision back.
        msr.IA32_BIOS_SIGN_ID: _Register(MICROCODE_REVISION, _anything, kept=0),
        msr.MSR_PLATFORM_INFO: _read_only(ratio << 8),
        msr.MSR_MISC_FEATURES_ENABLES: _Register(accepts=_within(0)),
        msr.IA32_SYSENTER_CS: _Register(accepts=_anything, kept=0xFFFFFFFF),
        msr.IA32_SYSENTER_ESP: _Register(accepts=_canonical),
        msr.IA32_SYSENTER_EIP: _Register(accepts=_canonical),
        msr.IA32_PERF_STATUS: _read_only(ratio << 8),
        msr.IA32_MISC_ENABLE: _misc_enable(),
        msr.IA32_DEBUGCTL: _Register(accepts=_within(msr.DEBUGCTL_BTF)),
        msr.IA32_PAT: _Register(msr.PAT_RESET, _pat_is_valid),
        msr.IA32_TSC_AUX: _Register(accepts=_within(0xFFFFFFFF)),
    }
    if "spec_ctrl" in cpuid.features:
        allowed = msr.SPEC_CTRL_IBRS | msr.SPEC_CTRL_STIBP
        if "bhi_ctrl" in cpuid.features:
            allowed |= msr.SPEC_CTRL_BHI_DIS_S
        registers[msr.IA32_SPEC_CTRL] = _Register(accepts=_within(allowed))
        registers[msr.IA32_PRED_CMD] = _command(msr.PRED_CMD_IBPB)
    if "flush_l1d" in cpuid.features:
        registers[msr.IA32_FLUSH_CMD] = _command(msr.FLUSH_CMD_L1D)
    if "arch_capabilities" in cpuid.features:
        registers[msr.IA32_ARCH_CAPABILITIES] = _read_only(ARCH_CAPABILITIES)
    if cpuid.vendor == AMD:
        registers |= _amd_registers()
    if "mtrr" in cpuid.features:
        registers |= _mtrrs(cpuid.physical_bits)
    if "mca" in cpuid.features:
        registers |= _machine_check()
    return registers


def _amd_registers() -> dict[int, _Register]:
    """Those that every AMD64 processor has (AMD APM 2, appendix A): the four counters hold what they were given."""
    registers = {
        msr.AMD_SYSCFG: _Register(accepts=_within(msr.AMD_SYSCFG_KNOWN)),
        msr.AMD_HWCR: _Register(accepts=_within(0)),
    }
    for number in range(4):
        registers[msr.AMD_PERFEVTSEL0 + number] = _Register(accepts=_anything)
        registers[msr.AMD_PERFCTR0 + number] = _Register(accepts=_anything, kept=(1 << 48) - 1)
    return registers


def _misc_enable() -> _Register:
    """Fast strings and thermal control can be switched; the rest reads as "not there" and stays so."""
    reset = (
        msr.MISC_ENABLE_FAST_STRINGS | msr.MISC_ENABLE_BTS_UNAVAILABLE | msr.MISC_ENABLE_PEBS_UNAVAILABLE
    )
    return _Register(reset, _anything, kept=msr.MISC_ENABLE_FAST_STRINGS | msr.MISC_ENABLE_THERMAL_CONTROL)


def _mtrrs(physical_bits: int) -> dict[int, _Register]:
    """All disabled, as after RESET; `mtrr.firmware_settings` is what a guest without firmware needs."""
    fixed = _Register(accepts=mtrr.types_are_valid)
    base = _Register(accepts=lambda value: mtrr.base_is_valid(value, physical_bits))
    mask = _Register(accepts=lambda value: mtrr.mask_is_valid(value, physical_bits))
    registers = dict.fromkeys(msr.MTRR_FIXED, fixed)
    for number in range(mtrr.VARIABLE_RANGES):
        registers[msr.IA32_MTRR_PHYSBASE0 + 2 * number] = base
        registers[msr.IA32_MTRR_PHYSMASK0 + 2 * number] = mask
    registers[msr.IA32_MTRRCAP] = _read_only(mtrr.CAPABILITIES)
    registers[msr.IA32_MTRR_DEF_TYPE] = _Register(accepts=mtrr.default_type_is_valid)
    return registers


def _machine_check() -> dict[int, _Register]:
    """Banks that never report an error: STATUS, ADDR and MISC can only be cleared (SDM 3B 15.3.2)."""
    registers = {
        msr.IA32_MCG_CAP: _read_only(MACHINE_CHECK_BANKS),
        msr.IA32_MCG_STATUS: _Register(accepts=_within(7)),
    }
    for bank in range(MACHINE_CHECK_BANKS):
        control = msr.IA32_MC0_CTL + 4 * bank
        registers[control] = _Register(accepts=_anything)
        for clearable in range(control + 1, control + 4):
            registers[clearable] = _Register(accepts=_within(0))
    return registers
