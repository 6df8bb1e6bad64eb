"""What an engine may do with the local APIC without asking it: the task priority, the end of an interrupt, and what
comes before sending one.

Words in host memory that the APIC keeps true and that native code reads and
writes, as VT-x has its virtual-APIC page for the same two (Intel SDM 3C 30.1).
"""

from __future__ import annotations

import ctypes

TPR, TPR_FREE, END, WINDOW, X2APIC, COMMAND, DESTINATION, IDENTITY = range(0, 64, 8)
"""Byte offsets of the words.

`TPR`: the task priority; only its low byte counts.  `TPR_FREE`: nonzero while
no interrupt waits, so that a change of it has no effect.  `END`: one of the
constants below.  `WINDOW`: the physical address of the xAPIC registers while
they are there, else all ones.  `X2APIC`: nonzero in x2APIC mode.
`COMMAND` and `DESTINATION`: the halves of the interrupt command register, of
which the first may be read in the window and the second also written; what
was sent then, and how much of the destination counts, is the APIC's affair.  `IDENTITY`: the
id by which messages with a physical destination find it.
"""
_WORDS = 8
_TPR, _TPR_FREE, _END, _WINDOW, _X2APIC, _COMMAND, _DESTINATION, _IDENTITY = range(_WORDS)
_NOWHERE = (1 << 64) - 1

END_ASK, END_READY, END_DONE, END_NOTHING = range(4)
"""What a write to the EOI register does: the APIC must be asked; the most urgent interrupt in service ends, which has
no further effect; it was written to after that, and the APIC does not know yet; nothing is in service."""


class VirtualApic:
    """The words; without a local APIC to look after them they allow nothing."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_uint64 * _WORDS)()
        self._words = memoryview(self._memory).cast("B").cast("Q")
        self._words[_WINDOW] = _NOWHERE

    @property
    def address(self) -> int:
        """Host address of the words."""
        return ctypes.addressof(self._memory)

    @property
    def tpr(self) -> int:
        """The task priority."""
        return self._words[_TPR] & 0xFF

    @tpr.setter
    def tpr(self, value: int) -> None:
        self._words[_TPR] = value

    @property
    def command(self) -> int:
        """The interrupt command register's low half, as it reads."""
        return self._words[_COMMAND]

    @command.setter
    def command(self, value: int) -> None:
        self._words[_COMMAND] = value

    @property
    def destination(self) -> int:
        """What was written to its high half last."""
        return self._words[_DESTINATION] & 0xFFFFFFFF

    @destination.setter
    def destination(self, value: int) -> None:
        self._words[_DESTINATION] = value

    def allow(self, *, tpr: bool, end: int) -> None:
        """Say what may be done from now on."""
        self._words[_TPR_FREE] = tpr
        self._words[_END] = end

    def take_end(self) -> bool:
        """Whether an interrupt was ended since the last time."""
        if self._words[_END] != END_DONE:
            return False
        self._words[_END] = END_ASK
        return True

    def place(self, window: int | None, *, x2apic: bool, identity: int) -> None:
        """Say where the registers are, and who is meant by a physical destination."""
        self._words[_IDENTITY] = identity
        self._words[_WINDOW] = _NOWHERE if window is None else window
        self._words[_X2APIC] = x2apic
