"""INT and IRET in all their forms, fast system calls, HLT and the flag register.

Intel SDM 2A (INT n, IRET), 2B (POPF, SYSCALL, SYSENTER and their returns); 3A 5.8.7 and 5.8.8.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction

from trivisor.machine.exits import Exit, Halt
from trivisor.translation.core import CS, DS, ES, FS, GS, RCX, RDX, RSP, SS, Core
from trivisor.translation.emulator import segments
from trivisor.translation.emulator.contract import Cpu, Handler, has_feature
from trivisor.translation.emulator.control_instructions import privileged
from trivisor.translation.emulator.debug_exceptions import debug_exception, trap_by_flags_now
from trivisor.translation.emulator.events import deliver
from trivisor.translation.emulator.far_transfers import check_target, finish_return, return_code, return_stack
from trivisor.translation.emulator.operands import (
    MASK16,
    MASK32,
    MASK64,
    general_protection,
    in_64bit_mode,
    invalid_opcode,
    is_canonical,
    memory_address,
    next_rip,
    read_register,
)
from trivisor.translation.emulator.stack import push, release, top
from trivisor.translation.emulator.task_switch import return_to_previous
from trivisor.x86.control import CR0_PE, CR4_PVI, EFER_LMA, EFER_SCE
from trivisor.x86.descriptors import SELECTOR_RPL
from trivisor.x86.exceptions import BOUND_RANGE, BREAKPOINT, DEBUG, OVERFLOW, GuestException
from trivisor.x86.flags import (
    AC,
    DF,
    FIXED,
    ID,
    IF,
    IOPL,
    IOPL_SHIFT,
    NT,
    OF,
    RF,
    STATUS,
    TF,
    VALID,
    VIF,
    VIP,
    VM,
)

_POPPED = STATUS | TF | DF | NT | AC | ID
"""The flags that POPF and IRET load at any privilege level (AC and ID with 32 bits and more)."""
_INTEL = 0x756E6547
"""EBX of CPUID leaf 0 in "GenuineIntel"."""

# Attributes of the flat segments that fast system calls load: P, S, type, DPL, and G, D/B or L.
_KERNEL_CODE64, _KERNEL_CODE32, _KERNEL_DATA = 0xA09B, 0xC09B, 0xC093
_USER_CODE64, _USER_CODE32, _USER_DATA = 0xA0FB, 0xC0FB, 0xC0F3


def _virtual_8086_sensitive(core: Core) -> None:
    """Raise #GP(0) in virtual-8086 mode with IOPL below 3, where monitors want to see the flags (SDM 3B 20.2.8)."""
    if core.rflags & VM and core.rflags & IOPL != IOPL:
        raise general_protection()


def _interrupt(cpu: Cpu, instruction: Instruction) -> None:
    _virtual_8086_sensitive(cpu.core)
    deliver(cpu, instruction.immediate8, software=True, return_rip=next_rip(cpu.core, instruction))


def _breakpoint(cpu: Cpu, instruction: Instruction) -> None:
    deliver(cpu, BREAKPOINT, software=True, return_rip=next_rip(cpu.core, instruction))


def _int1(cpu: Cpu, instruction: Instruction) -> None:
    """A trap like the hardware's: the gate's DPL does not count, and what MOV SS has held up comes with it."""
    core = cpu.core
    if core.debug.pending:
        debug_exception(core, core.debug.take())
    deliver(cpu, DEBUG, return_rip=next_rip(cpu.core, instruction))


def _into(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    following = next_rip(core, instruction)
    if core.rflags & OF:
        deliver(cpu, OVERFLOW, software=True, return_rip=following)
    else:
        core.rip = following


def _bound(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        bounds = cpu.load(memory_address(cpu.core, instruction, 2 * size), 2 * size)
        sign = 1 << 8 * size - 1
        mask = 2 * sign - 1
        # flipping the sign bit turns signed order into unsigned order
        index = read_register(cpu.core, instruction.op0_register) ^ sign
        if not (bounds & mask) ^ sign <= index <= (bounds >> 8 * size) ^ sign:
            raise GuestException(BOUND_RANGE)

    return execute


def _popped_flags(core: Core, image: int, size: int, *, iret: bool) -> int:
    """RFLAGS after POPF or IRET at the current privilege level takes `image`."""
    cpl = core.cpl
    old = core.rflags
    mask = _POPPED
    if not core.cr0 & CR0_PE:
        cpl = 0
    if cpl <= (old & IOPL) >> IOPL_SHIFT:
        mask |= IF
    if cpl == 0:
        mask |= IOPL
        if iret:
            mask |= VIF | VIP
    if iret:
        mask |= RF
    else:
        old &= ~RF
    if size == 2:
        mask &= MASK16
    return old & ~mask | image & mask | FIXED


def _iret(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        if segments.has_segment_protection(core):
            _iret_protected(cpu, size, next_rip(core, instruction))
        else:
            _virtual_8086_sensitive(core)
            _iret_real(cpu, size)
        core.nmi_blocked = False
        cpu.mode_changed()

    return execute


def _iret_real(cpu: Cpu, size: int) -> None:
    core = cpu.core
    rip, selector, image = top(cpu, size, 3)
    if rip > core.segments[CS].limit:
        raise general_protection()
    release(core, 3 * size)
    segments.load_real(cpu, CS, selector & MASK16)
    core.rip = rip
    core.rflags = _popped_flags(core, image, size, iret=True)


def _iret_protected(cpu: Cpu, size: int, following: int) -> None:
    core = cpu.core
    old_flags = core.rflags
    if old_flags & NT:
        if core.efer & EFER_LMA:
            raise general_protection()
        return_to_previous(cpu, following)
        return
    rip, selector, image = top(cpu, size, 3)
    selector &= MASK16
    if size >= 4 and image & VM and core.cpl == 0 and not core.efer & EFER_LMA:
        _iret_virtual_8086(cpu)
        return
    descriptor, address = return_code(cpu, selector)
    cpl = selector & SELECTOR_RPL
    outer = cpl > core.cpl
    flags = _popped_flags(core, image, size, iret=True)
    check_target(core, descriptor, rip)
    if outer or in_64bit_mode(core):
        pointer, stack_selector = top(cpu, size, 2, skip=3 * size)
        stack_selector &= MASK16
        stack = return_stack(cpu, stack_selector, cpl, descriptor)
        finish_return(cpu, (selector, descriptor, address, rip), (stack_selector, stack, pointer), outer)
    else:
        segments.mark_accessed(cpu, descriptor, address)
        release(core, 3 * size)
        segments.set_code(core, selector, descriptor, cpl)
        core.rip = rip
    core.rflags = flags


def _iret_virtual_8086(cpu: Cpu) -> None:
    """IRETD at CPL 0 to virtual-8086 mode: nine doublewords, and no descriptors (SDM 3B 20.2.5)."""
    core = cpu.core
    rip, cs, flags, pointer, ss, es, ds, fs, gs = top(cpu, 4, 9)
    if rip > MASK16:
        raise general_protection()
    core.rflags = flags & VALID | FIXED
    core.cpl = 3
    for index, selector in ((CS, cs), (SS, ss), (ES, es), (DS, ds), (FS, fs), (GS, gs)):
        segments.set_virtual(core, index, selector & MASK16)
    core.regs[RSP] = pointer
    core.rip = rip


def _hlt(cpu: Cpu, instruction: Instruction) -> Exit:
    privileged(cpu.core)
    return Halt(bool(cpu.core.rflags & IF))


def _may_change_if(core: Core) -> bool:
    return not core.cr0 & CR0_PE or core.cpl <= (core.rflags & IOPL) >> IOPL_SHIFT


def _virtual_if(core: Core) -> bool:
    """Whether CLI and STI work on VIF: ring 3 with CR4.PVI (SDM 3B 20.4)."""
    return core.cpl == 3 and bool(core.cr4 & CR4_PVI) and not core.rflags & VM


def _cli(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    if _may_change_if(core):
        core.interrupt_flag = 0
    elif _virtual_if(core):
        core.rflags &= ~VIF
    else:
        raise general_protection()


def _sti(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    if _may_change_if(core):
        if not core.rflags & IF:
            core.rflags |= IF
            core.interrupt_shadow = True
    elif _virtual_if(core) and not core.rflags & VIP:
        core.rflags |= VIF
    else:
        raise general_protection()


def _pushf(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        flags = core.rflags
        _virtual_8086_sensitive(core)
        push(cpu, size, flags & ~(RF | VM))

    return execute


def _popf(size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        old = core.rflags
        _virtual_8086_sensitive(core)
        (image,) = top(cpu, size, 1)
        core.rflags = _popped_flags(core, image, size, iret=False)
        release(core, size)
        if (old ^ image) & (TF | AC):
            cpu.mode_changed()

    return execute


def _set_ac(value: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        if core.cpl or not has_feature(cpu, "smap"):
            raise invalid_opcode()
        core.rflags = core.rflags & ~AC | value

    return execute


def _set_flat(
    core: Core, code: int, code_attributes: int, stack: int, stack_attributes: int, cpl: int
) -> None:
    core.segments[CS].set(code, 0, MASK32, code_attributes)
    core.segments[SS].set(stack, 0, MASK32, stack_attributes)
    core.cpl = cpl


def _syscall(cpu: Cpu, instruction: Instruction) -> None:
    """Intel's processors know it in 64-bit mode only, AMD's in all of protected mode (AMD APM 3)."""
    core = cpu.core
    wide = in_64bit_mode(core)
    if not core.efer & EFER_SCE or not (wide or core.efer & EFER_LMA):
        raise invalid_opcode()
    if not wide and cpu.cpuid(0, 0)[1] == _INTEL:
        raise invalid_opcode()
    flags = core.rflags & ~RF
    core.regs[RCX] = next_rip(core, instruction)
    core.regs[11] = flags
    core.rip = core.lstar if wide else core.cstar
    core.rflags = flags & ~(core.fmask | RF)
    trap_by_flags_now(core)
    selector = core.star >> 32 & 0xFFFC
    _set_flat(core, selector, _KERNEL_CODE64, (selector + 8) & MASK16, _KERNEL_DATA, 0)
    cpu.mode_changed()


def _sysret(wide: bool) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        if not core.efer & EFER_SCE or not in_64bit_mode(core):
            raise invalid_opcode()
        privileged(core)
        target = core.regs[RCX]
        if wide and not is_canonical(target):
            raise general_protection()
        selector = core.star >> 48
        stack = (selector + 8 | 3) & MASK16
        code = ((selector + 16 if wide else selector) | 3) & MASK16
        attributes = _USER_CODE64 if wide else _USER_CODE32
        core.rip = target if wide else target & MASK32
        core.rflags = core.regs[11] & 0x3C7FD7 | FIXED
        trap_by_flags_now(core)
        _set_flat(core, code, attributes, stack, _USER_DATA, 3)
        cpu.mode_changed()

    return execute


def _sysenter(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    selector = core.sysenter_cs & 0xFFFC
    if not core.cr0 & CR0_PE or not selector:
        raise general_protection()
    wide = bool(core.efer & EFER_LMA)
    core.rflags &= ~(VM | IF | RF)
    core.regs[RSP] = core.sysenter_esp if wide else core.sysenter_esp & MASK32
    core.rip = core.sysenter_eip if wide else core.sysenter_eip & MASK32
    attributes = _KERNEL_CODE64 if wide else _KERNEL_CODE32
    _set_flat(core, selector, attributes, (selector + 8) & MASK16, _KERNEL_DATA, 0)
    cpu.mode_changed()


def _sysexit(wide: bool) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        core = cpu.core
        if not core.cr0 & CR0_PE or not core.sysenter_cs & 0xFFFC or core.cpl:
            raise general_protection()
        mask = MASK64 if wide else MASK32
        stack_pointer, target = core.regs[RCX] & mask, core.regs[RDX] & mask
        if wide and not (is_canonical(stack_pointer) and is_canonical(target)):
            raise general_protection()
        code = core.sysenter_cs + (32 if wide else 16) | 3
        attributes = _USER_CODE64 if wide else _USER_CODE32
        core.regs[RSP] = stack_pointer
        core.rip = target
        _set_flat(core, code & MASK16, attributes, (code + 8) & MASK16, _USER_DATA, 3)
        cpu.mode_changed()

    return execute


STRAIGHT: dict[int, Handler] = {
    Code.BOUND_R16_M1616: _bound(2),
    Code.BOUND_R32_M3232: _bound(4),
    Code.HLT: _hlt,
    Code.CLI: _cli,
    Code.STI: _sti,
    Code.PUSHFW: _pushf(2),
    Code.PUSHFD: _pushf(4),
    Code.PUSHFQ: _pushf(8),
    Code.POPFW: _popf(2),
    Code.POPFD: _popf(4),
    Code.POPFQ: _popf(8),
    Code.CLAC: _set_ac(0),
    Code.STAC: _set_ac(AC),
}
BRANCHES: dict[int, Handler] = {
    Code.INT_IMM8: _interrupt,
    Code.INT3: _breakpoint,
    Code.INT1: _int1,
    Code.INTO: _into,
    Code.IRETW: _iret(2),
    Code.IRETD: _iret(4),
    Code.IRETQ: _iret(8),
    Code.SYSCALL: _syscall,
    Code.SYSRETD: _sysret(False),
    Code.SYSRETQ: _sysret(True),
    Code.SYSENTER: _sysenter,
    Code.SYSEXITD: _sysexit(False),
    Code.SYSEXITQ: _sysexit(True),
}
