"""Disks and networks in a snapshot: the front end goes on with its rings as if nothing had been, whatever was under way.

The theory: what was taken from a ring is answered before anything is saved, so that a connection is its pages, how
far they are answered, and a port.  All of it is held again by the rules by which it was taken at first.
"""

from __future__ import annotations

import json
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.paravirt.xen.conftest import Guest, StillCpu
from tests.unit.paravirt.xen.front_end import FrontEnd, FrontRing
from tests.unit.paravirt.xen.test_block import PATTERN, SECTORS, Disk
from tests.unit.paravirt.xen.test_network import FRAME, Card, Wire
from tests.unit.paravirt.xen.test_saving import machine_for
from trivisor.devices.disk_file import DiskFile
from trivisor.machine.saving import Saved
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.back_ends.block import FLUSH, OKAY, READ, WRITE
from trivisor.paravirt.xen.back_ends.network import MORE_DATA
from trivisor.paravirt.xen.frames import L1, L4
from trivisor.paravirt.xen.grants import BACK_END_DOMAIN
from trivisor.paravirt.xen.machine import XenMachine

Attach = Callable[[XenMachine], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk"
    made.write_bytes(PATTERN)
    return made


@pytest.fixture
def guest(guest: Guest) -> Guest:
    """With the console's and the store's rings, as every domain has them."""
    store_port, console_port = (guest.events.allocate_unbound(BACK_END_DOMAIN) for _ in range(2))
    frames = [guest.frame(), guest.frame()]
    for frame in frames:
        guest.frames.hold(frame, writable=True)
    guest.machine._rings = (frames[0], console_port, frames[1], store_port)
    console, ring = guest.machine._make_rings()
    guest.events.bind_back_end(console_port, console.guest_sent)
    guest.events.bind_back_end(store_port, ring.guest_sent)
    return guest


def disks(*files: Path, readonly: bool = False) -> Attach:
    def attach(machine: XenMachine) -> None:
        for file in files:
            machine.attach_disk(DiskFile(file, readonly=readonly))

    return attach


def taken(machine: XenMachine) -> tuple[Saved, bytes]:
    """What a snapshot has; the machine's devices are closed."""
    machine.quiesce()
    saved = json.loads(json.dumps(machine.save()))
    memory = bytes(machine.memory.view)
    machine.close_devices()
    return saved, memory


Again = Callable[[tuple[Saved, bytes], Attach], Guest]


@pytest.fixture
def again() -> Iterator[Again]:
    """Make a machine of what was taken; raises what loading raises."""
    made: list[XenMachine] = []

    def restore(snapshot: tuple[Saved, bytes], attach: Attach) -> Guest:
        saved, memory = snapshot
        cpu = StillCpu()
        machine = machine_for(cpu)
        try:
            attach(machine)
            machine.memory.view[:] = memory
            machine.load(saved)
            machine.go_on(saved, [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400])
        except BaseException:
            machine.close()
            raise
        made.append(machine)
        return Guest(machine, cpu, [])

    yield restore
    for machine in made:
        machine.close()


def moved(front: FrontEnd, guest: Guest, rings: Sequence[FrontRing]) -> None:
    """The front end is in another machine's memory from now on."""
    front.guest, front.memory, front.store = guest, guest.domain.memory, guest.machine.store
    for ring in rings:
        ring.memory = front.memory


def columns(guest: Guest) -> list[Any]:
    frames = guest.frames
    return [bytes(column) for column in (frames.owner, frames.kind, frames.kind_count, frames.references)]


def read(disk: Disk, sector: int) -> bytes:
    reference, at = disk.page()
    assert disk.ask(READ, sector, (reference, 0, 0)) == OKAY
    return disk.memory.read(at, 512)


# -- the disk ------------------------------------------------------------------------------------------------


def test_a_disk_goes_on(guest: Guest, path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path))
    disk = Disk(guest)
    reference, _ = disk.page(b"w" * 4096)
    for _ in range(disk.ring.size + 3):  # the ring's indices are beyond its size
        assert disk.ask(WRITE, 8, (reference, 0, 0)) == OKAY
    before = columns(guest)
    restored = again(taken(guest.machine), disks(path))
    assert columns(restored) == before and restored.machine.changed_disks == []
    moved(disk, restored, [disk.ring])
    assert disk.told("state") == "4" and disk.in_use(disk.ring.reference)
    assert read(disk, 8) == b"w" * 512 and read(disk, 9) == PATTERN[9 * 512 : 10 * 512]
    assert disk.ask(FLUSH) == OKAY
    disk.tell(state=6)
    assert disk.told("state") == "6" and not disk.in_use(disk.ring.reference), "the ring's page is given back"
    disk.connect()
    assert read(disk, 8) == b"w" * 512


def test_requests_under_way_are_done_and_answered_in_the_snapshot(
    guest: Guest, path: Path, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.machine.attach_disk(DiskFile(path))
    disk = Disk(guest)
    slow, flushes = threading.Event(), []
    write, fetch, flush = DiskFile.write, DiskFile.read, DiskFile.flush

    def after(method: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: (slow.wait(10), method(*arguments))[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(DiskFile, "write", after(write))
    monkeypatch.setattr(DiskFile, "read", after(fetch))
    monkeypatch.setattr(DiskFile, "flush", lambda self: (flushes.append(1), flush(self))[1])  # type: ignore[func-returns-value]
    (out, _), (into, at) = disk.page(b"new " * 1024), disk.page()
    for number, (operation, sector, reference) in enumerate([(WRITE, 16, out), (READ, 0, into)]):
        head = struct.pack("<BBH4xQQ", operation, 1, 0, number, sector)
        disk.ring.put(head + struct.pack("<IBBH", reference, 0, 7, 0))
    disk.send()
    time.sleep(0.02)
    assert disk.ring.responses == 0 and path.read_bytes() == PATTERN, "both are under way"
    threading.Timer(0.1, slow.set).start()
    snapshot = taken(guest.machine)
    assert path.read_bytes()[16 * 512 : 24 * 512] == b"new " * 1024
    assert flushes, "and it is on the host's own disk"
    restored = again(snapshot, disks(path))
    moved(disk, restored, [disk.ring])
    for number in range(2):
        assert struct.unpack("<Q2xh", disk.ring.next(12)) == (number, OKAY)
    assert disk.memory.read(at, 4096) == PATTERN[:4096]
    assert not disk.in_use(out) and not disk.in_use(into), "their pages were given back"
    pending = (restored.domain.own.shared_info << 12) + abi.SHARED_EVTCHN_PENDING
    assert restored.machine.memory.view[pending + disk.port // 8] >> disk.port % 8 & 1, "and the guest was told"
    assert read(disk, 16) == b"new " * 128


def test_what_the_ring_itself_says_was_answered_is_the_guests_to_change(guest: Guest, path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path))
    disk = Disk(guest)
    read(disk, 0)
    guest.domain.memory.write(disk.ring.at + 8, b"\x77\0\0\0")
    restored = again(taken(guest.machine), disks(path))
    moved(disk, restored, [disk.ring])
    restored.domain.memory.write(disk.ring.at + 8, b"\1\0\0\0")
    assert read(disk, 3) == PATTERN[3 * 512 : 4 * 512]


@pytest.mark.parametrize("states", [(5,), (6,), (6, 1)])
def test_front_ends_that_are_not_connected(guest: Guest, path: Path, again: Again, states: tuple[int, ...]) -> None:
    guest.machine.attach_disk(DiskFile(path))
    disk = Disk(guest)
    for state in states:
        disk.tell(state=state)
    restored = again(taken(guest.machine), disks(path))
    moved(disk, restored, [])
    assert disk.told("state") == str(max(states[-1], 2))
    disk.connect()
    assert disk.told("state") == "4" and read(disk, 5) == PATTERN[5 * 512 : 6 * 512]


def test_a_port_that_the_guest_has_closed(guest: Guest, path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path))
    disk = Disk(guest)
    guest.events.close(disk.port)
    restored = again(taken(guest.machine), disks(path))
    moved(disk, restored, [disk.ring])
    disk.tell(state=6)
    disk.connect()
    assert read(disk, 0) == PATTERN[:512]


def test_a_ring_on_a_page_that_the_guest_has_given_back(guest: Guest, path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path))
    disk = Disk(guest)
    guest.frames.release(disk.ring.frame)
    owned = guest.frames.owned
    restored = again(taken(guest.machine), disks(path))
    assert restored.frames.owned == owned and restored.frames.owns(disk.ring.frame)
    moved(disk, restored, [disk.ring])
    disk.tell(state=6)
    assert not restored.frames.owns(disk.ring.frame), "nothing uses it any more"


def test_disks_are_to_be_the_same(guest: Guest, path: Path, tmp_path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path))
    Disk(guest)
    snapshot = taken(guest.machine)
    longer = tmp_path / "longer"
    longer.write_bytes(PATTERN + bytes(512))
    for attach, says in (
        (disks(), "had xvda and is given no device"),
        (disks(path, longer), "had xvda and is given xvda, xvdb"),
        (disks(longer), f"xvda had {SECTORS * 512} bytes, and {longer} has {SECTORS * 512 + 512}"),
        (disks(path, readonly=True), f"xvda was writable, and {path} is not"),
        (lambda machine: machine.attach_network(Wire().plug), "had xvda and is given eth0"),
    ):
        with pytest.raises(ValueError, match=says):
            again(snapshot, attach)
    assert path.read_bytes() == PATTERN


def test_a_disk_that_was_written_to_meanwhile_is_told_of(guest: Guest, path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path))
    Disk(guest)
    snapshot = taken(guest.machine)
    time.sleep(0.02)
    path.write_bytes(PATTERN)
    assert again(snapshot, disks(path)).machine.changed_disks == [("xvda", path)]


def test_a_disk_that_cannot_be_flushed_is_in_no_snapshot(
    guest: Guest, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.machine.attach_disk(DiskFile(path))

    def fail(self: DiskFile) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(DiskFile, "flush", fail)
    with pytest.raises(OSError, match=f"{path}: Input/output error"):
        guest.machine.save()


# -- the network ---------------------------------------------------------------------------------------------


def test_a_network_goes_on_with_another_link(guest: Guest, again: Again) -> None:
    first, second = Wire(), Wire()
    guest.machine.attach_network(first.plug)
    card = Card(guest, first)
    places = card.offer(4)
    first.deliver(FRAME)
    assert card.receive()[3] == len(FRAME)
    first.deliver(FRAME)  # nobody has fetched it when the snapshot is made
    before = columns(guest)
    restored = again(taken(guest.machine), lambda machine: machine.attach_network(second.plug))
    assert columns(restored) == before and first.closed
    moved(card, restored, [card.tx, card.rx])
    restored.domain.platform.clock.run_due()
    assert card.rx.responses == 1, "that one is lost, as on any network"
    reference, _ = card.page(FRAME)
    card.tx.put(struct.pack("<IHHHH", reference, 0, 0, 5, len(FRAME)))
    card.send()
    assert card.status(5) == OKAY and second.sent == [FRAME]
    whole = FRAME[:14] + random.Random(3).randbytes(5000)
    second.deliver(whole)
    assert card.receive() == (1, 0, 1 | MORE_DATA, 4096) and card.receive()[3] == len(whole) - 4096
    assert card.memory.read(places[1], 4096) + card.memory.read(places[2], len(whole) - 4096) == whole


def test_a_card_that_takes_no_frames_in_pieces_still_does_not(guest: Guest, again: Again) -> None:
    wire = Wire()
    guest.machine.attach_network(Wire().plug)
    card = Card(guest, wire)
    card.tell(state=6)
    card.connect(feature_sg=0)
    restored = again(taken(guest.machine), lambda machine: machine.attach_network(wire.plug))
    moved(card, restored, [card.tx, card.rx])
    card.offer(3)
    wire.deliver(bytes(6000))
    restored.domain.platform.clock.run_due()
    assert restored.machine.statistics()["eth0"] == {"frames lost": 1}


# -- what a file may say -------------------------------------------------------------------------------------


def test_rings_that_cannot_be_are_refused(guest: Guest, path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path, readonly=True))
    disk = Disk(guest)
    table = guest.frame()
    guest.domain.tables.get_kind(table, L1)
    read(disk, 0)
    saved, memory = taken(guest.machine)
    (reference, frame, answered) = saved["back_ends"]["xvda"]["rings"][0]
    for change in (
        {"rings": [[reference, guest.frames._free[-1], answered]]},  # a frame that is nobody's
        {"rings": [[reference, 3, answered]], "state": 3},
        {"rings": [[reference, 1 << 39, answered]]},  # beyond all memory
        {"rings": [[reference, guest.domain.own.end - 1, answered]]},  # Xen's own
        {"rings": [[reference, guest.domain.state.kernel_root, answered]]},  # a page table
        {"rings": [[1 << 20, frame, answered]]},  # a grant beyond the table
        {"rings": [[reference, frame, 1 << 32]]},
        {"rings": [[reference, frame]]},
        {"rings": [[reference, frame, answered]] * 2},
        {"rings": []},
        {"state": 0},
        {"state": 7},
        {"state": 2},
        {"port": 4096},
        {"disk": [SECTORS, 0, 0]},
        {"disk": [SECTORS]},
        {"disk": None},
    ):
        made = json.loads(json.dumps(saved))
        made["back_ends"]["xvda"].update(change)
        with pytest.raises(ValueError) as refusal:
            again((made, memory), disks(path, readonly=True))
        assert "\n" not in str(refusal.value), change
    for devices in ([], None, {}, {"xvda\nand more" * 1000: {}}, {"xvda": []}, {"xvda": {}}, {"xvdb": saved["back_ends"]["xvda"]}):
        with pytest.raises(ValueError) as refusal:
            again(({**saved, "back_ends": devices}, memory), disks(path, readonly=True))
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200, devices
    assert guest.frames.kind[guest.domain.state.kernel_root] == L4


def test_an_index_that_cannot_be_ends_the_connection(guest: Guest, path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path))
    disk = Disk(guest)
    read(disk, 0)
    saved, memory = taken(guest.machine)
    saved["back_ends"]["xvda"]["rings"][0][2] = 0x80000000
    restored = again((saved, memory), disks(path))
    moved(disk, restored, [disk.ring])
    disk.send()
    assert disk.told("state") == "5" and not disk.in_use(disk.ring.reference)
    disk.connect()
    assert read(disk, 0) == PATTERN[:512]


def test_ports_that_are_not_a_back_ends_are_left_alone(guest: Guest, path: Path, again: Again) -> None:
    guest.machine.attach_disk(DiskFile(path))
    disk = Disk(guest)
    guest.put("<II", abi.VIRQ_TIMER, 0)
    assert guest.call("event_channel_op", abi.EVTCHNOP_BIND_VIRQ, 0x10000) == 0
    (virq,) = guest.get("<I", at=0x10008)
    saved, memory = taken(guest.machine)
    for port in (virq, 0, 4095, guest.machine._rings[1]):
        saved["back_ends"]["xvda"]["port"] = port
        restored = again((saved, memory), disks(path))
        moved(disk, restored, [disk.ring])
        restored.events.raise_virq(abi.VIRQ_TIMER)
        disk.tell(state=6)
        assert disk.told("state") == "6"
        restored.machine.save()
        restored.machine.close_devices()
