"""Pieces of more than one instruction: branches, loops, code that changes itself, flags through the stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, OpKind, Register

from trivisor.insight.differential import tables
from trivisor.insight.differential.case import DATA, PAGE
from trivisor.insight.differential.draft import RAX, RCX, RDX, RSP, Draft, Impossible

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Code as CodeNumber


def add_branch(draft: Draft) -> None:
    """A jump over the next few instructions, or a CALL or RET to the next."""
    kind = draft.random.random()
    if kind < 0.1:
        _modify_code(draft)
    elif kind < 0.5:
        _skip(draft, draft.random.choice(tables.JCC[draft.bits]))
    elif kind < 0.6:
        if draft.random.random() < 0.5:
            draft.ensure(RCX, draft.random.choice((0, 1, 2, 1 << 32, (1 << 32) + 1)))
        _skip(draft, draft.random.choice(tables.LOOPS[draft.bits]))
    elif kind < 0.7:
        _skip(draft, draft.random.choice(tables.JUMPS[draft.bits]))
    elif kind < 0.8:
        draft.add(Instruction.create_branch(tables.CALL[draft.bits], 0), len(draft.items) + 1)
    elif kind < 0.9:
        _indirect(draft)
    else:
        _return(draft)


def add_nest(draft: Draft, fill: Callable[[int], None]) -> None:
    """A loop or a procedure around what `fill` adds, a number of pieces."""
    start = len(draft.items)
    if draft.random.random() < 0.6:
        _loop(draft, fill)
    else:
        _procedure(draft, fill)
    end = len(draft.items)
    draft.nests.append((start, end))
    draft.skipped_to = min(draft.skipped_to, end)


def _body(draft: Draft, fill: Callable[[int], None], length: int) -> int:
    """Add the inside of a nest, out of which no branch leads; returns where it begins.

    It must come to the same addresses each time that it runs.
    """
    start, before = len(draft.items), dict(draft.known)
    settled, relied = draft.settled, draft.relied
    draft.settled, draft.relied = set(), set()
    draft.depth += 1
    fill(length)
    draft.depth -= 1
    end = len(draft.items)
    changed = {number for number in before if draft.known.get(number) != before[number]}
    if end == start or changed & draft.relied:
        raise Impossible
    for item in draft.items[start:]:
        if item.target is not None:
            item.target = min(item.target, end)
    draft.settled, draft.relied = settled, relied | (draft.relied - settled)
    return start


def _skip(draft: Draft, code: CodeNumber) -> None:
    """A jump forward."""
    target = len(draft.items) + 1 + draft.random.choice((0, 1, 1, 2, 3))
    draft.add(Instruction.create_branch(code, 0), target)


def _loop(draft: Draft, fill: Callable[[int], None]) -> None:
    """Some instructions a few times."""
    random = draft.random
    counter = random.choice((RCX, RCX, *(n for n in range(len(draft.registers)) if n != RSP)))
    draft.known.pop(counter, None)
    first = len(draft.items)
    draft.ensure(counter, random.choice((1, 2, 3, 4, 5, 6, random.randrange(1, 40))))
    draft.items[-1].keep = False
    del draft.known[counter]
    before = dict(draft.known)
    start = _body(draft, fill, random.choice((1, 1, 2, 3, 4, 6)))
    if draft.writes(start, counter):
        raise Impossible
    end = len(draft.items)
    _count_down(draft, counter, start)
    _tie(draft, [first, *range(end, len(draft.items))])
    draft.known = {n: value for n, value in before.items() if draft.known.get(n) == value}


def _tie(draft: Draft, numbers: list[int]) -> None:
    """Have a case lose these items together or not at all."""
    group = 1 + max(item.group for item in draft.items)
    for number in numbers:
        draft.items[number].group = group


def _count_down(draft: Draft, counter: int, start: int) -> None:
    """The end of a loop: one less, and back to item `start` unless that was the last."""
    random, register, wide = draft.random, draft.registers[counter], draft.bits == 64
    kind = random.random()
    if counter == RCX and kind < 0.4:
        draft.append(Instruction.create_branch(random.choice(tables.LOOPS[draft.bits]), 0), start)
        return
    if kind < 0.8:
        down = Instruction.create_reg(Code.DEC_RM64 if wide else Code.DEC_RM32, register)
    else:
        code = Code.SUB_RM64_IMM8 if wide else Code.SUB_RM32_IMM8
        down = Instruction.create_reg_i32(code, register, 1)
    draft.append(down, keep=True)
    back = random.choice(("JNE", "JNE", "JG", "JNS" if kind > 0.9 else "JNE"))
    kind16 = random.choice(("8_16", "16"))
    size = kind16 if draft.bits == 16 else f"{random.choice((8, 32))}_{draft.bits}"
    draft.append(Instruction.create_branch(getattr(Code, f"{back}_REL{size}"), 0), start)


def _procedure(draft: Draft, fill: Callable[[int], None]) -> None:
    """A procedure, jumped over, that one or two CALLs after it lead to."""
    random = draft.random
    if RSP not in draft.known:
        raise Impossible
    stack = draft.value(RSP)
    slot = stack - draft.bits // 8
    linear = slot + draft.bases[Register.SS]
    if not DATA + 64 <= linear < DATA + 3 * PAGE - 8:
        raise Impossible
    jump = len(draft.items)
    draft.append(Instruction.create_branch(random.choice(tables.JUMPS[draft.bits]), 0), jump)
    before = dict(draft.known)
    draft.known[RSP] = slot
    draft.guards.append(linear)
    start = _body(draft, fill, random.choice((1, 2, 3, 4)))
    draft.guards.pop()
    if draft.known.get(RSP) != slot:
        raise Impossible
    end = len(draft.items)
    back = Instruction()
    back.code = tables.RETURN[draft.bits]
    draft.append(back)
    draft.items[jump].target = end + 1
    for _ in range(random.choice((1, 1, 2))):
        draft.append(Instruction.create_branch(tables.CALL[draft.bits], 0), start)
    _tie(draft, [jump, *range(end, len(draft.items))])
    draft.known[RSP] = stack
    draft.known = {n: value for n, value in before.items() if draft.known.get(n) == value}


def _modify_code(draft: Draft) -> None:
    """A store into the immediate of the instruction after it."""
    if draft.bits != 64 and (draft.bases[Register.DS] or draft.bases[Register.CS]):
        raise Impossible
    random = draft.random
    store = Instruction()
    store.code = Code.MOV_RM32_IMM32
    store.set_op_kind(0, OpKind.MEMORY)
    store.memory_base = Register.RIP if draft.bits == 64 else Register.NONE
    store.memory_displ_size = draft.bits // 8
    store.set_op_kind(1, OpKind.IMMEDIATE32)
    store.set_immediate_u32(1, random.getrandbits(32))
    draft.append(store, len(draft.items) + 1, keep=True)
    number = random.choice((0, 3, 6, 10, 13) if draft.bits == 64 else (0, 3, 6))
    draft.known.pop(number, None)
    register, value = draft.registers[number], random.getrandbits(draft.bits)
    if draft.bits == 64:
        draft.append(Instruction.create_reg_u64(Code.MOV_R64_IMM64, register, value))
    else:
        draft.append(Instruction.create_reg_u32(Code.MOV_R32_IMM32, register, value))


def _indirect(draft: Draft) -> None:
    """JMP or CALL to the next instruction through a register or memory."""
    random = draft.random
    jump = Instruction()
    jump.code = random.choice((tables.CALL_INDIRECT, tables.JUMP_INDIRECT))[draft.bits]
    if random.random() < 0.5:
        number = random.choice([n for n in range(len(draft.registers)) if n != RSP])
        _address_of(draft, number, len(draft.items) + 2)
        jump.set_op_kind(0, OpKind.REGISTER)
        jump.set_op_register(0, (tables.R16 if draft.bits == 16 else draft.registers)[number])
        draft.add(jump)
        return
    jump.set_op_kind(0, OpKind.MEMORY)
    place = DATA + random.randrange(0, 2 * PAGE, 4)
    stack = draft.known.get(RSP, 0) + draft.bases[Register.SS]
    if draft.guards or len(draft.items) > 2 or abs(place - stack) < 64:
        raise Impossible  # what runs before might write there
    draft.point(jump, place)
    draft.add(jump)
    draft.pokes.append((place, len(draft.items)))


def _address_of(draft: Draft, number: int, item: int) -> None:
    """Load a register with the address of an item."""
    register = draft.registers[number]
    if draft.bits == 64:
        lea = Instruction()
        lea.code = Code.LEA_R64_M
        lea.set_op_kind(0, OpKind.REGISTER)
        lea.set_op_register(0, register)
        lea.set_op_kind(1, OpKind.MEMORY)
        lea.memory_base = Register.RIP
        lea.memory_displ_size = 8
        draft.append(lea, item, keep=True)
    else:
        draft.append(Instruction.create_reg_u32(Code.MOV_R32_IMM32, register, 0), item, keep=True)
    draft.known.pop(number, None)


def _return(draft: Draft) -> None:
    """RET to the next instruction, whose address a PUSH has put on the stack."""
    if RSP not in draft.known or draft.rip >> 31:
        raise Impossible
    random = draft.random
    draft.add(Instruction.create_i32(tables.PUSH_CONSTANT[draft.bits], 0), len(draft.items) + 2, keep=True)
    if random.random() < 0.4:
        draft.add(Instruction.create_i32(tables.RETURN_AND_DROP[draft.bits], random.randrange(0, 64)))
    else:
        back = Instruction()
        back.code = tables.RETURN[draft.bits]
        draft.add(back)


def add_special(draft: Draft) -> None:
    """POPF and PUSHF, DF and other flags, the XSAVE family."""
    random = draft.random
    kind = random.random()
    instruction = Instruction()
    if kind < 0.1:
        _save_state(draft)
        return
    if kind < 0.3:
        instruction.code = random.choice(tables.PUSH_FLAGS[draft.bits])
    elif kind < 0.6:
        value = random.getrandbits(12) & 0x8D5 | 0x200
        value |= random.choice((0, 0, 0, 0x400, 0x200000))
        push = Instruction.create_i32(tables.PUSH_CONSTANT[draft.bits], value & 0xFFFF if draft.bits == 16 else value)
        draft.add(push, keep=True)
        instruction.code = tables.POP_FLAGS[draft.bits]
    elif kind < 0.75:
        instruction.code = random.choice((Code.STD, Code.CLD))
    else:
        instruction.code = random.choice((Code.CLC, Code.STC, Code.CMC, Code.LAHF, Code.SAHF))
    draft.add(instruction)


def _save_state(draft: Draft) -> None:
    """An instruction of the XSAVE family; one that restores mostly faults, on what is no such image."""
    random = draft.random
    if not draft.may_store_x87 or draft.bits != 64:
        raise Impossible
    draft.ensure(RAX, random.choice((7, 7, 3, 1, 2, 4, 0, 6)))
    draft.ensure(RDX, 0)
    instruction = Instruction()
    instruction.code = random.choice(tables.XSAVE_FAMILY)
    instruction.set_op_kind(0, OpKind.MEMORY)
    # All of the area must be there: the translator does not look only at the parts that are asked for.
    place = DATA + random.randrange(0, 2 * PAGE, 64)
    if random.random() < 0.1:
        place += random.choice((8, 1))
    draft.point(instruction, place)
    draft.add(instruction)
