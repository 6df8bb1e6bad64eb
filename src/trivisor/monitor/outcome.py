"""How a run of a machine ended."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class StopReason(StrEnum):
    """Why `VirtualMachine.run` came back."""

    POWEROFF = "poweroff"
    RESET = "reset"
    DEBUG_EXIT = "debug-exit"
    HALTED = "halted"
    TRIPLE_FAULT = "triple-fault"
    CRASH = "crash"
    UNSUPPORTED = "unsupported"
    TIMEOUT = "timeout"
    STOPPED = "stopped"
    WAITING = "waiting"


STATUS_UNSUPPORTED = 3
STATUS_TIMEOUT = 124
STATUS_CRASH = 125

_STATUS = {
    StopReason.HALTED: STATUS_CRASH,
    StopReason.CRASH: STATUS_CRASH,
    StopReason.TRIPLE_FAULT: STATUS_CRASH,
    StopReason.UNSUPPORTED: STATUS_UNSUPPORTED,
    StopReason.TIMEOUT: STATUS_TIMEOUT,
}

_RESUMABLE = frozenset({StopReason.TIMEOUT, StopReason.STOPPED, StopReason.WAITING})


class Outcome(NamedTuple):
    """The end of a run: `reason`, one line in words, and for crashes a dump of the processor's state."""

    reason: StopReason
    message: str
    guest_status: int | None = None
    """The exit status that the guest gave: its command's, or what it wrote to the debug-exit port."""
    dump: str = ""
    cut_short: bool = False
    """The guest ended in order, but before the command that it was to run."""

    @property
    def status(self) -> int:
        """The exit status that stands for it: the guest's own if it gave one, 0 for an orderly end."""
        if self.guest_status is not None and not self.resumable:
            return self.guest_status
        return _STATUS.get(self.reason, 0)

    @property
    def resumable(self) -> bool:
        """Whether the machine is still on, so that another run goes on where this one left."""
        return self.reason in _RESUMABLE
