"""Pieces of code kept between runs: the same as assembled ones, and only from a file that is safe and whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivisor.translation import assembled
from trivisor.translation.assembled import Piece, Pieces
from trivisor.translation.layout import SYMBOLS
from trivisor.x86 import assembler
from trivisor.x86.assembler import assemble

TEXTS = [f"mov rax, [rsp+POLL]\n inside: add rax, {number}\n jmp inside" for number in range(20)]


def made(text: str) -> Piece:
    program = assemble(text, bits=64, symbols=SYMBOLS)
    return Piece(program.code, program.labels)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    pieces = Pieces()
    pieces.take_kept(tmp_path / "translations")
    assert [pieces.assembled(text) for text in TEXTS] == [made(text) for text in TEXTS]
    pieces.keep(tmp_path / "translations")
    return tmp_path / "translations"


@pytest.fixture
def none_is_assembled(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("assembled again")

    monkeypatch.setattr(assembler, "assemble", never)
    return directory


def the_file(directory: Path) -> Path:
    (file,) = directory.iterdir()
    return file


def later(directory: Path) -> Pieces:
    pieces = Pieces()
    pieces.take_kept(directory)
    return pieces


def test_a_later_run_assembles_only_what_is_new(none_is_assembled: Path) -> None:
    pieces = later(none_is_assembled)
    for text in TEXTS:
        found = pieces.assembled(text)
        assert found == made(text)
        assert pieces.assembled(text) is found
    with pytest.raises(AssertionError, match="again"):
        pieces.assembled("nop")


def test_without_a_directory_nothing_is_kept(tmp_path: Path) -> None:
    pieces = Pieces()
    pieces.assembled(TEXTS[0])
    pieces.keep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_few_new_pieces_are_not_worth_a_file(directory: Path) -> None:
    before = the_file(directory).stat()
    pieces = later(directory)
    pieces.assembled("nop")
    pieces.keep(directory)
    assert the_file(directory).stat() == before
    for number in range(3):
        pieces.assembled(f"mov eax, {number}")
    pieces.keep(directory)
    pieces = later(directory)
    assert len(pieces._others) == len(TEXTS) + 4
    assert pieces.assembled("nop") == made("nop")


def test_what_was_not_asked_for_is_left_out_first(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembled, "_MOST", 15)
    pieces = later(directory)
    asked = [*TEXTS[:5], *(f"mov eax, {number}" for number in range(8))]
    for text in asked:
        pieces.assembled(text)
    pieces.keep(directory)
    pieces = later(directory)
    assert len(pieces._others) == 15
    for text in (*asked, *TEXTS[-2:]):
        pieces.assembled(text)
    assert not pieces._others
    assert not pieces._new


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_file_is_made_anew(directory: Path, place: int) -> None:
    whole = the_file(directory).read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 4
    the_file(directory).write_bytes(damaged)
    pieces = later(directory)
    assert [pieces.assembled(text) for text in TEXTS] == [made(text) for text in TEXTS]
    pieces.keep(directory)
    assert the_file(directory).read_bytes() == whole


def test_a_file_that_others_may_write_to_is_not_taken(directory: Path) -> None:
    the_file(directory).chmod(0o666)
    assert not later(directory)._others


def test_without_a_place_they_are_assembled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pieces = later(tmp_path / "file" / "translations")
    assert pieces.assembled(TEXTS[0]) == made(TEXTS[0])
    pieces.keep(tmp_path / "file" / "translations")
