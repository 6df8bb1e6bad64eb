"""Loops that only count (translator/counted.py) end with the registers that counting one by one would leave."""

from __future__ import annotations

import random

import pytest
from iced_x86 import Decoder

from tests.unit.translation.engine.guest import Make
from trivisor.translation import block_store
from trivisor.translation.translator.counted import run_forward
from trivisor.x86.assembler import assemble

REGISTERS = {
    "rax": "eax", "rbx": "ebx", "rcx": "ecx", "rdx": "edx", "rsi": "esi", "rdi": "edi", "rbp": "ebp", "r8": "r8d",
    "r9": "r9d", "r12": "r12d",
}  # fmt: skip
MASKS = {4: (1 << 32) - 1, 8: (1 << 64) - 1}
HOLDS = {
    "e": lambda a, b: a == b, "ne": lambda a, b: a != b, "ae": lambda a, b: a >= b, "b": lambda a, b: a < b,
    "be": lambda a, b: a <= b, "a": lambda a, b: a > b,
}  # fmt: skip
MOST = 400


def named(register: str, size: int) -> str:
    return register if size == 8 else REGISTERS[register]


def loop_at_random(rng: random.Random) -> list[tuple[str, ...]]:
    """Steps of an iteration: (inc, register, size), (set, register, constant) and (way out, a, b, size, condition)."""
    growing = {register: rng.choice((4, 8)) for register in rng.sample(list(REGISTERS), rng.choice((1, 2)))}
    others = [register for register in REGISTERS if register not in growing]
    fixed = others.pop()
    steps: list[tuple[str, ...]] = [("inc", register, str(size)) for register, size in growing.items()]
    if rng.random() < 0.5:
        steps.append(("set", fixed, str(rng.choice((0, 0, 1, 17)))))
    for _ in range(rng.choice((1, 2, 3))):
        a = rng.choice([*growing, rng.choice(others), fixed])
        size = growing.get(a, rng.choice((4, 8)))
        b = rng.choice([rng.choice(others), fixed, str(rng.choice((0, 5, 0x7F, -1)))])
        if rng.random() < 0.2:
            a, b = (b, a) if b in REGISTERS else (a, b)
        conditions = "e ne ae b" if rng.random() < 0.9 else "be a"
        steps.append(("out", a, b, str(size), rng.choice(conditions.split())))
    rng.shuffle(steps)
    a = rng.choice(list(growing))
    steps.append(("out", a, rng.choice(others), str(growing[a]), rng.choice("e ne ne ne ae b b b".split())))
    return steps


def text(steps: list[tuple[str, ...]], labels: int) -> str:
    """As assembly: each way out but the last leads to a place of its own, which notes its number in r13."""
    lines = ["head:"]
    for number, step in enumerate(steps):
        match step:
            case ("inc", register, size):
                lines.append(f"inc {named(register, int(size))}")
            case ("set", register, constant):
                short = named(register, 4)
                lines.append(f"xor {short}, {short}" if constant == "0" else f"mov {short}, {constant}")
            case ("out", a, b, size, condition):
                right = named(b, int(size)) if b in REGISTERS else b
                last = number == len(steps) - 1
                lines.append(f"cmp {named(a, int(size))}, {right}\n j{condition} {'head' if last else f'out_{number}'}")
    lines.append("mov r13d, 99\n hlt")
    lines += [f"out_{number}: mov r13d, {number}\n hlt" for number in range(labels)]
    return "\n".join(lines)


def counted_one_by_one(steps: list[tuple[str, ...]], registers: dict[str, int]) -> dict[str, int] | None:
    """The registers after the loop, or None if it takes too long; r13 tells the way out."""
    registers = dict(registers)
    for _ in range(MOST):
        for number, step in enumerate(steps):
            match step:
                case ("inc", register, size):
                    registers[register] = registers[register] + 1 & MASKS[int(size)]
                case ("set", register, constant):
                    registers[register] = int(constant)
                case ("out", a, b, size, condition):
                    mask = MASKS[int(size)]
                    right = (registers[b] if b in REGISTERS else int(b)) & mask
                    holds = HOLDS[condition](registers[a] & mask, right)
                    if number == len(steps) - 1:
                        if not holds:
                            return registers | {"r13": 99}
                    elif holds:
                        return registers | {"r13": number}
    return None


@pytest.mark.parametrize("seed", range(8))
def test_random_loops(machine: Make, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Near each other, near where registers wrap around, and anywhere; with upper halves that 32-bit counting clears."""
    rng = random.Random(seed)
    run = forward = 0
    while run < 60 or forward < 8:
        steps = loop_at_random(rng)
        source = text(steps, len(steps))
        m = machine(source)
        m.vcpu.blocks.tunes_at_once = True
        start = m.labels["head"]
        monkeypatch.setattr(block_store, "any_way", lambda ways, start=start: start if start in ways else ways[-1])
        body = m.memory.read(start, 0x200)
        instructions = list(Decoder(64, body, ip=start))
        end = next(n for n, i in enumerate(instructions) if i.near_branch_target == start)
        turns = {n: i.next_ip for n, i in enumerate(instructions[:end]) if i.is_jcc_short_or_near}
        forward += run_forward(instructions[: end + 1], turns) is not None
        for _ in range(20):
            base = rng.choice((0, 1 << 31, 1 << 32, 1 << 63, 1 << 64, rng.getrandbits(64)))
            growing = {step[1] for step in steps if step[0] == "inc"}
            registers = {
                name: base + rng.choice((rng.randrange(-120, 120), -100 if name in growing else 100)) & MASKS[8]
                for name in REGISTERS
            }
            for name in rng.sample(list(REGISTERS), 2):
                registers[name] ^= 1 << 40
            if rng.random() < 0.5:
                registers[rng.choice(list(REGISTERS))] = rng.choice((0, 5, 17))
            expected = counted_one_by_one(steps, registers)
            if expected is None:
                continue
            run += 1
            m.halt("head", r13=0, **registers)
            assert {name: m[name] for name in expected} == expected, (source, registers)


LONG = """
    head: cmp rdi, r9
    jae past
    mov r8, [rsi]
    past: xor r8d, r8d
    cmp ebx, r8d
    jne end
    inc edx
    inc rdi
    cmp edx, eax
    jne head
    end: hlt
"""


def test_a_loop_of_billions_of_iterations_ends_at_once(machine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    m = machine(LONG)
    m.vcpu.blocks.tunes_at_once = True
    start, past = m.labels["head"], m.labels["past"]
    # past the load, and on at each comparison
    monkeypatch.setattr(
        block_store, "any_way", lambda ways: past if past in ways else start if start in ways else ways[-1]
    )
    m.halt("head", rdi=1 << 40, r9=5, rbx=0, rdx=0xFFFFFF00, rax=0xFFFFFEFF)
    assert (m["rdi"], m["rdx"], m["r8"]) == ((1 << 40) + 0xFFFFFFFF, 0xFFFFFEFF, 0)
    m.halt("head", rdi=MASKS[8] - 1000, r9=5, rbx=1, rdx=0, rax=7)
    assert (m["rdi"], m["rdx"]) == (MASKS[8] - 1000, 0)


@pytest.mark.parametrize(
    "source",
    [
        "head: dec ecx\n jnz head",
        "head: inc ecx\n cmp ecx, eax\n jne head",
        "head: inc ecx\n cmp ecx, eax\n je out\n inc ecx\n cmp ecx, ebx\n jne head\n out:",
        "head: inc ecx\n cmp ecx, [rsi]\n je out\n cmp ecx, ebx\n jne head\n out:",
        "head: inc ecx\n cmp ecx, eax\n je out\n pause\n cmp ecx, ebx\n jne head\n out:",
        "head: cmp ecx, eax\n je out\n inc ecx\n jne head\n out:",
        "head: cmp rcx, rax\n je out\n inc ecx\n cmp ecx, ebx\n jne head\n out:",
        "head: cmp ecx, eax\n je out\n inc ecx\n add eax, 3\n cmp ecx, ebx\n jne head\n out:",
        "head: cmp ecx, eax\n jl out\n inc ecx\n cmp ecx, ebx\n jne head\n out:",
        "head: cmp ecx, eax\n je out\n inc ecx\n cmp ecx, r10d\n jne head\n out:",
        "head: cmp esi, r8d\n je out\n xor r8d, r8d\n inc ecx\n cmp ecx, ebx\n jne head\n out:",
        "head: cmp esi, eax\n je out\n cmp esi, ebx\n jne head\n out:",
        "head: cmp ecx, eax\n je out\n inc ecx\n cmp ecx, ebx\n jne other\n out: nop\n other:",
    ],
    ids=[
        "a delay", "one way out", "two steps", "memory", "pause", "flags of a step", "sizes", "adds", "signed", "r10",
        "a constant of the iteration before", "nothing grows", "no loop",
    ],
)  # fmt: skip
def test_other_loops_are_left_alone(source: str) -> None:
    program = assemble(source, origin=0x1000)
    instructions = list(Decoder(64, program.code, ip=0x1000))
    turns = {n: i.next_ip for n, i in enumerate(instructions[:-1]) if i.is_jcc_short_or_near}
    end = max(n for n, i in enumerate(instructions) if i.is_jcc_short_or_near)
    assert run_forward(instructions[: end + 1], turns) is None
