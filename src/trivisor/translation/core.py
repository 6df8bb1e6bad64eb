"""The virtual processor's registers as Python sees them: a view on the state block.

Only valid while translated code is not running.  Memory accesses here are the
slow, exact ones, used by call-outs; they raise `GuestException` like the
instruction would.
"""

from __future__ import annotations

import ctypes
import mmap

from trivisor.machine.memory import GuestMemory, host_map, host_unmap
from trivisor.translation.debug_unit import DebugUnit
from trivisor.translation.layout import OFFSETS, SEGMENT_ORDER, STACK_SIZE, STATE_SIZE
from trivisor.x86.control import EFER_LMA
from trivisor.x86.descriptors import LONG

MASK64 = (1 << 64) - 1

# Host-held flags: CF PF AF ZF SF OF and DF.
HOST_FLAGS = 0x8D5 | 0x400
IF = 0x200
SYSTEM_FLAGS = 0x3F7100
"""TF, IOPL, NT, RF, VM, AC, VIF, VIP, ID."""

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)


def _flag(name: str) -> property:
    """A field of the state block that is 0 or 1."""
    index = OFFSETS[name] // 8

    def get(self: Core) -> bool:
        return bool(self.words[index])

    def set_(self: Core, value: bool) -> None:
        self.words[index] = 1 if value else 0

    return property(get, set_, doc=f"The state block's {name}.")


def _q(name: str) -> property:
    """A 64-bit field of the state block as a property."""
    index = OFFSETS[name] // 8

    def get(self: Core) -> int:
        return self.words[index]

    def set_(self: Core, value: int) -> None:
        self.words[index] = value & MASK64

    return property(get, set_, doc=f"The state block's {name}.")


class SegmentView:
    """One segment register in the state block; fields as in `machine.state.Segment`."""

    __slots__ = ("_at", "_words")

    def __init__(self, words: memoryview, name: str) -> None:
        self._words = words
        self._at = OFFSETS[f"{name}_SELECTOR"] // 8

    @property
    def selector(self) -> int:
        return self._words[self._at]

    @property
    def base(self) -> int:
        return self._words[self._at + 1]

    @base.setter
    def base(self, value: int) -> None:
        self._words[self._at + 1] = value & MASK64

    @property
    def limit(self) -> int:
        return self._words[self._at + 2]

    @property
    def attributes(self) -> int:
        return self._words[self._at + 3]

    def set(self, selector: int, base: int, limit: int, attributes: int) -> None:
        words, at = self._words, self._at
        words[at] = selector
        words[at + 1] = base & MASK64
        words[at + 2] = limit
        words[at + 3] = attributes


class Core:
    """Registers of the virtual processor, in the state block."""

    linear_rip = _q("RIP")
    """Where the processor is: the linear address of the next instruction, as translated code has it."""
    cr0 = _q("CR0")
    cr2 = _q("CR2")
    cr3 = _q("CR3")
    cr4 = _q("CR4")
    efer = _q("EFER")
    xcr0 = _q("XCR0")
    star = _q("STAR")
    lstar = _q("LSTAR")
    cstar = _q("CSTAR")
    fmask = _q("FMASK")
    kernel_gs_base = _q("KERNEL_GS_BASE")
    sysenter_cs = _q("SYSENTER_CS")
    sysenter_esp = _q("SYSENTER_ESP")
    sysenter_eip = _q("SYSENTER_EIP")
    tsc_offset = _q("TSC_OFFSET")
    tsc_adjust = _q("TSC_ADJUST")
    tsc_aux = _q("TSC_AUX")
    gdtr_base = _q("GDTR_BASE")
    gdtr_limit = _q("GDTR_LIMIT")
    idtr_base = _q("IDTR_BASE")
    idtr_limit = _q("IDTR_LIMIT")
    cpl = _q("CPL")
    mode = _q("MODE")
    pkru = _q("PKRU")
    pkrs = _q("PKRS")
    interrupt_flag = _q("IF")  # 0 or 0x200
    nmi_blocked = _flag("NMI_BLOCKED")
    nmi_waiting = _flag("NMI_WAITING")

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self._mapping = host_map(STACK_SIZE + STATE_SIZE, mmap.PROT_READ | mmap.PROT_WRITE)
        self.address = self._mapping + STACK_SIZE
        """Host address of the state block: what rsp is in translated code."""
        self.bytes = memoryview((ctypes.c_ubyte * STATE_SIZE).from_address(self.address)).cast("B")
        self.words = self.bytes.cast("Q")
        at = OFFSETS["GPR"] // 8
        self.regs = self.words[at : at + 16]
        """The sixteen general registers in encoding order, 64 bits each."""
        self.segments = [SegmentView(self.words, name) for name in SEGMENT_ORDER]
        """ES, CS, SS, DS, FS, GS, LDTR, TR."""
        self.dr = [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400]
        self.debug = DebugUnit()
        self.interrupt_shadow = False
        """Interrupts are held off until one more instruction has run (STI, MOV SS, POP SS)."""

    @property
    def rip(self) -> int:
        """The instruction pointer as the architecture has it: the offset in the code segment."""
        base, linear = self.code_base, self.linear_rip
        offset: int = (linear - base) & 0xFFFFFFFF if base else linear
        return offset

    @rip.setter
    def rip(self, value: int) -> None:
        base = self.code_base
        self.linear_rip = (value + base) & 0xFFFFFFFF if base else value

    @property
    def code_base(self) -> int:
        """CS's base, which 64-bit mode does not look at."""
        cs = self.segments[CS]
        return 0 if cs.attributes & LONG and self.efer & EFER_LMA else cs.base

    _flags = _q("FLAGS")
    _system_flags = _q("SYSTEM_FLAGS")

    @property
    def rflags(self) -> int:
        """RFLAGS put together: arithmetic flags and DF, IF, and the system flags; bit 1 is set."""
        flags: int = (self._flags & HOST_FLAGS) | self.interrupt_flag | self._system_flags | 2
        return flags

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._flags = value & HOST_FLAGS
        self.interrupt_flag = value & IF
        self._system_flags = value & SYSTEM_FLAGS | 2

    def close(self) -> None:
        """Give the state block back to the host; no field may be used afterwards."""
        for view in (self.regs, self.words, self.bytes):
            view.release()
        host_unmap(self._mapping, STACK_SIZE + STATE_SIZE)
