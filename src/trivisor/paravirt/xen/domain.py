"""A PV domain while it runs: the supervisor of its processor, and its way to everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trivisor.machine.deprivileged import GS, DeprivilegedCpu
from trivisor.machine.exits import Exit, Halt, Hypercall, Kicked
from trivisor.machine.stop import Crash
from trivisor.paravirt.xen import hypercalls, privileged, traps
from trivisor.paravirt.xen.abi import (
    DOMID_SELF,
    EFAULT,
    ENOSYS,
    FLAT_RING3_CS64,
    FLAT_RING3_SS,
    HYPERCALL_NUMBERS,
    HYPERCALLS,
    VCPU_INFO_CR2,
    VMASST_ARCHITECTURAL_IOPL,
)
from trivisor.paravirt.xen.cpuid import guest_cpuid
from trivisor.paravirt.xen.errors import DomainCrash, HypercallError, Preempted
from trivisor.paravirt.xen.events import EventChannels
from trivisor.paravirt.xen.frames import Frames
from trivisor.paravirt.xen.grant_maps import GrantMaps
from trivisor.paravirt.xen.grants import GrantTable
from trivisor.paravirt.xen.native import native_supervision
from trivisor.paravirt.xen.own_memory import GDT_ADDRESS, OwnMemory
from trivisor.paravirt.xen.page_table_writes import page_table_write
from trivisor.paravirt.xen.page_tables import PageTables
from trivisor.paravirt.xen.platform import Platform
from trivisor.paravirt.xen.shared_table import COUNTED, COUNTS, INDEX, TICKS
from trivisor.paravirt.xen.time import SystemTime
from trivisor.paravirt.xen.timers import VcpuTimers
from trivisor.paravirt.xen.vcpu_state import NO_TRAP, VcpuState
from trivisor.x86.exceptions import (
    DEVICE_NOT_AVAILABLE,
    GENERAL_PROTECTION,
    INVALID_OPCODE,
    PAGE_FAULT,
    PF_PRESENT,
    PF_USER,
    PF_WRITE,
    GuestException,
)
from trivisor.x86.flags import DF

OWN_ID = 1
"""The domain's number."""
_RAX, _RCX, _RDX, _RSI, _RDI, _R8, _R9, _R10, _R11 = 0, 1, 2, 6, 7, 8, 9, 10, 11
_LEAVES_KINDS = frozenset(
    HYPERCALL_NUMBERS[name]
    for name in (
        "vcpu_op", "sched_op", "set_timer_op", "iret", "xen_version", "stack_switch",
        "set_segment_base", "fpu_taskswitch", "console_io", "multicall",
    )
)  # fmt: skip
"""Hypercalls that do not look at what frames are used as, or leave that to others."""

_COUNTED_NATIVELY = (
    ("syscall", "SYSCALLS"),
    (f"exception {PAGE_FAULT}", "PAGE_FAULTS"),
    (f"exception {PAGE_FAULT}", "TABLE_WRITES"),
    ("page table written", "TABLE_WRITES"),
    (f"exception {INVALID_OPCODE}", "FORCED"),
    ("forced emulation", "FORCED"),
    (f"exception {GENERAL_PROTECTION}", "PORTS"),
    ("privileged instruction", "PORTS"),
    (f"exception {GENERAL_PROTECTION}", "PRIVILEGED"),
    ("privileged instruction", "PRIVILEGED"),
)
"""Words of the shared table, by the names of the statistics that they add to."""


class Domain:
    """One domain on one processor (`machine.deprivileged.Supervisor`); `cpu` is set when it has one."""

    cpu: DeprivilegedCpu

    def __init__(
        self,
        platform: Platform,
        frames: Frames,
        own: OwnMemory,
        tables: PageTables,
        events: EventChannels,
        grants: GrantTable,
        clock: SystemTime,
        console_output: Callable[[bytes], None],
    ) -> None:
        self.platform = platform
        self.memory = platform.memory
        self.view = platform.memory.view
        self.frames = frames
        self.own = own
        self.tables = tables
        self.events = events
        self.grants = grants
        self.number = OWN_ID
        self.grant_maps = GrantMaps(self)
        self.time = clock
        self.timers = VcpuTimers(clock, events, frames.table)
        self.console_output = console_output
        self.pages = 0
        """How many pages of memory it has at most."""
        self.table = frames.table
        self.state = VcpuState(self.table)
        self.native = native_supervision(self.table)
        self._tsc_frequency = platform.tsc_frequency
        self.vcpu_info_moved()
        self.halt: Exit | None = None
        """What the hypercall that is being made has the engine do afterwards."""
        self.following = 0
        """Where the instruction after the SYSCALL of that hypercall is."""
        self.observers: Callable[[type], list[Callable[[Any], None]]] = lambda kind: []
        self._handlers = hypercalls.handlers(self)
        self._counts: dict[str, list[int]] = {}
        self._exceptions: dict[str, int] = {}
        self._upcalls = 0
        self._flat: dict[tuple[int, int], bool] = {}

    def vcpu_info_moved(self) -> None:
        """Tell the native code where struct vcpu_info is."""
        self.table.words[INDEX["VCPU_INFO"]] = self.memory.base + self.events.vcpu_info

    # -- what the engine calls ------------------------------------------------------------------------------

    def exception(self, vector: int, error_code: int | None, address: int | None) -> Exit | None:
        try:
            self._exception(vector, error_code, address)
            return self._leave()
        except DomainCrash as crash:
            return self.crash(str(crash))

    def system_call(self, following: int) -> Exit | None:
        cpu, state = self.cpu, self.state
        registers = cpu.registers
        try:
            if state.in_kernel:
                self.following = following
                registers[_RCX], registers[_R11] = following, cpu.rflags
                cpu.rip = following
                cpu.set_flat(FLAT_RING3_CS64, FLAT_RING3_SS)  # what SYSCALL was at is not to be known (as on Xen)
                self._hypercall(registers)
            elif state.syscall.address:
                self._count("syscall")
                registers[_RCX], registers[_R11] = following, cpu.rflags
                cpu.rip = following
                cpu.set_flat(FLAT_RING3_CS64, FLAT_RING3_SS)
                traps.enter_kernel(
                    self, state.syscall.address, masks_events=state.syscall.masks_events, mask_flags=DF
                )
            else:
                self.deliver(INVALID_OPCODE)
            return self._leave()
        except DomainCrash as crash:
            return self.crash(str(crash))

    def software_interrupt(self, vector: int, following: int) -> Exit | None:
        cpu, trap = self.cpu, self.state.traps.get(vector, NO_TRAP)
        try:
            self._count("int")
            if trap.dpl < (1 if self.state.in_kernel else 3):
                self.deliver(GENERAL_PROTECTION, vector << 3 | 2)
            else:
                cpu.rip = following
                traps.enter_kernel(self, trap.address, masks_events=trap.clears_events)
            return self._leave()
        except DomainCrash as crash:
            return self.crash(str(crash))

    def interrupt(self) -> Exit | None:
        try:
            if self.events.upcall_wanted():
                self._upcall()
        except DomainCrash as crash:
            return self.crash(str(crash))
        return None

    def watched(self) -> bool:
        return bool(self.observers(Hypercall))

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return guest_cpuid(self.cpu, self.platform.tsc_frequency, leaf, subleaf)

    # -- what happens then ----------------------------------------------------------------------------------

    def _leave(self) -> Exit | None:
        """Before the guest goes on: the upcall, if one waits, and what the hypercall has the engine do."""
        info, view = self.events.vcpu_info, self.view
        if view[info] and not view[info + 1]:
            self._upcall()
            self.halt = None
            return None
        halt, self.halt = self.halt, None
        return halt

    def _upcall(self) -> None:
        self._upcalls += 1
        event = self.state.event
        if not event.address:
            raise DomainCrash("the guest unmasked events without a callback for them")
        traps.enter_kernel(self, event.address, masks_events=True)

    def _hypercall(self, registers: Any) -> None:
        number = registers[_RAX] & 0xFFFFFFFF
        started = time.perf_counter_ns()
        arguments = (
            registers[_RDI], registers[_RSI], registers[_RDX], registers[_R10], registers[_R8], registers[_R9]
        )  # fmt: skip
        try:
            result = self.call(number, arguments)
        except Preempted as rest:
            for register, value in zip((_RDI, _RSI, _RDX, _R10, _R8, _R9), rest.arguments, strict=False):
                registers[register] = value
            self.cpu.rip = self.following - 2
            return
        finally:
            self.tables.begin()
        registers[_RAX] = result & (1 << 64) - 1
        count = self._counts.setdefault(HYPERCALLS.get(number, f"number {number}"), [0, 0])
        count[0] += 1
        count[1] += time.perf_counter_ns() - started

    def call(self, number: int, arguments: tuple[int, ...]) -> int:
        """Make one hypercall; the result is negative for an error.  Raises Preempted and DomainCrash."""
        for observer in self.observers(Hypercall):
            observer(Hypercall(number, arguments))
        handler = self._handlers.get(number)
        if handler is None:
            return -ENOSYS
        if number not in _LEAVES_KINDS:
            self.tables.drop_lingering()
        try:
            return handler(*arguments)
        except HypercallError as error:
            return -error.number
        except GuestException:
            return -EFAULT

    def _exception(self, vector: int, error_code: int | None, address: int | None) -> None:
        name = f"exception {vector}"
        self._exceptions[name] = self._exceptions.get(name, 0) + 1
        if vector == PAGE_FAULT:
            assert address is not None and error_code is not None
            in_kernel = self.state.in_kernel
            written = error_code & (PF_PRESENT | PF_WRITE) == PF_PRESENT | PF_WRITE
            if in_kernel and written and page_table_write(self, address):
                self._count("page table written")
                return
            self.page_fault(error_code & ~PF_USER | (0 if in_kernel else PF_USER), address)
        elif vector == GENERAL_PROTECTION and privileged.execute(self):
            self._count("privileged instruction")
        elif vector == INVALID_OPCODE and privileged.forced(self):
            self._count("forced emulation")
        else:
            if vector == DEVICE_NOT_AVAILABLE:
                self.cpu.fpu_disabled = False
            self.deliver(vector, error_code)

    def _count(self, name: str) -> None:
        self._exceptions[name] = self._exceptions.get(name, 0) + 1

    def page_fault(self, error_code: int, address: int) -> None:
        """Have the guest handle a page fault of its own."""
        self.state.cr2 = address
        info = self.events.vcpu_info
        self.view[info + VCPU_INFO_CR2 : info + VCPU_INFO_CR2 + 8] = address.to_bytes(8, "little")
        self.deliver(PAGE_FAULT, error_code)

    def deliver(
        self, vector: int, error_code: int | None = None, *, selectors: tuple[int, int] | None = None
    ) -> None:
        """Have the guest handle an exception; `selectors` as `traps.enter_kernel` has them."""
        trap = self.state.traps.get(vector, NO_TRAP)
        if not trap.address:
            raise DomainCrash(f"exception {vector} at {self.cpu.rip:#x}, for which the guest has no handler")
        traps.enter_kernel(
            self, trap.address, masks_events=trap.clears_events, error_code=error_code, selectors=selectors
        )

    def crash(self, what: str) -> Exit:
        """The domain ends."""
        self.platform.stop(Crash(what))
        return Kicked()

    # -- what hypercalls and traps have in common -----------------------------------------------------------

    def switch_mode(self) -> None:
        """From the guest's kernel to its user mode or back: address space and GS base."""
        cpu, state = self.cpu, self.state
        state.in_kernel = not state.in_kernel
        base = cpu.base(GS)
        cpu.set_base(GS, cpu.other_gs)
        cpu.other_gs = base
        cpu.enter_space((state.kernel_root if state.in_kernel else state.user_root) << 12, state.in_kernel)

    def tell_time(self) -> None:
        """Tell the time at the place that the guest's kernel has for it; if that cannot be written, it does without."""
        area, user = self.state.time_area, not self.state.in_kernel
        if not area:
            return
        if user:
            self.switch_mode()
        try:
            self.cpu.store(area, self.time.told(int.from_bytes(self.cpu.load(area, 4), "little")))
        except GuestException:
            self.state.time_area = 0
        if user:
            self.switch_mode()

    def block(self) -> None:
        """Have the engine wait for an event when this hypercall is done."""
        self.halt = Halt(True)

    @property
    def kernel_may_do_io(self) -> bool:
        """Whether the guest's kernel may use ports, CLI and STI: as ring 1, or as ring 0 if it asked for that."""
        return self.state.iopl >= (0 if VMASST_ARCHITECTURAL_IOPL in self.state.assists else 1)

    def io_privilege_changed(self) -> None:
        """Tell the processor whether CLI and STI fault: where they may be used they do nothing."""
        self.cpu.interrupt_flag_ignored = self.kernel_may_do_io

    def flush(self) -> None:
        """Have the processor use nothing any more that page tables do not have."""
        self.frames.epoch += 1
        if self._may_be_stale:
            self.table.words[INDEX["STALE"]] = 0
            self.cpu.flush()

    def invalidate(self, linear: int) -> None:
        """The same for one linear address."""
        if self._may_be_stale:
            self.cpu.invalidate(linear)

    @property
    def _may_be_stale(self) -> bool:
        return bool(self.table.words[INDEX["STALE"]]) or not self.cpu.forgets_at_once

    def descriptor_tables_changed(self) -> None:
        """The GDT or the LDT is another, or its content is."""
        state = self.state
        self._flat.clear()
        self.table.words[INDEX["FLAT_PAIR"]] = 0
        self.cpu.set_descriptor_tables(GDT_ADDRESS, 0xFFFF, state.ldt_base, state.ldt_entries * 8 - 1)

    def is_flat(self, code: int, stack: int) -> bool:
        """Whether these selectors are of present flat 64-bit segments for ring 3, in the GDT."""
        known = self._flat.get((code, stack))
        if known is None:
            code_is, stack_is = _is_flat_code(self._descriptor(code)), _is_flat_data(self._descriptor(stack))
            known = self._flat[code, stack] = code_is and stack_is
        if known:
            self.table.words[INDEX["FLAT_PAIR"]] = code | stack << 16
        return known

    def _descriptor(self, selector: int) -> int:
        """The descriptor that a selector of the GDT names, 0 for none."""
        if selector in (FLAT_RING3_CS64, FLAT_RING3_SS):
            return 0x00AFFB000000FFFF if selector == FLAT_RING3_CS64 else 0x00CFF3000000FFFF
        page, entry = divmod(selector >> 3, 512)
        if selector & 4 or page >= len(self.state.gdt_frames):
            return 0
        return self.frames.words[self.state.gdt_frames[page] * 512 + entry]

    def check_self(self, domain: int, error: int) -> None:
        """Fail with `error` unless a domain id in an argument is this domain's."""
        if domain not in (DOMID_SELF, OWN_ID):
            raise HypercallError(error)

    # -- accounts -------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """Hypercalls by name, how often and how long, and what else crossed into the hypervisor."""
        words = self.table.words
        counts = {name: (count, spent / 1e9) for name, (count, spent) in self._counts.items()}
        for number in range(COUNTED):
            if natively := words[COUNTS + number]:
                name = HYPERCALLS[number]
                count, spent = counts.get(name, (0, 0.0))
                counts[name] = (count + natively, spent + words[TICKS + number] / self._tsc_frequency)
        entries = {
            "upcalls": self._upcalls + words[INDEX["UPCALLS"]],
            **self._exceptions,
        }
        for name, field in _COUNTED_NATIVELY:
            entries[name] = entries.get(name, 0) + words[INDEX[field]]
        by_count = sorted(counts.items(), key=lambda item: -item[1][0])
        return {
            "hypercalls": {name: count for name, (count, _) in by_count},
            "hypercalls, seconds": {name: spent for name, (_, spent) in by_count},
            "into the guest's kernel": dict(sorted(entries.items(), key=lambda item: -item[1])),
        }


def _is_flat_code(raw: int) -> bool:
    """Present, ring 3, 64-bit code, base 0."""
    return raw >> 40 & 0xFE == 0xFA and raw >> 52 & 6 == 2 and _base(raw) == 0


def _is_flat_data(raw: int) -> bool:
    """Present, ring 3, writable data that grows up, base 0, the whole of 4 GiB."""
    return raw >> 40 & 0xFE == 0xF2 and _base(raw) == 0 and raw >> 48 & 0xCF == 0xCF


def _base(raw: int) -> int:
    return raw >> 16 & 0xFFFFFF | raw >> 56 << 24
