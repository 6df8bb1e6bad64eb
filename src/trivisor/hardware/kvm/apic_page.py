"""The local APIC's state as the board's own device remembers it, and as KVM has it: both ways.

KVM's is the register page (`abi.LapicState`: register n, 32 bits, at offset
16 n) and two MSRs, IA32_APIC_BASE and IA32_TSC_DEADLINE.  KVM's timer counts
in nanoseconds of its own, so what is left of a count goes over as a count.

What one has and the other has not: KVM keeps no errors that wait for a write
to the ESR and no message for the 8259's INTR.  A one-shot count that has run
out goes to KVM as none at all, as KVM would let it run out once more; its
initial count then reads as zero.
"""

from __future__ import annotations

import struct
from typing import Final

from trivisor.machine.saving import Saved

SIZE: Final = 1024
ONE_SHOT, PERIODIC, TSC_DEADLINE = 0, 1, 2
"""The timer's modes (Intel SDM 3A, figure 10-8)."""
_SECOND: Final = 1_000_000_000
_X2APIC: Final = 1 << 10
_ID, _TPR, _LDR, _DFR, _SVR = 0x2, 0x8, 0xD, 0xE, 0xF
_ISR, _TMR, _IRR, _ESR, _ICR_LOW, _ICR_HIGH = 0x10, 0x18, 0x20, 0x28, 0x30, 0x31
_LVT: Final = range(0x32, 0x38)
_LVT_TIMER: Final = 0x32
_INITIAL_COUNT, _CURRENT_COUNT, _DIVIDE = 0x38, 0x39, 0x3E
_BANKS: Final = (("isr", _ISR), ("tmr", _TMR), ("irr", _IRR))
_WRITABLE_DIVIDE: Final = 0xB
_LVT_MASKED: Final = 1 << 16
_MASK: Final = 0xFFFFFFFF


def _divisor(config: int) -> int:
    """Of the divide configuration register (figure 10-10)."""
    return 1 << ((config & 3 | (config & 8) >> 1) + 1 & 7)


def to_page(saved: Saved, now: int, crystal: int) -> bytes:
    """KVM's register page; `now` is guest time (ns), `crystal` the timer's input (Hz).

    `saved` may be a file's: what no register can hold is cut off.
    """
    page = bytearray(SIZE)

    def put(number: int, value: int) -> None:
        struct.pack_into("<I", page, 16 * number, value & _MASK)

    put(_ID, saved["id"] << 24)
    put(_TPR, saved["tpr"])
    put(_LDR, saved["ldr"] << 24)
    put(_DFR, saved["dfr"])
    put(_SVR, saved["svr"])
    put(_ESR, saved["esr"])
    put(_ICR_LOW, saved["icr"])
    put(_ICR_HIGH, saved["destination"])
    for name, first in _BANKS:
        for word in range(8):
            put(first + word, saved[name] >> 32 * word)
    for number in _LVT:
        put(number, saved["lvt"].get(str(number), _LVT_MASKED))
    timer = saved["timer"]
    put(_DIVIDE, timer["divide_config"])
    if timer["expiry"]:
        initial = timer["initial_count"] & _MASK
        left = max(timer["expiry"] - now, 0) * crystal // (_SECOND * _divisor(timer["divide_config"]))
        put(_INITIAL_COUNT, initial)
        put(_CURRENT_COUNT, min(max(left, 1), initial))
    return bytes(page)


def from_page(page: bytes, before: Saved, base: int, deadline: int, now: int, crystal: int) -> Saved:
    """What the board's device remembers; `base` and `deadline` are the MSRs, `before` has what KVM does not."""

    def get(number: int) -> int:
        (value,) = struct.unpack_from("<I", page, 16 * number)
        return int(value)

    lvt = {str(number): get(number) for number in _LVT}
    mode = lvt[str(_LVT_TIMER)] >> 17 & 3
    divide = get(_DIVIDE) & _WRITABLE_DIVIDE
    divisor = _divisor(divide)
    initial, left = get(_INITIAL_COUNT), get(_CURRENT_COUNT)
    counts = mode in (ONE_SHOT, PERIODIC) and bool(initial) and (bool(left) or mode == PERIODIC)
    expiry = now + -(-(left or initial) * divisor * _SECOND // crystal) if counts else 0
    return {
        **before,
        "base": base,
        "id": get(_ID) >> 24,
        "tpr": get(_TPR) & 0xFF,
        "ldr": before["ldr"] if base & _X2APIC else get(_LDR) >> 24,
        "dfr": get(_DFR),
        "svr": get(_SVR) & 0x1FF,
        "esr": get(_ESR),
        "errors": 0,
        "icr": get(_ICR_LOW),
        "destination": get(_ICR_HIGH),
        **{name: sum(get(first + word) << 32 * word for word in range(8)) for name, first in _BANKS},
        "lvt": lvt,
        "extint_message": False,
        "timer": {
            "mode": mode,
            "initial_count": initial,
            "divide_config": divide,
            "divisor": divisor,
            "deadline": deadline if mode == TSC_DEADLINE else 0,
            "expiry": expiry,
        },
    }
