"""A small guest on the real board under any technique, and what is to be seen of it when it has stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.unit.translation.engine.guest import (
    DATA,
    DEVICE,
    HANDLERS,
    Frame,
    Machine,
    Recorder,
)
from trivisor.hardware.kvm.cpu import KvmVcpu
from trivisor.hardware.kvm.guest_cpuid import kvm_cpuid, ring_0_is_emulated
from trivisor.hardware.kvm.kernel_apic import KernelApicVcpu, crystal_for, why_not
from trivisor.hardware.kvm.split import SplitVcpu
from trivisor.hardware.kvm.system import KvmUnavailable, System
from trivisor.machine import tsc
from trivisor.machine.cpuid import AVX512, GuestCpuid
from trivisor.machine.exits import Exit
from trivisor.machine.state import GPR_NAMES, CpuState
from trivisor.machine.vcpu import Vcpu
from trivisor.pc import Pc
from trivisor.translation.cpu import TranslationVcpu
from trivisor.translation.ring_zero import RingZero
from trivisor.x86.cpuid import CpuChoice
from trivisor.x86.flags import AC, RF

PORTS = 0x500
"""Where the recording device stands on the port bus."""
OBSERVED_DATA = 0x400
"""Bytes from DATA on that are compared."""
ARITHMETIC = 0x8D5
"""The flags that an instruction may leave undefined; a program compares those that it names."""

UNAVAILABLE: dict[str, str] = {}
"""Technique -> why it cannot be tried here."""
try:
    System().close()
except KvmUnavailable as reason:
    UNAVAILABLE["hardware"] = str(reason)
EMULATED = False
"""Whether this host's KVM emulates ring 0."""
if "hardware" not in UNAVAILABLE:
    with System() as _system:
        EMULATED = ring_0_is_emulated(_system)
TECHNIQUES = ("translation", "hardware", "hardware, KVM's APIC", "hardware, ring 3")
"""The last: KVM for ring 3 alone, which is how guests run where it emulates ring 0; where it does not, the one before."""
CRYSTAL = 0
"""Of the boards: one that every technique can have."""
if "hardware" not in UNAVAILABLE:
    with System() as _system:
        CRYSTAL = crystal_for(_system, tsc.frequency())
        if _reason := why_not(_system, CRYSTAL):
            UNAVAILABLE["hardware, KVM's APIC"] = _reason
else:
    UNAVAILABLE["hardware, KVM's APIC"] = UNAVAILABLE["hardware"]
if "hardware" in UNAVAILABLE or not EMULATED:
    UNAVAILABLE["hardware, ring 3"] = UNAVAILABLE.get("hardware", "this host's KVM does ring 0 as well")


def _common_cpuid(board: Pc) -> GuestCpuid | None:
    """The processor that every technique present can give a guest; None for the best of translation's."""
    if "hardware" in UNAVAILABLE:
        return None
    with System() as system:
        return kvm_cpuid(system, board)


def make_vcpu(technique: str, board: Pc) -> Vcpu:
    """A processor of the technique; all of them look the same to the guest."""
    cpuid = _common_cpuid(board)
    if technique == "translation":
        return TranslationVcpu(board, cpuid=cpuid)
    if technique == "hardware, ring 3":
        no_avx512 = CpuChoice(removed=AVX512)  # which these guests do not look for
        return SplitVcpu(
            board, no_avx512, cpuid, ring_zero=lambda common: RingZero(TranslationVcpu(board, cpuid=common))
        )
    kind = KernelApicVcpu if technique == "hardware, KVM's APIC" else KvmVcpu
    return kind(board, cpuid=cpuid, substitute=lambda common: TranslationVcpu(board, cpuid=common))


class Guest(Machine):
    """`Machine` with a processor of any technique, seen through the protocol alone."""

    def __init__(self, technique: str, source: str, bits: int = 64, *, cpl: int = 0) -> None:
        self.technique = technique
        super().__init__(source, bits, cpl=cpl, crystal=CRYSTAL, processor=lambda board: make_vcpu(technique, board))
        self.ports, self.device = Recorder(), Recorder()
        self.board.ports.attach(PORTS, 16, self.ports)
        self.board.mmio.attach(DEVICE, 0x3000, self.device)

    def switch(self, technique: str) -> None:
        """Go on under another technique, from the same state."""
        state, old = self.vcpu.state, self.vcpu
        new = make_vcpu(technique, self.board)
        new.tsc_offset = old.tsc_offset
        state.msrs.pop(0x10, None)
        new.observed = old.observed
        new.state = state
        old.close()
        self.vcpu, self.technique = new, technique

    def watched_run(self) -> Exit:
        """Run until it stops; a guest that does not end is kicked."""
        return self._watched(self.vcpu.run)


@dataclass(frozen=True)
class Program:
    """A guest: the theory, the code, and what must have come of it under every technique."""

    name: str
    theory: str
    source: str
    bits: int = 64
    cpl: int = 0
    setup: Callable[[Guest], None] = lambda guest: None
    """Changes memory, gates or devices before the guest runs."""
    start: Callable[[CpuState], None] = lambda state: None
    """Changes the registers that it starts with."""
    registers: dict[str, int] = field(default_factory=dict)
    vector: int | None = None
    """The exception or interrupt that ends it; None for a HLT of its own."""
    error: int | None = None
    at: str = ""
    """The label that the frame's rip must be."""
    ports: list[tuple[str, int, int, int]] | None = None
    device: list[tuple[str, int, int, int]] | None = None
    memory: dict[int, int] = field(default_factory=dict)
    """Doublewords at physical addresses."""
    unless_emulated: str = ""
    """What a KVM that emulates ring 0 is known to do otherwise; the program is not tried there."""


@dataclass(frozen=True)
class Observation:
    """What is compared between techniques."""

    exit: Exit
    registers: dict[str, int]
    segments: dict[str, tuple[int, int]]
    rip: int
    flags: int
    cr2: int
    dr6: int
    frame: Frame | None
    ports: list[tuple[str, int, int, int]]
    device: list[tuple[str, int, int, int]]
    data: bytes


def prepare(technique: str, program: Program) -> Guest:
    """The guest, ready to run."""
    guest = Guest(technique, program.source, program.bits, cpl=program.cpl)
    program.setup(guest)
    state = guest.initial_state(program.cpl)
    program.start(state)
    guest.vcpu.state = state
    guest.vcpu.memory_written(0, guest.memory.size)
    return guest


def observe(guest: Guest, exit_: Exit) -> Observation:
    """What a stopped guest shows."""
    state = guest.vcpu.state
    at_handler = HANDLERS <= state.rip < HANDLERS + 0x1000
    return Observation(
        exit=exit_,
        registers=dict(zip(GPR_NAMES, state.gpr, strict=True)),
        segments={name: (one.selector, one.base) for name, one in state.segments().items()},
        rip=state.rip,
        flags=state.rflags & ~(ARITHMETIC | AC),  # a KVM that emulates ring 0 drops AC at an exception
        cr2=state.cr2,
        dr6=state.dr[6],
        frame=_without_resume_flag(guest.frame_of(state)) if at_handler else None,
        ports=guest.ports.log,
        device=guest.device.log,
        data=guest.memory.read(DATA, OBSERVED_DATA),
    )


def _without_resume_flag(frame: Frame) -> Frame:
    """RF is pushed as one for faults (SDM 3B 17.3.1.1); for a double fault, an abort, the manual leaves it open."""
    return replace(frame, rflags=frame.rflags & ~RF)
