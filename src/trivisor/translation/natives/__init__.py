"""The native helpers: machine code that translated code calls for what must be fast but is too long to inline.

They are written in the project's assembler and assembled once per process, or taken from an earlier one
(`kept_helpers`).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from trivisor.translation.layout import OFFSETS


class Helpers(NamedTuple):
    """The helpers' machine code, which can stand anywhere, and the offsets of its labels."""

    code: bytes
    labels: dict[str, int]


@cache
def assembled_helpers(xsave_mask: int, supervision: str = "") -> Helpers:
    """Assemble all helpers; `xsave_mask` is the guest-visible XCR0 on this host, or 0 without XSAVE.

    `supervision` is a hypervisor's own (`machine.deprivileged.NativeSupervision`).
    """
    # Both are slow to import, and the helpers are kept.
    from trivisor.translation.natives.source import helpers_source
    from trivisor.x86.assembler import assemble

    source, symbols = helpers_source(xsave_mask, supervision)
    program = assemble(source, bits=64, symbols=symbols)
    return Helpers(program.code, program.labels)


POINTERS = {
    "LEAVE": "leave_native",
    "LOOKUP": "lookup",
    "CHAIN": "chain",
    "CALL_OUT": "call_out",
    "ESCAPE": "escape",
    "FAULT_GP": "fault_gp",
    "FAULT_SS": "fault_ss",
    "MISS": "miss",
    "CLOSE": "close_inline",
    "CROSSED": "crossed",
    "IRET": "iret",
    "SYSCALL": "syscall_native",
    "SYSRET": "sysret_native",
    "WRITE_CR3": "write_cr3",
    "INVALIDATE": "invalidate",
    "PORT_IN": "port_in",
    "PORT_OUT": "port_out",
    "READ_CR8": "read_cr8",
    "WRITE_CR8": "write_cr8",
    "CPUID": "cpuid",
    "READ_PKRU": "read_pkru",
    "WRITE_PKRU": "write_pkru",
    "LOAD_SEGMENT": "load_segment",
    "READ_MSR": "read_msr",
    "WRITE_MSR": "write_msr",
    "FAULT_DE": "fault_de",
    "FAULT_UD": "fault_ud",
    "FAULT_NM": "fault_nm",
    "RAISE": "raise",
    "INTERRUPT": "interrupt",
}
"""Fields of the state block that hold the address of a helper."""
assert all(name in OFFSETS for name in POINTERS)
