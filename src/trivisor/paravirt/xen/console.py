"""The PV console: a ring of characters each way on a page that the guest shares (io/console.h)."""

from __future__ import annotations

from collections.abc import Callable

from trivisor.machine.memory import GuestMemory

_IN, _IN_SIZE = 0, 1024
_OUT, _OUT_SIZE = 1024, 2048
_IN_CONS, _IN_PROD, _OUT_CONS, _OUT_PROD = 3072, 3076, 3080, 3084
_MASK32 = 0xFFFFFFFF


class ConsoleRing:
    """The back end of hvc0; `notify()` sends the guest an event, `output` gets what the guest prints."""

    def __init__(
        self, memory: GuestMemory, address: int, output: Callable[[bytes], None], notify: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._at = address
        self._output = output
        self._notify = notify

    def guest_sent(self) -> None:
        """The guest has sent an event: take what it has printed."""
        memory, at = self._memory, self._at
        consumer, producer = memory.read_u32(at + _OUT_CONS), memory.read_u32(at + _OUT_PROD)
        waiting = producer - consumer & _MASK32
        if not waiting:
            return
        if waiting > _OUT_SIZE:  # nonsense; go on from where the guest says that it is
            memory.write(at + _OUT_CONS, producer.to_bytes(4, "little"))
            return
        start = consumer % _OUT_SIZE
        first = min(waiting, _OUT_SIZE - start)
        data = memory.read(at + _OUT + start, first) + memory.read(at + _OUT, waiting - first)
        memory.write(at + _OUT_CONS, producer.to_bytes(4, "little"))
        self._notify()
        self._output(data)

    @property
    def room(self) -> int:
        """How many characters can be typed now."""
        waiting = self._memory.read_u32(self._at + _IN_PROD) - self._memory.read_u32(self._at + _IN_CONS) & _MASK32
        return max(_IN_SIZE - waiting, 0)

    def feed(self, data: bytes) -> int:
        """Type `data`; returns how many bytes of it there was room for."""
        data = data[: self.room]
        if data:
            producer = self._memory.read_u32(self._at + _IN_PROD)
            for index, byte in enumerate(data):
                self._memory.write_u8(self._at + _IN + (producer + index) % _IN_SIZE, byte)
            self._memory.write(self._at + _IN_PROD, (producer + len(data) & _MASK32).to_bytes(4, "little"))
            self._notify()
        return len(data)
