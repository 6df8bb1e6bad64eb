"""The translation engine's processor as a hypervisor sees it whose guest is all in ring 3.

See `machine.deprivileged.DeprivilegedCpu`.  The guest's kernel has the TLB and
the jump cache that are a kernel's elsewhere, its user the others, so that
going between the two forgets nothing.
"""

from __future__ import annotations

from trivisor.machine.deprivileged import CS, SS, Supervisor
from trivisor.machine.memory import PAGE_SIZE
from trivisor.translation.core import LDTR, MASK64
from trivisor.translation.cpu import TranslationVcpu
from trivisor.translation.emulator import segments
from trivisor.translation.emulator.control_instructions import load_breakpoints
from trivisor.translation.layout import OFFSETS
from trivisor.x86.control import CR0_TS, CR4_FSGSBASE
from trivisor.x86.descriptors import LDT, PRESENT, SELECTOR_RPL
from trivisor.x86.exceptions import GENERAL_PROTECTION, GuestException
from trivisor.x86.paging import Access

_LIMIT = 0xFFFFFFFF
_IGNORE_CLI = OFFSETS["IGNORE_CLI"] // 8
_ROOTS = tuple(OFFSETS[name] // 8 for name in ("ROOT_USER", "ROOT_KERNEL"))
_ADDRESS = (1 << 52) - PAGE_SIZE
_EMPTY = bytes(PAGE_SIZE)
_FLAT_CODE, _FLAT_DATA = 0xA0FB, 0xC0F3
"""Attributes of flat 64-bit segments of ring 3."""


class Deprivileged:
    """`vcpu` for its `supervisor`, from now on and until it is closed."""

    def __init__(self, vcpu: TranslationVcpu, supervisor: Supervisor) -> None:
        self._vcpu = vcpu
        self._core = vcpu.core
        self._words = vcpu.core.words
        self._mmu = vcpu.mmu
        self._view = vcpu.board.memory.view
        self._ram = vcpu.board.memory.base
        self._words[OFFSETS["KEPT_HALF"] // 8] = 1 << 63
        for root in _ROOTS:
            self._words[root] = MASK64
        self.registers = vcpu.core.regs
        self.dr = vcpu.core.dr
        vcpu.supervisor = supervisor
        vcpu.mode_changed()

    @property
    def rip(self) -> int:
        return int(self._core.rip)

    @rip.setter
    def rip(self, value: int) -> None:
        self._core.rip = value

    @property
    def rflags(self) -> int:
        return int(self._core.rflags)

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._core.rflags = value

    @property
    def other_gs(self) -> int:
        return int(self._core.kernel_gs_base)

    @other_gs.setter
    def other_gs(self, value: int) -> None:
        self._core.kernel_gs_base = value

    @property
    def xcr0(self) -> int:
        return int(self._core.xcr0)

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        self._core.xcr0 = value
        self._vcpu.mode_changed()

    @property
    def forgets_at_once(self) -> bool:
        return True

    @property
    def fsgsbase(self) -> bool:
        return bool(self._core.cr4 & CR4_FSGSBASE)

    @fsgsbase.setter
    def fsgsbase(self, value: bool) -> None:
        self._core.cr4 = self._core.cr4 & ~CR4_FSGSBASE | (CR4_FSGSBASE if value else 0)

    @property
    def xcr0_supported(self) -> int:
        return int(self._vcpu.xcr0_supported)

    @property
    def fpu_disabled(self) -> bool:
        return bool(self._core.cr0 & CR0_TS)

    @fpu_disabled.setter
    def fpu_disabled(self, value: bool) -> None:
        if value != self.fpu_disabled:
            self._core.cr0 ^= CR0_TS
            self._vcpu.mode_changed()

    @property
    def interrupt_flag_ignored(self) -> bool:
        return bool(self._words[_IGNORE_CLI])

    @interrupt_flag_ignored.setter
    def interrupt_flag_ignored(self, value: bool) -> None:
        self._words[_IGNORE_CLI] = int(value)

    # -- segments -------------------------------------------------------------------------------------------

    def selector(self, segment: int) -> int:
        return int(self._core.segments[segment].selector)

    def load_segment(self, segment: int, selector: int) -> None:
        if segment != CS:
            segments.load(self._vcpu, segment, selector)
            return
        index = selector & ~SELECTOR_RPL
        if not index:
            raise GuestException(GENERAL_PROTECTION, 0)
        descriptor, _ = segments.fetch(self._vcpu, selector)
        if descriptor.dpl != 3 and not descriptor.is_conforming:
            raise GuestException(GENERAL_PROTECTION, index)
        segments.check_code(descriptor, selector, self._core)
        segments.set_code(self._core, selector, descriptor, 3)
        self._vcpu.mode_changed()

    def set_flat(self, code: int, stack: int) -> None:
        views = self._core.segments
        changes = views[CS].attributes != _FLAT_CODE
        views[CS].set(code, 0, _LIMIT, _FLAT_CODE)
        views[SS].set(stack, 0, _LIMIT, _FLAT_DATA)
        if changes:
            self._vcpu.mode_changed()

    def base(self, segment: int) -> int:
        return int(self._core.segments[segment].base)

    def set_base(self, segment: int, base: int) -> None:
        self._core.segments[segment].base = base

    def set_descriptor_tables(self, gdt: int, gdt_limit: int, ldt: int, ldt_limit: int) -> None:
        core = self._core
        core.gdtr_base, core.gdtr_limit = gdt, gdt_limit
        present = PRESENT if ldt_limit >= 0 else 0
        core.segments[LDTR].set(8 if present else 0, ldt, max(ldt_limit, 0), LDT | present)

    # -- address spaces -------------------------------------------------------------------------------------

    def enter_space(self, root: int, kernel: bool) -> None:
        vcpu = self._vcpu
        self._core.cr3 = root
        if self._words[_ROOTS[kernel]] != root:
            self._words[_ROOTS[kernel]] = root
            vcpu.flush_tlb(keep_global=False)
        if vcpu.guest_kernel != kernel:
            vcpu.guest_kernel = kernel
            vcpu.mode_changed()

    def flush(self) -> None:
        self._vcpu.flush_tlb(keep_global=False)

    def invalidate(self, linear: int) -> None:
        self._vcpu.invalidate_page(linear)

    def entry_changed(self, address: int, level: int, old: int, new: int) -> bool:
        if level == 1:
            return self._vcpu.entry_changed(address, old)
        # Through an empty table nothing is known: what was went with its entries.
        table = old & _ADDRESS
        return bool(self._view[table : table + PAGE_SIZE] != _EMPTY)

    # -- memory ---------------------------------------------------------------------------------------------

    def load(self, linear: int, size: int) -> bytes:
        room = PAGE_SIZE - (linear & 0xFFF)
        if size <= room:
            at = self._readable(linear)
            return bytes(self._view[at : at + size])
        return self.load(linear, room) + self.load(linear + room & MASK64, size - room)

    def _readable(self, linear: int) -> int:
        words, at = self._words, self._mmu.entry(linear, not self._vcpu.guest_kernel)
        if words[at] == linear & ~0xFFF:
            return words[at + 2] - self._ram + (linear & 0xFFF)
        return self._mmu.physical(linear, Access.READ, True)

    def store(self, linear: int, data: bytes) -> None:
        room = PAGE_SIZE - (linear & 0xFFF)
        if len(data) > room:
            self.store(linear, data[:room])
            self.store(linear + room & MASK64, data[room:])
            return
        words, at = self._words, self._mmu.entry(linear, not self._vcpu.guest_kernel)
        if words[at + 1] == linear & ~0xFFF:
            physical = words[at + 2] - self._ram + (linear & 0xFFF)
        else:
            physical = self._mmu.physical(linear, Access.WRITE, True)
            if self._mmu.code_lines[physical >> 12]:
                self._vcpu.memory_written(physical, len(data))
        self._view[physical : physical + len(data)] = data

    def memory_written(self, address: int, length: int) -> None:
        if self._words[_ROOTS[0]] == address:
            self._words[_ROOTS[0]] = MASK64  # the user's TLB is of a table that has given place to another
        if self._mmu.code_lines[address >> 12]:
            self._vcpu.memory_written(address, length)

    # -- the rest -------------------------------------------------------------------------------------------

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self._vcpu.own_cpuid(leaf, subleaf)

    def guest_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self._vcpu.cpuid(leaf, subleaf)

    def set_debug_register(self, number: int, value: int) -> None:
        self._core.dr[number] = value
        load_breakpoints(self._vcpu)

    def read_msr(self, index: int) -> int:
        return self._vcpu.msrs.read(index)

    def write_msr(self, index: int, value: int) -> None:
        self._vcpu.msrs.write(index, value)

    def tsc(self) -> int:
        return self._vcpu.tsc()

    def set_tsc_offset(self, offset: int) -> bool:
        self._vcpu.tsc_offset = offset
        return True

    def attention(self) -> None:
        self._vcpu.board.interrupts.on_pending()
