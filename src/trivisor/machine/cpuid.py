"""CPUID as the guest of the translation engine sees it (Intel SDM 2A, CPUID).

The guest gets a Sapphire Rapids Xeon, cut down to what the translator has: an
instruction set that is copied to the host is told of only if the host has it;
what the translator does itself is always there.

Speculation: guest kernel and guest user run at one privilege level of the
host, where no control that the guest could set has any effect.  The guest is
told of a processor with enhanced IBRS, hardware protection against branch
history injection, and none of the other flaws (`ARCH_CAPABILITIES`), so that it
wastes no time on defences that would not work here.  Nothing is promised about
side channels inside one guest.
"""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Final, NamedTuple

from trivisor.machine.memory import PHYSICAL_ADDRESS_BITS
from trivisor.x86 import control, msr
from trivisor.x86.cpuid import EAX, EBX, ECX, EDX, FEATURES, VENDORS, Query, Registers, features, host_xgetbv

BRAND: Final = "trivisor virtual CPU"
VENDOR, AMD = VENDORS
HYPERVISOR_SIGNATURE: Final = "TRIVISORVMM "
FAMILY_MODEL_STEPPING: Final = 0x000806F8
"""Family 6, model 0x8F, stepping 8."""
LINEAR_BITS: Final = 48
HYPERVISOR_LEAVES: Final = range(0x40000000, 0x50000000)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COPIED: Final = _names(
    "fpu tsc cx8 cmov clflush mmx fxsr sse sse2 sse3 pclmul ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes "
    "xsave avx f16c rdrand fsgsbase bmi1 avx2 fdp_excptn_only bmi2 erms zero_fcs_fds rdseed adx clflushopt "
    "clwb sha xsaveopt xsavec lahf abm 3dnowprefetch invariant_tsc gfni vaes vpclmulqdq movdiri fsrm fzrm fsrs fsrcs "
    "avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 avx_ne_convert sha512 sm3 sm4"
)
"""There if the host has them."""
EMULATED: Final = _names(
    "de pse msr pae mce apic sep mtrr pge mca pat pse36 x2apic tsc_deadline hypervisor arat smep spec_ctrl "
    "flush_l1d arch_capabilities bhi_ctrl syscall nx pdpe1gb rdtscp lm tsc_adjust umip smap rdpid serialize xgetbv1 "
    "wbnoinvd"
)
"""There on every host."""
UNPRIVILEGED: Final = frozenset({"rdpid", "serialize", "xgetbv1"})
"""Those of them that a processor runs by itself in ring 3, if it has them."""
OPTIONAL: Final = frozenset({"pcid", "invpcid", "pku", "pks"})
"""Emulated, and off unless asked for with `extra`."""
AVX512: Final = frozenset(name for name in FEATURES if name.startswith("avx512"))
"""What translation does not have; there for guests that would see it anyway (`with_avx512`)."""
_REQUIRES: Final = {
    "avx": "xsave",
    "fma": "avx",
    "f16c": "avx",
    "avx2": "avx",
    "xsaveopt": "xsave",
    "xsavec": "xsave",
    "xgetbv1": "xsave",
    "vaes": "avx",
    "vpclmulqdq": "avx",
    "sm3": "avx",
    "sm4": "avx2",
    "sha512": "avx2",
    "avx_vnni": "avx2",
    "avx_ifma": "avx2",
    "avx_vnni_int8": "avx2",
    "avx_vnni_int16": "avx2",
    "avx_ne_convert": "avx2",
}

ARCH_CAPABILITIES: Final = (
    msr.ARCH_CAP_RDCL_NO
    | msr.ARCH_CAP_IBRS_ALL
    | msr.ARCH_CAP_SKIP_L1DFL_VMENTRY
    | msr.ARCH_CAP_SSB_NO
    | msr.ARCH_CAP_MDS_NO
    | msr.ARCH_CAP_IF_PSCHANGE_MC_NO
    | msr.ARCH_CAP_TAA_NO
    | msr.ARCH_CAP_SBDR_SSDP_NO
    | msr.ARCH_CAP_FBSDP_NO
    | msr.ARCH_CAP_PSDP_NO
    | msr.ARCH_CAP_BHI_NO
    | msr.ARCH_CAP_PBRSB_NO
    | msr.ARCH_CAP_GDS_NO
    | msr.ARCH_CAP_RFDS_NO
    | msr.ARCH_CAP_ITS_NO
)
"""IA32_ARCH_CAPABILITIES.  Linux also wants the `bhi_ctrl` bit, or clears the branch history in a loop."""

_MAXIMUM_BASIC = 0x16
_MAXIMUM_HYPERVISOR = 0x40000010
_MAXIMUM_EXTENDED = 0x80000008
HAS_SUBLEAVES: Final = frozenset({4, 7, 0xB, 0xD})
_NOTHING: Registers = (0, 0, 0, 0)

_LEGACY_AREA = 576
"""Bytes of the XSAVE area's legacy region and header (SDM 1, 13.4)."""
_AVX_AREA = 256
_PKRU_AREA = 8
_PKRU_COMPONENT = 9
_AVX512_COMPONENTS: Final = (5, 6, 7)
_COMPONENTS: Final = (2, *_AVX512_COMPONENTS, _PKRU_COMPONENT)
"""Parts of the XSAVE area behind its header, which come in this order."""
_ALIGNED = 64
"""What some begin at a multiple of in its compacted format."""

_CACHES = (
    # type (1 data, 2 code, 3 both), level, KiB, ways
    (1, 1, 48, 12),
    (2, 1, 32, 8),
    (3, 2, 2048, 16),
    (3, 3, 16384, 16),
)
_LINE = 64
_CACHE_DESCRIPTORS: Registers = (0x76036301, 0x00F0B5FF, 0, 0x00C30000)
"""Leaf 2: TLB sizes, 64-byte prefetch, and 0xFF for "see leaf 4" (SDM 2A table 3-12)."""


class GuestCpuid(NamedTuple):
    """The processor that a guest sees: what never changes about it, and `query` for what does."""

    features: frozenset[str]
    """Names of `x86.cpuid.FEATURES`, without `osxsave`."""
    table: dict[tuple[int, int], Registers]
    physical_bits: int = PHYSICAL_ADDRESS_BITS
    vendor: str = VENDOR
    hidden_xcr0: int = 0
    """XCR0 bits that a guest may set though nothing here tells it so: a KVM may show it more than it was told."""

    @property
    def cr4_mask(self) -> int:
        """The CR4 bits that the guest may set."""
        return control.cr4_mask(self.features)

    @property
    def xcr0_supported(self) -> int:
        """The XCR0 bits that the guest may set; 0 without XSAVE."""
        return xcr0_of(self.features) | (self.hidden_xcr0 if "xsave" in self.features else 0)

    @property
    def xcr0_on_host(self) -> int:
        """The components of its XCR0 that are in the host's registers while it runs."""
        return xcr0_on_host(self.xcr0_supported)

    @property
    def empty_leaves(self) -> range:
        """Hypervisors' leaves that are all zeros, whatever the subleaf: guests look at each 256th for one."""
        known = (leaf for leaf, _ in self.table if leaf in HYPERVISOR_LEAVES)
        return range(max(known, default=HYPERVISOR_LEAVES.start) | 0xFF, HYPERVISOR_LEAVES.stop)[1:]

    def query(
        self, leaf: int, subleaf: int, *, cr4: int = 0, xcr0: int = 1, apic_enabled: bool = True
    ) -> Registers:
        """CPUID with EAX = `leaf`, ECX = `subleaf`, given what it depends on: (eax, ebx, ecx, edx)."""
        leaf = _in_range(leaf)
        if leaf not in HAS_SUBLEAVES:
            subleaf = 0
        answer = self.table.get((leaf, subleaf), _NOTHING)
        if leaf == 1:
            return _leaf_1(answer, cr4, apic_enabled)
        if leaf == 7 and subleaf == 0 and cr4 & control.CR4_PKE:
            return (answer[EAX], answer[EBX], answer[ECX] | 1 << FEATURES["ospke"].bit, answer[EDX])
        if leaf == 0xB and subleaf > 1:
            return (0, 0, subleaf & 0xFF, self.table[0xB, 0][EDX])
        if leaf == 0xD and subleaf < 2:
            return self._xsave_sizes(answer, subleaf, xcr0)
        return answer

    def _xsave_sizes(self, answer: Registers, subleaf: int, xcr0: int) -> Registers:
        """EBX of leaf 0xD: bytes that XSAVE, and XSAVEC, need for what XCR0 enables now."""
        if "xsave" not in self.features or (subleaf and "xsavec" not in self.features):
            return answer
        size = _LEGACY_AREA
        for component in _COMPONENTS:
            row = self.table.get((0xD, component))
            if row is not None and xcr0 >> component & 1:
                start = row[EBX] if not subleaf else -(-size // _ALIGNED) * _ALIGNED if row[ECX] & 2 else size
                size = start + row[EAX]
        return (answer[EAX], size, answer[ECX], answer[EDX])


def xcr0_of(names: Collection[str]) -> int:
    """The XCR0 bits of a processor with these features; 0 without XSAVE."""
    if "xsave" not in names:
        return 0
    avx = control.XCR0_AVX if "avx" in names else 0
    avx512 = control.XCR0_AVX512 if "avx512f" in names else 0
    pkru = control.XCR0_PKRU if "pku" in names else 0
    return control.XCR0_X87 | control.XCR0_SSE | avx | avx512 | pkru


def xcr0_on_host(xcr0: int) -> int:
    """Those of a guest's XCR0 bits whose components are in the host's registers while it runs."""
    return xcr0 & host_xgetbv() & ~control.XCR0_PKRU if xcr0 else 0  # PKRU is never the host's


def guest_features(
    host: Query, *, host_xcr0: int | None = None, extra: Collection[str] = (), without: Collection[str] = ()
) -> frozenset[str]:
    """`GuestCpuid.features` of the processor that `guest_cpuid` makes; ValueError as there."""
    available = COPIED & features(host)
    if unknown := set(extra) - OPTIONAL - EMULATED - available | set(without) - set(FEATURES):
        raise ValueError(f"no CPU feature to switch: {', '.join(sorted(unknown))}")
    if host_xcr0 is None:
        host_xcr0 = host_xgetbv()
    if host_xcr0 & 6 != 6:
        available -= {"avx"}
    if not host_xcr0 & 1:
        available -= {"xsave"}
    return _closed((available | EMULATED | set(extra)) - set(without))


def guest_cpuid(
    host: Query,
    *,
    tsc_frequency: int,
    crystal_frequency: int,
    apic_id: int = 0,
    host_xcr0: int | None = None,
    extra: Collection[str] = (),
    without: Collection[str] = (),
    vendor: str = VENDOR,
) -> GuestCpuid:
    """The guest's processor on a host whose CPUID is `host` and whose XCR0 is `host_xcr0` (None: ask it).

    Frequencies are in Hz: of the TSC, and of the local APIC timer's input clock.
    `extra` switches on features of `OPTIONAL`, `without` takes any away.  `vendor`
    decides what the two makers' processors do differently, such as SYSCALL in 32-bit code.
    ValueError for a name that cannot be switched.
    """
    chosen = guest_features(host, host_xcr0=host_xcr0, extra=extra, without=without)
    table = _feature_leaves(chosen)
    _merge(table, _identity(apic_id, vendor))
    _merge(table, _topology(apic_id))
    _merge(table, _clocks(tsc_frequency, crystal_frequency))
    if "xsave" in chosen:
        _merge(table, _xsave_leaves("avx" in chosen, _pkru_offset(host) if "pku" in chosen else 0))
    return GuestCpuid(chosen, table, vendor=vendor)


def with_avx512(cpuid: GuestCpuid, host: Query, told: frozenset[str] = AVX512) -> GuestCpuid:
    """`cpuid`, with AVX-512's registers, and with those of the features `told` that the processor `host` has.

    For a guest whose programs see it whatever the guest is told: its kernel would not know that they have registers
    which one process must not leave to the next.
    """
    names, table = told & features(host), dict(cpuid.table)
    _merge(table, _feature_leaves(names))
    rows = {(0xD, component): host(0xD, component) for component in _AVX512_COMPONENTS}
    size = max(row[EAX] + row[EBX] for row in rows.values())
    a, b, c, d = table[0xD, 0]
    return cpuid._replace(
        features=cpuid.features | names,
        table={**table, **rows, (0xD, 0): (a | control.XCR0_AVX512, b, max(c, size), d)},
        hidden_xcr0=cpuid.hidden_xcr0 & ~control.XCR0_AVX512,
    )


def tsc_ratio(tsc_frequency: int, crystal_frequency: int) -> tuple[int, int]:
    """(denominator, numerator) of TSC to crystal for leaf 0x15, the closest that guests can compute with.

    Linux multiplies crystal kHz by the numerator in 32 bits (arch/x86/kernel/tsc.c); that must not overflow.
    """
    common = gcd(tsc_frequency, crystal_frequency)
    denominator, numerator = crystal_frequency // common, tsc_frequency // common
    largest = 0xFFFFFFFF // max(crystal_frequency // 1000, 1)
    numerator, denominator = closest_ratio(numerator, denominator, max(largest * denominator // numerator, 1))
    return denominator, numerator


def closest_ratio(numerator: int, denominator: int, most: int) -> tuple[int, int]:
    """The fraction in lowest terms that is closest to a given one, with a denominator of `most` at most.

    It is a convergent of the continued fraction or lies between the last two, as in `Fraction.limit_denominator`;
    the module of that takes longer to import than all of a guest's CPUID to make.
    """
    (before, below_before), (last, below_last) = (0, 1), (1, 0)
    rest, divisor = numerator, denominator
    while divisor:
        whole, remainder = divmod(rest, divisor)
        below_next = below_before + whole * below_last
        if below_next > most:
            steps = (most - below_before) // below_last
            between, below_between = before + steps * last, below_before + steps * below_last
            if 2 * divisor * below_between <= denominator:
                return last, below_last
            return between, below_between
        before, below_before, last, below_last = last, below_last, before + whole * last, below_next
        rest, divisor = divisor, remainder
    return last, below_last


def _in_range(leaf: int) -> int:
    """Leaves beyond the largest give the largest basic leaf, as Intel's processors do."""
    if leaf <= _MAXIMUM_BASIC or leaf in HYPERVISOR_LEAVES or 0x80000000 <= leaf <= _MAXIMUM_EXTENDED:
        return leaf
    return _MAXIMUM_BASIC


def _closed(chosen: Collection[str]) -> frozenset[str]:
    """`chosen` without the features that build on one that is missing."""
    kept = set(chosen)
    for name, needed in _REQUIRES.items():
        if needed not in kept:
            kept.discard(name)
    return frozenset(kept)


def _leaf_1(answer: Registers, cr4: int, apic_enabled: bool) -> Registers:
    """Add OSXSAVE, which mirrors CR4, and take APIC away while IA32_APIC_BASE disables it."""
    ecx, edx = answer[ECX], answer[EDX]
    if cr4 & control.CR4_OSXSAVE:
        ecx |= 1 << FEATURES["osxsave"].bit
    if not apic_enabled:
        edx &= ~(1 << FEATURES["apic"].bit)
    return (answer[EAX], answer[EBX], ecx, edx)


def _merge(table: dict[tuple[int, int], Registers], more: dict[tuple[int, int], Registers]) -> None:
    """OR `more` into `table`."""
    for key, registers in more.items():
        a, b, c, d = table.get(key, _NOTHING)
        table[key] = (a | registers[EAX], b | registers[EBX], c | registers[ECX], d | registers[EDX])


def _feature_leaves(chosen: frozenset[str]) -> dict[tuple[int, int], Registers]:
    leaves: dict[tuple[int, int], list[int]] = {}
    for name in chosen:
        place = FEATURES[name]
        leaves.setdefault((place.leaf, place.subleaf), [0, 0, 0, 0])[place.register] |= 1 << place.bit
    return {key: (a, b, c, d) for key, (a, b, c, d) in leaves.items()}


def _words(text: str, length: int) -> tuple[int, ...]:
    """ASCII text as little-endian doublewords, padded with zeros to `length` bytes."""
    raw = text.encode("ascii").ljust(length, b"\0")
    return tuple(int.from_bytes(raw[at : at + 4], "little") for at in range(0, length, 4))


def _identity(apic_id: int, vendor: str) -> dict[tuple[int, int], Registers]:
    maker = _words(vendor, 12)
    hypervisor = _words(HYPERVISOR_SIGNATURE, 12)
    brand = _words(BRAND, 48)
    leaves: dict[tuple[int, int], Registers] = {
        (0, 0): (_MAXIMUM_BASIC, maker[0], maker[2], maker[1]),
        # EBX: initial APIC id, one logical processor, CLFLUSH line in quadwords.
        (1, 0): (FAMILY_MODEL_STEPPING, (apic_id & 0xFF) << 24 | 1 << 16 | _LINE // 8 << 8, 0, 0),
        (7, 0): (2, 0, 0, 0),
        (0x40000000, 0): (_MAXIMUM_HYPERVISOR, hypervisor[0], hypervisor[1], hypervisor[2]),
        (0x80000000, 0): (_MAXIMUM_EXTENDED, 0, 0, 0),
        (0x80000008, 0): (LINEAR_BITS << 8 | PHYSICAL_ADDRESS_BITS, 0, 0, 0),
    }
    for part in range(3):
        a, b, c, d = brand[4 * part : 4 * part + 4]
        leaves[0x80000002 + part, 0] = (a, b, c, d)
    return leaves


def _topology(apic_id: int) -> dict[tuple[int, int], Registers]:
    """Caches, and one package of one core of one thread."""
    leaves: dict[tuple[int, int], Registers] = {
        (2, 0): _CACHE_DESCRIPTORS,
        (0xB, 0): (0, 1, 1 << 8, apic_id),
        (0xB, 1): (0, 1, 2 << 8 | 1, apic_id),
        # L2: KiB, 16-way, bytes a line.
        (0x80000006, 0): (0, 0, 2048 << 16 | 8 << 12 | _LINE, 0),
    }
    for index, (kind, level, kibibytes, ways) in enumerate(_CACHES):
        sets = kibibytes * 1024 // (ways * _LINE)
        # EAX bit 8: self-initializing.
        leaves[4, index] = (kind | level << 5 | 1 << 8, ways - 1 << 22 | _LINE - 1, sets - 1, 0)
    return leaves


def _clocks(tsc_frequency: int, crystal_frequency: int) -> dict[tuple[int, int], Registers]:
    denominator, numerator = tsc_ratio(tsc_frequency, crystal_frequency)
    megahertz = min(round(tsc_frequency / 1_000_000), 0xFFFF)
    return {
        (0x15, 0): (denominator, numerator, crystal_frequency, 0),
        (0x16, 0): (megahertz, megahertz, 100, 0),
        # Hypervisors that follow VMware: TSC and APIC bus in kHz.
        (_MAXIMUM_HYPERVISOR, 0): (tsc_frequency // 1000, crystal_frequency // 1000, 0, 0),
    }


def _pkru_offset(host: Query) -> int:
    """Where PKRU is in the XSAVE area's standard format: the host's place, as its own XSAVE may be the guest's."""
    return (host(0xD, _PKRU_COMPONENT)[EBX] if "pku" in features(host) else 0) or _LEGACY_AREA + _AVX_AREA


def _xsave_leaves(avx: bool, pkru_offset: int) -> dict[tuple[int, int], Registers]:
    """Components, sizes and offsets; no PKRU at offset 0."""
    components, size = control.XCR0_X87 | control.XCR0_SSE, _LEGACY_AREA
    leaves: dict[tuple[int, int], Registers] = {}
    if avx:
        leaves[0xD, 2] = (_AVX_AREA, _LEGACY_AREA, 0, 0)
        components |= control.XCR0_AVX
        size += _AVX_AREA
    if pkru_offset:
        leaves[0xD, _PKRU_COMPONENT] = (_PKRU_AREA, pkru_offset, 0, 0)
        components |= control.XCR0_PKRU
        size = pkru_offset + _PKRU_AREA
    leaves[0xD, 0] = (components, 0, size, 0)
    return leaves
