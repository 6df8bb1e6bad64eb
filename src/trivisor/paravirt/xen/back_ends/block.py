"""The disk's back end (io/blkif.h): requests of a ring done on a raw disk by a thread, in order.

A request is answered when it is done: data that was written is in the host's
file, and after a flush on the host's disk.  Sectors have 512 bytes.
"""

from __future__ import annotations

import errno
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trivisor.devices.disk_file import SECTOR, DiskFile
from trivisor.machine.memory import PAGE_SIZE
from trivisor.machine.saved_values import numbers
from trivisor.machine.saving import Saved
from trivisor.paravirt.xen.back_ends.back_end import BackEnd, Guest
from trivisor.paravirt.xen.back_ends.ring import SharedRing
from trivisor.paravirt.xen.back_ends.worker import Worker
from trivisor.paravirt.xen.grants import Grant, GrantError

READ, WRITE, WRITE_BARRIER, FLUSH, _RESERVED, DISCARD, INDIRECT = range(7)
"""Operations (BLKIF_OP_*)."""
OKAY, ERROR, NOT_SUPPORTED = 0, -1, -2
"""Statuses (BLKIF_RSP_*)."""
REQUEST_SIZE = 112
MOST_SEGMENTS = 11
MOST_INDIRECT = 256
"""Segments of an indirect request that we take, of at most a page each."""
_PER_INDIRECT_PAGE = PAGE_SIZE // 8
_READONLY = 4

_HEAD = struct.Struct("<BBH4xQQ")
_SEGMENT = struct.Struct("<IBBH")
_INDIRECT_HEAD = struct.Struct("<BBH4xQQH2x8I")
_DISCARD = struct.Struct("<BBH4xQQQ")
_RESPONSE = struct.Struct("<QBxh4x")
_NAMES = {READ: "reads", WRITE: "writes", WRITE_BARRIER: "barriers", FLUSH: "flushes", DISCARD: "discards"}
_WRITING = (WRITE, WRITE_BARRIER, DISCARD)


class BadRequest(Exception):
    """A request that is answered with `status` at once."""

    def __init__(self, why: str, status: int = ERROR) -> None:
        super().__init__(why)
        self.status = status


@dataclass(slots=True)
class Request:
    """One request on its way; an indirect one is what its `operation` says that it is."""

    number: int
    operation: int
    position: int
    length: int
    ring: SharedRing
    grants: list[Grant] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)
    status: int = OKAY


class BlockBackEnd(BackEnd):
    """A disk; the file is closed with the back end."""

    ring_names: ClassVar = {"ring-ref": REQUEST_SIZE}

    def __init__(self, guest: Guest, front: str, back: str, disk: DiskFile, name: str) -> None:
        self.name = name
        self.disk = disk
        self.is_changed = False
        """The snapshot that this goes on from was made before the file was last written to."""
        self._ring: SharedRing | None = None
        self._counts: Counter[str] = Counter()
        self._busy = 0
        self._worker = Worker[Request](guest.clock, self._work, self._finished, f"disk {name}")
        super().__init__(guest, front, back, _offers(disk))

    # -- the connection -------------------------------------------------------------------------------------

    def connect(self) -> None:
        self.tell(
            {
                "sectors": str(self.disk.sectors),
                "sector-size": str(SECTOR),
                "physical-sector-size": str(SECTOR),
                "info": str(_READONLY if self.disk.readonly else 0),
            }
        )

    def use(self, rings: list[SharedRing]) -> None:
        self._ring = rings[0] if rings else None

    def quiesce(self) -> None:
        self._worker.drain()

    def close(self) -> None:
        self._worker.close()
        self.disk.close()

    # -- into a snapshot and out of it ----------------------------------------------------------------------

    def save(self) -> Saved:
        """The connection, and by what to know the disk again.  What was written is on the host's own disk then.

        Raises OSError when it cannot be brought there.
        """
        disk = self.disk
        if not disk.readonly:
            try:
                disk.flush()
            except OSError as error:
                raise OSError(error.errno, f"{disk.path}: {error.strerror}") from None
        return {**super().save(), "disk": [disk.sectors, int(disk.readonly), disk.written_at]}

    def load(self, saved: Saved) -> None:
        disk = self.disk
        sectors, readonly, written_at = numbers(saved, "disk", [64, 1, 64])
        if sectors != disk.sectors:
            raise ValueError(
                f"{self.name} had {sectors * SECTOR} bytes, and {disk.path} has {disk.sectors * SECTOR}"
            )
        if bool(readonly) != disk.readonly:
            raise ValueError(f"{self.name} was {'read-only' if readonly else 'writable'}, and {disk.path} is not")
        self.is_changed = written_at != disk.written_at
        super().load(saved)

    # -- requests, in the vCPU's thread ---------------------------------------------------------------------

    def notified(self) -> None:
        ring = self._ring
        if ring is None:
            return
        answered = False
        for raw in ring.requests():
            try:
                self._worker.add(self._parse(raw, ring))
            except BadRequest as bad:
                self._counts["refused"] += 1
                operation, inner, _, number, _ = _HEAD.unpack_from(raw)
                ring.respond(_RESPONSE.pack(number, inner if operation == INDIRECT else operation, bad.status))
                answered = True
        if answered and ring.push():
            self.notify()

    def _parse(self, raw: bytes, ring: SharedRing) -> Request:
        operation, segments, _, number, sector = _HEAD.unpack_from(raw)
        if operation == INDIRECT:
            _, operation, segments, number, sector, _, *pages = _INDIRECT_HEAD.unpack_from(raw)
            if operation not in (READ, WRITE):
                raise BadRequest(f"indirect operation {operation}")
            if not 0 < segments <= MOST_INDIRECT:
                raise BadRequest(f"{segments} indirect segments")
            described = b"".join(self._indirect(pages, segments))
        else:
            described = raw[_HEAD.size :]
            if operation in (READ, WRITE, WRITE_BARRIER, FLUSH) and segments > MOST_SEGMENTS:
                raise BadRequest(f"{segments} segments")
        if operation not in _NAMES:
            raise BadRequest(f"operation {operation}", NOT_SUPPORTED)
        if self.disk.readonly and (operation in _WRITING or (operation == FLUSH and segments)):
            raise BadRequest("the disk is read-only")
        request = Request(number, operation, sector * SECTOR, 0, ring)
        if operation == DISCARD:
            request.length = _DISCARD.unpack_from(raw)[5] * SECTOR
        elif operation in (READ, WRITE) and not segments:
            raise BadRequest("no segments")
        try:
            if operation != DISCARD:
                self._map(request, described, segments)
            if request.length and request.position + request.length > self.disk.sectors * SECTOR:
                raise BadRequest("beyond the end of the disk")
        except BaseException:
            _release(request)
            raise
        return request

    def _indirect(self, pages: list[int], segments: int) -> Iterator[bytes]:
        """The pages that describe an indirect request's segments."""
        for reference in pages[: -(-segments // _PER_INDIRECT_PAGE)]:
            try:
                with self.guest.grants.access(reference, write=False) as address:
                    yield self.guest.memory.read(address, PAGE_SIZE)
            except GrantError as error:
                raise BadRequest(str(error)) from None

    def _map(self, request: Request, described: bytes, segments: int) -> None:
        """The guest's memory that a request is about, whose grants are held."""
        view, into_guest = self.guest.memory.view, request.operation == READ
        for index in range(segments):
            reference, first, last, _ = _SEGMENT.unpack_from(described, index * _SEGMENT.size)
            if not first <= last < PAGE_SIZE // SECTOR:
                raise BadRequest(f"sectors {first} to {last} of a page")
            try:
                grant = self.guest.grants.take(reference, write=into_guest)
            except GrantError as error:
                raise BadRequest(str(error)) from None
            request.grants.append(grant)
            start, end = grant.address + first * SECTOR, grant.address + (last + 1) * SECTOR
            request.buffers.append(view[start:end])
            request.length += end - start

    # -- the work, in a thread of its own -------------------------------------------------------------------

    def _work(self, request: Request) -> None:
        started = time.perf_counter_ns()
        try:
            self._do(request)
        except OSError as error:
            unknown = request.operation == DISCARD and error.errno == errno.EOPNOTSUPP
            request.status = NOT_SUPPORTED if unknown else ERROR
        self._busy += time.perf_counter_ns() - started

    def _do(self, request: Request) -> None:
        disk, operation = self.disk, request.operation
        if operation == READ:
            disk.read(request.position, request.buffers)
        elif operation == DISCARD:
            if request.length:
                disk.discard(request.position, request.length)
        else:
            if operation != WRITE:
                disk.flush()
            if request.buffers:
                disk.write(request.position, request.buffers)
                if operation == WRITE_BARRIER:
                    disk.flush()

    # -- answers, in the vCPU's thread ----------------------------------------------------------------------

    def _finished(self, requests: list[Request]) -> None:
        wanted = False
        for request in requests:
            if request.operation == READ:
                for grant in request.grants:
                    self.guest.written(grant.address, PAGE_SIZE)
            _release(request)
            self._count(request)
            request.ring.respond(_RESPONSE.pack(request.number, request.operation, request.status))
            wanted |= request.ring.push()
        if wanted:
            self.notify()

    def _count(self, request: Request) -> None:
        self._counts[_NAMES[request.operation]] += 1
        if request.status != OKAY:
            self._counts["failed"] += 1
        elif request.operation in (READ, WRITE, WRITE_BARRIER):
            self._counts["bytes read" if request.operation == READ else "bytes written"] += request.length

    def statistics(self) -> dict[str, Any]:
        return {**self._counts, "seconds in the thread": self._busy / 1e9}


def _release(request: Request) -> None:
    request.buffers.clear()
    for grant in request.grants:
        grant.release()


def _offers(disk: DiskFile) -> dict[str, str]:
    offers = {
        "feature-flush-cache": "1",
        "feature-barrier": "1",
        "feature-max-indirect-segments": str(MOST_INDIRECT),
    }
    if not disk.readonly:
        offers |= {"feature-discard": "1", "discard-granularity": str(PAGE_SIZE), "discard-alignment": "0"}
    return offers
