"""The benchmark's kernels: the same checksums as on the host's own processor, and every event counted."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.guests.kernels import NAMES, program
from bench.guests.system_kernels import OPERATIONS, system_image
from bench.records import parse
from trivisor import VirtualMachine
from trivisor.guests.test_kernel import STATUS
from trivisor.insight.differential import native

pytestmark = pytest.mark.boot


@pytest.mark.skipif(not native.is_available(), reason="the host has no AVX or no FSGSBASE")
def test_compute_kernels(tmp_path) -> None:
    image = tmp_path / "kernels.elf"
    image.write_bytes(program().image())
    with VirtualMachine(image, memory="32M") as machine:
        outcome = machine.run(timeout=120)
        assert outcome.status == STATUS, machine.output.decode()
        ours = parse(machine.output.decode(), NAMES, "trivisor")
    hosted = subprocess.run(
        [sys.executable, "-m", "bench.hosted", "native", *NAMES], capture_output=True, text=True, check=True
    )
    theirs = parse(hosted.stdout, NAMES, "native")
    checksums = [{name: r and r.checksum for name, r in records.items()} for records in (ours, theirs)]
    assert checksums[0] == checksums[1]
    assert any(checksums[0].values())


def test_system_kernels(tmp_path) -> None:
    image = tmp_path / "kernels.elf"
    image.write_bytes(system_image(list(OPERATIONS)))
    with VirtualMachine(image, memory="64M") as machine:
        outcome = machine.run(timeout=120)
        assert outcome.status == STATUS, machine.output.decode()
        records = parse(machine.output.decode(), list(OPERATIONS), "trivisor")
    counted = {name: record.checksum for name, record in records.items() if record is not None}
    events = {"syscall", "page fault", "switch", "timer", "divide", "int"}
    assert {name: counted[name] for name in events} == {name: OPERATIONS[name] for name in events}
    # Every other read finds the page that was mapped last: 3 or 5.  The last write of CR8 was 1.
    assert counted["invlpg"] == 4 * OPERATIONS["invlpg"]
    assert counted["cr8"] == 1
