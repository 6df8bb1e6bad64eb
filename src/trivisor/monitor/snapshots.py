"""A machine into a snapshot and out of it: what is remembered beside the RAM, and a machine built from that.

Guest time stands still in a snapshot: clock and time-stamp counter go on from
where they were, so no guest sees them jump.  The clock chip alone tells the
host's date, as one that has its battery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from trivisor.boot import firmware
from trivisor.devices.disk_file import DiskError
from trivisor.machine import tsc
from trivisor.machine.clock import Clock
from trivisor.machine.cpuid import AVX512, GuestCpuid
from trivisor.machine.memory import MAXIMUM_RAM, GuestMemory
from trivisor.machine.saved_values import part, text
from trivisor.machine.saving import Remembers, Saved
from trivisor.machine.state_values import load_cpuid, load_state, save_cpuid, save_state
from trivisor.monitor.assembly import Assembly, attach_devices, make_vcpu, make_xen_machine
from trivisor.monitor.handover import EXCHANGEABLE
from trivisor.monitor.keeping import begin_keeping, begin_restored_keeper, keeper_for
from trivisor.monitor.plan import DEVICES, Hardware
from trivisor.monitor.snapshot_file import SnapshotError, SnapshotFile
from trivisor.monitor.techniques import PARAVIRT
from trivisor.monitor.xen_processor import xen_processor
from trivisor.pc import Pc
from trivisor.x86.cpuid import FEATURES, host_cpuid, host_xgetbv
from trivisor.x86.msr import IA32_TIME_STAMP_COUNTER

if TYPE_CHECKING:
    from trivisor.translation.keeper import Keeper

_FREQUENCY_TOLERANCE: Final = 100
"""The TSC's frequency may differ by one part in so many; more would have the guest's time run wrong."""
_SLOWEST_CRYSTAL: Final = 1_000_000
_DIGEST = 32
_MARKER = 64


class Extra(NamedTuple):
    """What the monitor itself remembers of a machine."""

    hardware: Hardware
    technique: str
    """The one that ran the machine."""
    waits_as: bytes
    """The word of the guest that waits for what to run (`guests.waiting`); empty for any other."""


def remember(machine: Assembly, hardware: Hardware, waits_as: bytes) -> Saved:
    """All that a machine remembers beside its RAM, which must not be read before; OSError for a disk that fails."""
    vcpu, board, xen = machine.vcpu, machine.board, machine.xen
    if xen is not None:
        xen.quiesce()
    whole: Remembers | None = board if isinstance(board, Pc) else xen
    assert whole is not None
    state = vcpu.state
    del state.msrs[IA32_TIME_STAMP_COUNTER]
    counter, now = tsc.read() + vcpu.tsc_offset & (1 << 64) - 1, board.clock.now()
    return {
        "technique": vcpu.technique,
        "memory": machine.memory.size if xen is None else xen.size,
        "devices": sorted(hardware.devices),
        "firmware": machine.firmware.hex(),
        "tsc": counter,
        "tsc_frequency": board.tsc_frequency,
        "now": now,
        "cpuid": save_cpuid(vcpu.guest_cpuid),
        "processor": save_state(state),
        "board": whole.save(),
        "kept_as": (machine.booted_as or machine.kept_as).hex(),
        "waits_as": waits_as.decode(),
    }


def extra(file: SnapshotFile) -> Extra:
    """The monitor's own part; raises `SnapshotError`."""
    saved = file.remembered
    try:
        devices = saved.get("devices")
        if not isinstance(devices, list) or not all(device in DEVICES for device in devices):
            raise ValueError("it has devices that are not known")
        technique = text(saved, "technique", 16)
        if technique not in (*EXCHANGEABLE, PARAVIRT):
            raise ValueError(f"there is no technique {technique!r}")
        word = text(saved, "waits_as", _MARKER)
        if word and not (word.isascii() and word.isalnum()):
            raise ValueError("waits_as is no word")
        return Extra(Hardware(frozenset(devices)), technique, word.encode())
    except ValueError as error:
        raise file.error(f"cannot be restored: {error}") from None


class Host(NamedTuple):
    """What the host gives a restored machine."""

    technique: str
    engine: str
    """Out of `plan.ENGINES`, for a Xen guest."""
    hardware: Hardware
    """With the disks and the network that a Xen guest had, in files and on links of now."""
    keep: bool


def restore(
    file: SnapshotFile, host: Host, serial_output: Callable[[bytes], None], on_stop: Callable[[], None]
) -> Assembly:
    """The machine of a snapshot, ready to go on.

    Raises `SnapshotError`, `TechniqueUnavailable`, and what a disk or a network of the host's raises.
    """
    try:
        if host.technique == PARAVIRT:
            return _restore_xen(file, file.remembered, host, serial_output, on_stop)
        return _restore(file, file.remembered, host, serial_output, on_stop)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        if isinstance(error, SnapshotError | DiskError):
            raise
        raise file.error(f"cannot be restored: {error}") from None


def _restore(
    file: SnapshotFile,
    saved: Saved,
    host: Host,
    serial_output: Callable[[bytes], None],
    on_stop: Callable[[], None],
) -> Assembly:
    cpuid = load_cpuid(saved.get("cpuid"), host_cpuid, host_xgetbv())
    state = load_state(saved.get("processor"), cpuid)
    frequency = _frequency(saved)
    with ExitStack() as undo:
        memory = GuestMemory(_integer(saved, "memory"))
        undo.callback(memory.close)
        loading = file.begin_loading(memory)  # goes on beside what Python has to do, as the keeper's reading does
        undo.callback(loading.cancel)
        keeper = _begin_keeper(saved, cpuid, undo) if host.technique == "translation" and host.keep else None
        board = _board(memory, saved, cpuid, frequency, serial_output, on_stop)
        rom = bytes.fromhex(text(saved, "firmware", 2 * firmware.MAXIMUM_SIZE))
        if rom:
            firmware.attach(board.mmio, rom)
        vcpu = make_vcpu(host.technique, board, host.hardware, cpuid, keep=host.keep)
        undo.pop_all()
    machine = Assembly(memory, board, vcpu, keeper)
    try:
        machine.firmware = rom
        machine.booted_as, machine.kept_as = _names(saved) if host.keep else (b"", b"")
        if keeper is None:
            machine.keeper = keeper_for(vcpu, machine.kept_as, machine.booted_as)
        else:
            machine.begin_with_kept()
        loading.results()
        board.load(part(saved, "board"))
        vcpu.state = state
        # Both at once, and last: from here on guest time runs.
        vcpu.tsc_offset = _integer(saved, "tsc") - tsc.read()
        board.clock.elapsed = _integer(saved, "now")
    except BaseException:
        loading.cancel()
        machine.close()
        raise
    return machine


def _restore_xen(
    file: SnapshotFile,
    saved: Saved,
    host: Host,
    console_output: Callable[[bytes], None],
    on_stop: Callable[[], None],
) -> Assembly:
    cpuid = load_cpuid(saved.get("cpuid"), host_cpuid, host_xgetbv(), AVX512)
    given = load_state(saved.get("processor"), cpuid)
    frequency, size, domain = _frequency(saved), _integer(saved, "memory"), part(saved, "board")
    if size > MAXIMUM_RAM:
        raise ValueError("memory is too much")
    with ExitStack() as undo:
        xen = make_xen_machine(size, frequency, console_output, on_stop)
        undo.callback(xen.close)
        xen.clear()
        loading = file.begin_loading(xen.memory)
        undo.callback(loading.cancel)
        attach_devices(xen, host.hardware)
        keeper = _begin_keeper(saved, cpuid, undo) if host.keep and host.engine != "direct" else None
        vcpu, cpu = xen_processor(xen, host.engine, begin_keeping(host.keep and host.engine != "direct"), cpuid)
        undo.pop_all()
    machine = Assembly(xen.memory, xen.platform, vcpu, keeper, xen)
    try:
        machine.booted_as, machine.kept_as = _names(saved) if host.keep else (b"", b"")
        machine.begin_with_kept()
        xen.domain.observers = lambda kind: vcpu.observed.get(kind, [])
        xen.domain.cpu = cpu
        loading.results()
        xen.load(domain)
        vcpu.state = xen.processor(given)
        # Guest time runs from here on; the domain's timers hang on it.
        offset = _integer(saved, "tsc") - tsc.read()
        jump = 0 if cpu.set_tsc_offset(offset) else -offset
        xen.platform.clock.elapsed = _integer(saved, "now")
        xen.go_on(domain, given.dr, jump)
    except BaseException:
        loading.cancel()
        machine.close()
        raise
    return machine


def _names(saved: Saved) -> tuple[bytes, bytes]:
    """The digests by which translations are kept: of the kernel that was booted, and of the guest that is restored."""
    booted = bytes.fromhex(text(saved, "kept_as", 2 * _DIGEST))
    return booted, hashlib.sha256(booted + b"restored").digest() if booted else b""


def _begin_keeper(saved: Saved, cpuid: GuestCpuid, undo: ExitStack) -> Keeper | None:
    """Begin to read the translations, to be undone so; None if the snapshot's guest had none."""
    booted, restored = _names(saved)
    keeper = begin_restored_keeper(cpuid, restored, booted)
    if keeper is not None:
        undo.callback(keeper.close)
    return keeper


def _board(
    memory: GuestMemory,
    saved: Saved,
    cpuid: GuestCpuid,
    frequency: int,
    serial_output: Callable[[bytes], None],
    on_stop: Callable[[], None],
) -> Pc:
    return Pc(
        memory,
        Clock(),
        serial_output=serial_output,
        tsc=tsc.read,
        tsc_frequency=frequency,
        on_stop=on_stop,
        test_device="pc-testdev" in saved["devices"],
        absent=frozenset(FEATURES) - cpuid.features,
        crystal=_crystal(cpuid),
        leaves_data=False,  # it is in the snapshot, if the guest has left it
    )


def _crystal(cpuid: GuestCpuid) -> int:
    """Hz of the local APIC timer's input, as the guest was told; 0 if it was not."""
    told = cpuid.table.get((0x15, 0))
    crystal = told[2] if told else 0
    if 0 < crystal < _SLOWEST_CRYSTAL:
        raise ValueError(f"its local APIC counts at {crystal} Hz")
    return crystal


def _frequency(saved: Saved) -> int:
    """The guest's TSC frequency in Hz, which must be the host's."""
    frequency, here = _integer(saved, "tsc_frequency"), tsc.frequency()
    if abs(frequency - here) * _FREQUENCY_TOLERANCE > here:
        raise ValueError(
            f"it was made where the time-stamp counter runs at {frequency / 1e6:.0f} MHz, and here it does at "
            f"{here / 1e6:.0f} MHz"
        )
    return frequency


def _integer(saved: Saved, name: str) -> int:
    value: Any = saved.get(name)
    if type(value) is not int or value < 0 or value >> 64:
        raise ValueError(f"{name} is no number")
    return value
