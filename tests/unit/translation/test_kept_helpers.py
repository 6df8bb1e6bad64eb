"""The native helpers kept between runs: the same as assembled ones, and only from a file that is safe and whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivisor.translation import kept_helpers as keeping
from trivisor.translation.kept_helpers import kept_helpers
from trivisor.translation.natives import Helpers, assembled_helpers

MASK = 7


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    assert kept_helpers(tmp_path / "translations", MASK) == assembled_helpers(MASK)
    return tmp_path / "translations"


def the_file(directory: Path) -> Path:
    (file,) = directory.iterdir()
    return file


def never(_mask: int, _supervision: str) -> Helpers:
    raise AssertionError("assembled again")


def test_the_second_run_assembles_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = assembled_helpers(MASK)
    monkeypatch.setattr(keeping, "assembled_helpers", never)
    assert kept_helpers(directory, MASK) == expected
    with pytest.raises(AssertionError, match="again"):
        kept_helpers(directory, 3)
    with pytest.raises(AssertionError, match="again"):
        kept_helpers(directory, MASK, "another: nop")


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_file_is_made_anew(directory: Path, place: int) -> None:
    whole = the_file(directory).read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 4
    the_file(directory).write_bytes(damaged)
    assert kept_helpers(directory, MASK) == assembled_helpers(MASK)
    assert the_file(directory).read_bytes() == whole


def test_a_file_that_others_may_write_to_is_not_taken(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    the_file(directory).chmod(0o666)
    made = Helpers(b"made", {"anew": 0})
    monkeypatch.setattr(keeping, "assembled_helpers", lambda mask, supervision: made)
    assert kept_helpers(directory, MASK) == made
    assert the_file(directory).stat().st_mode & 0o077 == 0


def test_without_a_place_they_are_assembled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert kept_helpers(tmp_path / "file" / "translations", MASK) == assembled_helpers(MASK)
