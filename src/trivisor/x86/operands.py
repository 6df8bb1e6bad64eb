"""Operands of instructions: parsed from the assembler's text, and stored into iced's instructions.

An operand's `shape` says which encodings it fits: the mask of operand kinds that it can be, and above it the
size in bytes that was written, if any.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from iced_x86 import Instruction, OpKind, RegisterExt

from trivisor.x86.expressions import AssemblyError, Resolve, evaluate, tokenize
from trivisor.x86.opcodes import ANY_MEMORY, KINDS, REGISTERS, kinds_mask

_SIZES = {
    "byte": 1, "word": 2, "dword": 4, "qword": 8, "tword": 10, "oword": 16, "xmmword": 16, "ymmword": 32,
    "zmmword": 64,
}  # fmt: skip
_SIZE_SHIFT = 128  # there are fewer operand kinds
_SIZED = re.compile(rf"({'|'.join(_SIZES)})\b(?:\s*ptr\b)?\s*", re.IGNORECASE)
_MASK64 = (1 << 64) - 1

_IMM4, _IMM8, _IMM16, _IMM32, _IMM64, _IMM32SEX64, _IMM8_CONST_1 = (
    kinds_mask(name)
    for name in ("IMM4_M2Z", "IMM8", "IMM16", "IMM32", "IMM64", "IMM32SEX64", "IMM8_CONST_1")
)
_SIGN_EXTENDED_BYTES = [(bits, kinds_mask(f"IMM8SEX{bits}")) for bits in (16, 32, 64)]
_MEM_OFFS = kinds_mask("MEM_OFFS")
_FAR_16, _FAR_32 = kinds_mask("FARBR2_2"), kinds_mask("FARBR4_2")

# Register classes, and the beginnings of the operand kinds that such registers can be.
_REGISTER_CLASSES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (RegisterExt.is_gpr8, "R8_"),
    (RegisterExt.is_gpr16, "R16_"),
    (RegisterExt.is_gpr32, "R32_"),
    (RegisterExt.is_gpr64, "R64_"),
    (RegisterExt.is_segment_register, "SEG_REG"),
    (RegisterExt.is_cr, "CR_"),
    (RegisterExt.is_dr, "DR_"),
    (RegisterExt.is_st, "STI_"),
    (RegisterExt.is_mm, "MM_"),
    (RegisterExt.is_xmm, "XMM"),
    (RegisterExt.is_ymm, "YMM"),
    (RegisterExt.is_zmm, "ZMM"),
    (RegisterExt.is_tmm, "TMM"),
    (RegisterExt.is_k, "K"),
    (RegisterExt.is_bnd, "BND_"),
)


def _members(is_member: Callable[[Any], bool]) -> list[int]:
    return [number for number in REGISTERS.values() if is_member(number)]


_SEGMENTS = {name: REGISTERS[name] for name in ("es", "cs", "ss", "ds", "fs", "gs")}
_ADDRESS_SIZES = (
    dict.fromkeys((REGISTERS[name] for name in ("bx", "bp", "si", "di")), 16)
    | dict.fromkeys(_members(RegisterExt.is_gpr32), 32)
    | dict.fromkeys(_members(RegisterExt.is_gpr64), 64)
)
_VECTORS = (
    dict.fromkeys(_members(RegisterExt.is_xmm), kinds_mask("MEM_VSIB32X", "MEM_VSIB64X"))
    | dict.fromkeys(_members(RegisterExt.is_ymm), kinds_mask("MEM_VSIB32Y", "MEM_VSIB64Y"))
    | dict.fromkeys(_members(RegisterExt.is_zmm), kinds_mask("MEM_VSIB32Z", "MEM_VSIB64Z"))
)
_STACK_POINTERS = {REGISTERS["esp"], REGISTERS["rsp"]}
_INDEXES_16 = {REGISTERS["si"], REGISTERS["di"]}


@dataclass(slots=True, eq=False)
class RegisterOperand:
    """A register."""

    register: int
    shape: int

    def store(self, instruction: Instruction, number: int, op_kind: int) -> None:
        instruction.set_op_register(number, self.register)  # type: ignore[arg-type]


@dataclass(slots=True, eq=False)
class ImmediateOperand:
    """A number: an immediate, or the target of a relative branch. `size` in bytes, 0 if it is not written."""

    value: int
    size: int
    shape: int

    def store(self, instruction: Instruction, number: int, op_kind: int) -> None:
        instruction.set_op_kind(number, op_kind)  # type: ignore[arg-type]
        instruction.set_immediate_u64(number, self.value & _MASK64)


@dataclass(slots=True, eq=False)
class FarOperand:
    """selector:offset."""

    selector: int
    offset: int
    shape: int

    def store(self, instruction: Instruction, number: int, op_kind: int) -> None:
        instruction.set_op_kind(number, op_kind)  # type: ignore[arg-type]
        instruction.far_branch_selector = self.selector
        if op_kind == OpKind.FAR_BRANCH16:
            instruction.far_branch16 = self.offset
        else:
            instruction.far_branch32 = self.offset


@dataclass(slots=True, eq=False)
class MemoryOperand:
    """A memory operand. `displacement_size` is iced's: 0 none, 1 a byte if it fits, else the address size;
    `size` is the operand's in bytes, 0 if it is not written.
    """

    base: int
    index: int
    scale: int
    displacement: int
    displacement_size: int
    segment: int
    size: int
    shape: int

    @property
    def needs_64_bit_address(self) -> bool:
        """Whether only `mov` of the accumulator reaches the address."""
        return self.shape & (ANY_MEMORY | _MEM_OFFS) == _MEM_OFFS

    def store(self, instruction: Instruction, number: int, op_kind: int) -> None:
        instruction.set_op_kind(number, OpKind.MEMORY)
        if self.base:
            instruction.memory_base = self.base  # type: ignore[assignment]
        if self.index:
            instruction.memory_index = self.index  # type: ignore[assignment]
            instruction.memory_index_scale = self.scale
        if self.displacement_size:
            instruction.memory_displacement = self.displacement & _MASK64
            instruction.memory_displ_size = self.displacement_size
        if self.segment:
            instruction.segment_prefix = self.segment  # type: ignore[assignment]


Operand = RegisterOperand | ImmediateOperand | FarOperand | MemoryOperand


def _register_operands() -> dict[str, RegisterOperand]:
    kinds_of_class = [
        (is_member, kinds_mask(*(kind for kind in KINDS if kind.startswith(prefix))))
        for is_member, prefix in _REGISTER_CLASSES
    ]
    operands: dict[str, RegisterOperand] = {}
    for name, number in REGISTERS.items():
        shape = next((kinds for is_member, kinds in kinds_of_class if is_member(number)), 0)
        if shape:
            own = [name.upper()] if name.upper() in KINDS else []  # AL, CL, DX, ES, ST0, ...
            operands[name] = RegisterOperand(number, shape | kinds_mask(*own))
    return operands


REGISTER_OPERANDS = _register_operands()
# One register for all that fit the same encodings, so that the choice of an encoding depends on them alone.
REPRESENTATIVES = {operand.shape: operand for operand in reversed(REGISTER_OPERANDS.values())}


def parse_operand(text: str, bits: int, wide: bool, resolve: Resolve) -> Operand:
    """One operand in code of 16, 32 or 64 bits; `wide` asks for immediate and displacement in full size."""
    register = REGISTER_OPERANDS.get(text.lower())
    if register:
        return register
    size = 0
    sized = _SIZED.match(text)
    if sized:
        size, text = _SIZES[sized[1].lower()], text[sized.end() :]
    if "[" in text:
        return _parse_memory(text, size, bits, wide, resolve)
    if ":" in text:
        return _parse_far(text, size, resolve)
    value = evaluate(tokenize(text), resolve)
    return ImmediateOperand(value, size, immediate_shape(value, size, wide))


def fits_sign_extended(value: int, stored: int, bits: int) -> bool:
    """Whether a value of so many bits is its low `stored` bits, sign-extended."""
    limit = 1 << stored - 1
    return -limit <= value < limit or (1 << bits) - limit <= value < 1 << bits


@lru_cache(maxsize=4096)
def immediate_shape(value: int, size: int, wide: bool) -> int:
    """The shape of a number, written with a size in bytes or with none (0).

    `wide` leaves out the encodings that are shorter for some values.
    """
    mask = 0
    if -0x80 <= value <= 0xFF and size in (0, 1):
        mask |= _IMM8
        if value == 1 and not wide:
            mask |= _IMM8_CONST_1
        if 0 <= value < 16:
            mask |= _IMM4
    if not wide:
        for bits, kind in _SIGN_EXTENDED_BYTES:
            is_sized_so = size <= 1 or size * 8 == bits or (size, bits) == (4, 64)
            if is_sized_so and fits_sign_extended(value, 8, bits):
                mask |= kind
    if -0x8000 <= value <= 0xFFFF and size in (0, 2):
        mask |= _IMM16
    if -0x8000_0000 <= value <= 0xFFFF_FFFF and size in (0, 4):
        mask |= _IMM32
    if fits_sign_extended(value, 32, 64) and size in (0, 4, 8):
        mask |= _IMM32SEX64
    if -(1 << 63) <= value <= _MASK64 and size in (0, 8):
        mask |= _IMM64
    return mask | size << _SIZE_SHIFT


def _parse_far(text: str, size: int, resolve: Resolve) -> FarOperand:
    selector, offset = (evaluate(tokenize(part), resolve) for part in text.split(":", 1))
    shape = {0: _FAR_16 | _FAR_32, 2: _FAR_16, 4: _FAR_32}.get(size, 0)
    if offset > 0xFFFF:
        shape &= _FAR_32
    if not shape or not 0 <= selector <= 0xFFFF or not 0 <= offset <= 0xFFFF_FFFF:
        raise AssemblyError("far address out of range")
    return FarOperand(selector, offset, shape | size << _SIZE_SHIFT)


def _parse_memory(text: str, size: int, bits: int, wide: bool, resolve: Resolve) -> MemoryOperand:
    before, _, inside = text.partition("[")
    if not inside.endswith("]"):
        raise AssemblyError("']' expected at the end of the operand")
    inside = inside[:-1]
    if ":" in inside:
        segment_name, _, inside = inside.partition(":")
        before += segment_name + ":"
    segment = _parse_segment(before) if before else 0
    tokens = tokenize(inside)
    first = tokens[0].lower() if tokens else ""
    if first == "rel":
        return _rip_relative(tokens[1:], size, segment, bits, resolve)
    address_size = _SIZES[first] * 8 if first in ("word", "dword", "qword") else 0
    base, index, scale, rest = _split_address(tokens[1:] if address_size else tokens, resolve)
    displacement = evaluate(rest, resolve) if rest else 0
    if not base and not index:
        return _absolute(displacement, address_size, size, segment, bits)
    address_size = _ADDRESS_SIZES.get(base) or _ADDRESS_SIZES.get(index) or bits
    if not fits_sign_extended(displacement, min(address_size, 32), address_size):
        raise AssemblyError(f"displacement {displacement:#x} out of range")
    displacement_size = 1 if displacement else 0
    if wide and rest:
        displacement_size = address_size // 8
    shape = _VECTORS.get(index, ANY_MEMORY) | size << _SIZE_SHIFT
    return MemoryOperand(base, index, scale, displacement, displacement_size, segment, size, shape)


def _parse_segment(text: str) -> int:
    name, _, rest = text.partition(":")
    segment = _SEGMENTS.get(name.strip().lower())
    if segment is None or rest.strip() or ":" not in text:
        raise AssemblyError(f"segment register expected, not {text.strip()!r}")
    return segment


def _rip_relative(tokens: list[str], size: int, segment: int, bits: int, resolve: Resolve) -> MemoryOperand:
    if bits != 64:
        raise AssemblyError("RIP-relative addresses are for 64-bit code")
    target = evaluate(tokens, resolve)
    resolve("$")  # whatever the target, the encoding depends on where the instruction stands
    shape = ANY_MEMORY | size << _SIZE_SHIFT
    return MemoryOperand(REGISTERS["rip"], 0, 1, target, 8, segment, size, shape)


def _absolute(address: int, address_size: int, size: int, segment: int, bits: int) -> MemoryOperand:
    """An address without registers. The accumulator has an encoding of its own for it (moffs), which is
    shorter in 16- and 32-bit code, and in 64-bit code the only one that reaches everywhere.
    """
    is_written_64 = address_size == 64
    if not address_size:
        address_size = 32 if bits == 16 and not -0x8000 <= address <= 0xFFFF else bits
    if not -(1 << address_size - 1) <= address < 1 << address_size:
        raise AssemblyError(f"address {address:#x} out of range")
    shape = ANY_MEMORY
    if bits != 64:
        shape |= _MEM_OFFS
    elif is_written_64 or (address_size == 64 and not fits_sign_extended(address, 32, 64)):
        shape = _MEM_OFFS
    shape |= size << _SIZE_SHIFT
    return MemoryOperand(0, 0, 1, address, address_size // 8, segment, size, shape)


def _split_address(tokens: list[str], resolve: Resolve) -> tuple[int, int, int, list[str]]:
    """Takes the registers out of an address: (base, index, scale, tokens of the displacement)."""
    base = index = 0
    scale = 1
    rest: list[str] = []
    for sign, term in _terms(tokens):
        names = [token for token in term if token.lower() in REGISTERS]
        if not names:
            rest += [sign, *term]
            continue
        register = REGISTERS[names[0].lower()]
        term.remove(names[0])
        factor = None
        if term:
            star = 0 if term[0] == "*" else -1
            if term.pop(star) != "*":
                raise AssemblyError(f"{names[0]!r} can only be added or multiplied")
            factor = evaluate(term, resolve)
        if sign == "-" or (base and index):
            raise AssemblyError("an address adds up at most two registers")
        is_index = base or factor is not None or register in _VECTORS
        factor = 1 if factor is None else factor
        if not is_index:
            base = register
        elif not index:
            index, scale = register, factor
        else:
            base, index, scale = _both_index(index, scale, register, factor)
    return (*_normalize(base, index, scale), rest)


def _both_index(first: int, first_scale: int, second: int, second_scale: int) -> tuple[int, int, int]:
    """Base and index from two registers of which the first was taken for the index already."""
    if second_scale == 1 and second not in _VECTORS:
        return second, first, first_scale
    if first_scale == 1 and first not in _VECTORS:
        return first, second, second_scale
    raise AssemblyError("an address scales only one register")


def _terms(tokens: list[str]) -> list[tuple[str, list[str]]]:
    """What an address adds up: (sign, tokens) of each."""
    terms: list[tuple[str, list[str]]] = [("+", [])]
    depth = 0
    for token in tokens:
        depth += (token == "(") - (token == ")")
        if token in ("+", "-") and depth == 0 and terms[-1][1]:
            terms.append((token, []))
        else:
            terms[-1][1].append(token)
    if not terms[-1][1]:
        raise AssemblyError("address expected")
    return terms


def _normalize(base: int, index: int, scale: int) -> tuple[int, int, int]:
    """Puts base and index where their encoding wants them (Intel SDM 2A, 2.1.5)."""
    if index and not base and index not in _VECTORS:
        if scale == 1:
            base, index = index, 0
        elif scale in (2, 3, 5, 9):
            base, scale = index, scale - 1
    swaps = (index in _STACK_POINTERS and scale == 1) or (index and base in _INDEXES_16)
    if swaps:
        base, index = index, base
    sizes = {_ADDRESS_SIZES.get(r) for r in (base, index) if r and r not in _VECTORS}
    if None in sizes or len(sizes) > 1 or base in _VECTORS:
        raise AssemblyError("these registers do not form an address")
    if scale not in (1, 2, 4, 8) or (16 in sizes and scale != 1):
        raise AssemblyError(f"index scale {scale}")
    if index in _STACK_POINTERS:
        raise AssemblyError("the stack pointer cannot be an index")
    return base, index, scale
