"""The POST code port of a PC, which kernels also write to for a short delay."""

from __future__ import annotations

from trivisor.machine.fast_ports import LATCHES, READS, FastRegister
from trivisor.machine.saving import Remembers


class PostCode(Remembers):
    """Remembers the last byte written, as the scratch register behind port 0x80 does."""

    remembered = ("code",)

    def __init__(self) -> None:
        self._register = FastRegister.alone()

    def reveal(self, register: FastRegister) -> None:
        """Let engines go by it without asking."""
        register.set(READS | LATCHES, self.code)
        self._register = register

    @property
    def code(self) -> int:
        """The last code."""
        return self._register.value

    @code.setter
    def code(self, value: int) -> None:
        self._register.set(READS | LATCHES, value & 0xFF)

    def read(self, offset: int, size: int) -> int:
        return self._register.value

    def write(self, offset: int, size: int, value: int) -> None:
        self._register.set(READS | LATCHES, value & 0xFF)
