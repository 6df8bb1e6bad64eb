"""The statistics table takes any nested counters."""

import json
from pathlib import Path

from trivisor.cli.report import print_statistics, write_statistics
from trivisor.monitor.statistics import add_counters

COUNTERS = {
    "instructions_translated": 1234567,
    "exits": {"port_out": 30, "cpuid": 10},
    "seconds": {"translated": 1.5, "python": 0.5},
    "engine": {"name": "blocks", "tlb": {"miss": 7}},
}


def test_table_has_every_number_with_its_share_largest_first(capsys) -> None:
    print_statistics(COUNTERS)
    said, table = capsys.readouterr()
    assert said == ""
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "instructions translated 1,234,567" in lines
    assert lines.index("port out 30 75.0%") < lines.index("cpuid 10 25.0%")
    assert "translated 1.500 75.0%" in lines
    assert "miss 7 100.0%" in lines
    assert "engine: tlb" in lines


def test_json_is_the_same_counters(tmp_path: Path) -> None:
    write_statistics(COUNTERS, tmp_path / "counters.json")
    assert json.loads((tmp_path / "counters.json").read_text()) == COUNTERS


def test_counters_add_up_level_by_level() -> None:
    total = {"exits": {"cpuid": 1}, "blocks": 5}
    add_counters(total, {"exits": {"cpuid": 2, "msr": 3}, "blocks": 1, "engine": "x"})
    assert total == {"exits": {"cpuid": 3, "msr": 3}, "blocks": 6, "engine": "x"}
