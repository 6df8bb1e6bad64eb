"""The costs of exits: every kernel runs to its end, and what is printed is what was found."""

from __future__ import annotations

import pytest
from rich.console import Console

from bench import exits
from bench.process import Failed


def test_every_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "_ROUNDS", 8)
    found = exits.run_exits(1, lambda said: None)
    assert "translation" in found.costs
    assert bool(found.absent) == (len(found.costs) == 1)
    for costs in found.costs.values():
        assert [*costs] == [*(name for name in exits.KERNELS if name != "nothing"), exits.HAND_OVER]
        assert all(cost >= 0 for cost in costs.values()) and costs[exits.HAND_OVER] > 0


def test_a_kernel_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exits.KERNELS, "nothing", "ud2")
    with pytest.raises(Failed, match="'nothing' ended with Shutdown"):
        exits.run_exits(1, lambda said: None)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = exits.Exits({"translation": {"port out": 1.25}, "KVM": {"port out": 33.0}})
    exits.print_exits(Console(width=100), found)
    said = capsys.readouterr().out
    assert "1.2" in said and "33.0" in said and "not here" not in said
    exits.print_exits(Console(width=100), exits.Exits({"translation": {}}, "there is none"))
    assert "KVM is not here: there is none." in capsys.readouterr().out
