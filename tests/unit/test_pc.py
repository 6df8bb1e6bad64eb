"""The board: what stands where, and how it is wired."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from trivisor.machine.clock import Clock
from trivisor.machine.memory import GIB, MIB, GuestMemory
from trivisor.machine.stop import DebugExit, PowerOff, Reset
from trivisor.machine.vcpu import GeneralProtection, Surroundings
from trivisor.pc import Pc, crystal_frequency

IO_APIC, LOCAL_APIC = 0xFEC00000, 0xFEE00000


class Machine:
    def __init__(self, size: int = 16 * MIB) -> None:
        self.memory = GuestMemory(size)
        self.now = 0
        self.clock = Clock(lambda: self.now)
        self.output = bytearray()
        self.stops = 0
        self.pc = Pc(
            self.memory,
            self.clock,
            serial_output=self.output.extend,
            tsc=lambda: self.now * 2,
            tsc_frequency=2_000_000_000,
            on_stop=self._stop,
        )

    def _stop(self) -> None:
        self.stops += 1

    def advance(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.clock.run_due()

    def out(self, port: int, *values: int) -> None:
        for value in values:
            self.pc.ports.write(port, 1, value)

    def route(self, pin: int, low: int) -> None:
        for register, value in ((0x11 + 2 * pin, 0), (0x10 + 2 * pin, low)):
            self.pc.mmio.write(IO_APIC, 4, register)
            self.pc.mmio.write(IO_APIC + 0x10, 4, value)

    def unmask_pic(self) -> None:
        """Vectors 0x20 to 0x2f, everything unmasked."""
        self.out(0x20, 0x11)
        self.out(0x21, 0x20, 0x04, 0x01, 0x00)
        self.out(0xA0, 0x11)
        self.out(0xA1, 0x28, 0x02, 0x01, 0x00)


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.memory.close()


def test_is_what_a_processor_is_plugged_into(machine: Machine) -> None:
    surroundings: Surroundings = machine.pc
    assert surroundings.stop_reason is None and surroundings.apic_id == 0


def test_console(machine: Machine) -> None:
    machine.out(0x3F8, *b"hello")
    assert machine.output == b"hello"
    assert machine.pc.console_input(b"x") == 1
    machine.advance(1_000_000)
    assert machine.pc.ports.read(0x3FD, 1) & 1 and machine.pc.ports.read(0x3F8, 1) == ord("x")


@pytest.mark.parametrize(
    ("port", "size", "value", "reason"),
    [
        (0x604, 2, 0x2000, PowerOff()),
        (0xCF9, 1, 0x06, Reset()),
        (0x64, 1, 0xFE, Reset()),
        (0x92, 1, 0x01, Reset()),
        (0xF4, 1, 3, DebugExit(7)),
        (0xF4, 4, 0x10, DebugExit(33)),
        (0xF4, 4, 0xFFFFFFFF, DebugExit(255)),
    ],
)
def test_ends_of_a_run(machine: Machine, port: int, size: int, value: int, reason: object) -> None:
    machine.pc.ports.write(port, size, value)
    assert machine.pc.stop_reason == reason and machine.stops == 1


def test_only_the_first_end_counts(machine: Machine) -> None:
    machine.out(0xF4, 1)
    machine.pc.ports.write(0x604, 2, 0x2000)
    machine.out(0xF4, 2)
    assert machine.pc.stop_reason == DebugExit(3) and machine.stops == 1


def test_pci_configuration_beside_the_reset_register(machine: Machine) -> None:
    machine.pc.ports.write(0xCF8, 4, 0x80000000)
    assert machine.pc.ports.read(0xCFC, 4) == 0x12378086
    machine.out(0xCF9, 0x02)
    assert machine.pc.ports.read(0xCF8, 4) == 0x80000000 and machine.pc.stop_reason is None
    machine.pc.ports.write(0xCF8, 4, 0x80000800)
    assert machine.pc.ports.read(0xCFC, 4) == 0xFFFFFFFF


def test_pit_through_the_8259_as_firmware_leaves_it(machine: Machine) -> None:
    machine.unmask_pic()
    machine.out(0x43, 0x34)
    machine.out(0x40, 0x9C, 0x2E)  # 11932 pulses: 10 ms
    machine.advance(10_100_000)
    assert machine.pc.interrupts.pending() and machine.pc.interrupts.acknowledge() == 0x20
    assert not machine.pc.interrupts.pending()
    machine.out(0x20, 0x20)
    machine.advance(10_000_000)
    assert machine.pc.interrupts.pending()


def test_pit_through_pin_2_of_the_io_apic(machine: Machine) -> None:
    machine.route(2, 0x30)
    machine.out(0x43, 0x34)
    machine.out(0x40, 0x9C, 0x2E)
    machine.advance(10_100_000)
    assert machine.pc.interrupts.pending() and machine.pc.interrupts.acknowledge() == 0x30


def test_8259_through_pin_0_of_the_io_apic(machine: Machine) -> None:
    machine.unmask_pic()
    machine.pc.mmio.write(LOCAL_APIC + 0x350, 4, 1 << 16)
    machine.route(0, 0x700)
    machine.pc.isa_line(5)(True)
    assert machine.pc.interrupts.pending() and machine.pc.interrupts.acknowledge() == 0x25


def test_serial_interrupt_by_both_controllers(machine: Machine) -> None:
    machine.unmask_pic()
    machine.route(4, 0x44)
    machine.out(0x3FC, 0x08)
    machine.out(0x3F9, 0x02)  # transmitter empty
    taken = set()
    while machine.pc.interrupts.pending():
        taken.add(machine.pc.interrupts.acknowledge())
    assert taken == {0x24, 0x44}


def test_messages_for_others_are_dropped(machine: Machine) -> None:
    machine.route(5, 0x45)
    machine.pc.mmio.write(IO_APIC, 4, 0x1B)
    machine.pc.mmio.write(IO_APIC + 0x10, 4, 0x03000000)
    machine.pc.isa_line(5)(True)
    assert not machine.pc.interrupts.pending()


def test_system_control_interrupt_repeats_until_it_is_served(machine: Machine) -> None:
    machine.route(9, 0x8049)
    machine.pc.ports.write(0x602, 2, 1 << 8)
    machine.pc.pm.press_power_button()
    for _ in range(2):
        assert machine.pc.interrupts.pending() and machine.pc.interrupts.acknowledge() == 0x49
        machine.pc.mmio.write(LOCAL_APIC + 0xB0, 4, 0)
    assert machine.pc.interrupts.acknowledge() == 0x49
    machine.pc.ports.write(0x600, 2, 1 << 8)
    machine.pc.mmio.write(LOCAL_APIC + 0xB0, 4, 0)
    assert not machine.pc.interrupts.pending()


def test_apic_msrs(machine: Machine) -> None:
    msrs = machine.pc.msrs
    assert msrs[0x1B][0]() == 0xFEE00900
    with pytest.raises(GeneralProtection):
        msrs[0x802][0]()
    msrs[0x1B][1](0xFEE00D00)
    assert msrs[0x80F][0]() == 0x1FF
    msrs[0x832][1](1 << 18 | 0x50)
    msrs[0x6E0][1](2_000_000)
    machine.advance(1_000_000)
    assert machine.pc.interrupts.acknowledge() == 0x50


def test_firmware_data_is_where_kernels_look(machine: Machine) -> None:
    address = machine.pc.rsdp_address
    assert 0xE0000 <= address < 0x100000 and address % 16 == 0
    assert machine.memory.read(address, 8) == b"RSD PTR "
    assert machine.memory.read_u16(0x40E) << 4 == 0x9FC00 and machine.memory.read_u16(0x413) == 639


@pytest.mark.parametrize("size", [16 * MIB, 3 * GIB, 4 * GIB])
def test_memory_map(size: int) -> None:
    machine = Machine(size)
    try:
        ranges = machine.pc.e820()
        assert sorted(ranges) == ranges
        assert all(ranges[i][0] + ranges[i][1] <= ranges[i + 1][0] for i in range(len(ranges) - 1))
        ram = [(start, length) for start, length, kind in ranges if kind == 1]
        assert all(machine.memory.is_ram(start, length) for start, length in ram)
        assert sum(length for _, length in ram) == size - (0x100000 - 0x9FC00)
        assert any(
            start <= machine.pc.rsdp_address < start + length for start, length, kind in ranges if kind == 2
        )
    finally:
        machine.memory.close()


@pytest.mark.parametrize("hz", [1_000_000_000, 2_300_000_000, 2_299_998_123, 2_793_437_000, 4_500_001_000])
def test_linux_computes_the_tsc_frequency_from_the_crystal(hz: int) -> None:
    # native_calibrate_tsc: kHz in 32-bit arithmetic.
    crystal = crystal_frequency(hz)
    ratio = hz // crystal
    assert crystal % 1000 == 0 and crystal < 1 << 32
    assert (crystal // 1000 * ratio) & 0xFFFFFFFF == hz // 1000


def test_hostile_ports_and_addresses(machine: Machine) -> None:
    generator = random.Random(9)
    ports = [
        *range(0x100),
        *range(0x3F8, 0x400),
        *range(0x4D0, 0x4D2),
        *range(0x600, 0x610),
        *range(0xCF8, 0xD00),
    ]
    for _ in range(10_000):
        size = generator.choice((1, 2, 4))
        port = generator.choice(ports)
        machine.pc.ports.write(port, size, generator.getrandbits(8 * size))
        assert 0 <= machine.pc.ports.read(port, size) < 1 << 8 * size
        if machine.pc.interrupts.pending():
            machine.pc.interrupts.acknowledge()
        machine.advance(generator.randrange(100_000))


def test_the_local_apic_window_moves(machine: Machine) -> None:
    read, write = machine.pc.msrs[0x1B]
    version = machine.pc.mmio.read(LOCAL_APIC + 0x30, 4)
    write(read() & 0xFFF | 0xFED40000)
    assert machine.pc.mmio.read(0xFED40030, 4) == version
    assert machine.pc.mmio.read(LOCAL_APIC + 0x30, 4) == 0xFFFFFFFF
    write(read() & 0xFFF | IO_APIC)  # the I/O APIC answers there
    assert machine.pc.mmio.read(IO_APIC + 0x30, 4) != version
    write(read() & 0xFFF | LOCAL_APIC)
    assert machine.pc.mmio.read(LOCAL_APIC + 0x30, 4) == version
