"""A small assembler in Intel syntax (NASM's dialect), on top of iced-x86's encoder.

One statement a line: `label: instruction ; comment`. Labels that start with a dot belong to the last label
without one. Directives: `NAME equ expression`, `bits 16|32|64`, `db`, `dw`, `dd`, `dq`, `align N[, fill]`,
`times N statement`. Of the encodings that an instruction has, the shortest is taken; of equally short ones,
NASM's. Statements that refer to labels are assembled again until all labels stay where they are: branches
start short, and a statement that once grew keeps its long form, so that this comes to an end.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from trivisor.x86.instructions import InstructionEncoder, is_mnemonic
from trivisor.x86.opcodes import REGISTERS
from trivisor.x86.operands import AssemblyError, evaluate, split_commas

__all__ = ["AssemblyError", "Program", "assemble"]


@dataclass(frozen=True)
class Program:
    """Assembled code, to be put at `origin`; labels are absolute addresses, local ones are `outer.inner`."""

    code: bytes
    origin: int
    labels: dict[str, int]


def assemble(
    source: str, *, bits: int = 64, origin: int = 0, symbols: Mapping[str, int] | None = None
) -> Program:
    """Assembles source text for 16-, 32- or 64-bit code that will stand at `origin`.

    `symbols` are constants that the source may use. Raises AssemblyError with line number and line.
    """
    return _Assembly(bits, origin, symbols or {}).run(source)


_MAX_REPEAT = 1 << 24
_MAX_PASSES = 100
_STATEMENT = re.compile(r"\s*(?:([A-Za-z_.?@][\w.?@]*)\s*:(?!:))?\s*(\S+)?\s*(.*?)\s*$", re.DOTALL)
_EQU = re.compile(r"\s*([A-Za-z_.?@][\w.?@]*)\s*:?\s+equ\s+(.*?)\s*$", re.IGNORECASE)
_WORD = re.compile(r"(?<![\w.?@])[A-Za-z_.?@][\w.?@]*")
_COMMENT = re.compile(r"""((?:[^;'"]|'[^']*'|"[^"]*")*)""")
_ITEM = re.compile(r"""((?:[^,'"]|'[^']*'|"[^"]*")+)(?:,|$)""")
_DATA_SIZES = {"db": 1, "dw": 2, "dd": 4, "dq": 8}


@dataclass(slots=True, eq=False)
class _Statement:
    """A line with something to put out. `wide`: it grew once, so it must keep its long form."""

    line: int
    text: str
    bits: int
    scope: str
    operation: str
    rest: str
    label: str = ""
    equ: str = ""
    code: bytes = b""
    wide: bool = False
    depends_on_labels: bool = False


@dataclass(slots=True)
class _Assembly:
    bits: int
    origin: int
    symbols: Mapping[str, int]
    constants: dict[str, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)  # labels, and constants that depend on labels
    encoders: dict[int, InstructionEncoder] = field(default_factory=dict)
    fixed: dict[tuple[int, str, str], bytes] = field(default_factory=dict)
    address: int = 0
    scope: str = ""
    uses_labels: bool = False
    is_first_pass: bool = True
    resolve: Callable[[str], int] = field(init=False)

    def run(self, source: str) -> Program:
        if self.bits not in (16, 32, 64):
            raise AssemblyError(f"code of {self.bits} bits")
        self.constants.update(self.symbols)
        self.resolve = self._resolve
        statements = self._first_pass(source)
        self._settle(statements)
        labels = {s.label: self.names[s.label] for s in statements if s.label}
        return Program(b"".join([s.code for s in statements]), self.origin, labels)

    # Passes

    def _first_pass(self, source: str) -> list[_Statement]:
        """Reads all lines, and assembles those that depend on no label for good."""
        statements: list[_Statement] = []
        self.address = self.origin
        for number, text in enumerate(source.splitlines(), 1):
            try:
                for statement in self._read(number, text):
                    self._assemble(statement)
                    statements.append(statement)
                    self.address += len(statement.code)
            except (AssemblyError, ValueError, OverflowError) as error:
                raise _located(error, number, text) from None
        self.is_first_pass = False
        return statements

    def _settle(self, statements: list[_Statement]) -> None:
        """Assembles what depends on labels until they stay where they are."""
        for _ in range(_MAX_PASSES):
            is_settled = True
            self.address = self.origin
            for statement in statements:
                if statement.label and self.names[statement.label] != self.address:
                    self.names[statement.label] = self.address
                    is_settled = False
                if statement.depends_on_labels:
                    before = self.names.get(statement.equ), len(statement.code)
                    try:
                        self._assemble(statement)
                    except (AssemblyError, ValueError, OverflowError) as error:
                        raise _located(error, statement.line, statement.text) from None
                    if before != (self.names.get(statement.equ), len(statement.code)):
                        is_settled = False
                self.address += len(statement.code)
            if is_settled:
                return
        raise AssemblyError(f"labels do not settle in {_MAX_PASSES} passes")

    def _read(self, number: int, text: str) -> list[_Statement]:
        """The statements of a line: none, a label, an instruction or directive, or both."""
        line = text
        if ";" in line:
            line = _COMMENT.match(line).group() if "'" in line or '"' in line else line[: line.index(";")]  # type: ignore[union-attr]
        if " equ " in line.lower() and (match := _EQU.match(line)):
            name = self._declare(match[1])
            return [_Statement(number, text, self.bits, self.scope, "equ", match[2], equ=name)]
        match = _STATEMENT.match(line)
        assert match is not None  # everything in it is optional
        label, operation, rest = match.groups()
        if not label and not operation:
            return []
        statement = _Statement(number, text, self.bits, self.scope, (operation or "").lower(), rest)
        if label:
            statement.label = self._declare(label)
            self.names[statement.label] = self.address
            if not label.startswith("."):
                self.scope = statement.scope = label
        if statement.operation == "bits":
            self.bits = self._bits(rest)
            statement.operation = ""
        return [statement]

    def _bits(self, text: str) -> int:
        if text not in ("16", "32", "64"):
            raise AssemblyError("bits takes 16, 32 or 64")
        return int(text)

    def _declare(self, name: str) -> str:
        if name.startswith("."):
            name = self.scope + name
        if name in self.names or name in self.constants:
            raise AssemblyError(f"{name!r} is defined twice")
        if name.lower() in REGISTERS:
            raise AssemblyError(f"{name!r} is a register")
        return name

    def _resolve(self, name: str) -> int:
        """The value of a name in an expression."""
        value = self.constants.get(name)
        if value is not None:
            return value
        self.uses_labels = True
        if name == "$":
            return self.address
        if name == "$$":
            return self.origin
        if name.startswith("."):
            name = self.scope + name
        value = self.names.get(name)
        if value is None:
            value = self.constants.get(name)
        if value is None:
            if not self.is_first_pass:
                raise AssemblyError(f"undefined symbol {name!r}")
            value = self.address  # not far from it, as a rule
        return value

    # Statements

    def _assemble(self, statement: _Statement) -> None:
        """Sets the statement's code for the present address and labels."""
        key = (statement.bits, statement.operation, statement.rest)
        code = self.fixed.get(key)
        if code is not None:
            statement.code = code
            return
        self.uses_labels = False
        self.scope, scope = statement.scope, self.scope
        length = len(statement.code)
        try:
            code = self._encode_statement(statement)
            if statement.depends_on_labels and length != len(code) and not statement.wide:
                statement.wide = True
                code = self._encode_statement(statement)
        except AssemblyError:
            if not (self.is_first_pass and self.uses_labels):
                raise
            code = b""  # a label's provisional value may be nonsense here; the next pass decides
        self.scope = scope
        statement.code = code
        statement.depends_on_labels = self.uses_labels
        if not self.uses_labels and not statement.equ:
            self.fixed[key] = code

    def _encode_statement(self, statement: _Statement) -> bytes:
        operation, rest = statement.operation, statement.rest
        if not operation:
            return b""
        if operation in _DATA_SIZES:
            return self._data(_DATA_SIZES[operation], rest)
        if operation == "equ":
            self._equ(statement)
            return b""
        if operation == "align":
            return self._align(rest)
        if operation == "times":
            return self._times(statement)
        encoder = self.encoders.get(statement.bits)
        if encoder is None:
            encoder = self.encoders[statement.bits] = InstructionEncoder(statement.bits, self.resolve)
        return encoder.encode(operation, rest, self.address, statement.wide)

    def _equ(self, statement: _Statement) -> None:
        value = evaluate(statement.rest, self.resolve)
        if self.uses_labels or statement.equ in self.names:
            self.names[statement.equ] = value
        else:
            self.constants[statement.equ] = value

    def _data(self, size: int, text: str) -> bytes:
        out = bytearray()
        for item in _items(text):
            if item[0] in "'\"" and item[-1] == item[0] and item.count(item[0]) == 2:
                string = item[1:-1].encode()
                out += string + bytes(-len(string) % size)
                continue
            value = evaluate(item, self.resolve)
            limit = 1 << 8 * size
            if not -limit // 2 <= value < limit:
                raise AssemblyError(f"{value:#x} does not fit in {size} bytes")
            out += (value % limit).to_bytes(size, "little")
        return bytes(out)

    def _align(self, text: str) -> bytes:
        items = _items(text)
        values = [evaluate(item, self.resolve) for item in items]
        boundary, fill = (*values, 0x90)[:2]
        if len(values) > 2 or not 0 < boundary <= _MAX_REPEAT or boundary & (boundary - 1):
            raise AssemblyError("align takes a power of two")
        if not 0 <= fill <= 0xFF:
            raise AssemblyError(f"fill byte {fill:#x}")
        self.uses_labels = True
        return bytes([fill]) * (-self.address % boundary)

    def _times(self, statement: _Statement) -> bytes:
        """`times N statement`: N ends where a mnemonic or directive begins."""
        count_text, operation, rest = self._split_times(statement.rest)
        count = evaluate(count_text, self.resolve)
        if not 0 <= count <= _MAX_REPEAT:
            raise AssemblyError(f"times {count}")
        inner = replace(statement, operation=operation, rest=rest)
        outer_uses_labels, self.uses_labels = self.uses_labels, False
        start, out = self.address, bytearray()
        if count:
            out += self._encode_statement(inner)
        if self.uses_labels:
            for _ in range(count - 1):
                self.address = start + len(out)
                out += self._encode_statement(inner)
        elif count:
            out *= count
        self.address = start
        self.uses_labels |= outer_uses_labels
        return bytes(out)

    def _split_times(self, text: str) -> tuple[str, str, str]:
        """(count, operation, rest): the first word that names an operation and no symbol ends the count."""
        for match in _WORD.finditer(text):
            word = match[0].lower()
            if match.start() and (word in _DATA_SIZES or word == "align" or is_mnemonic(word)):
                is_symbol = match[0] in self.constants or match[0] in self.names
                if not is_symbol:
                    return text[: match.start()], word, text[match.end() :].strip()
        raise AssemblyError("times takes a count and an instruction or directive")


def _items(text: str) -> list[str]:
    items = [item.strip() for item in split_commas(text)]
    if not all(items):
        raise AssemblyError("value expected")
    return items


def _located(error: Exception, line: int, text: str) -> AssemblyError:
    return AssemblyError(f"line {line}: {error}: {text.strip()}")
