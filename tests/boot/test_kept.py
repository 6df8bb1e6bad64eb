"""A second boot of the default guest uses what the first one has translated, wherever the kernel lies this time."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivisor import VirtualMachine
from trivisor.guests.debian import DefaultGuest
from trivisor.machine.user_cache import user_cache

pytestmark = [pytest.mark.boot, pytest.mark.timeout(120)]


def boot(append: str, memory: str = "512M") -> tuple[int, str]:
    """(blocks translated, what was found of earlier runs) of a boot to a command's end."""
    with VirtualMachine(command=["uname", "-r"], append=append, memory=memory) as machine:
        outcome = machine.run(timeout=100)
        assert outcome.status == 0, outcome.message
        return machine.statistics()["translation"]["blocks"], machine.kept


def test_a_second_boot_translates_next_to_nothing(
    debian: DefaultGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = user_cache() / "debian"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "trivisor").mkdir()
    (tmp_path / "trivisor" / "debian").symlink_to(guest)
    first, found = boot("nokaslr")
    assert found == "none yet"
    second, found = boot("nokaslr")
    assert found.endswith(" blocks")
    assert second < first / 50
    third, _ = boot("", memory="300M")  # the kernel chooses its address at random
    assert third < first / 20
