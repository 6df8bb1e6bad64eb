"""The breakpoints of DR0 to DR3, and debug exceptions that wait for an instruction's end (Intel SDM 3B 17.2, 17.3).

Instruction breakpoints are faults: the translator ends its blocks before them.
Data and I/O breakpoints are traps: pages with watched bytes stay out of the
software TLB, so that every access to them comes to Python, which notes what it
hits in `pending` until the instruction is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trivisor.x86.control import CR4_DE

_EXECUTE, _WRITE, _PORT, _ACCESS = range(4)
"""The R/W fields of DR7."""
_LENGTHS = (1, 2, 8, 4)
"""By the LEN fields of DR7."""


class _Range(NamedTuple):
    """Watched bytes, or ports: [start, end), the bit of DR6, and whether reads count."""

    start: int
    end: int
    bit: int
    reads: bool


class DebugUnit:
    """What DR7 enables now, and what has been hit."""

    def __init__(self) -> None:
        self.code: dict[int, int] = {}
        """Instruction breakpoints: linear address to bits of DR6."""
        self.pages: frozenset[int] = frozenset()
        """Linear page addresses that hold watched bytes."""
        self._data: tuple[_Range, ...] = ()
        self._ports: tuple[_Range, ...] = ()
        self.pending = 0
        """Bits of DR6 for the #DB that is due at the end of the current instruction."""
        self.step_trap = False
        """Whether the instruction that is being stepped ends in a single-step trap."""
        self.blocked = False
        """The next instruction may not be struck by any breakpoint, nor what waits be delivered (MOV SS, POP SS)."""

    @property
    def active(self) -> bool:
        """Whether there is any breakpoint."""
        return bool(self.code or self._data or self._ports)

    @property
    def watches_ports(self) -> bool:
        """Whether there is an I/O breakpoint."""
        return bool(self._ports)

    def load(self, dr: Sequence[int], cr4: int) -> None:
        """Take the breakpoints that DR0 to DR3 and DR7 set up."""
        code: dict[int, int] = {}
        data: list[_Range] = []
        ports: list[_Range] = []
        control = dr[7]
        for number in range(4):
            if not control >> 2 * number & 3:
                continue
            kind, length = control >> 16 + 4 * number & 3, _LENGTHS[control >> 18 + 4 * number & 3]
            start = dr[number] & ~(length - 1)
            bit = 1 << number
            if kind == _EXECUTE:
                code[dr[number]] = code.get(dr[number], 0) | bit
            elif kind != _PORT:
                data.append(_Range(start, start + length, bit, kind == _ACCESS))
            elif cr4 & CR4_DE:
                ports.append(_Range(start, start + length, bit, True))
        self.code = code
        self._data, self._ports = tuple(data), tuple(ports)
        self.pages = frozenset(watched.start & ~0xFFF for watched in data)

    def take(self) -> int:
        """The bits that wait, which then no longer do."""
        bits, self.pending = self.pending, 0
        return bits

    def touches(self, linear: int, size: int) -> bool:
        """Whether an access reaches into a page with watched bytes."""
        return linear & ~0xFFF in self.pages or linear + size - 1 & ~0xFFF in self.pages

    def accessed(self, linear: int, size: int, *, write: bool) -> None:
        """Note an access of `size` bytes of memory."""
        for watched in self._data:
            if linear < watched.end and linear + size > watched.start and (write or watched.reads):
                self.pending |= watched.bit

    def port_accessed(self, port: int, size: int) -> None:
        """Note an access to `size` I/O ports."""
        for watched in self._ports:
            if port < watched.end and port + size > watched.start:
                self.pending |= watched.bit
