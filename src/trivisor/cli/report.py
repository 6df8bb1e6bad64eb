"""What `--stats` prints at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, str, str]
AVERAGES = "microseconds"
"""Groups whose names begin so hold averages."""


def _rows(statistics: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """(section, rows of name, value, share) of a nested dict; plain values come first, without a section."""
    plain = {name: value for name, value in statistics.items() if not isinstance(value, Mapping)}
    if plain:
        yield "", [(_words(name), _value(value), "") for name, value in plain.items()]
    for name, inner in statistics.items():
        if not isinstance(inner, Mapping):
            continue
        for section, rows in _sections(inner, averages=name.startswith(AVERAGES)):
            yield f"{_words(name)}{': ' if section else ''}{section}", rows


def _sections(inner: Mapping[str, Any], averages: bool = False) -> Iterator[tuple[str, list[Row]]]:
    """The rows of one group, largest first and with their share, and those of the groups in it.

    Averages add up to nothing that they could have a share of.
    """
    counts = {name: value for name, value in inner.items() if not isinstance(value, Mapping)}
    numbers = {name: value for name, value in counts.items() if isinstance(value, int | float)}
    total = sum(numbers.values())
    if counts:
        ordered = sorted(counts.items(), key=lambda item: -numbers.get(item[0], 0))
        total = 0 if averages else total
        yield "", [(_words(name), _value(value), _share(value, total)) for name, value in ordered]
    for name, deeper in inner.items():
        if isinstance(deeper, Mapping):
            for section, rows in _sections(deeper):
                yield f"{_words(name)}{': ' if section else ''}{section}", rows


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _share(value: object, total: float) -> str:
    return f"{value / total:.1%}" if isinstance(value, int | float) and total > 0 else ""


def print_statistics(statistics: Mapping[str, Any]) -> None:
    """A table on stderr of the engine's counters, group by group."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", "", show_header=False, box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for section, rows in _rows(statistics):
        if section:
            table.add_row()
            table.add_row(f"[bold]{section}[/bold]")
        for row in rows:
            table.add_row(*row)
    Console(stderr=True).print(table)


def write_statistics(statistics: Mapping[str, Any], path: Path) -> None:
    """The same as JSON; raises OSError."""
    path.write_text(json.dumps(statistics, indent=2, default=str) + "\n")
