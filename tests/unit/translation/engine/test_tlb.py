"""When changed page tables must take effect (Intel SDM 3A 4.10.4): INVLPG, CR3, global pages, CR4.PGE."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import LARGE, NX, PD, TABLE_POOL, G, Make, P, U, W

ONE, TWO = 0x400000, 0x500000
"""Physical pages with different contents."""
PAGE = 0x10_0000_0000
"""A linear page that leads to one or the other."""
ENTRY = TABLE_POOL + 0x1000 + 8 * (PAGE >> 12 & 511)
"""Where its entry is, the first thing that a test maps."""
_READ = "mov rax, [r8]\n"


@pytest.mark.parametrize(
    ("flush", "flags", "effect"),
    [
        ("invlpg [r8]", 7, True),
        ("invlpg [r8+0xfff]", 7, True),
        ("invlpg [r8]", 7 | G, True),
        ("mov rax, cr3\n mov cr3, rax", 7, True),
        ("mov rax, cr4\n xor rax, 0x80\n mov cr4, rax\n xor rax, 0x80\n mov cr4, rax", 7 | G, True),
        ("mov rax, cr4\n xor rax, 0x80\n mov cr4, rax", 7 | G, True),
        ("mov rax, cr0\n xor rax, 0x10000\n mov cr0, rax", 7 | G, True),
        ("mov rax, cr3\n mov cr3, rax", 7 | G, False),
        ("invlpg [r8+0x1000]", 7, False),
    ],
)
def test_a_page_mapped_elsewhere(machine: Make, flush: str, flags: int, effect: bool) -> None:
    """For data and for code alike.  Without an effect demanded, a global page shows that it is kept."""
    m = machine(
        f"""
        mov rcx, cr4
        or rcx, 0x80
        mov cr4, rcx
        mov rbx, [r8+0x80]
        call r8
        mov edx, eax
        mov [r9], r10
        {flush}
        mov rdi, [r8+0x80]
        call r8
        mov esi, eax
        hlt
        """
    )
    assert m.map(PAGE, ONE, flags) == ENTRY
    for physical, value in ((ONE, 1), (TWO, 2)):
        m.put(f"mov eax, {value}\n ret", physical)
        m.memory.write_u64(physical + 0x80, value)
    m.halt(r8=PAGE, r9=ENTRY, r10=TWO | flags)
    assert (m["rbx"], m["rdx"]) == (1, 1)
    if effect:
        assert (m["rdi"], m["rsi"]) == (2, 2)
    elif flags & G:
        assert m["rdi"] == 1


@pytest.mark.parametrize("count", [1, 40, 120, 129, 400])
@pytest.mark.parametrize("step", [0x1000, 0x3000])
def test_mov_to_cr3_drops_every_page_however_many_there_were(machine: Make, count: int, step: int) -> None:
    """Data and code of pages that are not global: few are dropped one by one, many by a walk over the TLBs."""
    m = machine(
        """
        mov r14d, 6
        xor ebx, ebx
        again:
        mov rcx, r8                  ; read and call each page: one of two numbers
        mov r13d, r12d
        page:
        add rbx, [rcx+0x80]
        call rcx
        add rbx, rax
        add rcx, r15
        dec r13d
        jnz page
        mov rcx, r9                  ; then map the other page everywhere
        mov r13d, r12d
        entry:
        xor qword [rcx], r10
        lea rcx, [rcx+r11]
        dec r13d
        jnz entry
        mov rax, cr3
        mov cr3, rax
        dec r14d
        jnz again
        hlt
        """
    )
    first = [m.map(PAGE + 0x1000 * number, ONE) for number in range(3 * 512)]
    assert first[0] == ENTRY
    assert first == list(range(ENTRY, ENTRY + 3 * 4096, 8)), "one table after the other"
    for physical, value in ((ONE, 1), (TWO, 100)):
        m.put(f"mov eax, {value}\n ret", physical)
        m.memory.write_u64(physical + 0x80, value)
    m.halt(r8=PAGE, r9=ENTRY, r10=ONE ^ TWO, r11=8 * step // 0x1000, r12=count, r15=step)
    assert m["rbx"] == 3 * count * (2 + 200)


@pytest.mark.parametrize("base", [0x1_4000_0000, 0x1_4020_0000])
def test_invlpg_of_any_address_in_a_large_page(machine: Make, base: int) -> None:
    """Every piece of the large page goes, data and code, also pieces long evicted from the fetch TLB."""
    m = machine(
        """
        mov r14d, 3                  ; more than once, so that the jump cache has it all
        mov rbx, [r8]
        again:
        mov rcx, [r8+0x3080]
        call r8
        mov edx, eax
        lea r11, [r8+0x3000]
        call r11
        call r12                     ; takes the same place in the fetch TLB
        lea r13, [r12+0x3000]
        call r13
        dec r14d
        jnz again
        mov [r9], r10
        invlpg [r8+0x12345]
        mov rsi, [r8+0x3080]
        call r8
        mov edi, eax
        call r11
        mov ebp, eax
        hlt
        """
    )
    pd = 0x50000
    m.memory.write_u64(0x2000 + 8 * (base >> 30), pd | 7)
    entry = pd + 8 * (base >> 21 & 511)
    m.memory.write_u64(entry, ONE | 7 | LARGE)
    for physical, value in ((ONE, 1), (ONE + 0x200000, 2)):
        for offset in (0, 0x3000):
            m.put(f"mov eax, {value}\n ret", physical + offset)
            m.memory.write_u64(physical + offset + 0x80, value)
    other = PAGE + (base & 0x1FFFFF) + 0x40  # another place in the jump cache
    m.map(other - 0x40, 0x900000)
    m.map(other + 0x3000 - 0x40, 0x903000)
    for at in (0x900040, 0x903040):
        m.put("mov eax, 3\n ret", at)
    m.halt(r8=base, r9=entry, r10=ONE + 0x200000 | 7 | LARGE, r12=other)
    assert (m["rcx"], m["rdx"]) == (1, 1)
    assert (m["rsi"], m["rdi"], m["rbp"]) == (2, 2, 2)


@pytest.mark.parametrize("pieces", [(0,), (0x5000,), (0, 0x5000), (0x5000, 0, 0x5000)])
@pytest.mark.parametrize("invalidated", [0, 0x5000, 0x9000])
def test_invlpg_with_few_pieces_of_a_large_page(machine: Make, pieces: tuple[int, ...], invalidated: int) -> None:
    """However many of its pieces a TLB has had, twice over."""
    base = 0x1_4000_0000
    touch = "\n".join(f"mov rcx, [r8+{piece}]" for piece in pieces)
    again = "\n".join(f"mov rcx, [r8+{piece}]\n add rsi, rcx" for piece in pieces)
    m = machine(
        f"""
        {touch}
        mov [r9], r10
        invlpg [r8+{invalidated}]
        {again}
        mov [r9], r11
        invlpg [r8+{invalidated}]
        {again}
        hlt
        """
    )
    pd = 0x50000
    m.memory.write_u64(0x2000 + 8 * (base >> 30), pd | 7)
    entry = pd + 8 * (base >> 21 & 511)
    m.memory.write_u64(entry, ONE | 7 | LARGE)
    for physical, value in ((ONE, 1), (ONE + 0x200000, 0x10), (ONE + 0x400000, 0x100)):
        for offset in pieces:
            m.memory.write_u64(physical + offset, value)
    m.halt(r8=base, r9=entry, r10=ONE + 0x200000 | 7 | LARGE, r11=ONE + 0x400000 | 7 | LARGE, rsi=0)
    assert m["rsi"] == 0x110 * len(pieces)


def test_invlpg_keeps_the_flags(machine: Make) -> None:
    m = machine("std\n cmp edx, 1\n invlpg [r8]\n pushfq\n pop rbx\n cld\n hlt")
    m.halt(r8=PAGE, rdx=0)
    assert m["rbx"] & 0x4D5 == 0x495


@pytest.mark.parametrize("flush", ["invlpg [r8]", "mov rcx, cr3\n mov cr3, rcx"])
@pytest.mark.parametrize(
    ("after", "instruction", "code"),
    [
        (P | U, "mov [r8], eax", 3), (0, "mov eax, [r8]", 0), (P | W | U | NX, "call r8", 17), (0, "call r8", 16),
        (0, "mov [r8], eax", 2), (P | U, "push qword [r8]\n pop qword [r8]", 3),
    ],
)  # fmt: skip
def test_taken_permissions_take_effect_with_a_flush(
    machine: Make, flush: str, after: int, instruction: str, code: int
) -> None:
    m = machine(f"{instruction}\n mov [r9], r10\n {flush}\n here: {instruction}\n hlt")
    m.map(PAGE, ONE)
    m.memory.write(ONE, b"\xc3")  # ret
    frame = m.fault(r8=PAGE, r9=ENTRY, r10=ONE | after, rax=0xC3)
    assert (frame.vector, frame.error, m.core.cr2) == (14, code, PAGE)


def test_given_permissions_take_effect_without_a_flush(machine: Make) -> None:
    """A page fault never comes from an old TLB entry for good: the walk that it needs sees the tables."""
    m = machine("mov eax, [r8]\n mov [r9], r10\n mov dword [r8], 5\n mov ebx, [r8]\n hlt")
    m.map(PAGE, ONE, P | U)
    m.halt(r8=PAGE, r9=ENTRY, r10=ONE | 7)
    assert m["rbx"] == 5


def test_a_fault_is_not_remembered(machine: Make) -> None:
    m = machine("here: mov eax, [r8]\n hlt\n handler: mov [r9], r10\n add rsp, 8\n iretq")
    m.map(PAGE, 0, 0)
    m.memory.write_u32(ONE, 77)
    m.gate(14, "handler")
    m.halt(r8=PAGE, r9=ENTRY, r10=ONE | 7)
    assert m["rax"] == 77


def test_user_and_supervisor_have_their_own_rights(machine: Make) -> None:
    """The kernel reads a page first; the user must fault on it none the less, and the other way round with SMEP."""
    m = machine(
        "mov eax, [r8]\n push USER_DS|3\n push USER_STACK\n push 2\n push USER_CS|3\n push user\n iretq\n"
        "user: mov eax, [r8]\n hlt"
    )
    m.map(PAGE, ONE, P | W)
    frame = m.fault(r8=PAGE)
    assert (frame.vector, frame.error, frame.rip, m.core.cr2) == (14, 5, m.labels["user"], PAGE)


def test_clearing_the_accessed_and_dirty_bits_with_invlpg(machine: Make) -> None:
    m = machine("mov [r8], eax\n mov [r9], r10\n invlpg [r8]\n mov eax, [r8]\n mov rbx, [r9]\n mov [r8], eax\n hlt")
    m.map(PAGE, ONE)
    m.halt(r8=PAGE, r9=ENTRY, r10=ONE | 7)
    assert m["rbx"] & 0x60 == 0x20
    assert m.memory.read_u64(ENTRY) & 0x60 == 0x60


def test_address_spaces(machine: Make) -> None:
    """Two CR3 values in turn: data, code and stack of the one never show in the other."""
    m = machine(
        """
        mov ecx, 8
        xor r12d, r12d
        again:
        mov cr3, r9
        call r8
        add r12d, eax
        add r12d, [r8+0x80]
        mov cr3, r10
        call r8
        shl eax, 16
        add r12d, eax
        mov eax, [r8+0x80]
        shl eax, 16
        add r12d, eax
        dec ecx
        jnz again
        hlt
        """
    )
    m.map(PAGE, ONE)
    second = 0x50000
    tables = [m.memory.read(at, 0x1000) for at in (0x1000, 0x2000)]
    m.memory.write(second, tables[0])
    m.memory.write(second + 0x1000, tables[1])
    m.memory.write_u64(second, second + 0x1000 | 7)
    pdpt_entry = second + 0x1000 + 8 * (PAGE >> 30 & 511)
    m.memory.write_u64(pdpt_entry, second + 0x2000 | 7)
    m.memory.write_u64(second + 0x2000, second + 0x3000 | 7)
    m.memory.write_u64(second + 0x3000, TWO | 7)
    for physical, value in ((ONE, 1), (TWO, 2)):
        m.put(f"mov eax, {value}\n ret", physical)
        m.memory.write_u64(physical + 0x80, value)
    m.halt(r8=PAGE, r9=0x1000, r10=second)
    assert m["r12"] == 16 + (32 << 16)


@pytest.mark.parametrize("flags", [7, 7 | G])
@pytest.mark.parametrize("jump", ["call r11", "call over"])
@pytest.mark.parametrize("flush", ["invlpg [r8+0x1000]", "mov rcx, cr3\n mov cr3, rcx", ""])
def test_an_instruction_across_pages_whose_second_page_is_mapped_elsewhere(
    machine: Make, flush: str, jump: str, flags: int
) -> None:
    """A block is found by its first page, so the second wants looking after; `jump over` leads there in its page."""
    m = machine(
        f"""
        mov rcx, cr4
        or rcx, 0x80
        mov cr4, rcx
        mov r14d, 3
        again:
        call r12
        mov ebx, eax
        dec r14d
        jnz again
        mov [r9], r10
        {flush}
        call r12
        mov edx, eax
        mov cr3, r13
        call r12
        hlt
        """
    )
    m.map(PAGE, ONE, flags)
    m.map(PAGE + 0x1000, TWO)
    m.memory.write(ONE + 0xFFE, b"\xb8\x01")  # mov eax, 1 + ...
    m.put("jmp near_it\n times 8 nop\n near_it: nop\n", ONE + 0xFE0)
    m.memory.write(ONE + 0xFEB, b"\x90" * (0xFFE - 0xFEB))
    m.memory.write(TWO, b"\x00\x00\x00\xc3")
    m.memory.write(TWO + 0x1000, b"\x00\x00\x02\xc3")
    entry = PAGE + (0xFE0 if jump == "call over" else 0xFFE)
    m.halt(r8=PAGE, r9=ENTRY + 8, r10=TWO + 0x1000 | 7, r12=entry, r13=0x1000)
    assert m["rbx"] == 1
    if flush:
        assert m["rdx"] == 0x02000001
    assert m["rax"] == 0x02000001
    m.map(PAGE + 0x1000, TWO)
    m.flush()
    m.core.rip = entry
    m.step()
    while m.core.rip & 0xFFF > 0x100:
        m.step()
    assert m["rax"] == 1  # single steps too


def test_code_that_unmaps_itself(machine: Make) -> None:
    m = machine("jmp r8")
    m.map(PAGE, ONE)
    labels = m.put("bits 64\n self: mov [r9], r10\n invlpg [r8]\n back: nop\n hlt", ONE)
    m.put("mov [r9], r10\n invlpg [r8]\n mov ebx, 7\n hlt", TWO)
    m.halt(r8=PAGE, r9=ENTRY, r10=TWO | 7)
    assert m["rbx"] == 7
    assert labels["self"] == ONE


def test_cr0_wp_and_nxe_and_smep_take_effect_at_once(machine: Make) -> None:
    m = machine("mov [r8], eax\n mov rcx, cr0\n or rcx, 0x10000\n mov cr0, rcx\n here: mov [r8], eax\n hlt")
    state = m.initial_state()
    state.cr0 &= ~0x10000
    m.vcpu.state = state
    m.map(PAGE, ONE, P | U)
    frame = m.fault(r8=PAGE)
    assert (frame.vector, frame.error, frame.rip) == (14, 3, m.labels["here"])

    m = machine("call r8\n mov rcx, cr4\n or rcx, 0x100000\n mov cr4, rcx\n call r8\n hlt")
    for i in range(32):
        m.memory.write_u64(PD + 8 * i, i << 21 | P | W | LARGE)
    m.map(PAGE, ONE)
    m.memory.write(ONE, b"\xc3")
    frame = m.fault(r8=PAGE)
    assert (frame.vector, frame.error, m.core.cr2) == (14, 17, PAGE)
