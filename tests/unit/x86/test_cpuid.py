"""The feature table, and CPUID run on the host against what Linux says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivisor.x86 import cpuid
from trivisor.x86.cpuid import FEATURES, FeatureBit, host_cpuid, host_xgetbv


def test_places() -> None:
    assert FEATURES["avx"] == FeatureBit(1, 0, cpuid.ECX, 28)
    assert FEATURES["arch_capabilities"] == FeatureBit(7, 0, cpuid.EDX, 29)
    assert len(set(FEATURES.values())) == len(FEATURES)


def test_leaves_beyond_the_maximum_count_as_zero() -> None:
    """A processor that answers all ones everywhere but has only leaf 1."""

    def query(leaf: int, subleaf: int) -> cpuid.Registers:
        if leaf in (0, 0x80000000):
            return (leaf | 1, 0, 0, 0)
        return (0xFFFFFFFF,) * 4

    found = cpuid.features(query)
    assert {"fpu", "avx", "lm"} <= found
    assert not {"avx2", "invariant_tsc", "xsavec", "bhi_ctrl"} & found


def test_host() -> None:
    _, ebx, ecx, edx = host_cpuid(0)
    vendor = b"".join(register.to_bytes(4, "little") for register in (ebx, edx, ecx)).decode()
    text = Path("/proc/cpuinfo").read_text()
    assert f": {vendor}\n" in text
    flags = next(line for line in text.splitlines() if line.startswith("flags")).split()
    found = cpuid.features(host_cpuid)
    for name in ("sse4_2", "avx", "avx2", "bmi2", "movbe", "adx", "erms", "rdrand", "xsaveopt", "nx"):
        if name in flags:
            assert name in found
    assert bool(host_xgetbv() & 4) == ("avx" in flags)


def test_subleaves_differ() -> None:
    if host_cpuid(0)[0] < 4 or not host_cpuid(4, 0)[0]:
        pytest.skip("no leaf 4 here")
    assert host_cpuid(4, 0) != host_cpuid(4, 2)
