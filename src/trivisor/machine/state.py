"""The architectural state of one processor, the same for every technique.

A snapshot taken under one technique goes on under another: this is all that
has to travel.  Field names follow the manuals (Intel SDM 1, 3.4; 3A, 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field

GPR_NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")


@dataclass(slots=True)
class Segment:
    """A segment register with its hidden part.

    `attributes` are bits 40-47 and 52-55 of the descriptor, as VT-x and KVM
    order them: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15.
    `limit` is in bytes, already scaled by G.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    attributes: int = 0


@dataclass(slots=True)
class Table:
    """GDTR or IDTR."""

    base: int = 0
    limit: int = 0xFFFF


def _code_segment() -> Segment:
    return Segment(0xF000, 0xFFFF0000, 0xFFFF, 0x9B)


def _data_segment() -> Segment:
    return Segment(0, 0, 0xFFFF, 0x93)


@dataclass(slots=True)
class CpuState:
    """Everything a processor remembers; defaults are its state at RESET (Intel SDM 3A, table 9-1)."""

    gpr: list[int] = field(default_factory=lambda: [0] * 16)
    """General registers in encoding order (`GPR_NAMES`), 64 bits each."""
    rip: int = 0xFFF0
    rflags: int = 2
    cs: Segment = field(default_factory=_code_segment)
    ss: Segment = field(default_factory=_data_segment)
    ds: Segment = field(default_factory=_data_segment)
    es: Segment = field(default_factory=_data_segment)
    fs: Segment = field(default_factory=_data_segment)
    gs: Segment = field(default_factory=_data_segment)
    ldtr: Segment = field(default_factory=lambda: Segment(0, 0, 0xFFFF, 0x82))
    tr: Segment = field(default_factory=lambda: Segment(0, 0, 0xFFFF, 0x8B))
    gdtr: Table = field(default_factory=Table)
    idtr: Table = field(default_factory=Table)
    cr0: int = 0x60000010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    xcr0: int = 1
    dr: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400])
    msrs: dict[int, int] = field(default_factory=dict)
    """Model-specific registers by index, those that have no field of their own."""
    xsave: bytes = b""
    """The XSAVE area in standard format (Intel SDM 1, 13.4); empty for the initial state."""
    pkru: int = 0
    """Rights by protection key, which are no part of `xsave` here (Intel SDM 3A 4.6.2)."""
    interrupt_shadow: bool = False
    """Interrupts are held off for one instruction (after STI, MOV SS)."""
    halted: bool = False
    nmi_blocked: bool = False
    nmi_pending: bool = False
    interrupts_pending: list[int] = field(default_factory=list)
    """Vectors of external interrupts that were acknowledged, or injected by hand, and not delivered yet."""
    exception_pending: tuple[int, int | None] | None = None
    """(vector, error code) of an exception to deliver before the next instruction; CR2 and DR6 are set already."""

    def segments(self) -> dict[str, Segment]:
        """The six segment registers by name, in encoding order."""
        return {name: getattr(self, name) for name in SEGMENT_NAMES}

    def __getattr__(self, name: str) -> int:
        """General registers by name: `state.rax`."""
        if name in GPR_NAMES:
            return self.gpr[GPR_NAMES.index(name)]
        raise AttributeError(name)
