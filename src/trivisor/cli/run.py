"""`trivisor run`: its options, checked and made into a `Request`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import click

EPILOG = """\b
Exit status:
  0    the guest powered off, or rebooted under --no-reboot, or was ended with Ctrl-A x
  N    with COMMAND: the command's own status (128+n after signal n)
  N    a multiboot kernel wrote V to port 0xf4: N is (V << 1 | 1) & 0xff
  1    the default guest cannot be fetched, --net lacks its library, or the output cannot be written
  2    bad input: options, or an image that cannot be loaded
  3    the guest or the options ask for what this version does not have
  124  --timeout passed
  125  the guest crashed: triple fault, halted with interrupts off, or ended before COMMAND did
  129  SIGHUP; 130 SIGINT (Ctrl-C); 141 stdout was closed; 143 SIGTERM
"""
_COMMAND_KEY = "trivisor.command"


class Request(NamedTuple):
    """What the command line asks for."""

    kernel: Path | None = None
    technique: str = "auto"
    engine: str = "auto"
    initrd: Path | None = None
    append: str | None = None
    modules: tuple[tuple[Path, str], ...] = ()
    firmware: Path | None = None
    memory: str = "512M"
    serial: str = "stdio"
    timeout: float | None = None
    no_reboot: bool = False
    no_keep: bool = False
    stats: bool = False
    stats_json: Path | None = None
    perf_map: bool = False
    verbose: bool = False
    devices: tuple[str, ...] = ()
    cpu: str = ""
    disks: tuple[str, ...] = ()
    snapshot: Path | None = None
    restore: Path | None = None
    network: str | None = None
    command: tuple[str, ...] | None = None


class _RunCommand(click.Command):
    """Keeps what follows `--` away from click, which would take its first word for IMAGE."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, command = args[:at], args[at + 1 :]
            if not command:
                raise click.UsageError("no command after --", ctx)
            ctx.meta[_COMMAND_KEY] = tuple(command)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND ...]"]


def _modules(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> Any:
    """FILE or FILE,CMDLINE, as QEMU's -initrd takes multiboot modules."""
    pairs = (value.partition(",") for value in values)
    return tuple((Path(name), command_line) for name, _, command_line in pairs)


def _memory(_context: click.Context, _option: click.Parameter, value: str) -> str:
    from trivisor.monitor.sizes import parse_memory

    try:
        parse_memory(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


def _serial(_context: click.Context, _option: click.Parameter, value: str) -> str:
    if value in ("stdio", "null", "pty") or (value.startswith("file:") and value != "file:"):
        return value
    raise click.BadParameter(f"{value!r} is none of stdio, null, pty and file:FILE")


def _timeout(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not value > 0:  # so that "nan" is refused too
        raise click.BadParameter(f"{value:g} is not more than 0")
    return value


_FILE = click.Path(path_type=Path)


@click.command(cls=_RunCommand, epilog=EPILOG)
@click.argument("image", required=False, type=_FILE)
@click.option("--kernel", type=_FILE, help="The same as IMAGE.")
@click.option(
    "--technique",
    type=click.Choice(["auto", "translation", "hardware", "paravirt"]),
    default="auto",
    show_default=True,
    help="How to virtualise; see `trivisor doctor`.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "translation", "direct"]),
    default="auto",
    show_default=True,
    help="What runs a paravirtual guest: binary translation, or the host's processor through /dev/kvm.",
)
@click.option("--initrd", type=_FILE, help="Initial RAM disk.")
@click.option("--append", metavar="CMDLINE", help="Kernel command line, or what to add to the default one.")
@click.option(
    "--module", "modules", multiple=True, metavar="FILE[,CMDLINE]", callback=_modules,
    help="Multiboot module; may be repeated.",
)  # fmt: skip
@click.option(
    "--firmware", type=_FILE,
    help="Flat firmware image, started at the reset vector; nothing else is booted.",
)  # fmt: skip
@click.option(
    "--memory", default="512M", show_default=True, metavar="SIZE", callback=_memory,
    help="RAM, 16M to 16G; a plain number is MiB.",
)  # fmt: skip
@click.option(
    "--serial", default="stdio", show_default=True, metavar="stdio|null|file:FILE|pty", callback=_serial,
    help="Where the guest's serial console goes.",
)  # fmt: skip
@click.option(
    "--device", "devices", multiple=True, type=click.Choice(["pc-testdev"]),
    help="A device that is not always there: the one that kvm-unit-tests drive.",
)  # fmt: skip
@click.option("--cpu", default="", metavar="+NAME,-NAME...", help="Switch features of the guest's processor.")
@click.option(
    "--disk", "disks", multiple=True, metavar="FILE[,readonly]",
    help="A raw disk, /dev/xvda and so on in the guest (paravirt); may be repeated.",
)  # fmt: skip
@click.option(
    "--net", "network", metavar="user[,forward=HOSTPORT:GUESTPORT...]",
    help="A network card (paravirt) on a user-mode network; TCP ports of the host's loopback are forwarded in.",
)  # fmt: skip
@click.option(
    "--timeout", type=float, metavar="SECONDS", callback=_timeout,
    help="End the run after that much host time.",
)  # fmt: skip
@click.option(
    "--snapshot", type=_FILE, metavar="FILE",
    help="Write the machine to FILE: when the default guest is up, and end; of any other guest at SIGUSR2, and go on.",
)  # fmt: skip
@click.option("--restore", type=_FILE, metavar="FILE", help="Go on with the machine in FILE instead of booting one.")
@click.option("--no-reboot", is_flag=True, help="End when the guest reboots, instead of booting it again.")
@click.option("--no-keep", is_flag=True, help="Use and leave no translations in the cache directory.")
@click.option("--stats", is_flag=True, help="Print exits and where the time went, on stderr at the end.")
@click.option("--perf-map", is_flag=True, help="Name translated code in /tmp/perf-PID.map, for Linux's perf.")
@click.option("--stats-json", type=_FILE, metavar="FILE", help="Write the same as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr what runs and how it ended.")
def run(image: Path | None, kernel: Path | None, **options: Any) -> int:
    """Boot IMAGE, or the default Debian guest without one, and be its serial console.

    IMAGE is a Linux bzImage or vmlinux, a multiboot ELF kernel or one for Xen
    PV.  A Linux kernel without --initrd gets the default user space: busybox
    and a shell that powers the machine off when it ends.

    With COMMAND, run just that in the default user space: its output is all
    that appears on stdout, and its exit status is ours.

    On a terminal, Ctrl-A x ends the run and Ctrl-A h helps.
    """
    if image is not None and kernel is not None:
        raise click.UsageError("IMAGE and --kernel are the same thing: give one of them")
    if options["restore"] is not None:
        _refuse_beside_restore(image or kernel)
    from trivisor.cli.session import run_session

    command = click.get_current_context().meta.get(_COMMAND_KEY)
    if command is not None and options["snapshot"] is not None:
        raise click.UsageError("a machine that runs a command cannot be put into a snapshot")
    return run_session(Request(kernel=image or kernel, command=command, **options))


_IN_THE_SNAPSHOT = (
    "initrd", "append", "modules", "firmware", "memory", "devices", "cpu", "perf_map",
)  # fmt: skip
"""Options that the file of `--restore` has already decided."""


def _refuse_beside_restore(image: Path | None) -> None:
    """UsageError for options that make no sense with a machine that is there."""
    context = click.get_current_context()
    given = ["IMAGE"] if image is not None else []
    for parameter in context.command.params:
        default = context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.DEFAULT
        if parameter.name in _IN_THE_SNAPSHOT and not default:
            given.append(parameter.opts[0])
    if given:
        raise click.UsageError(f"--restore goes on with a machine as it is: leave out {', '.join(given)}")
