"""From the features in CPUID to the instruction sets of the decoder: what is not told of raises #UD."""

from __future__ import annotations

from collections.abc import Collection

from iced_x86 import CpuidFeature

_ALWAYS = (
    "INTEL8086 INTEL8086_ONLY INTEL186 INTEL286 INTEL286_ONLY INTEL386 INTEL386_ONLY INTEL386_A0_ONLY INTEL486 "
    "INTEL486_A_ONLY X64 CPUID FPU FPU287 FPU287XL_ONLY FPU387 FPU387SL_ONLY RSM MULTIBYTENOP PAUSE RDPMC UD0 "
    "CYRIX_FPU UDBG"
).split()

_BY_FEATURE = {
    "tsc": "TSC", "msr": "MSR", "cx8": "CX8", "sep": "SEP", "cmov": "CMOV", "clflush": "CLFSH", "mmx": "MMX",
    "fxsr": "FXSR", "sse": "SSE", "sse2": "SSE2", "sse3": "SSE3", "pclmul": "PCLMULQDQ", "ssse3": "SSSE3",
    "fma": "FMA", "cx16": "CMPXCHG16B", "sse4_1": "SSE4_1", "sse4_2": "SSE4_2", "movbe": "MOVBE",
    "popcnt": "POPCNT", "aes": "AES", "xsave": "XSAVE", "avx": "AVX", "f16c": "F16C", "rdrand": "RDRAND",
    "fsgsbase": "FSGSBASE", "bmi1": "BMI1", "avx2": "AVX2", "smep": "SMAP", "bmi2": "BMI2",
    "invpcid": "INVPCID", "rdseed": "RDSEED", "adx": "ADX", "clflushopt": "CLFLUSHOPT", "clwb": "CLWB",
    "sha": "SHA", "xsaveopt": "XSAVEOPT", "xsavec": "XSAVEC", "syscall": "SYSCALL", "rdtscp": "RDTSCP",
    "lm": "X64", "abm": "LZCNT", "3dnowprefetch": "PREFETCHW", "smap": "SMAP", "umip": "UMIP", "pku": "PKU",
    "gfni": "GFNI", "vaes": "VAES", "vpclmulqdq": "VPCLMULQDQ", "movdiri": "MOVDIRI", "rdpid": "RDPID",
    "serialize": "SERIALIZE", "wbnoinvd": "WBNOINVD", "avx_vnni": "AVX_VNNI", "avx_ifma": "AVX_IFMA",
    "avx_vnni_int8": "AVX_VNNI_INT8", "avx_vnni_int16": "AVX_VNNI_INT16", "avx_ne_convert": "AVX_NE_CONVERT",
    "sha512": "SHA512", "sm3": "SM3", "sm4": "SM4",
}  # fmt: skip


def decoder_features(features: Collection[str]) -> frozenset[int]:
    """The decoder's feature numbers that a processor with these `x86.cpuid.FEATURES` has."""
    names = set(_ALWAYS)
    names.update(name for feature, name in _BY_FEATURE.items() if feature in features and feature != "smep")
    return frozenset(number for name in names if isinstance(number := getattr(CpuidFeature, name, None), int))
