"""A small assembler in Intel syntax (NASM's dialect), on top of iced-x86's encoder.

One statement a line: `label: instruction ; comment`. Labels that start with a dot belong to the last label
without one. Directives: `NAME equ expression`, `bits 16|32|64`, `db`, `dw`, `dd`, `dq`, `align N[, fill]`,
`times N statement`. Of the encodings that an instruction has the shortest is taken; of equally short ones,
mostly NASM's. What depends on labels is assembled again and again until all labels stay where they are:
branches start short and only grow, and what has changed its length too often gets its long form for good.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from trivisor.x86.expressions import NAME, AssemblyError, Symbols, evaluate, split_commas, tokenize
from trivisor.x86.instructions import InstructionEncoder, is_mnemonic
from trivisor.x86.opcodes import REGISTERS

__all__ = ["AssemblyError", "Program", "assemble"]


class Program(NamedTuple):
    """Assembled code, to be put at `origin`; labels are absolute addresses, local ones are `outer.inner`."""

    code: bytes
    origin: int
    labels: dict[str, int]


def assemble(
    source: str, *, bits: int = 64, origin: int = 0, symbols: Mapping[str, int] | None = None
) -> Program:
    """Assembles source text for 16-, 32- or 64-bit code that will stand at the address `origin`.

    `symbols` are constants that the source may use. Raises AssemblyError.
    """
    return _Assembly(bits, Symbols(origin, symbols or {})).run(source)


_MAX_REPEAT = 1 << 24
_MAX_PASSES = 1000
_MAX_CHANGES = 4  # of a statement's length, before it has to take its long form
_STATEMENT = re.compile(rf"\s*(?:({NAME})\s*:)?\s*(\S+)?\s*(.*?)\s*$")
_EQU = re.compile(rf"\s*({NAME})\s*:?\s+equ\s+(.*?)\s*$", re.IGNORECASE)
_NAME = re.compile(rf"(?<![\w.?@]){NAME}")
_BEFORE_COMMENT = re.compile(r"""(?:[^;'"]|'[^']*'|"[^"]*"|['"])*?(?=;|$)""")
_STRING = re.compile(r"'[^']*'|\"[^\"]*\"")
_DATA_SIZES = {"db": 1, "dw": 2, "dd": 4, "dq": 8}
_DIRECTIVES = {"align", "times", *_DATA_SIZES}


@dataclass(slots=True, eq=False)
class _Statement:
    """A line that may put out something.

    `gap`: bytes of code that depends on no label, between the last statement that does and this one.
    `moves`: it depends on labels. `wide`: it is to take its long form. `target` is set for a relative branch
    to a plain name, which is encoded when everything has its place; until then it has one of two `lengths`.
    """

    line: int
    text: str
    bits: int
    scope: str
    operation: str
    rest: str
    label: str = ""
    constant: str = ""
    code: bytes = b""
    length: int = 0
    gap: int = 0
    moves: bool = False
    changes: int = 0
    wide: bool = False
    target: str = ""
    lengths: tuple[int, int] = (0, 0)


class _Assembly:
    """One source text on its way to a program."""

    def __init__(self, bits: int, symbols: Symbols) -> None:
        self.bits = _parse_bits(str(bits))
        self.symbols = symbols
        self.encoders = {n: InstructionEncoder(n, symbols) for n in (16, 32, 64)}
        self.fixed: dict[tuple[int, str, str], bytes] = {}  # code that depends on no label
        self.branch_lengths: dict[tuple[int, str], tuple[int, int]] = {}

    def run(self, source: str) -> Program:
        statements = self._read_all(source)
        self.symbols.is_complete = True
        unsettled = _unsettled(statements)
        passes = 0
        while self._settle(unsettled):
            passes += 1
            if passes == _MAX_PASSES:
                raise AssemblyError("labels do not come to rest")
        self._encode_branches(unsettled)
        positions = self.symbols.positions
        labels = {s.label: positions[s.label] for s in statements if s.label}
        return Program(b"".join([s.code for s in statements]), self.symbols.origin, labels)

    # Passes

    def _read_all(self, source: str) -> list[_Statement]:
        """Reads all lines; what depends on no label gets its code, and the rest a first length."""
        statements: list[_Statement] = []
        symbols = self.symbols
        number, text = 0, ""
        try:
            for number, text in enumerate(source.splitlines(), 1):
                statement = self._read(number, text)
                if statement:
                    self._assemble(statement)
                    statements.append(statement)
                    symbols.address += statement.length
        except ValueError as error:
            raise _located(error, number, text) from None
        return statements

    def _settle(self, statements: list[_Statement]) -> bool:
        """Places statements one after the other again; whether anything has changed.

        An error counts only when nothing has changed: before, a label's value may be to blame.
        """
        symbols, positions = self.symbols, self.symbols.positions
        symbols.address = symbols.origin
        changed = False
        first_error: AssemblyError | None = None
        for statement in statements:
            symbols.address += statement.gap
            if statement.label and positions[statement.label] != symbols.address:
                positions[statement.label] = symbols.address
                changed = True
            try:
                if statement.target:
                    changed |= self._stretch(statement)
                elif statement.moves:
                    changed |= self._reassemble(statement)
            except ValueError as error:
                first_error = first_error or _located(error, statement.line, statement.text)
            symbols.address += statement.length
        if first_error and not changed:
            raise first_error
        return changed

    def _stretch(self, branch: _Statement) -> bool:
        """Makes a branch near if its target is out of a short one's reach; whether it did."""
        if branch.wide:
            return False
        distance = self.symbols.resolve(branch.target) - (self.symbols.address + branch.length)
        if -0x80 <= distance <= 0x7F:
            return False
        branch.wide = True
        branch.length = branch.lengths[1]
        return True

    def _reassemble(self, statement: _Statement) -> bool:
        """Assembles a statement that depends on labels; whether its length or its constant has changed."""
        symbols = self.symbols
        length, value = statement.length, symbols.positions.get(statement.constant)
        symbols.scope = statement.scope
        self._assemble(statement)
        if statement.length != length:
            statement.changes += 1
            statement.wide = statement.changes > _MAX_CHANGES
            return True
        return symbols.positions.get(statement.constant) != value

    def _encode_branches(self, statements: list[_Statement]) -> None:
        symbols = self.symbols
        symbols.address = symbols.origin
        for s in statements:
            symbols.address += s.gap
            if s.target:
                try:
                    target = symbols.resolve(s.target)
                    s.code = self.encoders[s.bits].encode_branch(s.operation, target, s.wide)
                except ValueError as error:
                    raise _located(error, s.line, s.text) from None
            symbols.address += s.length

    # Reading

    def _read(self, number: int, text: str) -> _Statement | None:
        """The statement of a line, if it has any."""
        line = _without_comment(text) if ";" in text else text
        if "equ" in line.lower() and (equ := _EQU.match(line)):
            name = self.symbols.declare(equ[1])
            return _Statement(number, text, self.bits, self.symbols.scope, "equ", equ[2], constant=name)
        match = _STATEMENT.match(line)
        if match is None or not match.group().strip():
            return None
        label, operation, rest = match.groups("")
        statement = _Statement(number, text, self.bits, self.symbols.scope, operation.lower(), rest)
        if label:
            statement.label = self.symbols.declare(label)
            self.symbols.positions[statement.label] = self.symbols.address
            if not label.startswith("."):
                self.symbols.scope = statement.scope = label
        if statement.operation == "bits":
            self.bits = _parse_bits(rest)
            statement.operation = ""
        return statement

    # Statements

    def _assemble(self, statement: _Statement) -> None:
        """Sets a statement's code and length, or the length alone of a branch to a plain name."""
        if not statement.operation or self._is_plain_branch(statement):
            return
        key = (statement.bits, statement.operation, statement.rest)
        code = self.fixed.get(key)
        symbols = self.symbols
        symbols.used_positions = False
        if code is None:
            try:
                code = self._encode(statement)
            except AssemblyError:
                if symbols.is_complete or not symbols.used_positions:
                    raise
                code = b""  # labels that are still to come may be to blame
            if not symbols.used_positions and not statement.constant:
                self.fixed[key] = code
        statement.code, statement.length = code, len(code)
        statement.moves = symbols.used_positions

    def _is_plain_branch(self, statement: _Statement) -> bool:
        """Whether this is a relative branch to a name that is no constant; if so it gets its length."""
        key = (statement.bits, statement.operation)
        lengths = self.branch_lengths.get(key)
        if lengths is None:
            lengths = self.encoders[statement.bits].branch_lengths(statement.operation)
            self.branch_lengths[key] = lengths
        rest = statement.rest
        if not lengths[1] or not _NAME.fullmatch(rest) or rest.lower() in REGISTERS:
            return False
        target = self.symbols.qualify(rest)
        if target in self.symbols.constants:
            return False
        statement.target, statement.lengths = target, lengths
        statement.wide = not lengths[0]
        statement.length = lengths[statement.wide]
        return True

    def _encode(self, statement: _Statement) -> bytes:
        operation, rest = statement.operation, statement.rest
        if operation in _DATA_SIZES:
            return self._data(_DATA_SIZES[operation], rest)
        if operation == "align":
            return self._align(rest)
        if operation == "times":
            return self._times(statement)
        if operation == "equ":
            self.symbols.define(statement.constant, self._value(rest))
            return b""
        return self.encoders[statement.bits].encode(operation, rest, statement.wide)

    def _value(self, text: str) -> int:
        return evaluate(tokenize(text), self.symbols.resolve)

    def _data(self, size: int, text: str) -> bytes:
        out = bytearray()
        limit = 1 << 8 * size
        for item in split_commas(text):
            if _STRING.fullmatch(item):
                string = item[1:-1].encode()
                out += string + bytes(-len(string) % size)
                continue
            value = self._value(item)
            if not -limit // 2 <= value < limit:
                raise AssemblyError(f"{value:#x} does not fit in {size * 8} bits")
            out += (value % limit).to_bytes(size, "little")
        return bytes(out)

    def _align(self, text: str) -> bytes:
        """Fills up to a multiple of a power of two, with nop unless another byte is given."""
        boundary, fill = ([self._value(item) for item in split_commas(text)] + [0x90])[:2]
        if not 0 < boundary <= _MAX_REPEAT or boundary & (boundary - 1):
            raise AssemblyError("align takes a power of two")
        if not 0 <= fill <= 0xFF:
            raise AssemblyError(f"{fill:#x} does not fit in 8 bits")
        return bytes([fill]) * (-self.symbols.resolve("$") % boundary)

    def _times(self, statement: _Statement) -> bytes:
        """Repeats a statement; `$` is the address of each repetition."""
        symbols = self.symbols
        count_text, operation, rest = self._split_times(statement.rest)
        count = self._value(count_text)
        if not 0 <= count <= _MAX_REPEAT:
            raise AssemblyError(f"cannot repeat {count} times")
        if not count:
            return b""
        inner = replace(statement, operation=operation, rest=rest)
        depends, symbols.used_positions = symbols.used_positions, False
        first = self._encode(inner)
        if not symbols.used_positions:
            symbols.used_positions = depends
            return self._bounded(first, count)
        start, out = symbols.address, bytearray(first)
        for _ in range(count - 1):
            symbols.address = start + len(out)
            out += self._encode(inner)
        symbols.address = start
        return bytes(out)

    def _bounded(self, code: bytes, count: int) -> bytes:
        if len(code) * count > _MAX_REPEAT:
            raise AssemblyError(f"cannot repeat {len(code)} bytes {count} times")
        return code * count

    def _split_times(self, text: str) -> tuple[str, str, str]:
        """(count, operation, rest): the first word that names an operation and no symbol ends the count."""
        symbols = self.symbols
        for match in _NAME.finditer(text):
            word = match[0].lower()
            if match.start() and (word in _DIRECTIVES or is_mnemonic(word)):
                name = symbols.qualify(match[0])
                if name not in symbols.constants and name not in symbols.positions:
                    return text[: match.start()], word, text[match.end() :].strip()
        raise AssemblyError("times takes a count and an instruction or directive")


def _unsettled(statements: list[_Statement]) -> list[_Statement]:
    """The statements that define or depend on labels, with the gaps between them."""
    unsettled: list[_Statement] = []
    gap = 0
    for statement in statements:
        if statement.label or statement.target or statement.moves:
            statement.gap = gap
            gap = 0
            unsettled.append(statement)
        else:
            gap += statement.length
    return unsettled


def _parse_bits(text: str) -> int:
    if text not in ("16", "32", "64"):
        raise AssemblyError("code has 16, 32 or 64 bits")
    return int(text)


def _without_comment(line: str) -> str:
    if "'" not in line and '"' not in line:
        return line[: line.index(";")]
    match = _BEFORE_COMMENT.match(line)
    return match.group() if match else line


def _located(error: Exception, line: int, text: str) -> AssemblyError:
    return AssemblyError(f"line {line}: {error}: {text.strip()}")
