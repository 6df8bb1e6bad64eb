"""VirtualMachine: builds memory, board and vCPU, boots a guest and runs it until it stops."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from trivisor.guests import waiting as waiting_guest
from trivisor.guests.command import CommandOutput
from trivisor.guests.waiting import ReadyMark
from trivisor.machine.exits import Exit, Halt
from trivisor.machine.footprint import footprint
from trivisor.machine.state import CpuState
from trivisor.machine.vcpu import Vcpu
from trivisor.monitor.assembly import Assembly, assemble
from trivisor.monitor.attachments import DiskName, Network
from trivisor.monitor.console import Console, Deadline, Pattern, compile_pattern
from trivisor.monitor.endings import by_device, by_processor, with_command
from trivisor.monitor.linear import read_linear
from trivisor.monitor.outcome import Outcome, StopReason
from trivisor.monitor.plan import Hardware, Progress, Wish, checked_engine, make_hardware, make_plan
from trivisor.monitor.signals import attention
from trivisor.monitor.sizes import parse_memory
from trivisor.monitor.statistics import add_counters
from trivisor.monitor.techniques import PARAVIRT, Choice, Needs, TechniqueUnavailable, choose

if TYPE_CHECKING:
    from trivisor.monitor.perf_map import PerfMap

Module = str | os.PathLike[str] | tuple[str | os.PathLike[str], str]
"""A multiboot module: its file, or its file and command line."""

_INPUT_RETRY_NS = 20_000_000
"""How soon to offer input again that the serial port had no room for."""


class VirtualMachine:
    """One machine with its guest, switched on but not running until `run`, `step` or `read_until`.

    `kernel` is a Linux bzImage or vmlinux or a multiboot ELF file; without one
    it is Debian's.  A Linux kernel without `initrd` gets the default user
    space: a shell on the console, of `terminal_size` (rows, columns), or a
    report on itself when not `interactive`; or `command` and nothing else, whose
    output is then all that `output`, `serial` and `read_until` see.  `append` is
    added to the default command line; with a kernel of your own and no default
    user space it is the command line.

    `memory` is "512M" or a number of bytes.  `serial` is called with what the
    guest prints, as it prints.  A guest that reboots is booted again unless
    `no_reboot` or with a `command`.  `progress` is called with what is being
    done and the done part of it while the default guest is fetched.  `devices`
    adds what a board does not always have ("pc-testdev"), and `cpu` switches
    features of the processor ("+umip,-x2apic").  `disks` are raw disks, "FILE" or
    "FILE,readonly", and `network` is "user" with ports of the host's to forward
    ("user,forward=8080:80"); only paravirtualization has them.  `keep_translations`: what the
    translator made is kept in the user's cache for the next run of the kernel.
    `perf_map` is a file in which Linux's perf finds the names of translated code
    (`/tmp/perf-PID.map`), complete once the machine is closed.  With `waiting`
    the default user space comes up and waits: `run` ends with `StopReason.WAITING`,
    and a `snapshot` taken then can be `restore`d to a shell or to any command.

    Raises ValueError or OSError for a guest that cannot be loaded,
    `guests.debian.GuestUnavailable` when the default guest cannot be fetched,
    `devices.user_network.NetworkUnavailable` without the library for a network,
    and `TechniqueUnavailable` for a technique that cannot be had.  `why` says
    what decided between the techniques, if that was left to "auto".

    All methods belong to one thread, except `stop`, `write` and `output`,
    which any may use, and `read_until`, which waits when another thread runs
    the machine.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str] | None = None,
        *,
        initrd: str | os.PathLike[str] | None = None,
        append: str | None = None,
        memory: str | int = "512M",
        technique: str = "auto",
        engine: str = "auto",
        command: Sequence[str] | None = None,
        modules: Sequence[Module] = (),
        firmware: str | os.PathLike[str] | None = None,
        serial: Callable[[bytes], None] | None = None,
        no_reboot: bool = False,
        interactive: bool = True,
        terminal_size: tuple[int, int] | None = None,
        progress: Progress = lambda what, part: None,
        devices: Sequence[str] = (),
        cpu: str = "",
        disks: Sequence[DiskName] = (),
        network: Network | str | None = None,
        keep_translations: bool = True,
        perf_map: str | os.PathLike[str] | None = None,
        waiting: bool = False,
    ) -> None:
        hardware = make_hardware(devices, cpu, disks, network)
        choice = choose(technique, Needs(hardware.cpu, perf_map is not None, hardware.xen_device))
        memory_size = parse_memory(memory)
        name = choice.technique.name
        wish = Wish(
            kernel=None if kernel is None else Path(kernel),
            initrd=None if initrd is None else Path(initrd),
            append=append,
            modules=tuple(_module(module) for module in modules),
            firmware=None if firmware is None else Path(firmware),
            command=command,
            interactive=interactive,
            terminal_size=terminal_size,
            console="hvc0" if name == PARAVIRT else "ttyS0",
            progress=progress,
            hardware=hardware,
            keep=keep_translations,
            waiting=waiting,
            engine=checked_engine(engine),
        )
        plan = make_plan(wish)
        names = None
        if perf_map is not None:
            from trivisor.monitor.perf_map import open_perf_map

            names = open_perf_map(Path(perf_map), plan.kernel)
        self._set_up(
            lambda: assemble(plan, memory_size, self._technique, self._printed, self._kick),
            choice,
            hardware,
            serial,
            marker=plan.marker,
            waits_as=plan.waits_as,
            no_reboot=no_reboot or command is not None,
            perf_map=names,
        )

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        *,
        technique: str = "auto",
        engine: str = "auto",
        command: Sequence[str] | None = None,
        serial: Callable[[bytes], None] | None = None,
        terminal_size: tuple[int, int] | None = None,
        disks: Sequence[DiskName] = (),
        network: Network | str | None = None,
        keep_translations: bool = True,
    ) -> Self:
        """The machine that `snapshot` wrote into a file, at the moment at which it was written.

        A guest that waited (`waiting`) starts a shell, or `command` and nothing
        else.  Parameters are those of the constructor; the file has all the others.
        Disks are not in it: a Xen guest is given its own again, and a network if it had one,
        whose connections are new.  A restored guest that reboots has come to its end.

        Raises `SnapshotError`, a ValueError, for a file that is none, damaged, of
        another format, of a processor that this host cannot stand for, or of a guest that had
        other disks than it is given; what the constructor does for disks and networks; OSError;
        and `TechniqueUnavailable`.  `warnings` has what may not be as the guest expects.
        """
        from trivisor.monitor.snapshot_file import SnapshotFile
        from trivisor.monitor.snapshots import Host, extra, restore

        choice = choose(technique)
        given = make_hardware((), "", disks, network)
        with closing(SnapshotFile(Path(path))) as file:
            about = extra(file)
            if given.xen_device and about.technique != PARAVIRT:
                raise file.error(f"its guest is no Xen guest, and can have no {given.xen_device}")
            if about.technique == PARAVIRT and technique == "auto":
                choice = choose(PARAVIRT)._replace(why="the snapshot is of a Xen guest")
            if PARAVIRT in (about.technique, choice.technique.name) and about.technique != choice.technique.name:
                raise TechniqueUnavailable(
                    f"a snapshot of a guest of technique {about.technique} cannot go on under {choice.technique.name}"
                )
            line = b""
            if about.waits_as:
                line = waiting_guest.line(command, terminal_size)
            elif command is not None:
                raise file.error("its guest does not wait for a command; `trivisor run --snapshot` makes one that does")
            hardware = about.hardware._replace(disks=given.disks, network=given.network)
            host = Host(choice.technique.name, checked_engine(engine), hardware, keep_translations)
            machine = cls.__new__(cls)
            machine._set_up(
                lambda: restore(file, host, machine._printed, machine._kick),
                choice,
                hardware,
                serial,
                marker=b"" if command is None else about.waits_as,
                no_reboot=True,
            )
            machine._console.write(line)
            machine.warnings = _warnings(machine._machine, waits=bool(about.waits_as))
        return machine

    def _set_up(
        self,
        build: Callable[[], Assembly],
        choice: Choice,
        hardware: Hardware,
        serial: Callable[[bytes], None] | None,
        *,
        marker: bytes,
        no_reboot: bool,
        waits_as: bytes = b"",
        perf_map: PerfMap | None = None,
    ) -> None:
        """Begin with a machine that `build` makes, and makes again after a reset."""
        self._build = build
        self._technique, self.why = choice.technique.name, choice.why
        self.warnings: list[str] = []
        """What the owner should know of a restored machine, a line each."""
        self._hardware = hardware
        self._no_reboot = no_reboot
        self._serial = None if serial is None else self._guard(serial)
        self._console = Console()
        self._command = CommandOutput(marker, self._show) if marker else None
        self._waits_as = waits_as
        self._ready_mark: ReadyMark | None = None
        self._waits = self._begins_to_wait = False
        self._subscribers: list[tuple[type, Callable[[Any], None]]] = []
        self._running = threading.Lock()
        self._attention = threading.Event()
        self._stop_requested = threading.Event()
        self._failure: BaseException | None = None
        self._is_sound = True  # no error of ours has come out of the engine
        self._ended: Outcome | None = None
        self._closed = False
        self._earlier_counters: dict[str, Any] = {}
        self._kickable: Vcpu | None = None
        self._kick_lock = threading.RLock()  # a signal handler may kick while its own thread holds it
        self._perf_map = perf_map
        self._machine = self._switch_on()

    def _switch_on(self) -> Assembly:
        if self._waits_as:
            self._ready_mark = ReadyMark(self._waits_as, self._show, self._waits_now)
            self._waits = False
        machine = self._build()
        for exit_type, callback in self._subscribers:
            machine.vcpu.observed.setdefault(exit_type, []).append(callback)
        if self._perf_map is not None:
            try:
                self._perf_map.watch(machine.vcpu)
            except ValueError:
                machine.close()
                raise
        self._kickable = machine.vcpu
        return machine

    def _switch_off(self) -> None:
        if self._perf_map is not None:
            self._perf_map.write(self._machine.vcpu)
        with self._kick_lock:
            self._kickable = None
        self._machine.close()

    # Running

    def run(self, timeout: float | None = None) -> Outcome:
        """Run until the guest ends, `stop` is called, or `timeout` seconds of host time have passed.

        After a timeout or a stop the machine is still on and can run on; after
        any other end, running it again returns the same outcome.
        """
        outcome = self._run(timeout, lambda: False)
        assert outcome is not None
        return outcome

    def step(self, count: int = 1) -> Exit | None:
        """Run `count` instructions and return the last exit, DebugStop unless something else happened.

        Stops early when the machine ends (`outcome` tells); None when it had ended before.
        """
        last: Exit | None = None
        with self._exclusively():
            for _ in range(count):
                if self._ended is not None:
                    break
                self._before_entry()
                last = self._machine.vcpu.step()
                self._after_exit(last)
        return last

    def stop(self) -> None:
        """End the current run, or the next one if there is none; from any thread."""
        self._stop_requested.set()
        self._kick()

    @property
    def wanted(self) -> bool:
        """Whether someone waits for the vCPU to come back: a stop, a timeout, input."""
        return self._attention.is_set()

    @property
    def input_room(self) -> bool:
        """Whether the serial port has taken all that was typed."""
        return not self._console.has_input

    @property
    def outcome(self) -> Outcome | None:
        """How the machine ended; None while it is on."""
        return self._ended

    @property
    def post_code(self) -> int:
        """The last byte that the guest wrote to port 0x80."""
        return self._machine.board.post_code

    def _run(self, timeout: float | None, satisfied: Callable[[], bool]) -> Outcome | None:
        """Run until an outcome, or None once `satisfied()`, which is asked after every kick."""
        with self._exclusively(), self._alarm(timeout) as expired, attention(self._kick, self.stop):
            while self._ended is None and not satisfied():
                self._attention.clear()
                if self._stop_requested.is_set():
                    self._stop_requested.clear()
                    return Outcome(StopReason.STOPPED, "stopped")
                if expired.is_set():
                    return Outcome(StopReason.TIMEOUT, f"the guest still ran after {timeout:g} s")
                if self._begins_to_wait:
                    self._begins_to_wait = False
                    return Outcome(StopReason.WAITING, "the guest waits for what it is to run")
                self._before_entry()
                self._is_sound = False
                exit_ = self._machine.vcpu.run()
                self._is_sound = True
                self._after_exit(exit_)
            return self._ended

    def _before_entry(self) -> None:
        """Hand over what was typed."""
        board = self._machine.board
        typed = self._console.take_input()
        if not typed:
            return
        taken = board.console_input(typed)
        if taken < len(typed):
            self._console.return_input(typed[taken:])
            board.clock.at(board.clock.now() + _INPUT_RETRY_NS, self._kick)

    def _after_exit(self, exit_: Exit) -> None:
        """Act on what the vCPU came back with: end the machine, boot it again, or let it go on."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        machine = self._machine
        ended = by_device(machine.board.stop_reason) or by_processor(exit_, machine.vcpu, machine.memory)
        if ended is None:
            if isinstance(exit_, Halt):
                self._idle()
        elif ended.reason is StopReason.RESET and not self._no_reboot:
            self._reboot()
        else:
            self._ended = ended if self._command is None else with_command(ended, self._command)
            self._console.wake()

    def _idle(self) -> None:
        """Halted with interrupts on: wait for a kick or the next timer."""
        clock = self._machine.board.clock
        due = clock.next_deadline()
        seconds = threading.TIMEOUT_MAX if due is None else max(0, due - clock.now()) / 1e9
        self._attention.wait(min(seconds, threading.TIMEOUT_MAX))
        clock.run_due()

    def _reboot(self) -> None:
        add_counters(self._earlier_counters, self._machine.statistics())
        self.keep()
        self._switch_off()
        self._machine = self._switch_on()

    def _kick(self) -> None:
        """Have the run loop look around; from any thread, but never at a vCPU that is being taken down."""
        self._attention.set()
        with self._kick_lock:
            if self._kickable is not None:
                self._kickable.kick()

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        if self._closed:
            raise RuntimeError("the machine is closed")
        if not self._running.acquire(blocking=False):
            raise RuntimeError("the machine is already running")
        try:
            yield
        finally:
            self._running.release()
            self._console.wake()

    @contextmanager
    def _alarm(self, timeout: float | None) -> Iterator[threading.Event]:
        """Set the event and kick the vCPU once `timeout` seconds have passed."""
        expired = threading.Event()
        if timeout is None:
            yield expired
            return
        if not timeout >= 0:
            raise ValueError(f"timeout must not be negative: {timeout}")

        def expire() -> None:
            expired.set()
            self._kick()

        timer = threading.Timer(min(timeout, threading.TIMEOUT_MAX), expire)
        timer.daemon = True
        timer.start()
        try:
            yield expired
        finally:
            timer.cancel()

    # The console

    def _printed(self, data: bytes) -> None:
        """The serial port's output, in the vCPU's thread."""
        if self._ready_mark is not None:
            self._ready_mark.feed(data)
        elif self._command is None:
            self._show(data)
        else:
            self._command.feed(data)

    def _waits_now(self) -> None:
        self._waits = self._begins_to_wait = True
        self._kick()

    def _show(self, data: bytes) -> None:
        """The output that the machine's owner sees."""
        if self._console.feed(data):
            self._kick()
        if self._serial is not None:
            self._serial(data)

    @property
    def output(self) -> bytes:
        """What the guest printed on its serial console (the newest 8 MiB at least)."""
        return self._console.output

    def write(self, data: str | bytes) -> None:
        """Type `data` on the serial console; from any thread."""
        self._waits = False
        self._ready_mark = None
        self._console.write(data.encode() if isinstance(data, str) else data)
        self._kick()

    def read_until(self, pattern: Pattern, timeout: float | None = None) -> bytes:
        """Run until the console printed `pattern`, and return all since the last call up to its end.

        A str or bytes is looked for as it is; a compiled expression (of bytes)
        may match over at most 4096 bytes.  Raises TimeoutError after `timeout`
        seconds and EOFError when the machine ends or is stopped before.
        """
        expression = compile_pattern(pattern)
        deadline = Deadline(timeout)
        self._console.watch(expression)
        try:
            while (found := self._console.consume(expression)) is None:
                if deadline.remaining() == 0:
                    raise TimeoutError(f"the guest did not print {expression.pattern!r} in {timeout:g} s")
                self._await_output(expression, deadline)
        finally:
            self._console.watch(None)
        return found

    def _await_output(self, expression: re.Pattern[bytes], deadline: Deadline) -> None:
        """Run the machine, or wait for the thread that does, until there may be a match."""
        seconds = deadline.remaining()
        if self._running.locked():
            self._console.wait(min(seconds, 0.5))
            return
        timeout = None if seconds == math.inf else seconds
        outcome = self._run(timeout, lambda: self._console.matches(expression))
        if outcome is not None and outcome.reason is not StopReason.TIMEOUT:
            raise EOFError(f"no {expression.pattern!r} from the guest: {outcome.message}")

    # Another technique

    def change_technique(self, technique: str) -> None:
        """Have the guest go on under "translation" or "hardware", from the instruction that it stands at.

        Between runs, as often as wanted; the guest does not notice.  Its processor
        keeps the features that it began with.  Raises `TechniqueUnavailable`, and
        leaves all as it was, where that cannot be done: this host has no such
        technique or it lacks what the guest uses, or a PV guest is concerned.
        """
        from trivisor.monitor.handover import change_technique

        with self._exclusively():
            chosen = choose(technique).technique.name
            if chosen == self.technique:
                return
            if self._perf_map is not None:
                raise TechniqueUnavailable("a perf map is of translations: leave one of them out")
            self._require_sound()
            machine = self._machine
            counters = machine.statistics()
            with self._kick_lock:
                self._kickable = None
            try:
                change_technique(machine, chosen, self._hardware)
            finally:
                self._kickable = machine.vcpu
            add_counters(self._earlier_counters, counters)
            self._technique = chosen

    # Snapshots

    def snapshot(self, path: str | os.PathLike[str]) -> int:
        """Write the whole machine into a file, between runs, and return the file's length in bytes.

        `restore` makes a machine of it that goes on from here; this one can go on
        too.  The file is there whole or not at all, and only its owner may read
        it, since it has the guest's memory; what the guest wrote to disks is in their files,
        which are no part of it.  Raises OSError when it cannot be written, or the disks' files,
        and ValueError for a machine that runs a command or has come to its end.
        """
        from trivisor.monitor.snapshot_file import write_snapshot
        from trivisor.monitor.snapshots import remember

        with self._exclusively():
            if self._ended is not None:
                raise ValueError(f"there is nothing to put into a snapshot: {self._ended.message}")
            if self._command is not None:
                raise ValueError("a machine that runs a command cannot be put into a snapshot")
            self._require_sound()
            remembered = remember(self._machine, self._hardware, self._waits_as if self._waits else b"")
            return write_snapshot(Path(path), remembered, self._machine.memory)

    def _require_sound(self) -> None:
        if not self._is_sound:
            raise RuntimeError("the last run ended in an error: the processor's state may be anything")

    # Inspection

    def subscribe(self, exit_type: type, callback: Callable[[Any], None]) -> None:
        """Have `callback(exit)` called, in the vCPU's thread, for each exit of `exit_type` as it happens."""
        guarded = self._guard(callback)
        self._subscribers.append((exit_type, guarded))
        self._machine.vcpu.observed.setdefault(exit_type, []).append(guarded)

    def _guard(self, callback: Callable[[Any], None]) -> Callable[[Any], None]:
        """`callback`, but what it raises ends the run instead of hitting an engine in its work."""

        def call(argument: Any) -> None:
            try:
                callback(argument)
            except BaseException as failure:
                self._failure = failure
                self._kick()

        return call

    @property
    def registers(self) -> CpuState:
        """A copy of the processor's state; assign it back to change it.  Only while not running."""
        return self._machine.vcpu.state

    @registers.setter
    def registers(self, state: CpuState) -> None:
        self._machine.vcpu.state = state

    def read_memory(self, address: int, length: int) -> bytes:
        """`length` bytes of RAM from guest physical `address`; raises GuestMemoryError outside RAM."""
        return self._machine.memory.read(address, length)

    def write_memory(self, address: int, data: bytes) -> None:
        """Change RAM at guest physical `address`; raises GuestMemoryError outside RAM."""
        self._machine.memory.write(address, data)
        self._machine.vcpu.memory_written(address, len(data))

    def read_linear(self, address: int, length: int) -> bytes:
        """Up to `length` bytes at linear `address` as the guest's page tables map it now."""
        return read_linear(self._machine.memory, self.registers, address, length)

    def statistics(self) -> dict[str, Any]:
        """The engine's counters since the machine was switched on, over all its reboots."""
        total: dict[str, Any] = {}
        add_counters(total, self._earlier_counters)
        add_counters(total, self._machine.statistics())
        if self.kept:
            total["kept translations"] = {"from earlier runs": self.kept}
        if memory := footprint(self._machine.memory):
            total["MiB of host memory"] = memory
        return total

    @property
    def kept(self) -> str:
        """What was found of earlier runs' translations, in a few words; empty when they are not kept."""
        keeper = self._machine.keeper
        return "" if keeper is None else keeper.state

    @property
    def memory_size(self) -> int:
        """Bytes of RAM."""
        return self._machine.memory.size

    @property
    def technique(self) -> str:
        """The technique that runs this machine."""
        return self._machine.vcpu.technique

    @property
    def features(self) -> frozenset[str]:
        """The features of the processor that the guest sees, by their names in `x86.cpuid`."""
        return self._machine.vcpu.guest_cpuid.features

    @property
    def engine(self) -> str:
        """What carries the technique out."""
        return self._machine.vcpu.engine

    # The end

    def keep(self) -> None:
        """Write the translations of this run down, if they are to be kept and are worth it; `close` does it too."""
        keeper = self._machine.keeper
        if keeper is not None and self._is_sound:
            keeper.save()

    def close(self) -> None:
        """Give all host resources back; stops a run in another thread first."""
        if self._closed:
            return
        self.stop()
        with self._running:
            self._closed = True
            self.keep()
            self._switch_off()
            if self._perf_map is not None:
                self._perf_map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _warnings(machine: Assembly, *, waits: bool) -> list[str]:
    """What may not be as a restored guest expects; one that `waits` has not used its disks yet."""
    if machine.xen is None or waits:
        return []
    changed = machine.xen.changed_disks
    return [f"{path} is not as old as {name} was: what the guest knows of that may be wrong" for name, path in changed]


def _module(module: Module) -> tuple[Path, str]:
    if isinstance(module, tuple):
        return Path(module[0]), module[1]
    return Path(module), ""
