"""The ring-0 monitor that lies under a guest whose kernel and programs all run in ring 3: code, IDT, TSS, tables.

It lives in one entry of every level-4 table, which is the hypervisor's, and in
frames beyond the guest's memory, which no guest can map.  What it does is as
little as there can be: an exception stops at a HLT, one for each vector, and a
system call at an OUT; both end KVM_RUN, and the monitor outside does the rest
and sets the registers for going on.

The stub does work of its own for one thing alone, page tables that were
changed from outside.  A KVM that shadows them hears of writes by its guest
only.  So each entry that was changed is written once more, with what it has
already, by an instruction here, which makes KVM forget what it made of it.
Writing 16 bits, as no guest's kernel writes an entry, makes KVM forget all of
that table.
"""

from __future__ import annotations

import mmap
import struct
from ctypes import c_ubyte
from typing import Final

from trivisor.machine.memory import PAGE_SIZE, host_map, host_unmap
from trivisor.x86.assembler import assemble
from trivisor.x86.descriptors import INTERRUPT_GATE, Gate, build_gate64

PHYSICAL: Final = 1 << 38
"""Guest-physical address of the monitor's own memory; RAM ends far below."""
VECTORS: Final = 32
AT_A_TIME: Final = 64
"""How many entries, and how many tables, one run through the stub can have KVM forget."""
_PRESENT, _WRITE, _USER, _LARGE = 1, 2, 4, 0x80
_TABLE = _PRESENT | _WRITE | 0x60  # accessed and dirty, so that nothing has to set them
_CODE, _ENTRY, _SYSTEM, _STACK, _NOTES, _L3, _L2, _L1, _MAP = range(9)
"""Pages; the tables of the map of all memory come last."""
_IDT, _TSS = 0, 0x400
"""Offsets in the page `_SYSTEM`."""
TSS_LIMIT: Final = 0x69
_IO_MAP = 0x68
_IN_KERNEL: Final = 0x800
"""Offset of a byte in the page `_ENTRY`."""
_OUT_LENGTH: Final = 2
_GIB = 1 << 30


def _source() -> str:
    tables = "    pop rdi\n    or word [rdi], 0\n" * AT_A_TIME
    entries = "    pop rdi\n    or qword [rdi], 0\n" * AT_A_TIME
    return f"""
; One for each vector: the processor's frame is on the stack, and rip tells the vector.
vectors:
    times {VECTORS} hlt

; On the stack are: addresses in tables that KVM is to forget, where to go on, addresses of entries, where to
; go on, rax, rdi, and the frame for ring 3.  With fewer than {AT_A_TIME} addresses one enters further down.
tables:
{tables}
tables_end:
    ret
entries:
{entries}
entries_end:
    ret
more:
    hlt
flush:
    mov rax, cr3
    mov cr3, rax
leave:
    pop rax
    pop rdi
    iretq
"""


_NOTHING: Final = "ring_3_push:"
_ENTRY_PAGE: Final = """
entry:
{ring_3}
ring_3_call:
    out 0, al
ring_3_answered:
    popfq
    jmp rcx
"""


class Stub:
    """The monitor's memory: `view` is on its bytes.  `linear` is where its level-4 entry begins."""

    def __init__(self, linear: int, code_selector: int, span: int, *, stays_in_ring_3: bool) -> None:
        """`span` is how far the guest's memory reaches, in bytes.

        `stays_in_ring_3`: SYSCALL comes to its entry point in ring 3 (kvm-pvm), so the guest may run the code
        there, and use its port.
        """
        self.linear = linear
        gigabytes = -(-span // _GIB)
        self.size = (_MAP + gigabytes) * PAGE_SIZE
        self.host = host_map(self.size, mmap.PROT_READ | mmap.PROT_WRITE)
        self.view = memoryview((c_ubyte * self.size).from_address(self.host)).cast("B")
        self.level4_entry = self._physical(_L3) | _TABLE | _USER
        self.map = linear + _GIB
        """Linear address at which all of the guest's memory is mapped."""
        program = assemble(_source(), origin=self._linear(_CODE))
        labels = program.labels
        self.vectors = labels["vectors"]
        self.tables_end, self.entries_end = labels["tables_end"], labels["entries_end"]
        self.step = (self.entries_end - labels["entries"]) // AT_A_TIME
        self.tables_step = (self.tables_end - labels["tables"]) // AT_A_TIME
        self.more, self.flush, self.leave = labels["more"], labels["flush"], labels["leave"]
        self.entry = self._linear(_ENTRY)
        """Where SYSCALL goes, and the stop after it."""
        self.notes = self._linear(_NOTES)
        """Where ring 3's code may note something."""
        self.stack = self._linear(_STACK) + PAGE_SIZE
        self.stack_at = (_STACK + 1) * PAGE_SIZE
        """The end of the stack, as a linear address and as an offset in `view`."""
        self.idt, self.tss = self._linear(_SYSTEM) + _IDT, self._linear(_SYSTEM) + _TSS
        self._put(_CODE, 0, program.code)
        self.stays_in_ring_3 = stays_in_ring_3
        self.set_entry(_NOTHING)
        gates = [
            build_gate64(Gate(INTERRUPT_GATE, code_selector, self.vectors + vector, 0, True)).to_bytes(16, "little")
            for vector in range(VECTORS)
        ]
        self._put(_SYSTEM, _IDT, b"".join(gates))
        # rsp0, and which ports ring 3 may use: none, or number 0 alone.
        tss = struct.pack("<4xQ", self.stack).ljust(0x66, b"\0") + struct.pack("<H", _IO_MAP)
        self._put(_SYSTEM, _TSS, tss + (b"\xfe\xff" if stays_in_ring_3 else b"\xff\xff"))
        self._make_tables(gigabytes)

    def set_entry(self, ring_3: str) -> None:
        """Have `ring_3` answer what it can of system calls that stay in ring 3 (`NativeSupervision.ring_3`)."""
        source = _ENTRY_PAGE.format(ring_3=ring_3 if self.stays_in_ring_3 else _NOTHING)
        places = {"in_kernel": self.entry + _IN_KERNEL, "notes": self.notes}
        symbols = {name: place - (1 << 64 if place >> 63 else 0) for name, place in places.items()}
        program = assemble(source, origin=self.entry, symbols=symbols)
        self._push, call = (program.labels[name] for name in ("ring_3_push", "ring_3_call"))
        self.stops = (call, call + _OUT_LENGTH)
        """rip at the stop for a system call: KVM may show it at the OUT or behind it."""
        self._put(_ENTRY, 0, program.code)

    def is_entering(self, rip: int) -> bool:
        """Whether ring 3 at `rip` is on its way from SYSCALL to that stop, with nothing changed but flags since."""
        return self.entry <= rip <= self._push or rip == self.stops[0]

    @property
    def in_kernel_at(self) -> int:
        """Host address of the byte that tells ring 3's code whether the guest's kernel runs."""
        return self.host + _ENTRY * PAGE_SIZE + _IN_KERNEL

    @property
    def notes_at(self) -> int:
        """The same as a host address."""
        return self.host + _NOTES * PAGE_SIZE

    def close(self) -> None:
        """Give the memory back to the host."""
        if self.size:
            self.view.release()
            host_unmap(self.host, self.size)
            self.size = 0

    def _linear(self, page: int) -> int:
        return self.linear + page * PAGE_SIZE

    def _physical(self, page: int) -> int:
        return PHYSICAL + page * PAGE_SIZE

    def _put(self, page: int, offset: int, data: bytes) -> None:
        at = page * PAGE_SIZE + offset
        self.view[at : at + len(data)] = data

    def _make_tables(self, gigabytes: int) -> None:
        """The monitor's first pages, and all memory by large pages."""
        ring_3 = _USER if self.stays_in_ring_3 else 0
        entry, notes = _PRESENT | 0x20 | ring_3, _TABLE | ring_3
        words = self.view.cast("Q")
        words[_L3 * 512] = self._physical(_L2) | _TABLE | _USER
        words[_L2 * 512] = self._physical(_L1) | _TABLE | _USER
        rights_of = {_CODE: _PRESENT | 0x20, _ENTRY: entry, _SYSTEM: _TABLE, _STACK: _TABLE, _NOTES: notes}
        for page, rights in rights_of.items():
            words[_L1 * 512 + page] = self._physical(page) | rights
        for number in range(gigabytes):
            table = _MAP + number
            words[_L3 * 512 + 1 + number] = self._physical(table) | _TABLE
            for index in range(512):
                words[table * 512 + index] = number * _GIB | index << 21 | _TABLE | _LARGE
        words.release()
