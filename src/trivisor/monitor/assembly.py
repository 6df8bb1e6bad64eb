"""Putting a machine together: memory, clock, board, boot protocol and vCPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trivisor.boot import Image, ImageKind, firmware, load_image
from trivisor.boot.xen_notes import XenKernel, read_xen_kernel
from trivisor.devices.disk_file import DiskFile
from trivisor.machine import tsc
from trivisor.machine.clock import Clock
from trivisor.machine.cpuid import GuestCpuid
from trivisor.machine.jobs import Jobs
from trivisor.machine.memory import LOW_RAM_LIMIT, PHYSICAL_ADDRESS_BITS, GuestMemory
from trivisor.machine.state import CpuState
from trivisor.machine.vcpu import Surroundings, Vcpu
from trivisor.monitor.keeping import begin_keeper, begin_keeping, guest_digest, keeper_for
from trivisor.monitor.plan import BootPlan, Hardware
from trivisor.monitor.techniques import TechniqueUnavailable
from trivisor.monitor.xen_processor import xen_processor
from trivisor.x86 import mtrr
from trivisor.x86.cpuid import USUAL_CPU

if TYPE_CHECKING:
    from trivisor.paravirt.xen.machine import XenMachine
    from trivisor.pc import Pc
    from trivisor.translation.keeper import Keeper


class Board(Surroundings, Protocol):
    """A processor's surroundings with a console for the monitor: a `Pc`, or a PV domain's platform."""

    @property
    def post_code(self) -> int:
        """The last byte that the guest wrote to port 0x80."""

    @property
    def console_room(self) -> int:
        """How many bytes `console_input` would take now."""

    def console_input(self, data: bytes) -> int:
        """Type `data` on the console; returns how many bytes of it there was room for."""


class Assembly:
    """The parts of a machine that is switched on; they live from one reset to the next."""

    def __init__(
        self,
        memory: GuestMemory,
        board: Board,
        vcpu: Vcpu,
        keeper: Keeper | None = None,
        xen: XenMachine | None = None,
    ) -> None:
        self.memory = memory
        self.board = board
        self.vcpu = vcpu
        self.keeper = keeper
        """Of the engine's translations, if they are kept."""
        self.firmware = b""
        """The image that ends at 4 GiB, if there is one."""
        self.kept_as = b""
        """The digest that they are kept by; empty when they are not."""
        self.booted_as = b""
        """Of a restored guest: the one by which those of its boot are."""
        self.xen = xen
        """The Xen guest that it all is for, if it is for one."""
        self._closed = False

    def begin_with_kept(self) -> None:
        """Have a processor that has not run yet begin with the translations that its keeper has read."""
        if self.keeper is None:
            return
        from trivisor.translation.cpu import TranslationVcpu

        if isinstance(self.vcpu, TranslationVcpu):
            self.kept_as = self.keeper.serve(self.vcpu.blocks)
        else:  # another engine has turned out to be better
            self.keeper.close()
            self.keeper = None

    def statistics(self) -> dict[str, Any]:
        """The processor's counters, and those of a hypervisor of ours."""
        return {**self.vcpu.statistics(), **({} if self.xen is None else self.xen.statistics())}

    def close(self) -> None:
        """Give all host resources back; harmless the second time."""
        if not self._closed:
            self._closed = True
            if self.xen is not None:
                self.xen.close_devices()  # their threads use memory and call the vCPU
            self.vcpu.close()
            if self.keeper is not None:
                self.keeper.close()
            self.memory.close()


def assemble(
    plan: BootPlan,
    memory_size: int,
    technique: str,
    serial_output: Callable[[bytes], None],
    on_stop: Callable[[], None],
) -> Assembly:
    """Build a machine and load its guest, ready to run the first instruction.

    `on_stop` is called when a device ends the run.  Raises ValueError or
    OSError for a guest that cannot be loaded, `TechniqueUnavailable` for a technique that fails here.
    """
    if technique == "paravirt":
        return _assemble_xen(plan, memory_size, serial_output, on_stop)
    with ExitStack() as undo:
        keeper = begin_keeper(plan, plan.hardware.cpu) if technique == "translation" else None
        if keeper is not None:
            undo.callback(keeper.close)
        memory = GuestMemory(memory_size)
        undo.callback(memory.close)
        from trivisor.pc import Pc  # with all the devices that a PV domain has no use for

        frequency = tsc.frequency()
        board = Pc(
            memory,
            Clock(),
            serial_output=serial_output,
            tsc=tsc.read,
            tsc_frequency=frequency,
            crystal=_kvm_crystal(frequency) if technique == "hardware" else 0,
            on_stop=on_stop,
            test_device="pc-testdev" in plan.hardware.devices,
            absent=plan.hardware.cpu.removed,
        )
        vcpu = make_vcpu(technique, board, plan.hardware, keep=plan.keep)
        undo.pop_all()
    machine = Assembly(memory, board, vcpu, keeper)
    try:
        vcpu.state = _load(plan, machine, board)
        if keeper is not None:
            machine.begin_with_kept()
        elif plan.keep:
            machine.kept_as = guest_digest(plan)
            machine.keeper = keeper_for(vcpu, machine.kept_as)
    except BaseException:
        machine.close()
        raise
    return machine


def _assemble_xen(
    plan: BootPlan, memory_size: int, console_output: Callable[[bytes], None], on_stop: Callable[[], None]
) -> Assembly:
    """A PV domain whose ring 3 is run by the translation engine, or by the host's processor."""
    with ExitStack() as undo:
        reading = Jobs([partial(_read_xen_kernel, plan.kernel)])
        undo.callback(reading.cancel)
        keeper = begin_keeper(plan, USUAL_CPU, b"xen") if plan.engine != "direct" else None
        if keeper is not None:
            undo.callback(keeper.close)
        xen = make_xen_machine(memory_size, tsc.frequency(), console_output, on_stop)
        undo.callback(xen.close)
        attach_devices(xen, plan.hardware)
        vcpu, cpu = xen_processor(xen, plan.engine, begin_keeping(plan.keep and plan.engine != "direct"))
        undo.pop_all()
    machine = Assembly(xen.memory, xen.platform, vcpu, keeper, xen)
    try:
        xen.domain.observers = lambda kind: vcpu.observed.get(kind, [])
        initrd = plan.initrd.read_bytes() if isinstance(plan.initrd, Path) else plan.initrd
        (kernel,) = reading.results()
        state = xen.start(cpu, kernel, initrd, plan.command_line)
        vcpu.state = state
        cpu.enter_space(state.cr3, True)
        machine.begin_with_kept()
        if plan.keep and not machine.kept_as:
            machine.kept_as = guest_digest(plan, b"xen")  # for translation, which may go on from a snapshot
    except BaseException:
        reading.cancel()
        machine.close()
        raise
    return machine


def _read_xen_kernel(path: Path) -> XenKernel:
    with Image(path) as image:
        return read_xen_kernel(image)


def make_xen_machine(
    memory_size: int, tsc_frequency: int, console_output: Callable[[bytes], None], on_stop: Callable[[], None]
) -> XenMachine:
    """A PV domain without processor or content."""
    from trivisor.paravirt.xen.machine import XenMachine

    clock = Clock()
    clock.on_posted = on_stop  # for an engine that has no shorter way to look at what was posted
    return XenMachine(
        memory_size,
        clock,
        console_output=console_output,
        tsc=tsc.read,
        tsc_frequency=tsc_frequency,
        on_stop=on_stop,
    )


def attach_devices(xen: XenMachine, hardware: Hardware) -> None:
    """Give a PV domain its disks and its network; raises OSError, DiskError and NetworkUnavailable."""
    network = hardware.network
    if network is not None:
        from trivisor.devices.user_network import UserNetwork  # sockets are slow to import

        xen.attach_network(lambda deliver: UserNetwork(deliver, network.forwards))
    for disk in hardware.disks:
        xen.attach_disk(DiskFile(disk.path, readonly=disk.readonly))


def _load(plan: BootPlan, machine: Assembly, board: Pc) -> CpuState:
    """Put the guest into memory; the processor as its first instruction finds it.

    Boot protocols skip the firmware, so the MTRRs are set here as firmware leaves them.
    """
    if plan.is_firmware:
        machine.firmware, state = firmware.load(machine.memory, board.mmio, plan.kernel)
        return state
    initrd = plan.initrd.read_bytes() if isinstance(plan.initrd, Path) else plan.initrd
    with Image(plan.kernel) as image:
        if image.kind is ImageKind.MULTIBOOT:
            board.leave_bios_interrupts()
        state = load_image(
            machine.memory,
            image,
            initrd=initrd,
            modules=plan.modules,
            command_line=plan.command_line,
            e820=board.e820(),
            rsdp_address=board.rsdp_address,
        )
    state.msrs |= mtrr.firmware_settings(LOW_RAM_LIMIT, PHYSICAL_ADDRESS_BITS)
    return state


def make_vcpu(technique: str, board: Pc, hardware: Hardware, cpuid: GuestCpuid | None = None, *, keep: bool) -> Vcpu:
    """A processor for a board; the guest sees `cpuid`, without one the best that the technique has.

    `keep`: machine code may be taken from the user's cache, and left there.
    """
    keep_in = begin_keeping(keep)
    if technique == "translation":
        from trivisor.translation.cpu import TranslationVcpu

        return TranslationVcpu(board, hardware.cpu, cpuid, keep_in)
    assert technique == "hardware"
    from trivisor.hardware.kvm.system import KvmUnavailable

    try:
        return _kvm(board, hardware, cpuid, keep_in)
    except KvmUnavailable as reason:
        raise TechniqueUnavailable(f"technique hardware: {reason}") from None


def _kvm_crystal(tsc_frequency: int) -> int:
    """Hz of a local APIC timer's input that suits KVM's own; 0 if there is no KVM, or it emulates ring 0."""
    from trivisor.hardware.kvm.guest_cpuid import ring_0_is_emulated
    from trivisor.hardware.kvm.kernel_apic import crystal_for
    from trivisor.hardware.kvm.system import KvmUnavailable, System

    try:
        with System() as system:
            return 0 if ring_0_is_emulated(system) else crystal_for(system, tsc_frequency)
    except KvmUnavailable:
        return 0  # `make_vcpu` says it


def _kvm(board: Pc, hardware: Hardware, cpuid: GuestCpuid | None, keep_in: Path | None) -> Vcpu:
    """All of the guest under KVM, with KVM's local APIC where that can be; where KVM emulates ring 0, ring 3 alone."""
    from trivisor.hardware.kvm.cpu import KvmVcpu
    from trivisor.hardware.kvm.guest_cpuid import ring_0_is_emulated
    from trivisor.hardware.kvm.kernel_apic import KernelApicVcpu, why_not
    from trivisor.hardware.kvm.split import SplitVcpu
    from trivisor.hardware.kvm.system import System
    from trivisor.translation.cpu import TranslationVcpu
    from trivisor.translation.ring_zero import RingZero

    def other(own: GuestCpuid) -> TranslationVcpu:
        return TranslationVcpu(board, cpuid=own, keep_in=keep_in)

    with System() as system:
        split, reason = ring_0_is_emulated(system), why_not(system, board.crystal_frequency)
    if split:
        return SplitVcpu(board, hardware.cpu, cpuid, ring_zero=lambda own: RingZero(other(own)))
    if not reason:
        return KernelApicVcpu(board, hardware.cpu, cpuid, substitute=other)
    vcpu = KvmVcpu(board, hardware.cpu, cpuid, substitute=other)
    vcpu.engine += f" ({reason})"
    return vcpu
