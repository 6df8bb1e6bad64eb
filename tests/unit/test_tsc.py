"""The host's time-stamp counter."""

import time

from trivisor.machine import tsc
from trivisor.x86.cpuid import host_cpuid


def test_it_counts_up() -> None:
    readings = [tsc.read() for _ in range(100)]
    assert readings == sorted(readings)
    assert readings[0] < readings[-1]


def test_frequency_agrees_with_the_clock() -> None:
    frequency = tsc.frequency()
    start, began = tsc.read(), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    time.sleep(0.05)
    end, ended = tsc.read(), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    measured = (end - start) * 1e9 / (ended - began)
    assert abs(measured - frequency) / frequency < 0.005


def test_cpuid_names_a_vendor() -> None:
    _, ebx, ecx, edx = host_cpuid(0)
    vendor = b"".join(part.to_bytes(4, "little") for part in (ebx, edx, ecx))
    with open("/proc/cpuinfo") as file:
        assert vendor.decode() in file.read()
