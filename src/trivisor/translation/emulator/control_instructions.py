"""Control and debug registers, XCR0, and the instructions that invalidate the TLB or caches.

Intel SDM 2B, MOV to/from control and debug registers; 3A 2.5, 4.10.4, 17.2.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, Register

from trivisor.translation.core import CS, FS, RAX, RCX, RDX, TR, Core
from trivisor.translation.emulator.contract import Cpu, Handler, has_feature
from trivisor.translation.emulator.debug_exceptions import debug_exception
from trivisor.translation.emulator.operands import (
    MASK32,
    MASK64,
    SEGMENT_INDEX,
    effective_address,
    general_protection,
    in_64bit_mode,
    invalid_opcode,
    is_canonical,
    memory_address,
    read_operand,
    read_register,
    within_limit,
    write_operand,
    write_register,
)
from trivisor.translation.layout import OFFSETS
from trivisor.x86.control import (
    CR0_ET,
    CR0_PAGING,
    CR0_PG,
    CR0_TS,
    CR0_VALID,
    CR3_NO_FLUSH,
    CR3_PCID,
    CR4_BASE,
    CR4_BY_FEATURE,
    CR4_DE,
    CR4_LA57,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PAGING,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PKE,
    CR4_PKS,
    CR4_SMAP,
    CR4_UMIP,
    CR8_VALID,
    DR6_BD,
    DR6_FIXED,
    DR6_VALID,
    DR7_FIXED,
    DR7_GD,
    DR7_VALID,
    EFER_LMA,
    EFER_LME,
    cr0_is_valid,
    cr4_mask,
    xcr0_is_valid,
)
from trivisor.x86.descriptors import LONG, TSS, TYPE
from trivisor.x86.paging import pdptes_are_valid, read_pdptes

_PHYSICAL_LIMIT = OFFSETS["PHYSICAL_LIMIT_MASK"] // 8
_CR4_FLUSH = CR4_PAGING | CR4_SMAP | CR4_PKE | CR4_PKS | CR4_LA57
"""More than the manual's: the software TLB holds permissions, which SMAP and the keys change."""
_CR3_RESERVED_HIGH = 0x7FF << 52


def privileged(core: Core) -> None:
    if core.cpl:
        raise general_protection()


def _check_pdptes(cpu: Cpu, cr3: int) -> None:
    """PAE paging outside long mode reads its four top entries when CR3 is loaded (SDM 3A 4.4.1)."""
    base = cr3 & 0xFFFFFFE0
    if cpu.board.memory.is_ram(base, 32):
        width = cpu.cpuid(0x80000008, 0)[0] & 0xFF or 36
        if not pdptes_are_valid(read_pdptes(cpu.board.memory, base), width):
            raise general_protection()


def write_cr0(cpu: Cpu, value: int) -> None:
    """Load CR0, with long mode's activation; raises #GP(0) (SDM 3A 9.8.5)."""
    core = cpu.core
    if not cr0_is_valid(value):
        raise general_protection()
    value = value & CR0_VALID | CR0_ET
    changed = value ^ core.cr0
    efer = core.efer
    if changed & CR0_PG:
        if value & CR0_PG:
            if efer & EFER_LME:
                tss16 = core.segments[TR].attributes & TYPE < TSS and core.segments[TR].selector & ~3
                if not core.cr4 & CR4_PAE or core.segments[CS].attributes & LONG or tss16:
                    raise general_protection()
                efer |= EFER_LMA
            elif core.cr4 & CR4_PAE:
                _check_pdptes(cpu, core.cr3)
        else:
            if in_64bit_mode(core) or core.cr4 & CR4_PCIDE:
                raise general_protection()
            efer &= ~EFER_LMA
    core.cr0 = value
    core.efer = efer
    if changed & CR0_PAGING:
        cpu.flush_tlb(keep_global=False)
    if changed:
        cpu.mode_changed()


def write_cr3(cpu: Cpu, value: int) -> None:
    core = cpu.core
    cr4 = core.cr4
    keep = False
    if core.efer & EFER_LMA:
        if cr4 & CR4_PCIDE:
            keep = bool(value & CR3_NO_FLUSH)
            value &= ~CR3_NO_FLUSH
        if value & (core.words[_PHYSICAL_LIMIT] | _CR3_RESERVED_HIGH | CR3_NO_FLUSH):
            raise general_protection()
    else:
        value &= MASK32
        if core.cr0 & CR0_PG and cr4 & CR4_PAE:
            _check_pdptes(cpu, value)
    core.cr3 = value
    if not keep:
        cpu.flush_tlb(keep_global=bool(cr4 & CR4_PGE))


def write_cr4(cpu: Cpu, value: int) -> None:
    core = cpu.core
    old = core.cr4
    changed = value ^ old
    long_mode = core.efer & EFER_LMA
    if value & ~(old | CR4_BASE):
        features = frozenset(name for name in CR4_BY_FEATURE if has_feature(cpu, name))
        if value & ~cr4_mask(features):
            raise general_protection()
    if long_mode and (changed & CR4_LA57 or not value & CR4_PAE):
        raise general_protection()
    if changed & value & CR4_PCIDE and (not long_mode or core.cr3 & CR3_PCID):
        raise general_protection()
    if changed & CR4_PAGING and value & CR4_PAE and core.cr0 & CR0_PG and not long_mode:
        _check_pdptes(cpu, core.cr3)
    core.cr4 = value
    if changed & CR4_DE:
        load_breakpoints(cpu)
    if changed & _CR4_FLUSH:
        cpu.flush_tlb(keep_global=False)
    if changed:
        cpu.mode_changed()


def _write_cr2(cpu: Cpu, value: int) -> None:
    cpu.core.cr2 = value


def _write_cr8(cpu: Cpu, value: int) -> None:
    if value & ~CR8_VALID:
        raise general_protection()
    cpu.board.interrupts.cr8 = value


_WRITE = {
    Register.CR0: write_cr0,
    Register.CR2: _write_cr2,
    Register.CR3: write_cr3,
    Register.CR4: write_cr4,
    Register.CR8: _write_cr8,
}
_READ = {
    Register.CR0: "cr0", Register.CR2: "cr2", Register.CR3: "cr3", Register.CR4: "cr4",
}  # fmt: skip


def _mov_to_cr(cpu: Cpu, instruction: Instruction) -> None:
    write = _WRITE.get(instruction.op0_register)
    if write is None:
        raise invalid_opcode()
    core = cpu.core
    privileged(core)
    write(cpu, read_register(core, instruction.op1_register))


def _mov_from_cr(cpu: Cpu, instruction: Instruction) -> None:
    source = instruction.op1_register
    name = _READ.get(source)
    if name is None and source != Register.CR8:
        raise invalid_opcode()
    core = cpu.core
    privileged(core)
    value = cpu.board.interrupts.cr8 if name is None else getattr(core, name)
    write_register(core, instruction.op0_register, value)


def _clts(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    privileged(core)
    if core.cr0 & CR0_TS:
        core.cr0 &= ~CR0_TS
        cpu.mode_changed()


def _lmsw(cpu: Cpu, instruction: Instruction) -> None:
    """Only PE, MP, EM and TS, and PE can be set but not cleared."""
    core = cpu.core
    privileged(core)
    value = read_operand(cpu, instruction, 0, 2)
    write_cr0(cpu, core.cr0 & ~0xE | value & 0xF)


def check_umip(core: Core) -> None:
    """SGDT, SIDT, SLDT, STR and SMSW are privileged under CR4.UMIP."""
    if core.cpl and core.cr4 & CR4_UMIP:
        raise general_protection()


def _smsw(cpu: Cpu, instruction: Instruction) -> None:
    """A register gets as much of CR0 as it holds, memory always 16 bits."""
    check_umip(cpu.core)
    write_operand(cpu, instruction, 0, 2, cpu.core.cr0)


def _debug_register(cpu: Cpu, register: int) -> int:
    """The number of a debug register that may be accessed now: DR4 and DR5 are DR6 and DR7 unless CR4.DE."""
    core = cpu.core
    number = register - Register.DR0
    if number in (4, 5):
        if core.cr4 & CR4_DE:
            raise invalid_opcode()
        number += 2
    if number > 7:
        raise invalid_opcode()
    privileged(core)
    if core.dr[7] & DR7_GD:
        raise debug_exception(core, DR6_BD)
    return number


def _mov_to_dr(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    number = _debug_register(cpu, instruction.op0_register)
    value = read_register(core, instruction.op1_register)
    if number >= 6:
        if value > MASK32:
            raise general_protection()
        value = value & DR6_VALID | DR6_FIXED if number == 6 else value & DR7_VALID | DR7_FIXED
    core.dr[number] = value
    if number != 6:
        load_breakpoints(cpu)


def load_breakpoints(cpu: Cpu) -> None:
    """The debug registers, or CR4.DE, have changed."""
    core = cpu.core
    debug = core.debug
    before = debug.pages
    debug.load(core.dr, core.cr4)
    if debug.pages - before:
        cpu.flush_tlb(keep_global=False)
    cpu.mode_changed()


def _mov_from_dr(cpu: Cpu, instruction: Instruction) -> None:
    number = _debug_register(cpu, instruction.op1_register)
    write_register(cpu.core, instruction.op0_register, cpu.core.dr[number])


def _xgetbv(cpu: Cpu, instruction: Instruction) -> None:
    """XCR0, or with ECX=1 the components in use: all that are enabled, since none is tracked."""
    core = cpu.core
    if not core.cr4 & CR4_OSXSAVE:
        raise invalid_opcode()
    index = core.regs[RCX] & MASK32
    if index > 1 or (index == 1 and not has_feature(cpu, "xgetbv1")):
        raise general_protection()
    core.regs[RAX] = core.xcr0 & MASK32
    core.regs[RDX] = core.xcr0 >> 32


def _xsetbv(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    if not core.cr4 & CR4_OSXSAVE:
        raise invalid_opcode()
    privileged(core)
    low, _, _, high = cpu.cpuid(0xD, 0)
    value = (core.regs[RDX] & MASK32) << 32 | core.regs[RAX] & MASK32
    if core.regs[RCX] & MASK32 or not xcr0_is_valid(value, high << 32 | low):
        raise general_protection()
    core.xcr0 = value
    cpu.mode_changed()


def _invlpg(cpu: Cpu, instruction: Instruction) -> None:
    """No segment checks; an address that is not canonical does nothing."""
    core = cpu.core
    privileged(core)
    linear = effective_address(core, instruction)
    segment = SEGMENT_INDEX[instruction.memory_segment]
    if in_64bit_mode(core):
        linear = (linear + (core.segments[segment].base if segment >= FS else 0)) & MASK64
        if is_canonical(linear):
            cpu.invalidate_page(linear)
    else:
        cpu.invalidate_page((linear + core.segments[segment].base) & MASK32)


def _invpcid(cpu: Cpu, instruction: Instruction) -> None:
    if not has_feature(cpu, "invpcid"):
        raise invalid_opcode()
    core = cpu.core
    privileged(core)
    kind = read_register(core, instruction.op0_register)
    operand = cpu.load(memory_address(core, instruction, 16), 16)
    pcid, reserved, linear = operand & 0xFFF, operand & (1 << 64) - 0x1000, operand >> 64
    no_pcid = not core.cr4 & CR4_PCIDE
    wrong = kind < 2 and (reserved or (pcid and no_pcid) or (kind == 0 and not is_canonical(linear)))
    if kind > 3 or wrong:
        raise general_protection()
    if kind == 0 and (no_pcid or core.cr3 & CR3_PCID == pcid):
        cpu.invalidate_page(linear)
    else:
        cpu.flush_tlb(keep_global=kind != 2)


def _check_pkru(core: Core) -> None:
    """RDPKRU and WRPKRU: #UD without CR4.PKE, #GP unless ECX is 0."""
    if not core.cr4 & CR4_PKE:
        raise invalid_opcode()
    if core.regs[RCX] & MASK32:
        raise general_protection()


def _rdpkru(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    _check_pkru(core)
    core.regs[RAX], core.regs[RDX] = core.pkru, 0


def _wrpkru(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    _check_pkru(core)
    if core.regs[RDX] & MASK32:
        raise general_protection()
    write_pkru(cpu, core.regs[RAX] & MASK32)


def write_pkru(cpu: Cpu, value: int) -> None:
    """Load PKRU."""
    cpu.core.pkru = value
    cpu.flush_tlb(keep_global=False)
    cpu.mode_changed()


def _cache_control(cpu: Cpu, instruction: Instruction) -> None:
    """WBINVD, WBNOINVD and INVD: caches are the host's affair."""
    privileged(cpu.core)


def _flush_line(cpu: Cpu, instruction: Instruction) -> None:
    """CLFLUSH and its family fault as a byte load does, but that a code segment need not be readable (SDM 2A)."""
    core, code = cpu.core, cpu.core.segments[CS]
    if instruction.memory_segment == Register.CS and not in_64bit_mode(core):
        offset = effective_address(core, instruction)
        if not within_limit(code.attributes, code.limit, offset, 1):
            raise general_protection()
        cpu.load((code.base + offset) & MASK32, 1)
    else:
        cpu.load(memory_address(core, instruction, 1), 1)


STRAIGHT: dict[int, Handler] = {
    **dict.fromkeys((Code.MOV_CR_R32, Code.MOV_CR_R64), _mov_to_cr),
    **dict.fromkeys((Code.MOV_R32_CR, Code.MOV_R64_CR), _mov_from_cr),
    **dict.fromkeys((Code.MOV_DR_R32, Code.MOV_DR_R64), _mov_to_dr),
    **dict.fromkeys((Code.MOV_R32_DR, Code.MOV_R64_DR), _mov_from_dr),
    Code.CLTS: _clts,
    **dict.fromkeys((Code.LMSW_RM16, Code.LMSW_R32M16, Code.LMSW_R64M16), _lmsw),
    **dict.fromkeys((Code.SMSW_RM16, Code.SMSW_R32M16, Code.SMSW_R64M16), _smsw),
    Code.XGETBV: _xgetbv,
    Code.XSETBV: _xsetbv,
    Code.RDPKRU: _rdpkru,
    Code.WRPKRU: _wrpkru,
    Code.INVLPG_M: _invlpg,
    **dict.fromkeys((Code.INVPCID_R32_M128, Code.INVPCID_R64_M128), _invpcid),
    **dict.fromkeys((Code.WBINVD, Code.WBNOINVD, Code.INVD), _cache_control),
    **dict.fromkeys((Code.CLFLUSH_M8, Code.CLFLUSHOPT_M8, Code.CLWB_M8), _flush_line),
}
