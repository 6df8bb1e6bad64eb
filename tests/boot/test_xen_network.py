"""A PV guest's network: an address by DHCP, files to and from the host's loopback, a port forwarded in."""

from __future__ import annotations

import hashlib
import http.client
import random
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trivisor import VirtualMachine
from trivisor.devices.user_network import NetworkUnavailable, UserNetwork
from trivisor.guests.debian import DefaultGuest

pytestmark = [pytest.mark.boot, pytest.mark.timeout(500)]

CONTENT = random.Random(1).randbytes(3 << 20)
SCRIPT = """
ifconfig eth0 | grep -o 'addr:[0-9][0-9.]*'
wget -q -O /tmp/file http://10.0.2.2:{http}/file
sha256sum </tmp/file
nslookup -type=a guest.test 10.0.2.2:{dns} | grep Address | tail -n 1
httpd -p 80 -h /tmp
wget -q -O - http://10.0.2.2:{http}/wait
"""


class Server(ThreadingHTTPServer):
    """Has a file, and waits with another answer until it is told to give it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fetched = threading.Event()
        self.listening = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/wait":
            self.server.listening.set()
            self.server.fetched.wait(200)
            self._answer(b"over\n")
        else:
            self._answer(CONTENT)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.fetched.set()
        made.shutdown()


@pytest.fixture
def name_server() -> Iterator[int]:
    """The port of one that has 192.0.2.7 for every name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                try:
                    question, sender = server.recvfrom(512)
                except OSError:
                    return
                head = question[:2] + struct.pack(">HHHHH", 0x8180, 1, 1, 0, 0)
                answer = struct.pack(">HHHIH", 0xC00C, 1, 1, 60, 4) + bytes([192, 0, 2, 7])
                server.sendto(head + question[12:] + answer, sender)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_network(debian: DefaultGuest, server: Server, name_server: int) -> None:
    try:
        UserNetwork(lambda frame: None).close()
    except NetworkUnavailable as reason:
        pytest.skip(str(reason))
    forwarded = free_port()
    fetched: list[bytes] = []

    def fetch() -> None:
        try:
            if server.listening.wait(250):
                connection = http.client.HTTPConnection("127.0.0.1", forwarded, timeout=100)
                connection.request("GET", "/file")
                fetched.append(connection.getresponse().read())
                connection.close()
        finally:
            server.fetched.set()

    thread = threading.Thread(target=fetch)
    thread.start()
    script = SCRIPT.format(http=server.server_port, dns=name_server)
    with VirtualMachine(network=f"user,forward={forwarded}:80", command=["sh", "-c", script]) as machine:
        outcome = machine.run(timeout=300)
        lines = machine.output.decode().splitlines()
        counts = machine.statistics()["eth0"]
    thread.join()
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert outcome.status == 0, (outcome, lines)
    assert lines == ["addr:10.0.2.15", f"{digest}  -", "Address: 192.0.2.7", "over"]
    assert fetched == [CONTENT]
    assert counts["bytes received"] > len(CONTENT) and counts["bytes sent"] > len(CONTENT)
    assert "refused" not in counts
