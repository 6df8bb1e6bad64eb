"""What `trivisor doctor` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivisor.monitor.doctor import Examination
from trivisor.monitor.techniques import TechniqueUnavailable, choose


def print_examinations(examinations: Sequence[Examination], console: Console | None = None) -> None:
    """A table of what each technique found, and which one `auto` would take."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in examinations:
        if table.row_count:
            table.add_row()
        verdict = "works" if one.works else f"does not work: {one.trouble}"
        table.add_row(Text(one.technique.name, "bold"), Text(f"{verdict} ({one.technique.what})", "bold"))
        for finding in one.findings:
            table.add_row(Text(f"  {finding.what}"), Text(finding.found))
            if finding.mend:
                table.add_row("", Text(f"to mend it: {finding.mend}", "bold"))
    table.add_row()
    table.add_row(Text("auto", "bold"), Text(_auto(), "bold"))
    (console or Console()).print(table)


def _auto() -> str:
    try:
        choice = choose("auto")
    except TechniqueUnavailable as reason:
        return str(reason)
    return f"{choice.technique.name}: {choice.why}"
