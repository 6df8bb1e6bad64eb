"""Interrupts in awkward places (Intel SDM 3A 6.8), timers, HLT and kicks."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from tests.unit.translation.engine.guest import (
    CODE,
    DATA,
    DEVICE,
    HANDLERS,
    IDT,
    KERNEL_DS,
    STACK,
    USER_CS,
    Machine,
    Make,
)
from trivisor.machine.exits import DebugStop, Halt, Kicked, Shutdown

VECTOR, OTHER = 0x40, 0x41
IF = 0x200
MILLISECOND = 1_000_000
PAGE_END = 0x401000


def pending_at_out(m: Machine, *vectors: int) -> None:
    """OUT to port 0x80 makes interrupts wait."""

    def act(_: object) -> None:
        for vector in vectors or (VECTOR,):
            m.interrupt(vector)

    m.on_port(act)


def after(m: Machine, delay: int, vector: int = VECTOR) -> None:
    """An interrupt comes in `delay` nanoseconds."""
    m.board.clock.at(m.board.clock.now() + delay, lambda: m.interrupt(vector))


def kicked(m: Machine, delay: float = 0.02, at: str | int | None = None) -> None:
    """Run until a kick from another thread ends it, within a second of the processor's time."""
    kicks = []

    def kick() -> None:
        kicks.append(time.process_time())
        m.vcpu.kick()

    threading.Timer(delay, kick).start()
    assert m.run(at) == Kicked()
    assert time.process_time() - kicks[0] < 1


# -- where an interrupt is taken ----------------------------------------------------------------------------


@pytest.mark.parametrize("stepping", [False, True])
@pytest.mark.parametrize(
    ("code", "where"),
    [
        ("out 0x80, al\n sti\n nop\n here: nop\n hlt", "here"),
        ("out 0x80, al\n sti\n inc dword [DATA]\n here: nop\n hlt", "here"),
        ("out 0x80, al\n sti\n cli\n here: nop\n sti\n nop\n there: nop\n hlt", "there"),
        ("out 0x80, al\n sti\n pushf\n here: pop rax\n hlt", "here"),
        ("out 0x80, al\n sti\n jmp here\n nop\n here: nop\n hlt", "here"),
        ("out 0x80, al\n sti\n call here\n nop\n here: nop\n hlt", "here"),
        ("out 0x80, al\n sti\n hlt\n here: nop\n hlt", "here"),
        ("out 0x80, al\n sti\n cpuid\n here: nop\n hlt", "here"),
        ("out 0x80, al\n sti\n sti\n here: nop\n hlt", "here"),
        ("sti\n nop\n out 0x80, al\n here: nop\n hlt", "here"),
        ("sti\n nop\n cli\n out 0x80, al\n nop\n sti\n nop\n here: nop\n hlt", "here"),
        ("out 0x80, al\n sti\n mov ss, bx\n here: nop\n there: nop\n hlt", "here there"),
        ("sti\n out 0x80, al\n here: mov ss, bx\n nop\n hlt", "here"),
        ("cli\n out 0x80, al\n push 0x202\n popf\n here: nop\n hlt", "here"),
        ("out 0x80, al\n mov rcx, rsp\n push KERNEL_DS\n push rcx\n push 0x202\n push KERNEL_CS\n push here\n iretq\n"
         "nop\n here: nop\n hlt", "here"),
        ("out 0x80, al\n push 0x602\n popf\n here: nop\n hlt", "here"),
    ],
)  # fmt: skip
def test_the_boundary_at_which_it_is_taken(machine: Make, code: str, where: str, stepping: bool) -> None:
    m = machine(code)
    pending_at_out(m)
    m.set(rbx=KERNEL_DS)
    if stepping:
        for _ in range(30):
            if not isinstance(m.step(), DebugStop):
                break
        assert HANDLERS <= m.core.rip < HANDLERS + 0x1000
        frame = m.frame()
    else:
        frame = m.fault()
    assert frame.vector == VECTOR
    assert frame.rip in [m.labels[name] for name in where.split()]
    assert frame.rflags & IF
    assert not m.vcpu.state.rflags & IF


@pytest.mark.parametrize("stepping", [False, True])
@pytest.mark.parametrize(
    ("code", "distance"),
    [
        ("sti\n hlt\n here: hlt", 1), ("sti\n hlt\n here: hlt", 2), ("nop\n nop\n sti\n hlt\n here: hlt", 3),
        ("sti\n mov eax, 0x12345678\n here: hlt", 3), ("nop\n sti\n mov eax, 0x12345678\n here: hlt", 4),
        ("times 63 nop\n sti\n hlt\n here: hlt", 400),
    ],
)  # fmt: skip
def test_the_shadow_of_sti_at_a_block_s_end(machine: Make, code: str, distance: int, stepping: bool) -> None:
    """STI; HLT must not lose the interrupt, wherever the page or the block ends."""
    m = machine(f"out 0x80, al\n mov r8d, {PAGE_END - distance}\n jmp r8")
    m.put(code, PAGE_END - distance)
    pending_at_out(m)
    if stepping:
        while isinstance(m.step(), DebugStop):
            pass
        frame = m.frame()
    else:
        frame = m.fault()
    assert (frame.vector, frame.rip) == (VECTOR, m.labels["here"])


def test_one_instruction_runs_between_sti_and_an_interrupt_even_when_it_faults(machine: Make) -> None:
    m = machine("out 0x80, al\n sti\n here: ud2")
    pending_at_out(m)
    frame = m.fault()
    # The fault's own handler runs with IF=0 and halts; the interrupt has not come before it.
    assert (frame.vector, frame.rip) == (6, m.labels["here"])


def test_mov_ss_keeps_the_next_instruction_uninterrupted(machine: Make) -> None:
    m = machine("sti\n nop\n top: mov ss, bx\n mov rsp, rcx\n after: jmp top")
    seen = set()
    for _ in range(30):
        after(m, 50_000)
        m.fault("top", rsp=STACK, rbx=KERNEL_DS, rcx=STACK, rflags=0x202)
        seen.add(m.frame().rip)
        m.board.local_apic.write(0xB0, 4, 0)  # EOI
    assert m.labels["top"] + 2 not in seen
    assert seen


def test_the_highest_priority_comes_first_and_the_other_after_iret(machine: Make) -> None:
    m = machine(
        """
        out 0x80, al
        sti
        nop
        nop
        cli
        hlt
        first:
        mov [DATA], ebx
        inc ebx
        jmp eoi
        second:
        inc ebx
        mov [DATA+4], ebx
        eoi:
        mov eax, 0xfee000b0
        mov dword [rax], 0
        iretq
        """
    )
    pending_at_out(m, 0x50, 0x90)
    m.gate(0x50, "second")
    m.gate(0x90, "first")
    m.halt(rbx=1)
    assert m["rbx"] == 3
    assert (m.memory.read_u32(DATA), m.memory.read_u32(DATA + 4)) == (1, 3)


def test_an_interrupt_of_ring_3(machine: Make) -> None:
    m = machine("top: jmp top", cpl=3)
    after(m, MILLISECOND)
    frame = m.fault(rflags=0x202)
    assert (frame.vector, frame.rip, frame.cs) == (VECTOR, CODE, USER_CS | 3)


# -- loops --------------------------------------------------------------------------------------------------

_LOOPS = [
    "top: jmp top", "top: inc rax\n jmp top", "top: pause\n jmp top", "top: inc eax\n jnz top\n jmp top",
    "top: mov rbx, [DATA]\n jmp top", "top: call there\n jmp top\n there: ret", "top: mov eax, top\n jmp rax",
    "top: loop top\n jmp top", "top: push top\n ret", "top: nop\n times 300 inc eax\n jmp top",
    "top: jmp there\n align 4096\n there: jmp top", "top: mov rcx, 1 << 20\n mov rdi, DATA\n rep stosb\n jmp top",
    "top: in al, 0x80\n jmp top", "top: cpuid\n jmp top", "top: xor ecx, ecx\n jrcxz top", "top: mov [top+20], al\n jmp top",
    "top: rdtsc\n jmp top",
]  # fmt: skip


@pytest.mark.parametrize("loop", _LOOPS)
def test_loops_can_be_interrupted_and_kicked(machine: Make, loop: str) -> None:
    m = machine(loop)
    end = CODE + 0x1100
    kicked(m, 0.004)
    assert CODE <= m.core.rip < end or m.core.rip < HANDLERS
    m.core.rflags |= IF
    m.vcpu.state = m.vcpu.state
    after(m, MILLISECOND)
    frame = m.fault()
    assert frame.vector == VECTOR
    assert CODE <= frame.rip < end


def test_registers_at_an_interrupt_of_a_long_repeated_move_are_exact(machine: Make) -> None:
    """Whatever the boundary, what has been moved is what the registers tell, and IRET goes on to the end."""
    size = 8 << 20
    m = machine("sti\n here: rep movsb\n done: cli\n hlt")
    source = bytes(range(251)) * (size // 251 + 1)
    m.memory.write(0x1000000, source[:size])
    for direction in ("rep movsb",):
        after(m, 200_000)
        exit_ = m.run(CODE, rsi=0x1000000, rdi=0x2000000, rcx=size, rflags=2, rsp=STACK)
        assert isinstance(exit_, Halt), direction
        assert HANDLERS <= m.core.rip < HANDLERS + 0x1000
        frame = m.frame()
        moved = size - m["rcx"]
        assert (m["rsi"], m["rdi"]) == (0x1000000 + moved, 0x2000000 + moved)
        assert m.memory.read(0x2000000, moved) == source[:moved]
        assert not any(m.memory.read(0x2000000 + moved, min(size - moved, 4096)))
        assert frame.rip == m.labels["here"] if m["rcx"] else frame.rip in (m.labels["here"], m.labels["done"])
    m.board.local_apic.write(0xB0, 4, 0)
    m.halt("here", rsp=STACK)
    assert (m["rcx"], m["rdi"]) == (0, 0x2000000 + size)
    assert m.memory.read(0x2000000, size) == source[:size]


@pytest.mark.parametrize("string", ["rep stosd", "repne scasb", "repe cmpsb", "rep lodsb"])
def test_long_repeated_instructions_can_be_kicked(machine: Make, string: str) -> None:
    m = machine(f"top: mov rcx, 1 << 23\n mov rdi, 0x1000000\n mov rsi, 0x2000000\n mov al, 1\n {string}\n jmp top")
    kicked(m, 0.01)
    assert m["rdi"] - 0x1000000 <= 1 << 25


def test_a_timer_that_is_due_as_timers_are_served_is_not_forgotten(machine: Make) -> None:
    """No host timer is set for it, nor does anything else come that could have the guest look."""
    m = machine("sti\n spin: jmp spin")
    m.vcpu.tuner.start = lambda: None
    clock = m.board.clock
    looks = itertools.count(clock._origin, 100)
    clock._source = lambda: next(looks)  # time goes on by being looked at
    m.board.local_apic.write(0xF0, 4, 0x1FF)
    clock.at(2_000, lambda: m.interrupt(0x40))
    assert m.fault().vector == 0x40


def test_an_interrupt_at_an_instruction_across_pages(machine: Make) -> None:
    m = machine(f"top: mov rcx, {PAGE_END - 2}\n jmp rcx")
    m.put("mov eax, 0x12345678\n back: mov ebx, top\n jmp rbx", PAGE_END - 2)
    places = set()
    for _ in range(20):
        after(m, 100_000)
        frame = m.fault(CODE, rflags=0x202, rsp=STACK)
        m.board.local_apic.write(0xB0, 4, 0)
        places.add(frame.rip)
    assert places <= {CODE, CODE + 7, CODE + 5, PAGE_END - 2, m.labels["back"], m.labels["back"] + 5, CODE + 10}


def test_many_timer_interrupts_lose_no_increment(machine: Make) -> None:
    """A handler that keeps all registers, at any boundary of a loop with memory and flags."""
    m = machine(
        """
        sti
        mov ecx, 3000000
        xor ebx, ebx
        top:
        add ebx, 3
        adc [DATA], rbx
        lea rbx, [rbx-2]
        sub ecx, 1
        jnz top
        cli
        hlt
        handler:
        push rax
        inc dword [DATA+16]
        out 0x80, al
        mov eax, 0xfee000b0
        mov dword [rax], 0
        xor eax, eax
        pop rax
        iretq
        """
    )
    m.gate(VECTOR, "handler")
    m.on_port(lambda _: after(m, 150_000))
    after(m, 100_000)
    m.halt()
    count = 3000000
    assert m["rbx"] == count
    total = sum(range(3, count + 3))
    assert m.memory.read_u64(DATA) == total & (1 << 64) - 1
    assert m.memory.read_u32(DATA + 16) > 3


# -- HLT ----------------------------------------------------------------------------------------------------


def test_hlt_sleeps_until_the_timer(machine: Make) -> None:
    m = machine("sti\n hlt\n here: hlt")
    started = time.monotonic()
    after(m, 300 * MILLISECOND)  # long enough for a busy host
    busy = time.process_time()
    frame = m.fault()
    assert 0.295 < time.monotonic() - started < 10
    assert time.process_time() - busy < 0.2
    assert (frame.vector, frame.rip) == (VECTOR, m.labels["here"])
    assert m.vcpu.statistics()["seconds"]["idle"] > 0.1


def test_hlt_with_interrupts_off_is_told(machine: Make) -> None:
    m = machine("cli\n hlt\n here: nop")
    assert m.run() == Halt(interrupts_enabled=False)
    assert m.core.rip == m.labels["here"]


def test_a_kick_ends_the_run_in_hlt_and_the_next_run_sleeps_on(machine: Make) -> None:
    m = machine("sti\n hlt\n here: hlt")
    kicked(m)
    assert m.vcpu.state.halted
    after(m, MILLISECOND)
    assert m.fault().rip == m.labels["here"]


def test_kicks_while_interrupts_are_off(machine: Make) -> None:
    m = machine("cli\n top: inc rax\n jmp top")
    for _ in range(3):
        kicked(m, 0.01)
    assert m["rax"] > 0


def test_a_kick_before_running_is_not_lost(machine: Make) -> None:
    m = machine("top: jmp top")
    m.vcpu.kick()
    assert m.run() == Kicked()


def test_kicks_change_nothing(machine: Make) -> None:
    """A computation that is kicked all the time comes to the same end."""
    m = machine("mov ecx, 400000\n top: add rax, rcx\n adc rbx, 1\n rol rax, 5\n mov [DATA], rax\n dec ecx\n jnz top\n hlt")
    m.halt()
    expected = (m["rax"], m["rbx"], m.core.rflags)
    m.restart()
    stop = threading.Event()

    def kicker() -> None:
        while not stop.wait(0.0005):
            m.vcpu.kick()

    thread = threading.Thread(target=kicker)
    thread.start()
    kicks = 0
    while isinstance(m.run(), Kicked):
        kicks += 1
    stop.set()
    thread.join()
    assert (m["rax"], m["rbx"], m.core.rflags) == expected


def test_injection_waits_for_the_interrupt_flag(machine: Make) -> None:
    m = machine("nop\n sti\n nop\n here: nop\n hlt")
    m.vcpu.interrupt(0x55)
    frame = m.fault()
    assert (frame.vector, frame.rip) == (0x55, m.labels["here"])
    m = machine("sti\n hlt\n here: nop")
    kicked(m)
    m.vcpu.interrupt(0x56)
    m.vcpu.interrupt(0x57)
    frame = m.fault()
    assert (frame.vector, frame.rip) == (0x56, m.labels["here"])
    m.core.rflags |= IF
    assert m.fault().vector == 0x57


def test_a_triple_fault_while_an_interrupt_is_delivered(machine: Make) -> None:
    m = machine("out 0x80, al\n sti\n nop\n nop\n hlt")
    pending_at_out(m)
    m.core.idtr_limit = 0
    assert isinstance(m.run(), Shutdown)


# -- events that another processor left to be delivered -----------------------------------------------------


def test_an_exception_that_waits_in_the_state_comes_first(machine: Make) -> None:
    m = machine("inc eax\n hlt")
    state = m.initial_state()
    state.exception_pending = (13, 0x18)
    m.vcpu.state = state
    assert m.vcpu.state.exception_pending == (13, 0x18)
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip, m["rax"]) == (13, 0x18, m.origin, 0)
    assert m.vcpu.state.exception_pending is None


NMI_TO_SELF = "mov dword [r8], 0x40400\n"
ICR = 0xFEE00300


@pytest.mark.parametrize("ist", [0, 1])
@pytest.mark.parametrize("flags", ["sti", "cli"])
def test_one_nmi_waits_for_the_end_of_another(machine: Make, flags: str, ist: int) -> None:
    """However many come meanwhile."""
    m = machine(
        f"""
        {flags}
        {NMI_TO_SELF}
        nop
        mov r10d, ebx
        {NMI_TO_SELF}
        cli
        hlt
        nmi: inc ebx
        cmp ebx, 1
        jne leave
        {NMI_TO_SELF * 3}
        nop
        mov r9d, ebx
        leave: iretq
        """
    )
    m.gate(2, "nmi", ist=ist)
    m.halt(rbx=0, r8=ICR)
    assert (m["r9"], m["r10"], m["rbx"]) == (1, 2, 3)
    statistics = m.vcpu.statistics()
    assert statistics["exits"]["nmi"] == 3
    assert not m.vcpu.state.nmi_blocked and not m.vcpu.state.nmi_pending
    assert "iretq" not in statistics["instructions done by Python"]


@pytest.mark.parametrize(
    ("send", "natively"),
    [
        ("mov [r8], eax", True), ("mov [r8], esi", True), ("mov [r8], r9d", True), ("mov [r8], r10d", True),
        ("mov [r8], r15d", True), ("db 0xa3\n dq 0xfee00300", True), ("mov dword [r8], 0x400", False),
        ("xchg [r8], esi", False), ("mov [r8], edi", True),
    ],
)  # fmt: skip
def test_nmis_by_the_window_that_have_to_wait(machine: Make, send: str, natively: bool) -> None:
    """Whatever instruction sends them: one comes, and nothing is made of a value that is no NMI to this processor."""
    m = machine(
        f"""
        {NMI_TO_SELF}
        nop
        nop
        hlt
        nmi: inc ebx
        cmp ebx, 1
        jne leave
        mov dword [r8+0x10], 0
        {send}
        mov ebp, [r8]
        mov dword [r8+0x10], 0x05000000
        mov [r8], ecx
        mov [r8], edx
        leave: iretq
        """
    )
    m.gate(2, "nmi")
    nmi = 0x4400
    m.halt(rbx=0, r8=ICR, rax=nmi, rsi=nmi, r9=nmi, r10=nmi, r15=nmi, rdi=0x40400, rcx=nmi, rdx=0xC4500)
    assert m["rbx"] == 2
    assert m["rbp"] & ~0x44000 == 0x400
    assert m.vcpu.statistics()["exits"]["nmi"] == 2
    assert m.vcpu.statistics()["exits"]["slow_access"] == 3 + (not natively)


def test_nmis_by_the_x2apic_that_have_to_wait(machine: Make) -> None:
    send = "mov eax, 0x4400\n wrmsr\n"
    m = machine(
        f"""
        mov ecx, 0x1b
        mov eax, 0xfee00d00
        xor edx, edx
        wrmsr
        mov ecx, 0x830
        {send}
        nop
        hlt
        nmi: inc ebx
        cmp ebx, 1
        jne leave
        {send * 3}
        mov r9d, ebx
        rdmsr
        mov r10d, eax
        mov edx, 1
        {send}
        xor edx, edx
        leave: iretq
        """
    )
    m.gate(2, "nmi")
    m.halt(rbx=0)
    assert (m["rbx"], m["r9"], m["r10"]) == (2, 1, 0x4400)
    assert m.vcpu.statistics()["native helpers"]["apic"] == 3
    assert m.board.local_apic.read_msr(0x830) == 1 << 32 | 0x4400


def test_an_nmi_comes_before_an_interrupt_that_waits_as_well(machine: Make) -> None:
    m = machine(
        f"""
        {NMI_TO_SELF}
        mov dword [r8], 0x40051
        sti
        nop
        nop
        cli
        hlt
        nmi: lea ebx, [rbx*2+1]
        iretq
        other: lea ebx, [rbx*2]
        iretq
        """
    )
    m.gate(2, "nmi")
    m.gate(0x51, "other")
    m.halt(rbx=1, r8=ICR)
    assert m["rbx"] == 0b110


def test_an_interrupt_that_comes_with_an_nmi_is_not_lost(machine: Make) -> None:
    m = machine("sti\n mov [r8], eax\n here: jmp here\n nmi: inc ebx\n iretq\n other: inc ebx\n hlt")
    m.gate(2, "nmi")
    m.gate(0x51, "other")

    class Both:
        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            m.board.local_apic.deliver(0, 4, False)
            m.interrupt(0x51)

    m.board.mmio.attach(DEVICE, 0x1000, Both())
    m.halt(r8=DEVICE, rbx=0)
    assert m["rbx"] == 2


def test_an_nmi_whose_handler_is_missing(machine: Make) -> None:
    m = machine(f"{NMI_TO_SELF}\n here: nop\n hlt")
    m.memory.write_u64(IDT + 32, 0)
    frame = m.fault(r8=ICR)
    assert (frame.vector, frame.error, frame.rip) == (13, 2 << 3 | 3, m.labels["here"])


def test_interrupts_and_nmi_that_wait_travel_with_the_state(machine: Make) -> None:
    m = machine("cli\n nop\n sti\n nop\n hlt")
    state = m.initial_state()
    state.interrupts_pending, state.nmi_pending = [0x55], True
    m.vcpu.state = state
    again = m.vcpu.state
    assert (again.interrupts_pending, again.nmi_pending) == ([0x55], True)
    assert m.fault().vector == 2
    m.vcpu.state = state = m.initial_state()
    state.interrupts_pending = [0x55]
    m.vcpu.state = state
    assert m.fault().vector == 0x55
