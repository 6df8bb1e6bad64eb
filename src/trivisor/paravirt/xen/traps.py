"""Entering the guest's kernel and leaving it: Xen's frames on its stack (Xen, create_bounce_frame and do_iret)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from trivisor.machine.deprivileged import CS, SS
from trivisor.paravirt.xen.abi import FLAT_RING3_CS64, FLAT_RING3_SS, VGCF_IN_SYSCALL, VMASST_ARCHITECTURAL_IOPL
from trivisor.paravirt.xen.errors import DomainCrash
from trivisor.x86.exceptions import GENERAL_PROTECTION, GuestException
from trivisor.x86.flags import AC, DF, FIXED, IF, IOPL, NT, RF, STATUS, TF, VM
from trivisor.x86.paging import is_canonical

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R11 = 11
_CLEARED = AC | VM | RF | NT | TF
"""Flags that entering the kernel clears."""
LOADED = STATUS | TF | DF | NT | RF | AC | 1 << 21
"""Flags that the iret hypercall loads; IF goes into the upcall mask."""
_FRAME = struct.Struct("<7Q")
_FRAME_WITH_ERROR = struct.Struct("<8Q")
_IRET = struct.Struct("<9Q")
_MASK64 = (1 << 64) - 1


def enter_kernel(
    domain: Domain,
    address: int,
    *,
    masks_events: bool,
    error_code: int | None = None,
    mask_flags: int = 0,
    selectors: tuple[int, int] | None = None,
) -> None:
    """Have the guest go on at `address` in its kernel, with a frame on its stack that tells where it was.

    The frame, from its lowest address: rcx, r11, the error code if there is
    one, rip, cs with the event mask in bits 32 to 39, rflags with IF for an
    event mask of 0, rsp, ss.  `mask_flags` are flags to clear beside the usual ones,
    `selectors` what the frame has for cs and ss if not the processor's.
    """
    cpu, state = domain.cpu, domain.state
    registers = cpu.registers
    selector, stack_selector = selectors or (cpu.selector(CS), cpu.selector(SS))
    flags, pointer = cpu.rflags, registers[RSP]
    stack = pointer
    if state.in_kernel:
        selector &= ~3
    else:
        domain.switch_mode()
        stack = state.kernel_stack
    info = domain.events.vcpu_info
    mask = domain.view[info + 1]
    shown = flags & ~(IF | IOPL) | (0 if mask else IF)
    if VMASST_ARCHITECTURAL_IOPL in state.assists:
        shown |= state.iopl << 12
    tail = (cpu.rip, selector | mask << 32, shown, pointer, stack_selector)
    if error_code is None:
        frame = _FRAME.pack(registers[RCX], registers[R11], *tail)
    else:
        frame = _FRAME_WITH_ERROR.pack(registers[RCX], registers[R11], error_code, *tail)
    stack = (stack & ~15) - len(frame) & _MASK64
    if not address:
        raise DomainCrash("the guest has no handler for what happened")
    try:
        cpu.store(stack, frame)
    except GuestException:
        raise DomainCrash(f"the guest's kernel stack at {stack:#x} cannot be written") from None
    registers[RSP] = stack
    cpu.rip = address
    cpu.rflags = flags & ~(_CLEARED | mask_flags)
    cpu.set_flat(FLAT_RING3_CS64, FLAT_RING3_SS)
    if masks_events:
        domain.view[info + 1] = 1


def iret(domain: Domain) -> int:
    """The iret hypercall: back to where a frame on the stack says; returns what rax is then."""
    cpu, state = domain.cpu, domain.state
    registers = cpu.registers
    try:
        frame = cpu.load(registers[RSP], 72)
    except GuestException:
        raise DomainCrash("the frame of an iret hypercall cannot be read") from None
    rax, r11, rcx, flags, rip, cs, rflags, rsp, ss = _IRET.unpack(frame)
    to_user = cs & 3 == 3
    if to_user:
        if not state.user_root:
            raise DomainCrash("iret to user mode without a page table for it")
        domain.switch_mode()
    if VMASST_ARCHITECTURAL_IOPL in state.assists:
        state.iopl = (rflags & IOPL) >> 12
        domain.io_privilege_changed()
    registers[RSP] = rsp
    cpu.rip = rip
    cpu.rflags = rflags & LOADED | IF | FIXED
    registers[RCX], registers[R11] = rcx, r11
    domain.view[domain.events.vcpu_info + 1] = 0 if rflags & IF else 1
    code, stack = cs & 0xFFFF | 3, ss & 0xFFFF | 3
    if flags & VGCF_IN_SYSCALL:
        registers[RCX], registers[R11] = rip, rflags & LOADED | IF | FIXED
        code, stack = FLAT_RING3_CS64, FLAT_RING3_SS
    try:
        _load_segments(domain, code, stack)
        if not is_canonical(rip):
            raise GuestException(GENERAL_PROTECTION, 0)
    except GuestException as why:
        # What the processor's own IRET would not go back to: the exception is as if it came from there (iret_to_guest).
        domain.deliver(why.vector, why.error_code, selectors=(code, stack))
    return int(rax)


def _load_segments(domain: Domain, code: int, stack: int) -> None:
    """CS and SS as the frame wants them; raises GuestException."""
    cpu = domain.cpu
    if domain.is_flat(code, stack):
        cpu.set_flat(code, stack)
        return
    cpu.load_segment(CS, code)
    cpu.load_segment(SS, stack)
