"""The three techniques, which of them this host has, and the fastest of those for a guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from trivisor.x86.cpuid import USUAL_CPU, CpuChoice, host_cpuid

PARAVIRT: Final = "paravirt"


class TechniqueUnavailable(Exception):
    """The technique asked for is not in this version, or not on this host."""


class Technique(NamedTuple):
    """One way to virtualise; `look` says why this host cannot do it, and nothing when it can."""

    name: str
    what: str
    look: Callable[[], str]


class Needs(NamedTuple):
    """What a machine asks of its technique, beside running the guest."""

    cpu: CpuChoice = USUAL_CPU
    perf_map: bool = False
    xen_device: str = ""
    """An option for a device that only Xen guests can have."""


class Choice(NamedTuple):
    """The technique to use, and why that one; the reason is empty when it was asked for by its name."""

    technique: Technique
    why: str = ""


def _no_run_time_code() -> str:
    """Translations are machine code that is made while the guest runs."""
    try:
        host_cpuid(0)  # a few bytes of such code
    except RuntimeError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _no_kvm() -> str:
    from trivisor.hardware.kvm.system import KvmUnavailable, System

    try:
        with System() as system:
            system.require()
    except KvmUnavailable as reason:
        return str(reason)
    return ""


TECHNIQUES = {
    technique.name: technique
    for technique in (
        Technique("translation", "full virtualization by binary translation", _no_run_time_code),
        Technique("hardware", "hardware-assisted virtualization", _no_kvm),
        Technique("paravirt", "paravirtualization (Xen PV guests)", _no_run_time_code),
    )
}


def choose(name: str, needs: Needs | None = None) -> Choice:
    """The technique to use for `name`, which may be "auto".

    ValueError for a name that is none; `TechniqueUnavailable` for one that
    cannot be had here.
    """
    if name == "auto":
        return _fastest(needs or Needs())
    technique = TECHNIQUES.get(name)
    if technique is None:
        raise ValueError(f"technique {name!r} is none of auto, {', '.join(TECHNIQUES)}")
    if needs is not None and needs.xen_device and name != "paravirt":
        raise TechniqueUnavailable(f"{needs.xen_device} needs --technique paravirt: {name} has no such device yet")
    if missing := technique.look():
        raise TechniqueUnavailable(f"technique {name}: {missing}")
    return Choice(technique)


def _fastest(needs: Needs) -> Choice:
    """Hardware where the processor itself does it, else translation, which any guest runs under.

    Paravirtualization needs a guest that was changed for it, and is slower here than translation is; it alone
    has some devices.
    """
    if needs.xen_device:
        return choose(PARAVIRT, needs)._replace(why=f"{needs.xen_device} is for Xen guests")
    translation, hardware = TECHNIQUES["translation"], TECHNIQUES["hardware"]
    no_kvm, no_translation = hardware.look(), translation.look()
    if no_kvm and no_translation:
        raise TechniqueUnavailable(f"no technique works here: {no_translation}; {no_kvm}")
    if no_translation:
        return Choice(hardware, no_translation)
    if slower := no_kvm or _against_kvm(needs):
        return Choice(translation, slower)
    return Choice(hardware, "the host's processor virtualizes")


def _against_kvm(needs: Needs) -> str:
    """Why translation serves better than the KVM that is there; empty if it does not."""
    from trivisor.hardware.kvm.guest_cpuid import features_missing, ring_0_is_emulated
    from trivisor.hardware.kvm.probe import probe
    from trivisor.hardware.kvm.system import KvmUnavailable, System

    if needs.perf_map:
        return "a perf map is of translations"
    try:
        with System() as system:
            if ring_0_is_emulated(system):
                return "the host's KVM emulates ring 0, which is slower"
            if missing := features_missing(system, needs.cpu):
                return f"the host's KVM cannot give a guest {', '.join(sorted(missing))}"
        if probe().emulates_ring_0:
            return "the host's KVM takes long for an instruction"
    except KvmUnavailable as reason:
        return str(reason)
    return ""
