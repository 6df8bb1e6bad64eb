"""CPUID as a PV guest sees it: the processor's own without what only ring 0 could use, and Xen's leaves.

Xen, docs/misc/pvh or arch/x86/cpu-policy.c, "PV max policy"; leaves 0x40000000 and on are of arch-x86/cpuid.h.
"""

from __future__ import annotations

from trivisor.machine.cpuid import HAS_SUBLEAVES
from trivisor.machine.deprivileged import DeprivilegedCpu
from trivisor.paravirt.xen.abi import CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD, CPUID_FIRST_LEAF, CPUID_SIGNATURE
from trivisor.x86.cpuid import FEATURES

VERSION = (4, 17)
"""Of the interface that is offered, as Xen's own version."""

_NOT_FOR_PV = (
    "vme", "pse", "pge", "mtrr", "pse36", "smep", "smap", "umip", "pcid", "invpcid", "pku", "apic", "x2apic",
    "tsc_deadline", "monitor", "vmx", "smx", "la57", "pdpe1gb", "tsc_adjust",
)  # fmt: skip
"""Features of ring 0 that a PV guest cannot use, by their names in `x86.cpuid`."""
_HIDDEN: dict[tuple[int, int], list[int]] = {}
for _name in _NOT_FOR_PV:
    if _name in FEATURES:
        _leaf, _subleaf, _register, _bit = FEATURES[_name]
        _HIDDEN.setdefault((_leaf, _subleaf), [0, 0, 0, 0])[_register] |= 1 << _bit
_HYPERVISOR = 1 << 31


def guest_cpuid(cpu: DeprivilegedCpu, tsc_frequency: int, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """(eax, ebx, ecx, edx)."""
    if CPUID_FIRST_LEAF <= leaf < CPUID_FIRST_LEAF + 0x100:
        return _xen_leaf(tsc_frequency, leaf - CPUID_FIRST_LEAF, subleaf)
    a, b, c, d = cpu.cpuid(leaf, subleaf)
    hidden = _HIDDEN.get((leaf, subleaf if leaf in HAS_SUBLEAVES else 0))
    if hidden is not None:
        a, b, c, d = (value & ~mask for value, mask in zip((a, b, c, d), hidden, strict=True))
    if leaf == 1:
        c |= _HYPERVISOR
    return a, b, c, d


def _xen_leaf(tsc_frequency: int, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    if leaf == 0:
        return (CPUID_FIRST_LEAF + 3, *CPUID_SIGNATURE)
    if leaf == 1:
        return VERSION[0] << 16 | VERSION[1], 0, 0, 0
    if leaf == 2:
        return 1, CPUID_FIRST_LEAF, CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD, 0
    if leaf == 3 and subleaf == 0:
        return 0b110, 0, tsc_frequency // 1000, 0
    if leaf == 3 and subleaf == 2:
        return tsc_frequency // 1000, 0, 0, 0
    return 0, 0, 0, 0
