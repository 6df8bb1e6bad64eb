"""A PV domain's frequent hypercalls done natively leave what Python would: results, frame table, tables, registers."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.unit.monitor.pv_guest import DATA, ENGINES, LOAD, UPPER, Machine, image
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS


def tables(machine: Machine) -> dict[str, list[int]]:
    """The test's frames by use: two level-4 tables, one of levels 3 and 2, three of level 1, and data."""
    own = list(machine.own)
    roots, third, second, first, data = own[:2], own[2:4], own[4:6], own[6:9], own[9:]
    words = machine.frames.words
    for frame in own:
        words[frame * 512 : frame * 512 + 512] = memoryview(bytes(4096)).cast("Q")
    for frame in data:
        words[frame * 512] = frame
    start = machine.domain.state.kernel_root
    slot = UPPER >> 39 & 511
    for root in roots:
        for index in (510, 511):
            words[root * 512 + index] = words[start * 512 + index]
        words[root * 512 + slot] = third[0] << 12 | 7
    words[third[0] * 512] = second[0] << 12 | 7
    words[second[0] * 512] = first[0] << 12 | 7
    for number, frame in enumerate(data):
        words[first[0] * 512 + number] = frame << 12 | 0x67
    return {"roots": roots, "third": third, "second": second, "first": first, "data": data}


def program(machine: Machine, made: dict[str, list[int]], seed: int) -> list[tuple[int, ...]]:
    """Hypercalls at random, good, bad and hostile, over those tables."""
    rng = random.Random(seed)
    number = HYPERCALL_NUMBERS
    data = bytearray(0x9000)
    records: list[tuple[int, ...]] = []
    at = 0

    def structure(layout: str, *values: int) -> int:
        nonlocal at
        struct.pack_into(layout, data, at, *values)
        at += 64
        return DATA + at - 64

    def extended(*operations: tuple[int, int]) -> None:
        raw = b"".join(struct.pack("<I4xQQ", command, value, 0) for command, value in operations)
        where = structure(f"<{len(raw)}s", raw)  # type: ignore[arg-type]
        records.append((number["mmuext_op"], where, len(operations), 0, rng.choice([abi.DOMID_SELF] * 9 + [5])))

    start = machine.domain.state.kernel_root
    for root in made["roots"]:
        extended((abi.MMUEXT_PIN_L4_TABLE, root))
    extended((abi.MMUEXT_PIN_L1_TABLE, made["first"][1]))
    everything = [frame for frames in made.values() for frame in frames] + [start, 0, 1, machine.frames.count, 1 << 39]
    roots = [start, *made["roots"]]
    while len(records) < 110:
        match rng.randrange(8):
            case 0 | 1 | 2:
                table = rng.choice(made["first"][:2] * 6 + made["second"] + made["third"] + everything[:6])
                target = rng.choice(made["data"] * 3 + everything)
                flags = rng.choice([7, 5, 0x67, 0x63, 0, 0x10, 0x107]) | rng.choice([0, 1 << 63, 1 << 60])
                index = rng.randrange(16)
                command = rng.choice([0, 0, 0, 2, 2, 1, 3, 4])
                where = structure("<QQ", table << 12 | index * 8 | command, target << 12 | flags)
                records.append((number["mmu_update"], where, 1, 0, abi.DOMID_SELF))
            case 3:
                extended((abi.MMUEXT_NEW_BASEPTR, rng.choice(roots * 2 + everything[-4:])))
            case 4:
                extended(
                    (abi.MMUEXT_NEW_BASEPTR, rng.choice(roots)),
                    (abi.MMUEXT_NEW_USER_BASEPTR, rng.choice([0, *roots, made["first"][2]])),
                )
            case 5:
                choices = [abi.MMUEXT_UNPIN_TABLE, abi.MMUEXT_PIN_L4_TABLE, abi.MMUEXT_TLB_FLUSH_LOCAL, 99]
                extended((rng.choice(choices), rng.choice(made["roots"] + everything)))
            case 6:
                name, first, second = rng.choice([
                    ("set_segment_base", rng.randrange(3), rng.choice([0x1000, 1 << 47, (1 << 64) - 0x1000])),
                    ("stack_switch", 0xE02B, rng.getrandbits(64)), ("vcpu_op", 3, rng.choice([0, 1, 1 << 40])),
                    ("xen_version", rng.randrange(3), 0x1000), ("mmu_update", 0x1000, 1),
                    ("mmu_update", DATA + 4090, 1), ("mmuext_op", 1 << 63, 1),
                ])  # fmt: skip
                records.append((number[name], first, second, 0, abi.DOMID_SELF))
            case 7:
                # a mapping of the kernel's half changes, and nothing but the address space tells of it
                index, frame = rng.randrange(4), rng.choice(made["data"])
                where = structure("<QQ", made["first"][0] << 12 | index * 8, frame << 12 | 0x25)
                load = (LOAD, DATA + 0x8008)
                for root in made["roots"]:
                    extended((abi.MMUEXT_NEW_BASEPTR, root))
                records += [load, (number["mmu_update"], where, 1, 0, abi.DOMID_SELF)]
                extended((abi.MMUEXT_NEW_BASEPTR, rng.choice(made["roots"])))
                records.append(load)
    struct.pack_into("<IIQ", data, 0x8000, abi.SHUTDOWN_POWEROFF, 0, 0x1234)
    machine.put(DATA, bytes(data))
    return records


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(6))
def test_natively_as_by_python(tmp_path: Path, seed: int, engine: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image())
    outcomes = []
    for watched in (False, True):
        machine = Machine(path, watched=watched, engine=engine)
        try:
            records = program(machine, tables(machine), seed)
            results = machine.run(records)
            outcomes.append((records, results, machine.left()))
            natively = machine.vcpu.statistics()["native helpers"]["supervised"]
            assert (natively == 0) if watched else (natively > 30)
        finally:
            machine.close()
    assert outcomes[0][0] == outcomes[1][0]
    assert outcomes[0][1] == outcomes[1][1]
    for name, value in outcomes[0][2].items():
        assert value == outcomes[1][2][name], name


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_kernel_maps_is_seen_after_a_switch(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image())
    machine = Machine(path, watched=False, engine=engine)
    try:
        made = tables(machine)
        data = bytearray(0x9000)
        struct.pack_into("<I", data, 0x8000, abi.SHUTDOWN_POWEROFF)
        for at, value in enumerate((made["roots"][0], made["roots"][1])):
            struct.pack_into("<I4xQQ", data, 64 * at, abi.MMUEXT_PIN_L4_TABLE, value, 0)
            struct.pack_into("<I4xQQ", data, 128 + 64 * at, abi.MMUEXT_NEW_BASEPTR, value, 0)
        for at, frame in enumerate(made["data"][5:9]):
            struct.pack_into("<QQ", data, 256 + 64 * at, made["first"][0] << 12, frame << 12 | 0x67)
        machine.put(DATA, bytes(data))
        mmuext, update = HYPERCALL_NUMBERS["mmuext_op"], HYPERCALL_NUMBERS["mmu_update"]
        records = [(mmuext, DATA + at, 1, 0, abi.DOMID_SELF) for at in (0, 64, 128, 192)]
        for at in range(4):
            records += [
                (LOAD, UPPER), (update, DATA + 256 + 64 * at, 1, 0, abi.DOMID_SELF),
                (mmuext, DATA + 128 + 64 * (at & 1), 1, 0, abi.DOMID_SELF), (LOAD, UPPER),
            ]  # fmt: skip
        results = machine.run(records)
        assert results[:4] == [0, 0, 0, 0]
        before = [made["data"][0], *made["data"][5:8]]
        for at in range(4):
            assert results[4 + 4 * at : 8 + 4 * at] == [before[at], 0, 0, made["data"][5 + at]]
        assert machine.domain.statistics()["hypercalls"]["mmu_update"] == 4
    finally:
        machine.close()
