"""CPUID: where each feature bit is, and what the processor that we run on answers (Intel SDM 2A, CPUID)."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

Registers = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""
Query = Callable[[int, int], Registers]
"""CPUID of (leaf, subleaf)."""

EAX: Final = 0
EBX: Final = 1
ECX: Final = 2
EDX: Final = 3


class FeatureBit(NamedTuple):
    """Where CPUID tells of a feature."""

    leaf: int
    subleaf: int
    register: int
    bit: int


def _bits(leaf: int, subleaf: int, register: int, names: str) -> dict[str, FeatureBit]:
    """Features from words "bit:name"."""
    table = {}
    for word in names.split():
        bit, name = word.split(":")
        table[name] = FeatureBit(leaf, subleaf, register, int(bit))
    return table


FEATURES: Final[dict[str, FeatureBit]] = {
    **_bits(
        1, 0, EDX,
        "0:fpu 1:vme 2:de 3:pse 4:tsc 5:msr 6:pae 7:mce 8:cx8 9:apic 11:sep 12:mtrr 13:pge 14:mca "
        "15:cmov 16:pat 17:pse36 18:psn 19:clflush 21:ds 22:acpi 23:mmx 24:fxsr 25:sse 26:sse2 27:ss "
        "28:ht 29:tm 31:pbe",
    ),
    **_bits(
        1, 0, ECX,
        "0:sse3 1:pclmul 2:dtes64 3:monitor 4:ds_cpl 5:vmx 6:smx 7:est 8:tm2 9:ssse3 11:sdbg 12:fma "
        "13:cx16 14:xtpr 15:pdcm 17:pcid 18:dca 19:sse4_1 20:sse4_2 21:x2apic 22:movbe 23:popcnt "
        "24:tsc_deadline 25:aes 26:xsave 27:osxsave 28:avx 29:f16c 30:rdrand 31:hypervisor",
    ),
    **_bits(6, 0, EAX, "2:arat"),
    **_bits(
        7, 0, EBX,
        "0:fsgsbase 1:tsc_adjust 2:sgx 3:bmi1 4:hle 5:avx2 6:fdp_excptn_only 7:smep 8:bmi2 9:erms "
        "10:invpcid 11:rtm 12:pqm 13:zero_fcs_fds 14:mpx 15:pqe 16:avx512f 17:avx512dq 18:rdseed 19:adx "
        "20:smap 21:avx512ifma 23:clflushopt 24:clwb 25:intel_pt 26:avx512pf 27:avx512er 28:avx512cd "
        "29:sha 30:avx512bw 31:avx512vl",
    ),
    **_bits(
        7, 0, ECX,
        "0:prefetchwt1 1:avx512vbmi 2:umip 3:pku 4:ospke 5:waitpkg 6:avx512vbmi2 7:cet_ss 8:gfni 9:vaes "
        "10:vpclmulqdq 11:avx512vnni 12:avx512bitalg 14:avx512vpopcntdq 16:la57 22:rdpid "
        "24:bus_lock_detect 25:cldemote 27:movdiri 28:movdir64b 29:enqcmd 30:sgx_lc 31:pks",
    ),
    **_bits(
        7, 0, EDX,
        "4:fsrm 10:md_clear 14:serialize 16:tsxldtrk 20:cet_ibt 22:amx_bf16 23:avx512fp16 24:amx_tile "
        "25:amx_int8 26:spec_ctrl 27:stibp 28:flush_l1d 29:arch_capabilities 30:core_capabilities "
        "31:ssbd",
    ),
    **_bits(
        7, 1, EAX,
        "0:sha512 1:sm3 2:sm4 4:avx_vnni 5:avx512_bf16 7:cmpccxadd 10:fzrm 11:fsrs 12:fsrcs 17:fred 18:lkgs "
        "19:wrmsrns 21:amx_fp16 22:hreset 23:avx_ifma",
    ),
    **_bits(7, 1, EDX, "4:avx_vnni_int8 5:avx_ne_convert 8:amx_complex 10:avx_vnni_int16 14:prefetchi"),
    **_bits(7, 2, EDX, "0:psfd 1:ipred_ctrl 2:rrsba_ctrl 3:ddpd 4:bhi_ctrl"),
    **_bits(0xD, 1, EAX, "0:xsaveopt 1:xsavec 2:xgetbv1 3:xsaves 4:xfd"),
    **_bits(0x80000001, 0, ECX, "0:lahf 2:svm 5:abm 8:3dnowprefetch"),
    **_bits(0x80000001, 0, EDX, "11:syscall 20:nx 26:pdpe1gb 27:rdtscp 29:lm"),
    **_bits(0x80000007, 0, EDX, "8:invariant_tsc"),
    **_bits(0x80000008, 0, EBX, "9:wbnoinvd"),
}  # fmt: skip
"""Name (as Linux and QEMU spell it, mostly) -> place."""


VENDORS: Final = ("GenuineIntel", "AuthenticAMD")


class CpuChoice(NamedTuple):
    """How a guest's processor differs from the usual one: names of `FEATURES`, and one of `VENDORS`."""

    added: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    vendor: str = VENDORS[0]


USUAL_CPU: Final = CpuChoice()


def parse_choice(text: str) -> CpuChoice:
    """What "+umip,-x2apic,vendor=AuthenticAMD" says; ValueError for a word that is none of these.

    A hyphen within a name stands for an underscore, as QEMU spells it.
    """
    added: set[str] = set()
    removed: set[str] = set()
    vendor = VENDORS[0]
    for word in filter(None, (part.strip() for part in text.split(","))):
        name = word[1:].replace("-", "_")
        if word.startswith("vendor=") and word[7:] in VENDORS:
            vendor = word[7:]
        elif word[0] not in "+-" or name not in FEATURES:
            raise ValueError(f"{word!r} is not + or - and a CPU feature, nor a vendor")
        else:
            (added if word[0] == "+" else removed).add(name)
    return CpuChoice(frozenset(added), frozenset(removed), vendor)


# The System V call is f(leaf: edi, subleaf: esi, result: rdx).
_CPUID_CODE = bytes.fromhex(
    "53"  # push rbx
    "4989d0"  # mov r8, rdx
    "89f8"  # mov eax, edi
    "89f1"  # mov ecx, esi
    "0fa2"  # cpuid
    "418900"  # mov [r8], eax
    "41895804"  # mov [r8+4], ebx
    "41894808"  # mov [r8+8], ecx
    "4189500c"  # mov [r8+12], edx
    "5b"  # pop rbx
    "c3"  # ret
)
# f() -> XCR0
_XGETBV_CODE = bytes.fromhex(
    "31c9"  # xor ecx, ecx
    "0f01d0"  # xgetbv
    "48c1e220"  # shl rdx, 32
    "4809d0"  # or rax, rdx
    "c3"  # ret
)
_XGETBV_OFFSET = 64


class _HostCode:
    """The two routines in a page of their own, writable first and executable after."""

    def __init__(self) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise RuntimeError(f"needs an x86-64 processor, this one is {platform.machine()}")
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._page[: len(_CPUID_CODE)] = _CPUID_CODE
        self._page[_XGETBV_OFFSET : _XGETBV_OFFSET + len(_XGETBV_CODE)] = _XGETBV_CODE
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "the host forbids code made at run time")
        self.cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(address)
        self.xgetbv = ctypes.CFUNCTYPE(ctypes.c_uint64)(address + _XGETBV_OFFSET)


@cache
def _host_code() -> _HostCode:
    return _HostCode()


def host_cpuid(leaf: int, subleaf: int = 0) -> Registers:
    """Run CPUID on the host.  RuntimeError when it is no x86-64, OSError when it forbids run-time code."""
    result = (ctypes.c_uint32 * 4)()
    _host_code().cpuid(leaf, subleaf, ctypes.addressof(result))
    return (result[0], result[1], result[2], result[3])


def host_xgetbv() -> int:
    """The host's XCR0; 0 when its operating system has not enabled XSAVE (CPUID.1:ECX.OSXSAVE)."""
    if not host_cpuid(1)[ECX] >> FEATURES["osxsave"].bit & 1:
        return 0
    return int(_host_code().xgetbv())


def xsave_area(xcr0: int, query: Query = host_cpuid) -> int:
    """Bytes of the XSAVE area in standard format for the components of `xcr0`, as the processor lays it out."""
    size = 576  # legacy region and header (SDM 1, 13.4)
    for component in range(2, 63):
        if xcr0 >> component & 1:
            length, offset, _, _ = query(0xD, component)
            size = max(size, offset + length)
    return size


def features(query: Query) -> frozenset[str]:
    """The names in `FEATURES` that `query` reports; leaves beyond its maximum count as zero."""
    limits = {0: query(0, 0)[EAX], 0x80000000: query(0x80000000, 0)[EAX]}
    if limits[0] >= 7:
        limits[7] = query(7, 0)[EAX]
    answers: dict[tuple[int, int], Registers] = {}
    for place in FEATURES.values():
        key = (place.leaf, place.subleaf)
        if key in answers:
            continue
        known = place.leaf <= limits[place.leaf & 0x80000000]
        if place.leaf == 7 and place.subleaf:
            known = known and place.subleaf <= limits[7]
        answers[key] = query(*key) if known else (0, 0, 0, 0)
    return frozenset(
        name
        for name, place in FEATURES.items()
        if answers[place.leaf, place.subleaf][place.register] >> place.bit & 1
    )
