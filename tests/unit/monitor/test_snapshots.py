"""Snapshots of small guests: what goes on is the same machine, and no file does harm."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zstandard

from trivisor import VirtualMachine
from trivisor.guests.test_kernel import STATUS, build
from trivisor.machine.memory import MIB, GuestMemory
from trivisor.monitor import snapshot_file
from trivisor.monitor.outcome import StopReason
from trivisor.monitor.snapshot_file import FORMAT, MAGIC, SnapshotError, SnapshotFile, write_snapshot
from trivisor.x86.assembler import assemble

DAMAGES = 150
"""Single bits turned in each of three parts of a file."""
CHANGES = int(os.environ.get("TRIVISOR_SNAPSHOT_CHANGES", "40"))
"""Values exchanged for others in files whose digests are right."""


@pytest.fixture(scope="module")
def spinning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of the test kernel in its loop, with the timer running."""
    directory = tmp_path_factory.mktemp("snapshot")
    kernel, path = directory / "kernel.elf", directory / "spinning.snapshot"
    kernel.write_bytes(build())
    with VirtualMachine(kernel, append="spin", memory="16M", technique="translation") as machine:
        assert machine.run(timeout=0.5).reason is StopReason.TIMEOUT
        assert machine.snapshot(path) == path.stat().st_size
    return path


def load(path: Path) -> None:
    """Read a file whole, without a machine to put it into."""
    with closing(SnapshotFile(path)) as file, closing(GuestMemory(16 * MIB)) as memory:
        file.begin_loading(memory).results()


def test_a_guest_goes_on_from_its_snapshot_as_if_nothing_had_been(tmp_path: Path) -> None:
    kernel, path = tmp_path / "kernel.elf", tmp_path / "ticking.snapshot"
    kernel.write_bytes(build())
    with VirtualMachine(kernel, memory="16M", technique="translation") as machine:
        machine.read_until("mem", timeout=60)
        machine.snapshot(path)
        assert machine.run(60).status == STATUS
        whole = machine.output
    with VirtualMachine.restore(path, technique="translation") as again:
        assert again.memory_size == 16 * MIB
        assert again.run(60).status == STATUS
        assert whole.endswith(again.output) and b"mem" in whole.removesuffix(again.output)
    with VirtualMachine.restore(path, technique="translation") as twice:
        assert twice.run(60).status == STATUS
        assert twice.output == again.output


def test_firmware_and_devices_that_are_not_always_there_come_along(tmp_path: Path) -> None:
    code = assemble("start: mov al, 0x5a\n out 0xe0, al\n spin: inc ebx\n jmp spin", bits=16).code
    image, path = tmp_path / "bios.bin", tmp_path / "firmware.snapshot"
    image.write_bytes(code.ljust(0xFFF0, b"\x90") + b"\xe9\x0d\x00".ljust(16, b"\x90"))
    options: dict[str, Any] = {"technique": "translation", "memory": "16M"}
    with VirtualMachine(firmware=image, devices=["pc-testdev"], **options) as machine:
        machine.run(timeout=0.2)
        machine.snapshot(path)
        stood_at = machine.registers
    assert stood_at.cs.base == 0xFFFF0000 and stood_at.rbx > 0
    image.unlink()
    with VirtualMachine.restore(path, technique="translation") as machine:
        assert machine.registers.rbx == stood_at.rbx
        machine.step(4)
        assert (machine.registers.rbx - stood_at.rbx) & 0xFFFFFFFF == 2
        assert machine.registers.cs.base == 0xFFFF0000
        assert machine._machine.board.ports.read(0xE0, 1) == 0x5A
        machine.snapshot(tmp_path / "again")
    with closing(SnapshotFile(path)) as first, closing(SnapshotFile(tmp_path / "again")) as second:
        assert first.remembered["firmware"] == second.remembered["firmware"] != ""


def test_guest_time_stands_still_in_a_snapshot(spinning: Path, tmp_path: Path) -> None:
    with closing(SnapshotFile(spinning)) as file:
        counter, now = file.remembered["tsc"], file.remembered["now"]
    with VirtualMachine.restore(spinning, technique="translation") as machine:
        again = tmp_path / "again"
        machine.snapshot(again)
    with closing(SnapshotFile(again)) as file:
        assert counter <= file.remembered["tsc"] < counter + 60 * file.remembered["tsc_frequency"]
        assert now <= file.remembered["now"] < now + 60_000_000_000
        ticks = (file.remembered["tsc"] - counter) * 1_000_000_000 / file.remembered["tsc_frequency"]
        assert abs(ticks - (file.remembered["now"] - now)) < 50_000_000, "both clocks have gone on together"


def test_a_snapshot_is_there_whole_or_not_at_all(spinning: Path, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(b"before")
    with VirtualMachine.restore(spinning, technique="translation") as machine:

        def fail(*_arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(snapshot_file, "_write", fail)
        with pytest.raises(OSError, match="No space"):
            machine.snapshot(path)
        monkeypatch.undo()
        assert path.read_bytes() == b"before" and [*tmp_path.iterdir()] == [path]
        machine.snapshot(path)
    load(path)
    assert path.stat().st_mode & 0o077 == 0, "it has the guest's memory"


def test_what_cannot_be_put_into_a_snapshot(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.elf"
    kernel.write_bytes(build())
    with VirtualMachine(kernel, memory="16M", technique="translation") as machine:
        assert machine.run(60).status == STATUS
        with pytest.raises(ValueError, match="nothing to put"):
            machine.snapshot(tmp_path / "ended")
        assert not (tmp_path / "ended").exists()


def test_only_a_guest_that_waits_takes_a_command(spinning: Path) -> None:
    with pytest.raises(SnapshotError, match="does not wait for a command"):
        VirtualMachine.restore(spinning, command=["true"])


# -- files that are none -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no snapshot"),
        (b"\x7fELF" + bytes(1000), "no snapshot"),
        (MAGIC, "damaged"),
        (MAGIC + bytes(100), "format 0"),
        (MAGIC + (1).to_bytes(4, "little") + bytes(100), f"format 1; this version reads format {FORMAT}"),
        (MAGIC + FORMAT.to_bytes(4, "little") + b"\xff" * 100, "damaged"),
    ],
)
def test_foreign_and_other_formats(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=says) as refusal:
        VirtualMachine.restore(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises((SnapshotError, OSError)):
            VirtualMachine.restore(path)
    with pytest.raises(FileNotFoundError):
        VirtualMachine.restore(tmp_path / "nothing")


def test_every_bit_counts(spinning: Path, tmp_path: Path) -> None:
    """A file with any bit turned, or cut short, or longer, is noticed before any of it is used."""
    whole = spinning.read_bytes()
    path = tmp_path / "damaged"
    choose = random.Random(7)
    header = 72
    places = [choose.randrange(header * 8) for _ in range(DAMAGES)]
    places += [choose.randrange(len(whole) * 8) for _ in range(DAMAGES)]
    places += [choose.randrange((len(whole) - 3000) * 8, len(whole) * 8) for _ in range(DAMAGES)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError):
            load(path)
    for length in (1, 15, 16, 71, 72, len(whole) // 2, len(whole) - 1, *(choose.randrange(len(whole)) for _ in range(30))):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotError):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(SnapshotError):
        load(path)


# -- files that somebody made on purpose: their digests are right ------------------------------------------------


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in plain values, the containers' own too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _leaves(item)


HOSTILE: list[Any] = [
    -1, 0, 1, 2, 3, 255, 256, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 300, True, False, None, 1.5,
    "", "x", "ff" * 600, [], [1], [[]], {}, {"0": 0}, {"x": []}, [0] * 5000,
]  # fmt: skip


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same snapshot, with something else remembered."""
    with closing(SnapshotFile(source)) as file, closing(GuestMemory(16 * MIB)) as memory:
        file.begin_loading(memory).results()
        remembered = json.loads(json.dumps(file.remembered))
        change(remembered)
        write_snapshot(target, remembered, memory)


def test_no_value_in_a_file_does_harm(spinning: Path, tmp_path: Path) -> None:
    """A value exchanged for another: the file is refused in one line, or it is some machine, which runs."""
    path = tmp_path / "made"
    choose = random.Random(int(os.environ.get("TRIVISOR_SNAPSHOT_SEED", "11")))
    refused = 0
    for _ in range(CHANGES):
        value = choose.choice(HOSTILE)

        def change(remembered: dict[str, Any], value: Any = value) -> None:
            container, key = choose.choice([*_leaves(remembered)])
            change.what = (key, value)  # type: ignore[attr-defined]
            container[key] = value

        rewritten(spinning, path, change)
        try:
            machine = VirtualMachine.restore(path, technique="translation", keep_translations=False)
        except SnapshotError as refusal:
            refused += 1
            assert "\n" not in str(refusal)
            continue
        try:
            with machine:
                machine.write("x")
                machine.run(timeout=0.05)
                machine.registers  # noqa: B018
        except BaseException as error:
            error.add_note(f"with {change.what}")  # type: ignore[attr-defined]
            raise
    assert refused > CHANGES // 4


@pytest.mark.parametrize(
    "pieces",
    [
        [[1 << 62, "00" * 32, [0, 1]]],
        [[-1, "00" * 32, [0, 1]]],
        [[10, "00" * 32, [0, 1 << 40]]],
        [[10, "00" * 32, [1 << 70, 1]]],
        [[10, "zz", [0, 1]]],
        [[10, "00" * 32, [0]]],
        [[10, "00" * 32, []]],
        [[10]],
        "pieces",
        None,
        7,
        [[True, "00", [0, 1]]],
    ],
)
def test_no_list_of_pieces_does_harm(spinning: Path, tmp_path: Path, pieces: Any) -> None:
    path = tmp_path / "made"
    with closing(SnapshotFile(spinning)) as file, pytest.MonkeyPatch.context() as patch:
        remembered = file.remembered
        dumps = json.dumps
        patch.setattr(snapshot_file.json, "dumps", lambda value, **more: dumps({**value, "ram": pieces}, **more))
        with closing(GuestMemory(16 * MIB)) as memory:
            memory.write(0x1000, b"x")
            write_snapshot(path, remembered, memory)
    with pytest.raises(SnapshotError, match="damaged"):
        load(path)


def test_an_index_that_unpacks_to_more_than_it_may_is_not_unpacked(spinning: Path, tmp_path: Path) -> None:
    import hashlib

    bomb = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    assert len(bomb) < 1 << 20
    path = tmp_path / "bomb"
    header = snapshot_file._HEADER.pack(
        MAGIC, snapshot_file.FORMAT, 0, snapshot_file._HEADER.size, len(bomb), hashlib.sha256(bomb).digest()
    )
    path.write_bytes(header + bomb)
    with pytest.raises(SnapshotError, match="damaged"):
        load(path)


def test_a_host_whose_time_stamp_counter_runs_otherwise(spinning: Path, tmp_path: Path) -> None:
    path = tmp_path / "made"
    rewritten(spinning, path, lambda remembered: remembered.update(tsc_frequency=123_000_000))
    with pytest.raises(SnapshotError, match="123 MHz"):
        VirtualMachine.restore(path, technique="translation")


def test_memory_pages_of_zeros_are_left_out(tmp_path: Path) -> None:
    with closing(GuestMemory(64 * MIB)) as memory:
        for page in (0, 5, 6, 7, 300, 16383):
            memory.write(page * 4096 + 17, bytes([page & 0xFF or 1]))
        length = write_snapshot(tmp_path / "file", {"a": 1}, memory)
        assert length < 4096
        with closing(GuestMemory(64 * MIB)) as other, closing(SnapshotFile(tmp_path / "file")) as file:
            assert file.remembered == {"a": 1}
            file.begin_loading(other).results()
            assert memory.view == other.view
        with closing(GuestMemory(16 * MIB)) as small, closing(SnapshotFile(tmp_path / "file")) as file:
            loading = file.begin_loading(small)
            with pytest.raises(SnapshotError):
                loading.results()


def test_restoring_needs_the_callers_technique(spinning: Path) -> None:
    from trivisor.monitor import TechniqueUnavailable

    with pytest.raises(TechniqueUnavailable, match="paravirt"):
        VirtualMachine.restore(spinning, technique="paravirt")


def test_a_piece_of_ram_has_the_length_that_it_should_have() -> None:
    packed = zstandard.ZstdCompressor().compress(random.Random(1).randbytes(5000))
    parts = [memoryview(bytearray(length)) for length in (4000, 1000)]
    snapshot_file._unpack_into(packed, parts)
    assert b"".join(parts) == random.Random(1).randbytes(5000)
    for wrong in ([4000, 1001], [4999], []):
        with pytest.raises(ValueError, match="another length"):
            snapshot_file._unpack_into(packed, [memoryview(bytearray(length)) for length in wrong])
    for damaged in (packed[:-9], packed[:9] + b"\xff" * 9 + packed[18:], b"", b"x" * 40):
        with pytest.raises((ValueError, zstandard.ZstdError)):
            snapshot_file._unpack_into(damaged, parts)
