"""The subcommands of `trivisor`."""

from __future__ import annotations

import click

from trivisor import __version__
from trivisor.cli.main import STATUS_HOST
from trivisor.cli.run import run


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
