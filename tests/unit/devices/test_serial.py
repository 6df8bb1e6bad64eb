"""The UART against the PC16550D data sheet and the probes of Linux's 8250 driver."""

import pytest

from trivisor.devices.serial import BACKLOG_SIZE, Uart16550
from trivisor.machine.clock import Clock

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
CHARACTER = 10 * 16 * 1_000_000_000 // 1_843_200  # ns, 8N1 at 115200 baud


class Bench:
    """A UART with its clock, wire and output."""

    def __init__(self) -> None:
        self.time = 0
        self.clock = Clock(lambda: self.time)
        self.edges: list[bool] = []
        self.sent = b""
        self.uart = Uart16550(self.clock, self.edges.append, self._send)

    def _send(self, data: bytes) -> None:
        self.sent += data

    @property
    def irq(self) -> bool:
        return bool(self.edges) and self.edges[-1]

    def out(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def inb(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def run(self, nanoseconds: int) -> None:
        self.time += nanoseconds
        self.clock.run_due()

    def open(self, ier: int, fcr: int = 0xC1) -> None:
        """8N1 at 115200, FIFO with trigger 14 unless told otherwise, OUT2 on."""
        self.out(LCR, 0x83)
        self.out(DATA, 1)
        self.out(IER, 0)
        self.out(LCR, 0x03)
        self.out(IIR, fcr)
        self.out(MCR, 0x0B)
        self.out(IER, ier)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_linux_finds_a_16550a(bench: Bench) -> None:
    bench.out(IER, 0)
    assert bench.inb(IER) & 0x0F == 0
    bench.out(IER, 0xFF)
    assert bench.inb(IER) == 0x0F
    bench.out(IER, 0)
    bench.out(MCR, 0x1A)
    assert bench.inb(MSR) & 0xF0 == 0x90
    bench.out(MCR, 0)
    bench.out(LCR, 0xBF)
    bench.out(IIR, 0)
    bench.out(LCR, 0)
    bench.out(IIR, 1)
    assert bench.inb(IIR) >> 6 == 3
    bench.out(LCR, 0)
    bench.out(IIR, 0x21)  # a 16750 would set bit 5 now
    assert bench.inb(IIR) >> 5 == 6
    bench.out(IIR, 0)
    assert bench.inb(IIR) == 0x01


def test_divisor_latch_hides_data_and_interrupt_enable(bench: Bench) -> None:
    bench.out(LCR, 0x83)
    bench.out(DATA, 0x34)
    bench.out(IER, 0x12)
    assert (bench.inb(DATA), bench.inb(IER)) == (0x34, 0x12)
    bench.out(LCR, 0x03)
    assert (bench.inb(DATA), bench.inb(IER)) == (0, 0)
    assert bench.sent == b""


def test_scratch_and_line_control_keep_their_value(bench: Bench) -> None:
    bench.out(SCR, 0xA5)
    bench.out(LCR, 0x1B)
    assert (bench.inb(SCR), bench.inb(LCR)) == (0xA5, 0x1B)


def test_sends_each_byte_at_once(bench: Bench) -> None:
    for value in b"hi\n":
        assert bench.inb(LSR) == 0x60
        bench.out(DATA, value)
    assert bench.sent == b"hi\n"


def test_transmitter_interrupt_is_cleared_by_identification_and_set_by_a_write(bench: Bench) -> None:
    bench.open(ier=2)
    assert bench.irq
    assert bench.inb(IIR) == 0xC2
    assert not bench.irq and bench.inb(IIR) == 0xC1
    bench.out(DATA, 0x41)
    assert bench.irq
    bench.edges.clear()
    bench.out(DATA, 0x42)  # without identifying: an edge all the same
    assert bench.edges == [False, True]
    bench.out(IER, 0)
    assert not bench.irq
    bench.out(IER, 2)
    assert bench.inb(IIR) == 0xC2


def test_out2_gates_the_interrupt(bench: Bench) -> None:
    bench.open(ier=2)
    bench.out(MCR, 0x03)
    assert not bench.irq
    bench.out(MCR, 0x0B)
    assert bench.irq


def test_trigger_level_interrupts_and_draining_ends_it(bench: Bench) -> None:
    bench.open(ier=1)
    bench.uart.feed(b"0123456789abc")
    assert not bench.irq and bench.inb(LSR) == 0x61
    bench.uart.feed(b"d")
    assert bench.irq and bench.inb(IIR) == 0xC4
    assert bench.inb(DATA) == ord("0")
    assert not bench.irq


def test_character_timeout_comes_after_four_characters_and_a_read_ends_it(bench: Bench) -> None:
    bench.open(ier=1)
    bench.uart.feed(b"xy")
    bench.run(4 * CHARACTER - 1000)
    assert bench.inb(IIR) == 0xC1
    bench.run(2000)
    assert bench.irq and bench.inb(IIR) == 0xCC
    assert bench.inb(DATA) == ord("x")
    assert not bench.irq
    bench.run(4 * CHARACTER + 1000)
    assert bench.inb(IIR) == 0xCC
    assert bench.inb(DATA) == ord("y")
    bench.run(8 * CHARACTER)
    assert bench.inb(IIR) == 0xC1
    assert bench.clock.next_deadline() is None


def test_without_fifo_each_byte_interrupts(bench: Bench) -> None:
    bench.open(ier=1, fcr=0)
    bench.uart.feed(b"ab")
    assert bench.irq and bench.inb(IIR) == 0x04
    assert bench.inb(DATA) == ord("a")
    assert not bench.irq
    bench.run(CHARACTER + 1)
    assert bench.irq and bench.inb(DATA) == ord("b")


def test_backlog_arrives_in_order_a_fifo_at_a_time(bench: Bench) -> None:
    bench.open(ier=1)
    text = bytes(range(100))
    assert bench.uart.feed(text) == 100
    got = bytearray()
    rounds = 0
    while len(got) < 100 and rounds < 20:
        burst = 0
        while bench.inb(LSR) & 1:
            got.append(bench.inb(DATA))
            burst += 1
        assert burst <= 16
        assert bench.inb(IIR) == 0xC1  # the handler comes to an end
        bench.run(4 * CHARACTER + 1)
        rounds += 1
    assert bytes(got) == text


def test_backlog_is_bounded(bench: Bench) -> None:
    taken = bench.uart.feed(bytes(BACKLOG_SIZE + 1000))
    assert taken == BACKLOG_SIZE
    assert bench.uart.room < 20
    assert bench.uart.feed(bytes(1000)) <= 1
    assert not bench.inb(LSR) & 2


def test_input_after_a_faster_baud_rate_is_not_held_up(bench: Bench) -> None:
    bench.open(ier=1)
    bench.out(LCR, 0x83)
    bench.out(IER, 0xFF)
    bench.out(LCR, 0x03)
    bench.uart.feed(b"x")
    bench.out(LCR, 0x83)
    bench.out(IER, 0)
    bench.out(LCR, 0x03)
    bench.run(5 * CHARACTER)
    assert bench.inb(IIR) == 0xCC


def test_loopback_carries_data_and_reports_overrun(bench: Bench) -> None:
    bench.open(ier=0)
    bench.out(MCR, 0x10)
    for value in range(17):
        bench.out(DATA, value)
    assert bench.sent == b""
    assert bench.inb(LSR) == 0x63
    assert bench.inb(LSR) == 0x61  # reading clears the overrun
    assert [bench.inb(DATA) for _ in range(17)] == [*range(16), 0]


def test_loopback_holds_the_line_off(bench: Bench) -> None:
    bench.open(ier=1)
    bench.out(MCR, 0x1B)
    bench.uart.feed(b"q")
    assert not bench.inb(LSR) & 1
    bench.out(MCR, 0x0B)
    assert bench.inb(DATA) == ord("q")


def test_overrun_interrupts_with_the_highest_priority(bench: Bench) -> None:
    bench.open(ier=7, fcr=0)
    bench.out(MCR, 0x10)
    bench.out(DATA, 1)
    bench.out(DATA, 2)
    assert bench.inb(IIR) == 0x06
    bench.inb(LSR)
    assert bench.inb(IIR) == 0x04
    bench.inb(DATA)
    assert bench.inb(IIR) == 0x02
    assert bench.inb(IIR) == 0x01


def test_modem_status_deltas(bench: Bench) -> None:
    bench.open(ier=8)
    bench.inb(MSR)
    bench.out(MCR, 0x1F)
    assert bench.inb(MSR) == 0xF0  # all on; RI reports its end only
    bench.out(MCR, 0x10)
    assert bench.inb(IIR) == 0xC0
    assert bench.inb(MSR) == 0x0F
    assert bench.inb(IIR) == 0xC1
    assert bench.inb(MSR) == 0


def test_fifo_reset_bits(bench: Bench) -> None:
    bench.open(ier=0)
    bench.uart.feed(b"old")
    bench.out(IIR, 0xC3)
    assert bench.inb(LSR) == 0x60
    bench.uart.feed(b"old")
    bench.out(IIR, 0x00)  # changing the enable bit empties it too
    assert bench.inb(LSR) == 0x60


def test_awkward_accesses_do_no_harm(bench: Bench) -> None:
    for size in (1, 2, 4, 8):
        for offset in range(8):
            for value in (0, (1 << 8 * size) - 1):
                bench.uart.write(offset, size, value)
                assert 0 <= bench.uart.read(offset, size) < 1 << 8 * size
    bench.out(LCR, 0)
    assert bench.uart.read(7, 4) >> 8 == 0xFFFFFF
