"""Linux goes on under another technique, and answers."""

from __future__ import annotations

import pytest

from tests.conformance.machine import UNAVAILABLE
from trivisor import VirtualMachine
from trivisor.monitor import TechniqueUnavailable
from trivisor.monitor.outcome import StopReason

pytestmark = pytest.mark.boot
PROMPT = "/root # "


def go_on_under_hardware(machine: VirtualMachine) -> None:
    try:
        machine.change_technique("hardware")
    except TechniqueUnavailable as reason:  # programs would see what the guest was not told of
        pytest.skip(str(reason))


@pytest.mark.skipif("hardware" in UNAVAILABLE, reason=UNAVAILABLE.get("hardware", ""))
def test_linux_at_its_shell_goes_to_hardware_and_back() -> None:
    """What is typed under one technique is answered, if that one is slow, under the next."""
    with VirtualMachine(technique="translation") as machine:
        machine.read_until(PROMPT, 120)
        for number in (6, 7):
            go_on_under_hardware(machine)
            machine.write(f"echo answer $(({number}*7))\n")
            assert machine.run(timeout=3).reason is StopReason.TIMEOUT
            machine.change_technique("translation")
            machine.read_until(f"answer {number * 7}", 60)
            machine.read_until(PROMPT, 60)
        machine.write("dmesg | grep -ci -e stall -e 'clocksource.*unstable' -e oops; echo looked\n")
        assert b"\r\n0\r\nlooked" in machine.read_until("\r\nlooked", 60)
        machine.write("exit\n")
        assert machine.run(60).reason is StopReason.POWEROFF
