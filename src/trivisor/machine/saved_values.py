"""Plain values (`saving`) out of a file that anybody may have made: each is what it should be, or ValueError."""

from __future__ import annotations

from typing import Any, Final

from trivisor.machine.saving import Saved

MOST: Final = 1024
"""Of entries in a list, all of which are far shorter."""


def number(value: Any, name: str, bits: int) -> int:
    """`value`, if it is an unsigned number of at most `bits` bits."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or value >> bits:
        raise ValueError(f"{name} is no number of {bits} bits")
    return value


def flag(saved: Saved, name: str) -> bool:
    """A truth value."""
    value = saved.get(name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is neither true nor false")
    return value


def number_list(saved: Saved, name: str, bits: int, most: int = MOST) -> list[int]:
    """A list of at most `most` such numbers."""
    values = saved.get(name)
    if not isinstance(values, list) or len(values) > most:
        raise ValueError(f"{name} is no list")
    return [number(value, name, bits) for value in values]


def numbers(saved: Saved, name: str, widths: list[int]) -> list[int]:
    """A list of numbers of these widths."""
    values = saved.get(name)
    if not isinstance(values, list) or len(values) != len(widths):
        raise ValueError(f"{name} is no list of {len(widths)}")
    return [number(value, name, bits) for value, bits in zip(values, widths, strict=True)]


def pair(value: Any, name: str) -> tuple[Any, Any]:
    """Two values."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} is no pair")
    return value[0], value[1]


def pairs(saved: Saved, name: str) -> list[tuple[int, int]]:
    """A list of (number of 32 bits, number of 64)."""
    values = saved.get(name)
    if not isinstance(values, list) or len(values) > MOST:
        raise ValueError(f"{name} is no list")
    pairs = [pair(value, name) for value in values]
    return [(number(index, name, 32), number(value, name, 64)) for index, value in pairs]


def data(saved: Saved, name: str, most: int = 1 << 15) -> bytes:
    """At most `most` bytes."""
    value = saved.get(name)
    if not isinstance(value, str) or len(value) > 2 * most:
        raise ValueError(f"{name} is missing")
    return bytes.fromhex(value)


def part(saved: Saved, name: str) -> Saved:
    """A dictionary."""
    value = saved.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is missing")
    return value


def text(saved: Saved, name: str, longest: int) -> str:
    """At most `longest` characters."""
    value = saved.get(name)
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"{name} is no text")
    return value


def rows(saved: Saved, name: str, widths: list[int], most: int = MOST) -> list[list[int]]:
    """At most `most` lists of numbers of these widths."""
    values = saved.get(name)
    if not isinstance(values, list) or len(values) > most:
        raise ValueError(f"{name} is no list")
    return [numbers({name: row}, name, widths) for row in values]
