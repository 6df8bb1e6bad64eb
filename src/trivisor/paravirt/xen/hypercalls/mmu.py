"""Hypercalls about page tables and address spaces (xen.h, mmu_update and mmuext_op)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EACCES, EINVAL, ENOSYS, ESRCH, HYPERCALL_NUMBERS
from trivisor.paravirt.xen.errors import HypercallError, Preempted
from trivisor.paravirt.xen.frames import L1, L4
from trivisor.paravirt.xen.page_tables import ACCESSED, DIRTY
from trivisor.paravirt.xen.walk import entry_address
from trivisor.x86.paging import is_canonical

if TYPE_CHECKING:
    from trivisor.paravirt.xen.domain import Domain
    from trivisor.paravirt.xen.hypercalls import Handler

_AT_A_TIME = 512
"""Operations that are done before the guest may be interrupted."""
_PIN_LEVEL = {
    abi.MMUEXT_PIN_L1_TABLE: 1,
    abi.MMUEXT_PIN_L2_TABLE: 2,
    abi.MMUEXT_PIN_L3_TABLE: 3,
    abi.MMUEXT_PIN_L4_TABLE: 4,
}
_MOST_LDT_ENTRIES = 8192


def handlers(domain: Domain) -> dict[int, Handler]:
    """By number."""
    calls = _Mmu(domain)
    by_name: dict[str, Handler] = {
        "mmu_update": calls.mmu_update,
        "update_va_mapping": calls.update_va_mapping,
        "update_va_mapping_otherdomain": calls.update_va_mapping_otherdomain,
        "mmuext_op": calls.mmuext_op,
    }
    return {HYPERCALL_NUMBERS[name]: handler for name, handler in by_name.items()}


class _Mmu:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._frames = domain.frames
        self._tables = domain.tables
        self._operations = {
            abi.MMUEXT_UNPIN_TABLE: self._unpin,
            abi.MMUEXT_NEW_BASEPTR: self._new_baseptr,
            abi.MMUEXT_NEW_USER_BASEPTR: self._new_user_baseptr,
            abi.MMUEXT_SET_LDT: self._set_ldt,
            abi.MMUEXT_CLEAR_PAGE: self._clear_page,
            abi.MMUEXT_COPY_PAGE: self._copy_page,
        }

    # -- mmu_update -----------------------------------------------------------------------------------------

    def mmu_update(self, requests: int, count: int, done: int, foreign: int, *_: int) -> int:
        """`count` of struct mmu_update; how many were done goes to the address `done`, if there is one."""
        domain = self._domain
        count &= 0xFFFFFFFF
        before = 0
        if count & abi.MMU_UPDATE_PREEMPTED:
            count &= ~abi.MMU_UPDATE_PREEMPTED
            before = self._done(done)
        self._check_foreign(foreign)
        now = min(count, _AT_A_TIME)
        made = 0
        try:
            for address, value in struct.iter_unpack("<QQ", domain.cpu.load(requests, 16 * now)) if now else ():
                self._update(address, value)
                made += 1
                if self._tables.gives_way:
                    break
        finally:
            if done:
                domain.cpu.store(done, (before + made & 0xFFFFFFFF).to_bytes(4, "little"))
        if made < count:
            raise Preempted(requests + 16 * made, count - made | abi.MMU_UPDATE_PREEMPTED)
        return 0

    def _done(self, address: int) -> int:
        return int.from_bytes(self._domain.cpu.load(address, 4), "little") if address else 0

    def _check_foreign(self, foreign: int) -> None:
        """The owner of page tables in bits 16 to 31 plus one, of pages in bits 0 to 15: always this domain."""
        owner = foreign >> 16 & 0xFFFF
        if owner:
            self._domain.check_self(owner - 1, ESRCH)
        self._domain.check_self(foreign & 0xFFFF, ESRCH)

    def _update(self, address: int, value: int) -> None:
        command, address = address & 3, address & ~3
        frame = address >> 12
        frames = self._frames
        if command == abi.MMU_MACHPHYS_UPDATE:
            frames.get(frame)
            try:
                if frames.kind_count[frame] and frames.kind[frame] == 0:  # one of Xen's own
                    raise HypercallError(EINVAL)
                self._domain.own.set_physical(frame, value)
            finally:
                frames.put(frame)
            return
        if address & 7:
            raise HypercallError(EINVAL)
        index = address >> 3 & 511
        if frames.owns(frame) and frames.kind_count[frame] and L1 <= frames.kind[frame] <= L4:
            self._tables.change(frame, index, value, preserve=command == abi.MMU_PT_UPDATE_PRESERVE_AD)
            return
        frames.get(frame)
        try:
            frames.get_writable(frame)
            try:
                if command == abi.MMU_PT_UPDATE_PRESERVE_AD:
                    value |= frames.words[frame * 512 + index] & (ACCESSED | DIRTY)
                frames.words[frame * 512 + index] = value
                self._domain.cpu.memory_written(address, 8)
            finally:
                frames.put_writable(frame, stale=False)
        finally:
            frames.put(frame)

    # -- update_va_mapping ----------------------------------------------------------------------------------

    def update_va_mapping(self, linear: int, entry: int, flags: int, *_: int) -> int:
        found = entry_address(self._domain, linear)
        if found is None or self._frames.kind[found[0]] != L1:
            raise HypercallError(EINVAL)
        self._tables.change(*found, entry)
        kind = flags & abi.UVMF_FLUSHTYPE_MASK
        if kind == abi.UVMF_TLB_FLUSH:
            self._domain.flush()
        elif kind == abi.UVMF_INVLPG:
            self._domain.invalidate(linear)
        return 0

    def update_va_mapping_otherdomain(self, linear: int, entry: int, flags: int, domain: int, *_: int) -> int:
        self._domain.check_self(domain & 0xFFFF, ESRCH)
        return self.update_va_mapping(linear, entry, flags)

    # -- mmuext_op ------------------------------------------------------------------------------------------

    def mmuext_op(self, operations: int, count: int, done: int, foreign: int, *_: int) -> int:
        """`count` of struct mmuext_op; how many were done goes to the address `done`, if there is one."""
        domain = self._domain
        count &= 0xFFFFFFFF
        before = 0
        if count & abi.MMU_UPDATE_PREEMPTED:
            count &= ~abi.MMU_UPDATE_PREEMPTED
            before = self._done(done)
        self._domain.check_self(foreign & 0xFFFF, ESRCH)
        now = min(count, _AT_A_TIME)
        made = 0
        try:
            for number in range(now):
                command, first, second = struct.unpack("<I4xQQ", domain.cpu.load(operations + 24 * number, 24))
                self._operation(command, first, second)
                made += 1
                if self._tables.gives_way:
                    break
        finally:
            if done:
                domain.cpu.store(done, (before + made & 0xFFFFFFFF).to_bytes(4, "little"))
        if made < count:
            raise Preempted(operations + 24 * made, count - made | abi.MMU_UPDATE_PREEMPTED)
        return 0

    def _operation(self, command: int, first: int, second: int) -> None:
        level = _PIN_LEVEL.get(command)
        if level is not None:
            self._tables.pin(first, level)
        elif command in (abi.MMUEXT_TLB_FLUSH_LOCAL, abi.MMUEXT_TLB_FLUSH_MULTI, abi.MMUEXT_TLB_FLUSH_ALL):
            self._domain.flush()
        elif command in (abi.MMUEXT_INVLPG_LOCAL, abi.MMUEXT_INVLPG_MULTI, abi.MMUEXT_INVLPG_ALL):
            if is_canonical(first):
                self._domain.invalidate(first)
        elif command in (abi.MMUEXT_FLUSH_CACHE, abi.MMUEXT_FLUSH_CACHE_GLOBAL):
            raise HypercallError(EACCES)  # for domains with hardware of their own
        elif command in self._operations:
            self._operations[command](first, second)
        else:
            raise HypercallError(ENOSYS)

    def _unpin(self, frame: int, _second: int) -> None:
        self._tables.unpin(frame)

    def _new_baseptr(self, frame: int, _second: int) -> None:
        load_kernel_root(self._domain, frame)

    def _new_user_baseptr(self, frame: int, _second: int) -> None:
        state = self._domain.state
        if frame == state.user_root:
            return
        if frame:
            self._tables.get_kind(frame, L4)
        old, state.user_root = state.user_root, frame
        if old:
            self._tables.put_kind(old)

    def _set_ldt(self, base: int, entries: int) -> None:
        """Entries are looked up in the guest's memory when they are used, and checked there."""
        entries &= 0xFFFFFFFF
        state = self._domain.state
        if entries > _MOST_LDT_ENTRIES or base & 0xFFF:
            raise HypercallError(EINVAL)
        if entries:
            raise HypercallError(ENOSYS)
        state.ldt_base, state.ldt_entries = (base, entries) if entries else (0, 0)
        self._domain.descriptor_tables_changed()

    def _clear_page(self, frame: int, _second: int) -> None:
        self._frames.hold(frame, writable=True)
        self._domain.memory.write(frame << 12, bytes(4096))
        self._written(frame)

    def _copy_page(self, frame: int, source: int) -> None:
        self._frames.get(source)
        try:
            self._frames.hold(frame, writable=True)
            self._domain.memory.write(frame << 12, self._domain.memory.read(source << 12, 4096))
            self._written(frame)
        finally:
            self._frames.put(source)

    def _written(self, frame: int) -> None:
        self._domain.cpu.memory_written(frame << 12, 4096)
        self._frames.let_go(frame, writable=True)


def load_kernel_root(domain: Domain, frame: int) -> None:
    """The guest's kernel goes on in the address space of another level-4 table; raises HypercallError."""
    state = domain.state
    domain.tables.drop_lingering()
    if frame != state.kernel_root:
        domain.tables.get_kind(frame, L4)
        old, state.kernel_root = state.kernel_root, frame
        domain.tables.put_kind(old)
    if state.in_kernel:
        domain.cpu.enter_space(frame << 12, True)
    domain.flush()


