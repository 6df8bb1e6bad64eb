"""isa-debug-exit and the POST code port."""

from trivisor.devices.debug_exit import DebugExit
from trivisor.devices.post import PostCode


def test_debug_exit_status_is_odd() -> None:
    statuses: list[int] = []
    port = DebugExit(statuses.append)
    for value in (0, 0x10, 0x80):
        port.write(0, 1, value)
    port.write(0, 4, 0x12345678)
    assert statuses == [1, 0x21, 0x101, 0x12345678 << 1 | 1]
    assert port.read(0, 4) == 0
    assert len(statuses) == 4


def test_post_port_remembers_the_last_code() -> None:
    port = PostCode()
    assert port.read(0, 1) == 0
    port.write(0, 1, 0x3A)
    port.write(0, 2, 0x1255)
    assert port.code == 0x55 == port.read(0, 1)
