"""Which of the things that happen to a machine end its run, and as what."""

from __future__ import annotations

from trivisor.guests.command import CommandOutput
from trivisor.machine.exits import Exit, Halt, Shutdown, Unsupported
from trivisor.machine.memory import GuestMemory
from trivisor.machine.stop import Crash, DebugExit, PowerOff, Reset
from trivisor.machine.vcpu import Vcpu
from trivisor.monitor.outcome import STATUS_CRASH, Outcome, StopReason


def by_device(stop_reason: object) -> Outcome | None:
    """The end that the board asks for (`Surroundings.stop_reason`)."""
    match stop_reason:
        case None:
            return None
        case PowerOff():
            return Outcome(StopReason.POWEROFF, "the guest powered off")
        case Reset():
            return Outcome(StopReason.RESET, "the guest rebooted")
        case DebugExit(status=status):
            message = f"the guest ended the run through the debug-exit port, status {status}"
            return Outcome(StopReason.DEBUG_EXIT, message, status)
        case Crash(what=what):
            return Outcome(StopReason.CRASH, what)
        case _:
            raise AssertionError(f"unknown stop reason {stop_reason!r}")


def by_processor(exit_: Exit, vcpu: Vcpu, memory: GuestMemory) -> Outcome | None:
    """The end that the processor came to, if `exit_` is one."""
    match exit_:
        case Halt(interrupts_enabled=False):
            return _crash(StopReason.HALTED, "the guest halted with interrupts off", vcpu, memory)
        case Shutdown(vector=vector):
            message = f"triple fault (exception {vector} while delivering a double fault)"
            return _crash(StopReason.TRIPLE_FAULT, message, vcpu, memory)
        case Unsupported(what=what, rip=rip):
            return Outcome(StopReason.UNSUPPORTED, f"unsupported: {what} at {rip:#x}")
        case _:
            return None


def _crash(reason: StopReason, what: str, vcpu: Vcpu, memory: GuestMemory) -> Outcome:
    from trivisor.monitor.statedump import dump_state

    state = vcpu.state
    return Outcome(reason, f"{what} at {state.rip:#x}", dump=dump_state(state, memory, vcpu.last_block()))


def with_command(ended: Outcome, command: CommandOutput) -> Outcome:
    """`ended` with the command's status; an orderly end before the command's is none."""
    command.finish()
    if command.status is not None:
        return ended._replace(guest_status=command.status)
    if ended.reason not in (StopReason.POWEROFF, StopReason.RESET):
        return ended
    return ended._replace(
        guest_status=STATUS_CRASH,
        message=f"{ended.message} before the command ended",
        cut_short=True,
        dump="" if command.started else command.preamble.decode(errors="replace"),
    )
