"""Operands and expressions of the assembler's source text."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from iced_x86 import Instruction, OpKind

from trivisor.x86.opcodes import ANY_MEMORY, KINDS, REGISTERS, kinds_mask


class AssemblyError(ValueError):
    """Source text that cannot be assembled; the message has the line number and the line."""


SIZES = {"byte": 1, "word": 2, "dword": 4, "qword": 8, "tword": 10, "oword": 16, "xmmword": 16, "ymmword": 32,
         "zmmword": 64}  # fmt: skip
SIZE_SHIFT = 128  # where an operand's explicit size stands in its shape, above the mask of operand kinds

_TOKEN = re.compile(r"0[xX]\w+|\d\w*|[A-Za-z_.?@][\w.?@]*|'[^']*'|\"[^\"]*\"|\$\$?|<<|>>|\S")
_MASK64 = (1 << 64) - 1
_SEGMENTS = {name: REGISTERS[name] for name in ("es", "cs", "ss", "ds", "fs", "gs")}
_ADDRESS_REGISTERS: dict[int, int] = {}  # register -> address size in bits
for _bits, _pattern in (
    (16, r"bx|bp|si|di"),
    (32, r"e(ax|cx|dx|bx|sp|bp|si|di)|r\d+d"),
    (64, r"r(ax|cx|dx|bx|sp|bp|si|di)|r\d+"),
):
    _ADDRESS_REGISTERS |= {n: _bits for name, n in REGISTERS.items() if re.fullmatch(_pattern, name)}
_VECTOR_INDEXES: dict[int, int] = {
    number: kinds_mask(f"MEM_VSIB32{name[0].upper()}", f"MEM_VSIB64{name[0].upper()}")
    for name, number in REGISTERS.items()
    if re.fullmatch(r"[xyz]mm\d+", name)
}
_STACK_POINTERS = {REGISTERS["esp"], REGISTERS["rsp"]}
_INDEX_ONLY_16 = {REGISTERS["si"], REGISTERS["di"]}
_RIP = REGISTERS["rip"]


def _register_shapes() -> dict[int, int]:
    """For every register the mask of operand kinds that it can be."""
    classes = {
        r"([abcd][lh]|sil|dil|spl|bpl|r\d+[lb])": "R8_",
        r"(ax|cx|dx|bx|sp|bp|si|di|r\d+w)": "R16_",
        r"(e(ax|cx|dx|bx|sp|bp|si|di)|r\d+d)": "R32_",
        r"(r(ax|cx|dx|bx|sp|bp|si|di)|r\d+)": "R64_",
        r"[ecsdfg]s": "SEG_REG",
        r"cr\d+": "CR_",
        r"dr\d+": "DR_",
        r"tr\d+": "TR_",
        r"k\d": "K",
        r"bnd\d": "BND_",
        r"st\d": "STI_",
        r"mm\d": "MM_",
        r"xmm\d+": "XMM",
        r"ymm\d+": "YMM",
        r"zmm\d+": "ZMM",
        r"tmm\d": "TMM",
    }
    shapes: dict[int, int] = {}
    for name, number in REGISTERS.items():
        prefix = next((kind for pattern, kind in classes.items() if re.fullmatch(pattern, name)), None)
        if prefix:
            kinds = [kind for kind in KINDS if kind.startswith(prefix)]
            kinds += [kind for kind in KINDS if kind == name.upper()]  # AL, CL, AX, DX, ES, ST0, ...
            shapes[number] = kinds_mask(*kinds)
    return shapes


@dataclass(frozen=True, slots=True)
class RegisterOperand:
    """A register; `shape` is the mask of operand kinds it can be."""

    register: int
    shape: int

    def store(self, instruction: Instruction, number: int, op_kind: int) -> None:
        instruction.set_op_register(number, self.register)  # type: ignore[arg-type]


_SHAPES = _register_shapes()
REGISTER_OPERANDS = {
    name: RegisterOperand(number, _SHAPES[number]) for name, number in REGISTERS.items() if number in _SHAPES
}
# One register for all that match the same encodings, so that the choice of an encoding depends on them alone.
REPRESENTATIVES: dict[int, RegisterOperand] = {}
for _operand in REGISTER_OPERANDS.values():
    REPRESENTATIVES.setdefault(_operand.shape, _operand)


@dataclass(frozen=True, slots=True)
class ImmediateOperand:
    """A number, with the size in bytes that was written before it (0 if none)."""

    value: int
    size: int
    shape: int

    def store(self, instruction: Instruction, number: int, op_kind: int) -> None:
        instruction.set_op_kind(number, op_kind)  # type: ignore[arg-type]
        instruction.set_immediate_u64(number, self.value & _MASK64)


@dataclass(frozen=True, slots=True)
class FarOperand:
    """selector:offset."""

    selector: int
    offset: int
    size: int
    shape: int

    def store(self, instruction: Instruction, number: int, op_kind: int) -> None:
        instruction.set_op_kind(number, op_kind)  # type: ignore[arg-type]
        instruction.far_branch_selector = self.selector
        if op_kind == OpKind.FAR_BRANCH16:
            instruction.far_branch16 = self.offset
        else:
            instruction.far_branch32 = self.offset


@dataclass(frozen=True, slots=True)
class MemoryOperand:
    """A memory operand; `size` in bytes, 0 if not written; `address_size` in bits."""

    base: int
    index: int
    scale: int
    displacement: int
    displacement_size: int
    segment: int
    size: int
    shape: int

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


def immediate_shape(value: int, size: int, wide: bool) -> int:
    """The mask of immediate kinds that can hold the value; `wide` leaves out the sign-extended bytes."""
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
    return mask | size << SIZE_SHIFT


def fits_sign_extended(value: int, stored: int, bits: int) -> bool:
    """Whether a value of so many bits is its low `stored` bits, sign-extended."""
    limit = 1 << stored - 1
    return -limit <= value < limit or (1 << bits) - limit <= value < 1 << bits


_IMM8 = kinds_mask("IMM8")
_IMM8_CONST_1 = kinds_mask("IMM8_CONST_1")
_IMM4 = kinds_mask("IMM4_M2Z")
_IMM16 = kinds_mask("IMM16")
_IMM32 = kinds_mask("IMM32")
_IMM32SEX64 = kinds_mask("IMM32SEX64")
_IMM64 = kinds_mask("IMM64")
_SIGN_EXTENDED_BYTES = [(bits, kinds_mask(f"IMM8SEX{bits}")) for bits in (16, 32, 64)]
_MEM_OFFS = kinds_mask("MEM_OFFS")
_FAR = kinds_mask("FARBR2_2", "FARBR4_2")


def tokenize(text: str) -> list[str]:
    return _TOKEN.findall(text)


class _Expression:
    """Precedence climbing over tokens; `resolve` gives the value of a name, `$` or `$$`."""

    _LEVELS: tuple[dict[str, Callable[[int, int], int]], ...] = (
        {"|": int.__or__},
        {"^": int.__xor__},
        {"&": int.__and__},
        {"<<": int.__lshift__, ">>": int.__rshift__},
        {"+": int.__add__, "-": int.__sub__},
        {"*": int.__mul__, "/": int.__floordiv__, "%": int.__mod__},
    )

    def __init__(self, tokens: list[str], resolve: Callable[[str], int]) -> None:
        self.tokens = tokens
        self.position = 0
        self.resolve = resolve

    def value(self) -> int:
        value = self._level(0)
        if self.position < len(self.tokens):
            raise AssemblyError(f"unexpected {self.tokens[self.position]!r} in an expression")
        return value

    def _level(self, level: int) -> int:
        if level == len(self._LEVELS):
            return self._unary()
        operators = self._LEVELS[level]
        value = self._level(level + 1)
        while self.position < len(self.tokens) and self.tokens[self.position] in operators:
            operator = self.tokens[self.position]
            self.position += 1
            right = self._level(level + 1)
            if operator in ("/", "%") and right == 0:
                raise AssemblyError("division by zero")
            if operator in ("<<", ">>") and not 0 <= right < 256:
                raise AssemblyError(f"shift by {right}")
            value = operators[operator](value, right)
        return value

    def _unary(self) -> int:
        if self.position >= len(self.tokens):
            raise AssemblyError("expression expected")
        token = self.tokens[self.position]
        self.position += 1
        if token == "-":
            return -self._unary()
        if token == "+":
            return self._unary()
        if token == "~":
            return ~self._unary()
        if token == "(":
            value = self._level(0)
            if self.position >= len(self.tokens) or self.tokens[self.position] != ")":
                raise AssemblyError("')' expected")
            self.position += 1
            return value
        return atom(token, self.resolve)


def atom(token: str, resolve: Callable[[str], int]) -> int:
    """The value of a number, a character constant (little-endian, as NASM has it), a name, `$` or `$$`."""
    first = token[0]
    if first.isdigit():
        try:
            return int(token) if token.isdigit() else int(token, 0)
        except ValueError:
            raise AssemblyError(f"bad number {token!r}") from None
    if first in "'\"" and len(token) > 1:
        return int.from_bytes(token[1:-1].encode(), "little")
    if first.isalpha() or first in "_.?@$":
        if token.lower() in REGISTERS:
            raise AssemblyError(f"register {token!r} in an expression")
        return resolve(token)
    raise AssemblyError(f"unexpected {token!r} in an expression")


def evaluate(text: str, resolve: Callable[[str], int]) -> int:
    """The value of an expression over integers of any size."""
    tokens = _TOKEN.findall(text)
    return evaluate_tokens(tokens, resolve)


def evaluate_tokens(tokens: list[str], resolve: Callable[[str], int]) -> int:
    if len(tokens) == 1:
        return atom(tokens[0], resolve)
    return _Expression(tokens, resolve).value()


def parse_operand(text: str, bits: int, wide: bool, resolve: Callable[[str], int]) -> Operand:
    """One operand; `wide` asks for full-size immediates and displacements."""
    register = REGISTER_OPERANDS.get(text) or REGISTER_OPERANDS.get(text.lower())
    if register:
        return register
    size = 0
    first, _, rest = text.partition(" ")
    if first.lower() in SIZES:
        size = SIZES[first.lower()]
        text = rest.lstrip()
        if text[:4].lower() == "ptr ":
            text = text[4:].lstrip()
    elif "[" in first and first.partition("[")[0].lower() in SIZES:
        size = SIZES[first.partition("[")[0].lower()]
        text = text[text.index("[") :]
    if "[" in text:
        return _parse_memory(text, size, bits, wide, resolve)
    if ":" in text:
        return _parse_far(text, size, resolve)
    value = evaluate(text, resolve)
    return ImmediateOperand(value, size, immediate_shape(value, size, wide))


def _parse_far(text: str, size: int, resolve: Callable[[str], int]) -> FarOperand:
    selector_text, _, offset_text = text.partition(":")
    selector, offset = evaluate(selector_text, resolve), evaluate(offset_text, resolve)
    if not 0 <= selector <= 0xFFFF:
        raise AssemblyError(f"selector {selector:#x} out of range")
    shape = _FAR
    if size == 2 or (size == 0 and offset > 0xFFFF):
        shape = kinds_mask("FARBR2_2") if size else kinds_mask("FARBR4_2")
    elif size == 4:
        shape = kinds_mask("FARBR4_2")
    if not 0 <= offset <= (0xFFFF if size == 2 else 0xFFFF_FFFF):
        raise AssemblyError(f"offset {offset:#x} out of range")
    return FarOperand(selector, offset, size, shape | size << SIZE_SHIFT)


def _parse_memory(
    text: str, size: int, bits: int, wide: bool, resolve: Callable[[str], int]
) -> MemoryOperand:
    segment = 0
    before, _, inside = text.partition("[")
    if not inside.endswith("]"):
        raise AssemblyError("']' expected")
    inside = inside[:-1]
    if before:
        segment = _segment(before)
    if ":" in inside:
        before, _, inside = inside.partition(":")
        segment = _segment(before + ":")
    tokens = _TOKEN.findall(inside)
    if tokens and tokens[0].lower() == "rel":
        return _rip_relative(tokens[1:], size, segment, bits, resolve)
    absolute_size = 0
    if tokens and tokens[0].lower() in ("word", "dword", "qword"):
        absolute_size = SIZES[tokens[0].lower()] * 8
        del tokens[0]
    base, index, scale, rest = _split_address(tokens, resolve)
    displacement = evaluate_tokens(rest, resolve) if rest else 0
    if not base and not index:
        return _absolute(displacement, absolute_size, size, segment, bits)
    address_size = _ADDRESS_REGISTERS.get(base) or _ADDRESS_REGISTERS.get(index) or bits
    displacement_size = _displacement_size(displacement, address_size, wide and bool(rest))
    shape = _VECTOR_INDEXES.get(index, ANY_MEMORY)
    return MemoryOperand(
        base, index, scale, displacement, displacement_size, segment, size, shape | size << SIZE_SHIFT
    )


def _segment(text: str) -> int:
    name = text.rstrip()
    if not name.endswith(":") or name[:-1].strip().lower() not in _SEGMENTS:
        raise AssemblyError(f"segment register expected before '[', not {text.strip()!r}")
    return _SEGMENTS[name[:-1].strip().lower()]


def _rip_relative(
    tokens: list[str], size: int, segment: int, bits: int, resolve: Callable[[str], int]
) -> MemoryOperand:
    if bits != 64:
        raise AssemblyError("RIP-relative addressing is for 64-bit code")
    target = evaluate_tokens(tokens, resolve)
    return MemoryOperand(_RIP, 0, 1, target, 8, segment, size, ANY_MEMORY | size << SIZE_SHIFT)


def _absolute(value: int, address_size: int, size: int, segment: int, bits: int) -> MemoryOperand:
    """An address with no register: the accumulator's own encoding (moffs) is allowed where it is shorter."""
    if not address_size:
        address_size = bits
        if bits == 16 and not -0x8000 <= value <= 0xFFFF:
            address_size = 32
    shape = ANY_MEMORY
    if address_size != 64:
        shape |= _MEM_OFFS if bits != 64 else 0
    elif not fits_sign_extended(value, 32, 64):
        shape = _MEM_OFFS
    if not -(1 << address_size - 1) <= value < 1 << address_size:
        raise AssemblyError(f"address {value:#x} out of range")
    return MemoryOperand(0, 0, 1, value, address_size // 8, segment, size, shape | size << SIZE_SHIFT)


def _displacement_size(displacement: int, address_size: int, wide: bool) -> int:
    """iced's size of a displacement: 1 lets its encoder take a byte where that is enough."""
    stored = 16 if address_size == 16 else 32
    if not fits_sign_extended(displacement, stored, address_size):
        raise AssemblyError(f"displacement {displacement:#x} out of range")
    if wide:
        return address_size // 8
    return 1 if displacement else 0


def _split_address(tokens: list[str], resolve: Callable[[str], int]) -> tuple[int, int, int, list[str]]:
    """Takes base and index out of an address: (base, index, scale, the tokens that are left)."""
    base = index = 0
    scale = 1
    rest: list[str] = []
    position = 0
    while position < len(tokens):
        register = REGISTERS.get(tokens[position].lower(), 0)
        factor_first = not register and tokens[position + 1 : position + 2] == ["*"]
        if factor_first and position + 2 < len(tokens):
            register = REGISTERS.get(tokens[position + 2].lower(), 0)
        if not register:
            rest.append(tokens[position])
            position += 1
            continue
        if rest and rest[-1] == "+":
            rest.pop()
        elif rest:
            raise AssemblyError(f"register after {rest[-1]!r} in an address")
        factor = 0
        if factor_first:
            factor, position = atom(tokens[position], resolve), position + 3
        elif tokens[position + 1 : position + 2] == ["*"] and position + 2 < len(tokens):
            factor, position = atom(tokens[position + 2], resolve), position + 3
        else:
            position += 1
        if position < len(tokens) and tokens[position] not in "+-":
            raise AssemblyError(f"unexpected {tokens[position]!r} in an address")
        if not rest and position < len(tokens) and tokens[position] == "+":
            position += 1
            if position == len(tokens):
                raise AssemblyError("expression expected")
        if not base and not factor and register not in _VECTOR_INDEXES:
            base = register
        elif not index:
            index, scale = register, factor or 1
        elif not base and scale == 1:
            base = register  # unreachable with a factor, which is checked below
        else:
            raise AssemblyError("more than two registers in an address")
    return (*_normalize(base, index, scale), rest)


def _normalize(base: int, index: int, scale: int) -> tuple[int, int, int]:
    """Puts base and index where the encoding wants them (Intel SDM 2A 2.1.5)."""
    if not base and index and index not in _VECTOR_INDEXES:
        if scale == 1:
            base, index = index, 0
        elif scale in (2, 3, 5, 9):
            base, scale = index, scale - 1
    if index in _STACK_POINTERS and scale == 1:
        base, index = index, base
    if base in _INDEX_ONLY_16 and index:
        base, index = index, base
    sizes = {_ADDRESS_REGISTERS.get(r) for r in (base, index) if r and r not in _VECTOR_INDEXES}
    if None in sizes or len(sizes) > 1:
        raise AssemblyError("these registers cannot form an address")
    if scale not in (1, 2, 4, 8) or (16 in sizes and scale != 1):
        raise AssemblyError(f"index scale {scale}")
    if index in _STACK_POINTERS:
        raise AssemblyError("the stack pointer cannot be an index")
    return base, index, scale


_COMMA_ITEM = re.compile(r"""((?:[^,'"]|'[^']*'|"[^"]*")*)(?:,|$)""")


def split_commas(text: str) -> list[str]:
    """The items of a comma-separated list, in which strings may hold commas."""
    if "'" not in text and '"' not in text:
        return text.split(",")
    items = []
    position = 0
    while position <= len(text):
        match = _COMMA_ITEM.match(text, position)
        if match is None:
            raise AssemblyError("unterminated string")
        items.append(match[1])
        position = match.end()
        if position == len(text) and not match[0].endswith(","):
            break
    return items
