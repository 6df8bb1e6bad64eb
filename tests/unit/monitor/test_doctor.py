"""`doctor` on hosts that are made up: what it finds, and the line that it gives to mend it."""

from __future__ import annotations

import errno
import getpass
import os
from pathlib import Path
from typing import Any

import pytest

from trivisor.hardware.kvm import abi, probe, system
from trivisor.hardware.kvm.handle import Handle
from trivisor.hardware.kvm.probe import Probe
from trivisor.hardware.kvm.system import KvmUnavailable, Trouble
from trivisor.monitor import doctor
from trivisor.monitor.doctor import Examination, Host, Trial, examine, run_small_guest
from trivisor.monitor.techniques import TechniqueUnavailable
from trivisor.x86.cpuid import FEATURES, Query

NAMES = frozenset({"sse3", "aes"})


def cpuid_of(*names: str, brand: str = "Some Processor", under: bytes = b"") -> Query:
    """CPUID of a processor with the features `names`, which is in the virtual machine of `under`."""

    def query(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        words = [0, 0, 0, 0]
        if leaf in (0, 0x80000000):
            words[0] = leaf + 0x20
        elif 0x80000002 <= leaf <= 0x80000004:
            text = brand.encode().ljust(48, b"\0")[16 * (leaf - 0x80000002) :]
            words = [int.from_bytes(text[4 * n : 4 * n + 4], "little") for n in range(4)]
        elif leaf == 0x40000000:
            words[1:] = [int.from_bytes(under.ljust(12, b"\0")[4 * n : 4 * n + 4], "little") for n in range(3)]
        for name in [*names, *(["hypervisor"] if under else [])]:
            place = FEATURES[name]
            if (place.leaf, place.subleaf) == (leaf, subleaf):
                words[place.register] |= 1 << place.bit
        return words[0], words[1], words[2], words[3]

    return query


def host(tmp_path: Path, **changes: Any) -> Host:
    """A host without /dev/kvm where translation works, but for the changes."""
    usual: dict[str, Any] = {
        "kvm": str(tmp_path / "kvm"), "cpuid": cpuid_of("aes"), "huge_pages": tmp_path / "enabled",
        "machine": "x86_64", "no_code": lambda: "", "trial": lambda technique: Trial(0.5, NAMES),
    }  # fmt: skip
    return Host(**usual | changes)


def found(examination: Examination) -> dict[str, str]:
    return {finding.what: finding.found for finding in examination.findings}


def mend(examination: Examination) -> list[str]:
    return [finding.mend for finding in examination.findings if finding.mend]


@pytest.mark.parametrize(
    "cpuid, line",
    [
        (cpuid_of("vmx"), "sudo modprobe kvm_intel"),
        (cpuid_of("svm"), "sudo modprobe kvm_amd"),
        (cpuid_of(under=b"KVMKVMKVM"), "(nested virtualization is for the host of this virtual machine to switch on)"),
        (cpuid_of(), "(VT-x or AMD-V is for the firmware's settings to switch on)"),
    ],
)
def test_no_device(tmp_path: Path, cpuid: Query, line: str) -> None:
    translation, hardware, paravirt = examine(host(tmp_path, cpuid=cpuid))
    assert translation.works and paravirt.works and not hardware.works
    assert hardware.trouble == f"there is no {tmp_path / 'kvm'}"
    assert mend(hardware) == [line]


@pytest.mark.parametrize("number", [errno.ENXIO, errno.ENODEV])
def test_a_device_without_a_driver_is_none(tmp_path: Path, monkeypatch, number: int) -> None:
    monkeypatch.setattr(system.os, "open", _fails(number))
    hardware = examine(host(tmp_path, cpuid=cpuid_of("vmx")))[1]
    assert not hardware.works and mend(hardware) == ["sudo modprobe kvm_intel"]


def test_no_permission(tmp_path: Path, monkeypatch) -> None:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(system.os, "open", _fails(errno.EACCES))
    group = os.stat(device).st_gid
    hardware = examine(host(tmp_path))[1]
    assert hardware.trouble == f"no permission to open {device}"
    user = getpass.getuser()
    if not group:
        assert mend(hardware) == [f"sudo setfacl -m u:{user}:rw {device}"]
    monkeypatch.setattr(doctor.os, "stat", lambda path: os.stat_result([0] * 5 + [1] + [0] * 4))
    (line,) = mend(examine(host(tmp_path))[1])
    assert line.startswith("sudo usermod -aG ") and user in line


def _fails(number: int):
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_an_old_api(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(Handle, "control", lambda self, request, argument=0: 11)
    hardware = examine(host(tmp_path))[1]
    assert hardware.trouble == "KVM has API version 11, not 12"


def test_a_file_that_is_no_kvm(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_text("no device")
    hardware = examine(host(tmp_path))[1]
    assert hardware.trouble == f"{tmp_path / 'kvm'} is no KVM device"


def test_a_kvm_that_lacks_what_we_need(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "kvm").touch()

    def control(self: Handle, request: int, argument: object = 0) -> int:
        if request == abi.GET_API_VERSION:
            return abi.API_VERSION
        assert request == abi.CHECK_EXTENSION
        return int(argument not in (abi.CAPABILITIES["X86_MSR_FILTER"], abi.CAPABILITIES["PIT2"]))

    monkeypatch.setattr(Handle, "control", control)
    hardware = examine(host(tmp_path))[1]
    assert hardware.trouble == "KVM lacks X86_MSR_FILTER: Linux 5.10 or later has them"


@pytest.mark.parametrize("trouble", Trouble)
def test_every_trouble_is_told(tmp_path: Path, monkeypatch, trouble: Trouble) -> None:
    _pretend(tmp_path, monkeypatch, KvmUnavailable("so it is", trouble))
    hardware = examine(host(tmp_path))[1]
    assert hardware.trouble == "so it is"


def _pretend(tmp_path: Path, monkeypatch, outcome: Probe | KvmUnavailable) -> None:
    """Have the probe of KVM come to this."""
    (tmp_path / "kvm").touch()

    def pretended(path: str) -> Probe:
        if isinstance(outcome, KvmUnavailable):
            raise outcome
        return outcome

    monkeypatch.setattr(doctor, "probe", pretended)
    monkeypatch.setattr(Handle, "control", lambda self, request, argument=0: abi.API_VERSION)


@pytest.mark.parametrize(
    "cpuid, nanoseconds, kind",
    [
        (cpuid_of("vmx"), 0.4, "VT-x, 0.4 ns an instruction in ring 0"),
        (cpuid_of("svm"), 0.4, "AMD-V, 0.4 ns an instruction in ring 0"),
        (cpuid_of(), 1000.0, "none of the processor's: the host's kernel emulates ring 0 (kvm-pvm), 1e+03 ns an instruction in ring 0"),
    ],
)
def test_a_kvm_that_works(tmp_path: Path, monkeypatch, cpuid: Query, nanoseconds: float, kind: str) -> None:
    capabilities = dict.fromkeys(abi.CAPABILITIES, 1) | {"PIT2": 0}
    _pretend(tmp_path, monkeypatch, Probe(12, capabilities, nanoseconds, 2500.0))
    hardware = examine(host(tmp_path, cpuid=cpuid))[1]
    assert hardware.works
    saw = found(hardware)
    assert saw["virtualization"] == kind
    assert saw["capabilities"] == f"{len(capabilities) - 1} of {len(capabilities)} that we can use; without PIT2"
    assert saw["an exit to Python"] == "2.5 us there and back"
    assert saw["a small guest"] == "ran in 0.5 s" and saw["instruction sets for guests"] == "aes sse3"


@pytest.mark.parametrize(
    "cpuid, text",
    [(cpuid_of(), "not in a virtual machine"), (cpuid_of(under=b"KVMKVMKVM"), "in a virtual machine of KVM"),
     (cpuid_of(under=b"Who Knows"), "in a virtual machine of 'Who Knows'")],
)  # fmt: skip
def test_the_processor_by_its_name(tmp_path: Path, cpuid: Query, text: str) -> None:
    assert found(examine(host(tmp_path, cpuid=cpuid))[0])["processor"] == f"Some Processor, {text}"


@pytest.mark.parametrize(
    "content, text, line",
    [("always [madvise] never", "for guests' RAM", False), ("always madvise [never]", "switched off", True),
     (None, "not in this kernel", False), ("", "unknown", False)],
)  # fmt: skip
def test_huge_pages(tmp_path: Path, content: str | None, text: str, line: bool) -> None:
    if content is not None:
        (tmp_path / "enabled").write_text(content)
    translation = examine(host(tmp_path))[0]
    assert found(translation)["huge pages"] == text
    assert mend(translation) == ([f"echo madvise | sudo tee {tmp_path / 'enabled'}"] if line else [])


def test_a_host_that_forbids_code_at_run_time(tmp_path: Path) -> None:
    translation, _, paravirt = examine(host(tmp_path, no_code=lambda: "the host forbids it"))
    assert translation.trouble == paravirt.trouble == "the host forbids it"


def test_a_small_guest_that_does_not_run(tmp_path: Path) -> None:
    def fails(technique: str) -> Trial:
        raise TechniqueUnavailable("it hangs")

    translation, _, paravirt = examine(host(tmp_path, trial=fails))
    assert translation.trouble == paravirt.trouble == "it hangs"


def test_the_small_guest_runs_here() -> None:
    trial = run_small_guest("translation")
    assert trial.seconds < 30 and "sse2" in trial.features


def test_a_guest_that_cannot_start_is_told(monkeypatch) -> None:
    monkeypatch.setattr("trivisor.guests.test_kernel.build", lambda: b"no kernel")
    with pytest.raises(TechniqueUnavailable, match="a small guest does not start"):
        run_small_guest("translation")


def test_the_kvm_that_is_here() -> None:
    try:
        here = probe.probe()
    except KvmUnavailable as reason:
        pytest.skip(str(reason))
    assert here.version == 12 and here.capabilities["USER_MEMORY"]
    assert 0 <= here.nanoseconds_an_instruction < 100_000 and here.nanoseconds_an_exit > 100


def test_a_probe_of_a_kvm_that_fails(monkeypatch) -> None:
    try:
        system.System().close()
    except KvmUnavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(probe, "_CODE", "hlt\n")
    with pytest.raises(KvmUnavailable, match="ends with hlt"):
        probe.probe()
    monkeypatch.setattr(probe, "_CODE", "mov al, 7\n out 0x10, al\n hlt")
    with pytest.raises(KvmUnavailable, match="wrongly"):
        probe.probe()
