"""What this host has for each technique, found out by trying it, and how to mend what is missing."""

from __future__ import annotations

import getpass
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trivisor.guests import apt, test_kernel
from trivisor.guests.debian import cached_guest
from trivisor.hardware.kvm.probe import Probe, probe
from trivisor.hardware.kvm.system import DEVICE, KvmUnavailable, System, Trouble
from trivisor.machine.cpuid import COPIED
from trivisor.monitor.techniques import TECHNIQUES, Technique, TechniqueUnavailable
from trivisor.x86.cpuid import Query, Registers, features, host_cpuid

if TYPE_CHECKING:
    from trivisor.monitor.virtual_machine import VirtualMachine

_TRIAL_SECONDS: Final = 30.0
_HYPERVISORS: Final = {
    "KVMKVMKVM": "KVM", "TCGTCGTCGTCG": "QEMU's TCG", "XenVMMXenVMM": "Xen", "Microsoft Hv": "Hyper-V",
    "VMwareVMware": "VMware", "TRIVISORVMM": "trivisor",
}  # fmt: skip
"""Who answers CPUID leaf 0x40000000."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `mend` is the line to type when it is not as it should be."""

    what: str
    found: str
    mend: str = ""


@dataclass(slots=True)
class Examination:
    """All that was found for a technique; it works when there is no `trouble`."""

    technique: Technique
    findings: list[Finding] = field(default_factory=list)
    trouble: str = ""

    @property
    def works(self) -> bool:
        return not self.trouble

    def add(self, what: str, found: str, mend: str = "") -> None:
        """One more finding."""
        self.findings.append(Finding(what, found, mend))


@dataclass(frozen=True, slots=True)
class Trial:
    """How a small guest fared."""

    seconds: float
    features: frozenset[str]
    """Of the processor that it saw."""


def run_small_guest(technique: str) -> Trial:
    """Boot the project's own small kernel; raises `TechniqueUnavailable` with what came of it instead."""
    from trivisor.monitor.virtual_machine import VirtualMachine

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trivisor-doctor-") as directory:
        kernel = Path(directory, "kernel.elf")
        kernel.write_bytes(test_kernel.build())
        try:
            with VirtualMachine(
                kernel, technique=technique, memory="16M", no_reboot=True, keep_translations=False
            ) as machine:
                return _trial(machine, started)
        except (OSError, ValueError, RuntimeError) as error:
            raise TechniqueUnavailable(f"a small guest does not start: {error}") from error


def _trial(machine: VirtualMachine, started: float) -> Trial:
    outcome = machine.run(_TRIAL_SECONDS)
    if outcome.status != test_kernel.STATUS:
        raise TechniqueUnavailable(f"a small guest does not run: {outcome.message}")
    return Trial(time.monotonic() - started, machine.features)


@dataclass(frozen=True, slots=True)
class Host:
    """Where the examination looks."""

    kvm: str = DEVICE
    cpuid: Query = host_cpuid
    huge_pages: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    machine: str = platform.machine()
    no_code: Callable[[], str] = TECHNIQUES["translation"].look
    """Why machine code cannot be made at run time, if it cannot."""
    trial: Callable[[str], Trial] = run_small_guest


THIS_HOST: Final = Host()


def examine(host: Host = THIS_HOST) -> list[Examination]:
    """Look at the host and try each technique; takes a few seconds."""
    translation = _translation(host)
    return [translation, _hardware(host), _paravirt(translation)]


def _translation(host: Host) -> Examination:
    it = Examination(TECHNIQUES["translation"])
    it.trouble = host.no_code()
    if it.trouble:
        return it
    it.add("processor", _processor(host.cpuid))
    it.add("code made at run time", "allowed")
    _huge_pages(it, host.huge_pages)
    _try(it, host)
    if cached_guest() is not None:
        it.add("default guest", "in the cache")
    elif apt.available():
        it.add("default guest", "will be fetched through apt")
    else:
        it.add("default guest", "no apt to fetch it with; name a kernel", "trivisor run IMAGE --initrd FILE")
    return it


def _hardware(host: Host) -> Examination:
    it = Examination(TECHNIQUES["hardware"])
    try:
        with System(host.kvm):
            it.add(host.kvm, "present, and ours to use")
        found = probe(host.kvm)
    except KvmUnavailable as reason:
        it.trouble = str(reason)
        it.add(host.kvm, str(reason), _mend(reason.trouble, host))
        return it
    it.add("API", f"version {found.version}")
    missing = [name for name, value in found.capabilities.items() if not value]
    have = f"{len(found.capabilities) - len(missing)} of {len(found.capabilities)} that we can use"
    it.add("capabilities", f"{have}; without {', '.join(missing)}" if missing else have)
    it.add("virtualization", _kind(found, host.cpuid))
    it.add("nested", _nested(host.cpuid))
    it.add("an exit to Python", f"{found.nanoseconds_an_exit / 1000:.1f} us there and back")
    _try(it, host)
    return it


def _paravirt(translation: Examination) -> Examination:
    it = Examination(TECHNIQUES["paravirt"], trouble=translation.trouble)
    if it.works:
        it.add("engine", "translation runs the guest's ring 3")
        it.add("guests", "Linux kernels with a Xen PV entry (CONFIG_XEN_PV), as Debian's are")
    return it


def _try(it: Examination, host: Host) -> None:
    """Run the small guest and say what it saw."""
    try:
        trial = host.trial(it.technique.name)
    except TechniqueUnavailable as reason:
        it.trouble = str(reason)
        it.add("a small guest", str(reason))
        return
    it.add("a small guest", f"ran in {trial.seconds:.1f} s")
    it.add("instruction sets for guests", " ".join(sorted(trial.features & COPIED)))
    if missing := COPIED & features(host.cpuid) - trial.features:
        it.add("kept from guests", " ".join(sorted(missing)))


def _processor(cpuid: Query) -> str:
    """Its own name, and what it runs under."""
    return f"{_brand(cpuid)}, {_nested(cpuid)}"


def _brand(cpuid: Query) -> str:
    if cpuid(0x80000000, 0)[0] < 0x80000004:
        return "without a name"
    words = b"".join(_text(cpuid(leaf, 0), (0, 1, 2, 3)) for leaf in range(0x80000002, 0x80000005))
    return " ".join(words.decode("ascii", "replace").replace("\0", " ").split())


def _nested(cpuid: Query) -> str:
    """Whether we are in a virtual machine ourselves."""
    if "hypervisor" not in features(cpuid):
        return "not in a virtual machine"
    signature = _text(cpuid(0x40000000, 0), (1, 2, 3)).decode("ascii", "replace").rstrip("\0 ")
    return f"in a virtual machine of {_HYPERVISORS.get(signature, repr(signature))}"


def _text(registers: Registers, order: tuple[int, ...]) -> bytes:
    return b"".join(registers[at].to_bytes(4, "little") for at in order)


def _kind(found: Probe, cpuid: Query) -> str:
    speed = f"{found.nanoseconds_an_instruction:.3g} ns an instruction in ring 0"
    if found.emulates_ring_0:
        return f"none of the processor's: the host's kernel emulates ring 0 (kvm-pvm), {speed}"
    known = features(cpuid)
    return f"{'VT-x' if 'vmx' in known else 'AMD-V' if 'svm' in known else 'unknown'}, {speed}"


def _huge_pages(it: Examination, file: Path) -> None:
    """Guests' RAM asks for them; the kernel may forbid it."""
    try:
        choices = file.read_text()
    except OSError:
        it.add("huge pages", "not in this kernel")
        return
    chosen = choices.partition("[")[2].partition("]")[0]
    if chosen == "never":
        it.add("huge pages", "switched off", f"echo madvise | sudo tee {file}")
    else:
        it.add("huge pages", "for guests' RAM" if chosen in ("always", "madvise") else "unknown")


def _mend(trouble: Trouble, host: Host) -> str:
    """The line to type, if there is one."""
    known = features(host.cpuid) if host.machine in ("x86_64", "AMD64") else frozenset()
    match trouble:
        case Trouble.ABSENT if "vmx" in known:
            return "sudo modprobe kvm_intel"
        case Trouble.ABSENT if "svm" in known:
            return "sudo modprobe kvm_amd"
        case Trouble.ABSENT if "hypervisor" in known:
            return "(nested virtualization is for the host of this virtual machine to switch on)"
        case Trouble.ABSENT:
            return "(VT-x or AMD-V is for the firmware's settings to switch on)"
        case Trouble.FORBIDDEN:
            return _permit(host.kvm)
        case _:
            return ""


def _permit(device: str) -> str:
    """The line that lets this user open the device: its group's, if that is not root's own."""
    import grp

    user = getpass.getuser()
    try:
        group = os.stat(device).st_gid
        if group:
            return f"sudo usermod -aG {grp.getgrgid(group).gr_name} {user}   # and log in again"
    except (OSError, KeyError):
        pass
    return f"sudo setfacl -m u:{user}:rw {device}"

