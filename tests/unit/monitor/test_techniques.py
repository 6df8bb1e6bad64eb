"""Choosing a technique: by name, and the fastest that works for a guest on hosts that are made up."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from trivisor.hardware.kvm import guest_cpuid, probe, system
from trivisor.hardware.kvm.probe import Probe
from trivisor.hardware.kvm.system import KvmUnavailable
from trivisor.monitor.techniques import TECHNIQUES, Needs, Technique, TechniqueUnavailable, choose
from trivisor.x86.cpuid import CpuChoice


@pytest.fixture
def with_vtx(monkeypatch) -> None:
    """A host whose KVM has a processor's own virtualization under it, and knows all features but UMIP."""
    host(monkeypatch)
    monkeypatch.setattr(system, "System", lambda: nullcontext(object()))
    monkeypatch.setattr(guest_cpuid, "ring_0_is_emulated", lambda found: False)
    monkeypatch.setattr(guest_cpuid, "features_missing", lambda found, choice: choice.added & {"umip"})
    monkeypatch.setattr(probe, "probe", lambda: Probe(12, {}, 0.5, 2000.0))


def host(monkeypatch, translation: str = "", hardware: str = "") -> None:
    """Have these stand against the techniques."""
    for name, missing in (("translation", translation), ("hardware", hardware)):
        monkeypatch.setitem(TECHNIQUES, name, Technique(name, "", lambda missing=missing: missing))


def auto(needs: Needs | None = None) -> tuple[str, str]:
    choice = choose("auto", needs)
    return choice.technique.name, choice.why


def test_by_name(monkeypatch) -> None:
    host(monkeypatch, hardware="there is no /dev/kvm")
    assert (choose("translation").technique.name, choose("translation").why) == ("translation", "")
    with pytest.raises(TechniqueUnavailable, match="technique hardware: there is no /dev/kvm"):
        choose("hardware")
    with pytest.raises(ValueError, match="none of auto, translation"):
        choose("magic")


def test_hardware_where_the_processor_does_it(with_vtx) -> None:
    assert auto() == ("hardware", "the host's processor virtualizes")


def test_translation_without_kvm(monkeypatch) -> None:
    host(monkeypatch, hardware="there is no /dev/kvm")
    assert auto() == ("translation", "there is no /dev/kvm")


def test_translation_where_kvm_emulates(with_vtx, monkeypatch) -> None:
    monkeypatch.setattr(guest_cpuid, "ring_0_is_emulated", lambda found: True)
    assert auto() == ("translation", "the host's KVM emulates ring 0, which is slower")


def test_translation_where_kvm_is_slow_by_behaviour(with_vtx, monkeypatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda: Probe(12, {}, 900.0, 9000.0))
    assert auto() == ("translation", "the host's KVM takes long for an instruction")


def test_translation_where_kvm_fails(with_vtx, monkeypatch) -> None:
    def fails() -> Probe:
        raise KvmUnavailable("it runs nothing")

    monkeypatch.setattr(probe, "probe", fails)
    assert auto() == ("translation", "it runs nothing")


def test_translation_for_what_only_it_has(with_vtx) -> None:
    assert auto(Needs(perf_map=True)) == ("translation", "a perf map is of translations")
    umip, aes = (Needs(CpuChoice(added=frozenset({name}))) for name in ("umip", "aes"))
    assert auto(umip) == ("translation", "the host's KVM cannot give a guest umip")
    assert auto(aes)[0] == "hardware"


def test_hardware_where_no_code_can_be_made(with_vtx, monkeypatch) -> None:
    host(monkeypatch, translation="the host forbids it")
    assert auto() == ("hardware", "the host forbids it")


def test_nothing_works(monkeypatch) -> None:
    host(monkeypatch, translation="forbidden", hardware="no device")
    with pytest.raises(TechniqueUnavailable, match="no technique works here: forbidden; no device"):
        choose("auto")
