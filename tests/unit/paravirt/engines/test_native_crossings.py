"""What the engines do of the hypervisor natively, and what Python does of it: the same in the guest."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.paravirt.engines.conftest import DATA, PAGE, Guest
from tests.unit.paravirt.engines.test_programs import SET_TRAPS, TRAPS
from trivisor.hardware.kvm.direct.vcpu import DirectVcpu
from trivisor.machine.deprivileged import GS
from trivisor.machine.exits import Hypercall
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS

Boot = Callable[..., Guest]


@pytest.fixture(params=["translation", "direct"])
def boot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Boot]:
    """Make a guest of a program, under each engine; `watched` if Python is to do everything."""
    made: list[Guest] = []

    def start(source: str, *, watched: bool = False) -> Guest:
        guest = Guest(request.param, tmp_path, source)
        made.append(guest)
        if watched:
            guest.domain.observers = lambda kind: [lambda _: None] if kind is Hypercall else []
        return guest

    yield start
    for guest in made:
        guest.close()


def both(
    boot: Boot, source: str, prepare: Callable[[Guest], None] = lambda guest: None, *, some: bool = True
) -> tuple[Guest, Guest]:
    """The program run natively, which `some` of it must be, and by Python."""
    guests = boot(source), boot(source, watched=True)
    made: list[list[int]] = [[], []]
    for guest, numbers in zip(guests, made, strict=True):
        prepare(guest)
        noted, do = numbers, guest.domain.call
        guest.domain.call = lambda number, arguments, noted=noted, do=do: noted.append(number) or do(number, arguments)
        guest.finish()
    natively, by_python = (guest.vcpu.statistics()["native helpers"]["supervised"] for guest in guests)
    assert by_python == 0
    if not isinstance(guests[0].vcpu, DirectVcpu):  # which has CPUID and ports done by Python
        assert natively > 0 or len(made[0]) < len(made[1]) or not some
    return guests


LEAVES = [
    (0, 0), (1, 0x80000000), (1, 5), (4, 0), (4, 1), (7, 0), (0xD, 1), (0x16, 3), (0x17, 0), (1 << 32 | 1, 1 << 32 | 5),
    (0x40000000, 0), (0x40000001, 0), (0x40000003, 0), (0x40000003, 2), (0x400000FF, 0), (0x40000100, 1),
    (0x4FFFFFFF, 0), (0x50000000, 0), (0x80000000, 0), (0x80000008, 0), (0x80000009, 0), (0xFFFFFFFF, 0xFFFFFFFF),
]  # fmt: skip


def test_cpuid(boot: Boot) -> None:
    prefixes = ("", "db 0x0f, 0x0b, 0x78, 0x65, 0x6e")
    asks = "".join(
        f"""
        mov rax, {leaf}
        mov rcx, {subleaf}
        mov rdx, -1
        mov rbx, -1
        {prefix}
        cpuid
        call mix
        """
        for leaf, subleaf in LEAVES
        for prefix in prefixes * 2
    )
    source = f"""
start:
    mov r14, DATA + 64
    {asks}
    jmp shutdown
mix:
    rol rbx, 13
    xor rax, rbx
    rol rcx, 29
    xor rax, rcx
    rol rdx, 43
    xor rax, rdx
    mov [r14], rax
    add r14, 8
    ret
"""
    guests = both(boot, source)
    answers = [guest.words(8, 4 * len(LEAVES)) for guest in guests]
    assert answers[0] == answers[1]
    if not isinstance(guests[0].vcpu, DirectVcpu):  # where KVM answers without asking what is no leaf of the table
        assert all(answers[0][n::4] == answers[0][::4] for n in range(4))
    by_leaf = dict(zip(LEAVES, answers[0][::4], strict=True))
    assert by_leaf[0x40000100, 1] == by_leaf[0x4FFFFFFF, 0] == 0 != by_leaf[0x40000000, 0]
    assert by_leaf[1, 5] == by_leaf[1 << 32 | 1, 1 << 32 | 5]
    for guest in guests:
        entered = guest.domain.statistics()["into the guest's kernel"]
        assert entered["forced emulation"] == entered["exception 6"] == 2 * len(LEAVES)
    assert guests[0].vcpu.statistics()["exits"].get("exception", 0) < len(LEAVES)


def test_what_is_no_forced_emulation_is_an_exception(boot: Boot) -> None:
    others = ["db 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x90, 0x90", "db 0x0f, 0x0b, 0x78, 0x65, 0x6f, 0x0f, 0xa2", "ud2"]
    source = TRAPS + "start:" + SET_TRAPS + "xor eax, eax\n xor ecx, ecx\n cpuid\n" + "".join(
        f"mov rbp, on{n}\n {other}\n on{n}:\n" for n, other in enumerate(others)
    ) + "jmp shutdown"  # fmt: skip
    for guest in both(boot, source):
        assert guest.words(8, 18)[::6] == [6, 6, 6]
        assert guest.domain.statistics()["into the guest's kernel"].get("forced emulation", 0) == 0


SET_IOPL = f"""
    mov dword [DATA + 0xf00], 1
    mov edi, {abi.PHYSDEVOP_SET_IOPL}
    mov rsi, DATA + 0xf00
    mov eax, physdev_op
    syscall
"""
PORTS = ["in al, dx", "in ax, dx", "in eax, dx", "in al, 0x21", "in ax, 0x21", "in eax, 0x21"]
OUTS = ["out dx, al", "out dx, ax", "out dx, eax", "out 0x21, al", "out 0x21, ax", "out 0x21, eax", "db 0x48, 0xed"]


def test_ports_read_as_ones(boot: Boot) -> None:
    reads = "".join(
        f"""
        mov rax, 0x1122334455667700
        mov edx, 0x3f8
        {port}
        mov [r14], rax
        add r14, 8
        """
        for port in PORTS + OUTS
    )
    ones = [0x11223344556677FF, 0x112233445566FFFF, 0xFFFFFFFF]
    for guest in both(boot, f"start: {SET_IOPL} mov r14, DATA + 64\n {reads} jmp shutdown"):
        assert guest.words(8, 13) == ones * 2 + [0x1122334455667700] * 6 + [0xFFFFFFFF]
        entered = guest.domain.statistics()["into the guest's kernel"]
        assert entered["privileged instruction"] == entered["exception 13"] == 13


@pytest.mark.parametrize("watched", [False, True])
def test_ports_that_may_not_be_used_or_are_watched(boot: Boot, watched: bool) -> None:
    """Without an I/O privilege level IN is #GP; and a breakpoint on a port strikes after it."""
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + "mov rbp, allowed\n mov edx, 0x3f8\n in al, dx\n allowed:" + SET_IOPL + """
    mov rax, cr4
    or eax, 8
    mov cr4, rax
    mov edi, 0
    mov esi, 0x3f8
    mov eax, set_debugreg
    syscall
    mov edi, 7
    mov esi, 0x20002
    mov eax, set_debugreg
    syscall
    mov rbp, on
    mov edx, 0x3f8
    in al, dx
here: nop
on: mov edi, 7
    xor esi, esi
    mov eax, set_debugreg
    syscall
    mov edx, 0x3f8
    in al, dx
    jmp shutdown
""",
        watched=watched,
    )  # fmt: skip
    guest.finish()
    assert guest.words(8, 2) == [13, 0]
    assert guest.words(14, 3) == [1, 0, guest.label("here")]
    assert guest.words(20, 1) == [0]


def test_the_interrupt_flag_and_the_bases_by_rdmsr(boot: Boot) -> None:
    """CLI and STI fault without an I/O privilege level; RDMSR of the bases gives them, of what is none it faults."""
    bases = "".join(
        f"mov ecx, {0xC0000100 + number}\n mov rax, -1\n mov rdx, -1\n rdmsr\n mov [r14], rax\n mov [r14 + 8], rdx\n"
        "add r14, 16\n"
        for number in range(3)
    )
    source = TRAPS + "start:" + SET_TRAPS + "mov rbp, b1\n f1: cli\n b1: mov rbp, b2\n f2: sti\n b2:" + SET_IOPL + f"""
    mov edi, 0
    mov rsi, 0xffff812345678000
    mov eax, set_segment_base
    syscall
    mov edi, 1
    mov rsi, 0x7f1234567890
    mov eax, set_segment_base
    syscall
    mov edi, 2
    mov rsi, DATA
    mov eax, set_segment_base
    syscall
    cli
    sti
    {bases}
    mov rbp, done
    mov ecx, 0xc0000106
f3: rdmsr
done:
    jmp shutdown
"""
    for guest in both(boot, source):
        faults = [tuple(guest.words(8 + 6 * number, 3)) for number in range(2)]
        assert faults == [(13, 0, guest.label("f1")), (13, 0, guest.label("f2"))]
        values = guest.words(20, 6)
        assert [low | high << 32 for low, high in zip(values[::2], values[1::2], strict=True)] == [
            0xFFFF812345678000, DATA, 0x7F1234567890,
        ]  # fmt: skip
        assert guest.words(26, 3) == [13, 0, guest.label("f3")]
        if isinstance(guest.vcpu, DirectVcpu):  # where all of them fault
            entered = guest.domain.statistics()["into the guest's kernel"]
            assert (entered["exception 13"], entered["privileged instruction"]) == (8, 5)


def test_segment_bases(boot: Boot) -> None:
    """Each base, and what a selector for the user's GS does: a null one, and one that is no descriptor's."""
    calls = "".join(
        f"mov edi, {which}\n mov rsi, {value:#x}\n mov eax, set_segment_base\n syscall\n mov [r14], rax\n add r14, 8\n"
        for which, value in (
            (0, 0x1000), (1, 0x2000), (2, 0x3000), (3, 2), (1, 0x4000), (3, 0x10003), (1, 1 << 47), (3, 0x7FF0), (4, 0),
        )
    )  # fmt: skip
    guests = both(boot, f"start: mov r14, DATA + 64\n {calls} mov word [r14], gs\n jmp shutdown")
    for guest in guests:
        minus_einval = (1 << 64) - abi.EINVAL
        assert guest.words(8, 9) == [0] * 6 + [minus_einval, 0, minus_einval]
        assert (guest.cpu.base(GS - 1), guest.cpu.base(GS), guest.cpu.other_gs) == (0x1000, 0x3000, 0)
    assert guests[0][17] == guests[1][17]


EVENTS = """
upcall:                                 ; counts, forgets all events, and goes back
    push rax
    inc qword [DATA + 8]
    mov rax, PAGE
    mov byte [rax], 0
    mov qword [rax + 8], 0
    mov qword [rax + 2048], 0
    pop rax
    pop rcx
    pop r11
    push 0
    push rcx
    push r11
    push rax
    mov eax, iret
    syscall
bind:
    mov rdi, upcall
    mov rsi, upcall
    mov rdx, upcall
    mov eax, set_callbacks
    syscall
    mov rdi, PAGE
    mov rsi, [DATA + 16]
    mov edx, 1
    mov eax, update_va_mapping
    syscall
    mov dword [DATA + 0x800], 0
    mov dword [DATA + 0x804], 0
    mov edi, 1
    mov rsi, DATA + 0x800
    mov eax, event_channel_op
    syscall
    mov rax, PAGE
    mov byte [rax + 1], 0
    ret
now:                                    ; rax = the system time
    mov rcx, PAGE
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [rcx + 40]
    mov edx, [rcx + 56]
    movsx ecx, byte [rcx + 60]
    test ecx, ecx
    js right
    shl rax, cl
    jmp times
right:
    neg ecx
    shr rax, cl
times:
    mul rdx
    shrd rax, rdx, 32
    ret
set_single:                             ; rax = the deadline, edx = flags; rax = result
    mov [DATA + 0x900], rax
    mov [DATA + 0x908], edx
    mov edi, 8
    xor esi, esi
    mov rdx, DATA + 0x900
    mov eax, vcpu_op
    syscall
    ret
stop_single:
    mov edi, 9
    xor esi, esi
    mov eax, vcpu_op
    syscall
    ret
"""


def shares(guest: Guest) -> None:
    """Let the program know the shared page."""
    guest[2] = guest.domain.own.shared_info << 12 | 0x67


def test_a_timer_interrupts_code_that_only_runs(boot: Boot) -> None:
    """20 deadlines a little ahead; each upcall comes no sooner and keeps the registers of what it interrupts."""
    source = EVENTS + """
start:
    call bind
    mov r13d, 20
again:
    call now
    add rax, 500000
    mov r12, rax
    mov rbx, [DATA + 8]
    xor edx, edx
    call set_single
    test rax, rax
    jnz shutdown
    mov rax, 0x1234
    mov rcx, 0x5678
    mov r11, 0x9abc
wait:
    cmp rbx, [DATA + 8]
    je wait
    cmp rax, 0x1234
    jne shutdown
    cmp rcx, 0x5678
    jne shutdown
    cmp r11, 0x9abc
    jne shutdown
    call now
    cmp rax, r12
    jb shutdown
    dec r13d
    jnz again
    mov qword [DATA + 24], 1
    jmp shutdown
"""
    for guest in both(boot, source, shares):
        assert guest.words(1, 1) == [20] and guest[3] == 1
        entered = guest.domain.statistics()
        assert entered["into the guest's kernel"]["upcalls"] == 20
        assert entered["hypercalls"]["vcpu_op"] == 20


def test_a_deadline_that_is_past_or_stopped_or_put_off(boot: Boot) -> None:
    """Where the host lets so much time pass that a deadline comes before it is stopped, put off or seen, once more."""
    source = EVENTS + f"""
start:
    call bind
again:
    call stop_single
    mov qword [DATA + 8], 0
    call now
    mov r12, rax
    lea rax, [r12 + 60000000]           ; stopped in time
    xor edx, edx
    call set_single
    call stop_single
    lea rax, [r12 + 60000000]           ; put off
    xor edx, edx
    call set_single
    lea rax, [r12 + 120000000]
    xor edx, edx
    call set_single
    call now
    lea rcx, [r12 + 60000000]
    cmp rax, rcx
    jae again
wait:
    call now
    lea rcx, [r12 + 90000000]
    cmp rax, rcx
    jb wait
    mov rax, [DATA + 8]
    mov [DATA + 24], rax                ; none yet
    call now
    lea rcx, [r12 + 120000000]
    cmp rax, rcx
    jae again
sleep:
    cmp qword [DATA + 8], 0
    je sleep
    mov eax, 1                          ; past: at once
    xor edx, edx
    call set_single
past:
    cmp qword [DATA + 8], 1
    je past
    mov eax, 1                          ; past, and to be refused
    mov edx, {abi.VCPU_SSHOTTMR_FUTURE}
    call set_single
    mov [DATA + 32], rax
    mov rax, -1                         ; for ever
    xor edx, edx
    call set_single
    mov [DATA + 40], rax
    mov edi, 8
    mov esi, 1
    mov eax, vcpu_op
    syscall
    mov [DATA + 48], rax
    mov edi, 8
    xor esi, esi
    mov rdx, DATA + 0x10000000
    mov eax, vcpu_op
    syscall
    mov [DATA + 56], rax
    mov rax, [DATA + 8]
    mov [DATA + 64], rax
    jmp shutdown
"""
    for guest in both(boot, source, shares):
        refused = [(1 << 64) - abi.ETIME, 0, (1 << 64) - abi.ENOENT, (1 << 64) - abi.EFAULT]
        assert guest.words(3, 6) == [0, *refused, 2]
        assert guest.domain.timers.single.deadline == (1 << 64) - 1


def test_a_timer_set_natively_is_remembered(boot: Boot) -> None:
    for guest in both(
        boot, EVENTS + "start: call bind\n mov rax, 0x7000000000000000\n xor edx, edx\n call set_single\n jmp shutdown",
        shares,
    ):  # fmt: skip
        assert guest.domain.timers.save()["single"] == 0x7000000000000000


ENTRY = 64
"""Bytes of struct multicall_entry."""
_ENOSYS, _EFAULT, _EINVAL = ((1 << 64) - number for number in (abi.ENOSYS, abi.EFAULT, abi.EINVAL))
MULTICALLS = """
start:
    mov rdi, [DATA + 8]
    mov rsi, [DATA + 16]
    mov edx, 0x111
    mov r10d, 0x222
    mov r8d, 0x333
    mov r9d, 0x444
    mov eax, multicall
    syscall
    mov [DATA + 24], rax
    mov [DATA + 32], rdx
    mov [DATA + 40], r10
    mov [DATA + 48], r8
    mov [DATA + 56], r9
    jmp shutdown
"""


def call(name: str, *arguments: int) -> bytes:
    """One entry, whose result is not what any call gives."""
    return struct.pack("<8Q", HYPERCALL_NUMBERS[name], 0x5A5A, *arguments, *(0,) * (6 - len(arguments)))


def run_multicall(boot: Boot, entries: list[bytes], at: int = DATA + 0x100, count: int | None = None) -> list[Guest]:
    def prepare(guest: Guest) -> None:
        guest[1], guest[2] = at, len(entries) if count is None else count
        guest.cpu.store(at, b"".join(entries))

    guests = list(both(boot, MULTICALLS, prepare, some=len(entries) <= 13))
    for guest in guests:
        assert guest.words(4, 4) == [0x111, 0x222, 0x333, 0x444]
        assert guest.domain.statistics()["hypercalls"]["multicall"] == 1
    return guests


def results(guest: Guest, count: int, at: int = DATA + 0x100) -> list[int]:
    """What the entries say, and the multicall itself."""
    return [int.from_bytes(guest.cpu.load(at + ENTRY * n + 8, 8), "little") for n in range(count)] + [guest[3]]


@pytest.mark.parametrize("at", [DATA + 0x100, DATA + 0x107, PAGE + 0xFE0 - 5 * 64])
def test_multicalls_of_what_is_done_natively_and_not(boot: Boot, at: int) -> None:
    """One after the other, whoever does them, and across pages too; the number of a call has 64 bits here."""
    entries = [
        call("stack_switch", 0xE02B, 0x1234), call("xen_version", abi.XENVER_VERSION), call("vcpu_op", 3, 1),
        call("set_segment_base", 1, 0x4000), call("set_segment_base", 1, 1 << 47), call("multicall", DATA, 0),
        call("xen_version", abi.XENVER_PAGESIZE), call("xen_version", 77), call("stack_switch", 0xE02B, 0x5678),
        struct.pack("<8Q", 1 << 32 | HYPERCALL_NUMBERS["xen_version"], 0, 0, 0, 0, 0, 0, 0),
        call("sched_op", abi.SCHEDOP_YIELD), call("set_segment_base", 0, 0x5000), call("vcpu_op", 3, 0),
    ]  # fmt: skip
    outcomes = []
    for guest in run_multicall(boot, entries, at):
        state = guest.domain.state
        assert (state.kernel_stack, state.kernel_stack_selector) == (0x5678, 0xE02B)
        assert (guest.cpu.other_gs, guest.cpu.base(GS - 1)) == (0x4000, 0x5000)
        outcomes.append(results(guest, len(entries), at))
    assert outcomes[0] == outcomes[1]
    version, no_entry = outcomes[0][1], (1 << 64) - abi.ENOENT
    assert version == 4 << 16 | 17
    assert outcomes[0] == [
        0, version, no_entry, 0, _EINVAL, _EINVAL, 4096, _ENOSYS, 0, _ENOSYS, 0, 0, 1, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 256, 257, 600])
def test_long_and_empty_multicalls(boot: Boot, count: int) -> None:
    """More than fit into the guest's memory here end where that ends."""
    room = 150
    entries = [call("xen_version", abi.XENVER_VERSION)] * min(count, room)
    for guest in run_multicall(boot, entries, count=count):
        done = min(count, (DATA + 0x4000 + 0x8000 - DATA - 0x100) // ENTRY)
        assert results(guest, min(done, room))[:-1] == [4 << 16 | 17] * min(done, room)


def test_a_multicall_that_changes_its_own_entries(boot: Boot) -> None:
    """Its second page becomes one that cannot be written, then one that is not there: the rest is -EFAULT's."""
    at = PAGE + 0x1000 - 4 * ENTRY
    for entry, written in ((0, False), (0x65, False), (0x67, True)):

        def prepare(guest: Guest, entry: int = entry) -> None:
            guest[1], guest[2] = at, 8
            frame = guest.frame_of(PAGE + 0x1000)
            entries = [call("xen_version", abi.XENVER_VERSION)] * 8
            change = struct.pack("<QQ", guest.table_of(PAGE + 0x1000), frame << 12 | entry if entry else 0)
            guest.cpu.store(DATA + 0x800, change)
            entries[4] = call("mmu_update", DATA + 0x800, 1, 0, abi.DOMID_SELF)
            guest.cpu.store(at, b"".join(entries))
            guest.domain.frames.get(frame)  # so that it is no last reference that goes
            guest[8] = frame

        outcomes = []
        for guest in both(boot, MULTICALLS, prepare):
            told = [
                guest.xen.memory.read_u64((guest[8] << 12) + ENTRY * n + 8) if n >= 0 else
                int.from_bytes(guest.cpu.load(at + ENTRY * (4 + n) + 8, 8), "little")
                for n in range(-4, 4)
            ]  # fmt: skip
            outcomes.append((told, guest[3], guest.words(4, 4)))
        assert outcomes[0] == outcomes[1]
        version = 4 << 16 | 17
        rest = [0, version, version, version] if written else [0x5A5A] * 4
        assert outcomes[0] == ([version] * 4 + rest, 0 if written else _EFAULT, [0x111, 0x222, 0x333, 0x444])


def test_a_multicall_whose_entries_become_other_memory_with_code(boot: Boot) -> None:
    """The result is written where the entry is then, once: the entry is not read again there."""

    def prepare(guest: Guest) -> None:
        guest[1], guest[2] = PAGE + 0x1000, 2
        guest.cpu.store(DATA + 0xC00, b"\xc3")
        guest.cpu.store(DATA + 0x800, struct.pack("<QQ", guest.table_of(PAGE + 0x1000), guest.frame_of(DATA) << 12 | 0x67))
        entries = call("mmu_update", DATA + 0x800, 1, 0, abi.DOMID_SELF), call("xen_version", abi.XENVER_VERSION)
        guest.cpu.store(PAGE + 0x1000, b"".join(entries))
        guest.domain.frames.get(guest.frame_of(PAGE + 0x1000))
        guest[8] = HYPERCALL_NUMBERS["xen_version"]

    for guest in both(boot, MULTICALLS.replace("start:", "start: mov rax, DATA + 0xc00\n call rax\n"), prepare):
        assert guest.words(1, 3) == [0, 2, 0] and guest[9] == 4 << 16 | 17


@pytest.mark.parametrize("second", [99, abi.MMUEXT_CLEAR_PAGE, abi.MMUEXT_PIN_L1_TABLE])
def test_a_multicall_that_python_goes_on_with_in_the_middle_of_an_entry(boot: Boot, second: int) -> None:
    """A list of operations of which the first is done natively: it is not done again."""
    outcomes = []

    def prepare(guest: Guest) -> None:
        guest[1], guest[2] = PAGE, 3
        frame = guest.domain.frames.count - 400
        guest.cpu.store(
            DATA + 0x800,
            struct.pack("<I4xQQI4xQQ", abi.MMUEXT_PIN_L1_TABLE, frame, 0, second, frame + 1 if second == 99 else frame, 0),
        )
        entries = [
            call("xen_version", abi.XENVER_VERSION), call("mmuext_op", DATA + 0x800, 2, 0, abi.DOMID_SELF),
            call("xen_version", abi.XENVER_PAGESIZE),
        ]  # fmt: skip
        guest.cpu.store(PAGE, b"".join(entries))

    for guest in both(boot, MULTICALLS, prepare):
        frame = guest.domain.frames.count - 400
        assert guest.domain.frames.pinned[frame] and guest.domain.frames.kind_count[frame] == 1
        outcomes.append(results(guest, 3, PAGE))
        assert guest.words(4, 4) == [0x111, 0x222, 0x333, 0x444]
    error = _ENOSYS if second == 99 else _EINVAL
    assert outcomes == [[4 << 16 | 17, error, 4096, 0]] * 2
