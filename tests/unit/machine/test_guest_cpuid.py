"""The guest's CPUID: what is told, what depends on the host, and what changes as it runs."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivisor.machine.cpuid import (
    ARCH_CAPABILITIES,
    AVX512,
    COPIED,
    EMULATED,
    OPTIONAL,
    GuestCpuid,
    closest_ratio,
    guest_cpuid,
    tsc_ratio,
    with_avx512,
)
from trivisor.x86 import control, cpuid, msr
from trivisor.x86.cpuid import EAX, EBX, ECX, EDX, FEATURES, Registers

TSC = 2_300_000_000
CRYSTAL = 25_000_000


def host_with(names: frozenset[str]) -> cpuid.Query:
    """A host that has exactly these features."""

    def query(leaf: int, subleaf: int) -> Registers:
        registers = [0, 0, 0, 0]
        if leaf in (0, 0x80000000):
            registers[EAX] = leaf | 0x20
        if (leaf, subleaf) == (7, 0):
            registers[EAX] = 2
        for name in names:
            place = FEATURES[name]
            if (place.leaf, place.subleaf) == (leaf, subleaf):
                registers[place.register] |= 1 << place.bit
        return (registers[0], registers[1], registers[2], registers[3])

    return query


EVERYTHING = host_with(frozenset(FEATURES))
OLD = host_with(COPIED - {"avx", "avx2", "fma", "f16c", "xsave", "xsaveopt", "xsavec", "bmi2", "sha"})


def guest(host: cpuid.Query = EVERYTHING, xcr0: int = 0xE7, **how: object) -> GuestCpuid:
    return guest_cpuid(host, tsc_frequency=TSC, crystal_frequency=CRYSTAL, host_xcr0=xcr0, **how)  # type: ignore[arg-type]


def text(*words: int) -> str:
    return b"".join(word.to_bytes(4, "little") for word in words).decode().rstrip("\0")


def test_identity() -> None:
    seen = guest(apic_id=3)
    largest, b, c, d = seen.query(0, 0)
    assert (largest, text(b, d, c)) == (0x16, "GenuineIntel")
    eax, ebx, _, _ = seen.query(1, 0)
    assert eax == 0x806F8
    assert ebx >> 24 == 3 and (ebx >> 8 & 0xFF) * 8 == 64
    brand = [word for leaf in (2, 3, 4) for word in seen.query(0x80000000 | leaf, 0)]
    assert text(*brand) == "trivisor virtual CPU"
    largest, *signature = seen.query(0x40000000, 0)
    assert (largest, text(*signature)) == (0x40000010, "TRIVISORVMM ")
    assert seen.query(0x80000008, 0)[EAX] == 0x3028


def test_features_are_what_we_have_and_the_host_has() -> None:
    rich = guest()
    assert cpuid.features(rich.query) == COPIED | EMULATED == rich.features
    hidden = {"pcid", "rtm", "avx512f", "pku", "vmx", "ht", "la57", "monitor", "xsaves", "movdir64b"}
    assert not hidden & rich.features
    poor = guest(OLD)
    assert {"sse4_2", "smep", "nx"} <= poor.features
    assert not {"avx", "xsave", "bmi2", "sha"} & poor.features


def test_avx_needs_the_hosts_operating_system() -> None:
    no_avx = guest(xcr0=3)
    assert "xsave" in no_avx.features and not {"avx", "avx2", "fma", "f16c"} & no_avx.features
    assert no_avx.xcr0_supported == 3
    assert no_avx.query(0xD, 0, xcr0=3) == (3, 576, 576, 0)
    assert no_avx.query(0xD, 2) == (0, 0, 0, 0)
    no_xsave = guest(xcr0=0)
    assert not {"xsave", "avx", "xsavec"} & no_xsave.features
    assert no_xsave.query(0xD, 0) == (0, 0, 0, 0)
    assert no_xsave.xcr0_supported == 0


def test_switches() -> None:
    assert "pcid" in guest(extra=["pcid"]).features
    assert not guest().cr4_mask & control.CR4_PCIDE
    assert guest(extra=["pcid"]).cr4_mask & control.CR4_PCIDE
    assert "invpcid" in guest(extra=["invpcid"]).features, "INVPCID works on PCID 0 where there are no others"
    assert "x2apic" in guest(extra=["x2apic"]).features, "what is there anyway may be asked for"
    assert not {"avx", "fma"} & guest(without=["avx"]).features
    assert guest(extra=OPTIONAL).features >= OPTIONAL
    for wrong in ({"extra": ["avx512f"]}, {"without": ["turbo"]}):
        with pytest.raises(ValueError, match=r"avx512f|turbo"):
            guest(**wrong)


def test_dynamic_bits() -> None:
    seen = guest()
    osxsave, apic = 1 << 27, 1 << 9
    assert not seen.query(1, 0)[ECX] & osxsave
    assert seen.query(1, 0, cr4=control.CR4_OSXSAVE)[ECX] & osxsave
    assert seen.query(1, 0)[EDX] & apic
    assert not seen.query(1, 0, apic_enabled=False)[EDX] & apic


def test_xsave_leaf() -> None:
    seen = guest()
    assert seen.query(0xD, 0, xcr0=1) == (7, 576, 832, 0)
    assert seen.query(0xD, 0, xcr0=7) == (7, 832, 832, 0)
    assert seen.query(0xD, 1, xcr0=7) == (7, 832, 0, 0)
    assert seen.query(0xD, 1, xcr0=3)[EBX] == 576
    assert seen.query(0xD, 2) == (256, 576, 0, 0)
    assert seen.query(0xD, 5) == (0, 0, 0, 0)
    assert guest(without=["xsavec"]).query(0xD, 1, xcr0=7) == (5, 0, 0, 0)


@pytest.mark.parametrize("places", [{5: 832, 6: 896, 7: 1408}, {5: 1088, 6: 1152, 7: 1664}])
def test_a_guest_whose_programs_see_avx512_is_told_where_it_is_kept(places: dict[int, int]) -> None:
    """As AMD and Intel lay the XSAVE area out."""
    sizes = {5: 64, 6: 512, 7: 1024}

    def host(leaf: int, subleaf: int) -> Registers:
        if leaf == 0xD and subleaf in places:
            return (sizes[subleaf], places[subleaf], 0, 0)
        return EVERYTHING(leaf, subleaf)

    plain = guest()
    seen = with_avx512(plain, host)
    assert seen.features == plain.features | AVX512 == cpuid.features(seen.query)
    assert seen.xcr0_supported == 0xE7 and not plain.features & AVX512 and plain.xcr0_supported == 7
    whole = places[7] + 1024
    assert seen.query(0xD, 0, xcr0=1) == (0xE7, 576, whole, 0)
    assert seen.query(0xD, 0, xcr0=7)[EBX] == 832
    assert seen.query(0xD, 0, xcr0=0xE7) == (0xE7, whole, whole, 0)
    assert seen.query(0xD, 1, xcr0=0xE7)[EBX] == 832 + 64 + 512 + 1024
    assert [seen.query(0xD, component)[:2] for component in places] == [(sizes[n], places[n]) for n in places]


def test_protection_keys_are_a_component_of_xsave() -> None:
    seen = guest(extra=["pku"])
    assert seen.xcr0_supported == 0x207
    size, offset, flags, _ = seen.query(0xD, 9)
    assert (size, offset, flags) == (8, 832, 0)
    assert seen.query(0xD, 0, xcr0=0x207) == (0x207, 840, 840, 0)
    assert seen.query(0xD, 0, xcr0=0x203)[EBX] == 840
    assert seen.query(0xD, 0, xcr0=7)[EBX] == 832
    assert [seen.query(0xD, 1, xcr0=xcr0)[EBX] for xcr0 in (0x207, 0x203, 7)] == [840, 584, 832]
    assert guest(extra=["pku"], without=["xsave"]).xcr0_supported == 0


def test_one_processor() -> None:
    seen = guest(apic_id=5)
    assert seen.query(0xB, 0) == (0, 1, 0x100, 5)
    assert seen.query(0xB, 1) == (0, 1, 0x201, 5)
    assert seen.query(0xB, 2) == (0, 0, 2, 5)
    assert seen.query(0xB, 0xFFFFFFFF) == (0, 0, 0xFF, 5)


def test_caches() -> None:
    sizes = []
    for index in range(4):
        eax, ebx, ecx, _ = guest().query(4, index)
        assert eax >> 14 == 0, "shared by nobody"
        ways, line, sets = (ebx >> 22) + 1, (ebx & 0xFFF) + 1, ecx + 1
        sizes.append((eax >> 5 & 7, ways, ways * line * sets >> 10))
    assert sizes == [(1, 12, 48), (1, 8, 32), (2, 16, 2048), (3, 16, 16384)]
    assert guest().query(4, 4) == (0, 0, 0, 0)


def test_clocks() -> None:
    seen = guest()
    assert seen.query(0x15, 0) == (1, 92, CRYSTAL, 0)
    assert seen.query(0x16, 0) == (2300, 2300, 100, 0)
    assert seen.query(0x40000010, 0) == (2_300_000, 25_000, 0, 0)


@pytest.mark.parametrize("crystal", [24_000_000, 25_000_000, 200_000_000, 1_000_000_000])
@pytest.mark.parametrize("tsc", [1_000_000_000, 2_299_998_123, 2_893_299_707, 5_800_000_001])
def test_linux_computes_the_tsc_frequency(tsc: int, crystal: int) -> None:
    denominator, numerator = tsc_ratio(tsc, crystal)
    product = crystal // 1000 * numerator
    assert product < 1 << 32
    assert abs(product / denominator * 1000 - tsc) / tsc < 1e-6


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 40), st.integers(1, 1 << 20))
def test_no_fraction_with_such_denominators_is_closer(numerator: int, denominator: int, most: int) -> None:
    exact = Fraction(numerator, denominator)
    found = Fraction(*closest_ratio(exact.numerator, exact.denominator, most))
    assert found.denominator <= most
    assert abs(found - exact) == abs(exact.limit_denominator(most) - exact)


def test_leaves_out_of_range() -> None:
    seen = guest()
    base = seen.query(0x16, 0)
    assert seen.query(0x17, 0) == seen.query(0x80000009, 0) == seen.query(0xFFFFFFFF, 0xFFFFFFFF) == base
    assert seen.query(0x40000001, 0) == seen.query(0x4FFFFFFF, 0) == (0, 0, 0, 0)
    assert seen.query(1, 0xDEAD) == seen.query(1, 0), "no subleaves there"


def test_linux_finds_nothing_to_mitigate() -> None:
    """Linux 6.1, cpu/common.c cpu_set_bug_bits: each of these spares the guest a slow defence."""
    seen = guest()
    assert {"spec_ctrl", "arch_capabilities", "bhi_ctrl", "hypervisor"} <= seen.features
    page_table_isolation, retpolines, store_bypass = 1 << 0, 1 << 1, 1 << 4
    verw = 1 << 5 | 1 << 8 | 7 << 13 | 1 << 27
    gather, indirect_targets, multihit, rsb = 1 << 26, 1 << 62, 1 << 6, 1 << 24
    wanted = page_table_isolation | retpolines | store_bypass | verw
    wanted |= gather | indirect_targets | multihit | rsb
    assert ARCH_CAPABILITIES & wanted == wanted
    return_alternatives = 1 << 2 | 1 << 19
    clear_buffers = 1 << 17 | 1 << 28
    assert not ARCH_CAPABILITIES & (return_alternatives | clear_buffers)
    assert ARCH_CAPABILITIES & msr.ARCH_CAP_BHI_NO


def test_this_host() -> None:
    """Whatever we tell of copied instructions, the processor under us has."""
    seen = guest_cpuid(cpuid.host_cpuid, tsc_frequency=TSC, crystal_frequency=CRYSTAL)
    assert seen.features - EMULATED <= cpuid.features(cpuid.host_cpuid)
    assert {"sse2", "cx8", "fpu"} <= seen.features
