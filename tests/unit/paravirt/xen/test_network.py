"""The network's back end: frames in one piece and in many, checksums, and guests that break the rules (io/netif.h)."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from tests.unit.paravirt.xen.conftest import Guest
from tests.unit.paravirt.xen.front_end import FrontEnd, FrontRing
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.back_ends.checksums import fill_checksum
from trivisor.paravirt.xen.back_ends.network import (
    CSUM_BLANK,
    ERROR,
    EXTRA_INFO,
    MORE_DATA,
    NULL,
    OKAY,
    RX_SIZE,
    TX_SIZE,
)
from trivisor.paravirt.xen.domain import OWN_ID
from trivisor.paravirt.xen.frames import L1

ETHERNET = bytes(range(12)) + b"\x88\xb5"
FRAME = ETHERNET + b"payload " * 20


class Wire:
    """A link that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.deliver: Callable[[bytes], None] = lambda frame: None
        self.closed = False

    def plug(self, deliver: Callable[[bytes], None]) -> Wire:
        self.deliver = deliver
        return self

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)

    def close(self) -> None:
        self.closed = True


class Card(FrontEnd):
    """netfront, with requests made by hand."""

    def __init__(self, guest: Guest, wire: Wire) -> None:
        super().__init__(guest, "vif", 0)
        self.wire = wire
        self.connect()

    def connect(self, **instead: object) -> None:
        self.tx, self.rx = FrontRing(self, TX_SIZE), FrontRing(self, RX_SIZE)
        nodes: dict[str, object] = {
            "tx_ring_ref": self.tx.reference, "rx_ring_ref": self.rx.reference, "event_channel": self.open_port(),
            "request_rx_copy": 1, "feature_sg": 1, "feature_rx_notify": 1,
        }  # fmt: skip
        self.tell(state=1, **{**nodes, **instead})
        self.tell(state=4)

    def page(self, content: bytes = b"") -> tuple[int, int]:
        """(a grant, the address of its page)."""
        frame = self.guest.frame()
        self.memory.write(frame << 12, content)
        return self.grant(frame), frame << 12

    def offer(self, count: int) -> list[int]:
        """Give room for `count` pieces; the addresses of the pages."""
        pages = [self.page() for _ in range(count)]
        for number, (reference, _) in enumerate(pages):
            self.rx.put(struct.pack("<HHI", number, 0, reference))
        return [at for _, at in pages]

    def status(self, number: int) -> int:
        """The next answer to a request to send, which is to be to `number`."""
        answered, status = struct.unpack("<Hh", self.tx.next(4))
        assert answered == number
        return int(status)

    def receive(self) -> tuple[int, int, int, int]:
        """The next answer on the ring of received frames: (id, offset, flags, status)."""
        number, offset, flags, status = struct.unpack("<HHHh", self.rx.next(8))
        return number, offset, flags, status


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture(params=[1, 2], ids="grants{}".format)
def card(guest: Guest, wire: Wire, request: pytest.FixtureRequest) -> Card:
    guest.domain.grants.set_version(request.param)
    guest.machine.attach_network(wire.plug)
    return Card(guest, wire)


def test_the_hand_shake(card: Card, guest: Guest) -> None:
    assert card.told("state") == "4" and card.told("feature-rx-copy") == "1"
    mac = card.store.read(f"{card.path}/mac")
    assert mac is not None and mac.startswith("00:16:3e:")
    card.tell(state=6)
    assert card.told("state") == "6" and not card.in_use(card.tx.reference) and not card.in_use(card.rx.reference)
    card.connect()
    assert card.told("state") == "4"
    guest.machine.close_devices()
    assert card.wire.closed


def test_a_frame_out_in_one_piece(card: Card) -> None:
    reference, _ = card.page(bytes(100) + FRAME)
    card.tx.put(struct.pack("<IHHHH", reference, 100, 0, 7, len(FRAME)))
    card.send()
    assert card.status(7) == OKAY and card.wire.sent == [FRAME] and not card.in_use(reference)


def test_a_frame_out_in_many_pieces(card: Card) -> None:
    whole = ETHERNET + random.Random(1).randbytes(4096 * 3)
    first, second, third = whole[:1000], whole[1000:5096], whole[5096:9192]
    fourth = whole[9192:]
    pieces = [(card.page(piece)[0], piece) for piece in (first, second, third, fourth)]
    for number, (reference, piece) in enumerate(pieces):
        flags = MORE_DATA if number < 3 else 0
        card.tx.put(struct.pack("<IHHHH", reference, 0, flags, number, len(piece) if number else len(whole)))
    card.send()
    assert [card.status(number) for number in range(4)] == [OKAY] * 4
    assert card.wire.sent == [whole]


def test_extra_slots_are_answered_too(card: Card) -> None:
    reference, _ = card.page(FRAME)
    card.tx.put(struct.pack("<IHHHH", reference, 0, EXTRA_INFO, 3, len(FRAME)))
    card.tx.put(struct.pack("<BB6x", 2, 1))
    card.tx.put(struct.pack("<BBHBxH", 1, 0, 1448, 1, 0))
    card.tx.put(struct.pack("<IHHHH", reference, 0, 0, 4, len(FRAME)))
    card.send()
    assert card.status(3) == OKAY and card.status(0) == NULL and card.status(0) == NULL and card.status(4) == OKAY
    assert card.wire.sent == [FRAME] * 2


def checksum_is_right(frame: bytes) -> bool:
    start = 14 + (frame[14] & 15) * 4
    end = 14 + int.from_bytes(frame[16:18], "big")
    data = frame[26:34] + struct.pack(">HH", frame[23], end - start) + frame[start:end]
    data += bytes(len(data) & 1)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


def packet(protocol: int, length: int, chance: random.Random) -> bytes:
    """An Ethernet frame with an IPv4 packet of `length` bytes after its header, whose checksum is nonsense."""
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 1, 0x4000, 64, protocol, 0, b"\n\0\2\17", b"\n\0\2\2")
    return bytes(12) + b"\x08\0" + header + chance.randbytes(length)


def test_checksums_are_filled_in(card: Card) -> None:
    chance = random.Random(3)
    for protocol in (6, 17):
        for length in (20, 21, 1000, 1481):
            frame = packet(protocol, length, chance)
            reference, _ = card.page(frame)
            card.tx.put(struct.pack("<IHHHH", reference, 0, CSUM_BLANK, 1, len(frame)))
            card.send()
            assert card.status(1) == OKAY
            assert checksum_is_right(card.wire.sent[-1]) and not checksum_is_right(frame)
    quiet = bytearray(packet(17, 20, chance))
    quiet[26:] = bytes(len(quiet) - 26)
    fill_checksum(quiet)
    assert quiet[40:42] != b"\0\0", "a UDP checksum of 0 means none"


def test_checksums_of_cut_packets() -> None:
    chance = random.Random(4)
    for _ in range(2000):
        frame = bytearray(packet(chance.choice((6, 17, 1)), chance.randrange(60), chance))
        for _ in range(3):
            frame[chance.choice((12, 13, 14, 16, 17, 20, 21, 23))] = chance.randrange(256)
        frame = frame[: chance.randrange(len(frame) + 1)]
        before = len(frame)
        fill_checksum(frame)
        assert len(frame) == before


def test_frames_in(card: Card) -> None:
    pages = card.offer(6)
    long = ETHERNET + random.Random(5).randbytes(9000)
    card.wire.deliver(FRAME)
    card.wire.deliver(long)
    assert card.receive() == (0, 0, 1, len(FRAME))
    assert card.memory.read(pages[0], len(FRAME)) == FRAME
    assert [card.receive() for _ in range(3)] == [
        (1, 0, 1 | MORE_DATA, 4096), (2, 0, MORE_DATA, 4096), (3, 0, 0, len(long) - 8192)
    ]  # fmt: skip
    assert b"".join(card.memory.read(at, 4096) for at in pages[1:4])[: len(long)] == long


def test_frames_wait_for_room(card: Card) -> None:
    for number in range(3):
        card.wire.deliver(FRAME + bytes([number]))
    card.guest.domain.platform.clock.run_due()
    assert card.rx.responses == 0
    pages = card.offer(2)
    assert card.memory.read_u32(card.rx.at + 4) == 1, "an event is wanted with the first room"
    card.send()
    for number in range(2):
        assert card.receive()[0] == number
        assert card.memory.read(pages[number], len(FRAME) + 1) == FRAME + bytes([number])
    for _ in range(1000):
        card.wire.deliver(FRAME)
    card.guest.domain.platform.clock.run_due()
    assert card.guest.machine.statistics()["eth0"]["frames lost"] == 1000 - 511


def test_a_long_frame_waits_until_there_is_room_for_all_of_it(card: Card) -> None:
    card.offer(1)
    card.wire.deliver(ETHERNET + bytes(5000))
    card.guest.domain.platform.clock.run_due()
    assert card.rx.responses == 0 and card.memory.read_u32(card.rx.at + 4) == 2
    card.offer(1)
    card.send()
    assert card.receive()[3] == 4096 and card.receive()[3] == 14 + 5000 - 4096


def test_long_frames_are_not_for_every_front_end(card: Card) -> None:
    card.tell(state=6)
    card.connect(feature_sg=0)
    card.offer(3)
    card.wire.deliver(ETHERNET + bytes(5000))
    card.wire.deliver(FRAME)
    assert card.receive()[3] == len(FRAME)


def test_bad_requests_are_answered_and_do_nothing(card: Card) -> None:
    table = card.guest.frame()
    card.guest.domain.tables.get_kind(table, L1)
    good, _ = card.page(FRAME)
    foreign = card.grant(card.guest.frame(), abi.GTF_PERMIT_ACCESS, 5)
    requests = [
        (foreign, 0, 100), (0xFFFFFFFF, 0, 100), (card.grant(0xFFFFFF), 0, 100), (0, 0, 100),
        (good, 4000, 100), (good, 0xFFFF, 0xFFFF), (good, 0, 4097), (good, 0, 13), (good, 0, 0),
    ]  # fmt: skip
    for reference, offset, length in requests:
        card.tx.put(struct.pack("<IHHHH", reference, offset, 0, 9, length))
        card.send()
        assert card.status(9) == ERROR
    # pieces that are longer than the whole, and too many of them
    card.tx.put(struct.pack("<IHHHH", good, 0, MORE_DATA, 0, 50))
    card.tx.put(struct.pack("<IHHHH", good, 0, 0, 1, 60))
    card.send()
    assert card.status(0) == ERROR and card.status(1) == ERROR
    for number in range(30):
        card.tx.put(struct.pack("<IHHHH", good, 0, MORE_DATA if number < 29 else 0, number, 3 if number else 100))
    card.send()
    assert [card.status(number) for number in range(30)] == [ERROR] * 30
    assert card.wire.sent == []
    for reference in (card.grant(table), card.grant(card.guest.frame(), abi.GTF_PERMIT_ACCESS | abi.GTF_READONLY), 0):
        card.rx.put(struct.pack("<HHI", 1, 0, reference))
        card.wire.deliver(FRAME)
        assert card.receive()[3] == ERROR
    assert card.memory.read(table << 12, 4096) == bytes(4096)


@pytest.mark.parametrize("flags", [MORE_DATA, EXTRA_INFO])
def test_a_frame_without_an_end(card: Card, flags: int) -> None:
    reference, _ = card.page(FRAME)
    card.tx.put(struct.pack("<IHHHH", reference, 0, flags, 1, len(FRAME)))
    card.send()
    assert card.told("state") == "5" and card.wire.sent == []
    card.tell(state=6)
    card.connect()
    assert card.told("state") == "4"


@pytest.mark.parametrize("which", ["tx", "rx"])
def test_a_ring_that_claims_more_than_it_can_hold(card: Card, which: str) -> None:
    ring = card.tx if which == "tx" else card.rx
    card.memory.write(ring.at, struct.pack("<I", 257))
    card.wire.deliver(FRAME)
    card.send()
    card.guest.domain.platform.clock.run_due()
    assert card.told("state") == "5"
    card.wire.deliver(FRAME)
    card.guest.domain.platform.clock.run_due()


@pytest.mark.parametrize(
    "nodes",
    [{"request_rx_copy": 0}, {"tx_ring_ref": "x"}, {"rx_ring_ref": 1 << 30}, {"event_channel": 77}],
)  # fmt: skip
def test_a_hand_shake_that_goes_wrong(card: Card, nodes: dict[str, object]) -> None:
    card.tell(state=6)
    card.connect(**nodes)
    assert card.told("state") == "5"
    assert not card.in_use(card.tx.reference) and not card.in_use(card.rx.reference)


def test_random_requests(card: Card) -> None:
    """Nothing but answers, or the end of the connection, comes of them."""
    chance = random.Random(6)
    references = [card.page(FRAME)[0] for _ in range(4)]
    for _ in range(400):
        for _ in range(chance.randrange(1, 12)):
            reference = chance.choice((*references, chance.getrandbits(32)))
            offset, size = chance.choice((0, 100, 5000)), chance.choice((0, 60, 100, 4096, 65535))
            card.tx.put(struct.pack("<IHHHH", reference, offset, chance.choice((0, 0, 4, 8, 13)), 1, size))
            card.rx.put(struct.pack("<HHI", 1, 0, reference))
        card.wire.deliver(chance.randbytes(chance.choice((14, 1500, 9000))))
        card.send()
        card.guest.domain.platform.clock.run_due()
        if card.told("state") == "5":
            card.tell(state=6)
            card.last_grant = 100
            card.connect()
        else:
            card.tx.seen, card.rx.seen = card.tx.responses, card.rx.responses
    assert card.told("state") in ("4", "5")
    card.store.remove(card.path, OWN_ID)
    assert card.told("state") in ("5", "6") and not any(card.in_use(reference) for reference in references)
