"""Which encodings a mnemonic has: iced-x86's opcode tables, indexed by the names that programmers write.

A `Form` is one opcode ("Code" in iced's terms, e.g. ADD_RM32_IMM8) with what its operands may be. The sets
of operand kinds are bit masks, so that matching an operand is one `and`. Forms are built when a mnemonic is
first asked for: describing all 4,900 opcodes would cost more than assembling a program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import and_

from iced_x86 import (
    Code,
    DecoderOptions,
    EncodingKind,
    MemorySizeInfo,
    OpCodeInfo,
    OpCodeOperandKind,
    OpKind,
    Register,
)

KINDS: dict[str, int] = {
    name: kind for name, kind in vars(OpCodeOperandKind).items() if name.isupper() and isinstance(kind, int)
}
REGISTERS: dict[str, int] = {
    name.lower(): number for name, number in vars(Register).items() if name.isupper() and number
}
# iced says r8l where NASM and Intel's later manuals say r8b
REGISTERS |= {f"r{n}b": REGISTERS[f"r{n}l"] for n in range(8, 16)}


def kinds_mask(*names: str) -> int:
    """The bit mask of the named operand kinds (names of iced's OpCodeOperandKind)."""
    return sum(1 << KINDS[name] for name in names)


ANY_MEMORY = kinds_mask(*(name for name in KINDS if "_OR_MEM" in name), "MEM", "MEM_MPX", "MEM_MIB", "SIBMEM")
NEAR_BRANCHES = kinds_mask("BR16_2", "BR32_4", "BR64_4", "XBEGIN_2", "XBEGIN_4")
SHORT_BRANCHES = kinds_mask("BR16_1", "BR32_1", "BR64_1")

_IMMEDIATES = {
    "IMM4_M2Z": OpKind.IMMEDIATE8,
    "IMM8": OpKind.IMMEDIATE8,
    "IMM8_CONST_1": OpKind.IMMEDIATE8,
    "IMM8SEX16": OpKind.IMMEDIATE8TO16,
    "IMM8SEX32": OpKind.IMMEDIATE8TO32,
    "IMM8SEX64": OpKind.IMMEDIATE8TO64,
    "IMM16": OpKind.IMMEDIATE16,
    "IMM32": OpKind.IMMEDIATE32,
    "IMM32SEX64": OpKind.IMMEDIATE32TO64,
    "IMM64": OpKind.IMMEDIATE64,
}
_BRANCHES = {
    "FARBR2_2": OpKind.FAR_BRANCH16,
    "FARBR4_2": OpKind.FAR_BRANCH32,
    "BR16_1": OpKind.NEAR_BRANCH16,
    "BR16_2": OpKind.NEAR_BRANCH16,
    "BR32_1": OpKind.NEAR_BRANCH32,
    "BR32_4": OpKind.NEAR_BRANCH32,
    "BR64_1": OpKind.NEAR_BRANCH64,
    "BR64_4": OpKind.NEAR_BRANCH64,
}
_OP_KINDS: dict[int, int] = {KINDS[name]: kind for name, kind in (_IMMEDIATES | _BRANCHES).items()}
_STRING_MEMORY = kinds_mask("SEG_RSI", "ES_RDI", "SEG_RDI", "SEG_RBX_AL")
FIXED_REGISTERS: dict[int, int] = {
    KINDS[name.upper()]: REGISTERS[name] for name in ("al", "ax", "eax", "rax", "dx")
}

_CONDITIONS = {
    "c": "b", "nae": "b", "nb": "ae", "nc": "ae", "z": "e", "nz": "ne", "na": "be", "nbe": "a",
    "pe": "p", "po": "np", "nge": "l", "nl": "ge", "ng": "le", "nle": "g",
}  # fmt: skip
_ALIASES = {
    prefix + alias: prefix + name for prefix in ("j", "set", "cmov") for alias, name in _CONDITIONS.items()
} | {
    "sal": "shl",
    "retn": "ret",
    "xlatb": "xlat",
    "loopz": "loope",
    "loopnz": "loopne",
    "fwait": "wait",
    "icebp": "int1",
    "int03": "int3",
    "ud2a": "ud2",
}
# Mnemonics whose operand size is part of iced's name: the mode's own size is the one without a prefix, which
# is the shortest, so that choosing the shortest encoding chooses it.
_SIZED_NAMES = {"ret": "RETN", "retf": "RETF"} | {
    name: name.upper()
    for name in (
        "push", "pop", "pusha", "popa", "pushf", "popf", "iret", "enter", "leave", "nop", "sysret", "sysexit",
        "monitor", "monitorx", "vmrun", "vmload", "vmsave", "invlpga", "invlpgb", "clzero", "pvalidate",
    )
}  # fmt: skip


# With a 16-bit operand size in 64-bit code; Intel's processors ignore the prefix.
_ONLY_AMD_IN_64_BIT = {"JMP_RM16", "CALL_RM16"}


@dataclass(slots=True, eq=False)
class Form:
    """One encoding of a mnemonic.

    The operands that are written: `masks` are their kinds, `slots` their numbers and OpKinds (0 for a
    register). `implied` are those that are not written: the memory of string instructions. Sizes:
    `memory_size` in bytes, 0 if it has none; `operand_size` in bits, 0 if the opcode does not depend on it.
    """

    code: int
    name: str
    masks: tuple[int, ...]
    slots: tuple[tuple[int, int], ...]
    implied: tuple[tuple[int, int], ...]
    memory_size: int
    operand_size: int
    is_evex: bool
    is_far_pointer: bool
    modes: int

    def is_available(self, bits: int) -> bool:
        """Whether code of 16, 32 or 64 bits can hold this encoding."""
        return bool(self.modes & bits)

    def takes(self, shapes: Sequence[int]) -> bool:
        """Whether operands of these shapes (masks of kinds) fit."""
        return len(shapes) == len(self.masks) and all(map(and_, shapes, self.masks))


@cache
def _codes_by_name() -> dict[str, list[tuple[str, int]]]:
    """iced's Code numbers by the mnemonic part of their names, in iced's order."""
    index: dict[str, list[tuple[str, int]]] = {}
    for name, code in vars(Code).items():
        mnemonic, _, rest = name.partition("_")
        if mnemonic in ("VEX", "EVEX", "XOP", "D3NOW"):
            mnemonic = rest.partition("_")[0]
        if mnemonic and isinstance(code, int):
            index.setdefault(mnemonic, []).append((name, code))
    return index


def _describe(name: str, code: int) -> Form | None:
    info = OpCodeInfo(code)  # type: ignore[arg-type]
    if not info.is_instruction or info.decoder_option not in (DecoderOptions.NONE, DecoderOptions.MPX):
        return None  # iced's own pseudo-instructions, and opcodes of long-gone processors
    kinds = [int(kind) for kind in info.op_kinds()]
    mask = sum(1 << kind for kind in set(kinds))
    is_string = bool(mask & _STRING_MEMORY) and not mask & kinds_mask("SEG_RDI")
    masks: list[int] = []
    slots: list[tuple[int, int]] = []
    implied: list[tuple[int, int]] = []
    for number, kind in enumerate(kinds):
        if 1 << kind & _STRING_MEMORY or (is_string and kind in FIXED_REGISTERS):
            implied.append((number, kind))
            continue
        op_kind = _OP_KINDS.get(kind, 0)
        if op_kind == OpKind.IMMEDIATE8 and any(k in _OP_KINDS for k in kinds[:number]):
            op_kind = OpKind.IMMEDIATE8_2ND
        masks.append(1 << kind)
        slots.append((number, op_kind))
    return Form(
        code=code,
        name=name,
        masks=tuple(masks),
        slots=tuple(slots),
        implied=tuple(implied),
        memory_size=MemorySizeInfo(info.memory_size).size,
        operand_size=info.operand_size,
        is_evex=info.encoding == EncodingKind.EVEX,
        is_far_pointer=name.startswith(("JMP_M16", "CALL_M16")),
        modes=16 * info.mode16 | 32 * info.mode32 | 64 * (info.mode64 and name not in _ONLY_AMD_IN_64_BIT),
    )


@cache
def forms(mnemonic: str) -> tuple[Form, ...]:
    """All encodings of a lower-case mnemonic, in iced's order; empty if there is no such mnemonic."""
    mnemonic = _ALIASES.get(mnemonic, mnemonic)
    index = _codes_by_name()
    base = _SIZED_NAMES.get(mnemonic)
    names = [base + suffix for suffix in ("", "W", "D", "Q")] if base else [mnemonic.upper()]
    described = (_describe(*entry) for name in names for entry in index.get(name, ()))
    return tuple(form for form in described if form is not None)


@cache
def branch_forms(mnemonic: str, bits: int) -> tuple[Form | None, Form | None] | None:
    """(short, near) encodings of a relative branch in code of that bitness; None if it is no such branch."""
    found: list[Form | None] = []
    for mask in (SHORT_BRANCHES, NEAR_BRANCHES):
        candidates = [
            form
            for form in forms(mnemonic)
            if form.masks and form.masks[0] & mask and _is_default_branch(form, bits)
        ]
        found.append(candidates[0] if candidates else None)
    return (found[0], found[1]) if any(found) else None


def _is_default_branch(form: Form, bits: int) -> bool:
    """Whether a branch has the offset and counter size that need no prefix in code of that bitness."""
    if not form.is_available(bits):
        return False
    if form.name.startswith("XBEGIN"):
        return form.name == "XBEGIN_REL32" and bits != 16
    if not form.masks[0] & kinds_mask(*(f"BR{bits}_{n}" for n in (1, 4 if bits > 16 else 2))):
        return False
    counter = form.name.rpartition("_")[2]
    return counter not in ("CX", "ECX", "RCX") or counter == {16: "CX", 32: "ECX", 64: "RCX"}[bits]
