"""Boot protocols, one file each: how a guest gets into memory and what the processor finds there."""

from __future__ import annotations

import os
from collections.abc import Sequence

from trivisor.boot.image import Image, ImageError, ImageKind
from trivisor.boot.placement import E820Map
from trivisor.machine.memory import GuestMemory
from trivisor.machine.state import CpuState

__all__ = ["Image", "ImageError", "ImageKind", "load_image"]


def load_image(
    memory: GuestMemory,
    image: Image,
    *,
    initrd: bytes | None = None,
    modules: Sequence[tuple[str | os.PathLike[str], str]] = (),
    command_line: str = "",
    e820: E820Map,
    rsdp_address: int = 0,
) -> CpuState:
    """Load a guest by the protocol that its image calls for; return the processor ready to run it.

    `initrd` is for Linux, `modules` (path and command line each) are for
    multiboot.  `e820` tells the guest's memory and decides where things may be
    put; `rsdp_address` is where the ACPI tables begin.  Raises ImageError.
    """
    if image.kind is ImageKind.MULTIBOOT:
        from trivisor.boot import multiboot

        if initrd is not None:
            raise image.fail("is a multiboot kernel, which takes modules; use --module instead of --initrd")
        return multiboot.load(
            memory, image, modules=modules, command_line=command_line, e820=e820, rsdp_address=rsdp_address
        )
    if modules:
        raise image.fail("is a Linux kernel, which takes an initrd; use --initrd instead of --module")
    from trivisor.boot import linux

    return linux.load(
        memory, image, initrd=initrd, command_line=command_line, e820=e820, rsdp_address=rsdp_address
    )
