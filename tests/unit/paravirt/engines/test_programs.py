"""What the processor of a PV guest does at the border between guest and hypervisor, the same under each engine."""

from __future__ import annotations

import threading
import time

import pytest

from trivisor.machine.exits import DebugStop, Kicked
from trivisor.paravirt.xen import abi

DATA, PAGE = 0xFFFFFFFF80104000, 0xFFFFFFFF8010B000

TRAPS = """
handlers:
    dq 0xe0330000, h0, 0xe0330001, h1, 0xe0330303, h3, 0xe0330006, h6, 0xe0330007, h7, 0xe033000c, h12
    dq 0xe033000d, h13, 0xe033000e, h14, 0xe0330380, h128, 0, 0
h0: push 0
    push 0
    jmp caught
h1: push 0
    push 1
    jmp caught
h3: push 0
    push 3
    jmp caught
h6: push 0
    push 6
    jmp caught
h7: push 0
    push 7
    jmp caught
h12:
    push 12
    jmp caught_with_code
h13:
    push 13
    jmp caught_with_code
h14:
    push 14
    jmp caught_with_code
h128:
    push 0
    push 128
    jmp caught
caught_with_code:                       ; vector, rcx, r11, code, rip, cs, flags, rsp, ss
    mov rax, [rsp + 24]
    mov [r14 + 8], rax
    mov rcx, [rsp + 8]
    mov r11, [rsp + 16]
    pop rax
    mov [r14], rax
    add rsp, 24
    jmp told
caught:                                 ; vector, 0, rcx, r11, rip, cs, flags, rsp, ss
    pop rax
    mov [r14], rax
    mov qword [r14 + 8], 0
    mov rcx, [rsp + 8]
    mov r11, [rsp + 16]
    add rsp, 24
told:                                   ; rip, cs, flags, rsp, ss: note them, and go on at rbp
    mov rax, [rsp]
    mov [r14 + 16], rax
    mov rax, [rsp + 8]
    mov [r14 + 24], rax
    mov rax, [rsp + 16]
    mov [r14 + 32], rax
    mov rax, [rsp + 24]
    mov [r14 + 40], rax
    add r14, 48
    mov [rsp], rbp
    btr qword [rsp + 16], 8             ; no more single steps
    push 0
    push rcx
    push r11
    push 77
    mov eax, iret
    syscall
    ud2
"""
SET_TRAPS = "mov r14, DATA + 64\n mov rdi, handlers\n mov eax, set_trap_table\n syscall\n"


def test_a_hypercall_keeps_all_registers_but_its_result_and_what_syscall_takes(boot) -> None:
    guest = boot(
        "start:\n"
        + "\n".join(f"mov {name}, {number}" for number, name in enumerate(("rbx", "rbp", "r8", "r9", "r10", "r12"), 1))
        + """
    mov eax, 0x11223344
    movd xmm3, eax
    mov edi, 0
    mov eax, xen_version
    syscall
    mov [DATA + 8], rax
    movd eax, xmm3
    mov [DATA + 16], rax
    mov eax, 63
    syscall
here:
    mov [DATA + 24], rax
    mov [DATA + 32], rcx
    mov [DATA + 40], rbx
    mov [DATA + 48], rbp
    mov [DATA + 56], r8
    mov [DATA + 64], r12
    jmp shutdown
"""
    )
    guest.finish()
    assert guest.words(1, 8) == [
        4 << 16 | 17, 0x11223344, (1 << 64) - abi.ENOSYS, guest.label("here"), 1, 2, 3, 6
    ]  # fmt: skip


def test_exceptions_are_bounced_to_the_guest_with_xens_frames(boot) -> None:
    """#DE, #UD, #PF, #GP, INT3 and INT n of the guest's kernel, each with its rip, and back by the iret hypercall."""
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + """
    mov rbp, a1
    xor ecx, ecx
de: div ecx
a1: mov rbp, a2
ud: ud2
a2: mov rbp, a3
pf: mov rax, [0x12345]
a3: mov rbp, a4
gp: mov cr8, rax
a4: mov rbp, a5
    int3
b3: nop
a5: mov rbp, a6
    int 0x80
b80: nop
a6: mov rbp, a7
ng: int 0x81
a7: mov [DATA + 8], rax
    mov [DATA + 16], rsp
    jmp shutdown
"""
    )
    guest.finish()
    assert guest.words(1, 2) == [77, 0xFFFFFFFF80108000], "rax is what the frame said, the stack is back"
    seen = [guest.words(8 + 6 * number, 3) for number in range(7)]
    assert seen == [
        [0, 0, guest.label("de")], [6, 0, guest.label("ud")], [14, 0, guest.label("pf")], [13, 0, guest.label("gp")],
        [3, 0, guest.label("b3")], [128, 0, guest.label("b80")], [13, 0x81 << 3 | 2, guest.label("ng")],
    ]  # fmt: skip
    cs, flags = guest[11], guest[12]
    assert cs == 1 << 32 | 0xE030 and not flags & 0x200, "ring 3 that counts as the kernel, with events masked"


@pytest.mark.parametrize(
    "code, vector",
    [
        ("c6 03 00", 13), ("36 c6 03 00", 13), ("3e c6 03 00", 13), ("36 88 03", 13), ("36 8a 43 10", 13),
        ("c6 44 05 00 00", 12), ("36 c6 44 05 00 00", 12), ("3e c6 44 05 00 00", 12), ("64 c6 44 05 00 00", 13),
        ("36 a2 00 00 00 40 00 00 00 80", 13),
    ],
)  # fmt: skip
def test_the_segment_of_an_address_that_is_not_canonical(boot, code: str, vector: int) -> None:
    """#SS relative to RSP and RBP, else #GP; of prefixes FS and GS alone count."""
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + f"""
    mov rbx, 0x8000000040000000
    mov rbp, after
    mov rax, rbx
    sub rax, rbp
at: db {", ".join("0x" + byte for byte in code.split())}
after:
    jmp shutdown
"""
    )
    guest.finish()
    assert guest.words(8, 3) == [vector, 0, guest.label("at")]


USER = SET_TRAPS + """
    mov rsi, [DATA]
    mov dword [PAGE], 15
    mov [PAGE + 8], rsi
    mov rdi, PAGE
    mov esi, 1
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmuext_op
    syscall
    mov [DATA + 8], rax
    mov rsi, KERNEL_STACK
    mov edi, 0xe02b
    mov eax, stack_switch
    syscall
    mov rdi, DATA
    mov rsi, DATA
    mov rdx, entered
    mov eax, set_callbacks
    syscall
    mov edi, 1
    mov rsi, DATA + 0x800
    mov eax, set_segment_base
    syscall
    mov edi, 2
    mov rsi, DATA + 0x900
    mov eax, set_segment_base
    syscall
    mov edi, 0
    mov rsi, DATA + 0xa00
    mov eax, set_segment_base
    syscall
    mov qword [DATA + 0x800], 0x55
    mov qword [DATA + 0x900], 0xaa
    mov qword [DATA + 0xa00], 0xff
    push 0xe02b
    push USER_STACK
    push 0x246
    push 0xe033
    push user
    push 0
    push 0
    push 0
    push 0
    mov eax, iret
    syscall
    ud2
"""


def test_user_mode_system_calls_and_bases(boot) -> None:
    """To user mode by iret, SYSCALL back into the kernel on its stack, the bases of GS changing with the mode."""
    guest = boot(
        TRAPS + "start:" + USER + """
user:
    mov rbx, [gs:0]
    mov r12, [fs:0]
    mov eax, 39
    syscall
after:
    mov r13, [gs:0]
    mov eax, 40
    syscall
entered:
    mov rdi, [gs:0]
    cmp eax, 40
    je done
    mov [DATA + 16], rbx
    mov [DATA + 24], rdi
    mov [DATA + 32], r12
    mov rsi, [rsp]
    mov [DATA + 40], rsi
    mov rsi, [rsp + 16]
    mov [DATA + 48], rsi
    mov rsi, [rsp + 40]
    mov [DATA + 56], rsi
    push 0x100
    push 5
    mov eax, iret
    syscall
done:
    mov [DATA + 64], r13
    jmp shutdown
"""
    )
    guest.finish()
    assert guest[1] == 0
    assert guest.words(2, 3) == [0x55, 0xAA, 0xFF]
    assert guest.words(5, 2) == [guest.label("after")] * 2, "rcx and rip of the frame"
    assert guest.words(7, 2) == [0xFFFFFFFF8010A000, 0x55]


def test_what_user_mode_does_wrong_is_the_kernels_to_know(boot) -> None:
    """Privileged instructions and ports, INT n of a gate for ring 3 and of one that is not, in user mode."""
    guest = boot(
        TRAPS + "start:" + USER.replace("mov r14", "mov qword [DATA + 16], 1\n mov r14") + """
entered: jmp shutdown
user:
    mov rbp, b1
f1: cli
b1: mov rbp, b2
f2: hlt
b2: mov rbp, b3
    mov eax, 0x1234
f3: in al, 0
b3: mov rbp, b4
f4: out 0, al
b4: mov rbp, b5
    xor edx, edx
f5: out dx, eax
b5: mov rbp, b6
    int 0x80
f6: nop
b6: mov rbp, b7
f7: int 0x20
b7: mov rbp, b8
f8: mov rax, [0xffff840000000000]
b8: mov rbp, b9
    mov rbx, 0xffff840000001000
f9: mov [rbx], rax
b9: mov rbp, b10
f10: mov rax, cr3
b10: syscall
"""
    )
    guest.finish()
    seen = [tuple(guest.words(8 + 6 * number, 6)) for number in range(10)]
    assert [(vector, place) for vector, _, place, *_ in seen] == [
        (vector, guest.label(f"f{number}"))
        for number, vector in enumerate((13, 13, 13, 13, 13, 128, 13, 14, 14, 13), 1)
    ]
    assert all(cs & 0xFFFF == 0xE033 and pointer == 0xFFFFFFFF8010A000 for _, _, _, cs, _, pointer in seen)
    assert [code for _, code, *_ in seen[:7]] == [0, 0, 0, 0, 0, 0, 0x20 << 3 | 2]
    assert seen[8][1] & 6 == 6, "a write of user mode's"


@pytest.mark.parametrize(
    ("rip", "cs", "ss", "code"),
    [
        (1 << 47, 0xE033, 0xE02B, 0), ((1 << 64) - (1 << 47) - 1, 0xE033, 0xE02B, 0), (1 << 63, 0xE033, 0xE02B, 0),
        (None, 0xE02B, 0xE02B, 0xE028), (None, 0xE033, 0xE033, 0xE030), (None, 0xE033, 0x3, 0),
        (None, 0x3, 0xE02B, 0), (None, 0x33, 0xE02B, 0x30), (None, 0xE033, 0x33, 0x30), (None, 0xE00B, 0xE02B, 0xE008),
        (None, 0xE033, 0xE013, 0xE010), (None, 0xFFFF, 0xE02B, 0xFFFC),
    ],
)  # fmt: skip
def test_an_iret_that_cannot_be_done_is_a_fault_of_user_mode(boot, rip: int | None, cs: int, ss: int, code: int) -> None:
    """Any process can ask for it, by sigreturn: its kernel hears of #GP there, and goes on."""
    to_user = USER.replace("push 0xe02b", f"push {ss}").replace("push 0xe033", f"push {cs}")
    if rip is not None:
        to_user = to_user.replace("push user", f"mov rax, {rip}\n push rax")
    guest = boot(
        TRAPS.replace("mov [rsp], rbp", "mov [rsp], rbp\n mov qword [rsp + 8], 0xe033\n mov qword [rsp + 32], 0xe02b")
        + "start: mov rbp, after\n" + to_user + """
user: ud2
after:
    mov eax, 39
    syscall
entered:
    mov [DATA + 16], rax
    jmp shutdown
"""
    )
    guest.finish()
    vector, error, place, selector, flags, pointer = guest.words(8, 6)
    assert (vector, error, place) == (13, code, guest.label("user") if rip is None else rip)
    assert (selector & 0xFFFF, flags & 0x200, pointer) == (cs, 0x200, 0xFFFFFFFF8010A000)
    assert guest[2] == 39


def test_another_page_is_seen_once_the_translation_is_forgotten(boot) -> None:
    """update_va_mapping back and forth between two frames, read each time; then read-only, and not there."""
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + """
    mov qword [PAGE], 1
    mov qword [PAGE + 0x1000], 2
    xor r12d, r12d
    mov r13d, 100
again:
    add r12, [PAGE]
    mov rsi, [DATA + 16]
    call change
    add r12, [PAGE]
    mov rsi, [DATA + 8]
    call change
    dec r13d
    jnz again
    mov [DATA + 32], r12
    mov rsi, [DATA + 8]
    and rsi, ~2
    call change
    mov rbp, c1
w1: mov qword [PAGE], 3
c1: xor esi, esi
    call change
    mov rbp, c2
w2: mov rax, [PAGE]
c2: mov rsi, [DATA + 8]
    call change
    mov rax, [PAGE]
    mov [DATA + 40], rax
    jmp shutdown
change:
    mov rdi, PAGE
    mov edx, 2
    mov eax, update_va_mapping
    syscall
    or [DATA + 48], rax
    ret
""")  # fmt: skip
    guest[1], guest[2] = (guest.frame_of(PAGE) << 12 | 0x67), (guest.frame_of(PAGE + 4096) << 12 | 0x67)
    guest.finish()
    assert guest[4] == 300 and guest[5] == 1 and guest[6] == 0
    assert guest.words(8, 3) == [14, 3, guest.label("w1")]
    assert guest.words(14, 3) == [14, 0, guest.label("w2")]


def test_a_frame_that_was_a_table_leads_nowhere_when_it_is_one_again(boot) -> None:
    """Its entries are changed while it is memory, by the hypervisor in the guest's name, and looked at when it is not.

    An engine that remembered the table would let the guest reach a page by an entry that is gone.
    """
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + """
    mov r13d, 3
again:
    mov rsi, [DATA + 8]                 ; the table's page, read-only, with an entry that leads to PAGE + 0x1000
    mov rax, [DATA + 16]
    mov [PAGE], rax
    and rsi, ~2
    call change
    mov rsi, [DATA + 24]                ; into the level-2 table
    mov rdi, [DATA + 32]
    call update
    mov rbx, [DATA + 40]
    mov rbp, gone
    add r12, [rbx]
    xor esi, esi                        ; out of it, and memory again
    mov rdi, [DATA + 32]
    call update
    mov rsi, [DATA + 8]
    call change
    mov dword [DATA + 0x800], 16        ; MMUEXT_CLEAR_PAGE
    mov rax, [DATA + 8]
    shr rax, 12
    mov [DATA + 0x808], rax
    mov rdi, DATA + 0x800
    mov esi, 1
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmuext_op
    syscall
    or [DATA + 48], rax
    mov rsi, [DATA + 8]                 ; a table once more, which is empty
    and rsi, ~2
    call change
    mov rsi, [DATA + 24]
    mov rdi, [DATA + 32]
    call update
    mov rbp, gone
fault:
    add r12, [rbx]
    jmp shutdown
gone:
    xor esi, esi
    mov rdi, [DATA + 32]
    call update
    mov rsi, [DATA + 8]
    call change
    dec r13d
    jnz again
    mov [DATA + 56], r12
    jmp shutdown
change:
    mov rdi, PAGE
    mov edx, 1
    mov eax, update_va_mapping
    syscall
    or [DATA + 48], rax
    ret
update:
    mov [DATA + 0x810], rdi
    mov [DATA + 0x818], rsi
    mov rdi, DATA + 0x810
    mov esi, 1
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmu_update
    syscall
    or [DATA + 48], rax
    ret
""")  # fmt: skip
    words, state = guest.domain.frames.words, guest.domain.state
    level3 = (words[state.kernel_root * 512 + 511] & (1 << 52) - 1) >> 12
    level2 = (words[level3 * 512 + 510] & (1 << 52) - 1) >> 12
    table, target = guest.frame_of(PAGE), guest.frame_of(PAGE + 4096)
    guest.cpu.store(PAGE + 4096, (7).to_bytes(8, "little"))
    guest[1], guest[2], guest[3] = table << 12 | 0x67, target << 12 | 0x67, table << 12 | 0x67
    guest[4], guest[5] = level2 * 4096 + 8 * 500, 0xFFFFFFFF80000000 + (500 << 21)
    guest.finish()
    assert guest[6] == 0, "every hypercall did what it should"
    assert guest[7] == 21, "seen three times by the entry, and never without one"
    assert [guest[8 + 6 * number] for number in range(3)] == [14] * 3


def test_page_tables_are_written_by_instructions_too(boot) -> None:
    """XCHG and MOV to an entry of level 1 through its read-only mapping, then a flush by hypercall."""
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + """
    mov qword [PAGE], 1
    mov qword [PAGE + 0x1000], 2
    mov rbx, [DATA + 24]
    mov rax, [DATA + 16]
    xchg [rbx], rax
    mov [DATA + 32], rax
    call flush
    mov rax, [PAGE]
    mov [DATA + 40], rax
    mov rax, [DATA + 8]
    mov [rbx], rax
    call flush
    mov rax, [PAGE]
    mov [DATA + 48], rax
    jmp shutdown
flush:
    mov dword [DATA + 0x800], 6
    mov rdi, DATA + 0x800
    mov esi, 1
    xor edx, edx
    mov r10, 0x7ff0
    mov eax, mmuext_op
    syscall
    ret
""")  # fmt: skip
    guest[1], guest[2] = (guest.frame_of(PAGE) << 12 | 0x67), (guest.frame_of(PAGE + 4096) << 12 | 0x67)
    table, offset = divmod(guest.table_of(PAGE), 4096)
    guest[3] = 0xFFFFFFFF80000000 + (guest.domain.own.physical(table) << 12) + offset
    guest.finish()
    assert guest[4] & ~0x60 == guest[1] & ~0x60 and guest.words(5, 2) == [2, 1]


def test_a_timer_wakes_a_guest_that_blocks(boot) -> None:
    """VIRQ_TIMER bound, a timer set while events are masked, sched_op block: the upcall comes on the way out."""
    guest = boot(
        """
upcall:
    inc qword [DATA + 8]
    mov rbx, [DATA + 16]
    mov byte [rbx], 0
    mov qword [rbx + 8], 0
    mov qword [rbx + 2048], 0
    add rsp, 16
    push 0
    push 0
    push 0
    push 0
    mov eax, iret
    syscall
start:
    mov rdi, upcall
    mov rsi, upcall
    mov rdx, upcall
    mov eax, set_callbacks
    syscall
    mov rdi, PAGE
    mov rsi, [DATA + 24]
    mov edx, 1
    mov eax, update_va_mapping
    syscall
    mov rax, PAGE
    mov [DATA + 16], rax
    mov dword [DATA + 0x800], 0
    mov dword [DATA + 0x804], 0
    mov edi, 1
    mov rsi, DATA + 0x800
    mov eax, event_channel_op
    syscall
    mov r13d, 20
again:
    mov rbx, [DATA + 16]
    mov byte [rbx + 1], 1               ; events wait until it blocks
    mov rdi, 1                          ; long past: at once
    mov eax, set_timer_op
    syscall
    mov edi, 1
    xor esi, esi
    mov eax, sched_op
    syscall
    dec r13d
    jnz again
    jmp shutdown
"""
    )
    guest[3] = guest.domain.own.shared_info << 12 | 0x67
    guest.finish()
    assert guest[1] == 20


def test_a_single_step_traps_after_one_instruction(boot) -> None:
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + """
    mov rbp, on
    pushf
    or dword [rsp], 0x100
    popf
    nop
here: nop
    nop
on: jmp shutdown
"""
    )
    guest.finish()
    assert guest.words(8, 3) == [1, 0, guest.label("here")]


def test_sse_waits_for_the_guest_after_fpu_taskswitch(boot) -> None:
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + """
    mov edi, 1
    mov eax, fpu_taskswitch
    syscall
    mov rbp, sse
sse: movd eax, xmm0
    jmp shutdown
"""
    )
    if getattr(guest.vcpu, "ring_0_is_emulated", False):
        pytest.skip("kvm-pvm lets ring 3 use SSE whatever CR0.TS is")
    guest.finish()
    assert guest.words(8, 3) == [7, 0, guest.label("sse")]


def test_a_kick_stops_a_guest_that_only_computes(boot) -> None:
    """Again and again, and the guest misses nothing of it."""
    guest = boot(
        """
start:
    mov rcx, 0
on: inc rcx
    mov [DATA + 8], rcx
    cmp qword [DATA + 16], 0
    je on
    jmp shutdown
"""
    )
    seen = 0
    for _ in range(20):
        timer = threading.Timer(0.005, guest.vcpu.kick)
        started = time.monotonic()
        timer.start()
        assert isinstance(guest.run(), Kicked)
        assert time.monotonic() - started < 60
        timer.join()
        assert guest[1] >= seen
        seen = guest[1]
    assert seen
    state = guest.vcpu.state
    assert state.rip - guest.label("on") in range(40) and state.gpr[1] in (seen, seen + 1)
    guest[2] = 1
    guest.finish()


def test_single_instructions_are_run_when_the_monitor_steps(boot) -> None:
    """Through a hypercall and an exception, whose frame has no trap flag for it."""
    guest = boot(
        TRAPS + "start:" + SET_TRAPS + """
    mov rbp, on
s1: nop
s4: mov eax, xen_version
s5: xor edi, edi
s6: syscall
s7: nop
s8: ud2
on: nop
    jmp shutdown
"""
    )
    places = []
    for _ in range(20):
        assert isinstance(guest.vcpu.step(), DebugStop)
        places.append(guest.vcpu.state.rip)
    first = places.index(guest.label("s1"))
    names = ("s1", "s4", "s5", "s6", "s7", "s8", "h6")
    assert places[first : first + 7] == [guest.label(name) for name in names]
    guest.finish()
    assert guest.words(8, 3) == [6, 0, guest.label("s8")]
    assert not guest[12] & 0x100
