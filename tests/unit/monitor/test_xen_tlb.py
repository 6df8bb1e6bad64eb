"""What a PV guest's TLBs forget when its page tables change, and what they keep."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.monitor.pv_guest import CALL, LOAD, STORE, STORES, UPPER, Machine, image
from tests.unit.monitor.test_xen_native_page_tables import FAULTED, Program
from tests.unit.paravirt.xen.tlb_invariant import check_tlbs, known
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.paravirt.xen.shared_table import INDEX
from trivisor.translation.layout import OFFSETS
from trivisor.x86.exceptions import GuestException
from trivisor.x86.paging import Access

LEVELS = {4: 4, 3: 3, 2: 3, 1: 6, 0: 8}
"""How many frames are meant as page tables of each level, and for data."""
PAGES = 8
"""How many entries of a level-1 table are used."""
SECOND = 2 << 20
"""From what one entry of level 2 maps to what the next one does."""
MOV = STORES.index("mov [rdi], rdx")


class Space:
    """Two level-4 tables for the kernel that share what UPPER maps, two for the user, and tables to hang in them."""

    def __init__(self, machine: Machine) -> None:
        frames, words = iter(machine.own), machine.frames.words
        self.levels = {level: [next(frames) for _ in range(count)] for level, count in LEVELS.items()}
        roots, third, second, first = (self.levels[level] for level in (4, 3, 2, 1))
        self.data = self.levels[0]
        for frame in machine.own:
            words[frame * 512 : frame * 512 + 512] = memoryview(bytes(4096)).cast("Q")
        start = machine.domain.state.kernel_root
        for number, root in enumerate(roots):
            for index in (510, 511):
                words[root * 512 + index] = words[start * 512 + index]
            words[root * 512 + (UPPER >> 39 & 511)] = third[0] << 12 | 7
            words[root * 512] = third[1 + number % 2] << 12 | 7
        for number in range(3):
            words[third[number] * 512] = second[number] << 12 | 7
            words[second[number] * 512] = first[number] << 12 | 7
        for table in first:
            for index in range(PAGES):
                words[table * 512 + index] = self.data[index] << 12 | 7


@pytest.fixture(params=[False, True], ids=["native", "python"])
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    path = tmp_path / "kernel"
    path.write_bytes(image())
    made = Machine(path, watched=request.param)
    yield made
    made.close()


def when_asked(machine: Machine, do: Callable[[], None]) -> int:
    """The number of a hypercall that does this."""
    number = HYPERCALL_NUMBERS["console_io"]

    def handle(*_: int) -> int:
        do()
        return 0

    machine.domain._handlers[number] = handle
    return number


def run_as_user(machine: Machine, rng: random.Random) -> None:
    """Go to the user's space and back; its TLB gets some of what is mapped there."""
    state, cpu, mmu = machine.domain.state, machine.domain.cpu, machine.vcpu.mmu
    if not state.user_root:
        return
    cpu.enter_space(state.user_root << 12, False)
    for linear in [rng.choice([0, SECOND, UPPER]) + (rng.randrange(PAGES) << 12) for _ in range(8)]:
        access = rng.choice([Access.READ, Access.WRITE])
        try:
            found = mmu.walk(linear, access, True)
        except GuestException:
            continue
        mmu.fill(linear, True, found)
    cpu.enter_space(state.kernel_root << 12, True)


def program(made: Program, space: Space, check: int) -> None:
    rng, levels = made.rng, space.levels
    roots, third, second, first = (levels[level] for level in (4, 3, 2, 1))
    made.start(roots[0])
    for root in roots[1:]:
        made.extended((abi.MMUEXT_PIN_L4_TABLE, root))

    def entry(level: int) -> int:
        wanted = levels[level - 1] * 6 + levels[1]
        return rng.choice([0, rng.choice(wanted) << 12 | rng.choice([7, 7, 7, 5, 0x67, 0x65])])

    def linear() -> int:
        return rng.choice([0, SECOND, UPPER, UPPER + SECOND]) + (rng.randrange(PAGES) << 12)

    while len(made.records) < 300:
        match rng.randrange(12):
            case 0 | 1:
                made.update(*((rng.choice(first) << 12 | rng.randrange(PAGES) * 8, entry(1)) for _ in range(2)))
            case 2:
                level, tables = rng.choice([(2, second), (2, second), (3, third), (4, roots[2:])])
                made.update((rng.choice(tables) << 12 | rng.choice([0, 0, 8]), entry(level)))
            case 3:
                made.extended((abi.MMUEXT_NEW_BASEPTR, rng.choice(roots[:2])))
            case 4:
                made.extended((abi.MMUEXT_NEW_USER_BASEPTR, rng.choice([0, *roots[1:]])))
            case 5:
                command = rng.choice([abi.MMUEXT_TLB_FLUSH_LOCAL, abi.MMUEXT_INVLPG_LOCAL])
                made.extended((command, linear()))
            case 6:
                made.call("update_va_mapping", linear(), entry(1), rng.randrange(3))
            case 7:
                frame = rng.choice(space.data + first[3:])
                made.extended((rng.choice([abi.MMUEXT_PIN_L1_TABLE, abi.MMUEXT_UNPIN_TABLE]), frame))
            case 8:
                frame = rng.choice(roots[2:])
                made.extended((rng.choice([abi.MMUEXT_PIN_L4_TABLE, abi.MMUEXT_UNPIN_TABLE]), frame))
            case 9 | 10:
                made.records.append((LOAD, linear()))
                # never what is a present entry, so that data may become a table
                made.records.append((STORE, linear(), MOV, rng.randrange(1 << 20) << 12))
            case 11:
                made.records.append((check,))


@pytest.mark.parametrize("seed", range(16))
def test_tlbs_have_only_what_is_mapped(machine: Machine, seed: int) -> None:
    rng = random.Random(seed)
    space, checked = Space(machine), []
    machine.vcpu.blocks.tunes_at_once = bool(seed % 2)  # then loads and stores go by site caches

    def check() -> None:
        checked.append(check_tlbs(machine))
        run_as_user(machine, rng)
        check_tlbs(machine)

    made = Program(machine, rng)
    program(made, space, when_asked(machine, check))
    machine.run(made.finished())
    check_tlbs(machine)
    assert sum(checked) > 20


# -- single cases ---------------------------------------------------------------------------------------------


class Case:
    """A program that loads what is mapped at UPPER, and what the kernel's TLB had of it each time it was asked."""

    def __init__(self, machine: Machine) -> None:
        self.space = Space(machine)
        for number, frame in enumerate(self.space.data):
            machine.frames.words[frame * 512] = 0x1000 * (number + 1)
        self.machine = machine
        self.made = Program(machine, random.Random(0))
        self.made.start(self.space.levels[4][0])
        self.made.extended((abi.MMUEXT_PIN_L4_TABLE, self.space.levels[4][1]))
        self.had: list[bool] = []
        self._ask = when_asked(machine, self._look)

    def _look(self) -> None:
        check_tlbs(self.machine)
        self.had.append(any(linear == UPPER for linear, _, _ in known(self.machine, "KERNEL")))

    def load(self) -> None:
        self.made.records.append((LOAD, UPPER))

    def look(self) -> None:
        self.made.records.append((self._ask,))

    def flush(self, how: str) -> None:
        made = self.made
        match how:
            case "all":
                made.extended((abi.MMUEXT_TLB_FLUSH_LOCAL, 0))
            case "page":
                made.extended((abi.MMUEXT_INVLPG_LOCAL, UPPER))
            case "space":
                made.extended((abi.MMUEXT_NEW_BASEPTR, self.space.levels[4][1]))
            case "mapping":
                made.call("update_va_mapping", UPPER + 0x7000, 0, abi.UVMF_TLB_FLUSH)
            case "mapping of the page":
                entry = self.machine.frames.words[self.space.levels[1][0] * 512]
                made.call("update_va_mapping", UPPER, entry, abi.UVMF_INVLPG)

    def results(self) -> list[int]:
        return self.machine.run(self.made.finished())


FLUSHES = ["all", "page", "space", "mapping", "mapping of the page"]


@pytest.mark.parametrize("how", FLUSHES)
def test_a_flush_keeps_what_is_mapped(machine: Machine, how: str) -> None:
    case = Case(machine)
    case.load()
    case.look()
    case.flush(how)
    case.look()
    case.load()
    results = case.results()
    assert case.had[0] and results[-1] == 0x1000
    natively = not machine.vcpu.observed
    if how != "mapping of the page" and (natively or how != "space"):  # whose entry is written, if to what it was
        assert case.had[1]


@pytest.mark.parametrize("how", FLUSHES[:-1])
@pytest.mark.parametrize("level", [2, 3])
def test_a_flush_after_a_change_further_up(machine: Machine, level: int, how: str) -> None:
    case = Case(machine)
    levels, words = case.space.levels, machine.frames.words
    words[levels[1][4] * 512] = case.space.data[5] << 12 | 7
    words[levels[2][2] * 512] = levels[1][4] << 12 | 7
    case.load()
    table, other = (levels[2][0], levels[1][4]) if level == 2 else (levels[3][0], levels[2][2])
    case.made.update((table << 12, other << 12 | 7))
    case.flush(how)
    case.look()
    case.load()
    results = case.results()
    assert results[-1] == 0x6000
    if how != "page":
        assert case.had == [False] and not machine.domain.table.words[INDEX["STALE"]]


def test_an_empty_table_may_go_without_a_flush(machine: Machine) -> None:
    case = Case(machine)
    first, second = case.space.levels[1][0], case.space.levels[2][0]
    case.load()
    case.made.update(*((first << 12 | 8 * index, 0) for index in range(PAGES)))
    case.made.update((second << 12, 0))
    case.look()
    case.load()
    case.made.update((second << 12, case.space.levels[1][4] << 12 | 7))
    case.load()
    results = case.results()
    assert results[-3] == FAULTED and results[-1] == 0x1000
    assert case.had == [False] and not machine.domain.table.words[INDEX["STALE"]]


@pytest.mark.parametrize("how", FLUSHES[:-1])
def test_code_that_is_mapped_elsewhere(machine: Machine, how: str) -> None:
    case = Case(machine)
    for number in range(2):
        code = b"\xb8" + struct.pack("<I", 100 + number) + b"\xc3"
        machine.xen.memory.write(case.space.data[number] << 12, code)
    for number in range(4):
        case.made.records.append((CALL, UPPER))
        case.made.update((case.space.levels[1][0] << 12, case.space.data[1 - number % 2] << 12 | 7))
        if how == "space" and number % 2:
            case.made.extended((abi.MMUEXT_NEW_BASEPTR, case.space.levels[4][0]))
        else:
            case.flush(how)
        case.look()
    results = case.results()
    called = [result for record, result in zip(case.made.records, results, strict=True) if record[0] == CALL]
    assert called == [100, 101, 100, 101]


@pytest.mark.parametrize(("rights", "stays"), [(0x25, True), (0x07, True), (0x67, True), (1 << 63 | 7, False), (0, False)])
def test_code_whose_entry_has_other_rights(machine: Machine, rights: int, stays: bool) -> None:
    case = Case(machine)
    page = case.space.data[0] << 12
    machine.xen.memory.write(page, b"\xb8" + struct.pack("<I", 100) + b"\xc3")
    stale = []
    case.made.records.append((CALL, UPPER))
    case.made.update((case.space.levels[1][0] << 12, page | rights))
    case.made.records.append((when_asked(machine, lambda: stale.append(machine.domain.table.words[INDEX["STALE"]])),))
    case.flush("all")
    case.made.records.append((CALL, UPPER))
    results = case.results()
    assert stale == [not stays]
    assert results[-1] == (100 if stays else FAULTED)


def test_code_whose_translation_was_forgotten(machine: Machine) -> None:
    case = Case(machine)
    code = [b"\xb8" + struct.pack("<I", number) + b"\xc3" for number in (100, 101, 102)]
    first, second = case.space.data[1:3]
    machine.xen.memory.write(first << 12, code[0])
    machine.xen.memory.write(second << 12, code[1])

    def overwrite() -> None:
        machine.xen.memory.write(first << 12, code[2])
        machine.vcpu.memory_written(first << 12, 4096)

    case.made.records.append((CALL, UPPER + 0x1000))
    case.made.records.append((when_asked(machine, overwrite),))
    case.made.update((case.space.levels[1][0] << 12 | 8, second << 12 | 7))
    case.flush("all")
    case.made.records.append((CALL, UPPER + 0x1000))
    results = case.results()
    assert results[-1] == 101 and 100 in results


def test_a_space_whose_upper_half_is_another(machine: Machine) -> None:
    case = Case(machine)
    levels, words = case.space.levels, machine.frames.words
    words[levels[4][1] * 512 + (UPPER >> 39 & 511)] = levels[3][2] << 12 | 7
    words[levels[1][2] * 512] = case.space.data[6] << 12 | 7
    for root in levels[4][1], levels[4][0], levels[4][1]:
        case.load()
        case.look()
        case.made.extended((abi.MMUEXT_NEW_BASEPTR, root))
    case.load()
    loaded = [value for record, value in zip(case.made.records, case.results(), strict=True) if record[0] == LOAD]
    assert loaded == [0x1000, 0x7000, 0x1000, 0x7000]


def test_a_page_that_becomes_a_table_is_not_writable(machine: Machine) -> None:
    case = Case(machine)
    levels, data = case.space.levels, case.space.data
    machine.frames.words[data[0] * 512] = 0
    case.made.records.append((STORE, UPPER, MOV, 0x5000))
    for table in levels[1]:
        case.made.update((table << 12, data[1] << 12 | 7))
    case.made.extended((abi.MMUEXT_PIN_L1_TABLE, data[0]))
    case.look()
    case.made.records.append((STORE, UPPER, MOV, 0x7000))
    results = case.results()
    assert not any(results) and machine.frames.pinned[data[0]]
    assert machine.frames.words[data[0] * 512] == 0x5000 and machine.frames.words[data[1] * 512] == 0x7000


def test_a_table_of_the_user_gives_place_to_another(machine: Machine) -> None:
    case = Case(machine)
    root = case.space.levels[4][2]
    user = OFFSETS["ROOT_USER"] // 8
    roots = []

    def go() -> None:
        run_as_user(machine, random.Random(0))
        roots.append(machine.vcpu.core.words[user])

    go_there = when_asked(machine, go)
    case.made.extended((abi.MMUEXT_PIN_L4_TABLE, root))
    case.made.extended((abi.MMUEXT_NEW_USER_BASEPTR, root))
    case.made.records.append((go_there,))
    case.made.extended((abi.MMUEXT_NEW_USER_BASEPTR, 0))
    case.made.extended((abi.MMUEXT_UNPIN_TABLE, root))
    case.made.update((root << 12, case.space.levels[3][2] << 12 | 7))
    case.made.extended((abi.MMUEXT_PIN_L4_TABLE, root))
    case.made.extended((abi.MMUEXT_NEW_USER_BASEPTR, root))
    results = case.results()
    assert not any(results) and roots == [root << 12]
    assert machine.vcpu.core.words[user] == (1 << 64) - 1
