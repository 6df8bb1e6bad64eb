"""All hypercalls with arguments of every hostile kind: always a result, and the frame table stays true."""

from __future__ import annotations

import random
import struct

import pytest

from tests.unit.paravirt.xen.accounts import check_accounts
from tests.unit.paravirt.xen.conftest import ARGUMENTS, Guest
from tests.unit.paravirt.xen.front_end import write_grant
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS, HYPERCALLS
from trivisor.paravirt.xen.errors import DomainCrash, Preempted

A, END = ARGUMENTS, ARGUMENTS + 0x10000
EDGES = [0, 1, 2, 3, 4, 7, 8, 31, 63, 511, 512, 4095, 4096, 0xFFFF] + [
    (1 << bits) + more & (1 << 64) - 1 for bits in (16, 26, 31, 32, 47, 48, 51, 52, 63, 64) for more in (-8, -1, 0, 1)
]
DOMAINS = [0, 1, 2, abi.DOMID_SELF, abi.DOMID_IO, abi.DOMID_XEN, 0xFFFF]


class Hostile:
    """A guest that has used a bit of everything, and then asks for anything."""

    def __init__(self, guest: Guest, seed: int) -> None:
        self.guest = guest
        self.rng = random.Random(seed)
        own = guest.domain.own
        third, second, table = (guest.frame() for _ in range(3))
        self.frames = [guest.frame() for _ in range(10)] + [third, second, table, guest.domain.state.kernel_root]
        words = guest.frames.words
        words[third * 512], words[second * 512] = second << 12 | 7, table << 12 | 7
        assert guest.update(guest.domain.state.kernel_root, 0, third << 12 | 7) == 0
        for index, frame in enumerate(self.frames[:4]):
            assert guest.update(table, index, frame << 12 | 7) == 0
        assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, self.frames[5]) == 0
        assert guest.extended(abi.MMUEXT_NEW_USER_BASEPTR, guest.domain.state.kernel_root) == 0
        for reference in range(8, 16):
            write_grant(guest, reference, abi.GTF_PERMIT_ACCESS, self.rng.choice([0, 1]), self.rng.choice(self.frames))
        self.frames += [
            0, own.shared_info, own.grant_frames[0], own.status_frames[0], own.end - 1, own._map_at // 512,
            guest.frames.count - 1, guest.frames.count,
        ]  # fmt: skip

    def pointer(self) -> int:
        return self.rng.choice([
            A, A + 8, A + 0x1000, A + 0x2003, END - 1, END - 8, END - 64, 0, 0xDEAD0000, (1 << 64) - 8,
            abi.HYPERVISOR_VIRT_START, 1 << 47,
        ])  # fmt: skip

    def value(self) -> int:
        """A number, a pointer, a frame, a machine address of one, a page-table entry or a linear address."""
        rng = self.rng
        match rng.randrange(8):
            case 0:
                return self.pointer()
            case 1:
                return rng.choice(self.frames)
            case 2:
                return rng.choice(self.frames) << 12 | rng.choice([0, 1, 2, 3, 8, 0x808, 0xFF8])
            case 3:
                return rng.choice(self.frames) << 12 | rng.choice([0, 1, 3, 5, 7, 0x67, 0x80, 0x1E7, 1 << 63 | 7])
            case 4:
                return rng.choice([0, 0x1000, 0x2000, 0x1FF000, 0x200000, 1 << 48])
            case 5:
                return rng.choice(EDGES)
            case _:
                return rng.randrange(32)

    def structure(self) -> bytes:
        """Fields of 2, 4 and 8 bytes, with domain ids where a pair of bytes stands."""
        rng, parts = self.rng, b""
        while len(parts) < 96:
            match rng.randrange(4):
                case 0:
                    parts += struct.pack("<HH", rng.choice(DOMAINS), rng.choice(DOMAINS))
                case 1:
                    parts += struct.pack("<II", self.value() & 0xFFFFFFFF, self.value() & 0xFFFFFFFF)
                case _:
                    parts += bytes(-len(parts) % 8) + struct.pack("<Q", self.value())
        return parts

    def arguments(self, name: str) -> list[int]:
        """Likely enough to get past the first check."""
        rng = self.rng
        command, count = rng.choice([rng.randrange(16), self.value()]), rng.choice([0, 1, 2, 3, 600, self.value()])
        domain = rng.choice([*[abi.DOMID_SELF] * 6, *DOMAINS, 1 << 16 | abi.DOMID_SELF])
        match name:
            case "mmu_update" | "mmuext_op":
                return [self.pointer(), count, rng.choice([0, self.pointer()]), domain, self.value(), self.value()]
            case "update_va_mapping" | "update_va_mapping_otherdomain":
                return [rng.choice([0, 0x1000, 0x5000, self.value()]), self.value(), self.value(), domain, 0, 0]
            case "grant_table_op":
                return [command, self.pointer(), count, self.value(), 0, 0]
            case "multicall" | "set_gdt":
                return [self.pointer(), count, self.value(), 0, 0, 0]
            case "memory_op":
                return [command | rng.choice([0, 0, 0, 3, 600, 1 << 20]) << 6, self.pointer(), 0, 0, 0, 0]
            case "vcpu_op":
                return [command, rng.choice([0, 0, 0, 1, self.value()]), self.pointer(), 0, 0, 0]
            case _:
                return [command, rng.choice([self.pointer(), self.value()]), *(self.value() for _ in range(4))]

    def prepare(self) -> None:
        """Something at every place that pointers lead to; now and then multicalls and reservations that hang together."""
        rng, store = self.rng, self.guest.cpu.store
        for at in (A, A + 0x1000, A + 0x2003):
            store(at, self.structure() + self.structure())
        if rng.random() < 0.3:
            number = rng.choice(list(HYPERCALLS))
            store(A, struct.pack("<8Q", number, 0, *self.arguments(HYPERCALLS[number])))
        elif rng.random() < 0.5:
            reservation = (rng.choice([A + 0x1000, END - 16]), rng.choice([1, 2, 600]), 0, 0, abi.DOMID_SELF)
            store(A, struct.pack("<QQIIH6x", *reservation))
        if rng.random() < 0.3:
            write_grant(
                self.guest, rng.randrange(8, 16), rng.choice([1, 1, 5, 0x101, 3, 0xFFFF]), rng.choice(DOMAINS),
                rng.choice(self.frames), rng.randrange(5000), rng.randrange(5000),
            )  # fmt: skip

    def call(self) -> int | None:
        """One hypercall, and its rest if it gives way; its result, None if it would go on, or ends the domain."""
        guest, rng = self.guest, self.rng
        number = rng.choice(list(HYPERCALLS))
        self.prepare()
        guest.cpu.registers[4] = rng.choice([A, A + 0x1000, END - 8, self.pointer()])
        arguments = self.arguments(HYPERCALLS[number])
        for _ in range(3):
            try:
                result = guest.domain.call(number, tuple(arguments))
            except Preempted as rest:
                arguments[: len(rest.arguments)] = rest.arguments
                assert all(0 <= argument < 1 << 64 for argument in arguments)
                continue
            except DomainCrash:
                assert number in (abi.IRET, HYPERCALL_NUMBERS["multicall"])
                result = 0
            assert number in (abi.IRET, HYPERCALL_NUMBERS["multicall"]) or -4096 < result < 1 << 64
            return result
        return None


@pytest.mark.parametrize("seed", range(4))
def test_arguments_of_every_kind_end_in_a_result(guest: Guest, seed: int) -> None:
    hostile = Hostile(guest, seed)
    check_accounts(guest.domain)
    good = 0
    for number in range(2500):
        result = hostile.call()
        good += result is not None and result >= 0
        guest.domain.halt = None
        if not guest.domain.state.in_kernel:
            guest.domain.switch_mode()
        if number % 250 == 249:
            check_accounts(guest.domain)
    assert good > 300, "not all of them were refused"
