"""Exceptions: vectors, error codes, and what happens when one meets another (Intel SDM 3A chapter 6)."""

from __future__ import annotations

from enum import Enum
from typing import Final

DIVIDE_ERROR: Final = 0
DEBUG: Final = 1
NMI: Final = 2
BREAKPOINT: Final = 3
OVERFLOW: Final = 4
BOUND_RANGE: Final = 5
INVALID_OPCODE: Final = 6
DEVICE_NOT_AVAILABLE: Final = 7
DOUBLE_FAULT: Final = 8
COPROCESSOR_SEGMENT: Final = 9
INVALID_TSS: Final = 10
SEGMENT_NOT_PRESENT: Final = 11
STACK_FAULT: Final = 12
GENERAL_PROTECTION: Final = 13
PAGE_FAULT: Final = 14
X87_ERROR: Final = 16
ALIGNMENT_CHECK: Final = 17
MACHINE_CHECK: Final = 18
SIMD_ERROR: Final = 19
VIRTUALIZATION: Final = 20
CONTROL_PROTECTION: Final = 21

MNEMONICS: Final = {
    DIVIDE_ERROR: "#DE", DEBUG: "#DB", NMI: "NMI", BREAKPOINT: "#BP", OVERFLOW: "#OF", BOUND_RANGE: "#BR",
    INVALID_OPCODE: "#UD", DEVICE_NOT_AVAILABLE: "#NM", DOUBLE_FAULT: "#DF", COPROCESSOR_SEGMENT: "#MFS",
    INVALID_TSS: "#TS", SEGMENT_NOT_PRESENT: "#NP", STACK_FAULT: "#SS", GENERAL_PROTECTION: "#GP",
    PAGE_FAULT: "#PF", X87_ERROR: "#MF", ALIGNMENT_CHECK: "#AC", MACHINE_CHECK: "#MC", SIMD_ERROR: "#XM",
    VIRTUALIZATION: "#VE", CONTROL_PROTECTION: "#CP",
}  # fmt: skip

PUSHES_ERROR_CODE: Final = frozenset(
    {
        DOUBLE_FAULT, INVALID_TSS, SEGMENT_NOT_PRESENT, STACK_FAULT, GENERAL_PROTECTION, PAGE_FAULT,
        ALIGNMENT_CHECK, CONTROL_PROTECTION,
    }
)  # fmt: skip
"""Table 6-1: in protected and long mode these push an error code; in real mode none does."""

PF_PRESENT: Final = 1 << 0
"""Page-fault error code (section 4.7): the page is there, but may not be used so (or RSVD)."""
PF_WRITE: Final = 1 << 1
PF_USER: Final = 1 << 2
PF_RESERVED: Final = 1 << 3
PF_FETCH: Final = 1 << 4
PF_KEY: Final = 1 << 5
"""A protection key forbids the access, whatever else does."""

ERROR_EXT: Final = 1 << 0
"""Selector error code (section 6.13): the event came from outside the program."""
ERROR_IDT: Final = 1 << 1
"""The index is of a gate in the IDT, not of a descriptor in the GDT or LDT."""
ERROR_TI: Final = 1 << 2

_CONTRIBUTORY = frozenset(
    {DIVIDE_ERROR, INVALID_TSS, SEGMENT_NOT_PRESENT, STACK_FAULT, GENERAL_PROTECTION, CONTROL_PROTECTION}
)
_PAGE_FAULTS = frozenset({PAGE_FAULT, VIRTUALIZATION})


class GuestException(Exception):
    """An exception that the guest is to get; engines raise it to unwind to delivery.

    `error_code` is None for vectors that push none.  `address` is what CR2 gets, for a page fault only.
    """

    def __init__(self, vector: int, error_code: int | None = None, address: int | None = None) -> None:
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        self.address = address

    def __str__(self) -> str:
        text = MNEMONICS.get(self.vector, f"vector {self.vector}")
        if self.error_code is not None:
            text += f"({self.error_code:#x})"
        return text if self.address is None else f"{text} at {self.address:#x}"


class ExceptionClass(Enum):
    """Table 6-4."""

    BENIGN = "benign"
    CONTRIBUTORY = "contributory"
    PAGE_FAULT = "page fault"
    DOUBLE_FAULT = "double fault"


class Outcome(Enum):
    """What the processor does about a second exception."""

    SERIAL = "handle the second"
    DOUBLE_FAULT = "double fault"
    SHUTDOWN = "shutdown"


def classify(vector: int) -> ExceptionClass:
    """The class of a hardware exception (INT n, interrupts and NMI are benign, whatever the vector)."""
    if vector in _CONTRIBUTORY:
        return ExceptionClass.CONTRIBUTORY
    if vector in _PAGE_FAULTS:
        return ExceptionClass.PAGE_FAULT
    return ExceptionClass.DOUBLE_FAULT if vector == DOUBLE_FAULT else ExceptionClass.BENIGN


def combine(first: int | None, second: int) -> Outcome:
    """What to do when exception `second` comes up while `first` is being delivered (table 6-5).

    `first` is None when what was being delivered is an interrupt or nothing.
    """
    if first is None:
        return Outcome.SERIAL
    before, after = classify(first), classify(second)
    if before is ExceptionClass.DOUBLE_FAULT:
        return Outcome.SERIAL if after is ExceptionClass.BENIGN else Outcome.SHUTDOWN
    if after is ExceptionClass.CONTRIBUTORY and before is not ExceptionClass.BENIGN:
        return Outcome.DOUBLE_FAULT
    if after is ExceptionClass.PAGE_FAULT and before is ExceptionClass.PAGE_FAULT:
        return Outcome.DOUBLE_FAULT
    return Outcome.SERIAL
