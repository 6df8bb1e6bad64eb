"""Emitted code is what it was: after a change that is meant, `python -m tests.golden` and look at the diff."""

from __future__ import annotations

from pathlib import Path

from tests.golden.corpus import SAMPLES
from tests.golden.rendering import render, render_all

KEPT = Path(__file__).with_name("emitted.txt")


def test_emitted_code_is_what_it_was() -> None:
    assert render_all().splitlines() == KEPT.read_text().splitlines(), "see the module's first line"


def test_every_sample_is_code_to_its_end() -> None:
    for sample in SAMPLES:
        assert "(bad)" not in render(sample), sample.name
