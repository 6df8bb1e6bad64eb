"""The benchmark's kernels end in the same checksums under trivisor and on the host's own processor."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.guests.kernels import NAMES, program
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
