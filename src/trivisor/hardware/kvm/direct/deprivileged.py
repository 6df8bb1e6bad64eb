"""A KVM processor as a hypervisor sees it whose guest is all in ring 3 (`machine.deprivileged.DeprivilegedCpu`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from trivisor.hardware.kvm import abi
from trivisor.hardware.kvm.direct.registers import Blob, segment
from trivisor.machine.deprivileged import CS, DS, ES, FS, GS, SS
from trivisor.machine.memory import PAGE_SIZE
from trivisor.machine.vcpu import GeneralProtection
from trivisor.x86.control import CR0_TS, CR4_FSGSBASE
from trivisor.x86.descriptors import PRESENT, SELECTOR_INDEX, SELECTOR_RPL, SELECTOR_TI, parse_segment
from trivisor.x86.exceptions import GENERAL_PROTECTION, SEGMENT_NOT_PRESENT, STACK_FAULT, GuestException
from trivisor.x86.msr import IA32_KERNEL_GS_BASE

if TYPE_CHECKING:
    from trivisor.hardware.kvm.direct.vcpu import DirectVcpu
    from trivisor.machine.state import CpuState

_ACCESSED_DIRTY: Final = 0x60
FLAT_CODE: Final = 0x00AFFB000000FFFF
FLAT_DATA: Final = 0x00CFF3000000FFFF
"""Descriptors of flat 64-bit segments of ring 3."""


class Deprivileged:
    """`vcpu` as its supervisor sees it."""

    def __init__(self, vcpu: DirectVcpu) -> None:
        self._vcpu = vcpu
        self._run = vcpu.registers
        self._memory = vcpu.ring3_memory
        self.registers = vcpu.registers
        self.dr = [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400]
        self._xcr0 = 1
        self._gdt = self._gdt_limit = self._ldt = 0
        self._ldt_limit = -1
        self._segments: dict[int, Blob] = {}
        self.changed_tables: set[int] = set()
        self.changed_entries: set[int] = set()
        """Physical addresses of what KVM is to forget when translations are."""
        self.at_once = False
        """They are to be forgotten before the guest goes on."""
        self.flush_wanted = False
        self.interrupt_flag_ignored = False
        """CLI and STI fault all the same, and the supervisor does nothing about them."""

    @property
    def other_gs(self) -> int:
        return self._vcpu.native.other_gs

    @other_gs.setter
    def other_gs(self, value: int) -> None:
        self._vcpu.native.other_gs = value

    # -- registers ------------------------------------------------------------------------------------------

    @property
    def rip(self) -> int:
        return self._run.rip

    @rip.setter
    def rip(self, value: int) -> None:
        self._run.rip = value

    @property
    def rflags(self) -> int:
        return self._run.rflags

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._run.rflags = value

    def state_loaded(self, state: CpuState) -> None:
        """The processor has this state: what of it is kept here."""
        self.dr[:] = state.dr
        self._xcr0 = state.xcr0
        self.other_gs = state.msrs.get(IA32_KERNEL_GS_BASE, 0)
        self._memory.root = state.cr3
        present = bool(state.ldtr.attributes & PRESENT)
        self.set_descriptor_tables(
            state.gdtr.base, state.gdtr.limit, state.ldtr.base, state.ldtr.limit if present else -1
        )

    @property
    def xcr0(self) -> int:
        return self._xcr0

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        xcrs = abi.Xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = value
        self._vcpu.handle.control(abi.SET_XCRS, xcrs)
        self._xcr0 = value

    @property
    def xcr0_supported(self) -> int:
        return self._vcpu.xcr0_supported

    @property
    def fsgsbase(self) -> bool:
        return bool(self._run.cr4 & CR4_FSGSBASE)

    @fsgsbase.setter
    def fsgsbase(self, value: bool) -> None:
        if value != self.fsgsbase and "fsgsbase" in self._vcpu.guest_cpuid.features:
            self._run.cr4 ^= CR4_FSGSBASE

    @property
    def fpu_disabled(self) -> bool:
        return bool(self._run.cr0 & CR0_TS)

    @fpu_disabled.setter
    def fpu_disabled(self, value: bool) -> None:
        if value != self.fpu_disabled:
            self._run.cr0 ^= CR0_TS

    # -- segments -------------------------------------------------------------------------------------------

    def selector(self, segment: int) -> int:
        return self._run.selector(segment)

    def load_segment(self, segment: int, selector: int) -> None:
        selector &= 0xFFFF
        if not selector & ~SELECTOR_RPL and segment in (DS, ES, FS, GS):
            self._run.set_segment(segment, _null(selector))
            return
        self._check(segment, selector)
        self._run.set_segment(segment, self.loaded(selector))

    def _check(self, segment: int, selector: int) -> None:
        """Raise what MOV or a far return to ring 3 does about a bad selector (Intel SDM 3A 5.6, 5.8.1)."""
        index = selector & ~SELECTOR_RPL
        raw = self._descriptor(selector)
        if raw is None:
            raise GuestException(GENERAL_PROTECTION, index)
        descriptor = parse_segment(raw)
        if segment == CS:
            good = descriptor.is_code and (descriptor.dpl == 3 or descriptor.is_conforming)
        elif segment == SS:
            good = descriptor.is_writable and descriptor.dpl == 3 and selector & SELECTOR_RPL == 3
        else:
            good = descriptor.is_readable and (descriptor.dpl == 3 or descriptor.is_conforming)
        if not good or not index:
            raise GuestException(GENERAL_PROTECTION, index)
        if not descriptor.present:
            raise GuestException(STACK_FAULT if segment == SS else SEGMENT_NOT_PRESENT, index)

    def _descriptor(self, selector: int) -> int | None:
        """What the descriptor tables have for a selector; None beyond their limits."""
        base, limit = (self._ldt, self._ldt_limit) if selector & SELECTOR_TI else (self._gdt, self._gdt_limit)
        offset = selector & SELECTOR_INDEX
        if offset + 7 > limit:
            return None
        try:
            return int.from_bytes(self._memory.load(base + offset, 8, system=True), "little")
        except GuestException:
            return None

    def loaded(self, selector: int, otherwise: int = 0) -> Blob:
        """The segment register that the processor has when it has loaded `selector`.

        `otherwise` is the descriptor that it had if there is none any more.
        """
        known = self._segments.get(selector)
        if known is None:
            known = self._segments[selector] = segment(selector, self._descriptor(selector) or otherwise)
        return known

    def set_flat(self, code: int, stack: int) -> None:
        known = self._segments
        for number, selector, raw in ((CS, code, FLAT_CODE), (SS, stack, FLAT_DATA)):
            if self._run.selector(number) != selector:
                blob = known.get(selector)
                if blob is None:
                    blob = known[selector] = segment(selector, raw)
                self._run.set_segment(number, blob)

    def base(self, segment: int) -> int:
        return self._run.base(segment)

    def set_base(self, segment: int, base: int) -> None:
        if self._run.base(segment) != base:
            self._run.set_base(segment, base)

    def set_descriptor_tables(self, gdt: int, gdt_limit: int, ldt: int, ldt_limit: int) -> None:
        self._gdt, self._gdt_limit, self._ldt, self._ldt_limit = gdt, gdt_limit, ldt, ldt_limit
        self._segments.clear()
        self._vcpu.set_gdt(gdt, gdt_limit)

    # -- address spaces -------------------------------------------------------------------------------------

    def enter_space(self, root: int, kernel: bool) -> None:
        self._memory.root = root
        self._vcpu.native.enter_space(root, kernel)
        if self._run.cr3 != root:
            self._run.cr3 = root

    @property
    def forgets_at_once(self) -> bool:
        return False

    def flush(self) -> None:
        self.flush_wanted = True

    def invalidate(self, linear: int) -> None:
        """All of them: it is done where they all can be forgotten at the same cost."""
        self.flush_wanted = True

    def entry_changed(self, address: int, level: int, old: int, new: int) -> bool:
        if (old ^ new) & ~_ACCESSED_DIRTY:
            self.changed_entries.add(address)
            if level > 1:
                self.at_once = True
        return True

    # -- memory ---------------------------------------------------------------------------------------------

    def load(self, linear: int, size: int) -> bytes:
        return self._memory.load(linear, size)

    def store(self, linear: int, data: bytes) -> None:
        self._memory.store(linear, data)

    def memory_written(self, address: int, length: int) -> None:
        """A page that is a table again may be one that KVM remembers as it was."""
        if length == PAGE_SIZE:
            tables, frame = self._vcpu.native.tables, address // PAGE_SIZE
            if tables[frame]:
                self.changed_tables.add(address)
                self.at_once = True
            else:
                tables[frame] = 1

    def take_native(self) -> None:
        """What native code has done, as if it had come by the methods here."""
        entries, tables, at_once, flush = self._vcpu.native.take()
        self._memory.root = self._run.cr3
        self.changed_entries.update(entries)
        self.changed_tables.update(tables)
        self.at_once |= at_once
        self.flush_wanted |= flush

    # -- the rest -------------------------------------------------------------------------------------------

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self._vcpu.guest_cpuid.query(
            leaf, subleaf, cr4=self._run.cr4, xcr0=self._xcr0, apic_enabled=True
        )

    def guest_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self._vcpu.supervisor.cpuid(leaf, subleaf)

    def set_debug_register(self, number: int, value: int) -> None:
        self.dr[number] = value
        debug = abi.DebugRegs(dr6=self.dr[6], dr7=self.dr[7])
        debug.db[:] = self.dr[:4]
        self._vcpu.handle.control(abi.SET_DEBUGREGS, debug)

    def debug_exception(self) -> None:
        """Take DR6 from the processor: it tells what a debug exception was for."""
        self.dr[6] = self._vcpu.handle.get(abi.GET_DEBUGREGS, abi.DebugRegs).dr6

    def read_msr(self, index: int) -> int:
        values = self._vcpu.handle.get_msrs([index])
        if index not in values:
            raise GeneralProtection
        return values[index]

    def write_msr(self, index: int, value: int) -> None:
        try:
            self._vcpu.handle.set_msrs({index: value})
        except ValueError:
            raise GeneralProtection from None

    def tsc(self) -> int:
        return self._vcpu.tsc()

    def set_tsc_offset(self, offset: int) -> bool:
        if self._vcpu.ring_0_is_emulated:
            return False
        self._vcpu.tsc_offset = offset
        return True

    def attention(self) -> None:
        self._vcpu.board.interrupts.on_pending()


def _null(selector: int) -> Blob:
    return segment(selector, 0)
