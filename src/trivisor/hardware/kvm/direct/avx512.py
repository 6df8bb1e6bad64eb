"""CPUID about AVX-512 where ring 3 sees the host's whatever it is told (kvm-pvm): so the guest's kernel is told too.

Programs there find AVX-512 with CPUID and XGETBV of the host's, and use it.  A
kernel that did not know would not save those registers when it goes from one
program to another.
"""

from __future__ import annotations

from typing import Final

from trivisor.x86.control import XCR0_AVX, XCR0_AVX512, XCR0_PKRU
from trivisor.x86.cpuid import EAX, EBX, ECX, EDX, FEATURES, Registers, host_cpuid

_COMPONENTS: Final = (5, 6, 7)
"""Of the XSAVE area: opmasks, upper halves of ZMM0 to 15, ZMM16 to 31 (Intel SDM 1, 13.5)."""
_PKRU: Final = 9
_LEGACY, _AVX, _PKRU_SIZE = 576, 256, 8
_XSAVEC: Final = 1 << 1


def _masks() -> dict[tuple[int, int], list[int]]:
    masks: dict[tuple[int, int], list[int]] = {}
    for name, (leaf, subleaf, register, bit) in FEATURES.items():
        if name.startswith("avx512"):
            masks.setdefault((leaf, subleaf), [0] * 4)[register] |= 1 << bit
    return masks


_MASKS: Final = _masks()
AVX512_LEAVES: Final = [*_MASKS, *((0xD, component) for component in _COMPONENTS)]
"""Leaves and subleaves that tell of it, beside those that are there anyway."""


def with_avx512(leaf: int, subleaf: int, told: Registers, xcr0: int) -> Registers:
    """What CPUID says, `told` but for AVX-512, with `xcr0` in use."""
    if masks := _MASKS.get((leaf, subleaf)):
        host = host_cpuid(leaf, subleaf)
        a, b, c, d = (value | there & mask for value, there, mask in zip(told, host, masks, strict=True))
        return a, b, c, d
    if leaf != 0xD or subleaf not in (0, 1, *_COMPONENTS):
        return told
    if subleaf in _COMPONENTS:
        return host_cpuid(leaf, subleaf)
    if subleaf == 0:
        supported = told[EAX] | XCR0_AVX512
        return supported, _end(xcr0), _end(supported), told[EDX]
    size = _compact(xcr0) if told[EAX] & _XSAVEC else told[EBX]
    return told[EAX], size, told[ECX], told[EDX]


def _end(xcr0: int) -> int:
    """Bytes of an XSAVE area in the standard format."""
    end = _LEGACY + (_AVX if xcr0 & XCR0_AVX else 0)
    for component in (*_COMPONENTS, _PKRU):
        if xcr0 >> component & 1:
            size, offset, _, _ = host_cpuid(0xD, component)
            end = max(end, offset + size)
    return end


def _compact(xcr0: int) -> int:
    """Bytes in the compacted format; none of these components asks for a place of its own (SDM 1, 13.4.3)."""
    size = _LEGACY + (_AVX if xcr0 & XCR0_AVX else 0)
    size += sum(host_cpuid(0xD, component)[EAX] for component in _COMPONENTS if xcr0 >> component & 1)
    return size + (_PKRU_SIZE if xcr0 & XCR0_PKRU else 0)
