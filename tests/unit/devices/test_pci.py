"""PCI configuration mechanism #1 (PCI 3.0, 3.2.2.3.2) and the host bridge."""

import random

import pytest

from trivisor.devices.pci import HostBridge, PciConfig, PciFunction

ENABLE = 1 << 31


class Card(PciFunction):
    """A function with a 64 KiB memory BAR, that notes what was written."""

    def __init__(self) -> None:
        super().__init__(0x1234, 0x5678, 0x020000)
        self.writable[0x10:0x14] = (0xFFFF0000).to_bytes(4, "little")
        self.log: list[tuple[int, int]] = []

    def written(self, register: int, size: int) -> None:
        self.log.append((register, size))


@pytest.fixture
def pci() -> PciConfig:
    config = PciConfig()
    config.add(0, 0, 0, HostBridge())
    return config


def read(pci: PciConfig, address: int, size: int = 4) -> int:
    pci.write(0, 4, ENABLE | address)
    return pci.read(4 + (address & 3), size)


def write(pci: PciConfig, address: int, size: int, value: int) -> None:
    pci.write(0, 4, ENABLE | address)
    pci.write(4 + (address & 3), size, value)


def test_linux_detects_the_mechanism(pci: PciConfig) -> None:
    pci.write(3, 1, 0x01)
    pci.write(0, 4, ENABLE)
    assert pci.read(0, 4) == ENABLE


def test_address_takes_doublewords_only(pci: PciConfig) -> None:
    pci.write(0, 4, 0xFFFFFFFF)
    assert pci.read(0, 4) == 0x80FFFFFC
    pci.write(0, 1, 0)
    pci.write(0, 2, 0)
    pci.write(2, 2, 0)
    assert pci.read(0, 4) == 0x80FFFFFC
    assert (pci.read(0, 1), pci.read(2, 2)) == (0xFF, 0xFFFF)


def test_host_bridge_identity_at_every_width(pci: PciConfig) -> None:
    assert read(pci, 0) == 0x12378086
    assert read(pci, 2, 2) == 0x1237
    assert [read(pci, index, 1) for index in range(4)] == [0x86, 0x80, 0x37, 0x12]
    assert read(pci, 8) >> 8 == 0x060000
    assert read(pci, 0x0E, 1) == 0


def test_read_only_bits_stay(pci: PciConfig) -> None:
    for register in range(0, 256, 4):
        if register not in (0x04, 0x3C, 0x58, 0x5C, 0x70):
            before = read(pci, register)
            write(pci, register, 4, ~before & 0xFFFFFFFF)
            assert read(pci, register) == before
    write(pci, 4, 2, 0xFFFF)
    assert read(pci, 4, 2) == 0x0106
    write(pci, 0x59, 1, 0x30)
    assert read(pci, 0x59, 1) == 0x30


def test_nobody_there_reads_as_ones(pci: PciConfig) -> None:
    assert read(pci, 1 << 11) == 0xFFFFFFFF
    assert read(pci, 1 << 16, 2) == 0xFFFF
    write(pci, 1 << 11, 4, 0)
    pci.write(0, 4, 0)  # not enabled
    assert pci.read(4, 4) == 0xFFFFFFFF


def test_base_address_sizes_itself_and_the_device_is_told(pci: PciConfig) -> None:
    card = Card()
    pci.add(0, 3, 1, card)
    where = 3 << 11 | 1 << 8
    write(pci, where | 0x10, 4, 0xFFFFFFFF)
    assert read(pci, where | 0x10) == 0xFFFF0000
    write(pci, where | 0x12, 2, 0xFEB0)
    assert read(pci, where | 0x10) == 0xFEB00000
    assert card.log == [(0x10, 4), (0x12, 2)]


def test_places(pci: PciConfig) -> None:
    with pytest.raises(ValueError):
        pci.add(0, 0, 0, HostBridge())
    with pytest.raises(ValueError):
        pci.add(0, 32, 0, HostBridge())


def test_reset_control() -> None:
    resets: list[int] = []
    pci = PciConfig(lambda: resets.append(1))
    pci.write(1, 1, 0x02)
    assert not resets and pci.read(1, 1) == 0x02
    pci.write(1, 1, 0x06)
    assert len(resets) == 1
    pci.write(1, 1, 0x06)
    assert len(resets) == 1


def test_random_accesses_are_survived(pci: PciConfig) -> None:
    chance = random.Random(0xCF8)
    for _ in range(3000):
        offset, size = chance.randrange(8), chance.choice((1, 2, 4))
        pci.write(offset, size, chance.getrandbits(8 * size))
        if chance.random() < 0.3:
            pci.write(0, 4, ENABLE | chance.randrange(256))
        assert 0 <= pci.read(offset, size) < 1 << 8 * size
    assert read(pci, 0xFE, 4) == 0xFFFF0000  # half of it beyond the window
