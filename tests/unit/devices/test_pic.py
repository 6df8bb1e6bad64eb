"""The interrupt controllers against the 8259A data sheet."""

import pytest

from trivisor.devices.pic import DualPic


class Bench:
    """A pair set up as Linux does: vectors 0x30 and 0x38, nothing masked."""

    def __init__(self, icw4: int = 0x01) -> None:
        self.intr: list[bool] = []
        self.pic = DualPic(self.intr.append)
        self.lines = [self.pic.line(number) for number in range(16)]
        self.initialize(icw4)

    def initialize(self, icw4: int) -> None:
        for chip, vector, wiring in ((self.pic.master, 0x30, 4), (self.pic.slave, 0x38, 2)):
            chip.write(0, 1, 0x11)
            for word in (vector, wiring, icw4):
                chip.write(1, 1, word)
            chip.write(1, 1, 0)

    def command(self, value: int) -> None:
        self.pic.master.write(0, 1, value)

    def taken(self) -> list[int]:
        """Acknowledge all that is pending, without ending any."""
        vectors = []
        while self.pic.pending():
            vectors.append(self.pic.acknowledge())
        return vectors

    def registers(self) -> tuple[int, int]:
        """(IRR, ISR) of the master."""
        self.command(0x0B)
        isr = self.pic.master.read(0, 1)
        self.command(0x0A)
        return self.pic.master.read(0, 1), isr


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_masked_until_initialized() -> None:
    intr: list[bool] = []
    pic = DualPic(intr.append)
    pic.line(0)(True)
    assert not pic.pending() and intr == []


def test_mask_register_reads_back(bench: Bench) -> None:
    bench.pic.master.write(1, 1, 0xFB)
    assert bench.pic.master.read(1, 1) == 0xFB


def test_request_acknowledge_and_end(bench: Bench) -> None:
    bench.lines[4](True)
    assert bench.pic.pending() and bench.intr == [True]
    assert bench.registers() == (0x10, 0)
    assert bench.pic.acknowledge() == 0x34
    assert bench.intr == [True, False]
    assert bench.registers() == (0, 0x10)
    bench.command(0x20)
    assert bench.registers() == (0, 0)
    assert not bench.pic.pending()  # still high: an edge comes once
    bench.lines[4](False)
    bench.lines[4](True)
    assert bench.pic.acknowledge() == 0x34


def test_higher_priority_interrupts_service_and_lower_waits(bench: Bench) -> None:
    bench.lines[3](True)
    assert bench.taken() == [0x33]
    bench.lines[5](True)
    assert not bench.pic.pending()
    bench.lines[1](True)
    assert bench.taken() == [0x31]
    bench.command(0x20)
    assert bench.registers()[1] == 0x08
    bench.command(0x20)
    assert bench.taken() == [0x35]


def test_slave_comes_through_input_two(bench: Bench) -> None:
    bench.lines[12](True)
    bench.lines[8](True)
    assert bench.pic.acknowledge() == 0x38
    assert not bench.pic.pending()
    bench.pic.slave.write(0, 1, 0x20)
    assert not bench.pic.pending()  # the master still serves the slave
    bench.command(0x20)
    assert bench.pic.acknowledge() == 0x3C


def test_specific_end_of_interrupt(bench: Bench) -> None:
    bench.lines[5](True)
    bench.taken()
    bench.lines[1](True)
    bench.taken()
    bench.command(0x65)
    assert bench.registers()[1] == 0x02


def test_unmasking_lets_a_waiting_request_through(bench: Bench) -> None:
    bench.pic.master.write(1, 1, 0xFF)
    bench.lines[6](True)
    assert not bench.pic.pending()
    bench.pic.master.write(1, 1, 0xBF)
    assert bench.taken() == [0x36]


def test_level_input_asks_as_long_as_it_is_high(bench: Bench) -> None:
    bench.pic.elcr.write(1, 1, 0xFF)
    assert bench.pic.elcr.read(0, 2) == 0xDE00  # 8 and 13 cannot be level
    bench.lines[10](True)
    for _ in range(3):
        assert bench.taken() == [0x3A]
        bench.pic.slave.write(0, 1, 0x20)
        bench.command(0x20)
    bench.lines[10](False)
    assert not bench.pic.pending()


def test_request_that_is_withdrawn_is_gone_and_too_late_an_acknowledge_is_spurious(bench: Bench) -> None:
    bench.lines[4](True)
    bench.lines[4](False)
    assert not bench.pic.pending()
    assert bench.pic.acknowledge() == 0x37
    assert bench.registers()[1] == 0  # a spurious interrupt is not in service


def test_spurious_interrupt_of_the_slave_occupies_the_master(bench: Bench) -> None:
    bench.lines[9](True)
    bench.pic.slave.irr = 0  # the request vanishes between the two acknowledge cycles
    assert bench.pic.acknowledge() == 0x3F
    assert bench.registers()[1] == 0x04 and bench.pic.slave.isr == 0


def test_automatic_end_of_interrupt() -> None:
    bench = Bench(icw4=0x03)
    bench.lines[3](True)
    bench.lines[5](True)
    assert bench.taken() == [0x33, 0x35]
    assert bench.registers() == (0, 0)


def test_rotation_in_automatic_end_mode() -> None:
    bench = Bench(icw4=0x03)
    bench.command(0x80)
    bench.lines[3](True)
    assert bench.taken() == [0x33]
    bench.lines[3](False)
    bench.lines[3](True)
    bench.lines[4](True)
    assert bench.taken() == [0x34, 0x33]


def test_rotation_on_end(bench: Bench) -> None:
    bench.lines[0](True)
    assert bench.taken() == [0x30]
    bench.lines[0](False)
    bench.lines[0](True)
    bench.lines[7](True)
    bench.command(0xA0)  # rotate on non-specific EOI: 0 is lowest now
    assert bench.pic.acknowledge() == 0x37
    bench.command(0x20)
    assert bench.pic.acknowledge() == 0x30


def test_set_priority(bench: Bench) -> None:
    bench.command(0xC4)  # 4 lowest, 5 highest
    for number in (4, 1, 5):
        bench.lines[number](True)
    order = []
    while bench.pic.pending():
        order.append(bench.pic.acknowledge())
        bench.command(0x20)
    assert order == [0x35, 0x31, 0x34]


def test_special_mask_mode_lets_lower_priorities_in(bench: Bench) -> None:
    bench.lines[1](True)
    assert bench.taken() == [0x31]
    bench.lines[6](True)
    bench.pic.master.write(1, 1, 0x02)
    assert not bench.pic.pending()
    bench.command(0x68)
    assert bench.taken() == [0x36]
    bench.command(0x20)  # does not end the masked one
    assert bench.registers()[1] == 0x02
    bench.command(0x48)
    bench.lines[7](True)
    assert not bench.pic.pending()


def test_special_fully_nested_mode_lets_the_slave_interrupt_itself() -> None:
    bench = Bench(icw4=0x11)
    bench.lines[12](True)
    assert bench.pic.acknowledge() == 0x3C
    bench.lines[9](True)
    assert bench.pic.pending() and bench.pic.acknowledge() == 0x39
    bench.lines[14](True)
    assert not bench.pic.pending()


def test_poll_command(bench: Bench) -> None:
    bench.command(0x0C)
    assert bench.pic.master.read(0, 1) == 0
    bench.lines[5](True)
    bench.command(0x0C)
    assert bench.pic.master.read(0, 1) == 0x85
    assert bench.registers() == (0, 0x20)
    assert not bench.pic.pending()


def test_initialization_forgets_requests_and_asks_for_new_edges(bench: Bench) -> None:
    bench.lines[4](True)
    bench.initialize(0x01)
    assert not bench.pic.pending()
    bench.lines[4](False)
    bench.lines[4](True)
    assert bench.taken() == [0x34]


def test_no_interrupt_during_initialization(bench: Bench) -> None:
    bench.command(0x11)
    bench.lines[0](True)
    assert not bench.pic.pending()
    for word in (0x30, 4, 1):
        bench.pic.master.write(1, 1, word)
    assert bench.pic.pending()


def test_single_mode_without_icw4_takes_one_word(bench: Bench) -> None:
    bench.command(0x12)
    bench.pic.master.write(1, 1, 0x57)
    bench.pic.master.write(1, 1, 0xEF)
    assert bench.pic.master.read(1, 1) == 0xEF
    bench.lines[4](True)
    assert bench.taken() == [0x54]


def test_line_numbers() -> None:
    pic = DualPic(lambda level: None)
    pic.line(2)(True)
    assert pic.master.irr == 0
    with pytest.raises(ValueError):
        pic.line(16)


def test_any_byte_anywhere_is_survived(bench: Bench) -> None:
    for value in range(256):
        for window in (bench.pic.master, bench.pic.slave, bench.pic.elcr):
            for offset in (0, 1):
                window.write(offset, 4, value * 0x01010101)
                assert 0 <= window.read(offset, 4) <= 0xFFFFFFFF
        bench.lines[value & 15](True)
        assert 0 <= bench.pic.acknowledge() <= 255
        bench.lines[value & 15](False)
