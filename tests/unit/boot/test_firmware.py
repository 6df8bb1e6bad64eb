"""Flat firmware images: where they go, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivisor.boot import ImageError, firmware
from trivisor.machine.bus import Bus
from trivisor.machine.memory import GuestMemory
from trivisor.machine.state import CpuState


@pytest.mark.parametrize("size", [0x1000, 0x10000, 0x20000, 0x40000, 16 << 20])
def test_the_image_ends_at_4_gib_and_at_1_mib(tmp_path: Path, size: int) -> None:
    path, memory, mmio = tmp_path / "bios.bin", GuestMemory(16 << 20), Bus("memory")
    data = bytes(i * 7 & 0xFF for i in range(0x1000)) * (size // 0x1000 - 1) + bytes(range(256)) * 16
    path.write_bytes(data)
    image, state = firmware.load(memory, mmio, path)
    assert image == data
    assert state == CpuState()
    assert state.cs.base + state.rip == 0xFFFFFFF0
    assert mmio.contents(0x1_0000_0000 - size, size) == data
    assert mmio.read(0xFFFFFFF0, 8) == int.from_bytes(data[-16:-8], "little")
    mmio.write(0xFFFFFFF0, 4, 0)
    assert mmio.read(0xFFFFFFF0, 4) == int.from_bytes(data[-16:-12], "little")
    shadow = min(size, 0x20000)
    assert memory.read(0x100000 - shadow, shadow) == data[-shadow:]
    memory.close()


@pytest.mark.parametrize("size", [0, 1, 0xFFF, 0x1001, (16 << 20) + 0x1000])
def test_sizes_that_no_flash_has(tmp_path: Path, size: int) -> None:
    path, memory = tmp_path / "bios.bin", GuestMemory(16 << 20)
    path.write_bytes(bytes(size))
    with pytest.raises(ImageError, match="whole 4 KiB pages"):
        firmware.load(memory, Bus("memory"), path)
    with pytest.raises(ImageError, match="no such file"):
        firmware.load(memory, Bus("memory"), tmp_path / "none")
    memory.close()


def test_nothing_else_on_the_bus_is_executable() -> None:
    assert Bus("memory").contents(0xFFFF0000, 16) is None
