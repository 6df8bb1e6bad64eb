"""Which instructions are tried: the decoder's table, less what needs privilege, reads time or leaves the code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

from iced_x86 import (
    Code,
    CpuidFeature,
    EncodingKind,
    Instruction,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
)

from trivisor.x86.iced_types import CodeNumber

_EXCLUDED = """
    CPUID RDTSC RDTSCP RDPMC RDRAND RDSEED RDPID XGETBV INT INT1 INT3 INTO SYSCALL SYSRET SYSRETQ SYSENTER SYSEXIT
    SGDT SIDT SLDT STR SMSW LAR LSL VERR VERW LSS LFS LGS MONITOR MWAIT IRETD IRETQ IRET RETF XBEGIN XABORT XEND
    XTEST WRFSBASE WRGSBASE UMWAIT TPAUSE UMONITOR IN OUT INSB INSW INSD OUTSB OUTSW OUTSD XSAVE XSAVE64 XSAVEC
    XSAVEC64 XSAVEOPT XSAVEOPT64 XRSTOR XRSTOR64 XSAVES XSAVES64 XRSTORS XRSTORS64 SWAPGS CLI STI RSM POPF POPFD POPFQ
    PUSHF PUSHFD ENQCMD ENQCMDS HLT CALL JMP RET LOOP LOOPE LOOPNE STAC CLAC RDSSPD RDSSPQ
    CLZERO VMCALL VMMCALL VMFUNC UD0 UD1 UD2 GETSEC
""".split()
"""Done elsewhere (`generator` makes its own of some), or not comparable."""

_UNHANDLED_OPERANDS = {
    getattr(OpCodeOperandKind, name)
    for name in (
        "BND_OR_MEM_MPX BND_REG CR_REG DR_REG TR_REG SEG_REG CS DS ES SS FARBR2_2 FARBR4_2 BR16_1 BR16_2 BR32_1 "
        "BR32_4 BR64_1 BR64_4 BRDISP_2 BRDISP_4 XBEGIN_2 XBEGIN_4 SIBMEM TMM_REG TMM_RM TMM_VVVV K_REG K_RM K_VVVV "
        "K_OR_MEM KP1_REG MEM_MIB MEM_MPX R32_OR_MEM_MPX R64_OR_MEM_MPX R16_REG_MEM R32_REG_MEM"
    ).split()
}

_SCALAR = {
    getattr(CpuidFeature, name)
    for name in (
        "INTEL8086 INTEL186 INTEL286 INTEL386 INTEL486 X64 CMOV CX8 CMPXCHG16B MOVBE POPCNT LZCNT BMI1 BMI2 ADX "
        "FSGSBASE CLFSH CLFLUSHOPT CLWB PREFETCHW MULTIBYTENOP PAUSE TSC LAHF"
    ).split()
    if hasattr(CpuidFeature, name)
}
_FPU = {getattr(CpuidFeature, name) for name in ("FPU", "FPU287", "FPU387", "MMX")}

SCALAR, VECTOR, X87 = "scalar", "vector", "x87"


def _wanted(info: OpCodeInfo, needs: Sequence[int], features: frozenset[int], excluded: set[int]) -> bool:
    if not info.is_instruction or not info.mode64 or info.is_privileged or info.is_input_output:
        return False
    if not info.intel_decoder64 or info.fwait or info.mnemonic in excluded:
        return False
    if info.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
        return False
    if not _UNHANDLED_OPERANDS.isdisjoint(info.op_kinds()):
        return False
    return all(feature in features for feature in needs)


@cache
def catalogue(features: frozenset[int]) -> dict[str, list[list[CodeNumber]]]:
    """The codes of each group (SCALAR, VECTOR, X87), in a list for each mnemonic."""
    excluded = {getattr(Mnemonic, name) for name in _EXCLUDED if hasattr(Mnemonic, name)}
    groups: dict[str, dict[int, list[CodeNumber]]] = {name: defaultdict(list) for name in (SCALAR, VECTOR, X87)}
    for name in dir(Code):
        code: CodeNumber = getattr(Code, name)
        if not isinstance(code, int) or name.startswith(("_", "POPW_", "POPD_", "POPQ_")):
            continue
        instruction = Instruction()
        instruction.code = code
        info = instruction.op_code()
        needs = instruction.cpuid_features()
        if not _wanted(info, needs, features, excluded):
            continue
        group = SCALAR if _SCALAR.issuperset(needs) else X87 if _FPU.issuperset(needs) else VECTOR
        groups[group][info.mnemonic].append(code)
    return {name: list(found.values()) for name, found in groups.items()}
