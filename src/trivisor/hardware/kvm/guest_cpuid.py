"""The processor that a guest under KVM sees: the one of all techniques, without what this KVM does not have."""

from __future__ import annotations

from typing import Final

from trivisor.hardware.kvm.system import KvmUnavailable, System
from trivisor.machine.cpuid import (
    AVX512,
    COPIED,
    EMULATED,
    UNPRIVILEGED,
    GuestCpuid,
    guest_cpuid,
    with_avx512,
)
from trivisor.machine.vcpu import Surroundings
from trivisor.x86.control import XCR0_AVX512
from trivisor.x86.cpuid import USUAL_CPU, CpuChoice, Query, features, host_cpuid, host_xgetbv

BOARDS_OWN: Final = frozenset({"hypervisor", "apic", "x2apic", "tsc_deadline", "arat", "mtrr", "mca", "mce"})
"""Features of our own devices and MSRs, which are there whatever KVM says."""
_EVERY_PROCESSOR_HAS: Final = frozenset({"sse3", "ssse3"})
_DEAR: Final = frozenset({"cx16"})
"""What a guest does often in ring 0 and an emulator of ring 0 lacks; guests do without rather than wait."""
_SHOWN_ANYWAY: Final = frozenset({"smap"})
"""What kvm-pvm's guests see though they are not told, beside what translation tells of by itself."""


def ring_0_is_emulated(system: System) -> bool:
    """Whether this KVM has no VT-x or AMD-V under it but emulates ring 0 (kvm-pvm).

    Such a one hides what its emulator lacks, which every processor with VT-x or AMD-V has.
    """
    return not features(system.supported_cpuid()) >= _EVERY_PROCESSOR_HAS


def features_missing(system: System, choice: CpuChoice) -> frozenset[str]:
    """The features that `choice` adds and this KVM cannot give a guest."""
    if ring_0_is_emulated(system):
        return frozenset()  # what it lacks, translation does
    return choice.added - features(system.supported_cpuid()) - BOARDS_OWN


def kvm_cpuid(system: System, board: Surroundings, choice: CpuChoice = USUAL_CPU) -> GuestCpuid:
    """The best processor that this KVM can give to a guest on `board`, changed by `choice`; raises ValueError.

    kvm-pvm runs ring 3 on the host's processor and lets guests see its
    features whatever it is told, so there a guest is told of them all, as under
    translation, which is then what does them in ring 0.
    """
    if lacking := features_missing(system, choice):
        raise ValueError(f"this host's KVM cannot give a guest {', '.join(sorted(lacking))}")
    emulated = ring_0_is_emulated(system)
    if emulated:
        host: Query = host_cpuid
        missing = _DEAR | UNPRIVILEGED - features(host)
    else:
        host = system.supported_cpuid()
        missing = (COPIED | EMULATED) - features(host) - BOARDS_OWN
    cpuid = guest_cpuid(
        host,
        tsc_frequency=board.tsc_frequency,
        crystal_frequency=board.crystal_frequency,
        apic_id=board.apic_id,
        extra=(choice.added | _SHOWN_ANYWAY if emulated else choice.added) - choice.removed,
        without=(missing - choice.added) | choice.removed,
        vendor=choice.vendor,
    )
    return cpuid._replace(hidden_xcr0=host_xgetbv() & XCR0_AVX512) if emulated else cpuid


def shown_cpuid(
    system: System, board: Surroundings, choice: CpuChoice = USUAL_CPU, told: frozenset[str] = AVX512
) -> GuestCpuid:
    """`kvm_cpuid` for a guest whose programs see what the host's KVM shows ring 3.

    Where that is AVX-512 the guest's kernel is told of its registers, which it has to keep for them, and of the
    features `told`; not if `choice` leaves some of it out.
    """
    cpuid = kvm_cpuid(system, board, choice)
    shown = cpuid.hidden_xcr0 & XCR0_AVX512 and not choice.removed & AVX512
    return with_avx512(cpuid, host_cpuid, told) if shown else cpuid


def check_avx512(told: GuestCpuid, here: GuestCpuid) -> None:
    """Raise `KvmUnavailable` for a guest that was `told` nothing of AVX-512 and would have to be `here`."""
    if (here.features - told.features) & AVX512:
        raise KvmUnavailable("the host's KVM shows programs AVX-512, of which the guest's kernel was not told")
