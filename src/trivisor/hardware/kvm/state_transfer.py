"""The processor's whole state out of KVM and into it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from trivisor.hardware.kvm import abi
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.machine.vcpu import GeneralProtection
from trivisor.x86 import msr
from trivisor.x86.control import EFER_LMA, XCR0_PKRU
from trivisor.x86.cpuid import host_cpuid, xsave_area

if TYPE_CHECKING:
    from trivisor.hardware.kvm.cpu import KvmVcpu

_REGS = struct.Struct("<18Q")
_TO_STATE: Final = (0, 2, 3, 1, 6, 7, 4, 5, *range(8, 16))
"""Where `kvm_regs` has the general register of each encoding number."""
_INITIAL_FCW, _INITIAL_MXCSR = 0x37F, 0x1F80
_XSTATE_BV = 512
"""Where the XSAVE area tells of the components that it has."""

KEPT_MSRS: Final = frozenset(
    {
        msr.IA32_EFER, msr.IA32_STAR, msr.IA32_LSTAR, msr.IA32_CSTAR, msr.IA32_FMASK,
        msr.IA32_FS_BASE, msr.IA32_GS_BASE, msr.IA32_KERNEL_GS_BASE, msr.IA32_TSC_AUX,
        msr.IA32_SYSENTER_CS, msr.IA32_SYSENTER_ESP, msr.IA32_SYSENTER_EIP,
        msr.IA32_PAT, msr.IA32_DEBUGCTL, msr.IA32_SPEC_CTRL, msr.IA32_PRED_CMD, msr.IA32_FLUSH_CMD,
    }
)  # fmt: skip
"""The MSRs that act on the processor itself and so are KVM's; all others are answered here, as under translation."""
TRANSFERRED_MSRS: Final = tuple(
    sorted(
        KEPT_MSRS
        - {msr.IA32_EFER, msr.IA32_FS_BASE, msr.IA32_GS_BASE, msr.IA32_PRED_CMD, msr.IA32_FLUSH_CMD}
    )
)
"""Those of them that `CpuState.msrs` holds."""


def get_state(cpu: KvmVcpu) -> CpuState:
    """Copy everything out; nothing of an instruction may be left half done."""
    handle = cpu.handle
    raw = bytearray(_REGS.size)
    handle.control(abi.GET_REGS, raw)
    regs = _REGS.unpack(raw)
    sregs = handle.get(abi.GET_SREGS, abi.SpecialRegs)
    debug = handle.get(abi.GET_DEBUGREGS, abi.DebugRegs)
    events = handle.get(abi.GET_VCPU_EVENTS, abi.VcpuEvents)
    state = CpuState(
        gpr=[regs[at] for at in _TO_STATE],
        rip=regs[16],
        rflags=regs[17],
        gdtr=Table(sregs.gdt.base, sregs.gdt.limit),
        idtr=Table(sregs.idt.base, sregs.idt.limit),
        cr0=sregs.cr0,
        cr2=sregs.cr2,
        cr3=sregs.cr3,
        cr4=sregs.cr4,
        cr8=cpu.board.interrupts.cr8,
        efer=sregs.efer,
        xcr0=_get_xcr0(cpu),
        dr=[*debug.db, 0, 0, debug.dr6, debug.dr7],
        msrs={**cpu.msrs.save(), **handle.get_msrs(cpu.transferred_msrs)},
        halted=cpu.halted,
        interrupt_shadow=bool(events.interrupt.shadow),
        nmi_blocked=bool(events.nmi.masked),
        nmi_pending=bool(events.nmi.pending or events.nmi.injected),
        interrupts_pending=list(cpu.injected),
    )
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr"):
        setattr(state, name, _segment(getattr(sregs, name)))
    state.ldtr = _segment(sregs.ldt)
    state.msrs[msr.IA32_TIME_STAMP_COUNTER] = cpu.tsc()
    state.msrs[msr.IA32_TSC_ADJUST] = cpu.tsc_adjust
    if events.interrupt.injected and not events.interrupt.soft:
        state.interrupts_pending.insert(0, events.interrupt.nr)
    if events.exception.injected:
        error = events.exception.error_code if events.exception.has_error_code else None
        state.exception_pending = (events.exception.nr, error)
    area = bytearray(4096)
    handle.control(abi.GET_XSAVE, area)
    state.pkru = _take_pkru(cpu, area)
    state.xsave = bytes(area[: xsave_area(cpu.xcr0_supported & ~XCR0_PKRU)])
    return state


def _pkru_field(cpu: KvmVcpu) -> slice | None:
    """PKRU's place in the XSAVE area; None for a guest, or a host, that has none."""
    offset = host_cpuid(0xD, 9)[1]
    return slice(offset, offset + 4) if offset and cpu.xcr0_supported & XCR0_PKRU else None


def _take_pkru(cpu: KvmVcpu, area: bytearray) -> int:
    """PKRU out of an XSAVE area, whose header forgets it."""
    field, saved = _pkru_field(cpu), int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little")
    if field is None or not saved & XCR0_PKRU:
        return 0
    area[_XSTATE_BV : _XSTATE_BV + 8] = (saved & ~XCR0_PKRU).to_bytes(8, "little")
    return int.from_bytes(area[field], "little")


def _put_pkru(cpu: KvmVcpu, area: bytearray, pkru: int) -> None:
    """The way back."""
    if (field := _pkru_field(cpu)) is not None:
        area[field] = pkru.to_bytes(4, "little")
        saved = int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little")
        area[_XSTATE_BV : _XSTATE_BV + 8] = (saved | XCR0_PKRU).to_bytes(8, "little")


def set_state(cpu: KvmVcpu, state: CpuState) -> None:
    """Load everything; ValueError for what this KVM refuses."""
    handle = cpu.handle
    try:
        handle.control(abi.SET_SREGS, _special_regs(cpu, state))
        values = [0] * 18
        for number, at in enumerate(_TO_STATE):
            values[at] = state.gpr[number]
        values[16], values[17] = state.rip, state.rflags
        handle.control(abi.SET_REGS, bytearray(_REGS.pack(*values)))
        _set_xsave(cpu, state)
        debug = abi.DebugRegs(dr6=state.dr[6], dr7=state.dr[7])
        debug.db[:] = state.dr[:4]
        handle.control(abi.SET_DEBUGREGS, debug)
    except OSError as error:
        raise ValueError(f"KVM refuses this state of the processor: {error.strerror}") from None
    _set_msrs(cpu, state)
    _set_events(cpu, state)
    cpu.board.interrupts.cr8 = state.cr8
    cpu.halted = state.halted
    cpu.injected[:] = state.interrupts_pending


def _segment(source: abi.Segment) -> Segment:
    if source.unusable and not source.present:
        # What is left of a null selector: SS keeps the privilege level.
        return Segment(source.selector, source.base, 0, source.dpl << 5)
    attributes = (
        source.type | source.s << 4 | source.dpl << 5 | source.present << 7
        | source.avl << 12 | source.l << 13 | source.db << 14 | source.g << 15
    )  # fmt: skip
    return Segment(source.selector, source.base, source.limit, attributes)


def kvm_segment(source: Segment) -> abi.Segment:
    """A segment register as KVM has it."""
    attributes = source.attributes
    return abi.Segment(
        base=source.base,
        limit=source.limit,
        selector=source.selector,
        type=attributes & 15,
        s=attributes >> 4 & 1,
        dpl=attributes >> 5 & 3,
        present=attributes >> 7 & 1,
        avl=attributes >> 12 & 1,
        l=attributes >> 13 & 1,
        db=attributes >> 14 & 1,
        g=attributes >> 15 & 1,
        unusable=not attributes >> 7 & 1,
    )


def _special_regs(cpu: KvmVcpu, state: CpuState) -> abi.SpecialRegs:
    sregs = abi.SpecialRegs()
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr"):
        setattr(sregs, name, kvm_segment(getattr(state, name)))
    sregs.ldt = kvm_segment(state.ldtr)
    sregs.gdt = abi.DescriptorTable(state.gdtr.base, state.gdtr.limit)
    sregs.idt = abi.DescriptorTable(state.idtr.base, state.idtr.limit)
    sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4 = state.cr0, state.cr2, state.cr3, state.cr4
    sregs.cr8, sregs.efer = state.cr8, state.efer
    if state.efer & EFER_LMA and not state.cs.attributes & 1 << 13:
        sregs.cs.l = 0
    read_base = cpu.board.msrs.get(msr.IA32_APIC_BASE)
    if read_base is not None:
        sregs.apic_base = read_base[0]()
    return sregs


def _get_xcr0(cpu: KvmVcpu) -> int:
    xcrs = cpu.handle.get(abi.GET_XCRS, abi.Xcrs)
    values = {entry.xcr: entry.value for entry in xcrs.xcrs[: xcrs.nr_xcrs]}
    return int(values.get(0, 1))


def _set_xsave(cpu: KvmVcpu, state: CpuState) -> None:
    xcrs = abi.Xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = state.xcr0
    cpu.handle.control(abi.SET_XCRS, xcrs)
    area = bytearray(4096)
    area[: len(state.xsave)] = state.xsave
    if not state.xsave:
        area[:2] = _INITIAL_FCW.to_bytes(2, "little")
        area[24:28] = _INITIAL_MXCSR.to_bytes(4, "little")
    _put_pkru(cpu, area, state.pkru)
    cpu.handle.control(abi.SET_XSAVE, area)


def _set_msrs(cpu: KvmVcpu, state: CpuState) -> None:
    mine = set(cpu.transferred_msrs)
    cpu.handle.set_msrs({index: state.msrs.get(index, cpu.reset_msrs[index]) for index in mine})
    elsewhere = {*mine, msr.IA32_TIME_STAMP_COUNTER, msr.IA32_TSC_ADJUST}
    try:
        cpu.msrs.load({index: value for index, value in state.msrs.items() if index not in elsewhere})
    except GeneralProtection:
        raise ValueError("the state has an MSR value that this processor refuses") from None
    cpu.tsc_adjust = state.msrs.get(msr.IA32_TSC_ADJUST, 0)
    if msr.IA32_TIME_STAMP_COUNTER in state.msrs:
        cpu.set_tsc(state.msrs[msr.IA32_TIME_STAMP_COUNTER])


def _set_events(cpu: KvmVcpu, state: CpuState) -> None:
    events = abi.VcpuEvents(flags=abi.EVENT_NMI_PENDING_VALID | abi.EVENT_SHADOW_VALID)
    events.interrupt.shadow = abi.SHADOW_STI if state.interrupt_shadow else 0
    events.nmi.masked, events.nmi.pending = state.nmi_blocked, state.nmi_pending
    if state.exception_pending is not None:
        vector, error = state.exception_pending
        events.exception.injected, events.exception.nr = 1, vector
        events.exception.has_error_code, events.exception.error_code = error is not None, error or 0
    cpu.handle.control(abi.SET_VCPU_EVENTS, events)
