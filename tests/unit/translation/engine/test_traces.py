"""Traces (translator/traces.py): hot code laid out along the way that it takes does what its blocks do singly."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.unit.translation.engine.guest import CODE, DATA, HANDLERS, Machine, Make, P, U, W
from trivisor.machine.exits import DebugStop, Kicked
from trivisor.translation import block_store
from trivisor.translation.block_tables import PLAIN, Block
from trivisor.translation.shapes import MAXIMUM_INSTRUCTIONS
from trivisor.translation.translator.traces import LONGEST_SPAN, Judge

PAGE = 0x10_0000_0000
"""A linear page of a test's own."""
ONE = 0x400000
"""A physical one."""
CONDITIONS = "o no b ae e ne be a s ns p np l ge le g".split()
OPERANDS = (0, 1, 2, 0x7F, 0x80, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF)

TAKEN: Judge = lambda ways: ways[0]  # noqa: E731
NOT_TAKEN: Judge = lambda ways: ways[-1]  # noqa: E731


@pytest.fixture(params=[TAKEN, NOT_TAKEN], ids=["taken", "not taken"])
def traced(machine: Make, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes machines in which every block is a trace, along the jumps or past them."""
    monkeypatch.setattr(block_store, "any_way", request.param)

    def make(source: str, **options: object) -> Machine:
        made = machine(source, **options)
        made.vcpu.blocks.tunes_at_once = True
        return made

    return make


def block_at(m: Machine, label: str) -> Block:
    """The live block that begins there."""
    rip = m.labels[label]
    found = [block for _, _, block in m.vcpu.blocks.code() if block.rip == rip and not block.dead]
    assert found, label
    return found[-1]


def length(m: Machine, label: str) -> int:
    """Guest bytes of the block there."""
    return m.vcpu.blocks.tables.template_length(block_at(m, label).template)


# -- the way that a trace takes -----------------------------------------------------------------------------


def test_a_trace_goes_on_past_jumps(machine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_store, "any_way", TAKEN)
    m = machine("start: jmp one\n ud2\n one: test eax, eax\n je two\n ud2\n two: inc ebx\n hlt\n end:")
    m.vcpu.blocks.tunes_at_once = True
    m.halt(rax=0, rbx=0)
    assert m["rbx"] == 1
    assert length(m, "start") == m.labels["end"] - m.labels["start"]


@pytest.mark.parametrize(
    "source",
    [
        "start: inc ebx\n jmp on\n back: hlt\n on: jmp back",
        "start: inc ebx\n call on\n hlt\n on: ret",
        "start: inc ebx\n mov ecx, 3\n again: loop again\n hlt",
        "start: inc ebx\n mov ecx, 0\n jrcxz on\n on: hlt",
        f"start: inc ebx\n jmp {CODE + 0x1000}",
        f"start: inc ebx\n jmp {CODE + 0xFFF}",
        f"start: inc ebx\n jmp on\n times {LONGEST_SPAN} nop\n on: hlt",
        f"start: inc ebx\n jmp on\n on: times {MAXIMUM_INSTRUCTIONS - 1} nop\n hlt",
        "start: inc ebx\n mov eax, ss\n jmp on\n on: mov ss, eax\n hlt",
    ],
    ids=["backward", "call", "loop", "jrcxz", "other page", "end of page", "far", "long", "shadow"],
)
def test_a_trace_ends_before(machine: Make, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(block_store, "any_way", TAKEN)
    m = machine(source)
    m.memory.write(CODE + 0xFFF, b"\x90\xf4")
    m.vcpu.blocks.tunes_at_once = True
    m.halt(rbx=0)
    assert m["rbx"] == 1
    assert length(m, "start") < 32


# -- what it does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", CONDITIONS)
def test_either_side_of_a_conditional_jump_has_the_flags(traced: Make, condition: str) -> None:
    m = traced(
        f"""
        start: cmp rax, rbx
        mov rcx, [rsi]                 ; a check, for which the flags are parked
        j{condition} yes
        pushfq
        cmp rcx, rcx
        mov edi, 1
        jmp end
        yes: pushfq
        test rcx, rcx
        mov edi, 2
        end: pop rdx
        hlt
        """
    )
    outcomes = []
    for at_once in (True, False):
        m.vcpu.blocks.flush()
        m.vcpu.blocks.tunes_at_once = at_once
        found = []
        for rax, rbx in itertools.product(OPERANDS, OPERANDS):
            m.halt("start", rax=rax, rbx=rbx, rsi=DATA)
            found.append((m["rdi"], m["rdx"]))
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]
    assert {side for side, _ in outcomes[0]} == {1, 2}


def test_a_way_out_into_another_page(traced: Make) -> None:
    m = traced(
        f"""
        start: add eax, ebx
        js {CODE + 0x1000}
        jne on
        mov edi, 1
        hlt
        on: mov edi, 2
        hlt
        """
    )
    m.put("setc dl\n sets dh\n mov edi, 3\n hlt", CODE + 0x1000)
    for rax, rbx, side in ((0xFFFFFFFF, 1, 1), (1, 1, 2), (0x80000000, 1, 3), (0xFFFFFFFF, 0xFFFFFFFE, 3)):
        m.halt("start", rax=rax, rbx=rbx, rdx=0)
        assert m["rdi"] == side
        if side == 3:
            assert m["rdx"] == 0x100 | (rax + rbx >> 32)


def test_a_fault_in_the_middle(traced: Make) -> None:
    m = traced(
        """
        start: mov ecx, 1
        jmp one
        ud2
        one: test eax, eax
        js two
        mov ecx, 2
        two: mov edx, ecx
        here: mov rbx, [rsi]
        mov ecx, 3
        hlt
        """
    )
    m.map(PAGE, 0, 0)
    for rax, expected in ((0, 2), (0x80000000, 1)):
        frame = m.fault("start", rax=rax, rsi=PAGE, rsp=0x200000, rbx=7)
        assert (frame.vector, frame.rip, m.core.cr2) == (14, m.labels["here"], PAGE)
        assert (m["rcx"], m["rdx"], m["rbx"]) == (expected, expected, 7)


@pytest.mark.parametrize("at", ["skipped", "after", "first"])
def test_code_that_changes_a_trace(traced: Make, at: str) -> None:
    """Bytes that the trace jumps over, some further on in it, and some before: all are as memory has them."""
    m = traced(
        f"""
        start: mov r8d, 3
        again: cmp r8d, 1
        first: mov ebx, 1
        je skipped
        jmp on
        skipped: mov ecx, 1
        on: add [rel {at}+1], dl
        after: mov esi, 1
        lea rdi, [rdi+rbx*4]
        dec r8d
        jnz again
        hlt
        """
    )
    m.halt(rdx=2, rcx=0, rdi=0)
    written = {"skipped": 5, "after": 7, "first": 5}[at]
    assert m["rcx"] == (written if at == "skipped" else 1)
    assert m["rsi"] == (written if at == "after" else 1)
    assert m["rdi"] == 4 * (1 + 3 + 5 if at == "first" else 3)


def test_a_trace_goes_when_somebody_else_writes_what_it_skips(traced: Make) -> None:
    m = traced("start: jmp on\n skipped: mov ebx, 1\n hlt\n on: test eax, eax\n jne skipped\n mov ebx, 2\n hlt")
    m.halt("start", rax=0)
    block = block_at(m, "start")
    m.memory.write_u8(m.labels["skipped"] + 1, 9)
    m.vcpu.memory_written(m.labels["skipped"] + 1, 1)
    assert block.dead
    m.halt("start", rax=1)
    assert m["rbx"] == 9


def test_an_interrupt_in_a_loop_that_is_a_trace(traced: Make) -> None:
    m = traced(
        """
        again: inc rax
        jmp one
        ud2
        one: test rax, rax
        js never
        inc rbx
        jmp again
        never: hlt
        """
    )
    m.gate(0x40, HANDLERS + 0x40 * 16)

    def look() -> None:
        if m["rax"] > 1000:
            m.interrupt(0x40)
        m.board.clock.at(m.board.clock.now() + 5_000_000, look)

    look()
    frame = m.fault(rax=0, rbx=0, rflags=0x202)
    assert (frame.vector, frame.rip) == (0x40, m.origin)
    assert m["rax"] == m["rbx"] > 0


def test_every_instruction_of_a_trace_is_a_step(traced: Make) -> None:
    m = traced("start: jmp one\n ud2\n one: cmp eax, 1\n two: je end\n ud2\n end: nop\n last: hlt")
    m.halt(rax=1)
    m.restart()
    m.set(rax=1)
    reached = []
    for _ in range(4):
        assert isinstance(m.step(), DebugStop)
        reached.append(m.core.rip)
    assert reached == [m.labels[name] for name in ("one", "two", "end", "last")]


# -- groups -------------------------------------------------------------------------------------------------


def test_a_group_with_a_way_out_does_not_begin_to_write(traced: Make) -> None:
    """The page may be read-only, with the write on the way that is not taken."""
    m = traced(
        "start: mov rax, [rsi]\n test rax, rax\n je out\n mov rdx, [rsi+8]\n mov [rsi+16], rbx\n out: hlt\n"
        "before: mov rax, [rsi]\n hlt"
    )
    m.map(PAGE, ONE, P | U)
    state = m.vcpu.state
    state.cr0 |= 1 << 16
    m.vcpu.state = state
    m.halt("before", rsi=PAGE)
    m.halt("start", rsi=PAGE)
    plain = [block.rip for _, _, block in m.vcpu.blocks.code() if block.key & PLAIN]
    assert plain == [m.labels["before"]]
    m.map(PAGE, ONE, P | W | U)
    m.flush()
    m.memory.write_u64(ONE, 1)
    m.halt("start", rsi=PAGE, rbx=5)
    assert m.memory.read_u64(ONE + 16) == 5


@pytest.mark.parametrize("above", range(0, 32, 8))
def test_a_group_across_pages_goes_on_singly_in_the_middle_of_a_trace(traced: Make, above: int) -> None:
    m = traced(
        "start: jmp on\n ud2\n on: mov rax, [rsi-8]\n test edi, edi\n je end\n mov rbx, [rsi-16]\n"
        "end: mov rcx, [rsi-24]\n mov [rsi-32], rdi\n hlt"
    )
    m.map(PAGE, ONE)
    m.map(PAGE - 0x1000, ONE + 0x1000)
    for i in range(4):
        m.memory.write_u64(ONE + 8 * i, 100 + i)
        m.memory.write_u64(ONE + 0x2000 - 8 - 8 * i, 99 - i)
    first = 100 + above // 8
    for edi in (0, 1, 0, 1):
        m.halt("start", rsi=PAGE + above, rdi=edi, rbx=7)
        assert (m["rax"], m["rbx"], m["rcx"]) == (first - 1, first - 2 if edi else 7, first - 3)


# -- the tuner ----------------------------------------------------------------------------------------------


def paths(m: Machine) -> dict[str, list[str]]:
    """The traces there are, by labels."""
    names = {address: name for name, address in m.labels.items()}
    found = m.vcpu.tuner.traces()
    return {names[path[0]]: [names[start] for start in path] for path in found}


def run_until(m: Machine, reached: Callable[[], bool]) -> None:
    """Run an endless guest until something holds, which is looked at now and then."""

    def look() -> None:
        if reached():
            m.vcpu.kick()
        else:
            m.board.clock.at(m.board.clock.now() + 10_000_000, look)

    look()
    assert isinstance(m.run(), Kicked)
    assert reached()


LOOP = """
    start: xor ecx, ecx
    mov ebx, 1
    again: inc rcx
    test rcx, rdx
    je other
    one: lea rax, [rax+rbx*2]
    jmp join
    other: lea rax, [rax+rbx]
    join: test rcx, rcx
    je never
    last: jmp again
    never: hlt
"""


@pytest.mark.parametrize(
    ("mask", "path"), [(0, ["again", "other", "last"]), ((1 << 64) - 1, ["again", "one", "join", "last"])]
)
def test_a_hot_loop_becomes_one_trace_from_its_head(machine: Make, mask: int, path: list[str]) -> None:
    m = machine(LOOP)
    m.set(rdx=mask, rax=0)
    run_until(m, lambda: paths(m).get("again") == path)


def test_a_trace_that_went_the_wrong_way_is_made_anew(machine: Make) -> None:
    m = machine(LOOP)
    m.set(rdx=0, rax=0)
    run_until(m, lambda: "other" in paths(m).get("again", ()))
    m.set(rdx=(1 << 64) - 1)
    run_until(m, lambda: "one" in paths(m)["again"])
