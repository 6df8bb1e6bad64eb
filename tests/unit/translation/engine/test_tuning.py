"""Tuned blocks (translator/tuned.py): site caches and one check for several accesses change nothing but the time."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.unit.translation.engine.guest import CODE, DATA, LARGE, PD, STACK, Machine, Make, P, U, W
from trivisor.machine.exits import Kicked
from trivisor.translation import block_store
from trivisor.translation.host_signals import Sampler
from trivisor.translation.translator.recipe import asm
from trivisor.x86.control import CR4_SMAP

ONE, TWO = 0x400000, 0x500000
"""Physical pages."""
PAGE = 0x10_0000_0000
"""A linear page that leads to one or the other."""


def tuned(machine: Make, source: str, **options: object) -> Machine:
    made = machine(source, **options)
    made.vcpu.blocks.tunes_at_once = True
    return made


def made(m: Machine) -> int:
    return m.vcpu.blocks.tuned


def run_until_made(m: Machine, count: int) -> None:
    """Run an endless guest until so many blocks were tuned."""

    def look() -> None:
        if made(m) >= count:
            m.vcpu.kick()
        m.board.clock.at(m.board.clock.now() + 20_000_000, look)

    look()
    assert isinstance(m.run(), Kicked)
    assert made(m) == count


def test_a_block_that_runs_for_long_is_tuned(machine: Make) -> None:
    m = machine("again: add rax, [rbx]\n mov [rbx+8], rax\n jmp again")
    m.set(rbx=DATA)
    m.memory.write_u64(DATA, 1)
    run_until_made(m, 1)
    assert m["rax"] - 1 <= m.memory.read_u64(DATA + 8) <= m["rax"]


def test_accesses_all_over_memory_go_back_to_the_tlb(machine: Make) -> None:
    m = machine("again: add rax, [rbx+rcx]\n add rcx, 4096\n and rcx, 0x1fffff\n jmp again")
    m.set(rbx=DATA, rcx=0)
    run_until_made(m, 2)  # once with a site cache, once without


def test_a_group_all_over_memory_is_checked_by_the_tlb(machine: Make) -> None:
    m = machine("again: add rax, [rbx+rcx]\n add rax, [rbx+rcx+8]\n add rcx, 4096\n and rcx, 0x1fffff\n jmp again")
    m.set(rbx=DATA, rcx=0)
    run_until_made(m, 2)
    block = next(block for _, _, block in m.vcpu.blocks.code() if block.rip == m.origin and not block.dead)
    code = bytes(m.vcpu.blocks.cache.writable[block.start : block.start + block.size])
    assert code.count(asm("xor r10, [rsp+r11+TLB_KERNEL+TLB_READ]")) == 1
    assert not m.vcpu.tuner._sites[block.number]


def test_one_check_serves_pushes_and_pops(machine: Make) -> None:
    m = tuned(machine, "push rax\n push rbx\n sub rsp, 32\n mov [rsp+8], rcx\n add rsp, 32\n pop rdx\n pop rsi\n hlt")
    m.halt(rax=1, rbx=2, rcx=3)
    assert made(m) == 1
    assert (m["rdx"], m["rsi"], m["rsp"], m.memory.read_u64(STACK - 40)) == (2, 1, STACK, 3)


def test_a_segment_register_is_pushed_at_its_own_place(machine: Make) -> None:
    m = tuned(machine, "start: push gs\n push fs\n push rax\n hlt")
    state = m.vcpu.state
    state.fs.selector, state.gs.selector = 0x18, 0x2B
    m.vcpu.state = state
    for _ in range(2):  # the first time, the TLB has nothing for the group
        for at in (8, 16, 24):
            m.memory.write_u64(STACK - at, 0x5555555555555555)
        m.halt("start", rax=7, rsp=STACK)
        assert [m.memory.read_u64(STACK - at) for at in (8, 16, 24)] == [0x2B, 0x18, 7]
    assert made(m) == 1


def test_the_x87_environment_hides_its_pointers_at_its_own_place(machine: Make) -> None:
    m = tuned(machine, "start: fld1\n fld qword [rbx+64]\n mov [rbx], rax\n fnstenv [rbx+16]\n hlt")
    for _ in range(2):
        m.memory.write(DATA, bytes([0x55]) * 64)
        m.halt("start", rax=7, rbx=DATA)
        image = m.memory.read(DATA, 64)
        assert image[8:16] == bytes([0x55]) * 8 and image[44:] == bytes([0x55]) * 20
        assert not any(image[16 + 12 : 16 + 18]) and not any(image[16 + 20 : 16 + 26])
    assert made(m) == 1


@pytest.mark.parametrize("register", ["rsp", "sp"])
def test_a_pop_into_the_stack_pointer_ends_a_group(machine: Make, register: str) -> None:
    m = tuned(machine, f"pop rax\n pop {register}\n pop rbx\n hlt")
    m.memory.write_u64(DATA, 1)
    m.memory.write_u64(DATA + 8, DATA + 0x800 + (0x1234 << 16 if register == "sp" else 0))
    m.memory.write_u64(DATA + 0x800, 3)
    m.halt(rsp=DATA)
    assert (m["rax"], m["rbx"], m["rsp"]) == (1, 3, DATA + 0x808)


@pytest.mark.parametrize("above", range(0, 48, 8))
def test_a_group_across_pages_goes_one_by_one(machine: Make, above: int) -> None:
    m = tuned(machine, "push rax\n push rbx\n push rcx\n push rdx\n pop r8\n pop r9\n pop r10\n pop r11\n hlt")
    m.map(PAGE, TWO)
    m.map(PAGE - 0x1000, ONE)
    m.halt(rax=1, rbx=2, rcx=3, rdx=4, rsp=PAGE + above)
    assert [m[r] for r in ("r8", "r9", "r10", "r11", "rsp")] == [4, 3, 2, 1, PAGE + above]


@pytest.mark.parametrize("pushed", range(4))
def test_a_fault_in_a_group_is_where_it_happens(machine: Make, pushed: int) -> None:
    m = tuned(machine, "push rax\n push rbx\n push rcx\n push rdx\n hlt")
    m.map(PAGE, ONE)
    m.map(PAGE - 0x1000, 0, 0)
    m.gate(14, 0x9000 + 14 * 16, ist=1)
    frame = m.fault(rsp=PAGE + 8 * pushed, rax=7)
    assert (frame.vector, frame.rip, frame.rsp) == (14, m.origin + pushed, PAGE)
    assert m.core.cr2 == PAGE - 8
    assert all(m.memory.read_u64(ONE + 8 * i) != 7 for i in range(pushed - 1))


def test_flags_live_across_a_group_that_fails(machine: Make) -> None:
    m = tuned(machine, "cmp rax, rbx\n push rax\n push rbx\n pop rcx\n pop rdx\n setb sil\n seto dil\n hlt")
    m.map(PAGE, TWO)
    m.map(PAGE - 0x1000, ONE)
    for rax, rbx, below, overflow in ((1, 2, 1, 0), (2, 1, 0, 0), (1 << 63, 1, 0, 1)):
        m.restart()
        m.halt(rax=rax, rbx=rbx, rsp=PAGE + 8, rsi=0, rdi=0)
        assert (m["rsi"], m["rdi"], m["rcx"], m["rdx"]) == (below, overflow, rbx, rax)


def test_a_carry_across_accesses(machine: Make) -> None:
    """It is parked alone where an instruction needs no other flag, and with the rest where one does."""
    source = """
        start: add rax, [rsi]
        mov [rdi], rax
        mov rcx, [rsi+8]
        adc rdx, [r13]
        rcr r8, 1
        mov [rdi+8], rcx
        setc bl
        inc r9d
        mov [rdi+16], rdx
        pushfq
        pop rbp
        hlt
    """
    outcomes = []
    for at_once in (False, True):
        m = machine(source)
        m.vcpu.blocks.tunes_at_once = at_once
        m.map(PAGE, TWO)
        m.map(PAGE - 0x1000, ONE)
        found = []
        for low, high, at in itertools.product((0, 1 << 63), (0, 1 << 63, (1 << 64) - 1), (DATA, PAGE - 12)):
            m.memory.write_u64(DATA + 0x100, high)
            m.memory.write_u64(DATA + 0x200, low)
            m.halt("start", rax=low, rdx=high, rsi=DATA + 0x100, rdi=at, r13=DATA + 0x200, r8=5, r9=0x7FFFFFFF, rbx=0)
            found.append([m[r] for r in ("rax", "rcx", "rdx", "r8", "r9", "rbx", "rbp")])
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("between", ["cpuid", "rdmsr", "wrmsr", "mov r11, cr8", "in al, 0x80", "invlpg [rsi]"])
def test_a_helper_between_the_accesses_of_a_group(machine: Make, between: str) -> None:
    m = tuned(
        machine,
        f"""
        again: mov ebx, 0x1234
        mov eax, 1
        mov ecx, r9d
        xor edx, edx
        push rbx
        {between}
        pop rdi
        add rbp, rdi
        dec r8d
        jnz again
        hlt
        """,
    )
    m.halt(rbp=0, rsi=PAGE, r8=3, r9=0xC0000102)
    assert (m["rbp"], m["rsp"]) == (3 * 0x1234, STACK)
    assert made(m) > 0


def test_clac_between_the_accesses_of_a_group(machine: Make) -> None:
    m = tuned(machine, "stac\n mov [rbx], rax\n clac\n here: mov [rbx+8], rax\n hlt")
    for i in range(32):  # the kernel's own, but for the page in question
        m.memory.write_u64(PD + 8 * i, i << 21 | P | W | LARGE)
    m.map(PAGE, ONE)
    state = m.initial_state()
    state.cr4 |= CR4_SMAP
    m.vcpu.state = state
    frame = m.fault(rbx=PAGE)
    assert (frame.vector, frame.error, frame.rip) == (14, 3, m.labels["here"])
    assert made(m) > 0


@pytest.mark.parametrize(
    ("flush", "effect"),
    [("invlpg [r8]", True), ("mov rax, cr3\n mov cr3, rax", True), ("nop", False)],
)
def test_site_caches_go_with_the_tlb(machine: Make, flush: str, effect: bool) -> None:
    m = tuned(machine, f"mov rbx, [r8]\n out 0x80, al\n jmp on\n on: {flush}\n mov rcx, [r8]\n hlt")
    at = m.map(PAGE, ONE)
    m.memory.write_u64(ONE, 1)
    m.memory.write_u64(TWO, 2)
    m.on_port(lambda _: m.memory.write_u64(at, TWO | P | W | U))
    m.halt(r8=PAGE)
    assert (m["rbx"], m["rcx"]) == (1, 2 if effect else 1)


@pytest.mark.parametrize("flush", ["invlpg [r8]", "mov rax, cr3\n mov cr3, rax"])
def test_a_site_cache_that_was_filled_before(machine: Make, flush: str) -> None:
    """The same access before and after."""
    m = tuned(machine, f"again: mov rbx, rcx\n mov rcx, [r8]\n out 0x80, al\n {flush}\n dec edx\n jnz again\n hlt")
    at = m.map(PAGE, ONE)
    m.memory.write_u64(ONE, 1)
    m.memory.write_u64(TWO, 2)
    m.on_port(lambda _: m.memory.write_u64(at, (TWO if m["rdx"] == 2 else ONE) | P | W | U))
    m.halt(r8=PAGE, rdx=5)
    assert (m["rbx"], m["rcx"]) == (1, 2)


def test_a_site_cache_of_the_kernel_is_not_the_user_s(machine: Make) -> None:
    m = tuned(machine, "read: mov rax, [r8]\n hlt\n user: mov rax, [r8]\n hlt")
    m.map(PAGE, ONE, P | W)
    m.halt("read", r8=PAGE)
    m.restart_at("user", cpl=3, r8=PAGE)
    assert m.fault("user").error == 5


@pytest.mark.parametrize("access", ["mov rax, [rbx+8]", "mov rax, [rbx+rcx*8]", "mov [rbx], rcx\n mov rax, [rbx+8]"])
@pytest.mark.parametrize("address", [1 << 63, 3 << 62, 1 << 62, 0xFFFF_7FFF_FFFF_F000])
def test_an_empty_site_cache_leads_nowhere(machine: Make, access: str, address: int) -> None:
    """The page that it seems to have is not canonical, nor is what it would make of it."""
    m = tuned(machine, f"start: {access}\n hlt")
    for _ in range(2):
        frame = m.fault("start", rbx=address, rcx=0, rsp=STACK)
        assert (frame.vector, frame.error, frame.rip) == (13, 0, m.origin)
    assert made(m) == 1


def test_a_write_to_code_through_a_site_cache(machine: Make) -> None:
    m = tuned(machine, "again: mov [r8], rbx\n call r8\n add rbx, 0x100\n loop again\n hlt")
    # mov al, imm8; ret
    m.halt(r8=DATA, rbx=0x00C3_05B0, rcx=1)
    assert m["rax"] & 0xFF == 5
    m.restart()
    m.halt(r8=DATA, rbx=0x00C3_06B0, rcx=3)
    assert m["rax"] & 0xFF == 8


# -- blocks that park the flags first -----------------------------------------------------------------------

ARITHMETIC = 0x8D5
_COMPARED = ((1, 2), (2, 1), (1, 1), (1 << 63, 1), ((1 << 63) - 1, (1 << 64) - 1), (0x10, 1))


@pytest.mark.parametrize(
    "way",
    [
        f"call {CODE + 0x1000}",  # through the jump cache, with flags parked
        "lea rcx, [rel on]\n jmp rcx\n on: push rcx\n pop rcx",
        "jmp on\n ud2\n on: mov rcx, [rsi]",  # a link, with flags in the host's
        "mov rcx, [rsi]\n jmp on\n ud2\n on: mov rcx, [rsi]",  # ... parked
        "jmp on\n back: push rcx\n jmp after\n on: jmp back\n after: pop rcx",  # ... to the poll
        f"lea rcx, [rel on]\n jmp {CODE + 0x1008}\n on: push rcx\n pop rcx",
    ],
)
def test_flags_come_through_a_block_that_parks_them_first(
    machine: Make, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(block_store, "any_way", lambda ways: None)
    m = tuned(machine, f"start: cmp rax, rbx\n {way}\n pushfq\n pop rdx\n hlt")
    m.put("ret\n align 8\n jmp rcx", CODE + 0x1000)
    expected = machine("start: cmp rax, rbx\n pushfq\n pop rdx\n hlt")
    for rax, rbx in _COMPARED:
        for _ in range(2):  # the second time all links and the jump cache are there
            m.halt("start", rax=rax, rbx=rbx, rsi=DATA, rsp=STACK)
        expected.halt("start", rax=rax, rbx=rbx)
        assert (m["rdx"] ^ expected["rdx"]) & ARITHMETIC == 0


@pytest.mark.parametrize("loop", ["jmp again", "jmp on\n ud2\n on: lea rdi, [rdi+1]\n jmp again"])
def test_an_interrupt_shows_flags_that_a_block_has_parked_first(machine: Make, loop: str) -> None:
    for rax, rbx in _COMPARED:
        m = tuned(machine, f"cmp rax, rbx\n pushfq\n pop rdx\n sti\n jmp again\n again: mov rcx, [rsi]\n {loop}")
        m.board.clock.at(m.board.clock.now() + 10_000_000, lambda m=m: m.interrupt(0x40))  # type: ignore[misc]
        frame = m.fault(rax=rax, rbx=rbx, rsi=DATA)
        assert frame.vector == 0x40
        assert (frame.rflags ^ m["rdx"]) & ARITHMETIC == 0


_REGISTERS = ("rax", "rcx", "rbx", "rsi", "rdi", "r9", "r10", "r11", "r12", "r15")


def _program(rng: random.Random) -> str:
    """Code with many accesses off few registers, which move a little."""
    base, data = rng.sample(("rbx", "rbp", "r11", "r13", "r15"), 2)
    others = [r for r in _REGISTERS if r not in (base, data)]
    lines = []
    depth = 0
    for _ in range(rng.randrange(6, 20)):
        register, displacement = rng.choice(others), 8 * rng.randrange(-9, 9) + rng.randrange(2)
        off = rng.choice((base, base, data, "rsp"))
        kinds = [
            f"push {register}", f"mov {register}, [{off}+{displacement}]", f"mov [{off}+{displacement}], {register}",
            f"add {register}, [{off}+{displacement}]", f"add dword [{off}+{displacement}], 5", "cmp rax, rcx",
            f"movzx ecx, byte [{off}+{displacement}]", f"lea {base}, [{base}+{displacement & ~7}]",
            f"add {base}, {displacement & ~7}", f"sub {data}, 8", f"adc {register}, rcx", f"mov {register}, {base}",
            "bt rax, rcx", f"xchg [{off}+{displacement}], {register}", "sub rsp, 16", f"movq xmm1, [{off}+{displacement}]",
            f"movzx ecx, byte [{off}+{displacement}]\n {rng.choice(('mov', 'add'))} {register}, [{base}+rcx*2+{displacement}]",
            f"movzx edx, byte [{off}+{displacement}]\n add [{data}+rdx+{displacement}], {register}\n"
            f" cmp {register}, [{data}+rdx+{displacement + 8}]\n {rng.choice(('adc dl, 3', 'setc dl', 'nop'))}",
            f"movdqu [{off}+{displacement}], xmm1", f"lock xadd [{off}+{displacement}], {register}",
        ]  # fmt: skip
        if depth:
            kinds += [f"pop {register}"] * 4
        line = rng.choice(kinds)
        depth += line.startswith("push") - line.startswith("pop") + 2 * line.startswith("sub rsp")
        lines.append(line)
    return "\n".join([*lines, "hlt"])


def test_random_groups_do_what_single_accesses_do(machine: Make) -> None:
    """Around a page's end, where groups fail, and within."""
    m = machine("hlt")
    m.map(PAGE - 0x1000, ONE)
    m.map(PAGE, TWO)
    tuned_blocks = 0
    for seed in range(150):
        rng = random.Random(seed)
        m.put(_program(rng), m.origin)
        near = PAGE + rng.choice((-0x800, -0x20, 0, 0x28, 0x800))
        registers = {name: rng.getrandbits(64) for name in _REGISTERS}
        registers |= {name: near + 8 * rng.randrange(-8, 8) for name in ("rbx", "rbp", "r11", "r13", "r15", "rsp")}
        contents = rng.randbytes(0x1000), rng.randbytes(0x1000)
        outcomes = []
        for at_once in (False, True):
            m.vcpu.memory_written(m.origin, 0x1000)
            m.vcpu.blocks.flush()
            m.vcpu.blocks.tunes_at_once = at_once
            before = made(m)
            m.memory.write(ONE, contents[0])
            m.memory.write(TWO, contents[1])
            m.restart()
            m.halt(**registers)
            outcomes.append((list(m.core.regs), m.core.rflags, m.memory.read(ONE, 0x1000), m.memory.read(TWO, 0x1000)))
            tuned_blocks += made(m) - before
        assert outcomes[0] == outcomes[1], f"seed {seed}"
    assert tuned_blocks > 100


def test_a_step_leaves_no_sampling_behind(machine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample in the caller's own code would be a signal that it does not expect."""
    periods = [0]
    monkeypatch.setattr(Sampler, "every", lambda self, period: periods.append(period))
    m = machine("sti\n hlt\n hlt")
    m.board.clock.at(m.board.clock.now() + 1_000_000, lambda: m.interrupt(0x40))
    for _ in range(3):
        m.step()
    assert periods[-1] == 0
