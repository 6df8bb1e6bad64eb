"""The oracle is the host's processor: what it makes of random instructions, translated code must make of them too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trivisor.insight import differential
from trivisor.insight.differential import Hunt, Report, compare
from trivisor.translation.translator import recipe
from trivisor.translation.translator.instructions import InstructionMaker

pytestmark = pytest.mark.skipif(
    not differential.is_available(), reason="needs an x86-64 Linux host with AVX and FSGSBASE"
)


def found(report: Report) -> str:
    return "\n\n".join(str(difference) for difference in report.differences)


@pytest.mark.parametrize("bits", (64, 32, 16))
def test_translated_code_does_what_the_host_does(bits: int) -> None:
    report = differential.run(20, 250, bits=bits, stop_after=3)
    assert not report.differences, found(report)
    assert report.executed >= 3000
    assert len(report.codes) > 500
    assert {-1, 0, 13, 14, 16, 19} <= set(report.faults), "all kinds of faults take part"


@pytest.fixture
def hunt() -> Iterator[Hunt]:
    hunt = Hunt()
    yield hunt
    hunt.close()


def first_difference(hunt: Hunt, seed: int, count: int) -> differential.Difference:
    for number in range(count):
        hunt.try_one(f"{seed}:{number}")
        if hunt.report.differences:
            return hunt.report.differences[0]
    pytest.fail(f"no difference in {count} cases")


def test_a_case_depends_on_nothing_but_its_seed(hunt: Hunt) -> None:
    one, other = hunt.generator.case("5:7"), hunt.generator.case("5:7")
    assert compare.describe(one) == compare.describe(other)
    assert one.states == other.states
    assert hunt.native.run(one, one.layout()) == hunt.native.run(other, other.layout())


def test_flags_lost_in_an_access_to_memory_are_found(hunt: Hunt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "RESTORE", b"")
    assert first_difference(hunt, 1, 300).lines


def test_a_wrong_address_is_found_and_the_case_shrunk(hunt: Hunt, monkeypatch: pytest.MonkeyPatch) -> None:
    right = InstructionMaker.add_segment

    def without_fs(maker: InstructionMaker, made: recipe.Recipe, segment: str) -> None:
        if segment != "FS":
            right(maker, made, segment)

    monkeypatch.setattr(InstructionMaker, "add_segment", without_fs)
    difference = first_difference(hunt, 2, 1000)
    text = str(difference)
    assert "fs:" in text
    assert "native" in text and "translated" in text
    assert len(difference.case.items) <= 3
