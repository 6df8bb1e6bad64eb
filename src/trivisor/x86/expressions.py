"""Expressions of the assembler: integers of any size, and the names in them."""

import re
from collections.abc import Callable, Mapping, Sequence

from trivisor.x86.opcodes import REGISTERS


class AssemblyError(ValueError):
    """Source text that cannot be assembled; the message has the line number and the line."""


NAME = r"[A-Za-z_.?@][\w.?@]*"
_TOKEN = re.compile(rf"0[xX]\w+|\d\w*|{NAME}|'[^']*'|\"[^\"]*\"|\$\$?|<<|>>|\S")
_COMMA_ITEM = re.compile(r"""((?:[^,'"]|'[^']*'|"[^"]*")*)(,|$)""")
_MAX_SHIFT = 256

# Binding strength and function of the operators with two operands.
_OPERATORS: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "|": (1, int.__or__),
    "^": (2, int.__xor__),
    "&": (3, int.__and__),
    "<<": (4, int.__lshift__),
    ">>": (4, int.__rshift__),
    "+": (5, int.__add__),
    "-": (5, int.__sub__),
    "*": (6, int.__mul__),
    "/": (6, int.__floordiv__),
    "%": (6, int.__mod__),
}
_NO_OPERATOR = (0, int.__add__)
_SHIFTS = 4


class Symbols:
    """The names that a program uses.

    Constants are known for good when they are met. Positions (labels, and constants that are computed from
    them) move until the program settles; `used_positions` tells that one was looked up since it was reset.
    """

    def __init__(self, origin: int, constants: Mapping[str, int]) -> None:
        self.constants = dict(constants)
        self.positions: dict[str, int] = {}
        self.origin = origin
        self.address = origin  # of the statement that is being assembled
        self.scope = ""  # the label that local labels belong to
        self.used_positions = False
        self.is_complete = False  # all names have been read

    def qualify(self, name: str) -> str:
        """The full name: local labels are called by the label before them and their own name."""
        return self.scope + name if name.startswith(".") else name

    def declare(self, name: str) -> str:
        """Checks that a name is free; returns its full name."""
        name = self.qualify(name)
        if name in self.positions or name in self.constants:
            raise AssemblyError(f"{name!r} is defined twice")
        if name.lower() in REGISTERS:
            raise AssemblyError(f"{name!r} is a register")
        return name

    def define(self, name: str, value: int) -> None:
        """Sets a computed constant, which is a position if it was computed from one."""
        if self.used_positions or name in self.positions:
            self.positions[name] = value
        else:
            self.constants[name] = value

    def resolve(self, name: str) -> int:
        """The value of a name, of `$` or of `$$`. While names are missing they are taken to be close by."""
        value = self.constants.get(name)
        if value is not None:
            return value
        self.used_positions = True
        if name == "$":
            return self.address
        if name == "$$":
            return self.origin
        name = self.qualify(name)
        value = self.positions.get(name)
        if value is None:
            value = self.constants.get(name)
        if value is None:
            if self.is_complete:
                raise AssemblyError(f"undefined symbol {name!r}")
            value = self.address
        return value


Resolve = Callable[[str], int]


def tokenize(text: str) -> list[str]:
    """The tokens of an expression or an address."""
    return _TOKEN.findall(text)


def evaluate(tokens: Sequence[str], resolve: Resolve) -> int:
    """The value of an expression; division rounds down, and characters are little-endian as NASM has them."""
    if len(tokens) == 1:
        return _atom(tokens[0], resolve)
    value, position = _binary(tokens, 0, 1, resolve)
    if position < len(tokens):
        raise AssemblyError(f"unexpected {tokens[position]!r}")
    return value


def _binary(tokens: Sequence[str], position: int, strength: int, resolve: Resolve) -> tuple[int, int]:
    """What operators of a strength and above hold together: (value, position after it)."""
    value, position = _unary(tokens, position, resolve)
    while position < len(tokens):
        operator = tokens[position]
        own_strength, function = _OPERATORS.get(operator, _NO_OPERATOR)
        if own_strength < strength:
            break
        right, position = _binary(tokens, position + 1, own_strength + 1, resolve)
        if right == 0 and operator in ("/", "%"):
            raise AssemblyError("division by zero")
        if own_strength == _SHIFTS and not 0 <= right < _MAX_SHIFT:
            raise AssemblyError(f"shift by {right}")
        value = function(value, right)
    return value, position


def _unary(tokens: Sequence[str], position: int, resolve: Resolve) -> tuple[int, int]:
    if position >= len(tokens):
        raise AssemblyError("expression expected")
    token, position = tokens[position], position + 1
    if token == "(":
        value, position = _binary(tokens, position, 1, resolve)
        if position >= len(tokens) or tokens[position] != ")":
            raise AssemblyError("')' expected")
        return value, position + 1
    if token not in ("-", "+", "~"):
        return _atom(token, resolve), position
    value, position = _unary(tokens, position, resolve)
    if token == "+":
        return value, position
    return (-value if token == "-" else ~value), position


def _atom(token: str, resolve: Resolve) -> int:
    """The value of a number, a character constant or a name."""
    first = token[0]
    if first.isdigit():
        try:
            return int(token) if token.isdigit() else int(token, 0)
        except ValueError:
            raise AssemblyError(f"bad number {token!r}") from None
    if first.isalpha() or first in "_.?@$":
        if token.lower() in REGISTERS:
            raise AssemblyError(f"register {token!r} in an expression")
        return resolve(token)
    if first in "'\"" and len(token) > 1:
        return int.from_bytes(token[1:-1].encode(), "little")
    raise AssemblyError(f"unexpected {token!r}")


def split_commas(text: str) -> list[str]:
    """The items of a comma-separated list, without the spaces around them; strings may hold commas."""
    if "'" not in text and '"' not in text:
        return [item.strip() for item in text.split(",")]
    items: list[str] = []
    position, separator = 0, ","
    while separator:
        match = _COMMA_ITEM.match(text, position)
        if match is None:
            raise AssemblyError("string without an end")
        items.append(match[1].strip())
        position, separator = match.end(), match[2]
    return items
