"""CPUID, model-specific registers, time stamps and the FS and GS bases.

Intel SDM 2A to 2D under each instruction's name; MSRs in SDM 4, table 2-2.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Code, Instruction

from trivisor.machine.exits import CpuidExit, MsrRead, MsrWrite
from trivisor.machine.vcpu import GeneralProtection
from trivisor.translation.core import FS, GS, RAX, RBX, RCX, RDX
from trivisor.translation.emulator.contract import Cpu, Handler, has_feature, notify
from trivisor.translation.emulator.operands import (
    MASK32,
    MASK64,
    general_protection,
    in_64bit_mode,
    invalid_opcode,
    is_canonical,
    read_operand,
    write_operand,
)
from trivisor.x86 import msr
from trivisor.x86.control import (
    CR0_PG,
    CR4_FSGSBASE,
    CR4_TSD,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    EFER_VALID,
)

Reader = Callable[[Cpu], int]
Writer = Callable[[Cpu, int], None]


def _read_efer(cpu: Cpu) -> int:
    return int(cpu.core.efer)


def _write_efer(cpu: Cpu, value: int) -> None:
    core = cpu.core
    old = core.efer
    changed = (value ^ old) & ~EFER_LMA
    brought = value & ~old
    if value & ~EFER_VALID or (changed & EFER_LME and core.cr0 & CR0_PG):
        raise GeneralProtection
    wants = ((EFER_NXE, "nx"), (EFER_LME, "lm"), (EFER_SCE, "syscall"))
    if any(brought & bit and not has_feature(cpu, name) for bit, name in wants):
        raise GeneralProtection
    core.efer = value & ~EFER_LMA | old & EFER_LMA
    if changed & EFER_NXE:
        cpu.flush_tlb(keep_global=False)
    cpu.mode_changed()


def _field(name: str, mask: int, *, canonical: bool = False) -> tuple[Reader, Writer]:
    """An MSR that is a field of the core; values with bits outside `mask` or not canonical are #GP."""

    def read(cpu: Cpu) -> int:
        return int(getattr(cpu.core, name))

    def write(cpu: Cpu, value: int) -> None:
        if value & ~mask or (canonical and not is_canonical(value)):
            raise GeneralProtection
        setattr(cpu.core, name, value)

    return read, write


def _segment_base(index: int) -> tuple[Reader, Writer]:
    def read(cpu: Cpu) -> int:
        return cpu.core.segments[index].base

    def write(cpu: Cpu, value: int) -> None:
        if not is_canonical(value):
            raise GeneralProtection
        cpu.core.segments[index].base = value

    return read, write


def _need_pks(cpu: Cpu) -> None:
    if not has_feature(cpu, "pks"):
        raise GeneralProtection


def _read_pkrs(cpu: Cpu) -> int:
    _need_pks(cpu)
    return int(cpu.core.pkrs)


def _write_pkrs(cpu: Cpu, value: int) -> None:
    _need_pks(cpu)
    if value > MASK32:
        raise GeneralProtection
    cpu.core.pkrs = value
    cpu.flush_tlb(keep_global=False)
    cpu.mode_changed()


def _read_tsc(cpu: Cpu) -> int:
    return cpu.tsc()


def _write_tsc(cpu: Cpu, value: int) -> None:
    _move_tsc(cpu, value - cpu.tsc())


def _write_tsc_adjust(cpu: Cpu, value: int) -> None:
    _move_tsc(cpu, value - cpu.core.tsc_adjust)


def _move_tsc(cpu: Cpu, by: int) -> None:
    """Writes to the TSC and to TSC_ADJUST move both (Intel SDM 3B 18.17.3)."""
    core = cpu.core
    core.tsc_offset = (core.tsc_offset + by) & MASK64
    core.tsc_adjust = (core.tsc_adjust + by) & MASK64
    cpu.board.tsc_changed()


CORE_MSRS: dict[int, tuple[Reader, Writer]] = {
    msr.IA32_TIME_STAMP_COUNTER: (_read_tsc, _write_tsc),
    msr.IA32_TSC_ADJUST: (lambda cpu: int(cpu.core.tsc_adjust), _write_tsc_adjust),
    msr.IA32_SYSENTER_CS: _field("sysenter_cs", MASK32),
    msr.IA32_SYSENTER_ESP: _field("sysenter_esp", MASK64, canonical=True),
    msr.IA32_SYSENTER_EIP: _field("sysenter_eip", MASK64, canonical=True),
    msr.IA32_EFER: (_read_efer, _write_efer),
    msr.IA32_STAR: _field("star", MASK64),
    msr.IA32_LSTAR: _field("lstar", MASK64, canonical=True),
    msr.IA32_CSTAR: _field("cstar", MASK64, canonical=True),
    msr.IA32_FMASK: _field("fmask", MASK32),
    msr.IA32_FS_BASE: _segment_base(FS),
    msr.IA32_GS_BASE: _segment_base(GS),
    msr.IA32_KERNEL_GS_BASE: _field("kernel_gs_base", MASK64, canonical=True),
    msr.IA32_PKRS: (_read_pkrs, _write_pkrs),
    msr.IA32_TSC_AUX: _field("tsc_aux", MASK32),
}
"""The MSRs that live in the state block; writers raise `machine.vcpu.GeneralProtection`."""


def read_msr(cpu: Cpu, index: int) -> int:
    """An MSR, wherever it lives; raises `machine.vcpu.GeneralProtection`."""
    known = CORE_MSRS.get(index)
    if known is not None:
        return known[0](cpu)
    outside = cpu.board.msrs.get(index)
    return outside[0]() if outside is not None else cpu.msrs.read(index)


def write_msr(cpu: Cpu, index: int, value: int) -> None:
    """Write an MSR, wherever it lives; raises `machine.vcpu.GeneralProtection`."""
    known = CORE_MSRS.get(index)
    if known is not None:
        known[1](cpu, value)
        return
    outside = cpu.board.msrs.get(index)
    if outside is not None:
        outside[1](value)
    else:
        cpu.msrs.write(index, value)


def _rdmsr(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    if core.cpl:
        raise general_protection()
    regs = core.regs
    index = regs[RCX] & MASK32
    value: int | None
    try:
        value = read_msr(cpu, index)
    except GeneralProtection:
        value = None
    if MsrRead in cpu.observed:
        notify(cpu, MsrRead(index, value))
    if value is None:
        raise general_protection()
    regs[RAX] = value & MASK32
    regs[RDX] = value >> 32 & MASK32


def _wrmsr(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    if core.cpl:
        raise general_protection()
    regs = core.regs
    index = regs[RCX] & MASK32
    value = (regs[RDX] & MASK32) << 32 | regs[RAX] & MASK32
    accepted = True
    try:
        write_msr(cpu, index, value)
    except GeneralProtection:
        accepted = False
    if MsrWrite in cpu.observed:
        notify(cpu, MsrWrite(index, value, accepted))
    if not accepted:
        raise general_protection()


def _cpuid(cpu: Cpu, instruction: Instruction) -> None:
    regs = cpu.core.regs
    leaf, subleaf = regs[RAX] & MASK32, regs[RCX] & MASK32
    result = cpu.cpuid(leaf, subleaf)
    regs[RAX], regs[RBX], regs[RCX], regs[RDX] = result
    if CpuidExit in cpu.observed:
        notify(cpu, CpuidExit(leaf, subleaf, result))


def _rdtsc(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    if core.cpl and core.cr4 & CR4_TSD:
        raise general_protection()
    value = cpu.tsc()
    core.regs[RAX] = value & MASK32
    core.regs[RDX] = value >> 32 & MASK32


def _rdtscp(cpu: Cpu, instruction: Instruction) -> None:
    if not has_feature(cpu, "rdtscp"):
        raise invalid_opcode()
    _rdtsc(cpu, instruction)
    cpu.core.regs[RCX] = cpu.core.tsc_aux & MASK32


def _rdpid(cpu: Cpu, instruction: Instruction) -> None:
    if not has_feature(cpu, "rdpid"):
        raise invalid_opcode()
    write_operand(cpu, instruction, 0, 8, cpu.core.tsc_aux)


def _rdpmc(cpu: Cpu, instruction: Instruction) -> None:
    """There are no performance counters, so every index is wrong."""
    raise general_protection()


def _base_allowed(cpu: Cpu) -> None:
    if not (cpu.core.cr4 & CR4_FSGSBASE and in_64bit_mode(cpu.core)):
        raise invalid_opcode()


def _read_base(index: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        _base_allowed(cpu)
        write_operand(cpu, instruction, 0, 8, cpu.core.segments[index].base)

    return execute


def _write_base(index: int, size: int) -> Handler:
    def execute(cpu: Cpu, instruction: Instruction) -> None:
        _base_allowed(cpu)
        value = read_operand(cpu, instruction, 0, size)
        if not is_canonical(value):
            raise general_protection()
        cpu.core.segments[index].base = value

    return execute


def _swapgs(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    if not in_64bit_mode(core):
        raise invalid_opcode()
    if core.cpl:
        raise general_protection()
    gs = core.segments[GS]
    gs.base, core.kernel_gs_base = core.kernel_gs_base, gs.base


STRAIGHT: dict[int, Handler] = {
    Code.CPUID: _cpuid,
    Code.RDMSR: _rdmsr,
    Code.WRMSR: _wrmsr,
    Code.RDTSC: _rdtsc,
    Code.RDTSCP: _rdtscp,
    Code.RDPID_R32: _rdpid,
    Code.RDPID_R64: _rdpid,
    Code.RDPMC: _rdpmc,
    Code.RDFSBASE_R32: _read_base(FS),
    Code.RDFSBASE_R64: _read_base(FS),
    Code.RDGSBASE_R32: _read_base(GS),
    Code.RDGSBASE_R64: _read_base(GS),
    Code.WRFSBASE_R32: _write_base(FS, 4),
    Code.WRFSBASE_R64: _write_base(FS, 8),
    Code.WRGSBASE_R32: _write_base(GS, 4),
    Code.WRGSBASE_R64: _write_base(GS, 8),
    Code.SWAPGS: _swapgs,
}
