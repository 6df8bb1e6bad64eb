"""The comparison of Xen guests: its program runs, its figures are pair by pair, its verdicts follow them."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from bench.guests.user_space import ALL_NAMES, FIRST, LAST, OPERATIONS, user_space_program
from bench.machines import DIRECT, NATIVE, TCG
from bench.paravirt import Paravirtual, _records
from bench.paravirt_report import as_json, print_paravirt
from bench.process import Failed, Timing, time_and_output
from bench.records import Record


def test_the_program_runs_on_the_host_itself(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(user_space_program())
    program.chmod(0o755)
    done = subprocess.run([program], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True)
    assert FIRST.decode() in done.stdout and LAST.decode() in done.stdout
    records = _records(done.stdout, NATIVE)
    assert [*records] == [*ALL_NAMES]
    fork, crc = records["fork"], records["crc"]
    assert fork is not None and fork.checksum == 7 * OPERATIONS["fork"]  # the children's statuses
    assert crc is not None and crc.least > 0


def test_the_time_is_that_to_the_first_line_and_the_output_goes_on() -> None:
    timing, output = time_and_output(
        ["sh", "-c", "echo one; sleep .3; echo two; sleep 60"], b"one", b"two", limit=20
    )
    assert timing.wall < 0.3
    assert output == b"one\ntwo\n"
    with pytest.raises(Failed, match="did not print 'two'"):
        time_and_output(["echo", "one"], b"one", b"two", limit=20)


def found(**machines: tuple[float, int]) -> Paravirtual:
    """One run: seconds of the boot and cycles of every kernel."""
    made = Paravirtual(without_direct="there is no /dev/kvm")
    for name, (seconds, cycles) in machines.items():
        made.kernels.add(name, dict.fromkeys(ALL_NAMES, Record(7, 2 * cycles, cycles)))
        if name != NATIVE:
            made.boots[name] = [Timing(2 * seconds, seconds)]
    return made


def shown(made: Paravirtual) -> str:
    out = io.StringIO()
    print_paravirt(Console(file=out, width=120), made)
    return out.getvalue()


def test_the_verdicts() -> None:
    made = found(translation=(2, 300), paravirt=(2.5, 300), direct=(3, 105), TCG=(4, 900), native=(0, 100))
    text = shown(made)
    assert "user-space compute under direct: geometric mean 1.05 times native (must be at most 1.1): met" in text
    assert "1.25 times full translation's processor time (must be at most 1): not met" in text
    assert next(line for line in text.splitlines() if line.startswith("paravirt")).split()[1:] == [
        "5.00", "2.50", "0.62", "1.25",
    ]  # fmt: skip
    assert made.boot_ratio(DIRECT, TCG, "wall") == 0.75
    assert json.loads(json.dumps(as_json(made)))["compute over native"]["TCG"] == pytest.approx(9)


def test_what_is_not_here_is_told() -> None:
    text = shown(found(translation=(2, 300), paravirt=(2, 300), native=(0, 100)))
    assert "There is no direct execution here: there is no /dev/kvm." in text
    assert "times full translation's processor time (must be at most 1): met" in text
