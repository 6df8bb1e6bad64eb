"""The ACPI tables and the power management registers against the ACPI specification 6.4."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from trivisor.devices import acpi_tables
from trivisor.devices.acpi_pm import AcpiPm
from trivisor.devices.acpi_tables import BoardLayout, build
from trivisor.machine.clock import Clock

ADDRESS = 0xE0000
LAYOUT = BoardLayout((0,), 0xFEE00000, 0xFEC00000, 0x600, 0xCF9, 6, (0xC0000000, 0xFEBFFFFF))
SECOND = 1_000_000_000


class Memory:
    """The tables where a kernel would find them."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def at(self, address: int, length: int) -> bytes:
        offset = address - ADDRESS
        assert offset >= 0 and offset + length <= len(self.data)
        return self.data[offset : offset + length]

    def table(self, address: int) -> bytes:
        return self.at(address, struct.unpack("<I", self.at(address + 4, 4))[0])

    def tables(self) -> dict[str, bytes]:
        """All tables by signature, found as a kernel finds them: RSDP, XSDT, FADT."""
        xsdt = self.table(struct.unpack_from("<Q", self.data, 24)[0])
        found = {"XSDT": xsdt, "RSDT": self.table(struct.unpack_from("<I", self.data, 16)[0])}
        for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
            found[self.at(address, 4).decode()] = self.table(address)
        facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
        return found | {"FACS": self.table(facs), "DSDT": self.table(dsdt)}


@pytest.fixture
def tables() -> dict[str, bytes]:
    return Memory(build(ADDRESS, LAYOUT)).tables()


def test_root_pointer() -> None:
    data = build(ADDRESS, LAYOUT)
    assert data[:8] == b"RSD PTR " and data[15] == 2 and struct.unpack_from("<I", data, 20)[0] == 36
    assert sum(data[:20]) % 256 == 0 and sum(data[:36]) % 256 == 0


def test_checksums_and_signatures(tables: dict[str, bytes]) -> None:
    assert set(tables) == {"XSDT", "RSDT", "FACP", "APIC", "FACS", "DSDT"}
    for signature, table in tables.items():
        assert table[:4] == signature.encode()
        assert signature == "FACS" or sum(table) % 256 == 0, signature


def test_both_root_tables_list_the_same(tables: dict[str, bytes]) -> None:
    short = [address for (address,) in struct.iter_unpack("<I", tables["RSDT"][36:])]
    assert short == [address for (address,) in struct.iter_unpack("<Q", tables["XSDT"][36:])]


def test_facs_is_aligned() -> None:
    data = build(ADDRESS, LAYOUT)
    assert (ADDRESS + data.index(b"FACS")) % 64 == 0


def test_fadt(tables: dict[str, bytes]) -> None:
    fadt = tables["FACP"]
    assert len(fadt) == 276 and fadt[8] == 6
    assert struct.unpack_from("<H", fadt, 46)[0] == 9
    assert struct.unpack_from("<I", fadt, 56)[0] == 0x600 and fadt[88] == 4
    assert struct.unpack_from("<I", fadt, 64)[0] == 0x604 and fadt[89] == 2
    assert struct.unpack_from("<I", fadt, 76)[0] == 0x608 and fadt[91] == 4
    for extended, width, address in ((148, 32, 0x600), (172, 16, 0x604), (208, 32, 0x608), (116, 8, 0xCF9)):
        space, bits, offset, _, at = struct.unpack_from("<BBBBQ", fadt, extended)
        assert (space, bits, offset, at) == (1, width, 0, address)
    assert fadt[128] == 6 and struct.unpack_from("<I", fadt, 112)[0] & 1 << 10
    assert struct.unpack_from("<Q", fadt, 140)[0] == struct.unpack_from("<I", fadt, 40)[0]


def test_madt(tables: dict[str, bytes]) -> None:
    madt = tables["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    entries, offset = [], 44
    while offset < len(madt):
        entries.append(madt[offset : offset + madt[offset + 1]])
        offset += madt[offset + 1]
    assert entries == [
        bytes((0, 8, 0, 0, 1, 0, 0, 0)),
        struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 9, 9, 0xD),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]


def test_dsdt_names(tables: dict[str, bytes]) -> None:
    dsdt = tables["DSDT"]
    assert b"\x08\\_S5_\x12\x06\x04\x00\x00\x00\x00" in dsdt
    for eisa_id in (b"\x41\xd0\x0a\x03", b"\x41\xd0\x05\x01", b"\x41\xd0\x0b\x00"):  # PNP0A03, 0501, 0B00
        assert b"_HID\x0c" + eisa_id in dsdt


@pytest.mark.parametrize(
    ("length", "head"),
    [(0, "01"), (62, "3f"), (63, "4104"), (4093, "4fff"), (4094, "810001"), (1 << 20, "c4000001")],
)
def test_aml_package_length(length: int, head: str) -> None:
    # ACPI 20.2.4: the length counts its own bytes.
    encoded = acpi_tables._package_length(bytes(length))
    assert encoded[: len(bytes.fromhex(head))].hex() == head
    assert len(encoded) == length + len(head) // 2


def test_misplaced_tables_are_refused() -> None:
    for address in (ADDRESS + 16, 1 << 32, -64):
        with pytest.raises(ValueError, match="cannot lie"):
            build(address, LAYOUT)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (acpica-tools) is not installed")
@pytest.mark.parametrize("processors", [1, 40])
def test_the_reference_compiler_takes_the_dsdt(tmp_path: Path, processors: int) -> None:
    layout = BoardLayout(tuple(range(processors)), 0xFEE00000, 0xFEC00000, 0x600, 0xCF9, 6, LAYOUT.pci_window)
    for signature, table in Memory(build(ADDRESS, layout)).tables().items():
        (tmp_path / f"{signature}.aml").write_bytes(table)
    names = [f"{signature}.aml" for signature in ("DSDT", "FACP", "APIC", "XSDT", "FACS")]
    said = subprocess.run(["iasl", "-d", *names], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Error" not in said.stdout + said.stderr and "Warning" not in said.stdout + said.stderr
    said = subprocess.run(["iasl", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "0 Errors, 0 Warnings" in said.stdout


class Board:
    def __init__(self) -> None:
        self.now = 0
        self.clock = Clock(lambda: self.now)
        self.sci: list[bool] = []
        self.offs = 0
        self.pm = AcpiPm(self.clock, self.sci.append, self._off)

    def _off(self) -> None:
        self.offs += 1

    def advance(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.clock.run_due()


@pytest.fixture
def board() -> Board:
    return Board()


def test_timer_runs_at_its_rate_in_24_bits(board: Board) -> None:
    assert board.pm.read(8, 4) == 0
    board.advance(SECOND)
    assert board.pm.read(8, 4) == 3_579_545
    board.advance(4 * SECOND)
    assert board.pm.read(8, 4) == 5 * 3_579_545 - (1 << 24)
    assert board.pm.read(9, 1) == board.pm.read(8, 4) >> 8 & 0xFF


def test_timer_status_on_the_highest_bit(board: Board) -> None:
    assert board.pm.read(0, 2) == 0
    board.advance(3 * SECOND)
    assert board.pm.read(0, 2) == 1
    board.pm.write(0, 2, 1)
    assert board.pm.read(0, 2) == 0


def test_timer_interrupts_when_enabled(board: Board) -> None:
    board.pm.write(2, 2, 1)
    assert board.pm.read(2, 2) == 1 and board.sci[-1] is False
    board.advance(2_343_484_000)
    assert board.sci[-1] is False
    board.advance(1_000)
    assert board.sci[-1] is True
    board.pm.write(0, 2, 1)
    assert board.sci[-1] is False
    board.advance(2_343_485_000)
    assert board.sci[-1] is True


def test_power_button(board: Board) -> None:
    board.pm.press_power_button()
    assert board.sci[-1] is False and board.pm.read(0, 2) == 1 << 8
    board.pm.write(2, 2, 1 << 8)
    assert board.sci[-1] is True
    board.pm.write(0, 2, 1)
    assert board.sci[-1] is True, "another status bit"
    board.pm.write(1, 1, 1)
    assert board.sci[-1] is False and board.pm.read(0, 4) == 1 << 24


def test_power_off(board: Board) -> None:
    assert board.pm.read(4, 2) == 1, "SCI_EN"
    board.pm.write(4, 2, 7 << 10 | 1 << 13)
    assert board.offs == 0, "another sleep type"
    board.pm.write(4, 2, 0)
    board.pm.write(4, 2, 1 << 13)
    assert board.offs == 1 and board.pm.read(4, 2) == 1, "SLP_EN reads as zero"
    board.pm.write(5, 1, 0x20)
    assert board.offs == 2


def test_hostile_accesses(board: Board) -> None:
    generator = random.Random(604)
    for _ in range(3000):
        size = generator.choice((1, 2, 4))
        offset = generator.randrange(16)
        board.pm.write(offset, size, generator.getrandbits(8 * size))
        assert 0 <= board.pm.read(offset, size) < 1 << 8 * size
        board.advance(generator.randrange(SECOND))
