"""Faults of an instruction that come before those of its memory operand (Intel SDM 3A, 6.9, table 6-2).

The check of an access comes first in translated code; for these instructions it
leaves the fault to Python, which looks whether another has precedence.
"""

from __future__ import annotations

from iced_x86 import CpuidFeature, EncodingKind, Instruction, MemorySizeExt, Mnemonic, OpKind, RegisterExt

_X87 = frozenset((CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387))


def _mnemonics(text: str) -> frozenset[int]:
    return frozenset(getattr(Mnemonic, name) for name in text.split())


_NO_WAIT = _mnemonics("FNSTCW FNSTSW FNSTENV FNSAVE FNINIT FNCLEX")
_UNALIGNED = _mnemonics("MOVUPS MOVUPD MOVDQU LDDQU PCMPESTRI PCMPESTRI64 PCMPESTRM PCMPESTRM64 PCMPISTRI PCMPISTRM")
_LATE = frozenset((CpuidFeature.SHA,))
"""Instructions whose operand is looked up first, and its alignment then (AMD's processors)."""
_ALIGNED_VEX = _mnemonics("VMOVAPS VMOVAPD VMOVDQA VMOVNTDQ VMOVNTPD VMOVNTPS VMOVNTDQA")
_ALIGNED = dict.fromkeys(_mnemonics("CMPXCHG16B FXSAVE FXSAVE64 FXRSTOR FXRSTOR64"), 16) | dict.fromkeys(
    _mnemonics("XSAVE XSAVE64 XSAVEOPT XSAVEOPT64 XSAVEC XSAVEC64 XRSTOR XRSTOR64"), 64
)


def waits(instruction: Instruction) -> bool:
    """Whether a pending x87 exception strikes at the instruction (SDM 1, 8.7)."""
    if instruction.mnemonic in _NO_WAIT:
        return False
    return not _X87.isdisjoint(instruction.cpuid_features()) or any(
        instruction.op_kind(i) == OpKind.REGISTER and RegisterExt.is_mm(instruction.op_register(i))
        for i in range(instruction.op_count)
    )


def alignment(instruction: Instruction) -> int:
    """What the memory operand's address must be a multiple of, lest #GP (SDM 1, 4.1.1); 1 for no matter."""
    mnemonic = instruction.mnemonic
    if mnemonic in _ALIGNED:
        return _ALIGNED[mnemonic]
    size = MemorySizeExt.size(instruction.memory_size)
    if size < 16 or mnemonic in _UNALIGNED or not _LATE.isdisjoint(instruction.cpuid_features()):
        return 1
    if instruction.encoding == EncodingKind.LEGACY:
        return 16 if size == 16 else 1
    return size if mnemonic in _ALIGNED_VEX else 1


def may_fault_before(instruction: Instruction) -> bool:
    """Whether there may be such a fault."""
    return waits(instruction) or alignment(instruction) > 1
