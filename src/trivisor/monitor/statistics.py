"""Adding up nested counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def add_counters(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the numbers of `more` to those of `total`, level by level; what is no number is taken over."""
    for name, value in more.items():
        if isinstance(value, Mapping):
            inner = total.setdefault(name, {})
            add_counters(inner, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            total[name] = total.get(name, 0) + value
        else:
            total[name] = value
