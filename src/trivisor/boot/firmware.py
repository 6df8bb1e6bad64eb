"""Flat firmware images, as a PC has them in its flash memory.

The image ends at 4 GiB, where it is read-only, and its last 128 KiB are also
below 1 MiB, in RAM that the guest may write to (shadowed, as firmware leaves
them).  The processor starts as after RESET, at FFFFFFF0 (Intel SDM 3A 9.1.4).
"""

from __future__ import annotations

import os

from trivisor.boot.image import Image, ImageError
from trivisor.devices.rom import Rom
from trivisor.machine.bus import Bus
from trivisor.machine.memory import HIGH_RAM_START, MIB, PAGE_SIZE, GuestMemory
from trivisor.machine.state import CpuState

MAXIMUM_SIZE = 16 * MIB
"""More would lie on the APICs."""
_SHADOW_SIZE = 128 << 10
_SHADOW_END = MIB


def load(memory: GuestMemory, mmio: Bus, path: str | os.PathLike[str]) -> tuple[bytes, CpuState]:
    """Put the image in its two places; (the image, the processor as it leaves RESET).  Raises ImageError."""
    with Image(path, recognise=False) as image:
        if image.size == 0 or image.size % PAGE_SIZE or image.size > MAXIMUM_SIZE:
            raise ImageError(
                f"{image.path}: firmware has whole 4 KiB pages and at most 16 MiB, not {image.size} bytes; "
                "take the flat image that goes into flash memory"
            )
        data = image.read(0, image.size)
    attach(mmio, data)
    shadow = data[-_SHADOW_SIZE:]
    memory.write(_SHADOW_END - len(shadow), shadow)
    return data, CpuState()


def attach(mmio: Bus, data: bytes) -> None:
    """Have the image answer below 4 GiB; ValueError for one that has no place there."""
    if not data or len(data) % PAGE_SIZE or len(data) > MAXIMUM_SIZE:
        raise ValueError(f"{len(data)} bytes are no firmware")
    mmio.attach(HIGH_RAM_START - len(data), len(data), Rom(data))
