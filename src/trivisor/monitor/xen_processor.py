"""The processor of a PV domain: by direct execution through /dev/kvm, or by translation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivisor.machine.deprivileged import DeprivilegedCpu
from trivisor.machine.vcpu import Vcpu
from trivisor.monitor.techniques import TechniqueUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from trivisor.machine.cpuid import GuestCpuid
    from trivisor.paravirt.xen.machine import XenMachine


def xen_processor(
    xen: XenMachine, engine: str, keep_in: Path | None = None, cpuid: GuestCpuid | None = None
) -> tuple[Vcpu, DeprivilegedCpu]:
    """The processor of a PV domain, and as its hypervisor sees it; `engine` is one of `plan.ENGINES`.

    Translations may be kept in the directory `keep_in`.  The guest sees the processor `cpuid`, without one the best
    there is.  Raises `TechniqueUnavailable` for direct execution where there is none, and for translation where it
    lacks what the guest has.
    """
    why = "as asked for"
    only_direct = cpuid is not None and _is_beyond_translation(cpuid)
    if engine != "translation":
        from trivisor.hardware.kvm.system import KvmUnavailable

        try:
            why = _against_direct() if engine == "auto" and not only_direct else ""
            if not why:
                return _direct(xen, cpuid)
        except KvmUnavailable as error:
            if engine == "direct" or only_direct:
                raise TechniqueUnavailable(f"direct execution: {error}") from None
            why = f"because {error}"
    if only_direct:
        raise TechniqueUnavailable(
            "under direct execution the guest was told of AVX-512, which translation does not have: "
            "it can go on with --engine direct"
        )
    from trivisor.translation.cpu import TranslationVcpu
    from trivisor.translation.deprivileged import Deprivileged

    vcpu = TranslationVcpu(xen.platform, cpuid=cpuid, keep_in=keep_in, supervision=xen.domain.native)
    vcpu.technique, vcpu.engine = "paravirt", f"on the translation engine, {why}"
    return vcpu, Deprivileged(vcpu, xen.domain)


def _is_beyond_translation(cpuid: GuestCpuid) -> bool:
    from trivisor.machine.cpuid import AVX512

    return bool(cpuid.features & AVX512)


def _against_direct() -> str:
    """Why translation is the surer way than the KVM that is there; empty if it is not.  Raises `KvmUnavailable`."""
    from trivisor.hardware.kvm.guest_cpuid import ring_0_is_emulated
    from trivisor.hardware.kvm.system import System

    with System() as system:
        if ring_0_is_emulated(system):
            return "because this KVM emulates ring 0 and leaves ring 3 more than Xen; --engine direct computes faster"
    return ""


def _direct(xen: XenMachine, cpuid: GuestCpuid | None) -> tuple[Vcpu, DeprivilegedCpu]:
    from trivisor.hardware.kvm.direct.vcpu import DirectVcpu, Selectors
    from trivisor.paravirt.xen.abi import FLAT_RING3_CS64, FLAT_RING3_SS, HYPERVISOR_CS
    from trivisor.paravirt.xen.own_memory import ENGINE_SLOT

    vcpu = DirectVcpu(
        xen.platform, ENGINE_SLOT, Selectors(HYPERVISOR_CS, FLAT_RING3_CS64, FLAT_RING3_SS), cpuid
    )
    xen.give_slot(vcpu.stub.level4_entry)
    xen.domain.cpu = vcpu.deprivileged
    vcpu.supervise(xen.domain)
    return vcpu, vcpu.deprivileged
