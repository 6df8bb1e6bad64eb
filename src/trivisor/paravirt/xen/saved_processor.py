"""The processor with which a domain goes on after a snapshot: what ring 3 and hypercalls can change of it, no more."""

from __future__ import annotations

from dataclasses import replace

from trivisor.machine.state import SEGMENT_NAMES, CpuState
from trivisor.paravirt.xen.privileged import MITIGATIONS
from trivisor.paravirt.xen.traps import LOADED
from trivisor.x86 import msr
from trivisor.x86.control import CR0_TS, CR4_FSGSBASE, xcr0_is_valid
from trivisor.x86.flags import FIXED, IF
from trivisor.x86.paging import is_canonical

_UNUSABLE = 1 << 16
_CODE, _CODE_BITS = 0xF8, _UNUSABLE | 0xF8
"""Attributes of CS: present, of ring 3, code."""
_STACK, _STACK_BITS = 0xF2, _UNUSABLE | 0xFA
"""Of SS: present, of ring 3, data that can be written."""
_LINEAR_BITS = 48


def goes_on(saved: CpuState, first: CpuState, xcr0_supported: int) -> CpuState:
    """The state `saved`, over `first`, with which a new domain begins; ValueError for what ring 3 cannot be in."""
    user_gs = saved.msrs.get(msr.IA32_KERNEL_GS_BASE, 0)
    wrong = {
        "CS": saved.cs.selector & 3 != 3 or saved.cs.attributes & _CODE_BITS != _CODE,
        "SS": saved.ss.selector & 3 != 3 or saved.ss.attributes & _STACK_BITS != _STACK,
        "RFLAGS": saved.rflags & ~LOADED != IF | FIXED,
        "CR0": (saved.cr0 ^ first.cr0) & ~CR0_TS,
        "CR4": (saved.cr4 ^ first.cr4) & ~CR4_FSGSBASE,
        "EFER": saved.efer != first.efer,
        "XCR0": not xcr0_is_valid(saved.xcr0, xcr0_supported),
        "the user's GS base": not is_canonical(user_gs, _LINEAR_BITS),
        "events": saved.interrupts_pending or saved.exception_pending is not None or saved.nmi_pending,
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"no domain's processor is in such a state: {', '.join(found)}")
    msrs = {index: value for index, value in saved.msrs.items() if index in MITIGATIONS}
    return replace(
        first,
        gpr=saved.gpr,
        rip=saved.rip,
        rflags=saved.rflags,
        cr0=saved.cr0,
        cr4=saved.cr4,
        xcr0=saved.xcr0,
        pkru=saved.pkru,
        xsave=saved.xsave,
        halted=saved.halted,
        msrs={**msrs, msr.IA32_KERNEL_GS_BASE: user_gs},
        **{name: getattr(saved, name) for name in SEGMENT_NAMES},
    )
