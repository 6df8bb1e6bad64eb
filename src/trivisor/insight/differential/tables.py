"""The decoder's vocabulary sorted for the generator: register files, kinds of operands, odd mnemonics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, CpuidFeature, Mnemonic, OpAccess, OpCodeOperandKind, OpKind, Register

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Code as CodeNumber
    from iced_x86._iced_x86_py import Mnemonic as MnemonicNumber
    from iced_x86._iced_x86_py import OpCodeOperandKind as OpCodeOperandKindNumber
    from iced_x86._iced_x86_py import OpKind as OpKindNumber
    from iced_x86._iced_x86_py import Register as RegisterNumber

_K = OpCodeOperandKind


def _registers(names: list[str]) -> list[RegisterNumber]:
    return [getattr(Register, name) for name in names]


def _mnemonics(names: str) -> frozenset[MnemonicNumber]:
    return frozenset(getattr(Mnemonic, name) for name in names.split())


_OLD = ["AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"]
R16 = _registers(_OLD + [f"R{i}W" for i in range(8, 16)])
R32 = _registers(["E" + name for name in _OLD] + [f"R{i}D" for i in range(8, 16)])
R64 = _registers(["R" + name for name in _OLD] + [f"R{i}" for i in range(8, 16)])
R8 = _registers(
    ["AL", "CL", "DL", "BL", "SPL", "BPL", "SIL", "DIL", *(f"R{i}L" for i in range(8, 16)), "AH", "CH", "DH", "BH"]
)
R8_LEGACY = _registers(["AL", "CL", "DL", "BL", "AH", "CH", "DH", "BH"])
XMM = _registers([f"XMM{i}" for i in range(16)])
YMM = _registers([f"YMM{i}" for i in range(16)])
MM = _registers([f"MM{i}" for i in range(8)])
ST = _registers([f"ST{i}" for i in range(8)])
NUMBER: dict[RegisterNumber, int] = {
    register: number for file in (R16, R32, R64) for number, register in enumerate(file)
}
"""Encoding numbers of the general registers of 16 to 64 bits."""

FILES: dict[OpCodeOperandKindNumber, list[RegisterNumber]] = {}
"""Operands that are a register of a file."""
OR_MEMORY: set[OpCodeOperandKindNumber] = set()
"""Those of them that may be memory instead."""
for _prefix, _file in (("R8", R8), ("R16", R16), ("R32", R32), ("R64", R64), ("XMM", XMM), ("YMM", YMM), ("MM", MM)):
    for _suffix in ("OR_MEM", "REG", "RM", "OPCODE", "VVVV", "IS4", "IS5"):
        _kind = getattr(_K, f"{_prefix}_{_suffix}", None)
        if _kind is not None:
            FILES[_kind] = _file
            if _suffix == "OR_MEM":
                OR_MEMORY.add(_kind)
FILES[_K.STI_OPCODE] = ST

FIXED: dict[OpCodeOperandKindNumber, RegisterNumber] = {
    _K.AL: Register.AL, _K.CL: Register.CL, _K.AX: Register.AX, _K.DX: Register.DX, _K.EAX: Register.EAX,
    _K.RAX: Register.RAX, _K.ST0: Register.ST0, _K.FS: Register.FS, _K.GS: Register.GS,
}  # fmt: skip
IMMEDIATES: dict[OpCodeOperandKindNumber, tuple[OpKindNumber, int]] = {
    _K.IMM8: (OpKind.IMMEDIATE8, 8), _K.IMM8SEX16: (OpKind.IMMEDIATE8TO16, 8),
    _K.IMM8SEX32: (OpKind.IMMEDIATE8TO32, 8), _K.IMM8SEX64: (OpKind.IMMEDIATE8TO64, 8),
    _K.IMM16: (OpKind.IMMEDIATE16, 16), _K.IMM32: (OpKind.IMMEDIATE32, 32),
    _K.IMM32SEX64: (OpKind.IMMEDIATE32TO64, 32), _K.IMM64: (OpKind.IMMEDIATE64, 64),
    _K.IMM8_CONST_1: (OpKind.IMMEDIATE8, 8), _K.IMM4_M2Z: (OpKind.IMMEDIATE8, 4),
}  # fmt: skip
"""Kind of the instruction's operand, and how many bits there are to choose."""
UNSIGNED_IMMEDIATES = frozenset((OpKind.IMMEDIATE8, OpKind.IMMEDIATE8_2ND, OpKind.IMMEDIATE16, OpKind.IMMEDIATE32))
VSIB: dict[OpCodeOperandKindNumber, list[RegisterNumber]] = {
    _K.MEM_VSIB32X: XMM, _K.MEM_VSIB64X: XMM, _K.MEM_VSIB32Y: YMM, _K.MEM_VSIB64Y: YMM
}  # fmt: skip
STRING: dict[OpCodeOperandKindNumber, tuple[int, dict[int, OpKindNumber]]] = {
    _K.SEG_RSI: (6, {16: OpKind.MEMORY_SEG_SI, 32: OpKind.MEMORY_SEG_ESI, 64: OpKind.MEMORY_SEG_RSI}),
    _K.ES_RDI: (7, {16: OpKind.MEMORY_ESDI, 32: OpKind.MEMORY_ESEDI, 64: OpKind.MEMORY_ESRDI}),
    _K.SEG_RDI: (7, {16: OpKind.MEMORY_SEG_DI, 32: OpKind.MEMORY_SEG_EDI, 64: OpKind.MEMORY_SEG_RDI}),
}
"""Operands of string instructions: the register's number, and the operand's kind by address size."""
STRING_KINDS = frozenset(kind for _, kinds in STRING.values() for kind in kinds.values())

STRINGS = _mnemonics(
    "MOVSB MOVSW MOVSD MOVSQ STOSB STOSW STOSD STOSQ LODSB LODSW LODSD LODSQ "
    "SCASB SCASW SCASD SCASQ CMPSB CMPSW CMPSD CMPSQ"
)
BIT_STRINGS = _mnemonics("BT BTS BTR BTC")
QUADWORD_GATHERS = _mnemonics("VPGATHERQD VPGATHERQQ VGATHERQPS VGATHERQPD")
SAVE_X87 = _mnemonics("FNSTENV FNSAVE FXSAVE FXSAVE64 FSTENV FSAVE")
DIVISIONS = _mnemonics("DIV IDIV")
LOAD_MXCSR = _mnemonics("LDMXCSR VLDMXCSR")
EXTENDED_STATE = _mnemonics("FXSAVE FXRSTOR")
"""In 32-bit code these leave XMM8 to XMM15 out; the translator's do not, and so neither those of the XSAVE family."""

X87 = frozenset((CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387))
WRITES = frozenset((OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))

_CONDITIONS = ("O", "NO", "B", "AE", "E", "NE", "BE", "A", "S", "NS", "P", "NP", "L", "GE", "LE", "G")
ADDRESS_BITS = {16: (16, 32), 32: (32, 16), 64: (64, 32)}
"""By the bits of the code: its own address size, and that of the prefix."""
JCC: dict[int, list[CodeNumber]] = {
    bits: [getattr(Code, f"J{c}_REL{size}_{bits}") for c in _CONDITIONS for size in (8, 32)] for bits in (32, 64)
}
JCC[16] = [getattr(Code, f"J{c}_REL{kind}") for c in _CONDITIONS for kind in ("8_16", "16")]
JCC[16] += [Code.JCXZ_REL8_16, Code.JECXZ_REL8_16]
JCC[32] += [Code.JECXZ_REL8_32, Code.JCXZ_REL8_32]
JCC[64] += [Code.JRCXZ_REL8_64, Code.JECXZ_REL8_64]
JUMPS: dict[int, tuple[CodeNumber, ...]] = {
    16: (Code.JMP_REL8_16, Code.JMP_REL16),
    32: (Code.JMP_REL8_32, Code.JMP_REL32_32),
    64: (Code.JMP_REL8_64, Code.JMP_REL32_64),
}
LOOPS: dict[int, list[CodeNumber]] = {
    bits: [getattr(Code, f"{name}_REL8_{bits}_{c}") for name in ("LOOP", "LOOPE", "LOOPNE") for c in counters]
    for bits, counters in ((16, ("CX", "ECX")), (32, ("ECX", "CX")), (64, ("RCX", "ECX")))
}
CALL = {16: Code.CALL_REL16, 32: Code.CALL_REL32_32, 64: Code.CALL_REL32_64}
CALL_INDIRECT = {16: Code.CALL_RM16, 32: Code.CALL_RM32, 64: Code.CALL_RM64}
JUMP_INDIRECT = {16: Code.JMP_RM16, 32: Code.JMP_RM32, 64: Code.JMP_RM64}
PUSH_CONSTANT = {16: Code.PUSH_IMM16, 32: Code.PUSHD_IMM32, 64: Code.PUSHQ_IMM32}
RETURN = {16: Code.RETNW, 32: Code.RETND, 64: Code.RETNQ}
RETURN_AND_DROP = {16: Code.RETNW_IMM16, 32: Code.RETND_IMM16, 64: Code.RETNQ_IMM16}
PUSH_FLAGS = {16: (Code.PUSHFW, Code.PUSHFD), 32: (Code.PUSHFD, Code.PUSHFW), 64: (Code.PUSHFQ, Code.PUSHFW)}
POP_FLAGS = {16: Code.POPFW, 32: Code.POPFD, 64: Code.POPFQ}
XSAVE_FAMILY: list[CodeNumber] = [
    getattr(Code, f"{name}{wide}_MEM") for name in ("XSAVE", "XSAVEC", "XRSTOR") for wide in ("", "64")
]
IDLE_PREFIXES: dict[int, tuple[int, ...]] = {
    16: (0x67, 0xF2, 0xF3, 0x3E, 0x26, 0x36),
    32: (0x66, 0xF2, 0xF3, 0x3E, 0x26, 0x36),
    64: (0x66, 0xF2, 0xF3, 0x2E, 0x3E, 0x26, 0x36, *range(0x40, 0x50)),
}
"""Prefixes that mean nothing to many instructions."""
