"""A PV domain's frequent hypercalls done natively leave what Python would: results, frame table, tables, registers."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from trivisor.boot.image import Image
from trivisor.machine import tsc
from trivisor.machine.clock import Clock
from trivisor.machine.exits import Hypercall
from trivisor.machine.memory import MIB
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.paravirt.xen.machine import XenMachine
from trivisor.translation.cpu import TranslationVcpu
from trivisor.translation.deprivileged import Deprivileged
from trivisor.x86.assembler import assemble

BASE = 0xFFFFFFFF80000000
RECORDS, DATA = BASE + 0x1100000, BASE + 0x1200000
UPPER = 0xFFFF900000000000
"""Linear address of what the kernel's half maps by the first of the test's level-1 tables."""
NOTES = {
    6: b"test\0", 5: b"xen-3.0\0", 3: struct.pack("<Q", BASE), 4: bytes(8), 1: struct.pack("<Q", BASE + 0x1000000),
}  # fmt: skip
LOAD = (1 << 64) - 2
END = (1 << 64) - 1

# Each record: number, four arguments, result.  Number LOAD is a load from the first argument.
GUEST = f"""
    mov rbx, {RECORDS:#x}
next:
    mov rax, [rbx]
    cmp rax, -1
    je done
    mov rdi, [rbx+8]
    cmp rax, -2
    je load
    mov rsi, [rbx+16]
    mov rdx, [rbx+24]
    mov r10, [rbx+32]
    syscall
    jmp result
load:
    mov rax, [rdi]
result:
    mov [rbx+40], rax
    add rbx, 64
    jmp next
done:
    mov edi, {abi.SCHEDOP_SHUTDOWN}
    mov rsi, {DATA + 0x8000:#x}
    mov eax, {HYPERCALL_NUMBERS["sched_op"]}
    syscall
    ud2
"""


def image() -> bytes:
    """A PV kernel of the code above, with 4 MiB of its own memory."""
    notes = b""
    for kind, value in NOTES.items():
        notes += struct.pack("<3I4s", 4, len(value), kind, b"Xen\0") + value + bytes(-len(value) % 4)
    code = assemble(GUEST, origin=BASE + 0x1000000).code
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    at = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 7, at, BASE + 0x1000000, 0x1000000, len(code), 0x400000, 1)
    note = struct.pack("<IIQQQQQQ", 4, 4, at + len(code), 0, 0, len(notes), len(notes), 4)
    return header + load + note + code + notes


class Machine:
    """One domain, ready for its first instruction; `watched` if Python is to do everything."""

    def __init__(self, path: Path, *, watched: bool) -> None:
        stopped: list[int] = []
        self.xen = XenMachine(
            64 * MIB, Clock(), console_output=lambda _: None, tsc=tsc.read, tsc_frequency=tsc.frequency(),
            on_stop=lambda: stopped.append(1),
        )  # fmt: skip
        self.domain = self.xen.domain
        self.vcpu = TranslationVcpu(self.xen.platform, supervision=self.domain.native)
        self.domain.observers = lambda kind: self.vcpu.observed.get(kind, [])
        cpu = Deprivileged(self.vcpu, self.domain)
        with Image(path) as kernel:
            state = self.xen.start(cpu, kernel, None, "")
        self.vcpu.state = state
        cpu.enter_space(state.cr3, True)
        if watched:
            self.vcpu.observed[Hypercall] = [lambda _: None]
        self.frames = self.domain.frames
        self.own = range(self.frames.count - 400, self.frames.count - 400 + 24)
        """Frames of the domain's that nothing uses."""

    def frame_of(self, linear: int) -> int:
        """The frame that the kernel's own mapping has at a linear address."""
        words, table = self.frames.words, self.domain.state.kernel_root
        for shift in (39, 30, 21, 12):
            table = (words[table * 512 + (linear >> shift & 511)] & (1 << 52) - 1) >> 12
        return table

    def put(self, linear: int, data: bytes) -> None:
        for at in range(0, len(data), 4096):
            self.xen.memory.write(self.frame_of(linear + at) << 12, data[at : at + 4096])

    def run(self, records: list[tuple[int, ...]]) -> list[int]:
        """Have the guest make these hypercalls; returns what it got."""
        raw = b"".join(struct.pack("<5Q24x", *record, *(0,) * (5 - len(record))) for record in records)
        self.put(RECORDS, raw + struct.pack("<Q", END))
        self.vcpu.run()
        assert type(self.xen.platform.stop_reason).__name__ == "PowerOff"
        results = b"".join(
            self.xen.memory.read(self.frame_of(RECORDS + at) << 12, 4096) for at in range(0, len(raw), 4096)
        )
        return [struct.unpack_from("<Q", results, 64 * number + 40)[0] for number in range(len(records))]

    def left(self) -> dict[str, Any]:
        """Everything that hypercalls may have changed."""
        domain, frames = self.domain, self.frames
        domain.tables.drop_lingering()
        state = domain.state
        return {
            "owner": bytes(frames.owner), "kind": bytes(frames.kind), "kinds": frames.kind_count.tolist(),
            "references": frames.references.tolist(), "pinned": bytes(frames.pinned),
            "tables": [bytes(self.xen.memory.read(frame << 12, 4096)).hex() for frame in self.own],
            "roots": (state.kernel_root, state.user_root), "stack": (state.kernel_stack, state.kernel_stack_selector),
            "bases": [domain.cpu.base(segment) for segment in (4, 5)] + [domain.cpu.other_gs],
            "calls": domain.statistics()["hypercalls"],
        }  # fmt: skip

    def close(self) -> None:
        self.vcpu.close()
        self.xen.close()


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


@pytest.mark.parametrize("seed", range(6))
def test_natively_as_by_python(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image())
    outcomes = []
    for watched in (False, True):
        machine = Machine(path, watched=watched)
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


def test_what_the_kernel_maps_is_seen_after_a_switch(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image())
    machine = Machine(path, watched=False)
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
