"""From one instruction's text to its bytes: prefixes, operands, and the choice among the encodings."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from iced_x86 import Encoder, Instruction, OpKind

from trivisor.x86.expressions import AssemblyError, Symbols, split_commas
from trivisor.x86.opcodes import FIXED_REGISTERS, KINDS, REGISTERS, Form, branch_forms, forms
from trivisor.x86.operands import (
    REGISTER_OPERANDS,
    REPRESENTATIVES,
    ImmediateOperand,
    MemoryOperand,
    Operand,
    RegisterOperand,
    immediate_shape,
    parse_operand,
)

_REPEATS = {"rep": "rep", "repe": "rep", "repz": "rep", "repne": "repne", "repnz": "repne"}
_SEGMENTS = {name: REGISTERS[name] for name in ("es", "cs", "ss", "ds", "fs", "gs")}
_OPERAND_SIZES = {"o16": 16, "o32": 32, "o64": 64}
_ADDRESS_SIZES = {"a16": 16, "a32": 32, "a64": 64}
_PREFIXES = {"lock", *_REPEATS, *_SEGMENTS, *_OPERAND_SIZES, *_ADDRESS_SIZES}

# Memory operands of these have the mode's own size where none is written.
_DEFAULT_SIZED = {"jmp", "call", "fldenv", "fstenv", "fnstenv", "fsave", "fnsave", "frstor"}
# A 16-bit register operand of these means the same as the 32-bit one, which needs no prefix.
_READ_WORD = {"lldt", "ltr", "lmsw", "verr", "verw"}
_WORD_REGISTERS: dict[RegisterOperand, RegisterOperand] = {
    REGISTER_OPERANDS[name]: REGISTER_OPERANDS["e" + name]
    for name in ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
} | {REGISTER_OPERANDS[f"r{n}w"]: REGISTER_OPERANDS[f"r{n}d"] for n in range(8, 16)}
_SEGMENT_OPERANDS = {REGISTER_OPERANDS[name] for name in _SEGMENTS}
_ST0, _ST1 = REGISTER_OPERANDS["st0"], REGISTER_OPERANDS["st1"]
_EAX = REGISTER_OPERANDS["eax"]
_ACCUMULATORS = {REGISTER_OPERANDS["ax"], _EAX, REGISTER_OPERANDS["rax"]}

_MASK64 = (1 << 64) - 1
_DISTANCE = re.compile(r"(short|near|far)\s+", re.IGNORECASE)
_DISTANCE_INITIALS = "sSnNfF"
_NEAR_BRANCH = {16: OpKind.NEAR_BRANCH16, 32: OpKind.NEAR_BRANCH32, 64: OpKind.NEAR_BRANCH64}
_STRING_OPERANDS = {
    KINDS["SEG_RSI"]: {16: OpKind.MEMORY_SEG_SI, 32: OpKind.MEMORY_SEG_ESI, 64: OpKind.MEMORY_SEG_RSI},
    KINDS["SEG_RDI"]: {16: OpKind.MEMORY_SEG_DI, 32: OpKind.MEMORY_SEG_EDI, 64: OpKind.MEMORY_SEG_RDI},
    KINDS["ES_RDI"]: {16: OpKind.MEMORY_ESDI, 32: OpKind.MEMORY_ESEDI, 64: OpKind.MEMORY_ESRDI},
}
_TABLE_POINTER = {16: REGISTERS["bx"], 32: REGISTERS["ebx"], 64: REGISTERS["rbx"]}


class _Modifiers(NamedTuple):
    """What is written besides mnemonic and operands: prefixes and `far`; sizes in bits, 0 where none is."""

    lock: bool = False
    repeat: str = ""
    segment: int = 0
    operand_size: int = 0
    address_size: int = 0
    is_far: bool = False


_PLAIN = _Modifiers()
_FAR = _Modifiers(is_far=True)
# Encodings to try, best first, by mnemonic, bitness, operand size, far pointer, and the operands' shapes.
_choices: dict[tuple[str, int, int, bool, tuple[int, ...]], tuple[Form, ...]] = {}


class InstructionEncoder:
    """Encodes instructions for code of one bitness."""

    def __init__(self, bits: int, symbols: Symbols) -> None:
        self.bits = bits
        self.symbols = symbols
        self.encoder = Encoder(bits)
        self.known_operands: dict[str, Operand] = {}  # those that depend on no label

    def encode(self, mnemonic: str, rest: str, wide: bool) -> bytes:
        """The bytes of an instruction; `wide` keeps what depends on labels in its long form.

        `mnemonic` is the line's first word in lower case, which may be a prefix.
        """
        modifiers = _PLAIN
        if mnemonic in _PREFIXES:
            modifiers, mnemonic, rest = _split_prefixes(mnemonic, rest)
        distance = ""
        if rest[:1] in _DISTANCE_INITIALS and (written := _DISTANCE.match(rest)):
            distance, rest = written[1].lower(), rest[written.end() :]
        operands = [self._operand(part, wide) for part in split_commas(rest)] if rest else []
        if len(operands) == 1 and type(operands[0]) is ImmediateOperand:
            branch = branch_forms(mnemonic, self.bits)
            if branch:
                if distance == "far" or modifiers is not _PLAIN:
                    raise AssemblyError("a relative branch takes no prefix and is not far")
                must_be_near = distance == "near" or (wide and not distance and branch[1])
                short = None if must_be_near else branch[0]
                near = None if distance == "short" else branch[1]
                return self._branch(short, near, operands[0].value)
        if distance == "far":
            modifiers = _FAR if modifiers is _PLAIN else modifiers._replace(is_far=True)
        return self._encode(mnemonic, operands, modifiers)

    def _operand(self, text: str, wide: bool) -> Operand:
        operand = REGISTER_OPERANDS.get(text) or self.known_operands.get(text)
        if operand:
            return operand
        symbols = self.symbols
        used_positions, symbols.used_positions = symbols.used_positions, False
        operand = parse_operand(text, self.bits, False, symbols.resolve)
        if not symbols.used_positions:
            self.known_operands[text] = operand
        elif wide:
            operand = parse_operand(text, self.bits, True, symbols.resolve)
        symbols.used_positions |= used_positions
        return operand

    # Relative branches

    def branch_lengths(self, mnemonic: str) -> tuple[int, int]:
        """Lengths in bytes of a relative branch: (short, near), 0 where there is no such encoding."""
        branch = branch_forms(mnemonic, self.bits)
        if branch is None:
            return 0, 0
        short, near = (len(self._emit_branch(form, self.symbols.address)) if form else 0 for form in branch)
        return short, near

    def encode_branch(self, mnemonic: str, target: int, near: bool) -> bytes:
        """A relative branch to an address."""
        branch = branch_forms(mnemonic, self.bits)
        assert branch is not None
        return self._branch(None if near else branch[0], branch[1] if near else None, target)

    def _branch(self, short: Form | None, near: Form | None, target: int) -> bytes:
        """A branch in the first of its forms that reaches the target."""
        self.symbols.resolve("$")  # whatever the target, the encoding depends on where the branch stands
        for form in (short, near):
            if form:
                try:
                    return self._emit_branch(form, target)
                except ValueError:
                    continue
        raise AssemblyError(f"branch target {target:#x} is out of reach")

    def _emit_branch(self, form: Form, target: int) -> bytes:
        instruction = Instruction()
        instruction.code = form.code  # type: ignore[assignment]
        instruction.op0_kind = _NEAR_BRANCH[self.bits]
        instruction.near_branch64 = target & (1 << self.bits) - 1
        return self._emit(instruction)

    # All other instructions

    def _encode(self, mnemonic: str, operands: list[Operand], modifiers: _Modifiers) -> bytes:
        shapes = tuple([operand.shape for operand in operands])
        key = (mnemonic, self.bits, modifiers.operand_size, modifiers.is_far, shapes)
        choice = _choices.get(key)
        if choice is None:
            rewritten = self._rewrite(mnemonic, operands, modifiers)
            choice = self._choose(mnemonic, rewritten, modifiers)
            if rewritten is operands:
                _choices[key] = choice
            operands = rewritten
        problem = "no encoding"
        for form in choice:
            try:
                return self._emit(self._build(form, operands, modifiers))
            except ValueError as error:
                problem = str(error)
        raise AssemblyError(problem)

    def _build(self, form: Form, operands: Sequence[Operand], modifiers: _Modifiers) -> Instruction:
        instruction = Instruction()
        instruction.code = form.code  # type: ignore[assignment]
        for (number, op_kind), operand in zip(form.slots, operands, strict=True):
            operand.store(instruction, number, op_kind)
        for number, kind in form.implied:
            self._imply(instruction, number, kind, modifiers.address_size or self.bits)
        if modifiers is not _PLAIN:
            instruction.has_lock_prefix = modifiers.lock
            instruction.has_rep_prefix = modifiers.repeat == "rep"
            instruction.has_repne_prefix = modifiers.repeat == "repne"
            if modifiers.segment:
                instruction.segment_prefix = modifiers.segment  # type: ignore[assignment]
        return instruction

    def _imply(self, instruction: Instruction, number: int, kind: int, address_size: int) -> None:
        """Sets an operand that is not written: a string instruction's memory or accumulator."""
        if kind in _STRING_OPERANDS:
            instruction.set_op_kind(number, _STRING_OPERANDS[kind][address_size])
        elif kind == KINDS["SEG_RBX_AL"]:
            instruction.set_op_kind(number, OpKind.MEMORY)
            instruction.memory_base = _TABLE_POINTER[address_size]  # type: ignore[assignment]
            instruction.memory_index = REGISTERS["al"]  # type: ignore[assignment]
        else:
            instruction.set_op_register(number, FIXED_REGISTERS[kind])  # type: ignore[arg-type]

    def _emit(self, instruction: Instruction) -> bytes:
        try:
            self.encoder.encode(instruction, self.symbols.address & _MASK64)
        except ValueError:
            self.encoder.take_buffer()  # it keeps the bytes that came before the error
            raise
        return self.encoder.take_buffer()

    # Choice of the encoding

    def _choose(
        self, mnemonic: str, operands: list[Operand], modifiers: _Modifiers
    ) -> tuple[Form, ...]:
        """The encodings that fit, best first; raises AssemblyError if there is none or no one size."""
        if not forms(mnemonic):
            raise AssemblyError(f"no instruction {mnemonic!r}")
        candidates = self._matching(mnemonic, operands, modifiers)
        if not candidates:
            if any(type(o) is MemoryOperand and o.needs_64_bit_address for o in operands):
                raise AssemblyError("address does not fit in 32 bits; use [rel ...] or a register")
            raise AssemblyError(f"no form of {mnemonic!r} takes these operands in {self.bits}-bit code")
        sizes = {form.memory_size for form in candidates if form.memory_size}
        has_unsized_memory = any(type(o) is MemoryOperand and not o.size for o in operands)
        if has_unsized_memory and len(sizes) > 1 and mnemonic not in _DEFAULT_SIZED:
            raise AssemblyError("operand size not given")
        ranked = []
        for order, form in enumerate(candidates):
            length = self._length(form, operands, modifiers)
            if length:
                is_other_size = modifiers.operand_size not in (0, form.operand_size)
                rank = (form.is_evex, is_other_size, self._needs_size_prefix(form), length, order)
                ranked.append((rank, form))
        ranked.sort(key=lambda entry: entry[0])
        return tuple(form for _, form in ranked) or tuple(candidates)

    def _matching(self, mnemonic: str, operands: list[Operand], modifiers: _Modifiers) -> list[Form]:
        shapes = [operand.shape for operand in operands]
        size = next((o.size for o in operands if type(o) is MemoryOperand), 0)
        if size and modifiers.is_far:
            size += 2  # what is written is the size of the offset
        candidates = [
            form
            for form in forms(mnemonic)
            if form.is_available(self.bits)
            and form.is_far_pointer == modifiers.is_far
            and form.takes(shapes)
            and not (size and form.memory_size and form.memory_size != size)
            and not (modifiers.operand_size and form.operand_size not in (0, modifiers.operand_size))
        ]
        is_unsized = [type(o) is ImmediateOperand and not o.size for o in operands] == [True]
        if mnemonic == "push" and is_unsized and not modifiers.operand_size:
            # how much goes on the stack must not depend on the value
            return [form for form in candidates if not self._needs_size_prefix(form)]
        return candidates

    def _length(self, form: Form, operands: list[Operand], modifiers: _Modifiers) -> int:
        """The encoding's length with operands like these; 0 if it has none."""
        alike = [REPRESENTATIVES.get(operand.shape, operand) for operand in operands]
        try:
            return len(self._emit(self._build(form, alike, modifiers)))
        except ValueError:
            return 0

    def _needs_size_prefix(self, form: Form) -> bool:
        return form.operand_size == (32 if self.bits == 16 else 16)

    def _rewrite(self, mnemonic: str, operands: list[Operand], modifiers: _Modifiers) -> list[Operand]:
        """The operands as the tables have them, where NASM's dialect lets them be written otherwise."""
        if len(operands) == 2 and mnemonic == "xchg" and operands[0] in _ACCUMULATORS:
            if operands == [_EAX, _EAX] and self.bits == 64:
                raise AssemblyError("xchg eax, eax would be a nop, which does not clear the upper half")
            return operands[::-1]
        last = operands[-1] if operands else None
        to_segment = mnemonic == "mov" and operands and operands[0] in _SEGMENT_OPERANDS
        reads_word = mnemonic in _READ_WORD or to_segment
        if reads_word and self.bits != 16 and isinstance(last, RegisterOperand) and last in _WORD_REGISTERS:
            return [*operands[:-1], _WORD_REGISTERS[last]]
        if not self._matching(mnemonic, operands, modifiers):
            for variant in _variants(mnemonic, operands):
                if self._matching(mnemonic, variant, modifiers):
                    return variant
        return operands


def _variants(mnemonic: str, operands: list[Operand]) -> list[list[Operand]]:
    """Other ways to say an instruction's operands."""
    if mnemonic in ("test", "xchg"):
        return [operands[::-1]]
    if mnemonic == "imul" and len(operands) == 2:
        return [[operands[0], *operands]]
    if mnemonic in ("aam", "aad") and not operands:
        return [[ImmediateOperand(10, 0, immediate_shape(10, 0, False))]]
    if mnemonic in ("lar", "lsl") and operands and isinstance(operands[-1], RegisterOperand):
        return [[*operands[:-1], _WORD_REGISTERS.get(operands[-1], operands[-1])]]
    if mnemonic.startswith("f") and len(operands) == 1:
        return [[_ST0, *operands], [*operands, _ST0]]
    if mnemonic.startswith("f") and not operands:
        return [[_ST1, _ST0], [_ST0, _ST1]]
    return []


def _split_prefixes(word: str, rest: str) -> tuple[_Modifiers, str, str]:
    lock, repeat, segment, operand_size, address_size = False, "", 0, 0, 0
    while word in _PREFIXES:
        lock = lock or word == "lock"
        repeat = _REPEATS.get(word, repeat)
        segment = _SEGMENTS.get(word, segment)
        operand_size = _OPERAND_SIZES.get(word, operand_size)
        address_size = _ADDRESS_SIZES.get(word, address_size)
        word, rest = (*rest.split(None, 1), "", "")[:2]
        word = word.lower()
    if not word:
        raise AssemblyError("instruction expected after a prefix")
    return _Modifiers(lock, repeat, segment, operand_size, address_size), word, rest


def is_mnemonic(word: str) -> bool:
    """Whether a lower-case word starts an instruction."""
    return word in _PREFIXES or bool(forms(word))
