"""What x87, MMX, SSE and AVX instructions ask of the control registers (Intel SDM 3A 2.5, 13.1 and table 2-2; 1, 13.5).

With the registers as an operating system that uses all of them has them, nothing
is asked.  In the modes `guarded` and `no_avx` translated code looks each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, RegisterExt

from trivisor.translation.translator.recipe import Recipe
from trivisor.x86.control import CR0_EM, CR0_MP, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, XCR0_AVX, XCR0_SSE

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


def _features(text: str) -> frozenset[int]:
    return frozenset(getattr(CpuidFeature, name) for name in text.split())


def _mnemonics(text: str) -> frozenset[int]:
    return frozenset(getattr(Mnemonic, name) for name in text.split())


_X87 = _features("FPU FPU287 FPU287XL_ONLY FPU387 FPU387SL_ONLY")
_VECTOR = _features(
    "MMX SSE SSE2 SSE3 SSSE3 SSE4_1 SSE4_2 AVX AVX2 FMA F16C AES PCLMULQDQ VAES VPCLMULQDQ SHA GFNI AVX_VNNI AVX_IFMA "
    "AVX_VNNI_INT8 AVX_VNNI_INT16 AVX_NE_CONVERT SHA512 SM3 SM4"
)
_XSAVE = _features("XSAVE XSAVEOPT XSAVEC XSAVES")
_FREE = _mnemonics("MFENCE LFENCE SFENCE MOVNTI PAUSE CRC32 PREFETCHNTA PREFETCHT0 PREFETCHT1 PREFETCHT2 XGETBV XSETBV")
"""They came with SSE, or with XSAVE, and use no register of theirs."""


def _unless(condition: str, vector: str, number: int) -> str:
    """Raise unless `condition`, an instruction that sets ZF, gives zero."""
    return f"{condition}\n jz fine_{number}\n fault {vector}\n fine_{number}:\n"


def _needs(field: str, bits: int, vector: str, number: int) -> str:
    """Raise unless all these bits of a register are set."""
    return _unless(f"mov r11d, [rsp+{field}]\n not r11d\n test r11d, {bits}", vector, number)


def _forbids(bits: int, vector: str, number: int) -> str:
    """Raise if any of these bits of CR0 is set."""
    return _unless(f"test dword [rsp+GUEST_CR0], {bits}", vector, number)


_ENABLED_X87 = _forbids(CR0_EM | CR0_TS, "nm", 0)
_ENABLED_MMX = _forbids(CR0_EM, "ud", 0) + _forbids(CR0_TS, "nm", 1)
_ENABLED_SSE = _forbids(CR0_EM, "ud", 0) + _needs("GUEST_CR4", CR4_OSFXSR, "ud", 1) + _forbids(CR0_TS, "nm", 2)
_OSXSAVE = _needs("GUEST_CR4", CR4_OSXSAVE, "ud", 0)
_ENABLED_AVX = _OSXSAVE + _needs("XCR0_FIELD", XCR0_SSE | XCR0_AVX, "ud", 1) + _forbids(CR0_TS, "nm", 2)
_ENABLED_XSAVE = _OSXSAVE + _forbids(CR0_TS, "nm", 1)
_WAIT = f"""
    mov r11d, [rsp+GUEST_CR0]
    and r11d, {CR0_MP | CR0_TS}
    cmp r11d, {CR0_MP | CR0_TS}
    jne fine
    fault nm
    fine:
"""


def guard(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """Have the instruction look whether it may, in a mode where that is not plain."""
    mode = maker.mode
    if not mode.guarded and not mode.no_avx:
        return
    source = _source(instruction)
    if source and (mode.no_avx if source in (_ENABLED_AVX, _ENABLED_XSAVE) else mode.guarded):
        recipe.clobber(source)


def _source(instruction: Instruction) -> str:
    """The checks that the instruction makes; none for most."""
    features = frozenset(instruction.cpuid_features())
    mnemonic = instruction.mnemonic
    if mnemonic == Mnemonic.WAIT:
        return _WAIT
    if mnemonic in _FREE:
        return ""
    if features & _XSAVE:
        return _ENABLED_XSAVE
    if features & _X87 or CpuidFeature.FXSR in features:
        return _ENABLED_X87
    if not features & _VECTOR:
        return ""
    if instruction.encoding != EncodingKind.LEGACY:
        return _ENABLED_AVX
    registers = [
        instruction.op_register(i) for i in range(instruction.op_count) if instruction.op_kind(i) == OpKind.REGISTER
    ]
    if any(RegisterExt.is_xmm(register) for register in registers):
        return _ENABLED_SSE
    if CpuidFeature.MMX in features or any(RegisterExt.is_mm(register) for register in registers):
        return _ENABLED_MMX
    return _ENABLED_SSE
