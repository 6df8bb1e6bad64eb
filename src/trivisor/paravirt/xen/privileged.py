"""Instructions that a PV guest may still use though they trap: the hypervisor does them (Xen, pv/emul-priv-op.c).

Privileged ones at CPL 3, and CPUID behind the forced-emulation prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, Mnemonic, OpKind, Register, RegisterExt

from trivisor.machine.deprivileged import FS, GS
from trivisor.machine.vcpu import GeneralProtection
from trivisor.paravirt.xen.abi import ENODEV, FORCED_EMULATION
from trivisor.paravirt.xen.debug_registers import debug_register, ports_hit, set_debug_register
from trivisor.paravirt.xen.decode import fetch, memory_address
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.hypercalls.mmu import load_kernel_root
from trivisor.x86 import msr
from trivisor.x86.control import CR0_TS, CR4_FSGSBASE, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, xcr0_is_valid
from trivisor.x86.exceptions import DEBUG, INVALID_OPCODE, GuestException
from trivisor.x86.iced_types import RegisterNumber
from trivisor.x86.paging import is_canonical

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain

_Handler = Callable[["Domain", Instruction], bool]
_MASK32 = 0xFFFFFFFF
_RAX, _RCX, _RDX, _RBX = range(4)
_EFER = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
_MISC_ENABLE_FAST_STRINGS = 1
_PAT_OF_XEN = 0x050100070406
"""The page attribute table that Xen gives its PV guests: WB, WT, UC-, UC, WC, WP."""
MITIGATIONS = frozenset({msr.IA32_SPEC_CTRL, msr.IA32_PRED_CMD, msr.IA32_FLUSH_CMD, msr.IA32_ARCH_CAPABILITIES})
"""Those that the guest looks after itself, as its CPUID tells."""
_CR = {Register.CR0: 0, Register.CR2: 2, Register.CR3: 3, Register.CR4: 4, Register.CR8: 8}


def forced(domain: Domain) -> bool:
    """CPUID behind the forced-emulation prefix; False if that is not what stands at rip."""
    cpu = domain.cpu
    try:
        if cpu.load(cpu.rip, len(FORCED_EMULATION)) != FORCED_EMULATION:
            return False
    except GuestException:
        return False
    instruction = fetch(cpu, cpu.rip + len(FORCED_EMULATION))
    if instruction is None or instruction.code != Code.CPUID:
        return False
    _cpuid(domain, instruction)
    cpu.rip = instruction.next_ip
    return True


def execute(domain: Domain) -> bool:
    """The instruction at rip has raised #GP: do it if it is one that a PV guest may use; False to let it have #GP."""
    instruction = fetch(domain.cpu, domain.cpu.rip)
    if instruction is None:
        return False
    mnemonic = instruction.mnemonic
    handler = _ANYWHERE.get(mnemonic)
    if handler is None and domain.state.in_kernel:
        handler = _IN_KERNEL.get(mnemonic)
    if handler is None or not handler(domain, instruction):
        return False
    if domain.cpu.rip == instruction.ip:
        domain.cpu.rip = instruction.next_ip
    if mnemonic in (Mnemonic.IN, Mnemonic.OUT):
        _strike_port_breakpoints(domain, instruction)
    return True


def _strike_port_breakpoints(domain: Domain, instruction: Instruction) -> None:
    """#DB after IN or OUT of a port that is watched."""
    cpu = domain.cpu
    port_operand = 1 if instruction.mnemonic == Mnemonic.IN else 0
    by_register = instruction.op_kind(port_operand) == OpKind.REGISTER
    port = cpu.registers[_RDX] & 0xFFFF if by_register else instruction.immediate8
    data: RegisterNumber = instruction.op0_register if port_operand else instruction.op1_register
    if bits := ports_hit(domain, port, RegisterExt.size(data)):
        cpu.set_debug_register(6, cpu.dr[6] & ~0xF | bits)
        domain.deliver(DEBUG)


# -- instructions; each returns False to let the guest have #GP ---------------------------------------------


def _cpuid(domain: Domain, instruction: Instruction) -> bool:
    registers = domain.cpu.registers
    results = domain.cpu.guest_cpuid(registers[_RAX] & _MASK32, registers[_RCX] & _MASK32)
    for register, value in zip((_RAX, _RBX, _RCX, _RDX), results, strict=True):
        registers[register] = value & _MASK32
    return True


def _io_allowed(domain: Domain) -> bool:
    return domain.kernel_may_do_io if domain.state.in_kernel else domain.state.iopl == 3


def _in(domain: Domain, instruction: Instruction) -> bool:
    """No port is there, so all of them read as ones."""
    if not _io_allowed(domain):
        return False
    registers = domain.cpu.registers
    match instruction.op0_register:
        case Register.AL:
            registers[_RAX] |= 0xFF
        case Register.AX:
            registers[_RAX] |= 0xFFFF
        case _:
            registers[_RAX] = _MASK32
    return True


def _out(domain: Domain, instruction: Instruction) -> bool:
    return _io_allowed(domain)


def _interrupt_flag(domain: Domain, instruction: Instruction) -> bool:
    """CLI and STI do nothing where they are allowed: POPF could not undo them, since it does not trap (as on Xen)."""
    return _io_allowed(domain)


def _halt(domain: Domain, instruction: Instruction) -> bool:
    domain.view[domain.events.vcpu_info + 1] = 0
    domain.block()
    return True


def _nothing(domain: Domain, instruction: Instruction) -> bool:
    return True


def _clts(domain: Domain, instruction: Instruction) -> bool:
    domain.cpu.fpu_disabled = False
    return True


def _invlpg(domain: Domain, instruction: Instruction) -> bool:
    domain.invalidate(memory_address(domain.cpu, instruction))
    return True


def _register_number(register: int) -> int:
    return register - Register.RAX if Register.RAX <= register <= Register.R15 else register - Register.EAX


def _mov(domain: Domain, instruction: Instruction) -> bool:
    """To and from control and debug registers."""
    source, target = instruction.op1_register, instruction.op0_register
    registers = domain.cpu.registers
    if source in _CR:
        value = _read_control(domain, _CR[source])
        if value is not None:
            registers[_register_number(target)] = value
        return value is not None
    if target in _CR:
        return _write_control(domain, _CR[target], registers[_register_number(source)])
    if Register.DR0 <= source <= Register.DR7:
        held = debug_register(domain, source - Register.DR0)
        if held is None:
            domain.deliver(INVALID_OPCODE)
        else:
            registers[_register_number(target)] = held
        return True
    if Register.DR0 <= target <= Register.DR7:
        error = set_debug_register(domain, target - Register.DR0, registers[_register_number(source)])
        if error == ENODEV:
            domain.deliver(INVALID_OPCODE)
        return error in (0, ENODEV)
    return False


def _read_control(domain: Domain, number: int) -> int | None:
    state = domain.state
    match number:
        case 0:
            return state.cr0 & ~CR0_TS | (CR0_TS if domain.cpu.fpu_disabled else 0)
        case 2:
            return state.cr2
        case 3:
            return state.kernel_root << 12
        case 4:
            return state.cr4
    return None


def _write_control(domain: Domain, number: int, value: int) -> bool:
    state = domain.state
    match number:
        case 0:
            if (value ^ state.cr0) & ~CR0_TS:
                return False
            domain.cpu.fpu_disabled = bool(value & CR0_TS)
        case 2:
            state.cr2 = value
        case 3:
            try:
                load_kernel_root(domain, value >> 12)
            except HypercallError:
                return False
        case 4:
            state.cr4 = value
            domain.cpu.fsgsbase = bool(value & CR4_FSGSBASE)
        case _:
            return False
    return True


def _rdmsr(domain: Domain, instruction: Instruction) -> bool:
    registers = domain.cpu.registers
    value = _read_msr(domain, registers[_RCX] & _MASK32)
    if value is None:
        return False
    registers[_RAX], registers[_RDX] = value & _MASK32, value >> 32
    return True


def _read_msr(domain: Domain, index: int) -> int | None:
    cpu = domain.cpu
    match index:
        case msr.IA32_FS_BASE:
            return cpu.base(FS)
        case msr.IA32_GS_BASE:
            return cpu.base(GS)
        case msr.IA32_KERNEL_GS_BASE:
            return domain.cpu.other_gs
        case msr.IA32_EFER:
            return _EFER
        case msr.IA32_PAT:
            return _PAT_OF_XEN
        case msr.IA32_TIME_STAMP_COUNTER:
            return cpu.tsc()
        case msr.IA32_MISC_ENABLE:
            return _MISC_ENABLE_FAST_STRINGS
        case msr.IA32_BIOS_SIGN_ID | msr.IA32_DEBUGCTL:
            return 0  # no microcode update; nothing is recorded
    if index in MITIGATIONS:
        try:
            return cpu.read_msr(index)
        except GeneralProtection:
            return None
    return None


def _wrmsr(domain: Domain, instruction: Instruction) -> bool:
    registers = domain.cpu.registers
    index = registers[_RCX] & _MASK32
    value = registers[_RAX] & _MASK32 | (registers[_RDX] & _MASK32) << 32
    return _write_msr(domain, index, value)


def _write_msr(domain: Domain, index: int, value: int) -> bool:
    cpu = domain.cpu
    match index:
        case msr.IA32_FS_BASE | msr.IA32_GS_BASE | msr.IA32_KERNEL_GS_BASE if not is_canonical(value):
            return False
        case msr.IA32_FS_BASE:
            cpu.set_base(FS, value)
        case msr.IA32_GS_BASE:
            cpu.set_base(GS, value)
        case msr.IA32_KERNEL_GS_BASE:
            domain.cpu.other_gs = value
        case _ if index in MITIGATIONS:
            try:
                cpu.write_msr(index, value)
            except GeneralProtection:
                return False
        case _:  # the value that it has already may be written
            return _read_msr(domain, index) == value
    return True


def _xsetbv(domain: Domain, instruction: Instruction) -> bool:
    cpu = domain.cpu
    registers = cpu.registers
    value = registers[_RAX] & _MASK32 | (registers[_RDX] & _MASK32) << 32
    if registers[_RCX] & _MASK32 or not xcr0_is_valid(value, cpu.xcr0_supported):
        return False
    cpu.xcr0 = value
    return True


_ANYWHERE: dict[int, _Handler] = {
    Mnemonic.IN: _in,
    Mnemonic.OUT: _out,
    Mnemonic.CPUID: _cpuid,
    Mnemonic.CLI: _interrupt_flag,
    Mnemonic.STI: _interrupt_flag,
}
_IN_KERNEL: dict[int, _Handler] = {
    Mnemonic.HLT: _halt,
    Mnemonic.WBINVD: _nothing,
    Mnemonic.INVD: _nothing,
    Mnemonic.CLTS: _clts,
    Mnemonic.INVLPG: _invlpg,
    Mnemonic.MOV: _mov,
    Mnemonic.RDMSR: _rdmsr,
    Mnemonic.WRMSR: _wrmsr,
    Mnemonic.XSETBV: _xsetbv,
}
