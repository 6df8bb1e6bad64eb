"""The store: its wire protocol, rights, transactions, watches and the ring (docs/misc/xenstore.txt, io/xs_wire.h)."""

from __future__ import annotations

import struct

import pytest

from trivisor.machine.memory import GuestMemory
from trivisor.paravirt.xen.toolstack import add_device, introduce
from trivisor.paravirt.xen.xenstore import protocol
from trivisor.paravirt.xen.xenstore.protocol import HEADER, Connection
from trivisor.paravirt.xen.xenstore.ring import StoreRing
from trivisor.paravirt.xen.xenstore.store import MOST_NODES, Store
from trivisor.paravirt.xen.xenstore.tree import StoreError


class Client:
    """The guest's side of a connection."""

    def __init__(self, store: Store) -> None:
        self.messages: list[tuple[int, int, bytes]] = []
        self.connection = Connection(store, 1, self._receive)
        self.number = 0

    def _receive(self, message: bytes) -> None:
        kind, number, _, length = HEADER.unpack_from(message)
        assert len(message) == HEADER.size + length
        self.messages.append((kind, number, message[HEADER.size :]))

    def ask(self, kind: int, *strings: str, transaction: int = 0) -> bytes:
        self.number += 1
        end = b"" if kind == protocol.WRITE else b"\0"
        payload = b"\0".join(text.encode() for text in strings) + end
        self.connection.request(kind, self.number, transaction, payload)
        reply = next(m for m in self.messages if m[1] == self.number)
        self.messages.remove(reply)
        if reply[0] == protocol.ERROR:
            raise StoreError(reply[2].rstrip(b"\0").decode())
        assert reply[0] == kind
        return reply[2]

    def events(self) -> list[list[bytes]]:
        found = [m[2].split(b"\0")[:2] for m in self.messages if m[0] == protocol.WATCH_EVENT]
        self.messages.clear()
        return found


@pytest.fixture
def store() -> Store:
    made = Store()
    introduce(made, 1, 4096)
    return made


@pytest.fixture
def client(store: Store) -> Client:
    return Client(store)


def test_reading_its_home_by_a_relative_path(client: Client) -> None:
    assert client.ask(protocol.READ, "domid") == b"1"
    assert client.ask(protocol.GET_DOMAIN_PATH, "1") == b"/local/domain/1\0"
    assert b"device\0" in client.ask(protocol.DIRECTORY, "/local/domain/1")


def test_writing_where_it_may(client: Client, store: Store) -> None:
    assert client.ask(protocol.WRITE, "data/deep/er", "x\0y") == b"OK\0"
    assert store.node("/local/domain/1/data/deep/er").value == b"x\0y"
    assert client.ask(protocol.GET_PERMS, "data/deep") == b"n1\0"
    with pytest.raises(StoreError, match="EACCES"):
        client.ask(protocol.WRITE, "domid", "0")
    with pytest.raises(StoreError, match="EACCES"):
        client.ask(protocol.WRITE, "/local/domain/0/mine", "0")


def test_a_node_that_is_not_for_it(client: Client, store: Store) -> None:
    store.write("/secret", "x")
    store.set_permissions("/secret", ((0, "n"),))
    with pytest.raises(StoreError, match="EACCES"):
        client.ask(protocol.READ, "/secret")
    with pytest.raises(StoreError, match="ENOENT"):
        client.ask(protocol.READ, "/nothing")


def test_removing(client: Client) -> None:
    client.ask(protocol.WRITE, "data/a/b", "1")
    client.ask(protocol.RM, "data/a")
    with pytest.raises(StoreError, match="ENOENT"):
        client.ask(protocol.READ, "data/a/b")
    assert client.ask(protocol.RM, "data/a") == b"OK\0", "its parent is there"
    with pytest.raises(StoreError, match="ENOENT"):
        client.ask(protocol.RM, "data/a/b/c")


def test_a_transaction_is_seen_when_it_is_committed(client: Client, store: Store) -> None:
    number = int(client.ask(protocol.TRANSACTION_START, "").rstrip(b"\0"))
    client.ask(protocol.WRITE, "data/t", "new", transaction=number)
    assert store.read("/local/domain/1/data/t") is None
    assert client.ask(protocol.READ, "data/t", transaction=number) == b"new"
    assert client.ask(protocol.TRANSACTION_END, "T", transaction=number) == b"OK\0"
    assert store.read("/local/domain/1/data/t") == "new"


def test_a_transaction_that_was_overtaken_is_to_be_made_again(client: Client, store: Store) -> None:
    number = int(client.ask(protocol.TRANSACTION_START, "").rstrip(b"\0"))
    client.ask(protocol.WRITE, "data/t", "new", transaction=number)
    store.write("/local/domain/1/memory/target", "1")
    with pytest.raises(StoreError, match="EAGAIN"):
        client.ask(protocol.TRANSACTION_END, "T", transaction=number)
    assert store.read("/local/domain/1/data/t") is None
    with pytest.raises(StoreError, match="ENOENT"):
        client.ask(protocol.READ, "domid", transaction=number)


def test_an_abandoned_transaction_changes_nothing(client: Client, store: Store) -> None:
    number = int(client.ask(protocol.TRANSACTION_START, "").rstrip(b"\0"))
    client.ask(protocol.WRITE, "data/t", "new", transaction=number)
    client.ask(protocol.TRANSACTION_END, "F", transaction=number)
    assert store.read("/local/domain/1/data/t") is None


def test_watches_tell_of_themselves_and_of_what_is_below(client: Client, store: Store) -> None:
    client.ask(protocol.WATCH, "control", "tok")
    assert client.events() == [[b"control", b"tok"]]
    store.write("/local/domain/1/control/shutdown", "poweroff")
    store.write("/local/domain/1/name", "other")
    assert client.events() == [[b"control/shutdown", b"tok"]]
    with pytest.raises(StoreError, match="EEXIST"):
        client.ask(protocol.WATCH, "control", "tok")
    client.ask(protocol.UNWATCH, "control", "tok")
    store.write("/local/domain/1/control/shutdown", "")
    assert client.events() == []
    with pytest.raises(StoreError, match="ENOENT"):
        client.ask(protocol.UNWATCH, "control", "tok")


def test_a_committed_transaction_fires_watches(client: Client) -> None:
    client.ask(protocol.WATCH, "/local/domain/1/data", "w")
    client.events()
    number = int(client.ask(protocol.TRANSACTION_START, "").rstrip(b"\0"))
    client.ask(protocol.WRITE, "data/x", "1", transaction=number)
    assert client.events() == []
    client.ask(protocol.TRANSACTION_END, "T", transaction=number)
    assert client.events() == [[b"/local/domain/1/data/x", b"w"]]


def test_a_front_end_is_the_guests_to_write_and_a_back_end_to_read(client: Client, store: Store) -> None:
    front, back = add_device(store, 1, "vbd", 51712, {"virtual-device": "51712"}, {"mode": "w"})
    client.ask(protocol.WRITE, f"{front}/state", "4")
    assert store.read(f"{front}/state") == "4"
    assert client.ask(protocol.READ, f"{back}/mode") == b"w"
    with pytest.raises(StoreError, match="EACCES"):
        client.ask(protocol.WRITE, f"{back}/mode", "r")


def test_a_guest_that_makes_nodes_without_end_is_stopped(client: Client) -> None:
    with pytest.raises(StoreError, match="ENOSPC"):
        for number in range(MOST_NODES + 1):
            client.ask(protocol.MKDIR, f"data/{number}")
    with pytest.raises(StoreError, match="ENOSPC"):
        client.ask(protocol.WRITE, "data/0", "x" * 4000)


def test_deep_trees(client: Client, store: Store) -> None:
    with pytest.raises(StoreError, match="ENOSPC"):
        client.ask(protocol.MKDIR, "data/" + "/".join("a" * 1500))
    deep = "data/" + "/".join("a" * 900)
    client.ask(protocol.WRITE, deep, "x")
    assert client.ask(protocol.READ, deep) == b"x"
    client.ask(protocol.RM, deep)
    with pytest.raises(StoreError, match="ENOENT"):
        client.ask(protocol.READ, deep)
    client.ask(protocol.RM, "data/a")
    client.ask(protocol.MKDIR, "data/" + "/".join("b" * 900))
    for path in ("/local/domain/1/data/" + "/".join("c" * 1400), "/" + "/".join("d" * 1500)):
        store.write(path, "y")  # a back end has no limits
        assert store.read(path) == "y"
        store.remove(path)


@pytest.mark.parametrize("path", ["", "//", "/a//b", "/a/", "a b", "/" + "x" * 4000, "/\xff"])
def test_bad_paths(client: Client, path: str) -> None:
    with pytest.raises(StoreError, match="EINVAL"):
        client.ask(protocol.READ, path)


def test_unknown_and_malformed_requests_are_errors(client: Client) -> None:
    for kind in (23, 99, 0xFFFFFFFF):
        with pytest.raises(StoreError, match="ENOSYS"):
            client.ask(kind, "x")
    for kind in range(23):
        for payload in (b"", b"\0", b"\xff\xfe", b"a" * 4096):
            client.connection.request(kind, 1, 0, payload)
            client.connection.request(kind, 1, 77, payload)


@pytest.fixture
def memory():
    made = GuestMemory(16 << 20)
    yield made
    made.close()


class RingGuest:
    def __init__(self, memory: GuestMemory, store: Store) -> None:
        self.memory = memory
        self.notified = 0
        self.ring = StoreRing(memory, 0x1000, store, 1, self._notify)

    def _notify(self) -> None:
        self.notified += 1

    def send(self, data: bytes) -> None:
        produced = self.memory.read_u32(0x1000 + 2052)
        for index, byte in enumerate(data):
            self.memory.write_u8(0x1000 + (produced + index) % 1024, byte)
        self.memory.write(0x1000 + 2052, struct.pack("<I", produced + len(data) & 0xFFFFFFFF))
        self.ring.guest_sent()

    def receive(self) -> bytes:
        consumed, produced = struct.unpack("<II", self.memory.read(0x1000 + 2056, 8))
        data = bytes(
            self.memory.read_u8(0x1000 + 1024 + (consumed + i) % 1024) for i in range(produced - consumed & 0xFFFFFFFF)
        )
        self.memory.write(0x1000 + 2056, struct.pack("<I", produced))
        return data


def test_requests_and_replies_through_the_ring_in_pieces(memory, store: Store) -> None:
    guest = RingGuest(memory, store)
    request = HEADER.pack(protocol.READ, 9, 0, 6) + b"domid\0"
    for _ in range(200):  # so often that the indices go around the ring
        guest.send(request[:7])
        assert guest.receive() == b""
        guest.send(request[7:])
        assert guest.receive() == HEADER.pack(protocol.READ, 9, 0, 1) + b"1"
    assert guest.notified


def test_a_long_reply_waits_for_room(memory, store: Store) -> None:
    store.write("/local/domain/1/data/long", b"z" * 2000)
    guest = RingGuest(memory, store)
    guest.send(HEADER.pack(protocol.READ, 1, 0, 10) + b"data/long\0")
    received = b""
    while piece := guest.receive():
        received += piece
        guest.ring.guest_sent()
    assert received == HEADER.pack(protocol.READ, 1, 0, 2000) + b"z" * 2000


def test_a_guest_that_breaks_the_protocol_is_told_and_left_alone(memory, store: Store) -> None:
    guest = RingGuest(memory, store)
    guest.send(HEADER.pack(protocol.READ, 1, 0, 5000))
    assert memory.read_u32(0x1000 + 2072) == 3
    guest.send(HEADER.pack(protocol.READ, 1, 0, 6) + b"domid\0")
    assert guest.receive() == b""
    other = RingGuest(memory, store)
    memory.write(0x1000 + 2048, struct.pack("<II", 0, 5000))
    other.ring.guest_sent()
    assert memory.read_u32(0x1000 + 2072) == 2
