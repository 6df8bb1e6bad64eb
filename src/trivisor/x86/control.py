"""Control registers, EFER, XCR0 and the debug registers: bits, valid masks and the rules between bits.

Intel SDM 3A 2.5 (control registers), 2.2.1 (IA32_EFER), 2.6 (XCR0), 17.2 (debug registers).
"""

from __future__ import annotations

from typing import Final

CR0_PE: Final = 1 << 0
CR0_MP: Final = 1 << 1
CR0_EM: Final = 1 << 2
CR0_TS: Final = 1 << 3
CR0_ET: Final = 1 << 4
"""Hardwired to one."""
CR0_NE: Final = 1 << 5
CR0_WP: Final = 1 << 16
CR0_AM: Final = 1 << 18
CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR0_PG: Final = 1 << 31
CR0_VALID: Final = (
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG
)
"""Writes to the other bits of the low half are ignored; the high half must be zero (#GP)."""

CR3_PWT: Final = 1 << 3
CR3_PCD: Final = 1 << 4
CR3_PCID: Final = 0xFFF
"""The process-context identifier, when CR4.PCIDE is set."""
CR3_NO_FLUSH: Final = 1 << 63
"""In the operand of MOV to CR3 with CR4.PCIDE: keep the TLB entries of the PCID; never stored."""

CR4_VME: Final = 1 << 0
CR4_PVI: Final = 1 << 1
CR4_TSD: Final = 1 << 2
CR4_DE: Final = 1 << 3
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_MCE: Final = 1 << 6
CR4_PGE: Final = 1 << 7
CR4_PCE: Final = 1 << 8
CR4_OSFXSR: Final = 1 << 9
CR4_OSXMMEXCPT: Final = 1 << 10
CR4_UMIP: Final = 1 << 11
CR4_LA57: Final = 1 << 12
CR4_VMXE: Final = 1 << 13
CR4_SMXE: Final = 1 << 14
CR4_FSGSBASE: Final = 1 << 16
CR4_PCIDE: Final = 1 << 17
CR4_OSXSAVE: Final = 1 << 18
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
CR4_PKE: Final = 1 << 22
CR4_CET: Final = 1 << 23
CR4_PKS: Final = 1 << 24
CR4_BASE: Final = (
    CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT
)
"""The bits that every 64-bit processor has; the others come with their CPUID feature."""
CR4_BY_FEATURE: Final = {
    "vme": CR4_VME | CR4_PVI,
    "umip": CR4_UMIP,
    "la57": CR4_LA57,
    "vmx": CR4_VMXE,
    "smx": CR4_SMXE,
    "fsgsbase": CR4_FSGSBASE,
    "pcid": CR4_PCIDE,
    "xsave": CR4_OSXSAVE,
    "smep": CR4_SMEP,
    "smap": CR4_SMAP,
    "pku": CR4_PKE,
    "pks": CR4_PKS,
}
"""Which CR4 bits a CPUID feature (names of `x86.cpuid`) brings; setting any other bit is #GP."""
CR4_PAGING: Final = CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP
"""Changing one of these invalidates all TLB entries (SDM 3A 4.10.4.1)."""
CR0_PAGING: Final = CR0_PE | CR0_WP | CR0_PG

CR8_VALID: Final = 0xF

EFER_SCE: Final = 1 << 0
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
"""Read-only: set and cleared by the processor with CR0.PG."""
EFER_NXE: Final = 1 << 11
EFER_VALID: Final = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE

XCR0_X87: Final = 1 << 0
XCR0_SSE: Final = 1 << 1
XCR0_AVX: Final = 1 << 2
XCR0_BNDREGS: Final = 1 << 3
XCR0_BNDCSR: Final = 1 << 4
XCR0_OPMASK: Final = 1 << 5
XCR0_ZMM_HI256: Final = 1 << 6
XCR0_HI16_ZMM: Final = 1 << 7
XCR0_PKRU: Final = 1 << 9
XCR0_AVX512: Final = XCR0_OPMASK | XCR0_ZMM_HI256 | XCR0_HI16_ZMM

DR6_FIXED: Final = 0xFFFF0FF0
"""Bits of DR6 that read as one (no RTM, no bus-lock detection)."""
DR6_VALID: Final = 0xE00F
DR6_BD: Final = 1 << 13
DR6_BS: Final = 1 << 14
DR6_BT: Final = 1 << 15
DR7_FIXED: Final = 0x400
DR7_VALID: Final = 0xFFFF23FF
DR7_GD: Final = 1 << 13


def cr0_is_valid(value: int) -> bool:
    """Whether MOV to CR0 accepts `value`: no high half, PG needs PE, NW needs CD (SDM 2B, MOV to CR)."""
    return not (
        value >> 32
        or (value & CR0_PG and not value & CR0_PE)
        or (value & CR0_NW and not value & CR0_CD)
    )


def cr4_mask(features: frozenset[str]) -> int:
    """The CR4 bits of a processor with these CPUID features."""
    mask = CR4_BASE
    for name, bits in CR4_BY_FEATURE.items():
        if name in features:
            mask |= bits
    return mask


def xcr0_is_valid(value: int, supported: int) -> bool:
    """Whether XSETBV accepts `value` for XCR0 on a processor that supports these bits (SDM 1, 13.3)."""
    if value & ~supported or not value & XCR0_X87:
        return False
    if value & XCR0_AVX and not value & XCR0_SSE:
        return False
    if value & XCR0_AVX512 and value & (XCR0_AVX512 | XCR0_AVX) != XCR0_AVX512 | XCR0_AVX:
        return False
    bounds = value & (XCR0_BNDREGS | XCR0_BNDCSR)
    return bounds in (0, XCR0_BNDREGS | XCR0_BNDCSR)
