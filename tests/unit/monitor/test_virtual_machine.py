"""The monitor over a scripted vCPU and board: every way that a run can end, and what may be done to it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trivisor import VirtualMachine
from trivisor.machine.clock import Clock
from trivisor.machine.exits import DebugStop, Exit, Halt, Kicked, PortOut, Shutdown, Unsupported
from trivisor.machine.memory import GuestMemory, GuestMemoryError
from trivisor.machine.state import CpuState
from trivisor.machine.stop import DebugExit, PowerOff, Reset
from trivisor.monitor import virtual_machine
from trivisor.monitor.assembly import Assembly
from trivisor.monitor.outcome import StopReason
from trivisor.monitor.plan import BootPlan, Wish

MIB = 1 << 20


class FakeBoard:
    """Remembers what was typed; a script prints and stops through it."""

    def __init__(self, memory: GuestMemory, output: Callable[[bytes], None], room: int = 1 << 16) -> None:
        self.memory = memory
        self.print = output
        self.clock = Clock()
        self.stop_reason: object | None = None
        self.typed = b""
        self.room = room

    def console_input(self, data: bytes) -> int:
        taken = data[: self.room]
        self.typed += taken
        self.room -= len(taken)
        return len(taken)


class FakeVcpu:
    """Does one action of the script for each run, then idles until it is kicked."""

    technique, engine = "translation", "fake"

    def __init__(self, board: FakeBoard, script: Iterator[Callable[[FakeVcpu], Exit | None]]) -> None:
        self.board = board
        self.state = CpuState()
        self.observed: dict[type, list[Callable[[Any], None]]] = {}
        self.kicked = threading.Event()
        self.script = script
        self.runs = 0
        self.written: list[tuple[int, int]] = []
        self.closed = False

    def run(self) -> Exit:
        self.runs += 1
        action = next(self.script, None)
        if action is not None:
            return action(self) or Kicked()
        deadline = self.board.clock.next_deadline()
        if not self.kicked.wait(10 if deadline is None else 0.03):
            assert deadline is not None, "nobody kicked"
        self.board.clock.run_due()
        self.kicked.clear()
        return Kicked()

    def step(self) -> Exit:
        self.state.rip += 1
        return next(self.script, lambda vcpu: DebugStop(vcpu.state.rip))(self) or Kicked()

    def kick(self) -> None:
        assert not self.closed
        self.kicked.set()

    def memory_written(self, address: int, length: int) -> None:
        self.written.append((address, length))

    def last_block(self) -> tuple[int, int] | None:
        return None

    def statistics(self) -> dict[str, Any]:
        return {"exits": {"kicked": self.runs}}

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def prints(text: bytes) -> Callable[[FakeVcpu], None]:
    return lambda vcpu: vcpu.board.print(text)


def stops(reason: object) -> Callable[[FakeVcpu], None]:
    return lambda vcpu: setattr(vcpu.board, "stop_reason", reason)


def exits(exit_: Exit) -> Callable[[FakeVcpu], Exit]:
    return lambda vcpu: exit_


class FakeKeeper:
    """Counts how often translations were written down."""

    state = "12 blocks"

    def __init__(self) -> None:
        self.saved = 0
        self.closed = False

    def save(self) -> None:
        assert not self.closed
        self.saved += 1

    def close(self) -> None:
        self.closed = True


class Factory:
    """Builds machines from a script that all boots of one machine share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Assembly] = []
        self.keepers: list[FakeKeeper] = []
        self.plan = BootPlan(kernel=__file__, initrd=None, command_line="", modules=())  # type: ignore[arg-type]
        self.wish: Wish | None = None
        self.script: Iterator[Any] = iter(())
        self.room = 1 << 16
        monkeypatch.setattr(virtual_machine, "assemble", self._assemble)
        monkeypatch.setattr(virtual_machine, "make_plan", self._make_plan)

    def _make_plan(self, wish: Wish) -> BootPlan:
        self.wish = wish
        return self.plan._replace(marker=b"0123abcd" if wish.command else b"")

    def _assemble(self, plan: Any, memory_size: int, technique: str, output: Any, on_stop: Any) -> Assembly:
        memory = GuestMemory(memory_size)
        board = FakeBoard(memory, output, self.room)
        self.keepers.append(FakeKeeper())
        vcpu = FakeVcpu(board, self.script)
        self.made.append(Assembly(memory, board, vcpu, self.keepers[-1]))  # type: ignore[arg-type]
        return self.made[-1]

    def __call__(self, *script: Callable[[FakeVcpu], Exit | None], **options: Any) -> VirtualMachine:
        self.script = iter(script)
        return VirtualMachine(memory=options.pop("memory", "16M"), **options)

    @property
    def vcpu(self) -> FakeVcpu:
        return self.made[-1].vcpu  # type: ignore[return-value]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Factory]:
    factory = Factory(monkeypatch)
    yield factory
    for made in factory.made:
        made.close()


@pytest.mark.parametrize(
    ("action", "reason", "status"),
    [
        (stops(PowerOff()), StopReason.POWEROFF, 0),
        (stops(DebugExit(7)), StopReason.DEBUG_EXIT, 7),
        (exits(Halt(False)), StopReason.HALTED, 125),
        (exits(Shutdown(14)), StopReason.TRIPLE_FAULT, 125),
        (exits(Unsupported("vmxoff", 0x1234)), StopReason.UNSUPPORTED, 3),
    ],
)
def test_every_end_has_its_reason_and_status_and_stays(build: Factory, action, reason, status) -> None:
    machine = build(exits(Kicked()), action)
    outcome = machine.run()
    assert (outcome.reason, outcome.status) == (reason, status)
    assert machine.run() is outcome
    assert machine.outcome is outcome
    assert build.vcpu.runs == 2


def test_a_crash_shows_the_state_and_the_code(build: Factory) -> None:
    def fault(vcpu: FakeVcpu) -> Exit:
        vcpu.state = CpuState(rip=0x1000, cr2=0xDEAD0000, cr0=0x11)
        vcpu.state.cs.base = 0x20000
        vcpu.state.cs.attributes = 0x409B
        vcpu.state.gpr[3] = 0xB0B
        vcpu.board.memory.write(0x21000, bytes.fromhex("0f0b f4"))
        return Shutdown(13)

    outcome = build(fault).run()
    assert "triple fault" in outcome.message and "0x1000" in outcome.message
    for part in ("rbx=0000000000000b0b", "cr2=00000000dead0000", "0f 0b f4", "ud2", "hlt"):
        assert part in outcome.dump


def test_unsupported_names_the_instruction_and_its_address(build: Factory) -> None:
    assert build(exits(Unsupported("vmxoff", 0x1234))).run().message == "unsupported: vmxoff at 0x1234"


def test_a_reboot_builds_the_machine_anew_and_counts_on(build: Factory) -> None:
    seen: list[object] = []
    machine = build(stops(Reset()), stops(Reset()), stops(PowerOff()))
    machine.subscribe(PortOut, seen.append)
    assert machine.run().reason is StopReason.POWEROFF
    assert [made.vcpu.closed for made in build.made] == [True, True, False]
    assert PortOut in build.vcpu.observed
    assert machine.statistics()["exits"] == {"kicked": 3}


def test_no_reboot_ends_at_the_first(build: Factory) -> None:
    outcome = build(stops(Reset()), no_reboot=True).run()
    assert (outcome.reason, outcome.status, len(build.made)) == (StopReason.RESET, 0, 1)


def test_timeout_ends_a_spinning_guest_and_it_can_run_on(build: Factory) -> None:
    machine = build()
    started = time.monotonic()
    outcome = machine.run(timeout=0.05)
    assert (outcome.reason, outcome.status) == (StopReason.TIMEOUT, 124)
    assert 0.05 <= time.monotonic() - started < 2
    build.script = build.vcpu.script = iter([stops(PowerOff())])
    assert machine.run().reason is StopReason.POWEROFF


def test_stop_from_another_thread(build: Factory) -> None:
    machine = build()
    threading.Timer(0.02, machine.stop).start()
    assert machine.run().reason is StopReason.STOPPED


def test_stop_before_a_run_ends_that_run_only(build: Factory) -> None:
    machine = build(stops(PowerOff()))
    machine.stop()
    assert machine.run().reason is StopReason.STOPPED
    assert machine.run().reason is StopReason.POWEROFF


def test_ctrl_c_is_raised_once_the_vcpu_is_back(build: Factory) -> None:
    back = []

    def interrupted(vcpu: FakeVcpu) -> None:
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        assert vcpu.kicked.wait(10)
        back.append(vcpu)

    machine = build(interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine.run()
    assert back == [build.vcpu]
    assert build.vcpu.runs <= 2, "the kick may come before the handler, which kicks again"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_idle_guest_waits_for_its_timer_and_no_longer(build: Factory) -> None:
    def sleep(vcpu: FakeVcpu) -> Exit:
        clock = vcpu.board.clock
        clock.at(clock.now() + 30_000_000, lambda: setattr(vcpu.board, "stop_reason", PowerOff()))
        return Halt(True)

    machine = build(sleep, exits(Kicked()))
    started = time.monotonic()
    assert machine.run(timeout=10).reason is StopReason.POWEROFF
    assert 0.03 <= time.monotonic() - started < 2


def test_what_is_typed_reaches_the_guest_in_order_even_with_little_room(build: Factory) -> None:
    build.room = 4

    def make_room(vcpu: FakeVcpu) -> None:
        vcpu.board.room = 100

    machine = build(exits(Kicked()), make_room)
    machine.write("abcdef")
    machine.write(b"gh")
    machine.run(timeout=0.1)
    assert build.made[0].board.typed == b"abcdefgh"  # type: ignore[attr-defined]


def test_output_goes_to_the_subscriber_and_is_kept(build: Factory) -> None:
    heard: list[bytes] = []
    machine = build(prints(b"one "), prints(b"two"), stops(PowerOff()), serial=heard.append)
    machine.run()
    assert heard == [b"one ", b"two"]
    assert machine.output == b"one two"


def test_an_error_in_a_callback_ends_the_run_and_is_raised(build: Factory) -> None:
    def broken(data: bytes) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(prints(b"x"), serial=broken).run()


def test_read_until_runs_the_guest_and_goes_on_where_it_stopped(build: Factory) -> None:
    machine = build(prints(b"boot\n# "), prints(b"ls\r\nfile\r\n# "), stops(PowerOff()))
    assert machine.read_until("# ", timeout=5) == b"boot\n# "
    assert build.vcpu.runs == 1
    assert machine.read_until("# ", timeout=5) == b"ls\r\nfile\r\n# "
    with pytest.raises(EOFError, match="powered off"):
        machine.read_until("# ", timeout=5)


def test_read_until_gives_up(build: Factory) -> None:
    with pytest.raises(TimeoutError):
        build(prints(b"boot")).read_until("login:", timeout=0.03)


def test_read_until_while_another_thread_runs_the_guest(build: Factory) -> None:
    def later(vcpu: FakeVcpu) -> None:
        time.sleep(0.03)
        vcpu.board.print(b"login:")

    machine = build(later)
    runner = threading.Thread(target=machine.run)
    runner.start()
    assert machine.read_until("login:", timeout=5) == b"login:"
    with pytest.raises(RuntimeError, match="already running"):
        machine.step()
    machine.stop()
    runner.join(5)
    assert not runner.is_alive()


def test_a_command_gives_its_output_alone_and_its_status(build: Factory) -> None:
    heard: list[bytes] = []
    machine = build(
        prints(b"kernel noise\n0123abcd:begin\nout"), prints(b"put0123abcd:end:7\n"), stops(PowerOff()),
        command=["sh", "-c", "exit 7"], serial=heard.append,
    )  # fmt: skip
    assert machine.run().status == 7
    assert machine.output == b"".join(heard) == b"output"


@pytest.mark.parametrize("reason", [PowerOff(), Reset()])
def test_a_guest_that_ends_before_its_command_crashed(build: Factory, reason: object) -> None:
    machine = build(prints(b"Kernel panic - not syncing\n"), stops(reason), command=["true"])
    outcome = machine.run()
    assert outcome.status == 125
    assert "before the command ended" in outcome.message and outcome.cut_short
    assert "Kernel panic" in outcome.dump
    assert len(build.made) == 1


def test_step_runs_instructions_one_by_one_until_the_end(build: Factory) -> None:
    machine = build()
    before = machine.registers.rip
    assert machine.step(3) == DebugStop(before + 3)
    build.vcpu.script = iter([stops(PowerOff())])
    machine.step(5)
    assert machine.outcome is not None and machine.outcome.reason is StopReason.POWEROFF
    assert machine.step() is None


def test_memory_is_read_and_written_and_the_vcpu_told(build: Factory) -> None:
    machine = build()
    machine.write_memory(0x5000, b"abc")
    assert machine.read_memory(0x4FFF, 5) == b"\0abc\0"
    assert machine.read_linear(0x5000, 3) == b"abc"
    assert build.vcpu.written == [(0x5000, 3)]
    with pytest.raises(GuestMemoryError):
        machine.write_memory(16 * MIB - 1, b"ab")


def test_registers_are_a_copy_to_assign_back(build: Factory) -> None:
    machine = build()
    state = machine.registers
    state.gpr[0] = 5
    machine.registers = state
    assert machine.registers.rax == 5


def test_a_closed_machine_does_nothing_more(build: Factory) -> None:
    with build() as machine:
        machine.close()
        machine.stop()
        machine.write("x")
        with pytest.raises(RuntimeError, match="closed"):
            machine.run()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory": "1M"}, ValueError),
        ({"technique": "magic"}, ValueError),
    ],
)
def test_bad_options_are_refused_before_anything_is_built(build: Factory, options, error) -> None:
    with pytest.raises(error):
        build(**options)
    assert build.made == []


def test_a_negative_timeout_is_refused(build: Factory) -> None:
    with pytest.raises(ValueError, match="negative"):
        build().run(timeout=-1)


# -- kept translations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [stops(PowerOff()), exits(Halt(False)), exits(Unsupported("x", 0))])
def test_translations_are_written_down_at_the_end(build: Factory, end: Callable[[FakeVcpu], Exit | None]) -> None:
    with build(end) as machine:
        machine.run()
        assert machine.statistics()["kept translations"] == {"from earlier runs": "12 blocks"}
    assert [(keeper.saved, keeper.closed) for keeper in build.keepers] == [(1, True)]


def test_translations_are_written_down_after_a_timeout_and_a_stop(build: Factory) -> None:
    with build() as machine:
        assert machine.run(0.01).reason is StopReason.TIMEOUT
        machine.stop()
        assert machine.run().reason is StopReason.STOPPED
    assert build.keepers[0].saved == 1


def test_translations_are_written_down_before_a_reboot(build: Factory) -> None:
    with build(stops(Reset()), stops(PowerOff())) as machine:
        machine.run()
    assert [keeper.saved for keeper in build.keepers] == [1, 1]


def test_translations_are_not_written_down_after_an_error_of_ours(build: Factory) -> None:
    def breaks(vcpu: FakeVcpu) -> None:
        raise ZeroDivisionError

    with build(breaks) as machine, pytest.raises(ZeroDivisionError):
        machine.run()
    assert [(keeper.saved, keeper.closed) for keeper in build.keepers] == [(0, True)]
