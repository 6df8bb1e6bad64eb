"""What may be said of a guest's processor on the command line."""

from __future__ import annotations

import pytest

from trivisor.x86.cpuid import USUAL_CPU, CpuChoice, parse_choice


def test_choices() -> None:
    assert parse_choice("") == USUAL_CPU
    chosen = parse_choice("+tsc-deadline, -x2apic,vendor=AuthenticAMD")
    assert chosen == CpuChoice(frozenset({"tsc_deadline"}), frozenset({"x2apic"}), "AuthenticAMD")


@pytest.mark.parametrize("text", ["umip", "+", "+nothing", "vendor=Nobody", "-umip,+x,"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_choice(text)
