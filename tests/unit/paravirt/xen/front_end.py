"""A front end of the tests' own: its nodes in the store, its grants and its rings."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from tests.unit.paravirt.xen.conftest import Guest
from trivisor.machine.memory import PAGE_SIZE
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.domain import OWN_ID


def write_grant(
    guest: Guest, reference: int, flags: int, domain: int, frame: int, start: int = 0, length: int = 0
) -> None:
    """Write an entry of the grant table, in the layout that is in effect."""
    grants = guest.domain.grants
    first = struct.pack("<HH", flags, domain)
    rest = struct.pack("<HHQ", start, length, frame) if grants.version == 2 else struct.pack("<I", frame)
    guest.domain.memory.write(grants.entry_address(reference), first + rest)


class FrontEnd:
    """The device `kind`/`number` of a `guest`."""

    def __init__(self, guest: Guest, kind: str, number: int) -> None:
        self.guest = guest
        self.memory = guest.domain.memory
        self.store = guest.machine.store
        self.path = f"/local/domain/1/device/{kind}/{number}"
        self.back = f"/local/domain/0/backend/{kind}/1/{number}"
        self.last_grant = 16 if kind == "vbd" else 128
        self.port = 0

    def tell(self, **values: object) -> None:
        for name, value in values.items():
            self.store.write(f"{self.path}/{name.replace('_', '-')}", str(value), OWN_ID)

    def told(self, name: str) -> str | None:
        return self.store.read(f"{self.back}/{name}")

    def grant(self, frame: int, flags: int = abi.GTF_PERMIT_ACCESS, domain: int = 0) -> int:
        """Grant a frame; the grant's reference."""
        self.last_grant += 1
        write_grant(self.guest, self.last_grant, flags, domain, frame)
        return self.last_grant

    def in_use(self, reference: int) -> int:
        status = self.guest.domain.grants.status_address(reference)
        return self.memory.read_u16(status) & (abi.GTF_READING | abi.GTF_WRITING)

    def open_port(self) -> int:
        self.port = self.guest.events.allocate_unbound(0)
        return self.port

    def send(self) -> None:
        self.guest.events.send(self.port)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let what was posted run until `condition`."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            self.guest.domain.platform.clock.run_due()
            time.sleep(0.0005)


class FrontRing:
    """The front end's side of a ring (io/ring.h)."""

    def __init__(self, front: FrontEnd, entry_size: int) -> None:
        self.front = front
        self.memory = front.memory
        self.frame = front.guest.frame()
        self.at = self.frame * PAGE_SIZE
        self.entry_size = entry_size
        self.size = 1 << ((PAGE_SIZE - 64) // entry_size).bit_length() - 1
        self.reference = front.grant(self.frame)
        self.seen = 0
        self.memory.write(self.at, struct.pack("<4I", 0, 1, 0, 1))

    @property
    def produced(self) -> int:
        return self.memory.read_u32(self.at)

    @property
    def responses(self) -> int:
        return self.memory.read_u32(self.at + 8)

    def put(self, request: bytes) -> None:
        at = self.at + 64 + self.produced % self.size * self.entry_size
        self.memory.write(at, request.ljust(self.entry_size, b"\0"))
        self.memory.write(self.at, struct.pack("<I", self.produced + 1 & 0xFFFFFFFF))

    def next(self, length: int) -> bytes:
        """The next response's first bytes, once it is there."""
        self.front.wait(lambda: self.responses != self.seen)
        at = self.at + 64 + self.seen % self.size * self.entry_size
        self.seen = self.seen + 1 & 0xFFFFFFFF
        self.memory.write(self.at + 12, struct.pack("<I", self.seen + 1 & 0xFFFFFFFF))
        return self.memory.read(at, length)
