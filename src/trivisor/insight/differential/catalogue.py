"""Which instructions are tried: the decoder's table, less what needs privilege, reads time or leaves the code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from iced_x86 import Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpCodeInfo, OpCodeOperandKind

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Code as CodeNumber

_EXCLUDED = """
    CPUID RDTSC RDTSCP RDPMC RDRAND RDSEED RDPID SERIALIZE XGETBV INT INT1 INT3 INTO SYSCALL SYSRET SYSRETQ SYSENTER
    SYSEXIT SGDT SIDT SLDT STR SMSW LAR LSL VERR VERW LSS LFS LGS LDS LES ARPL MONITOR MWAIT IRETD IRETQ IRET
    RETF XBEGIN XABORT XEND XTEST WRFSBASE WRGSBASE UMWAIT TPAUSE UMONITOR IN OUT INSB INSW INSD OUTSB
    OUTSW OUTSD XSAVE XSAVE64 XSAVEC XSAVEC64 XSAVEOPT XSAVEOPT64 XRSTOR XRSTOR64 XSAVES XSAVES64 XRSTORS
    XRSTORS64 SWAPGS CLI STI RSM POPF POPFD POPFQ PUSHF PUSHFD ENQCMD ENQCMDS HLT CALL JMP RET LOOP LOOPE
    LOOPNE STAC CLAC RDSSPD RDSSPQ CLZERO VMCALL VMMCALL VMFUNC UD0 UD1 UD2 GETSEC BOUND
"""
"""Done elsewhere (`flow` makes its own of some), or not comparable."""

_UNHANDLED_OPERANDS = """
    BND_OR_MEM_MPX BND_REG CR_REG DR_REG TR_REG SEG_REG CS DS ES SS FARBR2_2 FARBR4_2 BR16_1 BR16_2 BR32_1 BR32_4
    BR64_1 BR64_4 BRDISP_2 BRDISP_4 XBEGIN_2 XBEGIN_4 SIBMEM TMM_REG TMM_RM TMM_VVVV K_REG K_RM K_VVVV K_OR_MEM
    KP1_REG MEM_MIB MEM_MPX R32_OR_MEM_MPX R64_OR_MEM_MPX R16_REG_MEM R32_REG_MEM
"""

_SCALAR = """
    INTEL8086 INTEL8086_ONLY INTEL186 INTEL286 INTEL386 INTEL486 X64 CMOV CX8 CMPXCHG16B MOVBE POPCNT LZCNT BMI1
    BMI2 ADX FSGSBASE CLFSH CLFLUSHOPT CLWB MOVDIRI PREFETCHW MULTIBYTENOP PAUSE TSC
"""
_X87 = "FPU FPU287 FPU387 MMX"

SCALAR, VECTOR, X87 = "scalar", "vector", "x87"
Groups = dict[str, list[list["CodeNumber"]]]


def _numbers(enumeration: object, names: str) -> set[int]:
    return {getattr(enumeration, name) for name in names.split() if hasattr(enumeration, name)}


def _wanted(info: OpCodeInfo, needs: Iterable[int], features: frozenset[int], bits: int) -> bool:
    if not info.is_instruction or info.is_privileged or info.is_input_output or info.fwait:
        return False
    modes = {
        16: info.mode16 and info.intel_decoder16, 32: info.mode32 and info.intel_decoder32,
        64: info.mode64 and info.intel_decoder64,
    }  # fmt: skip
    if not modes[bits]:
        return False
    if info.mnemonic in _numbers_excluded() or info.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
        return False
    if not _numbers_unhandled().isdisjoint(info.op_kinds()):
        return False
    return all(feature in features for feature in needs)


@cache
def _numbers_excluded() -> set[int]:
    return _numbers(Mnemonic, _EXCLUDED)


@cache
def _numbers_unhandled() -> set[int]:
    return _numbers(OpCodeOperandKind, _UNHANDLED_OPERANDS)


@cache
def catalogue(features: frozenset[int], bits: int) -> Groups:
    """The codes of each group (SCALAR, VECTOR, X87), in a list for each mnemonic."""
    groups: dict[str, dict[int, list[CodeNumber]]] = {name: defaultdict(list) for name in (SCALAR, VECTOR, X87)}
    scalar, x87 = _numbers(CpuidFeature, _SCALAR), _numbers(CpuidFeature, _X87)
    for name in dir(Code):
        code = getattr(Code, name)
        if not isinstance(code, int) or name.startswith(("_", "POPW_", "POPD_", "POPQ_")):
            continue
        if name.startswith("RESERVEDNOP_") and name.endswith("0F0D"):
            continue  # with a register: a NOP on Intel's processors, #UD on AMD's
        if name == "MOVSXD_R16_RM16":
            continue  # AMD's processors read 32 bits
        if bits != 64 and name.startswith("PUSHD_") and name.endswith("S"):
            continue  # processors differ in what they write to the upper half
        instruction = Instruction()
        instruction.code = getattr(Code, name)
        info = instruction.op_code()
        needs = instruction.cpuid_features()
        if _wanted(info, needs, features, bits):
            group = SCALAR if scalar.issuperset(needs) else X87 if x87.issuperset(needs) else VECTOR
            groups[group][info.mnemonic].append(getattr(Code, name))
    return {name: list(found.values()) for name, found in groups.items()}
