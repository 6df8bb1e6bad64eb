"""A domain's state taken out and put into another one: nothing is lost, and no file makes what no domain could be.

The theory: kinds and counts of frames are not in a snapshot, but follow from the page tables by the same
validation that hypercalls go through.  So they come back to the last count, and whatever else a file
says, no page table is ever mapped writable.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.unit.paravirt.xen.conftest import Guest, StillCpu
from tests.unit.paravirt.xen.test_block import PATTERN, Disk
from tests.unit.paravirt.xen.test_network import Card, Wire
from trivisor.devices.disk_file import DiskFile
from trivisor.machine.clock import Clock
from trivisor.machine.saving import Saved
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.errors import HypercallError
from trivisor.paravirt.xen.frames import DESCRIPTORS, DOMAIN, L1, L4, NONE, WRITABLE
from trivisor.paravirt.xen.grants import BACK_END_DOMAIN
from trivisor.paravirt.xen.machine import XenMachine
from trivisor.paravirt.xen.saved_processor import goes_on
from trivisor.paravirt.xen.xenstore import protocol

A = 0x10000
DISK: Path
"""A read-only disk that all domains here have, beside a network."""
CHANGES = 400
"""Values exchanged for others."""
HOSTILE: list[Any] = [
    -1, 0, 1, 2, 3, 255, 4096, 1 << 31, (1 << 40) - 1, 1 << 63, 1 << 64, 1 << 300, True, None, 1.5, "", "x", "ü", "ff" * 600,
    "/a//b", [], [1], [[]], [[0, 0]], [[1, 4]], {}, {"0": 0}, [0] * 5000,
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    global DISK
    DISK = tmp_path_factory.mktemp("saving") / "disk"
    DISK.write_bytes(PATTERN)


def attach(machine: XenMachine) -> Wire:
    wire = Wire()
    machine.attach_disk(DiskFile(DISK, readonly=True))
    machine.attach_network(wire.plug)
    return wire


def machine_for(cpu: StillCpu, time: Callable[[], int] = lambda: 0) -> XenMachine:
    made = XenMachine(
        16 << 20, Clock(time), console_output=lambda _: None, tsc=cpu.tsc, tsc_frequency=1_000_000_000,
        on_stop=lambda: None,
    )  # fmt: skip
    made.domain.cpu = cpu
    return made


def request(guest: Guest, kind: int, payload: bytes, transaction: int = 0) -> None:
    guest.machine._store_ring._connection.request(kind, 1, transaction, payload)


@pytest.fixture
def busy(guest: Guest) -> Guest:
    """A domain with something of everything."""
    machine, events, frames, domain = guest.machine, guest.events, guest.frames, guest.domain
    wire = attach(machine)
    store_port, console_port = (events.allocate_unbound(BACK_END_DOMAIN) for _ in range(2))
    console_frame, store_frame = guest.frame(), guest.frame()
    for frame in (console_frame, store_frame):
        frames.hold(frame, writable=True)
    machine._rings = (console_frame, console_port, store_frame, store_port)
    console, ring = machine._make_rings()
    events.bind_back_end(console_port, console.guest_sent)
    events.bind_back_end(store_port, ring.guest_sent)
    # page tables: one mapped tree, one pinned beside it, entries to memory, to a table, to a page given back
    root, third, second, table, data = domain.state.kernel_root, *(guest.frame() for _ in range(4))
    frames.words[third * 512] = second << 12 | 7
    frames.words[second * 512] = table << 12 | 7
    assert guest.update(root, 0, third << 12 | 7) == 0
    assert guest.update(table, 0, data << 12 | 7) == 0 and guest.update(table, 1, data << 12 | 7) == 0
    assert guest.update(table, 2, table << 12 | 5) == 0
    given_back = guest.frame()
    assert guest.update(table, 3, given_back << 12 | 7) == 0
    guest.put("<QQIIH", A + 64, 1, 0, 0, abi.DOMID_SELF)
    guest.put("<Q", given_back, at=A + 64)
    assert guest.call("memory_op", abi.XENMEM_DECREASE_RESERVATION, A) == 1
    user, pinned = guest.frame(), guest.frame()
    assert guest.extended(abi.MMUEXT_PIN_L4_TABLE, user) == guest.extended(abi.MMUEXT_PIN_L1_TABLE, pinned) == 0
    assert guest.extended(abi.MMUEXT_NEW_USER_BASEPTR, user) == 0
    gdt = guest.frame()
    guest.put("<Q", gdt)
    assert guest.call("set_gdt", A, 100) == 0
    domain.grants.set_version(2)
    domain.grants.grow(9)
    status = domain.grants.status_shared()[1]
    assert guest.update(table, 4, status << 12 | 7) == 0
    at = domain.grants.entry_address(9)
    domain.view[at : at + 16] = struct.pack("<HHIQ", abi.GTF_PERMIT_ACCESS, 1, 0, data)
    domain.grant_maps.map(0, abi.GNTMAP_DEVICE_MAP | 7 << abi.GNTMAP_GUEST_AVAIL_SHIFT, 9, 1)
    Disk(guest)
    Card(guest, wire)
    # the processor
    guest.put("<BBH4xQBBH4xQ16x", 14, 4, 0x33, 0xFFFFFFFF81000000, 3, 3, 0x33, 0x1234)
    assert guest.call("set_trap_table", A) == 0
    assert guest.call("set_callbacks", 0xFFFFFFFF81000100, 0xFFFFFFFF81000200, 0xFFFFFFFF81000300) == 0
    assert guest.call("stack_switch", 0x2B, 0xFFFF880000001000) == 0
    assert guest.call("vm_assist", abi.VMASST_ENABLE, abi.VMASST_ARCHITECTURAL_IOPL) == 0
    guest.put("<QII", data, 64, 0)
    assert guest.call("vcpu_op", abi.VCPUOP_REGISTER_VCPU_INFO, 0, A) == 0
    domain.state.iopl, domain.state.cr2 = 1, 0x5000
    # events and time
    guest.put("<II", abi.VIRQ_TIMER, 0)
    assert guest.call("event_channel_op", abi.EVTCHNOP_BIND_VIRQ, A) == 0
    guest.put("<II", 0, 0)
    assert guest.call("event_channel_op", abi.EVTCHNOP_BIND_IPI, A) == 0
    guest.put("<HH", abi.DOMID_SELF, abi.DOMID_SELF)
    assert guest.call("event_channel_op", abi.EVTCHNOP_ALLOC_UNBOUND, A) == 0
    events.bind_loopback(guest.get("<HHI")[2], domain.number)
    domain.timers.single.set(5_000_000)
    domain.timers.start_periodic(2_000_000)
    domain.timers.poll.set(9_000_000)
    events.poll(frozenset({3, 70}))
    # the store, with a request half there and replies not taken
    request(guest, protocol.WATCH, b"device\0token\0")
    request(guest, protocol.WRITE, b"data/x\0value")
    request(guest, protocol.TRANSACTION_START, b"\0")
    request(guest, protocol.WRITE, b"data/y\0other", transaction=1)
    machine._store_ring._received += b"\1\0\0"
    return guest


def taken(guest: Guest) -> tuple[Saved, bytes]:
    """What a snapshot has: plain values, and the memory."""
    return json.loads(json.dumps(guest.machine.save())), bytes(guest.machine.memory.view)


def put(
    saved: Saved, memory: bytes, time: Callable[[], int] = lambda: 0, cpu: StillCpu | None = None
) -> XenMachine:
    """A machine made of that; raises what loading raises."""
    machine = machine_for(cpu or StillCpu(), time)
    try:
        attach(machine)
        machine.clear()
        machine.memory.view[:] = memory
        machine.load(saved)
        machine.go_on(saved, [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400])
    except BaseException:
        machine.close()
        raise
    return machine


@pytest.fixture
def again(busy: Guest) -> Iterator[XenMachine]:
    machine = put(*taken(busy))
    yield machine
    machine.close()


def test_what_is_saved_again_is_the_same(busy: Guest, again: XenMachine) -> None:
    assert json.loads(json.dumps(again.save())) == taken(busy)[0]


def test_kinds_and_counts_of_all_frames_come_back(busy: Guest, again: XenMachine) -> None:
    ours, theirs = busy.frames, again.domain.frames
    for name in ("owner", "kind", "kind_count", "references", "pinned", "_allocated"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.owned, sorted(ours.free_frames())) == (theirs.owned, sorted(theirs.free_frames()))
    kinds = [kind for kind, count in zip(theirs.kind, theirs.kind_count, strict=True) if count]
    assert {NONE, L1, 2, 3, L4, DESCRIPTORS, WRITABLE} == {*kinds}, "and all kinds were there"


def test_grants_are_in_use_as_before(busy: Guest, again: XenMachine) -> None:
    ours, theirs = busy.domain.grants, again.domain.grants
    assert (theirs.version, theirs.used, theirs.status_shared()) == (2, 9, ours.status_shared())
    assert ours.active and theirs.active == ours.active
    again.domain.grant_maps.unmap(0, ours.active[9].frame << 12, 0)
    assert 9 not in theirs.active and not again.memory.read_u16(theirs.status_address(9))


@pytest.mark.parametrize(
    "grants, mappings, what",
    [
        ({"version": 0, "used": 9}, [], "version 0"),
        ({"version": 3, "used": 9}, [], "version 3"),
        ({"version": 1, "used": 9}, [], "domain can use its memory"),  # but it has mapped a status frame
        ({"version": 2, "used": 9}, [[0, 9 * 256, 1, 1]], "beyond the table"),
        ({"version": 2, "used": 9}, [[0, 9, 0, 1]], "not the domain's"),
    ],
)
def test_grants_that_no_domain_has_are_refused(
    busy: Guest, grants: Saved, mappings: list[list[int]], what: str
) -> None:
    saved, memory = taken(busy)
    saved["grants"], saved["grant_maps"] = grants, {"mappings": mappings}
    with pytest.raises(ValueError, match=what):
        put(saved, memory)


def test_one_grant_is_of_one_frame(busy: Guest) -> None:
    saved, memory = taken(busy)
    (row,) = saved["grant_maps"]["mappings"]
    saved["grant_maps"]["mappings"].append([1, row[1], row[2] + 1, row[3]])
    with pytest.raises(ValueError, match="of two frames"):
        put(saved, memory)


def test_the_memory_is_the_same(busy: Guest, again: XenMachine) -> None:
    info = busy.events.vcpu_info + abi.VCPU_INFO_TIME
    wallclock = (busy.domain.own.shared_info << 12) + abi.SHARED_WALLCLOCK
    before, after = bytearray(busy.machine.memory.view), bytearray(again.memory.view)
    for memory in (before, after):
        memory[info : info + 4] = bytes(4)  # the versions of what is told anew
        memory[wallclock : wallclock + 16] = bytes(16)
    assert before == after


def test_native_code_finds_what_it_found(busy: Guest, again: XenMachine) -> None:
    from trivisor.paravirt.xen.shared_table import COUNTS, INDEX

    places = {number: name for name, number in INDEX.items()}
    addresses = {"VCPU_INFO", *(name for name in INDEX if name.startswith("FRAME_") and name != "FRAME_COUNT")}
    fleeting = {"EPOCH", "STALE"}  # of TLBs, which are empty
    for index in range(COUNTS):
        if places[index] not in addresses | fleeting:
            assert busy.domain.table.words[index] == again.domain.table.words[index], places[index]
    assert again.domain.table.words[INDEX["VCPU_INFO"]] - again.memory.base == busy.events.vcpu_info


def test_events_go_where_they_went(busy: Guest) -> None:
    saved, memory = taken(busy)
    ports = {row[0]: row for row in saved["events"]["ports"]}
    loop = next(row for row in ports.values() if row[3])
    for machine in (busy.machine, put(saved, memory)):
        view, base = machine.memory.view, (machine.domain.own.shared_info << 12) + abi.SHARED_EVTCHN_PENDING
        view[base + loop[3] // 8] &= ~(1 << loop[3] % 8)
        machine.events.send(loop[0])
        assert view[base + loop[3] // 8] >> loop[3] % 8 & 1
        printed: list[bytes] = []
        machine.platform.console._output = printed.append
        console = machine._rings[0] << 12
        machine.memory.write(console + 1024, b"hello")
        machine.memory.write(console + 3084, b"\5\0\0\0")
        machine.events.send(machine._rings[1])
        assert printed == [b"hello"]
    machine.close()


def test_the_time_is_told_again_where_the_guest_wants_it(busy: Guest) -> None:
    """By its kernel's page tables, whatever it was at."""
    busy.domain.state.time_area = A + 0x100
    saved, memory = taken(busy)
    saved["state"]["in_kernel"], saved["time"]["start"] = False, 123
    spaces: list[bool] = []

    class Watched(StillCpu):
        def enter_space(self, root: int, kernel: bool) -> None:
            spaces.append(kernel)

    cpu = Watched()
    machine = put(saved, memory, cpu=cpu)
    assert struct.unpack("<IIQ", cpu.load(A + 0x100, 16)) == (2, 0, 123)
    assert spaces == [False, True, False] and not machine.domain.state.in_kernel
    machine.close()


def test_timers_go_off_when_they_would_have(busy: Guest) -> None:
    saved, memory = taken(busy)
    now = [0]
    machine = put(saved, memory, lambda: now[0])
    ticks: list[int] = []
    machine.events.set_pending = lambda port: ticks.append(now[0])  # type: ignore[method-assign]
    for now[0] in range(0, 9_500_000, 500_000):
        machine.domain.cpu.ticks = now[0]  # type: ignore[attr-defined]
        machine.platform.clock.run_due()
    assert ticks == [2_000_000, 4_000_000, 5_000_000, 6_000_000, 8_000_000]
    assert machine.events._poll_over
    machine.close()


def test_the_store_answers_and_tells_as_before(busy: Guest, again: XenMachine) -> None:
    said: list[bytes] = []
    connection = again._store_ring._connection
    connection._send = said.append
    connection.request(protocol.READ, 5, 0, b"data/x\0")
    assert said.pop().endswith(b"value")
    connection.request(protocol.READ, 6, 1, b"data/y\0")
    assert said.pop().endswith(b"other"), "in its transaction"
    again.store.write("/local/domain/1/device/x", "new")
    assert [message[16:] for message in said] == [b"device/x\0token\0"]
    connection.request(protocol.TRANSACTION_END, 7, 1, b"T\0")
    assert said[-1].endswith(b"EAGAIN\0"), "the store has changed meanwhile"


def test_a_table_mapped_writable_in_the_file_is_none(busy: Guest) -> None:
    saved, memory = taken(busy)
    frames, root = busy.frames, busy.domain.state.kernel_root
    third = frames.words[root * 512] >> 12 & 0xFFFFF
    second = frames.words[third * 512] >> 12 & 0xFFFFF
    table = frames.words[second * 512] >> 12 & 0xFFFFF
    for at, entry in (
        (table * 512 + 2, table << 12 | 7),  # itself, writable
        (table * 512 + 9, root << 12 | 7),
        (table * 512 + 9, 1 << 39 | 7),  # beyond all memory
        (table * 512 + 9, busy.domain.own.end - 1 << 12 | 5),  # a page table of Xen's
        (table * 512 + 9, saved["memory"]["gdt"][0] << 12 | 7),
        (third * 512 + 1, table << 12 | 7),  # of another level
        (root * 512 + 1, root << 12 | 7),
    ):
        changed = bytearray(memory)
        changed[at * 8 : at * 8 + 8] = entry.to_bytes(8, "little")
        with pytest.raises(ValueError, match="no domain can use its memory so"):
            put(saved, bytes(changed))


def test_xens_own_tables_are_not_taken_from_the_file(busy: Guest) -> None:
    saved, memory = taken(busy)
    own = busy.domain.own
    changed = bytearray(memory)
    places = busy.machine._private
    for address, content in places:
        changed[address : address + len(content)] = b"\xff" * len(content)
    root = busy.domain.state.kernel_root
    for slot in range(abi.FIRST_XEN_SLOT, abi.LAST_XEN_SLOT + 1):
        changed[root * 4096 + slot * 8 : root * 4096 + slot * 8 + 8] = b"\xff" * 8
    machine = put(saved, bytes(changed))
    assert [bytes(machine.memory.view[a : a + len(c)]) for a, c in places] == [memory[a : a + len(c)] for a, c in places]
    first = root * 512 + abi.FIRST_XEN_SLOT
    assert machine.domain.frames.words[first : first + len(own.slots)].tolist() == own.slots
    machine.close()


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in plain values, the containers' own too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _leaves(item)


def check_tables(machine: XenMachine) -> None:
    """What holds for every domain: writable entries lead to writable memory that is the domain's, tables to tables."""
    frames = machine.domain.frames
    for frame in range(frames.count):
        kind = frames.kind[frame]
        if not (frames.kind_count[frame] and L1 <= kind <= L4):
            continue
        assert frames.owner[frame] == DOMAIN
        for index, entry in enumerate(frames.words[frame * 512 : frame * 512 + 512].tolist()):
            if not entry & 1 or (kind == L4 and abi.FIRST_XEN_SLOT <= index <= abi.LAST_XEN_SLOT):
                continue
            target = (entry & (1 << 52) - 1) >> 12
            assert frames.owns(target) and frames.references[target]
            wanted = kind - 1 if kind > L1 else WRITABLE if entry & 2 else None
            assert wanted is None or (frames.kind[target] == wanted and frames.kind_count[target])


def test_no_value_in_a_file_does_harm(busy: Guest) -> None:
    saved, memory = taken(busy)
    choose = random.Random(12)
    refused = 0
    for _ in range(CHANGES):
        made = json.loads(json.dumps(saved))
        part = choose.choice([*made.values()])  # the store has most values, but no more to tell than the others
        container, key = choose.choice([*_leaves(part)])
        container[key] = value = choose.choice([*HOSTILE, choose.randrange(4096), choose.choice([*_leaves(made)])[1]])
        try:
            machine = put(made, memory)
        except ValueError as refusal:
            refused += 1
            assert "\n" not in str(refusal)
            continue
        except BaseException as error:
            error.add_note(f"with {key} {value!r}")
            raise
        check_tables(machine)
        machine.platform.clock.run_due()
        machine.events.raise_virq(abi.VIRQ_TIMER)
        for port in [*machine.events._ports]:
            with suppress(HypercallError):
                machine.events.send(port)
        machine.quiesce()
        machine.save()
        machine.close()
    assert CHANGES // 4 < refused < CHANGES


# -- the processor -------------------------------------------------------------------------------------------


def pv_state() -> CpuState:
    from trivisor.paravirt.xen.machine import _first_state

    state = _first_state(0xFFFFFFFF81000000, 0x1000, 0x2000, 5)
    state.msrs = {0xC0000102: 0x7000}
    return state


def test_ring_3_goes_on_with_what_is_its_own() -> None:
    saved, first = pv_state(), pv_state()
    saved.gpr[3], saved.rip, saved.halted, saved.cr0 = 77, 0x1234, True, saved.cr0 | 8
    saved.gdtr, saved.idtr, saved.cr3, saved.cr8 = Table(0, 0), Table(9, 9), 0x9000, 3
    saved.msrs |= {0xC0000082: 1, 0x1B: 1}  # LSTAR, APIC_BASE: no guest of Xen's has written those
    state = goes_on(saved, first, 7)
    assert (state.gpr[3], state.rip, state.halted, state.cr0) == (77, 0x1234, True, first.cr0 | 8)
    assert (state.gdtr, state.idtr, state.cr3, state.cr8) == (first.gdtr, first.idtr, first.cr3, first.cr8)
    assert state.msrs == {0xC0000102: 0x7000}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cs", Segment(0x8, 0, 0xFFFFFFFF, 0xA09B)),
        ("cs", Segment(0xE033, 0, 0xFFFFFFFF, 0xA09B)),
        ("cs", Segment(0xE033, 0, 0xFFFFFFFF, 0x1A0FB)),
        ("ss", Segment(0xE02B, 0, 0xFFFFFFFF, 0xC093)),
        ("ss", Segment(0, 0, 0, 0x10000)),
        ("rflags", 2),
        ("rflags", 0x3202),
        ("rflags", 0x20202),
        ("cr0", 0x11),
        ("cr4", 0),
        ("efer", 0x500),
        ("xcr0", 5),
        ("msrs", {0xC0000102: 1 << 60}),
        ("interrupts_pending", [3]),
        ("exception_pending", (14, None)),
        ("nmi_pending", True),
    ],
)
def test_ring_3_cannot_be_in(name: str, value: Any) -> None:
    state = pv_state()
    setattr(state, name, value)
    with pytest.raises(ValueError, match="no domain's processor"):
        goes_on(state, pv_state(), 7)
