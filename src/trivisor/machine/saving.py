"""What a part of the machine remembers, out of it as plain values and into another one like it.

Plain values are what JSON has: numbers, strings, lists, dictionaries with string keys.
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

Saved = dict[str, Any]


class Remembers:
    """Base of everything with a state that a snapshot keeps.

    `remembered` names the attributes that are it: numbers, bytes, queues,
    lists, dictionaries of numbers, other parts, and tuples of parts.
    """

    remembered: ClassVar[tuple[str, ...]] = ()

    def save(self) -> Saved:
        """The state as plain values."""
        return {name.lstrip("_"): _save(getattr(self, name)) for name in self.remembered}

    def load(self, saved: Saved) -> None:
        """Take a state that `save` gave; ValueError for what cannot be one of this part's."""
        for name in self.remembered:
            key = name.lstrip("_")
            if key not in saved:
                raise ValueError(f"{type(self).__name__}: no {key}")
            try:
                value = _load(getattr(self, name), saved[key])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{type(self).__name__}: {key}: {error}") from None
            setattr(self, name, value)
        self.loaded()

    def loaded(self) -> None:
        """Called after `load`: set timers going again, and whatever else follows from the state."""


def _save(value: Any) -> Any:
    match value:
        case Remembers():
            return value.save()
        case bytes() | bytearray():
            return value.hex()
        case tuple() | list() | deque():
            return [_save(item) for item in value]
        case dict():
            return {str(key): _save(item) for key, item in value.items()}
        case None | bool() | int() | str():
            return value
        case _:
            raise TypeError(f"a {type(value).__name__} is no plain value")


def _load(present: Any, saved: Any) -> Any:
    """`saved` as a value of the kind that `present` is."""
    match present:
        case Remembers():
            present.load(_checked(saved, dict))
            return present
        case tuple() if present and all(isinstance(part, Remembers) for part in present):
            for part, item in zip(present, _checked(saved, list), strict=True):
                part.load(_checked(item, dict))
            return present
        case bytes() | bytearray():
            data = bytes.fromhex(_checked(saved, str))
            if isinstance(present, bytearray) and len(data) != len(present):
                raise ValueError(f"{len(data)} bytes instead of {len(present)}")
            return type(present)(data)
        case deque():
            return deque(_numbers(saved), present.maxlen)
        case list() | tuple():
            return type(present)(_numbers(saved))
        case dict():
            return {int(key): _checked(item, int) for key, item in _checked(saved, dict).items()}
        case bool() | str():
            return _checked(saved, type(present))
        case None:
            return saved if saved is None else _checked(saved, int)
        case _:
            return saved if saved is None else _checked(saved, int)


def _numbers(saved: Any) -> list[int]:
    return [_checked(item, int) for item in _checked(saved, list)]


def _checked(saved: Any, kind: type) -> Any:
    if not isinstance(saved, kind):
        raise ValueError(f"a {type(saved).__name__} instead of a {kind.__name__}")
    return saved
