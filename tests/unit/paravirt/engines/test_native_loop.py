"""Direct execution's native run loop: what it notes for Python, more than there is usually, and who hears of signals."""

from __future__ import annotations

import threading
import time

from tests.unit.paravirt.engines.conftest import BASE, Guest
from trivisor.hardware.kvm.direct.vcpu import DirectVcpu
from trivisor.machine.exits import Kicked
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS

MANY = 512
FIRST = BASE + (100 << 21)
"""Where the test's own level-1 table maps pages."""


def list_of_updates(guest: Guest, number: int, table: int, page: int) -> int:
    """In the program's own memory: all entries of `table` are to lead to what `page` is mapped to; its address."""
    entry = guest.frame_of(page) << 12 | 0x65
    raw = b"".join((table * 4096 + 8 * at).to_bytes(8, "little") + entry.to_bytes(8, "little") for at in range(MANY))
    linear = BASE + 0x10000 + 0x2000 * number
    for half in range(0, len(raw), 4096):
        guest.xen.memory.write(guest.frame_of(linear + half) << 12, raw[half : half + 4096])
    return linear


def table_of_its_own(guest: Guest, number: int = 0) -> int:
    """A table for FIRST, or for what follows, of which all entries lead to the program's PAGE; its frame."""
    frames = guest.domain.frames
    table, page = frames.allocate(), guest.frame_of(0xFFFFFFFF8010B000)
    frames.words[table * 512 : table * 512 + 512] = memoryview((page << 12 | 0x65).to_bytes(8, "little") * 512).cast("Q")
    words = frames.words
    level3 = (words[guest.domain.state.kernel_root * 512 + 511] & (1 << 52) - 1) >> 12
    level2 = (words[level3 * 512 + 510] & (1 << 52) - 1) >> 12
    guest.domain.tables.change(level2, 100 + number, table << 12 | 0x67)
    return table


def test_all_entries_of_a_table_change_in_one_hypercall(boot) -> None:
    """Each page is read through them before and after, 512 changes at a time, a dozen times."""
    guest = boot(
        """
start:
    mov qword [PAGE], 1
    mov qword [PAGE + 0x1000], 100
    mov r13d, 6
again:
    mov rdi, [DATA + 8]
    call change
    mov rdi, [DATA + 16]
    call change
    dec r13d
    jnz again
    jmp shutdown
change:                                 ; the list at rdi, and what is read then
    mov esi, 512
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmu_update
    syscall
    or [DATA + 32], rax
    mov dword [DATA + 0x800], 6         ; flush
    mov rdi, DATA + 0x800
    mov esi, 1
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmuext_op
    syscall
    or [DATA + 32], rax
    mov rbx, [DATA + 24]
    mov ecx, 512
load:
    add r12, [rbx]
    add rbx, 4096
    dec ecx
    jnz load
    mov [DATA + 40], r12
    ret
"""
    )
    table = table_of_its_own(guest)
    lists = [list_of_updates(guest, at, table, page) for at, page in enumerate((0xFFFFFFFF8010C000, 0xFFFFFFFF8010B000))]
    guest[1], guest[2], guest[3] = *lists, FIRST
    guest.finish()
    assert guest[4] == 0
    assert guest[5] == 6 * MANY * 101
    assert guest.domain.frames.kind_count[table] == 1


def test_more_changes_in_a_multicall_than_can_be_noted(boot) -> None:
    """A multicall of 4 lists of 512 updates each, back and forth over two tables, ends with what the last ones say."""
    guest = boot(
        """
start:
    mov qword [PAGE], 1
    mov qword [PAGE + 0x1000], 100
    call sum
    mov rdi, DATA + 0x400
    mov esi, 4
    mov eax, multicall
    syscall
    mov [DATA + 32], rax
    mov dword [DATA + 0x800], 6         ; flush
    mov rdi, DATA + 0x800
    mov esi, 1
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmuext_op
    syscall
    call sum
    mov [DATA + 40], r12
    jmp shutdown
sum:
    mov rbx, [DATA + 24]
    mov ecx, 1024
    xor r12d, r12d
load:
    add r12, [rbx]
    add rbx, 4096
    dec ecx
    jnz load
    ret
"""
    )
    tables = [table_of_its_own(guest, 0), table_of_its_own(guest, 1)]
    for number, (table, page) in enumerate(
        (table, page) for page in (0xFFFFFFFF8010C000, 0xFFFFFFFF8010B000, 0xFFFFFFFF8010C000)[1:] for table in tables
    ):
        call = (HYPERCALL_NUMBERS["mmu_update"], 0, list_of_updates(guest, number, table, page), MANY, 0, 0x7FF0, 0, 0)
        for at, word in enumerate(call):
            guest[0x80 + 8 * number + at] = word
    guest[3] = FIRST
    guest.finish()
    assert guest[4] == 0 and [guest[0x81 + 8 * number] for number in range(4)] == [0] * 4
    assert guest[5] == 2 * MANY * 100


def test_tables_that_come_and_go_are_seen_as_they_are(boot) -> None:
    """One frame is a table, then memory that is written to, then a table again, as a list of pins and unpins."""
    guest = boot(
        """
start:
    mov r13d, 40
again:
    mov dword [DATA + 0x800], 0         ; MMUEXT_PIN_L1_TABLE
    mov dword [DATA + 0x818], 4         ; MMUEXT_UNPIN_TABLE
    mov rax, [DATA + 8]
    mov [DATA + 0x808], rax
    mov [DATA + 0x820], rax
    mov rdi, DATA + 0x800
    mov esi, 2
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmuext_op
    syscall
    or [DATA + 16], rax
    dec r13d
    jnz again
    jmp shutdown
"""
    )
    guest[1] = guest.domain.frames.allocate()
    guest.finish()
    assert guest[2] == 0
    if isinstance(guest.vcpu, DirectVcpu):
        assert not guest.vcpu.deprivileged.changed_tables
        assert guest.vcpu.native.tables[guest[1]] == 1


def test_a_guest_that_does_nothing_but_hypercalls_hears_a_kick_and_its_clock(boot) -> None:
    guest = boot("start: mov edi, 0\n mov rsi, STACK\n mov eax, set_segment_base\n syscall\n jmp start\n")
    for _ in range(2):
        timer = threading.Timer(0.1, guest.vcpu.kick)
        timer.start()
        began = time.monotonic()
        assert guest.run() == Kicked()
        assert time.monotonic() - began < 5
        timer.join()
    due: list[int] = []
    clock = guest.xen.platform.clock

    def on_due() -> None:
        due.append(1)
        guest.vcpu.kick()

    clock.at(clock.now() + 20_000_000, on_due)
    assert guest.run() == Kicked() and due == [1]
    assert guest.domain.statistics()["hypercalls"]["set_segment_base"] > 100


def test_an_error_of_a_list_leaves_what_came_before_it_done(boot) -> None:
    """The third of four updates is refused, natively and then by Python."""
    guest = boot(
        """
start:
    mov rdi, DATA + 0x800
    mov esi, 4
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmu_update
    syscall
    mov [DATA + 8], rax
    jmp shutdown
"""
    )
    table = table_of_its_own(guest)
    words = guest.domain.frames.words
    entry = words[table * 512]
    for at, new in enumerate((0, 0, 1 << 40 | 0x65, 0)):
        guest[0x100 + 2 * at], guest[0x101 + 2 * at] = table * 4096 + 8 * at, new
    guest.finish()
    assert guest[1] == (1 << 64) - abi.EPERM
    assert words[table * 512 : table * 512 + 4].tolist() == [0, 0, entry, entry]
