"""The default user space: busybox and an /init of our own, in a few dozen lines of shell.

Each process that the guest starts costs time under translation, so /init stays
in one shell: builtins and redirections where they do, `exec` for the last step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from trivisor.guests import cpio
from trivisor.guests.attached import NOTHING_ATTACHED, Attached
from trivisor.guests.command import begin_mark, end_mark, ready_mark


def console_command_line(console: str = "ttyS0", *, crossings_are_dear: bool = False) -> str:
    """Kernel command line for a run whose console the user sees; a panic ends the run.

    On one processor Linux takes all LOCK prefixes out of its code, each by itself: four hypercalls, nine thousand
    times.  Where `crossings_are_dear` they stay.
    """
    return f"console={console} panic=-1" + (" noreplace-smp" if crossings_are_dear else "")


def command_command_line(console: str = "ttyS0", *, crossings_are_dear: bool = False) -> str:
    """Kernel command line for a run of one command: the kernel stays silent unless it panics."""
    return f"{console_command_line(console, crossings_are_dear=crossings_are_dear)} quiet loglevel=0"


_ESSENTIAL_APPLETS = ("sh", "ash", "mount", "stty", "setsid", "poweroff", "cat", "ls", "echo", "uname", "env")
_APPLET_TABLE = re.compile(rb"\0((?:[!-~]+\0){32,})\0")

# The tty is closed before power-off, because the last close waits until the
# UART has sent everything; power-off itself waits for nothing.
_POWER_OFF = "exec poweroff -n -f <&- >&- 2>&-"

_PROLOGUE = """\
#!/bin/sh
export PATH=/bin HOME=/root TERM=linux
mount -a
read -r up idle </proc/uptime
echo "trivisor: userspace after $up s"
echo trivisor >/proc/sys/kernel/hostname
cd /root
"""

_FSTAB = b"""\
proc /proc proc defaults 0 0
sys /sys sysfs defaults 0 0
dev /dev devtmpfs defaults 0 0
"""

_SHELL = """\
echo
echo "A shell on busybox; \\"exit\\" powers the machine off."
setsid -c sh </dev/{console} >/dev/{console} 2>&1
{power_off}
"""

_REPORT = """\
cd /proc/sys/kernel
read -r name <ostype; read -r release <osrelease; read -r version <version; read -r machine <arch
echo "$name trivisor $release $version $machine GNU/Linux"
model=unknown; processors=0
while IFS=' \t:' read -r key word rest; do
    case $key in
        processor) processors=$((processors + 1)) ;;
        model) case $word in name) model=${{rest#: }} ;; esac ;;
    esac
done </proc/cpuinfo
echo "processor: $processors x $model"
while read -r key amount unit; do
    case $key in
        MemTotal:) total=$amount ;;
        MemAvailable:) available=$amount; break ;;
    esac
done </proc/meminfo
echo "memory: $((total / 1024)) MiB, $((available / 1024)) MiB of it available"
read -r up idle </proc/uptime
echo "uptime: $up s"
{power_off}
"""

# The marker stands here in halves: a command that prints this file must not print a mark.
# The shell's own words on a killed command ("Segmentation fault") are not the command's output.
_MARKER = """\
first={first} second={second}
"""

_RUN = """\
echo "$first$second{begin}"
exec 3>&2 2>/dev/null
(exec -- "$@") </dev/null 2>&3 3>&-
echo "$first$second{end}$?"
{power_off}
"""


# What is read is a line of shell that calls one of the two functions: there is little to type, at 115,200 baud.
_WAIT = """\
run() {{
{run}}}
shell() {{
echo 7 >/proc/sys/kernel/printk
stty sane "$@" </dev/{console}
{shell}}}
echo 1 >/proc/sys/kernel/printk
stty 115200 raw -echo </dev/{console}
{marker}echo "$first$second{waits}"
IFS= read -r line </dev/{console}
eval "$line"
"""


def default_initramfs(
    busybox: bytes,
    command: Sequence[str] | None = None,
    *,
    marker: bytes = b"",
    interactive: bool = False,
    terminal_size: tuple[int, int] | None = None,
    console: str = "ttyS0",
    attached: Attached = NOTHING_ATTACHED,
    waits_as: bytes = b"",
) -> bytes:
    """Return a cpio archive whose /init does what one run is for, then powers the machine off.

    With `command`, /init runs that argument list and encloses its output in
    marks made from `marker` (see `trivisor.guests.command`); boot it with
    `command_command_line`.  Without, `interactive` gives a shell on the `console` device, as
    large as `terminal_size` (rows, columns) says; with a word `waits_as` it waits
    to be told what to run (`trivisor.guests.waiting`); otherwise the guest reports
    on itself.  What is `attached` is made ready first.  Raises ValueError for an
    argument that no process can be given.
    """
    if command is not None:
        action = _command_script(command, marker, console)
    elif waits_as:
        action = _wait_script(waits_as, console)
    elif interactive:
        action = _shell_script(terminal_size, console)
    else:
        action = _REPORT.format(power_off=_POWER_OFF).encode()
    directories = ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "var")
    entries = [cpio.directory(name) for name in directories]
    entries += [
        cpio.character_device("dev/console", 5, 1),
        cpio.symlink("sbin", "bin"),
        cpio.symlink("usr/bin", "../bin"),
        cpio.symlink("usr/sbin", "../bin"),
        cpio.regular("etc/fstab", _FSTAB),
        cpio.regular("etc/passwd", b"root::0:0:root:/root:/bin/sh\n"),
        cpio.regular("etc/group", b"root:x:0:\n"),
        cpio.regular("bin/busybox", busybox, 0o755),
        cpio.regular("init", _PROLOGUE.encode() + attached.script() + action, 0o755),
        *attached.entries(),
    ]
    entries += [cpio.symlink(f"bin/{name}", "busybox") for name in applets(busybox) if name != "busybox"]
    return cpio.archive(entries)


def applets(busybox: bytes) -> list[str]:
    """Return the names that a busybox binary answers to.

    They stand in the binary as one sorted table of strings (busybox,
    include/applet_tables.h), which begins with "[" and ends in an empty
    string.  A few that everyone needs come back where there is no such table.
    """
    start = busybox.find(b"\0[\0[[\0")
    table = _APPLET_TABLE.match(busybox, start) if start >= 0 else None
    if table is None:
        return list(_ESSENTIAL_APPLETS)
    return [name.decode() for name in table[1].split(b"\0")[:-1] if b"/" not in name]


def _shell_script(terminal_size: tuple[int, int] | None, console: str) -> bytes:
    size = ""
    if terminal_size is not None:
        rows, columns = terminal_size
        size = f"stty rows {int(rows)} cols {int(columns)} </dev/{console}\n"
    return (size + _SHELL.format(console=console, power_off=_POWER_OFF)).encode()


def _command_script(command: Sequence[str], marker: bytes, console: str) -> bytes:
    check_command(command)
    return os.fsencode(
        f"stty raw -echo </dev/{console}\n{_marker(marker)}set -- {' '.join(map(_quote, command))}\n{_run_script()}"
    )


def _wait_script(word: bytes, console: str) -> bytes:
    shell = _SHELL.format(console=console, power_off=_POWER_OFF)
    waits = ready_mark(b"").decode().rstrip()
    script = _WAIT.format(run=_run_script(), shell=shell, marker=_marker(word), waits=waits, console=console)
    return script.encode()


def check_command(command: Sequence[str]) -> None:
    """Raise ValueError for an argument list that no process can be given."""
    if not command:
        raise ValueError("the command is empty")
    if any("\0" in argument for argument in command):
        raise ValueError("an argument of a command cannot hold a NUL character")


def _marker(word: bytes) -> str:
    if not word.isalnum() or len(word) < 2:
        raise ValueError("the marker must be letters and digits")
    text = word.decode()
    return _MARKER.format(first=text[: len(text) // 2], second=text[len(text) // 2 :])


def _run_script() -> str:
    begin, end = begin_mark(b"").decode().rstrip("\n"), end_mark(b"", 0).decode().rstrip("0\n")
    return _RUN.format(begin=begin, end=end, power_off=_POWER_OFF)


def _quote(argument: str) -> str:
    """Quote for the shell: between single quotes every byte stands for itself but the single quote."""
    return "'" + argument.replace("'", "'\\''") + "'"
