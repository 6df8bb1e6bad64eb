"""The command line over a scripted machine: options, one-line errors, statuses, streams, the terminal."""

from __future__ import annotations

import gc
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trivisor.boot import ImageError
from trivisor.cli import session
from trivisor.cli.main import main
from trivisor.devices.user_network import NetworkUnavailable
from trivisor.guests.debian import GuestUnavailable
from trivisor.monitor.doctor import Examination, Finding
from trivisor.monitor.outcome import Outcome, StopReason
from trivisor.monitor.techniques import TECHNIQUES, Technique

POWERED_OFF = Outcome(StopReason.POWEROFF, "the guest powered off")
Behaviour = Callable[["FakeMachine"], Outcome]


class FakeMachine:
    """Stands for VirtualMachine; `behaviour` is what its guest does."""

    technique, engine, why, memory_size = "translation", "fake", "", 512 << 20
    behaviour: Behaviour = staticmethod(lambda machine: POWERED_OFF)
    made: FakeMachine

    def __init__(self, kernel: Path | None, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.print = options["serial"]
        self.stopped = threading.Event()
        self.typed = bytearray()
        self.came = threading.Event()
        self.timeout: float | None = None
        self.wanted = False
        self.input_room = True
        FakeMachine.made = self

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, timeout: float | None) -> Outcome:
        self.timeout = timeout
        return FakeMachine.behaviour(self)

    def until_stopped(self) -> Outcome:
        assert self.stopped.wait(10), "nobody stopped the machine"
        return Outcome(StopReason.STOPPED, "stopped")

    def write(self, data: bytes) -> None:
        self.typed += data
        self.came.set()

    def stop(self) -> None:
        self.stopped.set()

    kept = ""
    warnings: Sequence[str] = ()

    @classmethod
    def restore(cls, path: Path, **options: Any) -> FakeMachine:
        made = cls(path, **options)
        made.warnings = ["beware", "of this too"]
        return made

    def keep(self) -> None:
        pass

    def statistics(self) -> dict[str, Any]:
        return {"exits": {"cpuid": 42}}


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Callable[[Behaviour], None]:
    monkeypatch.setattr(session, "VirtualMachine", FakeMachine)
    monkeypatch.setattr(FakeMachine, "behaviour", FakeMachine.behaviour)
    return lambda behaviour: monkeypatch.setattr(FakeMachine, "behaviour", staticmethod(behaviour))


def prints(*pieces: bytes) -> Behaviour:
    def behave(machine: FakeMachine) -> Outcome:
        for piece in pieces:
            machine.print(piece)
        return POWERED_OFF

    return behave


def test_the_guests_output_is_all_of_stdout_and_stderr_is_silent(guest, capfd) -> None:
    guest(prints(b"hel", b"lo\n"))
    assert main(["run"]) == 0
    assert capfd.readouterr() == ("hello\n", "")


def test_what_a_restored_guest_is_given_and_what_is_said_of_it(guest, capfd) -> None:
    guest(prints(b"hello\n"))
    given = ["--disk", "a", "--disk", "b,readonly", "--net", "user", "--engine", "direct", "--technique", "paravirt"]
    assert main(["run", "--restore", "up.snap", *given]) == 0
    made = FakeMachine.made
    assert made.kernel == Path("up.snap")
    assert (made.options["disks"], made.options["network"]) == (("a", "b,readonly"), "user")
    assert (made.options["engine"], made.options["technique"]) == ("direct", "paravirt")
    assert capfd.readouterr() == ("hello\n", "trivisor: beware\ntrivisor: of this too\n")
    for decided in (["--memory", "64M"], ["--append", "x"], ["--cpu", "+umip"]):
        assert main(["run", "--restore", "up.snap", *decided]) == 2
        assert f"leave out {decided[0]}" in capfd.readouterr().err


def test_options_reach_the_machine(guest, tmp_path: Path) -> None:
    guest(prints())
    arguments = ["run", "vmlinuz", "--technique", "translation", "--initrd", "i.img", "--append", "a b"]
    arguments += ["--module", "m1", "--module", "m2,x=1,y=2", "--memory", "1G", "--timeout", "2.5"]
    assert main([*arguments, "--no-reboot", "--serial", f"file:{tmp_path / 'out'}"]) == 0
    made = FakeMachine.made
    assert made.kernel == Path("vmlinuz")
    assert made.timeout == 2.5
    assert made.options["keep_translations"]
    expected = {
        "initrd": Path("i.img"), "append": "a b", "memory": "1G",
        "technique": "translation", "command": None,
        "modules": ((Path("m1"), ""), (Path("m2"), "x=1,y=2")), "no_reboot": True, "interactive": False,
    }  # fmt: skip
    assert {name: made.options[name] for name in expected} == expected


def test_translations_are_not_kept_when_that_is_not_wanted(guest) -> None:
    guest(prints())
    assert main(["run", "vmlinuz", "--no-keep"]) == 0
    assert not FakeMachine.made.options["keep_translations"]


def test_what_was_kept_is_said_when_asked_for(guest, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeMachine, "kept", "ignored: damaged")
    guest(prints())
    assert main(["run", "vmlinuz"]) == 0
    assert "ignored" not in capfd.readouterr().err
    assert main(["run", "vmlinuz", "-v"]) == 0
    assert "trivisor: translations of earlier runs: ignored: damaged" in capfd.readouterr().err


def test_kernel_option_is_the_same_as_image(guest) -> None:
    assert main(["run", "--kernel", "vmlinuz", "--serial", "null"]) == 0
    assert FakeMachine.made.kernel == Path("vmlinuz")


@pytest.mark.parametrize(
    ("arguments", "kernel"),
    [(["run", "--"], None), (["run", "image", "--memory", "64", "--"], Path("image"))],
)
def test_a_command_is_taken_as_it_stands(guest, arguments: list[str], kernel: Path | None) -> None:
    guest(lambda machine: Outcome(StopReason.POWEROFF, "", guest_status=7))
    assert main([*arguments, "sh", "-c", "exit 7", "--", "--help"]) == 7
    assert FakeMachine.made.options["command"] == ("sh", "-c", "exit 7", "--", "--help")
    assert FakeMachine.made.kernel == kernel


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (Outcome(StopReason.RESET, "rebooted"), 0, ""),
        (Outcome(StopReason.DEBUG_EXIT, "exit", 33), 33, ""),
        (Outcome(StopReason.HALTED, "halted at 0x7", dump="rip=7"), 125, "trivisor: halted at 0x7\nrip=7\n"),
        (Outcome(StopReason.TRIPLE_FAULT, "fault", dump="rip=8"), 125, "trivisor: fault\nrip=8\n"),
        (Outcome(StopReason.UNSUPPORTED, "unsupported: x at 0x9"), 3, "trivisor: unsupported: x at 0x9\n"),
        (Outcome(StopReason.TIMEOUT, "still ran"), 124, "trivisor: still ran\n"),
        (Outcome(StopReason.STOPPED, "stopped"), 0, ""),
    ],
)
def test_ends_and_their_statuses(guest, capfd, outcome: Outcome, status: int, said: str) -> None:
    guest(lambda machine: outcome)
    assert main(["run"]) == status
    assert capfd.readouterr() == ("", said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"], ["--frobnicate"], ["run", "--frobnicate"], ["run", "a", "b"],
        ["run", "a", "--kernel", "b"], ["run", "--memory", "lots"], ["run", "--memory", "1M"],
        ["run", "--memory", "17G"], ["run", "--memory", "-1"],
        ["run", "--technique", "magic"], ["run", "--serial", "telepathy"], ["run", "--serial", "file:"],
        ["run", "--timeout", "0"], ["run", "--timeout", "soon"], ["run", "--timeout", "nan"], ["run", "--"],
        ["run", "--serial", "file:/nonexistent/file"], ["run", "--module"],
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(guest, capfd, arguments: list[str]) -> None:
    assert main(arguments) == 2
    said, complaint = capfd.readouterr()
    assert said == ""
    assert complaint.startswith("trivisor: ")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ImageError("vmlinuz: truncated"), 2, "trivisor: vmlinuz: truncated\n"),
        (FileNotFoundError(2, "No such file or directory", "x.img"), 2, "trivisor: x.img: No such file"),
        (NetworkUnavailable("install it"), 1, "trivisor: install it"),
        (GuestUnavailable("no network"), 1, "trivisor: no network\n"),
        (ZeroDivisionError("two\nlines"), 70, "trivisor: internal error, ZeroDivisionError: two lines"),
    ],
)
def test_errors_of_the_set_up_are_one_line(guest, capfd, monkeypatch, error, status: int, said: str) -> None:
    def fail(self: FakeMachine, kernel: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(FakeMachine, "__init__", fail)
    assert main(["run"]) == status
    complaint = capfd.readouterr().err
    assert complaint.startswith(said)
    assert complaint.count("\n") == 1


def test_a_missing_technique_is_said_to_be(capfd, monkeypatch) -> None:
    monkeypatch.setitem(TECHNIQUES, "hardware", Technique("hardware", "what it is", lambda: "not in this version"))
    assert main(["run", "--technique", "hardware"]) == 3
    assert capfd.readouterr().err == "trivisor: technique hardware: not in this version\n"


@pytest.mark.parametrize(("option", "value"), [("--disk", "x.img"), ("--net", "user")])
def test_devices_of_xen_guests(capfd, option: str, value: str) -> None:
    assert main(["run", "--technique", "translation", option, value]) == 3
    assert capfd.readouterr().err == (
        f"trivisor: {option} needs --technique paravirt: translation has no such device yet\n"
    )


def test_a_command_that_did_not_get_to_its_end(guest, capfd) -> None:
    guest(lambda machine: Outcome(StopReason.POWEROFF, "ended before", 125, "Kernel panic", True))
    assert main(["run", "--", "true"]) == 125
    assert capfd.readouterr().err == "trivisor: ended before\nKernel panic\n"


def test_statistics(guest, capfd, tmp_path: Path) -> None:
    assert main(["run", "--stats", "--stats-json", str(tmp_path / "s.json")]) == 0
    said, table = capfd.readouterr()
    assert said == "" and "cpuid" in table and "42" in table
    assert '"cpuid": 42' in (tmp_path / "s.json").read_text()


def test_verbose_says_what_runs(guest, capfd) -> None:
    assert main(["run", "-v"]) == 0
    assert capfd.readouterr().err.splitlines()[0] == "trivisor: translation, fake, 512M of RAM"


def test_serial_to_a_file(guest, capfd, tmp_path: Path) -> None:
    guest(prints(b"\x00raw\r\n"))
    assert main(["run", "--serial", f"file:{tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out").read_bytes() == b"\x00raw\r\n"
    assert capfd.readouterr() == ("", "")


def test_serial_to_a_full_disk_is_told(guest, capfd) -> None:
    guest(lambda machine: (machine.print(b"x"), machine.until_stopped())[1])
    assert main(["run", "--serial", "file:/dev/full"]) == 1
    assert capfd.readouterr().err == "trivisor: cannot write the guest's output: No space left on device\n"


def test_serial_pty_connects_both_ways(guest, capfd) -> None:
    def talk(machine: FakeMachine) -> Outcome:
        name = capfd.readouterr().err.split()[-1]
        machine.print(b"login:")
        line = os.open(name, os.O_RDWR | os.O_NOCTTY)
        assert os.read(line, 100) == b"login:"
        os.write(line, b"root\n")
        assert machine.came.wait(5)
        assert machine.typed == b"root\n"
        os.close(line)
        machine.print(bytes(1 << 20))  # nobody listens: it must not wait
        return POWERED_OFF

    guest(talk)
    assert main(["run", "--serial", "pty"]) == 0
    assert FakeMachine.made.options["interactive"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_run(guest, capfd, number: int) -> None:
    before = signal.getsignal(number)

    def signalled(machine: FakeMachine) -> Outcome:
        os.kill(os.getpid(), number)
        return machine.until_stopped()

    guest(signalled)
    assert main(["run"]) == 128 + number
    assert signal.getsignal(number) == before
    assert capfd.readouterr() == ("", "")


def test_a_signal_during_set_up(guest, monkeypatch) -> None:
    def signalled(self: FakeMachine, kernel: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FakeMachine, "__init__", signalled)
    assert main(["run"]) == 143


def on_terminal(behaviour: Behaviour, keys: bytes, *arguments: str) -> tuple[int, bytes, bool]:
    """Run the command on a terminal of its own and type `keys` once the guest printed "ready".

    Returns its status, what the terminal showed, and whether its mode was as before.
    """
    FakeMachine.behaviour = staticmethod(behaviour)
    gate_reader, gate_writer = os.pipe()
    child, terminal = pty.fork()
    if child == 0:
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # not pytest's
        before = termios.tcgetattr(0)
        status = main(["run", *arguments])
        os.write(gate_writer, b"1" if termios.tcgetattr(0) == before else b"0")
        os._exit(status)
    shown = b""
    typed = False
    try:
        while select.select([terminal], [], [], 10)[0] and (data := os.read(terminal, 1000)):
            shown += data
            if not typed and b"ready" in shown:  # before it, the terminal is not raw yet
                typed = True
                os.write(terminal, keys)
    except OSError:  # the child has ended
        pass
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    restored = os.read(gate_reader, 1) == b"1"
    for descriptor in (terminal, gate_reader, gate_writer):
        os.close(descriptor)
    return status, shown, restored


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_terminal_is_the_console_and_ctrl_a_x_ends_it(guest) -> None:
    def echo(machine: FakeMachine) -> Outcome:
        assert machine.options["interactive"]
        machine.print(b"ready")
        outcome = machine.until_stopped()
        machine.print(b"<%b>" % bytes(machine.typed))
        return outcome

    status, shown, restored = on_terminal(echo, b"a\x03\r\x01\x01\x01h\x01x")
    assert (status, restored) == (0, True)
    assert b"<a\x03\r\x01>" in shown
    assert b"Ctrl-A x" in shown
    assert b"trivisor: translation, fake" in shown


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored_after_a_signal(guest, number: int) -> None:
    def signalled(machine: FakeMachine) -> Outcome:
        machine.print(b"ready")
        os.kill(os.getpid(), number)
        return machine.until_stopped()

    status, _, restored = on_terminal(signalled, b"")
    assert (status, restored) == (128 + number, True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_terminal_is_restored_after_an_internal_error(guest) -> None:
    def fails(machine: FakeMachine) -> Outcome:
        machine.print(b"ready")
        raise ZeroDivisionError

    status, shown, restored = on_terminal(fails, b"")
    assert (status, restored) == (70, True)
    assert b"internal error" in shown


def run_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trivisor", *arguments], capture_output=True, text=True, timeout=20, **options
    )


def test_help_is_quick_and_documents_every_status() -> None:
    times = []
    for _ in range(5):
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "doctor" in run_process("--help").stdout
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # not the time of day: others may have the processors
        times.append(ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime)
    assert min(times) < 0.3
    text = run_process("run", "--help").stdout
    for documented in ("124", "125", "129", "130", "141", "143", "0xf4", "--stats-json", "-- COMMAND"):
        assert documented in text


def examined(*troubles: str) -> list[Examination]:
    found = [Finding("/dev/x", "absent [as ever]", "sudo mend it")]
    return [Examination(technique, found, trouble) for technique, trouble in zip(TECHNIQUES.values(), troubles, strict=True)]


@pytest.mark.parametrize("troubles, status", [(("", "b", "c"), 0), (("a", "b", ""), 0), (("a", "b", "c"), 1)])
def test_doctor_says_what_works_and_how_to_mend_the_rest(capfd, monkeypatch, troubles, status: int) -> None:
    monkeypatch.setattr("trivisor.monitor.doctor.examine", lambda: examined(*troubles))
    assert main(["doctor"]) == status
    said = capfd.readouterr().out
    for name, trouble in zip(TECHNIQUES, troubles, strict=True):
        assert re.search(rf"^{name} +{f'does not work: {trouble}' if trouble else 'works'} ", said, re.MULTILINE)
    assert said.count("absent [as ever]") == said.count("to mend it: sudo mend it") == 3
    assert re.search(r"^auto +(translation|hardware): ", said, re.MULTILINE)


def test_version(capfd) -> None:
    assert main(["--version"]) == 0
    assert "0.1.0" in capfd.readouterr().out


def test_only_the_processs_own_command_line_ends_the_look_for_garbage(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    thresholds, interval, frozen = gc.get_threshold(), sys.getswitchinterval(), gc.get_freeze_count()
    try:
        assert main(["--version"]) == 0
        assert gc.get_threshold()[0] > thresholds[0] or thresholds[0] == 100_000
        assert sys.getswitchinterval() < 0.001
        assert gc.get_freeze_count() == frozen
        monkeypatch.setattr(sys, "argv", ["trivisor", "--version"])
        assert main() == 0
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
