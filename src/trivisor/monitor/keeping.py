"""What is kept of an engine's work from one run to the next, and where: its helpers, pieces and translations."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trivisor.machine.user_cache import user_cache
from trivisor.machine.vcpu import Vcpu

if TYPE_CHECKING:
    from trivisor.machine.cpuid import GuestCpuid
    from trivisor.monitor.plan import BootPlan
    from trivisor.translation.keeper import Keeper
    from trivisor.x86.cpuid import CpuChoice


def kept_directory() -> Path | None:
    """Where it is kept; None for a user without a home."""
    try:
        return user_cache() / "translations"
    except RuntimeError:
        return None


def begin_keeping(keep: bool) -> Path | None:
    """`kept_directory`, if anything is to be kept; before the engine's modules are imported, which assemble some."""
    directory = kept_directory() if keep else None
    if directory is not None:
        from trivisor.translation.assembled import PIECES

        PIECES.take_kept(directory)
    return directory


def guest_digest(plan: BootPlan, flavour: bytes = b"") -> bytes:
    """What names a guest's translations; a `flavour` sets apart the ways in which one kernel runs different code."""
    digest = plan.digest
    if not digest:
        with plan.kernel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(digest + flavour).digest() if flavour else digest


def begin_keeper(plan: BootPlan, choice: CpuChoice, flavour: bytes = b"") -> Keeper | None:
    """Begin to read a guest's translations for the processor that `make_vcpu` or `xen_processor` will make.

    None if they are not kept; ValueError for features that cannot be switched so.
    """
    from trivisor.machine.cpuid import guest_features, xcr0_of, xcr0_on_host
    from trivisor.x86.cpuid import host_cpuid

    directory = begin_keeping(plan.keep)
    if directory is None:
        return None
    from trivisor.translation.keeper import Keeper, host_kind

    features = guest_features(host_cpuid, extra=choice.added, without=choice.removed)
    return Keeper(directory, host_kind(features, xcr0_on_host(xcr0_of(features))), partial(guest_digest, plan, flavour))


def begin_restored_keeper(cpuid: GuestCpuid, guest: bytes, booted: bytes) -> Keeper | None:
    """The same for a restored guest, by the digests of it and of its boot; none without them."""
    directory = begin_keeping(bool(guest))
    if directory is None:
        return None
    from trivisor.translation.keeper import Keeper, host_kind

    return Keeper(directory, host_kind(cpuid.features, cpuid.xcr0_on_host), lambda: guest, booted)


def keeper_for(vcpu: Vcpu, guest: bytes, booted: bytes = b"") -> Keeper | None:
    """What keeps the translations of a processor that is there; none without a digest, or if it does not translate."""
    from trivisor.translation.cpu import TranslationVcpu

    if vcpu.technique == "hardware":
        from trivisor.hardware.kvm.split import SplitVcpu

        if isinstance(vcpu, SplitVcpu):  # of ring 0 alone: files of their own
            vcpu = vcpu.ring_zero
            guest, booted = (digest and hashlib.sha256(digest + b"ring 0").digest() for digest in (guest, booted))
    if not isinstance(vcpu, TranslationVcpu):
        return None
    keeper = begin_restored_keeper(vcpu.guest_cpuid, guest, booted)
    if keeper is not None:
        keeper.serve(vcpu.blocks)
    return keeper
