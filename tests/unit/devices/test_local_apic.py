"""The local APIC against Intel SDM 3A, chapter 10."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable

import pytest

from trivisor.devices.local_apic import APIC_BASE, EXTINT, FIXED, NMI, LocalApic
from trivisor.machine.clock import Clock
from trivisor.machine.vcpu import GeneralProtection

TSC_HZ = 2_000_000_000
CRYSTAL_HZ = 25_000_000
EXTD, ENABLE, BSP = 1 << 10, 1 << 11, 1 << 8
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x350, 0x360, 0x370
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
MASKED, PERIODIC, DEADLINE = 1 << 16, 1 << 17, 1 << 18


class Pic:
    """An 8259 that has what the test puts in."""

    def __init__(self) -> None:
        self.vectors: list[int] = []

    def pending(self) -> bool:
        return bool(self.vectors)

    def acknowledge(self) -> int:
        return self.vectors.pop()


class Bench:
    """A local APIC in a machine whose time the test moves."""

    def __init__(self) -> None:
        self.now = 0
        self.clock = Clock(lambda: self.now)
        self.apic = LocalApic(self.clock, 0, lambda: self.now * 2, TSC_HZ, CRYSTAL_HZ)
        self.pic = Pic()
        self.apic.pic = self.pic
        self.wakes = 0
        self.nmis = 0
        self.ends: list[int] = []
        self.apic.on_pending = self._wake
        self.apic.on_nmi = self._nmi
        self.apic.on_end_of_interrupt = self.ends.append

    def _wake(self) -> None:
        self.wakes += 1

    def _nmi(self) -> None:
        self.nmis += 1

    def enable(self) -> Bench:
        self.write(SVR, 0x1FF)
        return self

    def x2apic(self) -> Bench:
        self.apic.write_base(APIC_BASE | BSP | ENABLE | EXTD)
        return self

    def advance(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.clock.run_due()

    def read(self, offset: int) -> int:
        return self.apic.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.apic.write(offset, 4, value)

    def take(self) -> list[int]:
        """Take and end all interrupts that can be had."""
        vectors = []
        while self.apic.pending():
            vectors.append(self.apic.acknowledge())
            self.write(EOI, 0)
        return vectors

    def has(self, bank: int, vector: int) -> bool:
        return bool(self.read(bank + (vector >> 5) * 16) >> (vector & 31) & 1)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_reset_state(bench: Bench) -> None:
    assert bench.read(SVR) == 0xFF
    assert bench.read(DFR) == 0xFFFFFFFF
    assert bench.read(VERSION) == 0x0005_0014  # six LVT entries
    assert [bench.read(offset) for offset in range(0x320, 0x380, 16)] == [MASKED] * 6
    assert bench.apic.read_base() == 0xFEE00900
    assert not bench.apic.pending()


def test_nothing_is_accepted_while_software_disabled(bench: Bench) -> None:
    assert not bench.apic.deliver(0x40, FIXED, False)
    assert not bench.apic.pending()
    bench.write(LVT_TIMER, 0x40)
    assert bench.read(LVT_TIMER) == 0x40 | MASKED


def test_accept_acknowledge_and_end(bench: Bench) -> None:
    bench.enable()
    assert bench.apic.deliver(0x51, FIXED, False)
    assert bench.wakes == 1 and bench.apic.pending() and bench.has(IRR, 0x51)
    assert bench.apic.acknowledge() == 0x51
    assert bench.has(ISR, 0x51) and not bench.has(IRR, 0x51) and bench.read(PPR) == 0x50
    bench.write(EOI, 0)
    assert not bench.has(ISR, 0x51) and bench.read(PPR) == 0 and bench.ends == []


def test_priority_classes_nest(bench: Bench) -> None:
    bench.enable()
    bench.apic.deliver(0x51, FIXED, False)
    assert bench.apic.acknowledge() == 0x51
    bench.apic.deliver(0x5F, FIXED, False)
    assert not bench.apic.pending(), "the same class must wait"
    bench.apic.deliver(0x61, FIXED, False)
    assert bench.apic.acknowledge() == 0x61
    bench.write(EOI, 0)
    assert not bench.apic.pending() and bench.has(ISR, 0x51)
    bench.write(EOI, 0)
    assert bench.apic.acknowledge() == 0x5F


def test_task_priority_and_cr8_are_one(bench: Bench) -> None:
    bench.enable()
    bench.apic.cr8 = 5
    assert bench.read(TPR) == 0x50 and bench.read(PPR) == 0x50
    bench.apic.deliver(0x5F, FIXED, False)
    assert not bench.apic.pending() and bench.wakes == 0
    bench.write(TPR, 0x4F)
    assert bench.apic.cr8 == 4 and bench.apic.pending() and bench.wakes == 1


def test_withdrawn_interrupt_gives_the_spurious_vector(bench: Bench) -> None:
    bench.enable()
    bench.apic.deliver(0x40, FIXED, False)
    bench.apic.cr8 = 15
    assert bench.apic.acknowledge() == 0xFF
    assert bench.has(IRR, 0x40) and not bench.has(ISR, 0xFF)


def test_end_of_a_level_triggered_interrupt_is_broadcast(bench: Bench) -> None:
    bench.enable()
    bench.apic.deliver(0x31, FIXED, True)
    assert bench.has(TMR, 0x31)
    assert bench.take() == [0x31] and bench.ends == [0x31]
    bench.apic.deliver(0x31, FIXED, False)
    assert bench.take() == [0x31] and bench.ends == [0x31]


def test_illegal_vector_sets_the_error_and_its_interrupt(bench: Bench) -> None:
    bench.enable()
    bench.write(LVT_ERROR, 0xFE)
    assert not bench.apic.deliver(15, FIXED, False)
    assert bench.take() == [0xFE]
    assert bench.read(ESR) == 0, "only a write latches the errors"
    bench.write(ESR, 0)
    assert bench.read(ESR) == 1 << 6
    bench.write(ESR, 0)
    assert bench.read(ESR) == 0


def test_illegal_vector_in_the_error_entry_ends(bench: Bench) -> None:
    bench.enable()
    bench.write(LVT_ERROR, 3)
    bench.write(ICR, 0x40000 | 2)
    bench.write(ESR, 0)
    assert bench.read(ESR) == 0x60


def test_reserved_register_is_an_error(bench: Bench) -> None:
    bench.enable()
    assert bench.read(0x40) == 0
    bench.write(0x3F0, 1)
    bench.write(ESR, 0)
    assert bench.read(ESR) == 1 << 7
    bench.write(VERSION, 0)
    bench.write(ESR, 0)
    assert bench.read(ESR) == 0, "a write to a read-only register is just ignored"


@pytest.mark.parametrize(
    ("low", "destination", "expected"),
    [
        (0x40000 | 0x45, 0, [0x45]),  # self
        (0x80000 | 0x45, 0, [0x45]),  # all including self
        (0xC0000 | 0x45, 0, []),  # all but self
        (0x45, 0, [0x45]),  # physical, our ID
        (0x45, 3, []),
        (0x45, 0xFF, [0x45]),
        (0x845, 0x02, [0x45]),  # logical flat
        (0x845, 0x04, []),
        (0x40000 | 0x545, 0, []),  # INIT
        (0x4608, 0, []),  # start-up
    ],
)
def test_interprocessor_interrupts(bench: Bench, low: int, destination: int, expected: list[int]) -> None:
    bench.enable()
    bench.write(LDR, 0x02000000)
    bench.write(ICR_HIGH, destination << 24)
    bench.write(ICR, low)
    assert bench.take() == expected
    assert bench.read(ICR) == low & ~(1 << 12)


def test_logical_cluster_destinations(bench: Bench) -> None:
    bench.write(DFR, 0x0FFFFFFF)
    bench.write(LDR, 0x24000000)
    assert (
        bench.apic.matches(0x24, True) and bench.apic.matches(0x2C, True) and bench.apic.matches(0xF4, True)
    )
    assert not bench.apic.matches(0x34, True) and not bench.apic.matches(0x22, True)


def test_nmi_messages_and_pin(bench: Bench) -> None:
    bench.apic.deliver(0, NMI, False)
    assert bench.nmis == 1
    bench.enable().write(ICR, 0x40000 | 0x400)
    assert bench.nmis == 2
    bench.apic.lint1(True)
    assert bench.nmis == 2, "LINT1 is masked"
    bench.write(LVT_LINT1, 0x400)
    bench.apic.lint1(False)
    bench.apic.lint1(True)
    assert bench.nmis == 3 and not bench.apic.pending()


def test_8259_passes_only_through_an_open_lint0(bench: Bench) -> None:
    bench.enable()
    bench.pic.vectors = [0x08]
    bench.apic.lint0(True)
    assert not bench.apic.pending() and bench.wakes == 0
    bench.write(LVT_LINT0, EXTINT << 8)
    assert bench.apic.pending() and bench.wakes == 1
    bench.apic.cr8 = 15
    assert bench.apic.acknowledge() == 0x08, "the 8259 does not heed the task priority"
    assert not bench.apic.pending() and bench.read(ISR) == 0
    bench.pic.vectors = [0x09]
    bench.write(LVT_LINT0, EXTINT << 8 | MASKED)
    assert not bench.apic.pending()


def test_8259_drives_the_processor_while_the_apic_is_off(bench: Bench) -> None:
    bench.apic.write_base(APIC_BASE)
    bench.pic.vectors = [0x0B]
    bench.apic.lint0(True)
    assert bench.wakes == 1 and bench.apic.pending() and bench.apic.acknowledge() == 0x0B
    assert bench.read(VERSION) == 0xFFFFFFFF
    assert not bench.apic.deliver(0x40, FIXED, False)


def test_lint0_in_fixed_mode_interrupts_on_the_edge(bench: Bench) -> None:
    bench.enable().write(LVT_LINT0, 0x47)
    taken = []
    for level in (True, True, False, True):
        bench.apic.lint0(level)
        taken.append(bench.take())
    assert taken == [[0x47], [], [], [0x47]]


def test_extint_message_asks_the_8259(bench: Bench) -> None:
    bench.enable()
    bench.pic.vectors = [0x0C, 0x0D]
    bench.apic.deliver(0, EXTINT, False)
    assert bench.apic.pending() and bench.apic.acknowledge() == 0x0D
    assert not bench.apic.pending(), "one message is one interrupt"


def test_virtual_wire_mode(bench: Bench) -> None:
    bench.apic.enter_virtual_wire_mode()
    bench.pic.vectors = [0x08]
    assert bench.apic.pending() and bench.read(SVR) == 0x1FF


def test_one_shot_timer(bench: Bench) -> None:
    bench.enable().write(LVT_TIMER, 0x30)
    bench.write(DIVIDE, 0b0011)  # by 16: 640 ns a tick
    bench.write(INITIAL, 1000)
    assert bench.read(CURRENT) == 1000
    bench.advance(320_000)
    assert bench.read(CURRENT) == 500
    bench.advance(319_999)
    assert bench.take() == [] and bench.read(CURRENT) == 0
    bench.advance(1)
    assert bench.take() == [0x30]
    bench.advance(10_000_000)
    assert bench.take() == [] and bench.read(CURRENT) == 0 and bench.read(INITIAL) == 1000


@pytest.mark.parametrize(
    ("value", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
)
def test_divide_configuration(bench: Bench, value: int, divisor: int) -> None:
    bench.enable().write(LVT_TIMER, 0x30)
    bench.write(DIVIDE, value)
    bench.write(INITIAL, 100)
    assert bench.clock.next_deadline() == 100 * divisor * 40


def test_a_running_count_keeps_its_value_over_a_new_divisor(bench: Bench) -> None:
    bench.enable().write(LVT_TIMER, 0x30)
    bench.write(DIVIDE, 11)
    bench.write(INITIAL, 1000)
    bench.advance(400 * 40)
    bench.write(DIVIDE, 0)
    assert bench.read(CURRENT) == 600
    bench.advance(600 * 80)
    assert bench.take() == [0x30]


def test_periodic_timer_keeps_its_phase(bench: Bench) -> None:
    bench.enable().write(LVT_TIMER, 0x30 | PERIODIC)
    bench.write(DIVIDE, 11)
    bench.write(INITIAL, 25_000)  # 1 ms
    for _ in range(3):
        bench.advance(1_000_000)
        assert bench.take() == [0x30]
    bench.advance(2_600_000)
    assert bench.take() == [0x30], "missed periods come once"
    assert bench.read(CURRENT) == 10_000
    bench.advance(400_000)
    assert bench.take() == [0x30]
    bench.write(INITIAL, 0)
    bench.advance(5_000_000)
    assert bench.take() == [] and bench.clock.next_deadline() is None


def test_a_tiny_period_cannot_hold_the_host(bench: Bench) -> None:
    clock = Clock(itertools.count(0, 500).__next__)  # whoever looks at it makes time pass
    apic = LocalApic(clock, 0, clock.now, TSC_HZ, CRYSTAL_HZ)
    apic.enter_virtual_wire_mode()
    apic.write(LVT_TIMER, 4, 0x30 | PERIODIC)
    apic.write(DIVIDE, 4, 11)
    apic.write(INITIAL, 4, 1)  # 40 ns
    clock.run_due()  # must come back
    assert apic.acknowledge() == 0x30


def test_masked_timer_makes_no_interrupt(bench: Bench) -> None:
    bench.enable().write(LVT_TIMER, 0x30 | MASKED)
    bench.write(INITIAL, 1)
    bench.advance(1_000_000)
    assert bench.take() == []


def test_tsc_deadline(bench: Bench) -> None:
    bench.enable().write(LVT_TIMER, 0x30 | DEADLINE)
    bench.write(INITIAL, 5)
    assert bench.read(INITIAL) == 0, "the count does not exist in this mode"
    bench.apic.write_tsc_deadline(2_000_001)
    assert bench.apic.read_tsc_deadline() == 2_000_001
    bench.advance(1_000_000)
    assert bench.take() == [], "half a TSC tick too soon"
    bench.advance(1)
    assert bench.take() == [0x30] and bench.apic.read_tsc_deadline() == 0
    bench.apic.write_tsc_deadline(1)
    assert bench.take() == [0x30], "the past fires at once"
    bench.apic.write_tsc_deadline(1 << 40)
    bench.apic.write_tsc_deadline(0)
    assert bench.clock.next_deadline() is None
    bench.apic.write_tsc_deadline((1 << 64) - 1)
    bench.write(LVT_TIMER, 0x30)
    assert bench.apic.read_tsc_deadline() == 0 and bench.clock.next_deadline() is None


def test_deadline_register_is_dead_in_other_modes(bench: Bench) -> None:
    bench.enable().write(LVT_TIMER, 0x30)
    bench.apic.write_tsc_deadline(5)
    assert bench.apic.read_tsc_deadline() == 0 and bench.take() == []


def test_x2apic_registers(bench: Bench) -> None:
    apic = bench.enable().x2apic().apic
    assert apic.read_msr(0x802) == 0 and apic.read_msr(0x80D) == 1 and apic.read_msr(0x803) == 0x50014
    assert bench.read(VERSION) == 0xFFFFFFFF, "the window is gone"
    apic.write_msr(0x83F, 0x77)
    assert apic.acknowledge() == 0x77
    apic.write_msr(0x80B, 0)
    apic.write_msr(0x830, 0x0000_0000_0000_0078)
    assert apic.read_msr(0x830) == 0x78 and apic.acknowledge() == 0x78
    apic.write_msr(0x830, 0x0000_0001_0000_0079)
    assert not apic.pending()
    apic.write_msr(0x808, 0x90)
    assert apic.cr8 == 9


@pytest.mark.parametrize(
    "access",
    [
        lambda apic: apic.read_msr(0x80B),
        lambda apic: apic.read_msr(0x80E),
        lambda apic: apic.read_msr(0x831),
        lambda apic: apic.read_msr(0x83F),
        lambda apic: apic.read_msr(0x800),
        lambda apic: apic.write_msr(0x802, 0),
        lambda apic: apic.write_msr(0x80B, 1),
        lambda apic: apic.write_msr(0x828, 1),
        lambda apic: apic.write_msr(0x808, 0x100),
        lambda apic: apic.write_msr(0x80F, 1 << 32),
        lambda apic: apic.write_msr(0x832, 1 << 20),
        lambda apic: apic.write_msr(0x839, 1),
        lambda apic: apic.write_msr(0x83E, 4),
        lambda apic: apic.write_msr(0x830, 1 << 20),
    ],
)
def test_x2apic_faults(bench: Bench, access: Callable[[LocalApic], object]) -> None:
    bench.x2apic()
    with pytest.raises(GeneralProtection):
        access(bench.apic)


def test_x2apic_msrs_fault_in_xapic_mode(bench: Bench) -> None:
    with pytest.raises(GeneralProtection):
        bench.apic.read_msr(0x802)
    with pytest.raises(GeneralProtection):
        bench.apic.write_msr(0x80B, 0)


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        (ENABLE, ENABLE | EXTD, True),
        (ENABLE | EXTD, 0, True),
        (ENABLE | EXTD, ENABLE, False),
        (ENABLE | EXTD, EXTD, False),
        (0, ENABLE | EXTD, False),
        (0, EXTD, False),
        (0, ENABLE, True),
    ],
)
def test_mode_transitions(bench: Bench, before: int, after: int, allowed: bool) -> None:
    bench.apic.write_base(APIC_BASE | BSP | before)
    if allowed:
        bench.apic.write_base(APIC_BASE | BSP | after)
        assert bench.apic.read_base() == APIC_BASE | BSP | after
    else:
        with pytest.raises(GeneralProtection):
            bench.apic.write_base(APIC_BASE | BSP | after)
        assert bench.apic.read_base() == APIC_BASE | BSP | before


@pytest.mark.parametrize("value", [0xFEE00801, 0xFEE00A00, 1 << 52 | 0xFEE00800])
def test_base_reserved_bits_fault(bench: Bench, value: int) -> None:
    with pytest.raises(GeneralProtection):
        bench.apic.write_base(value)


def test_the_window_moves(bench: Bench) -> None:
    moves: list[int] = []
    bench.apic.on_moved = moves.append
    bench.apic.write_base(0xFED40000 | BSP | ENABLE)
    assert bench.apic.read_base() == 0xFED40000 | BSP | ENABLE
    bench.apic.write_base(0xFED40000 | BSP)
    assert moves == [0xFED40000]


def test_without_x2apic_its_bit_faults() -> None:
    apic = LocalApic(Clock(lambda: 0), 0, lambda: 0, 1_000_000, 1_000_000, has_x2apic=False)
    with pytest.raises(GeneralProtection):
        apic.write_base(APIC_BASE | BSP | ENABLE | EXTD)
    assert apic.read_base() == APIC_BASE | BSP | ENABLE


def test_disabling_loses_the_state(bench: Bench) -> None:
    bench.enable().write(LVT_TIMER, 0x30 | PERIODIC)
    bench.write(INITIAL, 1000)
    bench.apic.deliver(0x40, FIXED, False)
    bench.apic.write_base(APIC_BASE | BSP)
    assert not bench.apic.pending() and bench.clock.next_deadline() is None
    bench.apic.write_base(APIC_BASE | BSP | ENABLE)
    assert bench.read(SVR) == 0xFF and bench.read(LVT_TIMER) == MASKED


def test_odd_accesses(bench: Bench) -> None:
    bench.enable()
    assert bench.apic.read(SVR, 1) == 0xFF and bench.apic.read(SVR + 1, 1) == 0x01
    assert bench.apic.read(SVR + 4, 4) == 0 and bench.apic.read(SVR, 8) == 0x1FF
    bench.apic.write(SVR, 1, 0)
    bench.apic.write(SVR + 4, 4, 0)
    assert bench.read(SVR) == 0x1FF
    bench.apic.write(TPR, 8, 0xFFFFFFFF_00000020)
    assert bench.read(TPR) == 0x20


def test_hostile_accesses_raise_nothing_but_general_protection(bench: Bench) -> None:
    generator = random.Random(10)
    apic = bench.apic
    for _ in range(2000):
        size = generator.choice((1, 2, 4, 8))
        value = generator.getrandbits(8 * size)
        apic.write(generator.randrange(0x1000 if generator.random() < 0.1 else 0x400), size, value)
        apic.read(generator.randrange(0x400), size)
        apic.write_tsc_deadline(generator.getrandbits(64))
        for act in (
            lambda: apic.write_base(APIC_BASE | generator.choice((0, ENABLE, EXTD, ENABLE | EXTD))),
            lambda: apic.write_msr(0x800 + generator.randrange(64), generator.getrandbits(64)),
            lambda: apic.write_msr(0x800 + generator.randrange(64), generator.getrandbits(8)),
            lambda: apic.read_msr(0x800 + generator.randrange(64)),
        ):
            with contextlib.suppress(GeneralProtection):
                act()
        apic.deliver(generator.getrandbits(8), generator.getrandbits(3), bool(generator.getrandbits(1)))
        if apic.pending():
            assert 0 <= apic.acknowledge() < 256
        bench.advance(generator.randrange(10_000))
