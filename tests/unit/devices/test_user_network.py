"""The user-mode network from its guest's side, frame by frame; skipped where libslirp is not installed."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from trivisor.devices import user_network
from trivisor.devices.user_network import NetworkUnavailable, UserNetwork

MAC = bytes.fromhex("00163e000001")
GUEST, ROUTER = bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2])


class Cable:
    """What the network delivers."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def wait(self, wanted: Callable[[bytes], bool]) -> bytes:
        """The first frame that is `wanted`."""
        deadline = time.monotonic() + 10
        while not (found := [frame for frame in self.frames if wanted(frame)]):
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.005)
        return found[0]


@pytest.fixture
def cable() -> Cable:
    return Cable()


@pytest.fixture
def network(cable: Cable) -> Iterator[UserNetwork]:
    try:
        made = UserNetwork(cable.frames.append)
    except NetworkUnavailable as reason:
        pytest.skip(str(reason))
    yield made
    made.close()
    made.close()


def arp(operation: int, target: bytes) -> bytes:
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation)
    return b"\xff" * 6 + MAC + b"\x08\x06" + head + MAC + GUEST + bytes(6) + target


def checksum(data: bytes) -> int:
    return 0xFFFF - int.from_bytes(data + bytes(len(data) & 1), "big") % 0xFFFF


def udp(source: tuple[bytes, int], target: tuple[bytes, int], content: bytes) -> bytes:
    """A frame to the router, or to all."""
    header = struct.pack(">BBHHHBBH", 0x45, 0, 28 + len(content), 1, 0, 64, 17, 0) + source[0] + target[0]
    header = header[:10] + checksum(header).to_bytes(2, "big") + header[12:]
    body = struct.pack(">HHHH", source[1], target[1], 8 + len(content), 0) + content
    return b"\xff" * 6 + MAC + b"\x08\x00" + header + body


def test_the_router_answers(network: UserNetwork, cable: Cable) -> None:
    network.send(arp(1, ROUTER))
    reply = cable.wait(lambda frame: frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2")
    assert reply[:6] == MAC and reply[28:32] == ROUTER


def test_an_address_is_leased(network: UserNetwork, cable: Cable) -> None:
    request = struct.pack(">BBBBI", 1, 1, 6, 0, 0x1234) + bytes(20) + MAC.ljust(16, b"\0") + bytes(192)
    request += b"\x63\x82\x53\x63" + b"\x35\x01\x01" + b"\xff"
    network.send(udp((bytes(4), 68), (b"\xff" * 4, 67), request))
    offer = cable.wait(lambda frame: frame[34:38] == struct.pack(">HH", 67, 68))
    assert offer[42 + 16 : 42 + 20] == GUEST


def test_datagrams_reach_the_hosts_loopback_and_their_answers_come_back(network: UserNetwork, cable: Cable) -> None:
    network.send(arp(2, ROUTER))  # where the answers are to go
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        network.send(udp((GUEST, 5000), (ROUTER, server.getsockname()[1]), b"question"))
        content, sender = server.recvfrom(100)
        assert content == b"question"
        server.sendto(b"answer", sender)
        reply = cable.wait(lambda frame: frame[36:38] == struct.pack(">H", 5000))
    assert reply[42:48] == b"answer" and reply[26:30] == ROUTER


def test_nonsense_does_no_harm(network: UserNetwork, cable: Cable) -> None:
    chance = random.Random(1)
    for _ in range(2000):
        frame = bytearray(chance.randbytes(chance.choice((14, 20, 34, 60, 1500, 65535))))
        frame[12:14] = chance.choice((b"\x08\x00", b"\x08\x06", b"\x86\xdd", b"\0\0"))
        if chance.random() < 0.7 and len(frame) > 14:
            frame[14] = 0x45
        network.send(bytes(frame))
    deadline = time.monotonic() + 10
    while not any(frame[12:14] == b"\x08\x06" and frame[28:32] == ROUTER for frame in cable.frames):
        assert time.monotonic() < deadline
        network.send(arp(1, ROUTER))
        time.sleep(0.01)


def test_a_port_that_is_taken(network: UserNetwork, cable: Cable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match="Address already in use") as caught:
            UserNetwork(cable.frames.append, [(port, 80)])
    assert caught.value.filename == f"port {port} of the host"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_network, "_LIBRARY", "libslirp.so.nowhere")
    with pytest.raises(NetworkUnavailable, match="apt-get install libslirp0"):
        UserNetwork(lambda frame: None)
