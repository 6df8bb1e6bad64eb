"""The kernel that the project carries, on the real engine: multiboot, interrupts, and all the ends of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from trivisor import StopReason, VirtualMachine
from trivisor.guests.test_kernel import STATUS, build
from trivisor.machine.exits import PortOut

pytestmark = [pytest.mark.boot, pytest.mark.timeout(60)]

MODULE = bytes(range(256)) * 33
MEMORY_MAP = """\
memory: 0000000000000000 000000000009FC00 00000001
memory: 000000000009FC00 0000000000000400 00000002
memory: 00000000000E0000 0000000000020000 00000002
memory: 0000000000100000 0000000001F00000 00000001
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("multiboot") / "kernel.elf"
    path.write_bytes(build())
    return path


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "module"
    path.write_bytes(MODULE)
    return path


def report(kernel: Path, words: str, module: Path | None = None) -> str:
    """What the kernel prints before it comes to its end, in 32 MiB."""
    text = f"trivisor test kernel\ncommand line: {kernel} {words}\n{MEMORY_MAP}"
    if module is not None:
        text += f"module: {len(MODULE):08X} {sum(MODULE):08X} {module} with words\n"
    return text


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trivisor", "run", "--memory", "32M", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_it_is_told_everything_and_takes_interrupts(kernel: Path, module: Path) -> None:
    printed = bytearray()
    ended: list[PortOut] = []
    with VirtualMachine(
        kernel, append="one two", modules=[(module, "with words")], memory="32M", serial=printed.extend
    ) as machine:
        machine.subscribe(PortOut, lambda exit_: ended.append(exit_) if exit_.port == 0xF4 else None)
        outcome = machine.run(timeout=30)
        assert (outcome.reason, outcome.status) == (StopReason.DEBUG_EXIT, STATUS)
        assert machine.output.decode() == report(kernel, "one two", module) + "ticks: 10\n"
        assert printed == machine.output
        assert [(exit_.size, exit_.value) for exit_ in ended] == [(1, 21)]
        # On a busy host another tick may come before the kernel, having counted ten, has masked them.
        assert 10 <= machine.statistics()["exits"]["interrupt"] <= 20
        assert machine.registers.cr0 & 1 and not machine.registers.efer


def test_the_command_does_the_same(kernel: Path, module: Path) -> None:
    run = command(kernel, "--append", "one two", "--module", f"{module},with words")
    assert (run.returncode, run.stderr) == (STATUS, "")
    assert run.stdout == report(kernel, "one two", module) + "ticks: 10\n"


def test_a_spinning_kernel_ends_at_the_timeout(kernel: Path) -> None:
    run = command(kernel, "--append", "spin", "--timeout", "2")
    assert run.returncode == 124
    assert run.stdout == report(kernel, "spin")
    assert run.stderr == "trivisor: the guest still ran after 2 s\n"


def test_a_timeout_can_be_run_on_from(kernel: Path) -> None:
    with VirtualMachine(kernel, append="spin", memory="32M") as machine:
        machine.read_until(report(kernel, "spin").splitlines()[-1], timeout=30)
        assert machine.run(timeout=0.5).reason is StopReason.TIMEOUT
        where = machine.registers.rip
        assert machine.read_memory(where, 2) == b"\xeb\xfe"  # jmp $
        machine.write_memory(where, b"\xfa\xf4")  # cli, hlt: the translation of the loop must not go on
        outcome = machine.run(timeout=30)
        assert (outcome.reason, machine.registers.rip) == (StopReason.HALTED, where + 2)


def test_halting_with_interrupts_off_is_an_end(kernel: Path) -> None:
    run = command(kernel, "--append", "halt")
    assert run.returncode == 125
    assert run.stdout == report(kernel, "halt")
    first, *dump = run.stderr.splitlines()
    assert first.startswith("trivisor: the guest halted with interrupts off at 0x1001")
    assert any(line.startswith("rip=") for line in dump)


def test_a_triple_fault_dumps_the_state(kernel: Path) -> None:
    run = command(kernel, "--append", "triple")
    assert run.returncode == 125
    first, *dump = run.stderr.splitlines()
    assert first.startswith("trivisor: triple fault")
    text = "\n".join(dump)
    for what in ("rax=", "rip=", "cr0=", "cr3=", " cs=0008", "idt       base=0000000000000000  limit=0000"):
        assert what in text
    assert "  ud2" in text, "the instruction at rip"


def test_stepping(kernel: Path) -> None:
    with VirtualMachine(kernel, memory="32M") as machine:
        start = machine.registers.rip
        machine.step()
        assert machine.registers.rip == start + 5  # mov esp, imm32
        machine.step(400)
        assert machine.outcome is None and machine.registers.rip != start
        assert machine.run(timeout=30).status == STATUS


def test_one_byte_too_many_in_the_kernel_file_does_no_harm_and_one_too_few_is_told(kernel: Path) -> None:
    longer, shorter = kernel.with_name("longer"), kernel.with_name("shorter")
    longer.write_bytes(kernel.read_bytes() + b"\0")
    shorter.write_bytes(kernel.read_bytes()[:-1])
    assert command(longer).returncode == STATUS
    run = command(shorter)
    assert run.returncode == 2
    assert "truncated" in run.stderr and run.stderr.count("\n") == 1


def test_sigusr1_tells_where_the_time_goes_and_the_guest_goes_on(kernel: Path) -> None:
    arguments = ["run", str(kernel), "--append", "spin", "--memory", "32M", "--timeout", "40"]
    with subprocess.Popen(
        [sys.executable, "-m", "trivisor", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("memory: 0000000000100000"):
            pass
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            while "seconds of python by exit" not in process.stderr.readline():
                pass
        assert process.poll() is None
        process.terminate()
        process.communicate()
        assert process.returncode == 128 + signal.SIGTERM


def test_a_perf_map_names_helpers_and_guest_code(kernel: Path, tmp_path: Path) -> None:
    path = tmp_path / "perf.map"
    with VirtualMachine(kernel, memory="32M", perf_map=path) as machine:
        start = machine.registers.rip
        machine.run(timeout=30)
        blocks = machine.statistics()["translation"]["blocks"]
    lines = [line.split() for line in path.read_text().splitlines()]
    named = {name: (int(at, 16), int(size, 16)) for at, size, name in lines}
    assert named["trivisor:enter"][1] > 0 and f"guest-kernel:{start:#x}" in named
    assert sum(name.startswith("guest-") for _, _, name in lines) >= blocks
    ordered = sorted(named.values())
    assert all(at + size <= following for (at, size), (following, _) in pairwise(ordered))


def test_a_perf_map_follows_no_link(kernel: Path, tmp_path: Path) -> None:
    path = tmp_path / "perf.map"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        VirtualMachine(kernel, memory="32M", perf_map=path)
