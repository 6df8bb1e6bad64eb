"""Model-specific register numbers, by the names of Intel SDM 4 table 2-2, and bits of some of them."""

from __future__ import annotations

from typing import Final

IA32_TIME_STAMP_COUNTER: Final = 0x10
IA32_PLATFORM_ID: Final = 0x17
IA32_APIC_BASE: Final = 0x1B
IA32_FEATURE_CONTROL: Final = 0x3A
IA32_TSC_ADJUST: Final = 0x3B
IA32_SPEC_CTRL: Final = 0x48
IA32_PRED_CMD: Final = 0x49
IA32_BIOS_UPDT_TRIG: Final = 0x79
IA32_BIOS_SIGN_ID: Final = 0x8B
MSR_PLATFORM_INFO: Final = 0xCE
IA32_MPERF: Final = 0xE7
IA32_APERF: Final = 0xE8
IA32_MTRRCAP: Final = 0xFE
IA32_ARCH_CAPABILITIES: Final = 0x10A
IA32_FLUSH_CMD: Final = 0x10B
MSR_MISC_FEATURES_ENABLES: Final = 0x140
IA32_SYSENTER_CS: Final = 0x174
IA32_SYSENTER_ESP: Final = 0x175
IA32_SYSENTER_EIP: Final = 0x176
IA32_MCG_CAP: Final = 0x179
IA32_MCG_STATUS: Final = 0x17A
IA32_MCG_CTL: Final = 0x17B
IA32_PERF_STATUS: Final = 0x198
IA32_PERF_CTL: Final = 0x199
IA32_MISC_ENABLE: Final = 0x1A0
IA32_DEBUGCTL: Final = 0x1D9
IA32_MTRR_PHYSBASE0: Final = 0x200
IA32_MTRR_PHYSMASK0: Final = 0x201
"""Register n of the pair is two further on for each n."""
IA32_MTRR_FIX64K_00000: Final = 0x250
IA32_MTRR_FIX16K_80000: Final = 0x258
IA32_MTRR_FIX16K_A0000: Final = 0x259
IA32_MTRR_FIX4K_C0000: Final = 0x268
IA32_MTRR_FIX4K_F8000: Final = 0x26F
IA32_PAT: Final = 0x277
IA32_MTRR_DEF_TYPE: Final = 0x2FF
IA32_MC0_CTL: Final = 0x400
"""CTL, STATUS, ADDR and MISC of bank n are at 4 n and the three after."""
IA32_TSC_DEADLINE: Final = 0x6E0
IA32_X2APIC_FIRST: Final = 0x800
IA32_X2APIC_LAST: Final = 0x8FF
IA32_XSS: Final = 0xDA0
IA32_EFER: Final = 0xC0000080
IA32_STAR: Final = 0xC0000081
IA32_LSTAR: Final = 0xC0000082
IA32_CSTAR: Final = 0xC0000083
IA32_FMASK: Final = 0xC0000084
IA32_FS_BASE: Final = 0xC0000100
IA32_GS_BASE: Final = 0xC0000101
IA32_KERNEL_GS_BASE: Final = 0xC0000102
IA32_TSC_AUX: Final = 0xC0000103

APIC_BASE_BSP: Final = 1 << 8
APIC_BASE_X2APIC: Final = 1 << 10
APIC_BASE_ENABLE: Final = 1 << 11

FEATURE_CONTROL_LOCK: Final = 1 << 0

SPEC_CTRL_IBRS: Final = 1 << 0
SPEC_CTRL_STIBP: Final = 1 << 1
SPEC_CTRL_SSBD: Final = 1 << 2
SPEC_CTRL_BHI_DIS_S: Final = 1 << 10
PRED_CMD_IBPB: Final = 1 << 0
FLUSH_CMD_L1D: Final = 1 << 0

ARCH_CAP_RDCL_NO: Final = 1 << 0
ARCH_CAP_IBRS_ALL: Final = 1 << 1
ARCH_CAP_SKIP_L1DFL_VMENTRY: Final = 1 << 3
ARCH_CAP_SSB_NO: Final = 1 << 4
ARCH_CAP_MDS_NO: Final = 1 << 5
ARCH_CAP_IF_PSCHANGE_MC_NO: Final = 1 << 6
ARCH_CAP_TAA_NO: Final = 1 << 8
ARCH_CAP_SBDR_SSDP_NO: Final = 1 << 13
ARCH_CAP_FBSDP_NO: Final = 1 << 14
ARCH_CAP_PSDP_NO: Final = 1 << 15
ARCH_CAP_BHI_NO: Final = 1 << 20
ARCH_CAP_PBRSB_NO: Final = 1 << 24
ARCH_CAP_GDS_NO: Final = 1 << 26
ARCH_CAP_RFDS_NO: Final = 1 << 27
ARCH_CAP_ITS_NO: Final = 1 << 62
"""Never set by a processor; monitors tell their guests with it (Intel, Indirect Target Selection)."""

MISC_ENABLE_FAST_STRINGS: Final = 1 << 0
MISC_ENABLE_BTS_UNAVAILABLE: Final = 1 << 11
MISC_ENABLE_PEBS_UNAVAILABLE: Final = 1 << 12

DEBUGCTL_LBR: Final = 1 << 0
DEBUGCTL_BTF: Final = 1 << 1

MTRR_CAP_FIXED: Final = 1 << 8
MTRR_CAP_WC: Final = 1 << 10
MTRR_FIXED: Final = (
    IA32_MTRR_FIX64K_00000,
    IA32_MTRR_FIX16K_80000,
    IA32_MTRR_FIX16K_A0000,
    *range(IA32_MTRR_FIX4K_C0000, IA32_MTRR_FIX4K_F8000 + 1),
)
PAT_TYPES: Final = frozenset({0, 1, 4, 5, 6, 7})
PAT_RESET: Final = 0x0007040600070406
"""WB, WT, UC-, UC, twice (SDM 3A table 11-12)."""
