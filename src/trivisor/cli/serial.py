"""Where the guest's serial console goes on the host: the terminal, nowhere, a file or a pseudo-terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Protocol

from trivisor.cli.pump import Reader, Writer
from trivisor.cli.terminal import HELP, Action, EscapeKeys, raw_mode

_ABANDON_SECONDS = 1.0


class Machine(Protocol):
    """What a serial endpoint needs of the machine it is connected to."""

    @property
    def wanted(self) -> bool: ...

    @property
    def input_room(self) -> bool: ...

    def write(self, data: bytes) -> None: ...

    def stop(self) -> None: ...


class Serial:
    """An endpoint that swallows everything (`--serial null`), and what all endpoints have in common."""

    interactive = False
    """Whether a person sits at the other end."""

    def __init__(self) -> None:
        self.machine: Machine | None = None
        self._writer: Writer | None = None

    def output(self, data: bytes) -> None:
        """The guest printed `data`."""
        if self._writer is not None:
            self._writer.put(data)

    @property
    def error(self) -> OSError | None:
        """Why the output could not be written."""
        return self._writer.error if self._writer is not None else None

    @contextlib.contextmanager
    def connected(self, machine: Machine) -> Iterator[None]:
        """While the block runs, what is typed goes to `machine`."""
        self.machine = machine
        yield

    def finish(self, *, prompt: bool) -> None:
        """Write out what is pending; `prompt` for a run cut short, which waits for no stuck reader."""
        if self._writer is not None:
            self._writer.close(_ABANDON_SECONDS if prompt else None)

    def write_to(self, descriptor: int) -> None:
        """Have output go to `descriptor`."""
        self._writer = Writer(descriptor, self._hurry, self._failed)

    def _hurry(self) -> bool:
        return self.machine is not None and self.machine.wanted

    def _failed(self) -> None:
        if self.machine is not None:
            self.machine.stop()

    def type(self, data: bytes) -> None:
        """Send what was typed to the guest."""
        if self.machine is not None and data:
            self.machine.write(data)

    def has_room(self) -> bool:
        """Whether the guest can take more."""
        return self.machine is not None and self.machine.input_room


class StdioSerial(Serial):
    """The terminal, or stdin and stdout wherever they lead."""

    def __init__(self, *, command: bool) -> None:
        super().__init__()
        self._command = command
        self._on_terminal = not command and sys.stdin is not None and os.isatty(0)
        self.interactive = self._on_terminal and os.isatty(1)
        self._keys = EscapeKeys()
        self.write_to(1)

    @contextlib.contextmanager
    def connected(self, machine: Machine) -> Iterator[None]:
        self.machine = machine
        if self._command or sys.stdin is None:
            yield
            return
        with raw_mode(0):
            reader = Reader(0, self._typed if self._on_terminal else self.type, self.has_room)
            try:
                yield
            finally:
                reader.close()

    def _typed(self, data: bytes) -> None:
        for_guest, actions = self._keys.feed(data)
        self.type(for_guest)
        for action in actions:
            if action is Action.HELP:
                os.write(2, HELP)
            elif self.machine is not None:
                self.machine.stop()

    def has_room(self) -> bool:
        # A terminal is read always, for the escape key must work when the guest does not read.
        return self._on_terminal or super().has_room()


class PtySerial(Serial):
    """A pseudo-terminal whose name is printed; output that nobody takes is lost, as on a real line."""

    interactive = True

    def __init__(self) -> None:
        import pty
        import tty

        super().__init__()
        self._master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        print(f"trivisor: serial console on {os.ttyname(self._slave)}", file=sys.stderr, flush=True)

    def output(self, data: bytes) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._master, data)

    @contextlib.contextmanager
    def connected(self, machine: Machine) -> Iterator[None]:
        self.machine = machine
        reader = Reader(self._master, self.type, self.has_room)
        try:
            yield
        finally:
            reader.close()

    def close(self) -> None:
        """Give the pseudo-terminal back."""
        os.close(self._master)
        os.close(self._slave)


@contextlib.contextmanager
def open_serial(where: str, *, command: bool) -> Iterator[Serial]:
    """The endpoint for `--serial WHERE`; raises OSError for a file that cannot be written."""
    if where == "stdio":
        serial = StdioSerial(command=command)
        try:
            yield serial
        finally:
            serial.finish(prompt=True)
    elif where == "pty":
        with contextlib.closing(PtySerial()) as pseudo_terminal:
            yield pseudo_terminal
    elif where == "null":
        yield Serial()
    else:
        with open(where.removeprefix("file:"), "wb", buffering=0) as file:
            serial_file = Serial()
            serial_file.write_to(file.fileno())
            try:
                yield serial_file
            finally:
                serial_file.finish(prompt=True)
