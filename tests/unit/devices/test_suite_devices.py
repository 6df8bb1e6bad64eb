"""What kvm-unit-tests look for on a board: the test device's ports and lines, and the firmware configuration."""

from __future__ import annotations

from trivisor.devices.fw_cfg import FwCfg
from trivisor.devices.test_device import MEMORY_LENGTH, DeviceMemory, LinePorts, ScratchPorts


def test_scratch_ports_keep_what_was_written() -> None:
    ports = ScratchPorts()
    ports.write(0, 4, 0x12345678)
    assert (ports.read(0, 4), ports.read(0, 1), ports.read(2, 2)) == (0x12345678, 0x78, 0x1234)
    ports.write(1, 1, 0xAB)
    assert ports.read(0, 4) == 0x1234AB78


def test_scratch_ports_beyond_the_value_take_anything() -> None:
    ports = ScratchPorts()
    for size in (1, 2, 4):
        for offset in range(16):
            ports.write(offset, size, (1 << 8 * size) - 1)
            ports.read(offset, size)
    assert ports.read(0, 4) == 0xFFFFFFFF
    assert ports.read(4, 4) == 0


def test_device_memory() -> None:
    memory = DeviceMemory()
    memory.write(0x100, 8, 0x0102030405060708)
    assert (memory.read(0x104, 4), memory.read(0x107, 1)) == (0x01020304, 1)
    memory.write(MEMORY_LENGTH - 1, 8, 0xFFFFFFFFFFFFFFFF)
    assert memory.read(MEMORY_LENGTH - 1, 8) == 0xFF
    assert memory.read(0, 8) == 0


def test_a_line_follows_its_port() -> None:
    seen: list[tuple[int, bool]] = []
    ports = LinePorts([lambda level, n=n: seen.append((n, level)) for n in range(3)])  # type: ignore[misc]
    ports.write(1, 1, 1)
    ports.write(1, 1, 0)
    ports.write(2, 1, 0x80)
    ports.write(3, 1, 1)  # no such line
    assert seen == [(1, True), (1, False), (2, True)]
    assert ports.read(1, 1) == 0


def item(device: FwCfg, key: int, size: int) -> int:
    device.write(0, 2, key)
    return int.from_bytes(bytes(device.read(1, 1) for _ in range(size)), "little")


def test_firmware_configuration() -> None:
    device = FwCfg(ram_size=5 << 30, cpus=1)
    assert item(device, 0, 4).to_bytes(4, "little") == b"QEMU"
    assert item(device, 1, 4) == 1, "the traditional interface alone"
    assert item(device, 3, 8) == 5 << 30
    assert (item(device, 5, 2), item(device, 15, 2)) == (1, 1)
    assert item(device, 5, 4) == 1, "zeros after the end"
    assert item(device, 0x19, 4) == 0, "no file directory"
    device.write(0, 1, 5)
    device.write(1, 2, 5)
    assert device.read(0, 2) == 0
    device.write(0, 2, 0xFFFF)
    assert device.read(1, 1) == 0
