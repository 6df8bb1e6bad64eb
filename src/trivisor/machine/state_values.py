"""A processor's state and identity as plain values (`saving`), and back, held against what a processor can be in.

What comes back may be anything that a file holds, so the rules are those by
which VM entry holds a guest's state against the architecture (Intel SDM 3C
26.3.1), as far as they matter to somebody who runs it.
"""

from __future__ import annotations

from typing import Any, Final

from trivisor.machine.cpuid import COPIED, EMULATED, LINEAR_BITS, OPTIONAL, GuestCpuid
from trivisor.machine.memory import PHYSICAL_ADDRESS_BITS
from trivisor.machine.saved_values import MOST, data, flag, number, number_list, numbers, pair, pairs
from trivisor.machine.saving import Saved
from trivisor.machine.state import SEGMENT_NAMES, CpuState, Segment, Table
from trivisor.x86 import flags
from trivisor.x86.control import CR0_PE, CR0_PG, CR4_PAE, CR4_PCIDE, EFER_LMA, EFER_LME, XCR0_PKRU
from trivisor.x86.cpuid import FEATURES, VENDORS, Query, features, xsave_area
from trivisor.x86.descriptors import DB, LONG
from trivisor.x86.paging import is_canonical

_NUMBERS: Final = {
    "rip": 64, "rflags": 22, "cr0": 32, "cr2": 64, "cr3": PHYSICAL_ADDRESS_BITS, "cr4": 32, "cr8": 4, "efer": 16,
    "xcr0": 64, "pkru": 32,
}  # fmt: skip
"""Their widths in bits."""
_FLAGS = ("interrupt_shadow", "halted", "nmi_blocked", "nmi_pending")
_SYSTEM_SEGMENTS = ("ldtr", "tr")
_TABLES = ("gdtr", "idtr")
_ATTRIBUTES = 0x1F0FF
"""With bit 16, which marks what a null selector has left unusable, as VT-x does (SDM 3C 25.4.1)."""
_EFER_KNOWN = 0xD01
"""SCE, LME, LMA, NXE."""
_LEGACY_AREA, _HEADER_END, _MXCSR = 512, 576, 24
_MXCSR_KNOWN = 0xFFFF


def save_state(state: CpuState) -> Saved:
    """The whole state as plain values."""
    saved: Saved = {name: getattr(state, name) for name in (*_NUMBERS, *_FLAGS)}
    for name in (*SEGMENT_NAMES, *_SYSTEM_SEGMENTS):
        one: Segment = getattr(state, name)
        saved[name] = [one.selector, one.base, one.limit, one.attributes]
    for name in _TABLES:
        table: Table = getattr(state, name)
        saved[name] = [table.base, table.limit]
    pending = state.exception_pending
    return saved | {
        "gpr": list(state.gpr),
        "dr": list(state.dr),
        "msrs": [[index, value] for index, value in sorted(state.msrs.items())],
        "xsave": state.xsave.hex(),
        "interrupts_pending": list(state.interrupts_pending),
        "exception_pending": None if pending is None else list(pending),
    }


def load_state(saved: Any, cpuid: GuestCpuid) -> CpuState:
    """The state that `save_state` gave; ValueError for one that the processor `cpuid` cannot be in."""
    if not isinstance(saved, dict):
        raise ValueError("the processor's state is missing")
    state = CpuState(
        gpr=numbers(saved, "gpr", [64] * 16),
        dr=numbers(saved, "dr", [64] * 8),
        msrs=dict(pairs(saved, "msrs")),
        xsave=data(saved, "xsave"),
        interrupts_pending=number_list(saved, "interrupts_pending", 8),
    )
    for name, bits in _NUMBERS.items():
        setattr(state, name, number(saved.get(name), name, bits))
    for name in _FLAGS:
        setattr(state, name, flag(saved, name))
    for name in (*SEGMENT_NAMES, *_SYSTEM_SEGMENTS):
        selector, base, limit, attributes = numbers(saved, name, [16, 64, 32, 17])
        setattr(state, name, Segment(selector, base, limit, attributes & _ATTRIBUTES))
    for name in _TABLES:
        setattr(state, name, Table(*numbers(saved, name, [64, 16])))
    if saved.get("exception_pending") is not None:
        vector, error = pair(saved["exception_pending"], "exception_pending")
        state.exception_pending = (
            number(vector, "vector", 5), None if error is None else number(error, "error code", 32)
        )  # fmt: skip
    _check(state, cpuid)
    return state


def _check(state: CpuState, cpuid: GuestCpuid) -> None:
    """Raise ValueError for a state that no processor gets into."""
    long = bool(state.efer & EFER_LMA)
    paging = bool(state.cr0 & CR0_PG)
    code_64 = long and bool(state.cs.attributes & LONG)
    wrong = {
        "RFLAGS": state.rflags & ~flags.VALID != flags.FIXED or (long and state.rflags & flags.VM),
        "CR0": paging and not state.cr0 & CR0_PE,
        "CR4": state.cr4 & ~cpuid.cr4_mask or (long and not state.cr4 & CR4_PAE) or (
            state.cr4 & CR4_PCIDE and not long),
        "EFER": state.efer & ~_EFER_KNOWN or long != bool(state.efer & EFER_LME and paging),
        "XCR0": not state.xcr0 & 1 or state.xcr0 & ~(cpuid.xcr0_supported | 1),
        "CS": code_64 and state.cs.attributes & DB,
        "RIP": not is_canonical(state.rip, LINEAR_BITS) if code_64 else state.rip >> 32,
        "a segment's base": not all(
            is_canonical(getattr(state, name).base, LINEAR_BITS)
            for name in (*SEGMENT_NAMES, *_SYSTEM_SEGMENTS, *_TABLES)
        ),
        "the XSAVE area": state.xsave and not _restorable(state.xsave, cpuid.xcr0_supported),
    }  # fmt: skip
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"no processor is in such a state: {', '.join(found)}")


def _restorable(area: bytes, supported: int) -> bool:
    """Whether XRSTOR takes it (SDM 1, 13.8.1): the standard format, of components that are there."""
    if len(area) > xsave_area(supported) or len(area) < _HEADER_END:
        return False
    components = int.from_bytes(area[_LEGACY_AREA : _LEGACY_AREA + 8], "little")
    mxcsr = int.from_bytes(area[_MXCSR : _MXCSR + 4], "little")
    return (
        not components & ~(supported | 1)
        and not any(area[_LEGACY_AREA + 8 : _HEADER_END])
        and not mxcsr & ~_MXCSR_KNOWN
    )


def save_cpuid(cpuid: GuestCpuid) -> Saved:
    """A processor's identity as plain values."""
    return {
        "features": sorted(cpuid.features),
        "table": [[*key, *registers] for key, registers in sorted(cpuid.table.items())],
        "vendor": cpuid.vendor,
        "hidden_xcr0": cpuid.hidden_xcr0,
    }


def load_cpuid(saved: Any, host: Query, host_xcr0: int, beyond: frozenset[str] = frozenset()) -> GuestCpuid:
    """The identity that `save_cpuid` gave; ValueError for none, or one that this host's processor cannot give.

    `beyond` are features that an engine may have beyond those of all engines, if the host has them.
    """
    if not isinstance(saved, dict):
        raise ValueError("the processor's identity is missing")
    names = saved.get("features")
    if not isinstance(names, list) or not all(isinstance(name, str) and name in FEATURES for name in names):
        raise ValueError("no such features")
    chosen = frozenset(names)
    if unknown := chosen - COPIED - EMULATED - OPTIONAL - beyond:
        raise ValueError(f"no guest is told of {', '.join(sorted(unknown))}")
    if missing := (chosen & (COPIED | beyond)) - features(host):
        raise ValueError(f"this host's processor lacks {', '.join(sorted(missing))}, which the guest was told of")
    table = saved.get("table")
    if not isinstance(table, list) or len(table) > MOST:
        raise ValueError("no CPUID table")
    rows = [numbers({"row": row}, "row", [32] * 6) for row in table]
    if saved.get("vendor") not in VENDORS:
        raise ValueError("no such vendor")
    cpuid = GuestCpuid(
        chosen,
        {(leaf, subleaf): (a, b, c, d) for leaf, subleaf, a, b, c, d in rows},
        vendor=saved["vendor"],
        hidden_xcr0=number(saved.get("hidden_xcr0"), "hidden_xcr0", 64),
    )
    if cpuid.xcr0_supported & ~(host_xcr0 | XCR0_PKRU):  # PKRU is kept apart, and emulated
        raise ValueError("this host's processor lacks registers that the guest was told of")
    return cpuid
