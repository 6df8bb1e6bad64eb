"""The command `trivisor`: every error as one line on stderr, and how the process treats its garbage and its threads."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

_SWITCH_SECONDS = 0.0005
"""After which a thread that wants the GIL gets it from one that computes: those that read and unpack want it often."""
STATUS_BAD_INPUT = 2
STATUS_HOST = 1
STATUS_UNSUPPORTED = 3
STATUS_INTERNAL = 70
STATUS_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default the process's own, and return its exit status; no exception leaves it."""
    # The engine keeps hundreds of thousands of small objects that live as long as the guest and form no cycles:
    # looking through them again and again for garbage would cost a tenth of the boot.  So does importing.
    gc.set_threshold(100_000, 50, 1_000)
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        return _run(arguments)
    finally:
        if arguments is None:
            gc.freeze()  # the interpreter need not look through it all once more on its way out


def _run(arguments: Sequence[str] | None) -> int:
    try:
        from trivisor.cli.commands import cli

        status = cli.main(arguments, prog_name="trivisor", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except Exception as error:
        if os.environ.get("TRIVISOR_DEBUG"):
            raise
        return _failed(error)
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED


def _failed(error: Exception) -> int:
    """Say in one line what went wrong; the exit status for it."""
    import click

    from trivisor.devices.user_network import NetworkUnavailable
    from trivisor.guests.debian import GuestUnavailable
    from trivisor.monitor import TechniqueUnavailable

    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return STATUS_BAD_INPUT
    if isinstance(error, click.Abort):
        return STATUS_INTERRUPTED
    if isinstance(error, click.ClickException):
        status, text = error.exit_code, error.format_message()
    elif isinstance(error, TechniqueUnavailable):
        status, text = STATUS_UNSUPPORTED, str(error)
    elif isinstance(error, GuestUnavailable | NetworkUnavailable):
        status, text = STATUS_HOST, str(error)
    elif isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        status, text = STATUS_BAD_INPUT, f"{name}{error.strerror}"
    elif isinstance(error, OSError | ValueError):
        status, text = STATUS_BAD_INPUT, str(error)
    else:
        status = STATUS_INTERNAL
        text = f"internal error, {type(error).__name__}: {error} (TRIVISOR_DEBUG=1 shows where)"
    print(f"trivisor: {' '.join(text.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
