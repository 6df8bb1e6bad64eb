"""The runner of kvm-unit-tests: how it reads the suite's list, and what it makes of an exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivisor.insight.unit_tests.entries import DEFAULT_TIMEOUT, read_entries
from trivisor.insight.unit_tests.runs import Verdict, not_for_us, verdict_of

CONFIGURATION = """
# a comment
[plain]
file = plain.flat

[full]
file = full.flat
smp = 2
test_args = 'one two'
qemu_params = -cpu qemu64,+x2apic,-pcid,vendor=AuthenticAMD -m 4g
arch = x86_64
timeout = 30
groups = apic slow

[other]
file = plain.flat
arch = i386

[kvm]
file = plain.flat
accel = kvm
"""


@pytest.fixture
def build(tmp_path: Path) -> Path:
    (tmp_path / "x86").mkdir()
    (tmp_path / "x86" / "unittests.cfg").write_text(CONFIGURATION)
    (tmp_path / "x86" / "plain.flat").touch()
    return tmp_path


def test_entries(build: Path) -> None:
    plain, full, *_ = read_entries(build)
    assert (plain.name, plain.processors, plain.features, plain.timeout) == ("plain", 1, "", DEFAULT_TIMEOUT)
    assert plain.kernel == build / "x86" / "plain.flat"
    assert (full.processors, full.arguments, full.timeout) == (2, "one two", 30)
    assert full.features == "+x2apic,-pcid,vendor=AuthenticAMD"
    assert full.qemu_option("-m") == "4g"
    assert full.groups == ("apic", "slow")


def test_what_cannot_run_says_why(build: Path) -> None:
    reasons = {entry.name: not_for_us(entry) for entry in read_entries(build)}
    assert reasons == {"plain": "", "full": "full.flat is not built", "other": "i386 only", "kvm": "kvm only"}


@pytest.mark.parametrize(
    ("status", "log", "verdict", "detail"),
    [
        (0, "SUMMARY: 3 tests\r\n", Verdict.PASS, "3 tests"),
        (38, "SUMMARY: 1 tests, 1 skipped\r\n", Verdict.SKIP, "1 tests, 1 skipped"),
        (1, "SUMMARY: 2 tests, 1 unexpected failures\r\n", Verdict.FAIL, "2 tests, 1 unexpected failures"),
        (63, "", Verdict.FAIL, "status 63"),
    ],
)
def test_verdicts(status: int, log: str, verdict: Verdict, detail: str) -> None:
    result = verdict_of(status, log)
    assert (result.verdict, result.detail, result.log) == (verdict, detail, log)
