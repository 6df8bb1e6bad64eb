"""Breakpoints and single steps (Intel SDM 3B, chapter 17): where #DB strikes, what DR6 says, and what holds it off.

The handler writes rip and DR6 of every #DB to a log; with `RESUME` set it sets RF in the frame, as the handler
of an instruction breakpoint does.
"""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import DATA, Machine, Make

LOG, RESUME = 0x50000, 0x52000
FIXED = 0xFFFF0FF0
BD, BS = 1 << 13, 1 << 14
EXECUTE, WRITE, PORT, ACCESS = range(4)

HANDLER = f"""
    align 64
    debug_handler:
        push rax
        push rdi
        mov rdi, [{LOG}]
        inc qword [{LOG}]
        shl edi, 4
        mov rax, [rsp+16]
        mov [rdi+{LOG + 16}], rax
        mov rax, dr6
        mov [rdi+{LOG + 24}], rax
        xor eax, eax
        mov dr6, rax
        mov rax, [{RESUME}]
        or [rsp+32], rax
        pop rdi
        pop rax
        iretq
"""
STEPPING_ON = "pushfq\n or qword [rsp], 0x100\n popfq\n"
STEPPING_OFF = "pushfq\n and qword [rsp], ~0x100\n popfq\n"


def guest(machine: Make, source: str, cpl: int = 0) -> Machine:
    made = machine(f"{source}\n hlt\n jmp $\n{HANDLER}", cpl=cpl)
    made.gate(1, "debug_handler")
    return made


def control(*breakpoints: tuple[int, int]) -> int:
    """DR7 with breakpoint n as (kind, size)."""
    value = 0x400
    for number, (kind, size) in enumerate(breakpoints):
        value |= 2 << 2 * number | (kind | {1: 0, 2: 1, 8: 2, 4: 3}[size] << 2) << 16 + 4 * number
    return value


def arm(machine: Machine, *breakpoints: tuple[int, int, int]) -> None:
    """Set DR0 and so on to (address, kind, size)."""
    state = machine.vcpu.state
    for number, (address, _, _) in enumerate(breakpoints):
        state.dr[number] = address
    state.dr[7] = control(*((kind, size) for _, kind, size in breakpoints))
    machine.vcpu.state = state


def log(machine: Machine) -> list[tuple[int, int]]:
    """(rip, DR6 without its fixed bits) of each #DB."""
    count = machine.word(LOG)
    entries = [(machine.word(LOG + 16 + 16 * i), machine.word(LOG + 24 + 16 * i)) for i in range(count)]
    return [(rip, dr6 & ~FIXED) for rip, dr6 in entries]


def test_an_instruction_breakpoint_strikes_before_the_instruction(machine: Make) -> None:
    m = guest(machine, "mov eax, 1\n struck: inc eax\n inc eax")
    m.memory.write_u64(RESUME, 0x10000)
    arm(m, (m.labels["struck"], EXECUTE, 1))
    m.halt()
    assert log(m) == [(m.labels["struck"], 1)]
    assert m["rax"] == 3


def test_without_rf_it_strikes_again(machine: Make) -> None:
    m = guest(machine, "mov eax, 1\n struck: inc eax")
    arm(m, (m.labels["struck"], EXECUTE, 1))
    for _ in range(40):
        m.step()
    assert log(m)[:2] == [(m.labels["struck"], 1)] * 2
    assert m["rax"] == 1


def test_breakpoints_in_a_loop_that_was_translated_before(machine: Make) -> None:
    m = guest(machine, "mov ecx, 100\n again: inc eax\n second: dec ecx\n jnz again")
    m.halt(rax=0)
    m.restart()
    m.memory.write_u64(RESUME, 0x10000)
    arm(m, (m.labels["second"], EXECUTE, 1), (m.labels["again"], EXECUTE, 1))
    m.halt(rax=0)
    assert log(m) == [(m.labels["again"], 2), (m.labels["second"], 1)] * 100
    assert m["rax"] == 100


def test_moved_and_switched_off_breakpoints(machine: Make) -> None:
    m = guest(machine, "one: nop\n two: nop")
    m.memory.write_u64(RESUME, 0x10000)
    expected = []
    for label in ("one", "two", "one"):
        m.restart()
        arm(m, (m.labels[label], EXECUTE, 1))
        m.halt()
        expected.append((m.labels[label], 1))
        assert log(m) == expected
    m.restart()
    m.halt()
    assert log(m) == expected


def test_the_guest_sets_breakpoints_itself(machine: Make) -> None:
    m = guest(
        machine,
        "lea rax, [rel here]\n mov dr2, rax\n mov eax, 0x420\n mov dr7, rax\n nop\n here: nop\n mov eax, 0x400\n"
        "mov dr7, rax\n lea rax, [rel there]\n mov dr2, rax\n there: nop",
    )
    m.memory.write_u64(RESUME, 0x10000)
    m.halt()
    assert log(m) == [(m.labels["here"], 4)]


def test_interrupt_shadow_of_mov_ss_covers_the_next_breakpoint(machine: Make) -> None:
    m = guest(machine, "mov eax, ss\n mov ss, eax\n covered: nop\n struck: nop")
    m.memory.write_u64(RESUME, 0x10000)
    arm(m, (m.labels["covered"], EXECUTE, 1), (m.labels["struck"], EXECUTE, 1))
    m.halt()
    assert log(m) == [(m.labels["struck"], 2)]


@pytest.mark.parametrize(
    ("kind", "source", "hits"),
    [
        (WRITE, f"mov [{DATA}], eax\n after:", 1),
        (WRITE, f"mov eax, [{DATA}]\n after:", 0),
        (ACCESS, f"mov eax, [{DATA}]\n after:", 1),
        (WRITE, f"mov [{DATA + 4}], eax\n mov [{DATA - 4}], eax\n after:", 0),
        (WRITE, f"mov byte [{DATA + 3}], 1\n after:", 1),
        (WRITE, f"mov [{DATA - 7}], rax\n after:", 1),
        (WRITE, f"inc dword [{DATA}]\n after:", 1),
        (WRITE, f"mov rsp, {DATA + 4}\n push rax\n after:", 1),
        (ACCESS, f"movaps xmm0, [{DATA}]\n after:", 1),
        (WRITE, f"sgdt [{DATA - 4}]\n after:", 1),
        (ACCESS, f"lock cmpxchg [{DATA}], ecx\n after:", 1),
    ],
)
def test_data_breakpoints(machine: Make, kind: int, source: str, hits: int) -> None:
    m = guest(machine, f"mov eax, [{DATA + 64}]\n mov [{DATA + 64}], eax\n{source} nop\n mov rsp, STACK")
    arm(m, (DATA, kind, 4))
    m.halt()
    assert log(m) == [(m.labels["after"], 1)] * hits


def test_a_watched_page_is_otherwise_as_it_was(machine: Make) -> None:
    m = guest(machine, f"mov ecx, 8\n again: add qword [{DATA + 16}], rcx\n mov rax, [{DATA + 16}]\n loop again")
    arm(m, (DATA, ACCESS, 8))
    m.halt()
    assert log(m) == [] and m["rax"] == 36


def test_data_breakpoints_in_string_instructions_strike_between_iterations(machine: Make) -> None:
    m = guest(machine, f"mov edi, {DATA}\n mov ecx, 4\n mov eax, 0x11223344\n copy: rep stosd\n after:")
    arm(m, (DATA + 4, WRITE, 4), (DATA + 12, WRITE, 4))
    m.halt()
    assert log(m) == [(m.labels["copy"], 1), (m.labels["after"], 2)]
    assert m.memory.read(DATA, 16) == bytes.fromhex("44332211") * 4


def test_an_access_that_faults_is_no_hit(machine: Make) -> None:
    m = guest(machine, f"mov rax, [{DATA}]")
    m.map(DATA, DATA, 0)
    m.flush()
    arm(m, (DATA, ACCESS, 8))
    assert m.fault().vector == 14
    assert log(m) == []


def test_io_breakpoints_need_cr4_de(machine: Make) -> None:
    source = "out 0x80, al\n after_out: in al, 0x81\n after_in: out 0x82, al"
    m = guest(machine, source)
    arm(m, (0x80, PORT, 2))
    m.halt()
    assert log(m) == []
    state = m.initial_state()
    state.cr4 |= 8
    state.dr[0], state.dr[7] = 0x80, control((PORT, 2))
    m.vcpu.state = state
    m.halt()
    assert log(m) == [(m.labels["after_out"], 1), (m.labels["after_in"], 1)]


def test_single_steps(machine: Make) -> None:
    m = guest(machine, f"{STEPPING_ON} nop\n one: cpuid\n two: {STEPPING_OFF} three: nop")
    m.halt()
    rips = [rip for rip, _ in log(m)]
    assert rips[:2] == [m.labels["one"], m.labels["two"]]
    assert rips[-1] == m.labels["three"], "the trap of the POPF that ends it still comes"
    assert len(rips) == 5 and all(dr6 == BS for _, dr6 in log(m))


def test_single_steps_and_mov_ss(machine: Make) -> None:
    m = guest(machine, f"mov ecx, ss\n {STEPPING_ON} mov ss, ecx\n nop\n after: {STEPPING_OFF}")
    m.halt()
    assert log(m)[0] == (m.labels["after"], BS)


def test_sti_does_not_hold_off_single_steps(machine: Make) -> None:
    m = guest(machine, f"{STEPPING_ON} sti\n after: cli\n {STEPPING_OFF}")
    m.halt()
    assert log(m)[0] == (m.labels["after"], BS)


def test_a_single_step_ends_hlt(machine: Make) -> None:
    m = guest(machine, f"{STEPPING_ON} hlt\n after: {STEPPING_OFF}")
    m.halt()
    assert log(m)[0] == (m.labels["after"], BS)


def test_each_iteration_is_a_step(machine: Make) -> None:
    m = guest(machine, f"mov edi, {DATA}\n mov ecx, 3\n {STEPPING_ON} fill: rep stosb\n after: {STEPPING_OFF}")
    m.halt()
    assert [rip for rip, _ in log(m)[:3]] == [m.labels["fill"]] * 2 + [m.labels["after"]]


def test_int_clears_tf_before_it_could_trap(machine: Make) -> None:
    m = guest(machine, f"{STEPPING_ON} int 0x80\n after: {STEPPING_OFF} hlt\n jmp $\n call_gate: nop\n iretq")
    m.gate(0x80, "call_gate", dpl=3)
    m.halt()
    # IRET brings TF back: the first trap is after the instruction that follows
    assert m.labels["after"] not in [rip for rip, _ in log(m)]
    assert all(m.labels["call_gate"] != rip for rip, _ in log(m))


def test_icebp_leaves_dr6_alone(machine: Make) -> None:
    m = guest(machine, "db 0xf1\n after: nop")
    m.halt()
    assert log(m) == [(m.labels["after"], 0)]


def test_what_mov_ss_has_held_up_comes_with_icebp(machine: Make) -> None:
    m = guest(machine, f"mov word [{DATA}], KERNEL_DS\n mov ss, [{DATA}]\n db 0xf1\n after: nop")
    arm(m, (DATA, ACCESS, 2))
    m.halt()
    assert log(m)[-1] == (m.labels["after"], 1)
    assert len(log(m)) == 2, "one for the first store, one for both of the rest"


def test_what_mov_ss_has_held_up_comes_after_int(machine: Make) -> None:
    m = guest(machine, f"mov ss, [{DATA}]\n int3\n after: nop\n hlt\n jmp $\n int3_handler: iretq")
    m.gate(3, "int3_handler")
    m.memory.write_u16(DATA, 0x10)
    arm(m, (DATA, ACCESS, 2))
    m.halt()
    assert log(m) == [(m.labels["int3_handler"], 1)]


def test_general_detect(machine: Make) -> None:
    m = guest(machine, "mov eax, 0x2400\n mov dr7, rax\n struck: mov rcx, dr7\n mov rdx, dr7")
    m.halt()
    assert log(m) == [(m.labels["struck"], BD)], "once: its delivery clears DR7.GD"
    assert m["rcx"] == m["rdx"] == 0x400


def test_branch_steps(machine: Make) -> None:
    m = guest(
        machine,
        f"mov ecx, 0x1d9\n mov eax, 2\n xor edx, edx\n wrmsr\n {STEPPING_ON} nop\n nop\n jmp short away\n nop\n away: nop\n"
        f"{STEPPING_OFF}",
    )
    m.halt()
    assert log(m)[0] == (m.labels["away"], BS)


def test_sysret_traps_by_the_tf_it_loads(machine: Make) -> None:
    m = guest(
        machine,
        "mov ecx, 0xc0000081\n xor eax, eax\n mov edx, 0x00180008\n wrmsr\n lea rcx, [rel user]\n mov r11d, 0x3102\n"
        "sysretq\n user: nop\n second: nop\n int 0x80",
    )
    m.run()
    assert [rip for rip, _ in log(m)[:2]] == [m.labels["user"], m.labels["second"]]
