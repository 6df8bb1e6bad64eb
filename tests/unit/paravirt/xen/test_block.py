"""The disk's back end: the hand-shake, requests of each kind, and guests that break every rule (io/blkif.h)."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from tests.unit.paravirt.xen.conftest import Guest
from tests.unit.paravirt.xen.front_end import FrontEnd, FrontRing
from trivisor.devices.disk_file import DiskFile
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.back_ends.block import (
    DISCARD,
    ERROR,
    FLUSH,
    INDIRECT,
    NOT_SUPPORTED,
    OKAY,
    READ,
    REQUEST_SIZE,
    WRITE,
    WRITE_BARRIER,
)
from trivisor.paravirt.xen.domain import OWN_ID
from trivisor.paravirt.xen.frames import L1

SECTORS = 64
PATTERN = random.Random(1).randbytes(SECTORS * 512)


class Disk(FrontEnd):
    """blkfront, with requests made by hand."""

    def __init__(self, guest: Guest, number: int = 51712) -> None:
        super().__init__(guest, "vbd", number)
        self.number = 0
        self.connect()

    def connect(self, **instead: object) -> None:
        self.ring = FrontRing(self, REQUEST_SIZE)
        nodes = {"ring_ref": self.ring.reference, "event_channel": self.open_port(), "protocol": "x86_64-abi"}
        self.tell(state=1)
        self.tell(**{name: value for name, value in {**nodes, **instead}.items() if value is not None})
        self.tell(state=3)

    def page(self, content: bytes = b"") -> tuple[int, int]:
        """(a grant, the address of its page)."""
        frame = self.guest.frame()
        self.memory.write(frame << 12, content)
        return self.grant(frame), frame << 12

    def request(self, raw: bytes) -> int:
        """Make a request of ours; the status of its answer, which is checked to be to it."""
        self.ring.put(raw)
        self.send()
        number, operation, status = struct.unpack("<QBxh", self.ring.next(12))
        assert number == struct.unpack_from("<8xQ", raw)[0]
        assert operation == (raw[1] if raw[0] == INDIRECT else raw[0])
        return status

    def ask(self, operation: int, sector: int = 0, *segments: tuple[int, int, int], count: int | None = None) -> int:
        """One plain request; `segments` are (grant, first, last)."""
        self.number += 1
        raw = struct.pack(
            "<BBH4xQQ", operation, len(segments) if count is None else count, 0, self.number, sector
        ) + b"".join(struct.pack("<IBBH", *segment, 0) for segment in segments)
        return self.request(raw)

    def ask_indirectly(self, inner: int, sector: int, pages: list[int], count: int) -> int:
        self.number += 1
        pages = [*pages, *[0] * (8 - len(pages))]
        raw = struct.pack("<BBH4xQQH2x8I", INDIRECT, inner, count, self.number, sector, 0, *pages)
        return self.request(raw)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk"
    made.write_bytes(PATTERN)
    return made


@pytest.fixture(params=[1, 2], ids="grants{}".format)
def disk(guest: Guest, path: Path, request: pytest.FixtureRequest) -> Disk:
    guest.domain.grants.set_version(request.param)
    guest.machine.attach_disk(DiskFile(path))
    return Disk(guest)


def test_the_hand_shake(guest: Guest, disk: Disk) -> None:
    assert disk.told("state") == "4"
    assert disk.told("sectors") == str(SECTORS) and disk.told("sector-size") == "512"
    assert disk.told("feature-flush-cache") == "1" and disk.told("info") == "0" and disk.told("mode") == "w"
    assert disk.in_use(disk.ring.reference)
    disk.tell(state=5)
    assert disk.told("state") == "5" and not disk.in_use(disk.ring.reference)
    disk.tell(state=6)
    assert disk.told("state") == "6"
    disk.connect()
    assert disk.told("state") == "4" and disk.ask(FLUSH) == OKAY


def test_reading_parts_of_pages(disk: Disk) -> None:
    (first, at), (second, after) = disk.page(b"\xee" * 4096), disk.page(b"\xee" * 4096)
    assert disk.ask(READ, 3, (first, 2, 4), (second, 0, 7)) == OKAY
    assert disk.memory.read(at, 4096) == b"\xee" * 1024 + PATTERN[3 * 512 : 6 * 512] + b"\xee" * 1536
    assert disk.memory.read(after, 4096) == PATTERN[6 * 512 : 14 * 512]
    assert not disk.in_use(first) and not disk.in_use(second)


def test_writing_is_in_the_file_when_it_is_answered(disk: Disk, path: Path) -> None:
    reference, _ = disk.page(b"w" * 4096)
    assert disk.ask(WRITE, SECTORS - 8, (reference, 0, 7)) == OKAY
    assert path.read_bytes() == PATTERN[:-4096] + b"w" * 4096
    readonly = disk.grant(disk.guest.frame(), abi.GTF_PERMIT_ACCESS | abi.GTF_READONLY)
    assert disk.ask(WRITE, 0, (readonly, 0, 0)) == OKAY, "the back end only reads the memory"
    assert path.read_bytes()[:512] == bytes(512)


def test_flushes_and_barriers_are_the_hosts(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write = os.pwritev
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: order.append("flush"))
    monkeypatch.setattr(os, "pwritev", lambda *all: order.append("write") or write(*all))
    reference, _ = disk.page()
    assert disk.ask(FLUSH) == OKAY and order == ["flush"]
    assert disk.ask(WRITE_BARRIER, 0, (reference, 0, 7)) == OKAY
    assert order == ["flush", "flush", "write", "flush"]
    assert disk.ask(FLUSH, 0, (reference, 0, 7)) == OKAY
    assert order[4:] == ["flush", "write"], "data with a flush is not lost"


def test_discarding(disk: Disk, path: Path) -> None:
    raw = struct.pack("<BBH4xQQQ", DISCARD, 0, 0, 77, 8, 16)
    assert disk.request(raw) == OKAY
    assert path.read_bytes() == PATTERN[: 8 * 512] + bytes(16 * 512) + PATTERN[24 * 512 :]
    for sector, count in ((60, 8), (0, SECTORS + 1), (2**63, 2**63), (2**64 - 1, 1)):
        assert disk.request(struct.pack("<BBH4xQQQ", DISCARD, 0, 0, 77, sector, count)) == ERROR


def test_indirect_requests(disk: Disk) -> None:
    pages = [disk.page() for _ in range(8)]
    listed, _ = disk.page(b"".join(struct.pack("<IBBH", reference, 0, 7, 0) for reference, _ in pages))
    assert disk.ask_indirectly(READ, 0, [listed], 8) == OKAY
    assert b"".join(disk.memory.read(at, 4096) for _, at in pages) == PATTERN
    assert disk.ask_indirectly(WRITE, 0, [listed], 8) == OKAY
    for count, reference in ((0, listed), (257, listed), (0xFFFF, listed), (8, 0), (8, 0xFFFFFFFF)):
        assert disk.ask_indirectly(READ, 0, [reference], count) == ERROR
    assert disk.ask_indirectly(FLUSH, 0, [listed], 8) == ERROR
    assert disk.ask_indirectly(INDIRECT, 0, [listed], 8) == ERROR
    assert not disk.in_use(listed) and not any(disk.in_use(reference) for reference, _ in pages)


def test_bad_requests_are_answered_and_do_nothing(disk: Disk, path: Path) -> None:
    good, at = disk.page(b"\xee" * 4096)
    table = disk.guest.frame()
    disk.guest.domain.tables.get_kind(table, L1)
    bad_grants = (
        disk.grant(table),
        disk.grant(0xFFFFFF),
        disk.grant(0),
        disk.grant(disk.guest.frame(), abi.GTF_PERMIT_ACCESS | abi.GTF_READONLY),
        disk.grant(disk.guest.frame(), abi.GTF_PERMIT_ACCESS, 7),
        disk.grant(disk.guest.frame(), 0),
        1 << 16,
        0xFFFFFFFF,
    )
    for reference in bad_grants:
        assert disk.ask(READ, 0, (good, 0, 7), (reference, 0, 7)) == ERROR
    for first, last in ((1, 0), (0, 8), (255, 255), (8, 8)):
        assert disk.ask(READ, 0, (good, first, last)) == ERROR
        assert disk.ask(WRITE, 0, (good, first, last)) == ERROR
    for sector in (SECTORS, SECTORS - 7, 2**55, 2**64 - 1):
        assert disk.ask(READ, sector, (good, 0, 7)) == ERROR
        assert disk.ask(WRITE, sector, (good, 0, 7)) == ERROR
    for count in (0, 12, 255):
        assert disk.ask(READ, 0, (good, 0, 7), count=count) == ERROR
    for operation in (4, 7, 200):
        assert disk.ask(operation, 0, (good, 0, 7)) == NOT_SUPPORTED
    assert path.read_bytes() == PATTERN and disk.memory.read(at, 4096) == b"\xee" * 4096
    assert not disk.in_use(good) and not any(disk.in_use(reference) for reference in bad_grants[:6])
    assert disk.ask(READ, 0, (good, 0, 7)) == OKAY


def test_a_read_only_disk(guest: Guest, path: Path) -> None:
    guest.machine.attach_disk(DiskFile(path, readonly=True))
    disk = Disk(guest)
    assert disk.told("mode") == "r" and disk.told("info") == "4" and disk.told("feature-discard") is None
    reference, at = disk.page(b"x" * 4096)
    assert disk.ask(WRITE, 0, (reference, 0, 7)) == ERROR
    assert disk.ask(FLUSH, 0, (reference, 0, 7)) == ERROR
    assert disk.request(struct.pack("<BBH4xQQQ", DISCARD, 0, 0, 1, 0, 8)) == ERROR
    assert disk.ask(FLUSH) == OKAY
    assert disk.ask(READ, 0, (reference, 0, 7)) == OKAY and disk.memory.read(at, 4096) == PATTERN[:4096]


def test_what_the_host_refuses_is_an_error(disk: Disk, path: Path) -> None:
    reference, _ = disk.page()
    os.truncate(path, 4096)
    assert disk.ask(READ, 8, (reference, 0, 7)) == ERROR
    assert disk.ask(READ, 0, (reference, 0, 7)) == OKAY


def test_many_requests_at_once_go_around_the_ring(disk: Disk) -> None:
    pages = [disk.page() for _ in range(32)]
    for turn in range(4):
        for number, (reference, _) in enumerate(pages):
            head = struct.pack("<BBH4xQQ", READ, 1, 0, turn << 8 | number, number)
            disk.ring.put(head + struct.pack("<IBBH", reference, 0, 0, 0))
        disk.send()
        answers = [struct.unpack("<QBxh", disk.ring.next(12)) for _ in pages]
        assert answers == [(turn << 8 | number, READ, OKAY) for number in range(32)], "in order"
        for number, (_, at) in enumerate(pages):
            assert disk.memory.read(at, 512) == PATTERN[number * 512 : number * 512 + 512]
    assert disk.guest.machine.statistics()["xvda"]["reads"] == 128


@pytest.mark.parametrize("produced", [33, 1000, 0x80000000, 0xFFFFFFFF])
def test_a_ring_that_claims_more_than_it_can_hold(disk: Disk, path: Path, produced: int) -> None:
    disk.memory.write(disk.ring.at, struct.pack("<I", produced))
    disk.send()
    assert disk.told("state") == "5" and not disk.in_use(disk.ring.reference)
    disk.tell(state=6)
    disk.connect()
    assert disk.ask(FLUSH) == OKAY and path.read_bytes() == PATTERN


@pytest.mark.parametrize(
    "nodes",
    [
        {"ring_ref": "x"}, {"ring_ref": -1}, {"ring_ref": 0}, {"ring_ref": 1 << 31}, {"ring_ref": "9" * 2000},
        {"event_channel": 0}, {"event_channel": 4095}, {"event_channel": "٣"}, {"protocol": "x86_32-abi"},
    ],
)  # fmt: skip
def test_a_hand_shake_that_goes_wrong(guest: Guest, disk: Disk, nodes: dict[str, object]) -> None:
    disk.tell(state=6)
    disk.connect(**nodes)
    assert disk.told("state") == "5"
    disk.send()
    disk.tell(state=6)
    disk.connect()
    assert disk.told("state") == "4" and disk.ask(FLUSH) == OKAY


def test_a_front_end_that_goes_away(disk: Disk) -> None:
    disk.store.remove(disk.path, OWN_ID)
    assert disk.told("state") == "6" and not disk.in_use(disk.ring.reference)


def test_random_requests(disk: Disk) -> None:
    """Nothing but answers comes of them, and every grant is given back."""
    chance = random.Random(2)
    frames = {disk.guest.frame() for _ in range(8)}
    references = [disk.grant(frame) for frame in frames]
    mine = {frame for frame in range(disk.guest.frames.count) if disk.guest.frames.owns(frame)} - frames
    mine -= set(disk.guest.domain.own.grant_frames) | {disk.ring.frame, disk.guest.domain.own.shared_info}
    before = {frame: disk.memory.read(frame << 12, 4096) for frame in mine}
    for _ in range(1500):
        count = chance.choice((0, 1, 2, 11, 12, 255))
        raw = bytearray(chance.randbytes(REQUEST_SIZE))
        struct.pack_into("<BB", raw, 0, chance.choice((0, 1, 2, 3, 5, 6, 9)), count)
        struct.pack_into("<Q", raw, 16, chance.choice((0, 5, SECTORS, 2**40, chance.getrandbits(64))))
        for at in range(24, REQUEST_SIZE, 8):
            if chance.random() < 0.8:
                struct.pack_into("<IBBH", raw, at, chance.choice(references), chance.randrange(9), chance.randrange(9), 0)
        assert disk.request(bytes(raw)) in (OKAY, ERROR, NOT_SUPPORTED)
    assert not any(disk.in_use(reference) for reference in references)
    assert all(disk.memory.read(frame << 12, 4096) == content for frame, content in before.items())


def test_two_users_of_one_grant(disk: Disk) -> None:
    grants = disk.guest.domain.grants
    reference, _ = disk.page()
    first, second = grants.take(reference, write=True), grants.take(reference, write=False)
    first.release()
    assert disk.in_use(reference) == abi.GTF_READING
    first.release()
    second.release()
    assert disk.in_use(reference) == 0
