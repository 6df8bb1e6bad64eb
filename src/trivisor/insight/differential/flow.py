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


def add_branch(draft: Draft, add_body: Callable[[], None]) -> None:
    """A jump over the next one or two instructions, a CALL or RET to the next, a loop around `add_body`'s."""
    kind = draft.random.random()
    if kind < 0.08:
        _loop(draft, add_body)
    elif kind < 0.15:
        _modify_code(draft)
    elif kind < 0.5:
        _skip(draft, draft.random.choice(tables.JCC[draft.bits]))
    elif kind < 0.6:
        if draft.random.random() < 0.5:
            draft.ensure(RCX, draft.random.choice((0, 1, 2, 1 << 32, (1 << 32) + 1)))
        _skip(draft, draft.random.choice(tables.LOOPS[draft.bits]))
    elif kind < 0.7:
        short, near = (Code.JMP_REL8_64, Code.JMP_REL32_64), (Code.JMP_REL8_32, Code.JMP_REL32_32)
        _skip(draft, draft.random.choice(short if draft.bits == 64 else near))
    elif kind < 0.8:
        code = Code.CALL_REL32_64 if draft.bits == 64 else Code.CALL_REL32_32
        draft.add(Instruction.create_branch(code, 0), len(draft.items) + 1)
    elif kind < 0.9:
        _indirect(draft)
    else:
        _return(draft)


def _skip(draft: Draft, code: CodeNumber) -> None:
    """A jump forward; what it jumps over may move the stack pointer, which is unknown from here on."""
    target = len(draft.items) + 1 + draft.random.choice((0, 1, 1, 2))
    draft.add(Instruction.create_branch(code, 0), target)
    draft.known.pop(RSP, None)


def _loop(draft: Draft, add_body: Callable[[], None]) -> None:
    """One instruction a few times, which must not change its own address."""
    draft.known.pop(RCX, None)
    draft.ensure(RCX, draft.random.randrange(1, 5))
    start, known = len(draft.items), dict(draft.known)
    add_body()
    body = draft.items[-1].instruction
    changed = {n for n in known if draft.known.get(n) != known[n]}
    address = {tables.NUMBER.get(register) for register in (body.memory_base, body.memory_index)}
    if len(draft.items) != start + 1 or changed & (address | {RCX, RSP}) or draft.undefined_flags:
        raise Impossible
    if any(body.op_kind(i) in tables.STRING_KINDS for i in range(body.op_count)):
        raise Impossible
    draft.items[-1].keep = True
    code = Code.LOOP_REL8_64_RCX if draft.bits == 64 else Code.LOOP_REL8_32_ECX
    draft.add(Instruction.create_branch(code, 0), start)


def _modify_code(draft: Draft) -> None:
    """A store into the immediate of the instruction after it."""
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
    call = random.random() < 0.5
    wide = draft.bits == 64
    jump = Instruction()
    if call:
        jump.code = Code.CALL_RM64 if wide else Code.CALL_RM32
    else:
        jump.code = Code.JMP_RM64 if wide else Code.JMP_RM32
    if random.random() < 0.5:
        number = random.choice([n for n in range(len(draft.registers)) if n != RSP])
        _address_of(draft, number, len(draft.items) + 2)
        jump.set_op_kind(0, OpKind.REGISTER)
        jump.set_op_register(0, draft.registers[number])
        draft.add(jump)
        return
    jump.set_op_kind(0, OpKind.MEMORY)
    place = DATA + random.randrange(0, 2 * PAGE, 4)
    if len(draft.items) > 2 or (RSP in draft.known and abs(place - draft.known[RSP]) < 64):
        raise Impossible  # what runs before might write there
    draft.address(jump, place)
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
    wide = draft.bits == 64
    push = Instruction.create_i32(Code.PUSHQ_IMM32 if wide else Code.PUSHD_IMM32, 0)
    draft.add(push, len(draft.items) + 2, keep=True)
    if random.random() < 0.4:
        code = Code.RETNQ_IMM16 if wide else Code.RETND_IMM16
        draft.add(Instruction.create_i32(code, random.randrange(0, 64)))
    else:
        back = Instruction()
        back.code = Code.RETNQ if wide else Code.RETND
        draft.add(back)


def add_special(draft: Draft) -> None:
    """POPF and PUSHF, DF and other flags, the XSAVE family."""
    random = draft.random
    wide = draft.bits == 64
    kind = random.random()
    instruction = Instruction()
    if kind < 0.1:
        _save_state(draft)
        return
    if kind < 0.3:
        instruction.code = random.choice((Code.PUSHFQ if wide else Code.PUSHFD, Code.PUSHFW))
    elif kind < 0.6:
        value = random.getrandbits(12) & 0x8D5 | 0x200
        value |= random.choice((0, 0, 0, 0x400, 0x200000))
        push = Instruction.create_i32(Code.PUSHQ_IMM32 if wide else Code.PUSHD_IMM32, value)
        draft.add(push, keep=True)
        instruction.code = Code.POPFQ if wide else Code.POPFD
    elif kind < 0.75:
        instruction.code = random.choice((Code.STD, Code.CLD))
    else:
        instruction.code = random.choice((Code.CLC, Code.STC, Code.CMC, Code.LAHF, Code.SAHF))
    draft.add(instruction)


def _save_state(draft: Draft) -> None:
    """An instruction of the XSAVE family; one that restores mostly faults, on what is no such image."""
    random = draft.random
    if draft.used_x87 or draft.bits == 32:
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
    draft.address(instruction, place)
    draft.add(instruction)
