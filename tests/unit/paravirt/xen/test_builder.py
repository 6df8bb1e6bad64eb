"""What the domain builder leaves in memory, with the domain's frames in a row and in several pieces."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from tests.unit.paravirt.xen.conftest import StillCpu
from trivisor.boot.image import ImageError
from trivisor.boot.xen_notes import XenKernel
from trivisor.machine.clock import Clock
from trivisor.paravirt.xen.builder import DomainBuilder, Started
from trivisor.paravirt.xen.frames import DOMAIN, L1, L4, WRITABLE, numbers, split
from trivisor.paravirt.xen.machine import XenMachine

MIB = 1 << 20
BASE = 0xFFFFFFFF80000000
LIST = 1 << 39
CODE = random.Random(1).randbytes(3 * MIB + 5000)
INITRD = random.Random(2).randbytes(2 * MIB + 700)


def kernel(p2m_base: int | None, unmapped_module: bool) -> XenKernel:
    return XenKernel(
        segments=((MIB + 300, memoryview(CODE[:5000])), (MIB + 5300, memoryview(CODE[5000:]))),
        start=MIB, end=5 * MIB, entry=BASE + MIB, virtual_base=BASE, hypercall_page=None,
        p2m_base=p2m_base, unmapped_module=unmapped_module, path="kernel",
    )  # fmt: skip


class Built:
    """A domain of 12 MiB that was built on some of a machine's frames."""

    def __init__(self, kernel: XenKernel, pieces: int) -> None:
        cpu = StillCpu()
        self.machine = machine = XenMachine(
            16 * MIB, Clock(lambda: 0), console_output=lambda _: None, tsc=cpu.tsc, tsc_frequency=1_000_000_000,
            on_stop=lambda: None,
        )  # fmt: skip
        machine.domain.cpu = cpu
        self.frames = machine.domain.frames
        (ram,) = machine.ram
        length = 3072 // pieces
        self.runs = [ram[at : at + length] for at in range(0, pieces * (length + 7), length + 7)]
        self.runs.reverse()
        self.frame_of = [frame for run in self.runs for frame in run]
        self.frames.hand_over(self.runs)
        self.started: Started

    def build(self, kernel: XenKernel, initrd: bytes | None = INITRD) -> None:
        builder = DomainBuilder(kernel, self.frames, self.machine.domain.own, self.machine.domain.tables, self.runs)
        self.started = builder.build(initrd, "quiet", 1, 2)

    def read(self, page: int, offset: int, length: int) -> bytes:
        """From an address in the domain's own memory, page by page."""
        found = b""
        while len(found) < length:
            more, at = divmod(offset + len(found), 4096)
            part = min(4096 - at, length - len(found))
            found += self.machine.memory.read(self.frame_of[page + more] * 4096 + at, part)
        return found

    def entry(self, linear: int) -> int:
        """The level-1 entry of an address; 0 without one."""
        table = self.started.root
        for shift in (39, 30, 21, 12):
            entry = self.frames.words[table * 512 + (linear >> shift & 511)]
            if not entry & 1:
                return 0
            table = (entry & (1 << 52) - 1) >> 12
        return entry


@pytest.fixture(params=[1, 5], ids=["in a row", "in pieces"])
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    made = Built(kernel(None, False), request.param)
    yield made
    made.machine.close()


@pytest.mark.parametrize("p2m_base", [None, LIST])
@pytest.mark.parametrize("unmapped_module", [False, True])
def test_what_a_guest_finds(built: Built, p2m_base: int | None, unmapped_module: bool) -> None:
    built.build(kernel(p2m_base, unmapped_module))
    started, words = built.started, built.frames.words
    assert built.read(0, MIB + 300, len(CODE)) == CODE
    at = (started.start_info - BASE) // 4096
    magic, pages, shared, flags, store, store_port, console, console_port, tables, table_pages, p2m, *module = (
        struct.unpack("<32sQQI4xQI4xQI4xQQQQQ", built.read(at, 0, 128))
    )
    assert magic.rstrip(b"\0") == b"xen-3.0-x86_64"
    assert (pages, shared) == (len(built.frame_of), built.machine.domain.own.shared_info * 4096)
    assert (store, store_port, console, console_port) == (started.store_frame, 1, started.console_frame, 2)
    assert (bool(flags & 8), module[1]) == (unmapped_module, len(INITRD))
    first = module[0] if unmapped_module else (module[0] - BASE) // 4096
    assert built.read(first, 0, len(INITRD)) == INITRD
    # the list of frames, where it says that it is, and the other way round
    for page, frame in enumerate(built.frame_of):
        entry = built.entry(p2m + 8 * page & -4096)
        assert entry & 2
        assert words[(entry >> 12 & (1 << 40) - 1) * 512 + page % 512] == frame
        assert built.machine.domain.own.physical(frame) == page
    assert p2m == (p2m_base or p2m)
    # all of the first mapping, up to the end that is 4 MiB aligned; page tables are read-only
    end = -(-(started.stack + (512 << 10)) // (4 * MIB)) * 4 * MIB
    own_tables = range((tables - BASE) // 4096, (tables - BASE) // 4096 + table_pages)
    for page in range(min((end - BASE) // 4096, pages)):
        entry = built.entry(BASE + page * 4096)
        assert (entry & (1 << 52) - 1) >> 12 == built.frame_of[page]
        is_table = L1 <= built.frames.kind[built.frame_of[page]] <= L4
        assert bool(entry & 2) != is_table
        assert page not in own_tables or is_table or not built.frames.kind_count[built.frame_of[page]]
    assert built.entry(end) == 0
    assert built.frames.kind[started.root] == L4
    assert built.frames.owned == pages


def test_what_does_not_fit_is_told_in_one_line(built: Built) -> None:
    with pytest.raises(ImageError, match=r"^the initrd of 20 MiB does not fit into the domain's \d+ MiB"):
        built.build(kernel(None, False), bytes(20 * MIB))
    large = kernel(None, False)._replace(segments=((11 * MIB, memoryview(CODE)),))
    with pytest.raises(ImageError, match=r"^kernel: does not fit into \d+ MiB of RAM"):
        built.build(large)
    with pytest.raises(ImageError, match=r"^the kernel does not fit"):
        built.build(large._replace(end=13 * MIB))


def test_runs_are_split_at_any_place() -> None:
    runs = [range(5, 10), range(20, 23), range(40, 41)]
    frames = [frame for run in runs for frame in run]
    for count in range(len(frames) + 1):
        taken, rest = split(runs, count)
        assert [frame for run in taken for frame in run] == frames[:count]
        assert [frame for run in rest for frame in run] == frames[count:]
        assert all(taken) and all(rest)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 65535, 65536, 65537, 200_000, (1 << 20) + 1])
def test_numbers(count: int) -> None:
    assert numbers(count).tolist() == list(range(count))


def test_what_is_given_free_is_allocated_in_its_order(built: Built) -> None:
    frames = built.frames
    last = built.machine.ram[0][-9:]
    rest = [last[6:], last[:3]]
    frames.give_free(rest)
    assert frames.free == 6
    expected = [frame for run in rest for frame in run]
    assert [frames.allocate() for _ in range(6)] == expected
    assert all(frames.owner[frame] == DOMAIN and frames.kind[frame] != WRITABLE for frame in expected)
