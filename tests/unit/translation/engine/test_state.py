"""Single steps, the state in and out, what is not supported, and a code cache that is full."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.translation.engine.guest import CODE, DATA, HANDLERS, TSS, Machine, Make
from trivisor.machine.exits import DebugStop, Halt, PortOut, Shutdown
from trivisor.machine.state import CpuState
from trivisor.machine.stop import DebugExit
from trivisor.translation import cpu as engine
from trivisor.x86.cpuid import host_cpuid

MISSING = 0x10_0000_0000

PROGRAM = f"""
start:
    stc
    mov ecx, 5
    lea rsi, [rel text]
    mov edi, DATA
    rep movsb
    call sub
    std
    fninit
    fld1
    fldpi
    fmulp st1, st0
    mov rax, 0x4000000000001111
    movq xmm3, rax
    punpcklqdq xmm3, xmm3
    cvtsi2sd xmm4, rcx
    AVX
    mov r8, {MISSING}
    inc dword [r8]
    cld
    pushf
    pop rbx
    mov ax, ds
    mov ds, ax
    xor r10d, r10d
    sub r10, 1
    adc r11, 77
    mov r15d, 0x1234
    cpuid
    sti
    nop
    cli
    fstp qword [DATA+8]
    movdqu [DATA+16], xmm3
    out 0x80, al
    int 0x80
    jmp end
    ud2
sub:
    push rbx
    sub edx, 5
    pop rbx
    ret
handler:
    push rax
    mov rax, [rsp+16]
    add rax, 3
    mov [rsp+16], rax
    pop rax
    add rsp, 8
    iretq
software:
    inc r14
    iretq
end:
    mov [DATA+48], rbx
    hlt
text: db "hello"
"""
AVX = "vaddpd ymm5, ymm4, ymm3\n vpermq ymm6, ymm5, 0x1b\n vmovups [DATA+64], ymm6"


def program() -> str:
    has_avx2 = bool(host_cpuid(7, 0)[1] >> 5 & 1)
    return PROGRAM.replace("AVX", AVX if has_avx2 else "nop")


def prepared(machine: Make) -> Machine:
    m = machine(program())
    m.gate(14, "handler")
    m.gate(0x80, "software")
    state = m.initial_state()
    if m.vcpu.cpuid(0xD, 0)[0] & 4:
        state.cr4 |= 1 << 18
        state.xcr0 = 7
    m.vcpu.state = state
    return m


def outcome(m: Machine) -> tuple[CpuState, bytes]:
    state = m.vcpu.state
    state.msrs = {index: value for index, value in state.msrs.items() if index != 0x10}
    # XSAVE's record of what is in its initial state may differ; what it describes does not.
    return state, m.memory.read(DATA, 128)


def in_the_same_state(one: tuple[CpuState, bytes], other: tuple[CpuState, bytes]) -> None:
    assert one[1] == other[1]
    a, b = one[0], other[0]
    names = [name for name in CpuState.__slots__ if name != "xsave"]
    assert {name: getattr(a, name) for name in names} == {name: getattr(b, name) for name in names}
    # x87, MXCSR, XMM and the upper halves of YMM; not the addresses of the last x87 instruction and operand,
    # which are the host's.
    for start, end in ((0, 8), (24, 416), (576, 832)):
        assert a.xsave[start:end] == b.xsave[start:end], (start, end)


def steps(m: Machine, limit: int = 300) -> Iterator[int]:
    """Step to the HLT; gives rip before each step."""
    for _ in range(limit):
        yield m.core.rip
        if m.memory.read_u8(m.core.rip) == 0xF4:
            return
        exit_ = m.step()
        assert exit_ == DebugStop(m.core.rip)
    raise AssertionError("never comes to its end")


def test_stepping_comes_to_the_same_end_as_running(machine: Make) -> None:
    one, other = prepared(machine), prepared(machine)
    one.halt()
    assert one["r14"] == 1
    assert one.memory.read(DATA, 5) == b"hello"
    visited = list(steps(other))
    assert isinstance(other.vcpu.step(), Halt)
    in_the_same_state(outcome(one), outcome(other))
    for label in ("start", "sub", "handler", "software", "end"):
        assert visited.count(other.labels[label]) == 1, label


def test_a_state_taken_anywhere_goes_on_the_same_in_another_processor(machine: Make) -> None:
    reference, walker, other = prepared(machine), prepared(machine), prepared(machine)
    reference.halt()
    want = outcome(reference)
    for count, _ in enumerate(steps(walker)):
        if count % 2 and count > 12:
            continue
        state = walker.vcpu.state
        other.memory.write(DATA, walker.memory.read(DATA, 128))
        other.memory.write(other.core.regs[4] - 256 & ~0xFFF, walker.memory.read(other.core.regs[4] - 256 & ~0xFFF, 0x1000))
        other.vcpu.state = state
        taken = other.vcpu.state
        taken.msrs[0x10] = state.msrs[0x10]
        assert taken == state
        other.halt()
        in_the_same_state(outcome(other), want)


def test_what_one_step_is(machine: Make) -> None:
    m = machine(
        "a: jmp c\n b: ret\n c: call b\n d: jrcxz f\n e: dec ecx\n f: loop d\n g: cpuid\n h: mov eax, [r8]\n i: nop\n hlt\n"
        "there: add rsp, 8\n j: mov r8d, DATA\n k: iretq"
    )
    m.gate(14, "there")
    m.set(rcx=4, r8=MISSING)
    names = {address: name for name, address in m.labels.items()}
    trace = [names.get(rip, "?") for rip in steps(m)]
    assert "".join("x" if name == "there" else name for name in trace) == "acbdefdefghxjkhi?"


def test_a_step_of_a_repeated_instruction_is_an_iteration_and_the_last_goes_on(machine: Make) -> None:
    m = machine("here: rep stosb\n next: nop\n hlt")
    m.set(rcx=3, rdi=DATA, rax=7)
    seen = []
    for rip in steps(m):
        seen.append((rip, m["rcx"]))
    here, after = m.labels["here"], m.labels["next"]
    assert [rip for rip, _ in seen if rip != here] == [after, after + 1]
    assert [count for rip, count in seen if rip == here] in ([3, 2, 1], [3, 2, 1, 0])
    assert m.memory.read(DATA, 4) == b"\x07\x07\x07\0"


def test_a_step_into_an_exception_ends_at_its_handler(machine: Make) -> None:
    m = machine("div ecx")
    m.set(rcx=0)
    assert m.step() == DebugStop(HANDLERS)
    assert m.frame().rip == CODE


def test_a_step_of_hlt_and_of_a_triple_fault(machine: Make) -> None:
    m = machine("cli\n hlt\n ud2")
    m.step()
    assert m.step() == Halt(interrupts_enabled=False)
    m.core.idtr_limit = 0
    assert isinstance(m.step(), Shutdown)


def test_observed_exits_come_as_they_happen(machine: Make) -> None:
    m = machine("mov al, 1\n out 0x80, al\n mov byte [DATA], 1\n mov al, 2\n out 0x80, al\n hlt")
    seen: list[tuple[PortOut, int]] = []
    m.vcpu.observed[PortOut] = [lambda exit_: seen.append((exit_, m.memory.read_u8(DATA)))]
    m.halt()
    assert seen == [(PortOut(0x80, 1, 1), 0), (PortOut(0x80, 1, 2), 1)]


def test_the_debug_exit_ends_the_run(machine: Make) -> None:
    m = machine("mov al, 0x31\n out 0xf4, al\n next: hlt")
    m.run()
    assert m.board.stop_reason == DebugExit(0x31 << 1 | 1)
    assert m.core.rip == m.labels["next"]


# -- what there is not --------------------------------------------------------------------------------------


def test_code_outside_of_ram_and_at_random(machine: Make) -> None:
    """Whatever is executed, no Python exception comes out of it."""
    m = machine("mov eax, 0xd0000000\n jmp rax")
    m.run()
    state = m.initial_state()
    state.rip = 0x7FFF_FFFF_FFFF
    m.vcpu.state = state
    m.run()
    assert m.core.cr2 == 0x7FFF_FFFF_FFFF


# -- a full code cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [40])
def test_a_code_cache_that_fills_again_and_again(
    machine: Make, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    """Code of every page is called in turn, several times over, with faults and device accesses among it."""
    plain = machine("hlt").vcpu.statistics()["translation"]["code cache bytes"]
    monkeypatch.setattr(engine, "CODE_CACHE_SIZE", (plain + 24 * 1024) // 4096 * 4096)
    m = machine(
        f"mov ebp, 6\n mov r8, {MISSING}\n again: mov ebx, 0x400000\n mov ecx, {pages}\n top: call rbx\n"
        "add ebx, 0x1000\n dec ecx\n jnz top\n inc dword [r8]\n mov eax, [0xd0000000]\n dec ebp\n jnz again\n hlt\n"
        "handler: add rsp, 8\n add qword [rsp], 3\n iretq"
    )
    device = m.record()
    m.gate(14, "handler")
    for i in range(pages):
        m.put("inc esi\n " + "inc dword [DATA]\n xor eax, [DATA+8]\n jnc next\n next: " +
              "\n".join(f"add dword [DATA+{8 * (k % 8)}], {k}" for k in range(30)) + "\n ret", 0x400000 + 0x1000 * i)  # fmt: skip
    m.halt()
    assert m["rsi"] == 6 * pages
    assert len(device.log) == 6
    assert m.vcpu.statistics()["translation"]["code cache flushes"] > 3
    assert m.memory.read_u64(TSS + 4)
    expected = [6 * pages * (sum(k for k in range(30) if k % 8 == i) + (1 if i == 0 else 0)) for i in range(8)]
    assert [m.memory.read_u32(DATA + 8 * i) for i in range(8)] == expected
