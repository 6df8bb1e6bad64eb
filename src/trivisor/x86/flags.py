"""RFLAGS (Intel SDM 1, 3.4.3)."""

from __future__ import annotations

from typing import Final

CF: Final = 1 << 0
FIXED: Final = 1 << 1
"""Bit 1 always reads as one."""
PF: Final = 1 << 2
AF: Final = 1 << 4
ZF: Final = 1 << 6
SF: Final = 1 << 7
TF: Final = 1 << 8
IF: Final = 1 << 9
DF: Final = 1 << 10
OF: Final = 1 << 11
IOPL: Final = 3 << 12
IOPL_SHIFT: Final = 12
NT: Final = 1 << 14
RF: Final = 1 << 16
VM: Final = 1 << 17
AC: Final = 1 << 18
VIF: Final = 1 << 19
VIP: Final = 1 << 20
ID: Final = 1 << 21

STATUS: Final = CF | PF | AF | ZF | SF | OF
"""The six that arithmetic sets."""
VALID: Final = STATUS | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID
"""Every flag that can be written; the others read as zero, and `FIXED` as one."""

NAMES: Final = {
    CF: "CF", PF: "PF", AF: "AF", ZF: "ZF", SF: "SF", TF: "TF", IF: "IF", DF: "DF", OF: "OF",
    NT: "NT", RF: "RF", VM: "VM", AC: "AC", VIF: "VIF", VIP: "VIP", ID: "ID",
}  # fmt: skip


def describe(rflags: int) -> str:
    """The flags that are set, as in "ZF PF IF IOPL=3"; "-" when none is."""
    words = [name for bit, name in NAMES.items() if rflags & bit]
    if rflags & IOPL:
        words.append(f"IOPL={(rflags & IOPL) >> IOPL_SHIFT}")
    return " ".join(words) or "-"
