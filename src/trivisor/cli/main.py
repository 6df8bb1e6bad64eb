"""The command `trivisor`: its subcommands, and every error as one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from trivisor import __version__
from trivisor.cli.run import run

STATUS_BAD_INPUT = 2
STATUS_HOST = 1
STATUS_UNSUPPORTED = 3
STATUS_INTERNAL = 70
STATUS_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="trivisor")
def cli() -> None:
    """A virtual machine monitor in Python: boots real operating systems with no root and no /dev/kvm."""


@cli.command()
def doctor() -> int:
    """Say which techniques this machine can use, what they found, and how to mend the rest.

    The exit status is 0 when at least one of them works, else 1.
    """
    from trivisor.cli.doctor import print_examinations
    from trivisor.monitor.doctor import examine

    examinations = examine()
    print_examinations(examinations)
    return 0 if any(one.works for one in examinations) else STATUS_HOST


cli.add_command(run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; no exception leaves it."""
    try:
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
