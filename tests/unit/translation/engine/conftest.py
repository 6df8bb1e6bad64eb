"""`machine(source, bits=64, ...)` makes a `guest.Machine` that is closed when the test ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.translation.engine.guest import Machine, Make


@pytest.fixture
def machine() -> Iterator[Make]:
    made: list[Machine] = []

    def make(source: str, bits: int = 64, **options: Any) -> Machine:
        made.append(Machine(source, bits, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
