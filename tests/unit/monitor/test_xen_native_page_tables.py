"""Page tables that native code checks and changes come to what they come to by Python, whatever the guest asks for."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.unit.monitor.pv_guest import DATA, ENGINES, FAULT, STORE, STORES, UPPER, Machine, image
from tests.unit.paravirt.xen.invariant import check
from trivisor.machine.exits import Exit
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.paravirt.xen.shared_table import INDEX
from trivisor.x86.exceptions import PAGE_FAULT

SHOWN = UPPER + (2 << 20)
"""Where the kernel sees the test's frames, read-only, one after the other."""
LEVELS = {4: 4, 3: 3, 2: 3, 1: 6, 0: 8}
"""How many frames are meant as page tables of each level, and for data."""
LOADED = 2
"""Of those of level 4, how many the processor goes to."""
SHUTDOWN = 0x8000
FAULTED = (1 << 64) - 14
"""The result of a store that had a page fault."""


class Tables:
    """The test's frames by the level that they are meant for."""

    def __init__(self, machine: Machine, rng: random.Random) -> None:
        frames, words = iter(machine.own), machine.frames.words
        self.levels = {level: [next(frames) for _ in range(count)] for level, count in LEVELS.items()}
        self.own = [frame for level in self.levels.values() for frame in level]
        self.foreign = [0, 1, machine.domain.own.shared_info, machine.domain.own.spare.stop, machine.frames.count]
        for frame in machine.own:
            words[frame * 512 : frame * 512 + 512] = memoryview(bytes(4096)).cast("Q")
        start, (upper, lower) = machine.domain.state.kernel_root, (UPPER >> 39 & 511, 0)
        for root in self.levels[4]:
            for index in (510, 511):
                words[root * 512 + index] = words[start * 512 + index]
        for root in self.levels[4][:LOADED]:
            words[root * 512 + upper] = self.levels[3][0] << 12 | 7
        words[self.levels[3][0] * 512] = self.levels[2][0] << 12 | 7
        for index in range(2):
            words[self.levels[2][0] * 512 + index] = self.levels[1][index] << 12 | 7
        for index, frame in enumerate(self.own):
            words[self.levels[1][1] * 512 + index] = frame << 12 | 5
        # what is not in use yet may be anything, and is mostly fit
        for level in (4, 3, 2, 1):
            for table in self.levels[level][LOADED:]:
                for _ in range(4):
                    words[table * 512 + rng.choice([lower, 1, 2, 100, 300])] = self.entry(rng, level)
        words[self.levels[1][1] * 512 + len(self.own)] = self.levels[1][1] << 12 | 5

    def entry(self, rng: random.Random, level: int) -> int:
        """Something for a table of a level: mostly good, else what no guest may have."""
        target = rng.choice(self.levels[level - 1] if rng.random() < 0.9 else self.own * 2 + self.foreign + [1 << 39])
        flags = rng.choice([7] * 6 + [5, 5, 0x67, 0x25, 0x65, 4, 0])
        return target << 12 | flags | rng.choice([0] * 20 + [1 << 63, 0x80, 1 << 60, 0x100, 0x18])


class Program:
    """Records for the guest, and the structures that they lead to."""

    def __init__(self, machine: Machine, rng: random.Random) -> None:
        self.machine, self.rng = machine, rng
        self.data = bytearray(0x9000)
        self.at = 0
        self.records: list[tuple[int, ...]] = []

    def structure(self, raw: bytes) -> int:
        room = 4096 - self.at % 4096
        if len(raw) > room and self.rng.random() < 0.9:
            self.at += room
        self.data[self.at : self.at + len(raw)] = raw
        self.at += len(raw) + 7 & -8
        assert self.at <= SHUTDOWN
        return DATA + self.at - (len(raw) + 7 & -8)

    def call(self, name: str, *arguments: int) -> None:
        self.records.append((HYPERCALL_NUMBERS[name], *arguments))

    def extended(self, *operations: tuple[int, int]) -> None:
        raw = b"".join(struct.pack("<I4xQQ", command, value, 0) for command, value in operations)
        self.call("mmuext_op", self.structure(raw), len(operations), 0, abi.DOMID_SELF)

    def update(self, *updates: tuple[int, int]) -> None:
        raw = b"".join(struct.pack("<QQ", *update) for update in updates)
        self.call("mmu_update", self.structure(raw), len(updates), 0, abi.DOMID_SELF)

    def start(self, root: int) -> None:
        """A handler of page faults, and the space in which the tables are shown."""
        table = struct.pack("<BBHIQ", PAGE_FAULT, 0, abi.FLAT_RING3_CS64, 0, FAULT) + bytes(16)
        self.call("set_trap_table", self.structure(table))
        self.extended((abi.MMUEXT_PIN_L4_TABLE, root))
        self.extended((abi.MMUEXT_NEW_BASEPTR, root))

    def finished(self) -> list[tuple[int, ...]]:
        struct.pack_into("<I", self.data, SHUTDOWN, abi.SHUTDOWN_POWEROFF)
        self.machine.put(DATA, bytes(self.data))
        return self.records


def program(machine: Machine, tables: Tables, rng: random.Random) -> list[tuple[int, ...]]:
    made = Program(machine, rng)
    levels = tables.levels
    made.start(levels[4][0])
    made.extended((abi.MMUEXT_PIN_L4_TABLE, levels[4][1]))
    for table in levels[1][2:]:
        made.extended((abi.MMUEXT_PIN_L1_TABLE, table))

    def slot(level: int) -> int:
        table = rng.choice(levels[level])
        return table << 12 | rng.choice([0, 1, 2, 2, 100, 255, 256, 260, 271, 272, 300]) * 8

    given_back = rng.choice([80, 400])
    while len(made.records) < 200:
        if len(made.records) > given_back:
            give_back(made, levels[0])
            given_back = 400
        match rng.randrange(8):
            case 0 | 1:
                wanted = [rng.choice([1, 1, 1, 2, 3, 4]) for _ in range(rng.choice([1, 1, 1, 2, 5]))]
                command = [rng.choice([0] * 9 + [1, 2, 2, 3, 4]) for _ in wanted]
                made.update(*(
                    (slot(level) | command, tables.entry(rng, level))
                    for level, command in zip(wanted, command, strict=True)
                ))  # fmt: skip
            case 2 | 3:
                what = []
                for _ in range(rng.choice([1, 1, 2, 3])):
                    level = rng.randrange(1, 5)
                    frame = rng.choice(levels[level][LOADED if level == 4 else 0 :] * 3 + tables.own + tables.foreign)
                    if frame in levels[4][:LOADED]:
                        continue
                    what.append((rng.choice([level - 1, abi.MMUEXT_UNPIN_TABLE]), frame))
                what += [(abi.MMUEXT_NEW_BASEPTR, rng.choice(levels[4][:LOADED]))] * (rng.random() < 0.2)
                made.extended(*what, *[(99, 0)] * (rng.random() < 0.1))
            case 4:
                linear = rng.choice([UPPER, UPPER, SHOWN]) + (rng.randrange(40, 60) << 12)
                linear = rng.choice([linear] * 9 + [1 << 47, 0x1000, abi.MACH2PHYS_VIRT_START])
                made.call("update_va_mapping", linear, tables.entry(rng, 1), rng.randrange(4))
            case 5 | 6 | 7:
                number = tables.own.index(rng.choice(levels[1] * 9 + tables.own))
                linear = rng.choice([SHOWN] * 9 + [UPPER]) + (number << 12) + slot(1) % 4096
                old = tables.entry(rng, 1)
                if made.records[-1][0] != STORE:  # it may be done by what TLBs know until they are flushed
                    made.extended((abi.MMUEXT_TLB_FLUSH_LOCAL, 0))
                made.records.append((
                    STORE, linear + rng.choice([0] * 20 + [1, 4]), rng.randrange(len(STORES)),
                    rng.choice([tables.entry(rng, 1)] * 3 + [0, 2, 1 << 59]), rng.choice([0, old]),
                ))  # fmt: skip
    return made.finished()


def give_back(made: Program, frames: list[int]) -> None:
    """Frames that the domain gives back while they are mapped are free when they are not any more."""
    extents = made.structure(struct.pack(f"<{len(frames)}Q", *frames))
    reservation = struct.pack("<QQIIH", extents, len(frames), 0, 0, abi.DOMID_SELF)
    made.call("memory_op", abi.XENMEM_DECREASE_RESERVATION, made.structure(reservation))


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(image())
    return path


@pytest.mark.parametrize(
    ("engine", "seed"), [*(("translation", seed) for seed in range(40)), *(("direct", seed) for seed in range(12))]
)
def test_page_tables_natively_as_by_python(kernel: Path, engine: str, seed: int) -> None:
    outcomes = []
    for watched in (False, True):
        machine, rng = Machine(kernel, watched=watched, engine=engine), random.Random(seed)
        try:
            records = program(machine, Tables(machine, rng), rng)
            results = machine.run(records)
            outcomes.append({"results": results, "after": machine.after, **machine.left()})
            check(machine, machine.xen._rings[::2])
            natively = machine.vcpu.statistics()["native helpers"]["supervised"]
            assert (natively == 0) if watched else (natively > 60)
        finally:
            machine.close()
    for name, value in outcomes[0].items():
        assert value == outcomes[1][name], name


@pytest.mark.parametrize(
    ("store", "value", "rax", "old", "new"),
    [
        ("mov [rdi], rdx", 0x25, 0, 0x67, 0x25),
        ("xchg [rdi], rdx", 0, 0, 0x67, 0),
        ("xchg [r12], r8", 0x65, 0, 0x67, 0x65),
        ("xchg [r13], r8", 0, 0, 0x25, 0),
        ("xchg [rdi+0x400], rdx", 0, 0, 0x67, 0x67),
        ("lock cmpxchg [rdi], rdx", 0x25, 0x67, 0x67, 0x25),
        ("lock cmpxchg [rdi], rdx", 0x25, 0x66, 0x67, 0x67),
        ("lock and byte [rdi], 0xfd", 0, 0, 0x67, 0x65),
        ("lock or byte [rdi], 2", 0, 0, 0x65, 0x67),
        ("lock btr qword [rdi], 5", 0, 0, 0x67, 0x47),
        ("lock btr qword [rdi], 5", 0, 0, 0x47, 0x47),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_of_linux_is_done_natively(
    kernel: Path, engine: str, store: str, value: int, rax: int, old: int, new: int
) -> None:
    after = []
    for watched in (False, True):
        machine = Machine(kernel, watched=watched, engine=engine)
        try:
            tables = Tables(machine, random.Random(0))
            table, page = tables.levels[1][0], tables.levels[0][0] << 12
            machine.frames.words[table * 512 + 20] = page | old
            made = Program(machine, random.Random(0))
            made.start(tables.levels[4][0])
            linear = SHOWN + (tables.own.index(table) << 12) + 20 * 8
            wanted = page | value if value else 0
            made.records.append((STORE, linear, STORES.index(store), wanted, rax and page | rax))
            results = machine.run(made.finished())
            assert machine.frames.words[table * 512 + 20] == (page | new if new else 0)
            assert machine.domain.table.words[INDEX["TABLE_WRITES"]] == (not watched)
            check(machine, machine.xen._rings[::2])
            after.append((results[-1], machine.after[-1]))
        finally:
            machine.close()
    assert after[0] == after[1] and after[0][0] != FAULTED


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [1 << 33, 1 << 51, 1 << 40])
def test_an_entry_leads_elsewhere_by_high_bits_alone(kernel: Path, engine: str, bits: int) -> None:
    machine = Machine(kernel, watched=False, engine=engine)
    try:
        tables = Tables(machine, random.Random(0))
        table, page = tables.levels[1][0], tables.levels[0][0] << 12
        at = table * 512 + 20
        machine.frames.words[at] = page | 0x67
        made = Program(machine, random.Random(0))
        made.start(tables.levels[4][0])
        linear = SHOWN + (tables.own.index(table) << 12) + 20 * 8
        made.records.append((STORE, linear, STORES.index("mov [rdi], rdx"), page | bits | 0x67, 0))
        made.update((at * 8, page | bits | 0x67))
        made.call("update_va_mapping", UPPER + (20 << 12), page | bits | 0x67, 0)
        results = machine.run(made.finished())
        assert results[-3:] == [FAULTED, (1 << 64) - abi.EPERM, (1 << 64) - abi.EPERM]
        assert machine.frames.words[at] == page | 0x67
    finally:
        machine.close()


@pytest.mark.parametrize("watched", [False, True], ids=["native", "python"])
@pytest.mark.parametrize("how", ["mmu_update", "mmuext_op", "multicall"])
def test_a_hypercall_that_validates_many_tables_gives_way(kernel: Path, how: str, watched: bool) -> None:
    machine = Machine(kernel, watched=watched)
    try:
        tables = Tables(machine, random.Random(0))
        words, upper, lower = machine.frames.words, tables.levels[3][2], tables.levels[2][2]
        made = Program(machine, random.Random(0))
        made.start(tables.levels[4][0])
        first = machine.frames.count - 4096
        for index in range(512):
            words[(first + index) * 512 : (first + index + 1) * 512] = memoryview(bytes(4096)).cast("Q")
            words[lower * 512 + index] = first + index << 12 | 7
        words[upper * 512 : upper * 512 + 512] = memoryview(bytes(4096)).cast("Q")
        made.extended((abi.MMUEXT_PIN_L3_TABLE, upper))
        times = 9
        changes = [(upper << 12, entry) for _ in range(times) for entry in (lower << 12 | 7, 0)]
        pins = [(command, lower) for _ in range(times) for command in (1, abi.MMUEXT_UNPIN_TABLE)]
        if how == "mmu_update":
            made.update(*changes)
        elif how == "mmuext_op":
            made.extended(*pins)
        else:
            places = [made.structure(struct.pack("<I4xQQ", command, frame, 0)) for command, frame in pins]
            number = HYPERCALL_NUMBERS["mmuext_op"]
            entries = [struct.pack("<8Q", number, 0, place, 1, 0, abi.DOMID_SELF, 0, 0) for place in places]
            made.call("multicall", made.structure(b"".join(entries)), len(entries))
        system_call, calls = machine.domain.system_call, []

        def counted(following: int) -> Exit | None:
            calls.append(following)
            return system_call(following)

        machine.domain.system_call = counted  # type: ignore[method-assign]
        results = machine.run(made.finished())
        assert results[-1] == 0 and not machine.frames.kind_count[lower]
        # each change is about 513 tables
        assert len(calls) - (len(results) if watched else 0) >= 2 * times * 513 // 1024 - 1
        check(machine, machine.xen._rings[::2])
    finally:
        machine.close()
