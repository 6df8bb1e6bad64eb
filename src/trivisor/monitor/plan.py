"""What a machine boots: the files and command line that its owner gave, completed by the default guest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trivisor.boot.image import Image, ImageKind
from trivisor.boot.xen_notes import guest_os
from trivisor.monitor.attachments import Disk, DiskName, Network, parse_disks, parse_network
from trivisor.paravirt.xen.toolstack import DISK_NAMES
from trivisor.x86.cpuid import USUAL_CPU, CpuChoice, parse_choice

if TYPE_CHECKING:
    from trivisor.guests.debian import DefaultGuest

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the done part of it (0 to 1, or None)."""


class BadPlan(ValueError):
    """What was asked for does not go together; the message is one line for the user."""


_MODULES = "modules are for multiboot kernels"

ENGINES = ("auto", "translation", "direct")
"""What can run a paravirtual guest: translation, or the host's processor in ring 3 of a KVM machine."""

DEVICES = ("pc-testdev",)
"""Devices that the board has only when they are asked for."""


class Hardware(NamedTuple):
    """How the machine differs from the usual one."""

    devices: frozenset[str] = frozenset()
    """Out of `DEVICES`."""
    cpu: CpuChoice = USUAL_CPU
    disks: tuple[Disk, ...] = ()
    network: Network | None = None

    @property
    def xen_device(self) -> str:
        """What of it only a Xen guest can have, as an option; empty for nothing."""
        return "--disk" if self.disks else "--net" if self.network is not None else ""


def make_hardware(
    devices: Sequence[str], cpu: str, disks: Sequence[DiskName] = (), network: Network | str | None = None
) -> Hardware:
    """`cpu` is like "+umip,-x2apic".  Raises `BadPlan` for what is not known."""
    if len(disks) > len(DISK_NAMES):
        raise BadPlan(f"{len(disks)} disks are too many: {len(DISK_NAMES)} at most")
    if unknown := set(devices) - set(DEVICES):
        raise BadPlan(f"no device {', '.join(sorted(unknown))}: there is {', '.join(DEVICES)}")
    try:
        return Hardware(frozenset(devices), parse_choice(cpu), parse_disks(disks), parse_network(network))
    except ValueError as error:
        raise BadPlan(str(error)) from None


def checked_engine(engine: str) -> str:
    """`engine`, if there is one of that name; ValueError."""
    if engine not in ENGINES:
        raise BadPlan(f"engine {engine!r} is none of {', '.join(ENGINES)}")
    return engine


class Wish(NamedTuple):
    """What the owner of a machine asked for."""

    kernel: Path | None = None
    firmware: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    modules: tuple[tuple[Path, str], ...] = ()
    command: Sequence[str] | None = None
    interactive: bool = True
    terminal_size: tuple[int, int] | None = None
    console: str = "ttyS0"
    """The guest's name for the device that its console is on."""
    progress: Progress = lambda what, part: None
    hardware: Hardware = Hardware()
    keep: bool = True
    waiting: bool = False
    """The default user space waits to be told what to run."""
    engine: str = "auto"


class BootPlan(NamedTuple):
    """What `trivisor.boot` is given, at every boot of the machine."""

    kernel: Path
    """The image: a kernel, or firmware."""
    initrd: Path | bytes | None
    command_line: str
    modules: tuple[tuple[Path, str], ...]
    marker: bytes = b""
    """The word that encloses a command's output on the console; empty when there is no command."""
    waits_as: bytes = b""
    """The word of the guest that waits (`guests.waiting`); empty when it does not."""
    hardware: Hardware = Hardware()
    is_firmware: bool = False
    keep: bool = False
    """Keep translations in the user's cache for the next run of the kernel."""
    engine: str = "auto"
    """Out of `ENGINES`: what runs a paravirtual guest."""
    digest: bytes = b""
    """The kernel file's SHA-256, if that is known without reading it."""


def make_plan(wish: Wish) -> BootPlan:
    """Complete `wish`.

    A Linux kernel without an initrd gets the default user space, and whatever
    is missing is fetched.  Raises `BadPlan`, `trivisor.boot.image.ImageError` for
    a kernel that is none, and `trivisor.guests.debian.GuestUnavailable`.
    """
    return _boot(wish)._replace(hardware=wish.hardware, keep=wish.keep, engine=wish.engine)


def _boot(wish: Wish) -> BootPlan:
    if wish.command is not None and not wish.command:
        raise BadPlan("the command is empty")
    if wish.waiting and (wish.command is not None or wish.firmware or wish.initrd or wish.modules):
        raise BadPlan("the default user space alone can wait for what to run: leave out command and initrd")
    if wish.firmware is not None:
        return _firmware_plan(wish.firmware, wish)
    if wish.kernel is not None and is_other_system(wish.kernel):
        return _other_system_plan(wish.kernel, wish)
    if wish.modules:
        raise BadPlan(_MODULES)
    if wish.initrd is None:
        return _default_user_space(wish)
    if wish.command is not None:
        raise BadPlan("a command runs in the default user space: leave out the initrd")
    if wish.kernel is not None:
        return BootPlan(wish.kernel, wish.initrd, wish.append or "", ())
    from trivisor.guests.initramfs import console_command_line

    command_line = _joined(console_command_line(wish.console, crossings_are_dear=_is_direct(wish)), wish.append)
    return BootPlan(_default_guest(wish).kernel, wish.initrd, command_line, ())


def _firmware_plan(firmware: Path, wish: Wish) -> BootPlan:
    others = (wish.kernel, wish.initrd, wish.append, wish.command)
    if wish.modules or any(other is not None for other in others):
        raise BadPlan("firmware is all that a machine boots: leave out kernel, initrd, modules and command")
    return BootPlan(firmware, None, "", (), is_firmware=True)


def _is_multiboot(kernel: Path) -> bool:
    with Image(kernel) as image:
        return image.kind is ImageKind.MULTIBOOT


def is_other_system(kernel: Path) -> bool:
    """Whether an image is of no Linux: multiboot, or Xen notes that say so; raises ImageError or OSError."""
    with Image(kernel) as image:
        return image.kind is ImageKind.MULTIBOOT or guest_os(image) not in ("", "linux")


def _other_system_plan(kernel: Path, wish: Wish) -> BootPlan:
    """It gets nothing of ours."""
    if wish.command is not None or wish.waiting:
        raise BadPlan("to run a command, or to wait for one, takes a Linux guest")
    if wish.modules and not _is_multiboot(kernel):
        raise BadPlan(_MODULES)
    return BootPlan(kernel, wish.initrd, wish.append or "", wish.modules)


def _default_user_space(wish: Wish) -> BootPlan:
    from trivisor.guests.attached import Attached
    from trivisor.guests.command import new_marker
    from trivisor.guests.initramfs import command_command_line, console_command_line, default_initramfs

    guest = _default_guest(wish)
    # Another kernel than the default guest's has what it needs built in: its modules would not fit.
    attached = Attached(
        guest.drivers if wish.kernel is None and wish.hardware.xen_device else (),
        DISK_NAMES[: len(wish.hardware.disks)],
        wish.hardware.network is not None,
    )
    marker = b"" if wish.command is None else new_marker()
    waits_as = new_marker() if wish.waiting else b""
    initramfs = default_initramfs(
        guest.busybox.read_bytes(),
        wish.command,
        marker=marker,
        interactive=wish.interactive,
        terminal_size=wish.terminal_size,
        console=wish.console,
        attached=attached,
        waits_as=waits_as,
    )
    compose = console_command_line if wish.command is None else command_command_line
    command_line = compose(wish.console, crossings_are_dear=_is_direct(wish))
    return BootPlan(wish.kernel or guest.kernel, initramfs, _joined(command_line, wish.append), (), marker, waits_as)


def _is_direct(wish: Wish) -> bool:
    return wish.engine == "direct"


def _joined(command_line: str, append: str | None) -> str:
    return f"{command_line} {append}" if append else command_line


def _default_guest(wish: Wish) -> DefaultGuest:
    from trivisor.guests.debian import default_guest

    return default_guest(wish.progress, drivers=bool(wish.hardware.xen_device))
