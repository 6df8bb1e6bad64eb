"""The keyboard controller as the drivers of PC systems use it."""

import pytest

from trivisor.devices.i8042 import I8042, SystemControlPortA


class Bench:
    """A controller, its wire, and how often it pulled the reset."""

    def __init__(self, keyboard: bool = True) -> None:
        self.edges: list[bool] = []
        self.resets = 0
        self.controller = I8042(self.edges.append, self._reset, keyboard=keyboard)

    def _reset(self) -> None:
        self.resets += 1

    def status(self) -> int:
        return self.controller.command.read(0, 1)

    def command(self, value: int) -> None:
        self.controller.command.write(0, 1, value)

    def data(self, value: int) -> None:
        self.controller.data.write(0, 1, value)

    def answers(self) -> list[int]:
        """Read until the output buffer is empty."""
        values = []
        while self.status() & 1:
            values.append(self.controller.data.read(0, 1))
            assert len(values) < 50
        return values

    def keyboard(self, *values: int) -> list[int]:
        for value in values[:-1]:
            self.data(value)
            assert self.answers() == [0xFA]
        self.data(values[-1])
        return self.answers()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_idle_status(bench: Bench) -> None:
    assert bench.status() == 0x14  # system flag, not locked; both buffers empty
    bench.command(0xAD)
    assert bench.status() & 0x08
    bench.data(0xF4)
    assert not bench.status() & 0x08


def test_self_tests(bench: Bench) -> None:
    bench.command(0xAA)
    assert bench.answers() == [0x55]
    bench.command(0xAB)
    assert bench.answers() == [0x00]


def test_command_byte(bench: Bench) -> None:
    bench.command(0x20)
    assert bench.answers() == [0x65]
    bench.command(0x60)
    bench.data(0x74)
    bench.command(0x20)
    assert bench.answers() == [0x74]
    bench.command(0xAE)
    bench.command(0xA8)
    bench.command(0x20)
    assert bench.answers() == [0x44]


def test_controller_ram(bench: Bench) -> None:
    bench.command(0x7F)
    bench.data(0x99)
    bench.command(0x3F)
    assert bench.answers() == [0x99]


def test_linux_finds_no_auxiliary_port_and_is_left_with_an_empty_buffer(bench: Bench) -> None:
    bench.command(0xD3)
    bench.data(0x5A)
    assert bench.status() & 0x21 == 0x01  # came back, but not from the auxiliary port
    bench.command(0xA9)
    assert bench.answers() == [0x01]
    bench.command(0xD4)
    bench.data(0xFF)
    assert bench.answers() == []


def test_keyboard_reset_and_identity(bench: Bench) -> None:
    assert bench.keyboard(0xFF) == [0xFA, 0xAA]
    assert bench.keyboard(0xF2) == [0xFA, 0xAB, 0x41]  # 0x83, translated
    bench.command(0x60)
    bench.data(0x05)
    assert bench.keyboard(0xF2) == [0xFA, 0xAB, 0x83]


def test_keyboard_settings_are_acknowledged(bench: Bench) -> None:
    assert bench.keyboard(0xED, 0x02) == [0xFA]
    assert bench.keyboard(0xF3, 0x00) == [0xFA]
    assert bench.keyboard(0xF0, 0x00) == [0xFA, 0x41]
    assert bench.keyboard(0xF0, 0x03) == [0xFA]
    assert bench.keyboard(0xF0, 0x00) == [0xFA, 0x3F]
    for value in (0xF4, 0xF5, 0xF6):
        assert bench.keyboard(value) == [0xFA]
    assert bench.keyboard(0xEE) == [0xEE]
    assert bench.keyboard(0xFE) == [0xEE]
    assert bench.keyboard(0x99) == [0xFE]


def test_command_where_a_parameter_is_due_is_a_command(bench: Bench) -> None:
    assert bench.keyboard(0xED, 0xF2) == [0xFA, 0xAB, 0x41]


def test_interrupt_for_each_byte(bench: Bench) -> None:
    bench.data(0xF2)
    assert bench.edges == [True]
    bench.answers()
    assert bench.edges == [True, False] * 3
    bench.command(0x60)
    bench.data(0x44)  # interrupt off
    bench.edges.clear()
    assert bench.keyboard(0xF4) == [0xFA]
    assert bench.edges == []


def test_disabled_keyboard_waits(bench: Bench) -> None:
    bench.data(0xFF)
    bench.command(0xAD)
    assert bench.answers() == [0xFA]
    bench.command(0xAE)
    assert bench.answers() == [0xAA]


def test_absent_keyboard_times_out_at_once() -> None:
    bench = Bench(keyboard=False)
    bench.data(0xF2)
    assert bench.status() & 0x41 == 0x41
    assert bench.answers() == [0xFE]
    assert not bench.status() & 0x40


def test_reset_pulse(bench: Bench) -> None:
    bench.command(0xFF)
    assert bench.resets == 0
    bench.command(0xFE)
    assert bench.resets == 1


def test_output_port(bench: Bench) -> None:
    bench.command(0xD0)
    assert bench.answers() == [0x03]
    bench.command(0xD1)
    bench.data(0xDF)
    assert bench.resets == 0
    bench.command(0xD0)
    assert bench.answers() == [0xDF]
    bench.command(0xD1)
    bench.data(0xFE)
    assert bench.resets == 1


def test_system_control_port_a() -> None:
    resets: list[int] = []
    port = SystemControlPortA(lambda: resets.append(1))
    assert port.read(0, 1) == 0x02
    port.write(0, 1, 0x00)
    assert port.read(0, 1) == 0x00
    port.write(0, 1, 0x03)
    assert len(resets) == 1
    port.write(0, 1, 0x03)
    assert len(resets) == 1  # on the rising edge only
    assert port.read(0, 2) == 0xFF03


def test_any_pair_of_bytes_is_survived(bench: Bench) -> None:
    for command in range(256):
        for value in (0x00, 0x01, 0x7F, 0x80, 0xFF):
            bench.command(command)
            bench.data(value)
            bench.controller.data.write(0, 4, value * 0x01010101)
            assert bench.controller.data.read(0, 4) >> 8 == 0xFFFFFF
