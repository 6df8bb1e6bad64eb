"""Control flow keeps every flag: across blocks, pages, and conflicts in the jump cache, which has 64 Ki entries."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import CODE, DATA, Make

FAR = CODE + 0x10000
FARTHER = CODE + 0x20000
"""Code addresses that are equal modulo 64 KiB, so that each pushes the other out of the jump cache."""
FLAGS = 0x8D5
_TRANSFERS = {
    "call": ("call there", "ret"),
    "indirect call": ("call r12", "ret"),
    "call through memory": ("call [DATA]", "ret"),
    "jump": ("jmp there", "jmp r13"),
    "indirect jump": ("jmp r12", "jmp r13"),
    "jump through memory": ("jmp [DATA]", "jmp [DATA+8]"),
    "push and return": ("push r13\n push r12\n ret", "ret"),
    "conditional": ("jrcxz back\n jmp there", "jmp r13"),
}


@pytest.mark.parametrize("kind", _TRANSFERS)
@pytest.mark.parametrize("where", [CODE + 0x800, CODE + 0x1000, FAR, FARTHER + 0x300])
def test_flags_survive(machine: Make, kind: str, where: int) -> None:
    """For all values of the arithmetic flags: set them, go there and back, and look."""
    go, come_back = _TRANSFERS[kind]
    m = machine("hlt")
    m.put(come_back, where)
    m.labels["there"] = where
    m.put(
        f"""
        xor esi, esi
        xor ebx, ebx
        top:
        push rsi
        popf
        {go}
        back:
        pushf
        pop rax
        and eax, {FLAGS}
        cmp eax, esi
        je fine
        inc ebx
        mov edx, esi
        fine:
        or esi, {~FLAGS & 0xFFF}      ; on to the next value that has none but flags
        add esi, 1
        and esi, {FLAGS}
        jnz top
        hlt
        """,
        CODE,
    )
    for name, at in (("there", DATA), ("back", DATA + 8)):
        m.memory.write_u64(at, m.labels[name])
    m.halt(CODE, rcx=1, r12=where, r13=m.labels["back"])
    assert m["rbx"] == 0, f"flags {m['rdx']:#x} were not kept"


def test_two_conflicting_targets_in_turn(machine: Make) -> None:
    """Each call finds the other's block in the jump cache; the flags that it passes must come through."""
    m = machine(
        f"""
        mov ecx, 200
        xor ebx, ebx
        mov r8d, {FAR}
        mov r9d, {FARTHER}
        top:
        stc
        call r8
        clc
        call r9
        stc
        call r9
        clc
        call r8
        xchg r8, r9
        dec ecx
        jnz top
        hlt
        """
    )
    m.put("adc ebx, 0\n ret", FAR)
    m.put("adc ebx, 0x10000\n ret", FARTHER)
    m.halt()
    # of the four calls a round one each has the carry, whichever way round the targets are
    assert m["rbx"] == 400 * 0x10000 + 400


def test_flags_set_by_the_callee_reach_the_caller_whatever_it_overwrites(machine: Make) -> None:
    m = machine(
        f"mov ecx, 100\n top: mov eax, {FAR}\n call rax\n jnc bad\n jz bad\n jns bad\n jpe bad\n jo bad\n"
        f"mov eax, {FARTHER}\n call rax\n jc bad\n jnz bad\n dec ecx\n jnz top\n hlt\n bad: ud2"
    )
    m.put("mov eax, 0x10\n sub eax, 0x21\n ret", FAR)  # 0xffffffef: CF, SF, odd parity
    m.put("xor eax, eax\n ret", FARTHER)
    m.halt()


def test_the_direction_flag_lives_across_calls(machine: Make) -> None:
    m = machine(f"std\n mov edi, DATA\n mov eax, {FAR}\n call rax\n stosb\n cld\n mov eax, {FAR}\n call rax\n stosb\n hlt")
    m.put("nop\n ret", FAR)
    m.halt()
    assert m["rdi"] == DATA


@pytest.mark.parametrize("bits", [32, 64])
def test_pushf_popf_lahf_sahf(machine: Make, bits: int) -> None:
    r = "r" if bits == 64 else "e"
    m = machine(
        f"""
        mov ecx, 0
        top:
        mov edx, ecx
        and edx, 0xcd5
        push {r}dx
        popf
        pushf
        pop {r}ax
        and eax, 0xcd5
        cmp eax, edx
        jne bad
        cld
        mov ah, dl
        sahf
        lahf
        mov al, ah
        xor al, dl
        test al, 0xd5
        jne bad
        test ah, 2
        jz bad
        inc ecx
        cmp ecx, 0x1000
        jne top
        hlt
        bad: ud2
        """,
        bits,
    )
    m.halt()


def test_popf_changes_what_the_level_may_change(machine: Make) -> None:
    m = machine("push 0x247ed7\n popf\n pushf\n pop rax\n push 2\n popf\n hlt")
    m.halt()
    assert m["rax"] == 0x247ED7
    m = machine("push 0x247ed7\n popf\n pushf\n pop rax\n ud2", cpl=3)
    m.fault()
    assert m["rax"] == 0x244CD7  # neither IF nor IOPL


@pytest.mark.parametrize("condition", ["o", "no", "c", "nc", "z", "nz", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"])
def test_conditions_across_pages(machine: Make, condition: str) -> None:
    """Taken or not must be as SETcc tells, with the target in another page and a checked load in between."""
    m = machine("hlt")
    m.put("mov dl, 1\n jmp r13", FAR)
    m.labels["far"] = FAR
    m.put(
        f"""
        xor esi, esi
        top:
        mov edi, esi
        and edi, {FLAGS}
        push rdi
        popf
        mov eax, [DATA]
        set{condition} bl
        mov dl, 0
        j{condition} far
        back:
        cmp bl, dl
        jne bad
        add esi, 1
        cmp esi, 0x1000
        jne top
        hlt
        bad: ud2
        """,
        CODE,
    )
    m.halt(CODE, r13=m.labels["back"])


def test_deep_recursion(machine: Make) -> None:
    m = machine("mov edi, 20\n call fib\n hlt\n fib: cmp edi, 2\n jb small\n push rdi\n dec edi\n call fib\n pop rdi\n"
                "push rax\n sub edi, 2\n call fib\n pop rdx\n add eax, edx\n ret\n small: mov eax, edi\n ret")  # fmt: skip
    m.halt()
    assert m["rax"] == 6765


def test_code_at_both_ends_of_the_address_space(machine: Make) -> None:
    """Near and far forms of addresses in one program, rip-relative operands included."""
    m = machine("hlt")
    spots = {0xFFFFFFFF81000000: 0x400000, 0xFFFF888000000000: 0x401000, 0x7FFFFFFFF000: 0x402000, 0x7F00000000: 0x403000}
    for linear, physical in spots.items():
        entry = linear & 0xFFFFFFFFFFFF
        m.map(entry, physical)
        labels = m.put("mov eax, [rel value]\n add [rel value], eax\n call next\n next: pop rdx\n add rbx, rdx\n ret\n value: dd 3",
                       physical)  # fmt: skip
        m.put(f"xor ebx, ebx\n mov rax, {linear}\n call rax\n hlt", CODE)
        m.halt(CODE)
        assert m.memory.read_u32(labels["value"]) == 6
        assert m["rbx"] == linear + labels["next"] - physical


def test_loops_and_their_counters(machine: Make) -> None:
    m = machine(
        "mov ecx, 5\n xor eax, eax\n a: inc eax\n loop a\n mov ecx, 5\n b: inc eax\n test eax, 8\n loopz b\n"
        "mov ecx, 3\n c: cmp ecx, 2\n loopnz c\n mov ebx, ecx\n xor ecx, ecx\n jecxz d\n ud2\n d: mov rcx, 1 << 32\n jecxz e\n"
        "ud2\n e: jrcxz f\n hlt\n f: ud2"
    )
    m.halt()
    assert (m["rax"], m["rbx"]) == (8, 1)


@pytest.mark.parametrize("move", ["rep movsq", "rep stosd", "rep movsw"])
@pytest.mark.parametrize("offset", range(1, 9))
def test_repeated_strings_across_pages_keep_out_of_python(machine: Make, move: str, offset: int) -> None:
    m = machine(f"{move}\n hlt")
    source, target = 0x400000 - 16 + offset, 0x500FF0 + offset
    size = {"q": 8, "d": 4, "w": 2}[move[-1]]
    m.memory.write(source, bytes(range(1, 65)))
    m.halt(rsi=source, rdi=target, rcx=40 // size, rax=0x01020304)
    expected = bytes(range(1, 41)) if "movs" in move else bytes((4, 3, 2, 1)) * 10
    assert m.memory.read(target, 41) == expected + b"\0"
    assert m["rdi"] == target + 40
    assert m.vcpu.statistics()["exits"].get("slow_access", 0) == 0
