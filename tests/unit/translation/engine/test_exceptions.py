"""Exceptions with exact frames (Intel SDM 3A chapter 6): where, with what, and that nothing else has changed."""

from __future__ import annotations

import itertools

import pytest

from tests.unit.translation.engine.guest import (
    CODE,
    DATA,
    DEVICE,
    HANDLERS,
    IST_STACK,
    KERNEL_CS,
    KERNEL_DS,
    KERNEL_STACK,
    STACK,
    TSS,
    USER_CS,
    USER_DS,
    USER_STACK,
    Make,
    P,
    U,
    W,
)
from trivisor.machine.exits import ExceptionExit, Shutdown

RF, IF = 0x10000, 0x200
NONCANONICAL = 0x8000_0000_0000
HOLE = 0x400000
"""A linear page that tests unmap."""


# -- faults of computation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divide", ["div ebx", "idiv rbx", "div bl", "div dword [DATA]"])
def test_a_divide_error_in_a_block_s_middle_points_at_the_division(machine: Make, divide: str) -> None:
    m = machine(f"mov ecx, 7\n stc\n here: {divide}\n mov ecx, 9\n hlt")
    frame = m.fault(rax=5, rbx=0, rdx=1)
    assert (frame.vector, frame.error, frame.rip) == (0, None, m.labels["here"])
    assert (frame.cs, frame.ss, frame.rsp) == (KERNEL_CS, KERNEL_DS, STACK)
    assert frame.rflags & RF
    assert (m["rax"], m["rcx"], m["rdx"]) == (5, 7, 1)


def test_a_quotient_too_large_is_a_divide_error(machine: Make) -> None:
    m = machine("here: div ecx\n hlt")
    frame = m.fault(rax=0, rdx=5, rcx=5)
    assert (frame.vector, frame.rip) == (0, CODE)
    m = machine("here: idiv rcx\n hlt")
    frame = m.fault(rax=1 << 63, rdx=(1 << 64) - 1, rcx=(1 << 64) - 1)
    assert (frame.vector, frame.rip) == (0, CODE)


@pytest.mark.parametrize("instruction", ["ud2", "db 0x0f, 0xff, 0xc0", "db 0x06", "db 0xd6", "db 0xf0, 0x90"])
def test_undefined(machine: Make, instruction: str) -> None:
    m = machine(f"inc eax\n here: {instruction}\n hlt")
    frame = m.fault(rax=0)
    assert (frame.vector, frame.error, frame.rip, m["rax"]) == (6, None, m.labels["here"], 1)


def test_an_avx512_instruction_is_undefined_since_cpuid_does_not_tell_of_it(machine: Make) -> None:
    m = machine("mov eax, 7\n xor ecx, ecx\n cpuid\n here: db 0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1\n hlt")  # vaddps zmm0
    frame = m.fault()
    assert not m["rbx"] >> 16 & 1
    assert (frame.vector, frame.rip) == (6, m.labels["here"])


def test_an_unmasked_sse_exception(machine: Make) -> None:
    m = machine(
        """
        ldmxcsr [csr]
        pxor xmm1, xmm1
        movups xmm0, [one]
        here: divps xmm0, xmm1
        hlt
        align 16
        one: times 4 dd 0x3f800000
        csr: dd 0x1d80
        """
    )
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip) == (19, None, m.labels["here"])
    image = m.vcpu.state.xsave
    assert image[24] & 4  # ZE
    assert image[160:164] == bytes.fromhex("0000803f")  # the destination is as it was


def test_an_sse_exception_without_osxmmexcpt_is_undefined(machine: Make) -> None:
    m = machine(
        "ldmxcsr [csr]\n pxor xmm1, xmm1\n movups xmm0, [one]\n here: divps xmm0, xmm1\n hlt\n align 16\n"
        "one: dd 0x3f800000, 0x3f800000, 0x3f800000, 0x3f800000\n csr: dd 0x1d80"
    )
    state = m.initial_state()
    state.cr4 &= ~0x400
    m.vcpu.state = state
    frame = m.fault()
    assert (frame.vector, frame.rip) == (6, m.labels["here"])


@pytest.mark.parametrize("target", [DATA, HOLE, NONCANONICAL])
def test_a_pending_x87_exception_comes_before_what_maskmovq_does(machine: Make, target: int) -> None:
    m = machine("fninit\n push 0x37b\n fldcw [rsp]\n fldz\n fld1\n fdivrp st1, st0\n here: maskmovq mm0, mm1\n hlt")
    m.map(HOLE, 0, 0)
    m.memory.write_u64(DATA, 0x1122334455667788)
    frame = m.fault(rdi=target)
    assert (frame.vector, frame.rip, m["rdi"]) == (16, m.labels["here"], target)
    assert m.memory.read_u64(DATA) == 0x1122334455667788


def test_a_pending_x87_exception_comes_at_the_next_waiting_instruction(machine: Make) -> None:
    m = machine("fninit\n fldcw [cw]\n fld1\n fldz\n fdivp st1, st0\n nop\n here: fwait\n hlt\n cw: dw 0x37b")
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip) == (16, None, m.labels["here"])


@pytest.mark.parametrize("bits", [32, 64])
def test_software_interrupts_return_after_themselves(machine: Make, bits: int) -> None:
    m = machine("int3\n a: int 0x80\n b: hlt", bits)
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip, frame.rflags & RF) == (3, None, m.labels["a"], 0)
    frame = m.fault("a")
    assert (frame.vector, frame.rip, frame.rflags & RF) == (0x80, m.labels["b"], 0)


def test_a_software_interrupt_from_ring_3_needs_the_gate_s_leave(machine: Make) -> None:
    m = machine("here: int 0x81\n hlt", cpl=3)
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip) == (13, 0x81 << 3 | 2, CODE)


def test_into(machine: Make) -> None:
    m = machine("mov eax, 0x7fffffff\n into\n add eax, 1\n into\n after: hlt", 32)
    frame = m.fault(rflags=2)
    assert (frame.vector, frame.rip, frame.rflags & 0x800) == (4, m.labels["after"], 0x800)


# -- memory -------------------------------------------------------------------------------------------------


def test_an_address_that_is_not_canonical(machine: Make) -> None:
    m = machine("hlt")
    for instruction, vector in (
        ("mov rax, [rbx]", 13), ("mov [rbx], rax", 13), ("add [rbx], eax", 13), ("movups xmm0, [rbx]", 13),
        ("mov rax, [rbp]", 12), ("mov rax, [rsp+rcx]", 12), ("push qword [rbx]", 13), ("call [rbx]", 13),
        ("lodsb", 13), ("stosb", 13), ("rep movsb", 13), ("jmp [rbx]", 13),
    ):  # fmt: skip
        m.restart()
        m.put(f"here: {instruction}\n hlt", CODE)
        same = dict.fromkeys(("rbx", "rbp", "rsi", "rdi"), NONCANONICAL)
        frame = m.fault(**same, rcx=NONCANONICAL, rax=1)
        assert (frame.vector, frame.error, frame.rip, frame.rsp) == (vector, 0, CODE, STACK), instruction
        assert (m["rax"], m["rcx"], m["rdi"]) == (1, NONCANONICAL, NONCANONICAL)


def test_a_stack_pointer_that_is_not_canonical(machine: Make) -> None:
    m = machine("hlt")
    m.gate(12, HANDLERS + 16 * 12, ist=1)
    for instruction in ("push rax", "pop rax", "call there", "ret", "enter 8, 0", "pushf", "leave"):
        m.restart()
        m.put(f"here: {instruction}\n there: hlt", CODE)
        frame = m.fault(rsp=NONCANONICAL + 0x100, rbp=NONCANONICAL + 0x100, rax=1)
        assert (frame.vector, frame.error, frame.rip, frame.rsp) == (12, 0, CODE, NONCANONICAL + 0x100), instruction
        assert m["rsp"] < IST_STACK
        assert m["rax"] == 1


_ACCESSES = [
    ("mov eax, [rbx]", 0), ("mov [rbx], eax", 2), ("add [rbx], eax", 2), ("xchg [rbx], eax", 2), ("inc byte [rbx]", 2),
    ("lock cmpxchg [rbx], ecx", 2), ("push qword [rbx]", 0), ("pop qword [rbx]", 2), ("call [rbx]", 0), ("jmp [rbx]", 0),
    ("movsb", 0), ("stosd", 2), ("lodsq", 0), ("scasb", 0), ("cmpsb", 0), ("rep movsq", 0), ("rep stosb", 2),
    ("movups xmm0, [rbx]", 0), ("movups [rbx], xmm0", 2), ("fld qword [rbx]", 0), ("fstp qword [rbx]", 2),
    ("fxsave [rbx]", 2), ("bts [rbx], eax", 2), ("bt [rbx], eax", 0), ("cmp [rbx], eax", 0), ("shld [rbx], eax, 3", 2),
    ("lgdt [rbx]", 0), ("sidt [rbx]", 2), ("xlatb", 0), ("sete [rbx]", 2), ("cmpxchg16b [rbx]", 2), ("mov [rbx], ds", 2),
    ("xadd [rbx], eax", 2), ("neg dword [rbx]", 2), ("imul eax, [rbx]", 0), ("movbe eax, [rbx]", 0),
]  # fmt: skip

_OVERWRITES = {"add", "lock", "cmp", "shld", "xadd", "neg", "imul"}
"""What overwrites every flag; the frame has anything for those, as ARCHITECTURE.md owns up to."""


@pytest.mark.parametrize("cpl", [0, 3])
def test_a_page_fault_leaves_everything_as_it_was(machine: Make, cpl: int) -> None:
    m = machine("hlt", cpl=cpl)
    m.map(HOLE, 0, 0)
    address = HOLE + 0x10
    before = {"rax": 0, "rcx": 3, "rdx": 4, "rbx": address, "rsi": address, "rdi": address, "rbp": 9}
    stack = USER_STACK if cpl else STACK
    for instruction, code in _ACCESSES:
        if cpl and instruction.startswith("lgdt"):
            continue
        m.restart(cpl)
        here = m.put(f"stc\n here: {instruction}\n hlt", CODE)["here"]
        frame = m.fault(**before)
        assert (frame.vector, frame.error) == (14, code | (4 if cpl else 0)), instruction
        assert (frame.rip, frame.rsp, m.core.cr2) == (here, stack, address), instruction
        assert (frame.cs, frame.ss) == ((USER_CS | 3, USER_DS | 3) if cpl else (KERNEL_CS, KERNEL_DS))
        if instruction.split()[0] not in _OVERWRITES:
            assert frame.rflags & 0x8D5 == 1, instruction
        assert {name: m[name] for name in before} == before, instruction


_STACK_ACCESSES = [
    ("push rax", HOLE - 8, 2), ("pop rax", HOLE, 0), ("call there", HOLE - 8, 2), ("ret", HOLE, 0),
    ("pushf", HOLE - 8, 2), ("popf", HOLE, 0), ("enter 0, 0", HOLE - 8, 2), ("leave", HOLE, 0),
    ("call [DATA]", HOLE - 8, 2), ("push qword [DATA]", HOLE - 8, 2), ("pop qword [DATA]", HOLE, 0),
    ("iretq", HOLE, 0),
]  # fmt: skip


def test_page_faults_of_the_stack(machine: Make) -> None:
    m = machine("hlt")
    m.gate(14, HANDLERS + 16 * 14, ist=1)
    for instruction, address, code in _STACK_ACCESSES:
        m.map(HOLE - 0x1000, 0, 0 if address < HOLE else P | W | U)
        m.map(HOLE, 0, 0 if address == HOLE else P | W | U)
        m.restart()
        m.put(f"here: {instruction}\n there: hlt", CODE)
        frame = m.fault(rsp=HOLE, rbp=HOLE, rax=5)
        assert (frame.vector, frame.error, frame.rip, frame.rsp) == (14, code, CODE, HOLE), instruction
        assert (m.core.cr2, m["rax"], m["rbp"]) == (address, 5, HOLE), instruction


@pytest.mark.parametrize("missing", [0, 1])
def test_an_access_across_pages_tells_of_the_page_that_is_missing(machine: Make, missing: int) -> None:
    m = machine("hlt")
    m.map(HOLE + 0x1000 * missing, 0, 0)
    for size, write in itertools.product((2, 4, 8), (False, True)):
        register = {2: "ax", 4: "eax", 8: "rax"}[size]
        m.put(f"{f'add [rbx], {register}' if write else f'mov {register}, [rbx]'}\n hlt", CODE)
        for offset in range(1, size):
            address = HOLE + 0x1000 - offset
            frame = m.fault(CODE, rbx=address, rax=0x0101010101010101, rsp=STACK)
            assert (frame.vector, frame.error, frame.rip) == (14, 2 if write else 0, CODE)
            assert m.core.cr2 == (HOLE + 0x1000 if missing else address)
    assert m.memory.read(HOLE + 0xFF0, 0x20) == bytes(0x20)  # no part of it was written


def test_a_fetch_from_a_missing_page(machine: Make) -> None:
    m = machine(f"mov rax, {HOLE}\n jmp rax")
    m.map(HOLE, 0, 0)
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip, m.core.cr2) == (14, 16, HOLE, HOLE)


def test_an_instruction_that_runs_into_a_missing_page(machine: Make) -> None:
    m = machine(f"jmp {HOLE - 2}")
    m.put("mov eax, 0x12345678\n hlt", HOLE - 2)
    m.map(HOLE, HOLE, 0)
    frame = m.fault(rax=1)
    assert (frame.vector, frame.error, frame.rip, m.core.cr2, m["rax"]) == (14, 16, HOLE - 2, HOLE, 1)


def test_a_fetch_from_a_page_that_must_not_be_executed(machine: Make) -> None:
    m = machine(f"mov rax, {HOLE}\n jmp rax")
    m.map(HOLE, HOLE, P | W | U | 1 << 63)
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip, m.core.cr2) == (14, 17, HOLE, HOLE)


def test_a_repeated_move_stops_at_the_missing_page_and_goes_on(machine: Make) -> None:
    m = machine("here: rep movsb\n hlt")
    entry = m.map(HOLE + 0x1000, 0, 0)
    m.memory.write(DATA, bytes(range(256)) * 32)
    frame = m.fault(rsi=DATA, rdi=HOLE + 0xF00, rcx=0x400, rflags=2 | 0x41)
    assert (frame.vector, frame.error, frame.rip, m.core.cr2) == (14, 2, CODE, HOLE + 0x1000)
    assert (m["rsi"], m["rdi"], m["rcx"]) == (DATA + 0x100, HOLE + 0x1000, 0x300)
    assert frame.rflags & 0x8D5 == 0x41
    m.memory.write_u64(entry, HOLE + 0x1000 | 7)
    m.halt(CODE, rsp=STACK)
    assert m.memory.read(HOLE + 0xF00, 0x400) == (bytes(range(256)) * 4)
    assert (m["rsi"], m["rdi"], m["rcx"]) == (DATA + 0x400, HOLE + 0x1300, 0)


def test_a_repeated_move_backwards_stops_at_the_missing_page(machine: Make) -> None:
    m = machine("here: std\n again: rep movsd\n hlt")
    m.map(HOLE, 0, 0)
    frame = m.fault(rsi=DATA + 0x100, rdi=HOLE + 0x1010, rcx=0x20)
    assert (frame.vector, frame.error, frame.rip, m.core.cr2) == (14, 2, m.labels["again"], HOLE + 0xFFC)
    assert (m["rsi"], m["rdi"], m["rcx"]) == (DATA + 0x100 - 20, HOLE + 0xFFC, 0x20 - 5)
    assert frame.rflags & 0x400


def test_writing_a_read_only_page(machine: Make) -> None:
    m = machine("mov eax, [rbx]\n here: mov [rbx], eax\n hlt")
    m.map(HOLE, HOLE, P | U)
    frame = m.fault(rbx=HOLE)
    assert (frame.vector, frame.error, frame.rip, m.core.cr2) == (14, 3, m.labels["here"], HOLE)
    state = m.initial_state()
    state.cr0 &= ~0x10000  # without WP the supervisor may
    state.gpr[3] = HOLE
    m.vcpu.state = state
    m.halt()


# -- stacks and privilege -----------------------------------------------------------------------------------


def test_an_exception_of_ring_3_gets_the_stack_of_ring_0(machine: Make) -> None:
    m = machine("here: ud2", cpl=3)
    frame = m.fault(rflags=0x202)
    assert (frame.rip, frame.cs, frame.ss, frame.rsp) == (CODE, USER_CS | 3, USER_DS | 3, USER_STACK)
    assert frame.rflags == 0x10202
    state = m.vcpu.state
    assert m["rsp"] == KERNEL_STACK - 40
    assert (state.cs.selector, state.ss.selector, m.core.cpl, state.rflags & IF) == (KERNEL_CS, 0, 0, 0)


@pytest.mark.parametrize("cpl", [0, 3])
def test_an_interrupt_stack_table_entry_is_used_at_every_level(machine: Make, cpl: int) -> None:
    m = machine("here: mov eax, [rbx]\n hlt", cpl=cpl)
    m.map(HOLE, 0, 0)
    m.gate(14, HANDLERS + 16 * 14, ist=1)
    m.fault(rbx=HOLE)
    assert m["rsp"] == IST_STACK - 48


def test_the_frame_is_aligned(machine: Make) -> None:
    m = machine("here: ud2")
    frame = m.fault(rsp=STACK - 3)
    assert frame.rsp == STACK - 3
    assert m["rsp"] == STACK - 16 - 40


def test_a_trap_gate_leaves_interrupts_on(machine: Make) -> None:
    m = machine("here: ud2\n handler: pushf\n pop rax\n cli\n hlt")
    m.gate(6, "handler", trap=True)
    m.run(rflags=0x202)
    assert m["rax"] & (IF | RF) == IF


def test_syscall_sysret_iretq_and_swapgs(machine: Make) -> None:
    m = machine(
        """
        mov ecx, 0xc0000081          ; STAR
        mov edx, (USER_CS-16|3) << 16 | KERNEL_CS
        xor eax, eax
        wrmsr
        inc ecx                      ; LSTAR
        mov eax, entry
        xor edx, edx
        wrmsr
        mov ecx, 0xc0000084          ; FMASK
        mov eax, 0x700
        wrmsr
        mov ecx, 0xc0000102          ; kernel GS base
        mov eax, DATA
        wrmsr
        mov ecx, 0xc0000101
        mov eax, DATA+0x1000
        wrmsr
        push USER_DS|3
        push USER_STACK
        push 0x3202                  ; IOPL 3, IF
        push USER_CS|3
        push user
        iretq
        entry:
        swapgs
        mov [gs:0], rsp
        mov [gs:8], rcx
        mov [gs:16], r11
        pushf
        pop rbx
        mov rsp, KERNEL_STACK
        mov ax, cs
        mov dx, ss
        inc ebp
        cmp ebp, 3
        je done
        mov rsp, [gs:0]
        swapgs
        sysretq
        user:
        mov esi, 0x1234
        stc
        std
        again: syscall
        after: jc again
        ud2
        done: hlt
        """
    )
    m.halt(rbp=0)
    assert m["rbp"] == 3
    assert m.memory.read_u64(DATA) == USER_STACK
    assert m.memory.read_u64(DATA + 8) == m.labels["after"]
    assert m.memory.read_u64(DATA + 16) == 0x3603
    assert m["rbx"] & 0x700 == 0
    assert (m["rax"] & 0xFFFF, m["rdx"] & 0xFFFF) == (KERNEL_CS, KERNEL_CS + 8)
    counts = m.vcpu.statistics()["native helpers"]
    assert counts["syscall"] + m.vcpu.statistics()["instructions done by Python"].get("syscall", 0) == 3


def test_privileged_instructions_in_ring_3(machine: Make) -> None:
    m = machine("hlt")
    for instruction in ("cli", "sti", "hlt", "mov rax, cr0", "mov cr3, rax", "wrmsr", "invlpg [rax]", "lgdt [rax]",
                        "in al, 0x80", "out 0x80, al", "sysretq", "swapgs", "wbinvd", "mov dr7, rax", "lmsw ax"):  # fmt: skip
        m.restart(3)
        m.put(f"here: {instruction}\n hlt", CODE)
        frame = m.fault()
        assert (frame.vector, frame.error, frame.rip, frame.cs) == (13, 0, CODE, USER_CS | 3), instruction


def test_iretq_to_ring_3_empties_the_kernel_s_data_segments(machine: Make) -> None:
    m = machine(
        "push USER_DS|3\n push USER_STACK\n push 0x202\n push USER_CS|3\n push user\n iretq\n"
        "user: mov ax, ds\n mov cx, es\n ud2"
    )
    m.fault()
    assert (m["rax"] & 0xFFFF, m["rcx"] & 0xFFFF) == (0, 0)


def test_iretq_to_a_bad_selector(machine: Make) -> None:
    m = machine("push 0\n push STACK\n push 2\n push KERNEL_DS\n push 0\n here: iretq")
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip, frame.rsp) == (13, KERNEL_DS, m.labels["here"], STACK - 40)


# -- exceptions while an exception is delivered -------------------------------------------------------------


def test_a_double_fault(machine: Make) -> None:
    m = machine("here: mov eax, [rbx]\n hlt")
    m.map(HOLE, 0, 0)
    m.map(HOLE + 0x1000, 0, 0)
    m.gate(8, HANDLERS + 16 * 8, ist=1)
    frame = m.fault(rbx=HOLE, rsp=HOLE + 0x2000)  # the frame of the page fault cannot be written
    assert (frame.vector, frame.error, frame.rip, frame.rsp) == (8, 0, CODE, HOLE + 0x2000)
    assert m.core.cr2 >> 12 == HOLE + 0x1000 >> 12


def test_a_triple_fault_shuts_down(machine: Make) -> None:
    m = machine("here: ud2")
    m.core.idtr_limit = 0
    assert m.run() == Shutdown(13)
    assert m.core.rip == CODE


def test_a_gate_that_is_not_present(machine: Make) -> None:
    m = machine("here: ud2")
    m.memory.write_u64(0x7000 + 6 * 16, 0)
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip) == (13, 6 << 3 | 2 | 1, CODE)


def test_a_stack_segment_fault_on_a_bad_kernel_stack_becomes_a_double_fault(machine: Make) -> None:
    m = machine("here: mov eax, [rbx]", cpl=3)
    m.map(HOLE, 0, 0)
    m.gate(8, HANDLERS + 16 * 8, ist=1)
    m.memory.write_u64(TSS + 4, NONCANONICAL)
    frame = m.fault(rbx=HOLE)
    assert (frame.vector, frame.error, frame.rip, frame.cs) == (8, 0, CODE, USER_CS | 3)


def test_exceptions_are_told_to_subscribers(machine: Make) -> None:
    m = machine("here: mov eax, [rbx]")
    m.map(HOLE, 0, 0)
    seen: list[ExceptionExit] = []
    m.vcpu.observed[ExceptionExit] = [seen.append]
    m.vcpu.mode_changed()
    m.fault(rbx=HOLE + 4)
    assert seen == [ExceptionExit(14, 0, HOLE + 4)]


def test_single_step_trap(machine: Make) -> None:
    m = machine("nop\n here: inc eax\n hlt")
    frame = m.fault(rflags=0x102, rax=0)
    assert (frame.vector, frame.rip, frame.rflags & 0x100, m["rax"]) == (1, m.labels["here"], 0x100, 0)
    assert m.core.dr[6] & 0x4000


def test_an_access_that_leaves_ram_for_a_device_at_the_stack(machine: Make) -> None:
    m = machine("push rax\n pop rbx\n hlt")
    device = m.record()
    m.halt(rsp=DEVICE + 0x108, rax=0x1122334455667788)
    assert device.log[0] == ("write", 0x100, 8, 0x1122334455667788)
    assert device.log[1][:3] == ("read", 0x100, 8)




def test_iretq_empties_data_segments_natively_too(machine: Make) -> None:
    """The second return to the same user segments is the native helper's."""
    m = machine(
        "again: mov eax, KERNEL_DS\n mov ds, eax\n mov fs, eax\n mov eax, USER_DS|3\n mov es, eax\n xor eax, eax\n mov gs, eax\n"
        "mov ecx, 0xc0000100\n mov eax, 0x1234000\n xor edx, edx\n wrmsr\n"
        "push USER_DS|3\n push USER_STACK\n push 0x202\n push USER_CS|3\n push user\n iretq\n"
        "user: mov ebx, ds\n mov ebp, es\n mov esi, fs\n int 0x80\n kernel: dec r8d\n jnz again\n hlt"
    )
    m.gate(0x80, "kernel", dpl=3)
    before = m.vcpu.statistics()["native helpers"]["iret"]
    m.halt(r8=3)
    assert m.vcpu.statistics()["native helpers"]["iret"] >= before + 1
    assert (m["rbx"], m["rbp"], m["rsi"]) == (0, 0x20 | 3, 0)
    assert m.core.segments[4].base == 0x1234000, "the base of FS stays"


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("instruction", "size"), [("movaps xmm0, M", 16), ("paddd xmm0, M", 16), ("vmovdqa ymm0, M", 32), ("movdqu xmm0, M", 1)]
)  # fmt: skip
def test_alignment_comes_before_a_page_fault(machine: Make, instruction: str, size: int, write: bool) -> None:
    """Whatever the alignment is of an address where there is no page; the common case natively."""
    operands = instruction.replace("M", "[rbx]")
    if write:
        if instruction.startswith("paddd"):
            pytest.skip("it only reads")
        name, register = operands.split(" ", 1)[0], operands.split(" ", 1)[1].split(",")[0]
        operands = f"{name} [rbx], {register}"
    m = machine(f"{operands}\n hlt")
    if size == 32 and not m.vcpu.xcr0_supported & 4:
        pytest.skip("the host has no AVX")
    for at in (0, 1, 8, 16, 32):
        nowhere = 0x20_0000_0000 + at
        frame = m.fault(m.origin, rbx=nowhere)
        if at % size:
            assert (frame.vector, frame.error) == (13, 0)
        else:
            assert (frame.vector, frame.error, m.core.cr2) == (14, 2 if write else 0, nowhere)
    faults = sum(1 for at in (0, 1, 8, 16, 32) if at % size == 0)
    assert m.vcpu.statistics()["native helpers"]["page_fault"] == faults
