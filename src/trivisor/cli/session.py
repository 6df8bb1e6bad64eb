"""One run of a machine from the command line: console, signals, reports and the exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from trivisor.cli.progress import Progress, progress
from trivisor.cli.report import print_statistics, write_statistics
from trivisor.cli.run import Request
from trivisor.cli.serial import Serial, open_serial
from trivisor.monitor import VirtualMachine
from trivisor.monitor.outcome import Outcome, StopReason
from trivisor.monitor.plan import is_other_system
from trivisor.monitor.sizes import format_memory

STATUS_CANNOT_WRITE = 1
_SETTLE_SECONDS = 0.5
"""For which a guest that has come to wait goes on before its snapshot, to be done with what it has begun."""
STATUS_CLOSED_OUTPUT = 128 + signal.SIGPIPE


class Interruption:
    """Ends the machine when a signal asks for it, and remembers which; SIGUSR2 stops it for a snapshot."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.wants_snapshot = False
        self._machine: VirtualMachine | None = None

    def watch(self, machine: VirtualMachine) -> None:
        """From now on a signal stops `machine`."""
        self._machine = machine
        if self.number is not None:
            machine.stop()

    def _tell(self, _number: int, _frame: FrameType | None) -> None:
        """SIGUSR1: where the time went up to now, and on with the guest."""
        if self._machine is not None:
            print_statistics(self._machine.statistics())

    def _save(self, _number: int, _frame: FrameType | None) -> None:
        self.wants_snapshot = True
        if self._machine is not None:
            self._machine.stop()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if self._machine is None:
            raise KeyboardInterrupt
        self._machine.stop()

    @contextlib.contextmanager
    def handled(self, *, snapshots: bool) -> Iterator[None]:
        """Have the signals that end a program come here while the block runs."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._tell)
        if snapshots:
            before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._save)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_session(request: Request) -> int:
    """Do what the command line asks for and return the exit status."""
    if request.snapshot is not None:
        _check_place(request.snapshot)
    interruption = Interruption()
    try:
        with interruption.handled(snapshots=request.snapshot is not None):
            return _run(request, interruption)
    except KeyboardInterrupt:  # a signal during set-up
        return 128 + (interruption.number or signal.SIGINT)


def _run(request: Request, interruption: Interruption) -> int:
    with (
        open_serial(request.serial, command=request.command is not None) as serial,
        progress() as shown,
        _build(request, serial, shown) as machine,
    ):
        _announce(request, machine)
        interruption.watch(machine)
        with serial.connected(machine):
            shown.say("waiting for the guest to speak")
            outcome = _run_on(request, machine, interruption)
        machine.keep()
        shown.stop()
        serial.finish(prompt=outcome.resumable)
        _report(request, machine, outcome)
    if interruption.number is not None:
        return 128 + interruption.number
    if serial.error is not None:
        return _output_failed(serial.error)
    return outcome.status


def _run_on(request: Request, machine: VirtualMachine, interruption: Interruption) -> Outcome:
    """Run to the end, with a snapshot whenever there is cause for one."""
    if request.snapshot is None:
        return machine.run(request.timeout)
    deadline = None if request.timeout is None else time.monotonic() + request.timeout
    while True:
        outcome = machine.run(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if outcome.reason is StopReason.WAITING:
            settled = machine.run(_SETTLE_SECONDS)
            if settled.reason is StopReason.TIMEOUT:
                _write_snapshot(request.snapshot, machine)
            return outcome
        if not (interruption.wants_snapshot and outcome.reason is StopReason.STOPPED) or interruption.number:
            return outcome
        interruption.wants_snapshot = False
        try:
            _write_snapshot(request.snapshot, machine)
        except OSError as error:  # no reason to lose the guest
            _say(f"no snapshot: {request.snapshot}: {error.strerror}")


def _check_place(path: Path) -> None:
    """Raise OSError for a file that cannot be written, before there is something to write."""
    number = 0
    if not path.parent.is_dir():
        number = errno.ENOTDIR if path.parent.exists() else errno.ENOENT
    elif path.is_dir():
        number = errno.EISDIR
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        number = errno.EACCES
    if number:
        raise OSError(number, os.strerror(number), str(path))


def _write_snapshot(path: Path, machine: VirtualMachine) -> None:
    length = machine.snapshot(path)
    _say(f"snapshot of {max(length >> 20, 1)} MiB in {path}")


def _build(request: Request, serial: Serial, shown: Progress) -> VirtualMachine:
    def speaks(data: bytes) -> None:
        shown.stop()
        serial.output(data)

    if request.restore is not None:
        return VirtualMachine.restore(
            request.restore,
            technique=request.technique,
            engine=request.engine,
            command=request.command,
            serial=speaks,
            disks=request.disks,
            network=request.network,
            terminal_size=_terminal_size() if serial.interactive else None,
            keep_translations=not request.no_keep,
        )
    return VirtualMachine(
        request.kernel,
        initrd=request.initrd,
        append=request.append,
        memory=request.memory,
        technique=request.technique,
        command=request.command,
        engine=request.engine,
        modules=request.modules,
        firmware=request.firmware,
        serial=speaks,
        no_reboot=request.no_reboot,
        interactive=serial.interactive,
        terminal_size=_terminal_size() if serial.interactive else None,
        progress=shown.say,
        keep_translations=not request.no_keep,
        perf_map=f"/tmp/perf-{os.getpid()}.map" if request.perf_map else None,
        devices=request.devices,
        cpu=request.cpu,
        disks=request.disks,
        waiting=request.snapshot is not None and not _other_user_space(request),
        network=request.network,
    )


def _other_user_space(request: Request) -> bool:
    """Whether what is booted is not the default user space, which can wait."""
    if request.initrd is not None or request.firmware is not None or request.modules:
        return True
    return request.kernel is not None and is_other_system(request.kernel)


def _terminal_size() -> tuple[int, int]:
    """(rows, columns) of the user's terminal."""
    import shutil  # with all that unpacks archives

    size = shutil.get_terminal_size((80, 24))
    return size.lines, size.columns


def _announce(request: Request, machine: VirtualMachine) -> None:
    """One line on what runs: where someone looks, and never beside a command's output."""
    if request.verbose or request.stats or (request.command is None and sys.stderr.isatty()):
        chosen = f" (auto: {machine.why})" if machine.why else ""
        _say(f"{machine.technique}{chosen}, {machine.engine}, {format_memory(machine.memory_size)} of RAM")
    for warning in machine.warnings:
        _say(warning)
    if request.verbose and machine.kept:
        _say(f"translations of earlier runs: {machine.kept}")


def _report(request: Request, machine: VirtualMachine, outcome: Outcome) -> None:
    """How it ended, when that is not plain from what was asked for; the statistics."""
    quiet = {StopReason.POWEROFF, StopReason.RESET, StopReason.DEBUG_EXIT, StopReason.STOPPED, StopReason.WAITING}
    if request.verbose or outcome.reason not in quiet or outcome.cut_short:
        _say(outcome.message)
    if request.firmware is not None and (request.verbose or outcome.dump):
        _say(f"the last POST code (port 0x80) is {machine.post_code:#04x}")
    if outcome.dump:
        print(outcome.dump, file=sys.stderr)
    if request.stats or request.stats_json:
        statistics = machine.statistics()
        if request.stats:
            print_statistics(statistics)
        if request.stats_json:
            write_statistics(statistics, request.stats_json)


def _output_failed(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):
        return STATUS_CLOSED_OUTPUT
    _say(f"cannot write the guest's output: {error.strerror}")
    return STATUS_CANNOT_WRITE


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"trivisor: {text}\n".encode(errors="replace"))
