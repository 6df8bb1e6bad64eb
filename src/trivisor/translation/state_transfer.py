"""The processor's whole state out of the state block and into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivisor.machine.state import SEGMENT_NAMES, CpuState, Segment, Table
from trivisor.machine.vcpu import GeneralProtection
from trivisor.translation.layout import OFFSETS
from trivisor.x86 import msr
from trivisor.x86.exceptions import GuestException

if TYPE_CHECKING:
    from trivisor.translation.cpu import TranslationVcpu

_INITIAL_FCW = 0x37F
_INITIAL_MXCSR = 0x1F80
_XSTATE_BV = 512

_FIELDS = {
    msr.IA32_STAR: "star",
    msr.IA32_LSTAR: "lstar",
    msr.IA32_CSTAR: "cstar",
    msr.IA32_FMASK: "fmask",
    msr.IA32_KERNEL_GS_BASE: "kernel_gs_base",
    msr.IA32_SYSENTER_CS: "sysenter_cs",
    msr.IA32_SYSENTER_ESP: "sysenter_esp",
    msr.IA32_SYSENTER_EIP: "sysenter_eip",
    msr.IA32_TSC_AUX: "tsc_aux",
    msr.IA32_TSC_ADJUST: "tsc_adjust",
    msr.IA32_PKRS: "pkrs",
}
"""MSRs that are fields of the core."""


def get_state(cpu: TranslationVcpu) -> CpuState:
    """Copy everything out."""
    core = cpu.core
    state = CpuState(
        gpr=list(core.regs),
        rip=core.rip,
        rflags=core.rflags,
        gdtr=Table(core.gdtr_base, core.gdtr_limit),
        idtr=Table(core.idtr_base, core.idtr_limit),
        cr0=core.cr0,
        cr2=core.cr2,
        cr3=core.cr3,
        cr4=core.cr4,
        cr8=cpu.board.interrupts.cr8,
        efer=core.efer,
        xcr0=core.xcr0,
        dr=list(core.dr),
        msrs={**cpu.msrs.save(), **{index: getattr(core, name) for index, name in _FIELDS.items()}},
        xsave=bytes(core.bytes[OFFSETS["FPU"] : OFFSETS["FPU"] + cpu.xsave_size]),
        pkru=core.pkru,
        interrupt_shadow=core.interrupt_shadow,
        halted=cpu.halted,
        nmi_blocked=core.nmi_blocked,
        nmi_pending=core.nmi_waiting,
        interrupts_pending=list(cpu.injected),
        exception_pending=None if cpu.exception is None else (cpu.exception.vector, cpu.exception.error_code),
    )
    state.msrs[msr.IA32_TIME_STAMP_COUNTER] = cpu.tsc()
    for name, view in zip((*SEGMENT_NAMES, "ldtr", "tr"), core.segments, strict=True):
        setattr(state, name, Segment(view.selector, view.base, view.limit, view.attributes))
    return state


def set_state(cpu: TranslationVcpu, state: CpuState) -> None:
    """Load everything; the caller flushes TLBs and recomputes the mode."""
    core = cpu.core
    for index, value in enumerate(state.gpr):
        core.regs[index] = value
    core.rflags = state.rflags
    for name, view in zip((*SEGMENT_NAMES, "ldtr", "tr"), core.segments, strict=True):
        segment: Segment = getattr(state, name)
        view.set(segment.selector, segment.base, segment.limit, segment.attributes)
    # The privilege level is SS's DPL (Intel SDM 3C 25.4.1, access rights).
    core.cpl = state.ss.attributes >> 5 & 3
    core.gdtr_base, core.gdtr_limit = state.gdtr.base, state.gdtr.limit
    core.idtr_base, core.idtr_limit = state.idtr.base, state.idtr.limit
    core.cr0, core.cr2, core.cr3, core.cr4 = state.cr0, state.cr2, state.cr3, state.cr4
    core.efer, core.xcr0, core.pkru = state.efer, state.xcr0, state.pkru & 0xFFFFFFFF
    core.rip = state.rip  # CS and EFER are there: it is an offset in the segment
    cpu.board.interrupts.cr8 = state.cr8
    core.dr[:] = state.dr
    core.debug.load(core.dr, core.cr4)
    core.debug.pending, core.debug.blocked = 0, False
    core.interrupt_shadow = state.interrupt_shadow
    core.nmi_blocked = state.nmi_blocked
    core.nmi_waiting, cpu.injected[:] = state.nmi_pending, state.interrupts_pending
    cpu.exception = None if state.exception_pending is None else GuestException(*state.exception_pending)
    cpu.halted = state.halted
    for index, value in state.msrs.items():
        if index in _FIELDS:
            setattr(core, _FIELDS[index], value)
    others = {i: v for i, v in state.msrs.items() if i not in _FIELDS and i != msr.IA32_TIME_STAMP_COUNTER}
    try:
        cpu.msrs.load(others)
    except GeneralProtection:
        raise ValueError("the state has an MSR value that this processor refuses") from None
    if msr.IA32_TIME_STAMP_COUNTER in state.msrs:
        core.tsc_offset = 0
        core.tsc_offset = state.msrs[msr.IA32_TIME_STAMP_COUNTER] - cpu.tsc()
        cpu.board.tsc_changed()
    area = OFFSETS["FPU"]
    core.bytes[area : area + cpu.xsave_size] = bytes(cpu.xsave_size)
    if state.xsave:
        image = state.xsave[: cpu.xsave_size]
        core.bytes[area : area + len(image)] = image
        core.words[area + _XSTATE_BV >> 3] &= cpu.blocks.native.xsave_mask  # XRSTOR takes no others
    else:
        core.bytes[area : area + 2] = _INITIAL_FCW.to_bytes(2, "little")
        core.bytes[area + 24 : area + 28] = _INITIAL_MXCSR.to_bytes(4, "little")
