"""Hypercalls about the processor's registers: traps, callbacks, descriptor tables, bases (xen.h, callback.h)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from trivisor.machine.deprivileged import FS, GS
from trivisor.paravirt.xen import abi, traps
from trivisor.paravirt.xen.abi import EINVAL, ENODEV, ENOSYS, HYPERCALL_NUMBERS
from trivisor.paravirt.xen.debug_registers import debug_register, set_debug_register
from trivisor.paravirt.xen.descriptors import check_descriptor
from trivisor.paravirt.xen.errors import HypercallError, Preempted
from trivisor.paravirt.xen.frames import DESCRIPTORS, WRITABLE
from trivisor.paravirt.xen.page_tables import PRESENT
from trivisor.paravirt.xen.vcpu_state import NO_CALLBACK, Callback, Trap
from trivisor.x86.exceptions import GuestException
from trivisor.x86.paging import is_canonical

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain
    from trivisor.paravirt.xen.hypercalls import Handler

_TRAP = struct.Struct("<BBHI4xQ")
_TRAPS_AT_A_TIME = 256
_MASK64 = (1 << 64) - 1
_GDT_ENTRIES = abi.FIRST_RESERVED_GDT_ENTRY


_CALLBACKS = {
    abi.CALLBACKTYPE_EVENT: "event",
    abi.CALLBACKTYPE_FAILSAFE: "failsafe",
    abi.CALLBACKTYPE_SYSCALL: "syscall",
    abi.CALLBACKTYPE_SYSCALL32: "syscall32",
    abi.CALLBACKTYPE_SYSENTER: "sysenter",
    abi.CALLBACKTYPE_NMI: "nmi",
}
"""Where `VcpuState` has them."""


def handlers(domain: Domain) -> dict[int, Handler]:
    """By number."""
    calls = _Registers(domain)
    by_name: dict[str, Handler] = {
        "set_trap_table": calls.set_trap_table,
        "set_gdt": calls.set_gdt,
        "update_descriptor": calls.update_descriptor,
        "stack_switch": calls.stack_switch,
        "set_callbacks": calls.set_callbacks,
        "callback_op": calls.callback_op,
        "fpu_taskswitch": calls.fpu_taskswitch,
        "set_debugreg": calls.set_debugreg,
        "get_debugreg": calls.get_debugreg,
        "set_segment_base": calls.set_segment_base,
        "nmi_op": calls.nmi_op,
        "iret": lambda *_: traps.iret(domain),
    }
    return {HYPERCALL_NUMBERS[name]: handler for name, handler in by_name.items()}


class _Registers:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def set_trap_table(self, table: int, *_: int) -> int:
        """An array of struct trap_info that ends with address 0; a null pointer clears all."""
        domain = self._domain
        if not table:
            domain.state.traps.clear()
            domain.state.entries_changed()
            return 0
        for address_of in range(table, table + _TRAPS_AT_A_TIME * abi.TRAP_INFO_SIZE, abi.TRAP_INFO_SIZE):
            raw = domain.cpu.load(address_of, abi.TRAP_INFO_SIZE)
            vector, flags, selector = raw[0], raw[1], int.from_bytes(raw[2:4], "little")
            address = int.from_bytes(raw[8:16], "little")
            if not address:
                return 0
            if not is_canonical(address):
                raise HypercallError(EINVAL)
            domain.state.traps[vector] = Trap(
                address, selector | 3, flags & abi.TRAP_DPL, bool(flags & abi.TRAP_CLEARS_EVENTS)
            )
            domain.state.entries_changed()
        raise Preempted(table + _TRAPS_AT_A_TIME * abi.TRAP_INFO_SIZE & _MASK64)

    def set_gdt(self, frame_list: int, entries: int, *_: int) -> int:
        domain = self._domain
        entries &= 0xFFFFFFFF
        if entries > _GDT_ENTRIES:
            raise HypercallError(EINVAL)
        count = -(-entries // 512)
        frames = list(struct.unpack(f"<{count}Q", domain.cpu.load(frame_list, 8 * count))) if count else []
        taken: list[int] = []
        try:
            for frame in frames:
                domain.tables.get_kind(frame, DESCRIPTORS)
                taken.append(frame)
        except HypercallError:
            for frame in taken:
                domain.tables.put_kind(frame)
            raise HypercallError(EINVAL) from None
        for frame in domain.state.gdt_frames:
            domain.tables.put_kind(frame)
        domain.state.gdt_frames = frames
        domain.own.set_gdt(frames)
        for address in domain.own.gdt_entries:
            domain.cpu.entry_changed(address, 1, 0, PRESENT)
        domain.cpu.flush()  # whatever `STALE` says: it tells of the guest's tables
        domain.descriptor_tables_changed()
        return 0

    def update_descriptor(self, address: int, raw: int, *_: int) -> int:
        """Write 8 bytes at a machine address: in a page of descriptors, or in writable memory."""
        domain = self._domain
        frame, offset = address >> 12, address & 0xFFF
        if offset & 7:
            raise HypercallError(EINVAL)
        raw = check_descriptor(raw)
        frames = domain.frames
        frames.get(frame)
        try:
            if not frames.kind_count[frame] or frames.kind[frame] not in (DESCRIPTORS, WRITABLE):
                frames.get_writable(frame)
                frames.put_writable(frame)
            frames.words[frame * 512 + offset // 8] = raw
            domain.cpu.memory_written(frame << 12 | offset, 8)
            domain.descriptor_tables_changed()
        finally:
            frames.put(frame)
        return 0

    def stack_switch(self, selector: int, pointer: int, *_: int) -> int:
        state = self._domain.state
        state.kernel_stack_selector, state.kernel_stack = selector & 0xFFFF | 3, pointer
        return 0

    def set_callbacks(self, event: int, failsafe: int, syscall: int, *_: int) -> int:
        """callback_op for three of them, without flags; one that is no address is left as it was."""
        for name, address in (("event", event), ("failsafe", failsafe), ("syscall", syscall)):
            if is_canonical(address):
                setattr(self._domain.state, name, Callback(address, False))
        self._domain.state.entries_changed()
        return 0

    def callback_op(self, operation: int, argument: int, *_: int) -> int:
        domain = self._domain
        if operation == abi.CALLBACKOP_REGISTER:
            kind, flags, address = struct.unpack("<HH4xQ", domain.cpu.load(argument, 16))
            if not is_canonical(address):
                raise HypercallError(EINVAL)
            self._set_callback(kind, Callback(address, bool(flags & abi.CALLBACKF_MASK_EVENTS)))
            return 0
        if operation == abi.CALLBACKOP_UNREGISTER:
            (kind,) = struct.unpack("<H", domain.cpu.load(argument, 2))
            if kind not in _CALLBACKS:
                raise HypercallError(ENOSYS)
            if kind != abi.CALLBACKTYPE_NMI:
                raise HypercallError(EINVAL)
            self._set_callback(kind, NO_CALLBACK)
            return 0
        raise HypercallError(ENOSYS)

    def _set_callback(self, kind: int, callback: Callback) -> None:
        if kind not in _CALLBACKS:
            raise HypercallError(ENOSYS)
        setattr(self._domain.state, _CALLBACKS[kind], callback)
        self._domain.state.entries_changed()

    def nmi_op(self, operation: int, argument: int, *_: int) -> int:
        """The older form of callback_op for NMIs, of which none comes."""
        if operation == abi.XENNMI_REGISTER_CALLBACK:
            (address,) = struct.unpack("<Q8x", self._domain.cpu.load(argument, 16))
            if not is_canonical(address):
                raise HypercallError(EINVAL)
            self._set_callback(abi.CALLBACKTYPE_NMI, Callback(address, True))
        elif operation == abi.XENNMI_UNREGISTER_CALLBACK:
            self._set_callback(abi.CALLBACKTYPE_NMI, NO_CALLBACK)
        else:
            raise HypercallError(ENOSYS)
        return 0

    def fpu_taskswitch(self, wanted: int, *_: int) -> int:
        self._domain.cpu.fpu_disabled = bool(wanted & 0xFFFFFFFF)
        return 0

    def set_debugreg(self, number: int, value: int, *_: int) -> int:
        if error := set_debug_register(self._domain, number & 0xFFFFFFFF, value):
            raise HypercallError(error)
        return 0

    def get_debugreg(self, number: int, *_: int) -> int:
        value = debug_register(self._domain, number & 0xFFFFFFFF)
        if value is None:
            raise HypercallError(ENODEV)
        return value

    def set_segment_base(self, which: int, base: int, *_: int) -> int:
        domain, cpu = self._domain, self._domain.cpu
        if which == abi.SEGBASE_GS_USER_SEL:
            self._load_user_gs(base & 0xFFFF)
            return 0
        if not is_canonical(base):
            raise HypercallError(EINVAL)
        if which == abi.SEGBASE_FS:
            cpu.set_base(FS, base)
        elif which == abi.SEGBASE_GS_USER:
            domain.cpu.other_gs = base
        elif which == abi.SEGBASE_GS_KERNEL:
            cpu.set_base(GS, base)
        else:
            raise HypercallError(EINVAL)
        return 0

    def _load_user_gs(self, selector: int) -> None:
        """MOV to GS in the user's place: its base is the user's, the kernel's stays; a bad selector is null."""
        cpu = self._domain.cpu
        kernel = cpu.base(GS)
        try:
            cpu.load_segment(GS, selector)
        except GuestException:
            cpu.load_segment(GS, 0)
        cpu.other_gs = cpu.base(GS)
        cpu.set_base(GS, kernel)
