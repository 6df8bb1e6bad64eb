"""Sensitive instructions that helpers do in the middle of a block: as Python does them, without a trip there."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import (
    DATA,
    GDT,
    HANDLERS,
    KERNEL_DS,
    USER_CS,
    USER_DS,
    USER_STACK,
    Machine,
    Make,
)
from trivisor.machine.exits import Halt, MsrRead, PortIn, PortOut
from trivisor.machine.state import Segment
from trivisor.pc import COM1, POST
from trivisor.x86.descriptors import build_segment, parse_segment
from trivisor.x86.msr import IA32_GS_BASE

RF = 0x10000
NOT_CANONICAL = 0x8000_0000_0000


def natively(m: Machine, name: str) -> int:
    """How often a helper has done it."""
    count: int = m.vcpu.statistics()["native helpers"][name]
    return count


# -- ports --------------------------------------------------------------------------------------------------


def test_the_post_port_keeps_what_is_written_whoever_reads_it(machine: Make) -> None:
    m = machine(
        f"""
        mov rax, -1
        mov al, 0x5a
        stc
        out {POST}, al
        mov al, 0
        in al, {POST}
        setc bl
        mov dx, {POST}
        in al, dx
        hlt
        """
    )
    m.halt(rbx=0)
    assert m["rax"] == 0xFFFFFFFFFFFFFF5A
    assert m["rbx"] == 1, "the carry flag is lost"
    assert (natively(m, "port_in"), natively(m, "port_out")) == (2, 1)
    assert m.board.ports.read(POST, 1) == 0x5A
    m.board.ports.write(POST, 1, 0x77)
    m.restart()
    m.put(f"in al, {POST}\n hlt", m.origin)
    m.halt()
    assert m["rax"] & 0xFF == 0x77


def test_ports_that_nobody_claims_read_as_ones(machine: Make) -> None:
    m = machine("mov al, 3\n out 0xed, al\n in al, 0xed\n mov dx, 0x1234\n mov r10b, al\n in al, dx\n hlt")
    m.halt(rax=0)
    assert m["rax"] == 0xFF
    assert m["r10"] & 0xFF == 0xFF
    assert natively(m, "port_in") == 2


def test_a_device_that_is_attached_later_is_asked(machine: Make) -> None:
    m = machine("in al, 0xed\n out 0xed, al\n hlt")
    device = m.record()
    m.board.ports.attach(0xED, 1, device)
    m.halt(rax=0)
    assert m["rax"] == 0xA0
    assert device.log == [("read", 0, 1, 0xA0), ("write", 0, 1, 0xA0)]


def test_who_watches_ports_sees_every_access(machine: Make) -> None:
    m = machine(f"mov al, 9\n out {POST}, al\n in al, {POST}\n hlt")
    seen: list[object] = []
    for kind in (PortIn, PortOut):
        m.vcpu.observed.setdefault(kind, []).append(seen.append)
    m.halt()
    assert seen == [PortOut(POST, 1, 9), PortIn(POST, 1, 9)]
    assert natively(m, "port_out") == 0


def test_ring_3_needs_leave(machine: Make) -> None:
    m = machine(f"in al, {POST}\n hlt", cpl=3)
    frame = m.fault()
    assert (frame.vector, frame.error) == (13, 0)


def test_what_is_sent_comes_out_whole_and_in_order(machine: Make) -> None:
    """Queued or not: around a change of registers, and at the end."""
    m = machine(
        f"""
        mov dx, {COM1}
        mov ecx, 6000
        mov eax, 'a'
        again:
        out dx, al
        add dx, 5
        in al, dx
        test al, 0x20
        jz stuck
        sub dx, 5
        mov eax, ecx
        loop again
        mov al, '!'
        mov ebx, eax
        mov dx, {COM1 + 3}
        mov al, 0x83
        out dx, al       ; the divisor latch
        mov dx, {COM1}
        mov al, 1
        out dx, al
        mov dx, {COM1 + 3}
        mov al, 3
        out dx, al
        mov dx, {COM1}
        mov al, bl
        out dx, al
        stuck: hlt
        """
    )
    sent = bytearray()
    m.board.serial._output = sent.extend
    m.board.serial.reveal(m.board.fast_ports, COM1)
    m.halt()
    assert bytes(sent) == b"a" + bytes(n & 0xFF for n in range(6000, 1, -1)) + b"!"
    assert natively(m, "port_out") > 4000


def test_what_waits_is_fetched_though_the_guest_goes_on(machine: Make) -> None:
    m = machine(f"mov dx, {COM1}\n mov al, '1'\n out dx, al\n mov al, '2'\n out dx, al\n sti\n again: jmp again")
    sent = bytearray()

    def output(data: bytes) -> None:
        sent.extend(data)
        if sent == b"12":
            m.vcpu.kick()

    m.board.serial._output = output
    m.board.serial.reveal(m.board.fast_ports, COM1)
    m.run()
    assert sent == b"12"


# -- model-specific registers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "field"), [(0xC0000100, "FS"), (0xC0000101, "GS"), (0xC0000102, "KERNEL_GS")])
def test_the_bases(machine: Make, index: int, field: str) -> None:
    m = machine("wrmsr\n mov rax, -1\n mov rdx, -1\n rdmsr\n hlt")
    m.halt(rax=0x89ABCDEF_12345678, rdx=0x55555555_00007FFF, rcx=0xFFFFFFFF_00000000 | index)
    assert (m["rax"], m["rdx"]) == (0x12345678, 0x7FFF)
    assert m.vcpu.state.msrs.get(index, m.vcpu.state.fs.base if field == "FS" else m.vcpu.state.gs.base) == (
        0x7FFF_12345678
    )
    assert (natively(m, "write_msr"), natively(m, "read_msr")) == (1, 1)


def test_a_base_that_is_not_canonical(machine: Make) -> None:
    m = machine("here: wrmsr\n hlt")
    frame = m.fault(rcx=IA32_GS_BASE, rdx=NOT_CANONICAL >> 32, rax=0)
    assert (frame.vector, frame.error, frame.rip) == (13, 0, m.labels["here"])
    assert m.core.segments[5].base == 0


def test_the_time_stamp_counter_as_a_register(machine: Make) -> None:
    m = machine("rdtsc\n mov esi, eax\n mov edi, edx\n rdmsr\n mov r8d, eax\n mov r9d, edx\n rdtsc\n hlt")
    m.core.tsc_offset = 1 << 60
    m.halt(rcx=0x10)
    first, second, third = (
        m[high] << 32 | m[low] for high, low in (("rdi", "rsi"), ("r9", "r8"), ("rdx", "rax"))
    )
    assert first < second < third
    assert first >= 1 << 60


def test_who_watches_registers_sees_every_access(machine: Make) -> None:
    m = machine("rdmsr\n hlt")
    seen: list[MsrRead] = []
    m.vcpu.observed[MsrRead] = [seen.append]
    m.halt(rcx=IA32_GS_BASE)
    assert seen == [MsrRead(IA32_GS_BASE, 0)]


# -- events -------------------------------------------------------------------------------------------------


def test_a_software_interrupt_from_ring_3_and_back(machine: Make) -> None:
    """The second time around: the first has Python look at the segments."""
    m = machine("again: stc\n int 0x80\n after: setc al\n dec ecx\n jnz again\n int 0x81", cpl=3)
    m.put("mov rbx, [rsp]\n mov rsi, [rsp+16]\n iretq", m.origin + 0x800)
    m.gate(0x80, m.origin + 0x800, dpl=3)
    frame = m.fault(rcx=5)
    assert (frame.vector, frame.error) == (13, 0x81 * 8 + 2)
    assert frame.rip == m.labels["after"] + 7
    assert (frame.cs, frame.rsp) == (USER_CS | 3, USER_STACK)
    assert m["rbx"] == m.labels["after"]
    assert m["rax"] == 1
    assert m["rsi"] & RF == 0
    assert natively(m, "software_interrupt") >= 3


def test_an_undefined_instruction_is_delivered_natively(machine: Make) -> None:
    m = machine("again: stc\n here: ud2\n dec ecx\n jnz again\n hlt")
    m.put("mov rbx, [rsp+16]\n mov rsi, [rsp]\n add qword [rsp], 2\n iretq", m.origin + 0x800)
    m.gate(6, m.origin + 0x800)
    m.halt(rcx=3)
    assert m["rbx"] & RF
    assert m["rbx"] & 1
    assert m["rsi"] == m.labels["here"]
    assert natively(m, "exception") >= 2


@pytest.mark.parametrize(
    ("divide", "registers"),
    [
        ("div ecx", {"rdx": 7, "rcx": 7}),
        ("div rcx", {"rdx": 8, "rcx": 7}),
        ("div cx", {"rdx": 0xFFFF0007, "rcx": 7}),
        ("div cl", {"rax": 0x700, "rcx": 7}),
        ("div r10b", {"rax": 0x700, "r10": 7}),
        ("div r11", {"rdx": 7, "r11": 7}),
        ("div esp", {"rdx": 1 << 31}),
        ("idiv r15d", {"r15": 1 << 32}),
        ("idiv cl", {"rcx": 0xF00}),
        ("div byte [rsi]", {"rax": 0x900, "rsi": DATA}),
        ("div qword [rsi]", {"rdx": 9, "rsi": DATA}),
        ("idiv word [rsi+8]", {"rsi": DATA}),
    ],
)  # fmt: skip
def test_a_divide_error_takes_no_signal(machine: Make, divide: str, registers: dict[str, int]) -> None:
    m = machine(f"here: {divide}\n hlt")
    m.memory.write_u64(DATA, 9)
    frame = m.fault(**registers)
    assert (frame.vector, frame.error, frame.rip) == (0, None, m.labels["here"])
    assert frame.rflags & RF
    assert m["rax"] == registers.get("rax", 0)
    assert "host_fault" not in m.vcpu.statistics()["exits"]


@pytest.mark.parametrize(
    ("divide", "registers", "result"),
    [
        ("div ecx", {"rdx": 6, "rax": 5, "rcx": 7}, ((6 << 32 | 5) // 7, (6 << 32 | 5) % 7)),
        ("div r10b", {"rax": 0x6FF, "r10": 7}, (0x6FF // 7 | 0x6FF % 7 << 8, 0)),
        ("div qword [rsi]", {"rdx": 8, "rsi": DATA}, ((8 << 64) // 9, (8 << 64) % 9)),
        ("idiv dword [rsi+r10]", {"rax": 100, "rsi": DATA}, (11, 1)),
    ],
)
def test_a_quotient_that_fits(
    machine: Make, divide: str, registers: dict[str, int], result: tuple[int, int]
) -> None:
    m = machine(f"{divide}\n hlt")
    m.memory.write_u64(DATA, 9)
    m.halt(**registers)
    assert (m["rax"], m["rdx"]) == result


def test_an_interrupt_is_delivered_natively(machine: Make) -> None:
    m = machine("again: sti\n nop\n cli\n dec ecx\n jnz again\n hlt")
    m.put("inc ebx\n mov rsi, [rsp+16]\n iretq", m.origin + 0x800)
    m.gate(0x50, m.origin + 0x800)
    m.vcpu.interrupt(0x50)
    m.halt(rcx=10)
    assert m["rbx"] == 1
    assert m["rsi"] & RF == 0
    assert natively(m, "external_interrupt") == 1


def test_an_interrupt_whose_handler_is_missing(machine: Make) -> None:
    m = machine("sti\n here: nop\n jmp here")
    m.memory.write_u64(0x7000 + 16 * 0x50, 0)
    m.vcpu.interrupt(0x50)
    assert isinstance(m.run(), Halt)
    assert m.core.rip - HANDLERS >> 4 == 13
    assert m.frame().error == 0x50 * 8 + 3


# -- the local APIC -----------------------------------------------------------------------------------------

EOI, TPR, ISR_2, SELF_0X51 = 0xFEE000B0, 0xFEE00080, 0xFEE00120, 0x40051


def test_the_task_priority_is_one_register_by_all_its_names(machine: Make) -> None:
    m = machine(
        f"""
        mov eax, 5
        stc
        mov cr8, rax
        setc bl
        mov r9d, {TPR}
        mov esi, [r9]
        mov dword [r9], 0x73
        mov r11, cr8
        mov r10d, 2
        mov cr8, r10
        mov rdi, cr8
        here: mov cr8, r9
        hlt
        """
    )
    frame = m.fault(rbx=0)
    assert (frame.vector, frame.error, frame.rip) == (13, 0, m.labels["here"])
    assert (m["rsi"], m["r11"], m["rdi"], m["rbx"]) == (0x50, 7, 2, 1)
    assert natively(m, "cr8") == 4
    assert natively(m, "apic") == 2
    assert m.vcpu.state.cr8 == m.board.interrupts.cr8 == 2


def test_an_interrupt_waits_for_the_task_priority(machine: Make) -> None:
    """And comes as CR8 is lowered, though it could be written natively before."""
    m = machine(
        """
        mov eax, 5
        mov cr8, rax
        mov ecx, 0xfee00300
        mov dword [rcx], SELF_0X51
        sti
        nop
        mov esi, ebx
        xor eax, eax
        mov cr8, rax
        nop
        cli
        hlt
        """.replace("SELF_0X51", str(SELF_0X51))
    )
    m.put("inc ebx\n iretq", m.origin + 0x800)
    m.gate(0x51, m.origin + 0x800)
    m.halt(rbx=0)
    assert (m["rsi"], m["rbx"]) == (0, 1)


def test_ends_of_interrupts(machine: Make) -> None:
    """One natively, the ISR seen before and after; a second in service behind the first."""
    m = machine("sti\n nop\n nop\n cli\n hlt")
    m.put(
        f"""
        mov r8d, {ISR_2}
        mov esi, [r8]
        mov r9d, {EOI}
        mov dword [r9], 0
        mov edi, [r8]
        mov dword [r9], 0
        iretq
        """,
        m.origin + 0x800,
    )
    m.gate(0x51, m.origin + 0x800)
    m.interrupt(0x51)
    m.halt()
    assert (m["rsi"], m["rdi"]) == (1 << 0x11, 0)
    assert natively(m, "apic") == 2
    assert m.board.local_apic.read(ISR_2 & 0xFFF, 4) == 0


def test_the_end_of_an_interrupt_lets_the_next_one_come(machine: Make) -> None:
    m = machine("sti\n nop\n nop\n cli\n hlt")
    m.put(
        f"""
        inc ebx
        mov r9d, 0xfee00300
        cmp ebx, 2
        ja done
        mov dword [r9], {SELF_0X51}
        done:
        mov r9d, {EOI}
        mov dword [r9], 0
        iretq
        """,
        m.origin + 0x800,
    )
    m.gate(0x51, m.origin + 0x800)
    m.interrupt(0x51)
    m.halt(rbx=0)
    assert m["rbx"] == 3
    assert m.board.local_apic.read(ISR_2 & 0xFFF, 4) == 0


def test_the_end_of_a_level_triggered_interrupt_is_told(machine: Make) -> None:
    m = machine("sti\n nop\n nop\n cli\n hlt")
    m.put(f"mov r9d, {EOI}\n mov dword [r9], 0\n iretq", m.origin + 0x800)
    m.gate(0x51, m.origin + 0x800)
    ended: list[int] = []
    m.board.local_apic.on_end_of_interrupt = ended.append
    m.board.local_apic.deliver(0x51, 0, True)
    m.halt()
    assert ended == [0x51]


def test_the_interrupt_command_register(machine: Make) -> None:
    """Its halves in the window, natively but for what sends; the reserved bits read as zeros."""
    m = machine(
        """
        mov dword [r8+0x10], 0x12345678
        mov esi, [r8+0x10]
        or dword [r8+0x10], 0x81
        mov edi, [r8+0x10]
        mov dword [r8], 0x1851
        mov ebx, [r8]
        mov eax, 0xffffffff
        movabs [0xfee00310], eax
        hlt
        """.replace("movabs [0xfee00310], eax", "db 0xa3\n dq 0xfee00310")
    )
    m.halt(r8=0xFEE00300)
    assert (m["rsi"], m["rdi"], m["rbx"]) == (0x12000000, 0x12000000, 0x851)
    assert m.board.local_apic.read(0x310, 4) == 0xFF000000
    assert natively(m, "apic") == 6
    assert m.vcpu.statistics()["exits"]["mmio access"] == 1


def test_x2apic_registers(machine: Make) -> None:
    m = machine(
        """
        mov ecx, 0x1b
        rdmsr
        or eax, 0xc00
        wrmsr
        sti
        nop
        nop
        cli
        mov ecx, 0x808
        mov eax, 0x35
        xor edx, edx
        wrmsr
        mov rbx, cr8
        mov ecx, 0x80b
        mov eax, 1
        here: wrmsr
        hlt
        """
    )
    m.put("mov ecx, 0x80b\n xor eax, eax\n xor edx, edx\n wrmsr\n iretq", m.origin + 0x800)
    m.gate(0x51, m.origin + 0x800)
    m.interrupt(0x51)
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip) == (13, 0, m.labels["here"])
    assert m["rbx"] == 3
    assert natively(m, "apic") == 2
    assert m.board.local_apic.read_msr(0x812) == 0


def test_the_registers_move_away(machine: Make) -> None:
    m = machine(
        f"""
        mov r9d, {TPR}
        mov dword [r9], 0x40
        mov ecx, 0x1b
        rdmsr
        and eax, 0xfff
        or eax, 0xd0000000
        wrmsr
        mov dword [r9], 0x50
        mov rbx, cr8
        mov r9d, 0xd0000080
        mov dword [r9], 0x60
        mov rsi, cr8
        hlt
        """
    )
    m.halt()
    assert (m["rbx"], m["rsi"]) == (4, 6)


# -- MOV to a data segment register -------------------------------------------------------------------------


def test_a_data_segment_is_loaded_natively_the_second_time(machine: Make) -> None:
    source = "mov ds, eax\n mov es, eax\n mov fs, eax\n mov gs, eax\n xor ecx, ecx\n mov es, ecx\n mov r10, rax\n mov ds, r10\n hlt"
    m = machine(source)
    m.halt(rax=0x1234_0000 | KERNEL_DS)
    state = m.vcpu.state
    expected = Segment(KERNEL_DS, 0, 0xFFFFFFFF, 0xC093)
    assert (state.ds, state.fs, state.gs, state.es) == (expected, expected, expected, Segment(0, 0, 0, 0))
    statistics = m.vcpu.statistics()
    assert statistics["native helpers"]["load_segment"] == 5
    assert statistics["instructions done by Python"]["mov"] == 1


@pytest.mark.parametrize(
    ("descriptor", "vector"),
    [
        (build_segment(0x12345678, 0x4321, 0x40F3), None), (build_segment(0, 0xFFFFFFFF, 0xC073), 11),
        (build_segment(0, 0xFFFFFFFF, 0xC0F9), 13), (build_segment(0, 0xFFFFFFFF, 0xC093), None),
        (build_segment(0, 0xFFFFFFFF, 0xC0F2), None), (0, 13),
    ],
)  # fmt: skip
def test_a_descriptor_that_changes(machine: Make, descriptor: int, vector: int | None) -> None:
    m = machine("mov ds, eax\n mov ds, eax\n mov [rbx], rcx\n here: mov ds, eax\n hlt")
    start = {"rax": USER_DS | 3, "rbx": GDT + USER_DS, "rcx": descriptor}
    if vector is not None:
        frame = m.fault(**start)
        assert (frame.vector, frame.error, frame.rip) == (vector, USER_DS, m.labels["here"])
    elif descriptor >> 45 & 3 == 0:  # the selector's RPL is 3
        assert m.fault(**start).error == USER_DS
    else:
        m.halt(**start)
        found = parse_segment(descriptor)
        assert m.vcpu.state.ds == Segment(USER_DS | 3, found.base, found.limit, found.attributes | 1)
        assert m.memory.read_u64(GDT + USER_DS) >> 40 & 1


def test_a_data_segment_that_the_kernel_may_have_and_the_user_not(machine: Make) -> None:
    m = machine("kernel: mov ds, eax\n mov ds, eax\n hlt\n user: mov es, eax\n mov ds, ecx\n hlt")
    m.halt("kernel", rax=KERNEL_DS)
    m.restart_at("user", cpl=3, rax=USER_DS | 3, rcx=KERNEL_DS)
    frame = m.fault()
    assert (frame.vector, frame.error) == (13, KERNEL_DS)


def test_a_shorter_descriptor_table(machine: Make) -> None:
    m = machine("mov ds, eax\n mov ds, eax\n lgdt [rbx]\n mov ds, eax\n hlt")
    m.memory.write(DATA, (USER_DS + 6).to_bytes(2, "little") + GDT.to_bytes(8, "little"))
    frame = m.fault(rax=USER_DS, rbx=DATA)
    assert (frame.vector, frame.error) == (13, USER_DS)


def test_cpuid_is_remembered_while_it_holds(machine: Make) -> None:
    m = machine(
        """
        mov rax, cr4
        and eax, 0xfffbffff
        mov cr4, rax
        mov ecx, 2
        again:
        push rcx
        mov eax, 1
        xor ecx, ecx
        cpuid
        mov r8d, ecx
        pop rcx
        loop again
        mov rax, cr4
        or eax, 0x40000
        mov cr4, rax
        mov eax, 1
        cpuid
        mov r9d, ecx
        mov ecx, 0x1b
        rdmsr
        and eax, 0xfffff7ff
        wrmsr
        mov eax, 1
        cpuid
        mov r10d, edx
        hlt
        """
    )
    m.halt()
    assert natively(m, "cpuid") == 1
    assert (m["r8"] >> 27 & 1, m["r9"] >> 27 & 1) == (0, 1), "OSXSAVE"
    assert m["r10"] >> 9 & 1 == 0, "APIC"


def test_xgetbv_of_xcr0_is_inline(machine: Make) -> None:
    """Only with CR4.OSXSAVE; what else ECX may be is Python's, who faults."""
    m = machine(
        """
        mov rax, cr4
        or eax, 0x40000
        mov cr4, rax
        user:
        mov rax, -1
        mov rdx, -1
        xgetbv
        mov r8, rax
        mov r9, rdx
        end: hlt
        """
    )
    state = m.initial_state(0)
    state.xcr0 = 3
    m.vcpu.state = state
    m.halt(m.origin, rcx=1 << 32)
    assert (m["r8"], m["r9"]) == (3, 0)
    assert "xgetbv" not in m.vcpu.statistics()["instructions done by Python"]
    frame = m.fault("user", rcx=2)
    assert (frame.vector, frame.error) == (13, 0)
    m.vcpu.core.cr4 &= ~0x40000
    m.vcpu.mode_changed()
    assert m.fault("user", rcx=0).vector == 6
