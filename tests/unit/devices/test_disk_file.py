"""Raw disks in files: what can be one, and that what is written gets there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trivisor.devices.disk_file import DiskError, DiskFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk"
    made.write_bytes(bytes(range(256)) * 16)
    return made


def test_reading_and_writing_in_pieces(path: Path) -> None:
    disk = DiskFile(path)
    assert disk.sectors == 8
    pieces = [bytearray(512), bytearray(1024)]
    disk.read(512, [memoryview(piece) for piece in pieces])
    assert b"".join(pieces) == path.read_bytes()[512:2048]
    disk.write(1024, [memoryview(b"a" * 512), memoryview(b"b" * 512)])
    assert path.read_bytes()[1024:2048] == b"a" * 512 + b"b" * 512, "it is in the file at once"
    disk.discard(1024, 512)
    assert path.read_bytes()[1024:2048] == bytes(512) + b"b" * 512
    disk.close()


def test_a_flush_is_the_hosts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    disk = DiskFile(path)
    disk.flush()
    assert len(flushed) == 1
    disk.close()


@pytest.mark.parametrize("size", [0, 1, 511, 513, 4095])
def test_odd_sizes_are_refused(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    with pytest.raises(DiskError, match=f"{size} bytes are no whole number of sectors"):
        DiskFile(path)


def test_what_is_no_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DiskFile(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        DiskFile(tmp_path)
    with pytest.raises(DiskError, match="a file or a block device"):
        DiskFile(tmp_path, readonly=True)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DiskError, match="a file or a block device"):
        DiskFile(tmp_path / "fifo")


def test_two_machines_write_to_no_disk_at_once(path: Path) -> None:
    first = DiskFile(path)
    for readonly in (False, True):
        with pytest.raises(DiskError, match="in use"):
            DiskFile(path, readonly=readonly)
    first.close()
    readers = [DiskFile(path, readonly=True) for _ in range(2)]
    with pytest.raises(DiskError, match="in use"):
        DiskFile(path)
    for reader in readers:
        reader.close()


def test_a_read_only_disk_cannot_be_written(path: Path) -> None:
    disk = DiskFile(path, readonly=True)
    with pytest.raises(OSError):
        disk.write(0, [memoryview(b"x" * 512)])
    disk.close()


def test_a_file_that_has_become_shorter(path: Path) -> None:
    disk = DiskFile(path)
    os.truncate(path, 1024)
    with pytest.raises(OSError, match="shorter"):
        disk.read(512, [memoryview(bytearray(1024))])
    disk.close()
