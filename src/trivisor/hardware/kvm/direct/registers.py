"""The registers of a KVM processor as they lie in its run structure (KVM_CAP_SYNC_REGS): read and written in place."""

from __future__ import annotations

from typing import Final

from trivisor.hardware.kvm import abi
from trivisor.machine.deprivileged import CS, DS, ES, FS, GS, SS
from trivisor.x86.descriptors import parse_segment

_REGS: Final = abi.RUN_SYNC_REGS // 8
_SREGS: Final = (abi.RUN_SYNC_REGS + abi.SyncRegs.sregs.offset) // 8
_END: Final = abi.RUN_SYNC_REGS + abi.SyncRegs.events.offset
PLACES: Final = (0, 2, 3, 1, 6, 7, 4, 5, *range(8, 16))
"""Where `kvm_regs` has the general register of each encoding number."""
_RIP, _RFLAGS = _REGS + 16, _REGS + 17
_CR0, _CR2, _CR3, _CR4 = (
    _SREGS + getattr(abi.SpecialRegs, name).offset // 8 for name in ("cr0", "cr2", "cr3", "cr4")
)
_SEGMENTS: Final = {
    number: 8 * _SREGS + getattr(abi.SpecialRegs, name).offset
    for number, name in ((ES, "es"), (CS, "cs"), (SS, "ss"), (DS, "ds"), (FS, "fs"), (GS, "gs"))
}
_SEGMENT_SIZE: Final = 24
_SELECTORS: Final = {number: (at + abi.Segment.selector.offset) // 2 for number, at in _SEGMENTS.items()}
_CS_SELECTOR: Final = _SELECTORS[CS]
_RCX, _R11 = _REGS + PLACES[1], _REGS + PLACES[11]
_SYSCALL_LENGTH: Final = 2
_MASK64: Final = (1 << 64) - 1

Blob = bytes
"""One `kvm_segment`."""


def segment(selector: int, raw: int) -> Blob:
    """A segment register loaded with `selector` and the 8-byte descriptor `raw`; 0 is that of a null selector."""
    if not raw:
        return bytes(abi.Segment(selector=selector, unusable=1))
    descriptor = parse_segment(raw)
    flags = descriptor.attributes
    return bytes(
        abi.Segment(
            base=descriptor.base, limit=descriptor.limit, selector=selector, type=flags & 15, s=flags >> 4 & 1,
            dpl=flags >> 5 & 3, present=flags >> 7 & 1, avl=flags >> 12 & 1, l=flags >> 13 & 1, db=flags >> 14 & 1,
            g=flags >> 15 & 1,
        )
    )  # fmt: skip


class RunRegisters:
    """Views on the run structure `run_bytes`, valid from an exit to the next entry.

    Indexed by encoding number it is the general registers.  `special` tells
    whether anything but general registers, rip and rflags was changed.
    """

    def __init__(self, run_bytes: memoryview) -> None:
        self._bytes = run_bytes
        self._words = run_bytes.cast("Q")
        self._halves = run_bytes.cast("H")
        self.special = False
        self._valid = abi.RUN_VALID_REGS // 8
        self._dirty = abi.RUN_DIRTY_REGS // 8

    def enable(self) -> None:
        """Have KVM show them at every exit."""
        self._words[self._valid] = abi.SYNC_REGS | abi.SYNC_SREGS

    def commit(self) -> None:
        """Have KVM load them at the next entry."""
        self._words[self._dirty] = abi.SYNC_REGS | abi.SYNC_SREGS if self.special else abi.SYNC_REGS
        self.special = False

    def resume(self) -> None:
        """What native code has had KVM load goes on waiting for the next entry."""
        self.special = bool(self._words[self._dirty] & abi.SYNC_SREGS)

    def save(self) -> bytes:
        """All of them."""
        return bytes(self._bytes[8 * _REGS : _END])

    def load(self, saved: bytes) -> None:
        """Load what `save` gave."""
        self._bytes[8 * _REGS : _END] = saved
        self.special = True

    def close(self) -> None:
        """Let the run structure go."""
        self._words.release()
        self._halves.release()

    def __getitem__(self, number: int) -> int:
        return int(self._words[_REGS + PLACES[number]])

    def __setitem__(self, number: int, value: int) -> None:
        self._words[_REGS + PLACES[number]] = value

    @property
    def rip(self) -> int:
        return int(self._words[_RIP])

    @rip.setter
    def rip(self, value: int) -> None:
        self._words[_RIP] = value

    @property
    def rflags(self) -> int:
        return int(self._words[_RFLAGS])

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._words[_RFLAGS] = value

    @property
    def cr0(self) -> int:
        return int(self._words[_CR0])

    @cr0.setter
    def cr0(self, value: int) -> None:
        self._words[_CR0] = value
        self.special = True

    @property
    def cr2(self) -> int:
        return int(self._words[_CR2])

    @property
    def cr3(self) -> int:
        return int(self._words[_CR3])

    @cr3.setter
    def cr3(self, value: int) -> None:
        self._words[_CR3] = value
        self.special = True

    @property
    def cr4(self) -> int:
        return int(self._words[_CR4])

    @cr4.setter
    def cr4(self, value: int) -> None:
        self._words[_CR4] = value
        self.special = True

    def system_call(self, allowed: int, fixed: int) -> int:
        """After SYSCALL: rip back at the instruction, rflags from r11 (masked); returns where the next one is."""
        words = self._words
        following = int(words[_RCX])
        words[_RFLAGS] = words[_R11] & allowed | fixed
        words[_RIP] = following - _SYSCALL_LENGTH & _MASK64
        return following

    @property
    def ring(self) -> int:
        """The privilege level."""
        return int(self._halves[_CS_SELECTOR]) & 3

    def selector(self, number: int) -> int:
        """A segment register's selector."""
        return int(self._halves[_SELECTORS[number]])

    def set_segment(self, number: int, value: Blob) -> None:
        """Load a segment register with what `segment` gave."""
        at = _SEGMENTS[number]
        self._bytes[at : at + _SEGMENT_SIZE] = value
        self.special = True

    def base(self, number: int) -> int:
        """A segment register's base."""
        return int(self._words[_SEGMENTS[number] >> 3])

    def set_base(self, number: int, base: int) -> None:
        self._words[_SEGMENTS[number] >> 3] = base
        self.special = True
