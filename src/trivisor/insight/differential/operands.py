"""Instructions of the catalogue with random operands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import (
    Code,
    Instruction,
    MemorySizeExt,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
    OpKind,
    Register,
    RegisterExt,
)

from trivisor.insight.differential import tables
from trivisor.insight.differential.case import DATA, DATA_END, PAGE
from trivisor.insight.differential.draft import RAX, RBP, RBX, RCX, RDX, RSP, Draft, Impossible
from trivisor.insight.differential.values import integer

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Code as CodeNumber
    from iced_x86._iced_x86_py import OpCodeOperandKind as OpCodeOperandKindNumber
    from iced_x86._iced_x86_py import Register as RegisterNumber

_GENERAL = (tables.R8, tables.R16, tables.R32, tables.R64)


def add_ordinary(draft: Draft, code: CodeNumber) -> None:
    """Add an instruction with this code, and before it what its operands need."""
    random = draft.random
    instruction = Instruction()
    instruction.code = code
    info = instruction.op_code()
    mnemonic = info.mnemonic
    if mnemonic in tables.SAVE_X87 and not draft.may_store_x87:
        raise Impossible
    if mnemonic in tables.EXTENDED_STATE and draft.bits != 64:
        raise Impossible
    if mnemonic in tables.LOAD_MXCSR and random.random() < 0.5:
        raise Impossible  # it mostly faults
    if mnemonic in tables.DIVISIONS and random.random() < 0.8:
        _tame_division(draft, info.operand_size)
    kinds = info.op_kinds()
    address_bits = random.choice(tables.ADDRESS_BITS[draft.bits]) if random.random() < 0.12 else draft.bits
    memory: int | None = None
    for number, kind in enumerate(kinds):
        if _is_memory(draft, kind):
            memory = number
            instruction.set_op_kind(number, OpKind.MEMORY)
        elif kind in tables.STRING:
            _string_operand(draft, instruction, number, kind, address_bits)
        elif kind == OpCodeOperandKind.SEG_RBX_AL:
            _table_operand(draft, instruction, number)
        else:
            _plain_operand(draft, instruction, number, kind)
    if memory is not None:
        _memory_operand(draft, instruction, kinds[memory])
        if info.can_use_lock_prefix and memory == 0 and random.random() < 0.4:
            instruction.has_lock_prefix = True
    if info.can_use_rep_prefix and mnemonic in tables.STRINGS and random.random() < 0.7:
        _repeat(draft, instruction, info, address_bits)
    if mnemonic == Mnemonic.ENTER:
        _frame(draft, instruction)
    if mnemonic == Mnemonic.LEAVE:
        # (What lies at other canonical addresses may not be the same on both sides.)
        wild = draft.bits == 64 and random.random() < 0.2
        draft.ensure(RBP, 1 << 62 if wild else draft.offset(draft.place(8), Register.SS))
    draft.add(instruction)


def _is_memory(draft: Draft, kind: OpCodeOperandKindNumber) -> bool:
    if kind in tables.OR_MEMORY:
        return draft.random.random() < 0.6
    return kind in (OpCodeOperandKind.MEM, OpCodeOperandKind.MEM_OFFS) or kind in tables.VSIB


def _plain_operand(draft: Draft, instruction: Instruction, number: int, kind: OpCodeOperandKindNumber) -> None:
    """A register or an immediate."""
    if kind in tables.FILES:
        instruction.set_op_kind(number, OpKind.REGISTER)
        instruction.set_op_register(number, _register(draft, tables.FILES[kind]))
    elif kind in tables.FIXED:
        instruction.set_op_kind(number, OpKind.REGISTER)
        instruction.set_op_register(number, tables.FIXED[kind])
    elif kind in tables.IMMEDIATES:
        _immediate(draft, instruction, number, kind)
    else:
        raise Impossible


def _register(draft: Draft, file: list[RegisterNumber]) -> RegisterNumber:
    random = draft.random
    if draft.bits != 64:
        return random.choice(tables.R8_LEGACY if file is tables.R8 else file[:8])
    if file in _GENERAL and random.random() < 0.45:
        return file[random.choice((RSP, 10, 11, 15))]
    return random.choice(file)


def _immediate(draft: Draft, instruction: Instruction, number: int, kind: OpCodeOperandKindNumber) -> None:
    op_kind, bits = tables.IMMEDIATES[kind]
    if number and instruction.op_kind(number - 1) in (OpKind.IMMEDIATE8, OpKind.IMMEDIATE16):
        op_kind = OpKind.IMMEDIATE8_2ND
    instruction.set_op_kind(number, op_kind)
    value = 1 if kind == OpCodeOperandKind.IMM8_CONST_1 else integer(draft.random, bits)
    if op_kind in tables.UNSIGNED_IMMEDIATES:
        instruction.set_immediate_u32(number, value)
    else:
        instruction.set_immediate_i64(number, value - (value >> (bits - 1) << bits))


# -- memory -------------------------------------------------------------------------------------------------


def _memory_operand(draft: Draft, instruction: Instruction, kind: OpCodeOperandKindNumber) -> None:
    if kind in tables.VSIB:
        _gather_operand(draft, instruction, tables.VSIB[kind])
    elif kind == OpCodeOperandKind.MEM_OFFS:
        _offset_operand(draft, instruction)
    else:
        size = MemorySizeExt.size(instruction.memory_size) or 16
        place = draft.place(size)
        if instruction.mnemonic in tables.BIT_STRINGS and instruction.op_kind(1) == OpKind.REGISTER:
            place -= _bit_string_reach(draft, instruction, size)
        draft.point(instruction, place & draft.mask)


def _offset_operand(draft: Draft, instruction: Instruction) -> None:
    """MOV with an address in place of an immediate (moffs)."""
    random = draft.random
    place = draft.place(MemorySizeExt.size(instruction.memory_size))
    segment = draft.override()
    instruction.segment_prefix = segment
    instruction.memory_base = instruction.memory_index = Register.NONE
    offset = draft.offset(place, segment or Register.DS)
    sizes = [size for size in tables.ADDRESS_BITS[draft.bits] if not offset >> size]
    if not sizes:
        raise Impossible
    instruction.memory_displacement = offset
    instruction.memory_displ_size = (sizes[0] if random.random() < 0.7 else sizes[-1]) // 8


def _bit_string_reach(draft: Draft, instruction: Instruction, size: int) -> int:
    """How far from the operand's address the bit of a known register lies, in bytes, by whole operands."""
    number = tables.NUMBER[instruction.op_register(1)]
    if number not in draft.known:
        raise Impossible
    bits = 8 * size
    value = draft.value(number) & ((1 << bits) - 1)
    value -= (value >> (bits - 1)) << bits
    return (value >> bits.bit_length() - 1) * size


def _gather_operand(draft: Draft, instruction: Instruction, file: list[RegisterNumber]) -> None:
    """Three different vectors; the index vector gets small elements by a shift of what is in some register."""
    random = draft.random
    count = 16 if draft.bits == 64 else 8
    index, target, mask = random.sample(range(count), 3)
    for operand, number in ((0, target), (2, mask)):
        own = tables.YMM if RegisterExt.is_ymm(instruction.op_register(operand)) else tables.XMM
        instruction.set_op_register(operand, own[number])
    wide = instruction.mnemonic in tables.QUADWORD_GATHERS
    code = Code.VEX_VPSRLQ_YMM_YMM_IMM8 if wide else Code.VEX_VPSRAD_YMM_YMM_IMM8
    kept = random.choice((4, 7, 8, 8, 11))
    source = random.choice(tables.YMM[:count])
    shift = (64 if wide else 32) - kept
    draft.append(Instruction.create_reg_reg_u32(code, tables.YMM[index], source, shift), keep=True)
    place = DATA + random.choice((0x800, 0x1000, 0x1800, 0x2000, 0x2800, 0x3000))
    base = random.choice([n for n in draft.known if n != RSP] or [RAX])
    segment = draft.override()
    displacement = random.choice((0, 4, random.randrange(-200, 200)))
    at = segment or (Register.SS if base in (RSP, RBP) else Register.DS)
    draft.ensure(base, draft.offset(place, at) - displacement)
    instruction.segment_prefix = segment
    instruction.memory_base = draft.registers[base]
    instruction.memory_index = file[index]
    instruction.memory_index_scale = random.choice((1, 2, 4, 8))
    instruction.memory_displacement = displacement & draft.mask
    instruction.memory_displ_size = 8 if draft.bits == 64 else 4


# -- strings and other implied operands -----------------------------------------------------------------------


def _string_operand(
    draft: Draft, instruction: Instruction, number: int, kind: OpCodeOperandKindNumber, address_bits: int
) -> None:
    random = draft.random
    register, op_kinds = tables.STRING[kind]
    size = MemorySizeExt.size(instruction.memory_size) or 8
    segment = Register.ES if kind == OpCodeOperandKind.ES_RDI else Register.DS
    if kind == OpCodeOperandKind.SEG_RSI:
        instruction.segment_prefix = draft.override()
        segment = instruction.segment_prefix or segment
    place = draft.place(size * random.choice((1, 1, 8, 24)))
    if not DATA - PAGE <= place < DATA_END:
        place = DATA  # what is beside the data in the code page is not the same on both sides
    offset = draft.offset(place, segment)
    if offset >> address_bits:
        raise Impossible
    if address_bits < draft.width:
        offset |= random.getrandbits(draft.width - address_bits) << address_bits
    draft.ensure(register, offset)
    instruction.set_op_kind(number, op_kinds[address_bits])


def _repeat(draft: Draft, instruction: Instruction, info: OpCodeInfo, address_bits: int) -> None:
    if draft.guards:
        raise Impossible
    random = draft.random
    count = random.choice((0, 1, 2, 3, random.randrange(30), random.randrange(30), random.randrange(700)))
    if random.random() < 0.03:
        count = random.randrange(5000)
    if address_bits < draft.width:
        count |= random.getrandbits(draft.width - address_bits) << address_bits
    draft.ensure(RCX, count)
    if info.can_use_repne_prefix and random.random() < 0.5:
        instruction.has_repne_prefix = True
    else:
        instruction.has_rep_prefix = True


def _table_operand(draft: Draft, instruction: Instruction, number: int) -> None:
    """XLAT's byte at rbx + al."""
    segment = draft.override()
    instruction.segment_prefix = segment
    offset = draft.offset(draft.place(1), segment or Register.DS)
    if offset >> draft.bits:
        raise Impossible
    draft.ensure(RBX, offset - 255)
    draft.ensure(RAX, draft.random.getrandbits(64) | 0xFF)
    instruction.set_op_kind(number, OpKind.MEMORY)
    instruction.memory_base = Register.BX if draft.bits == 16 else draft.registers[RBX]
    instruction.memory_index = Register.AL


def _tame_division(draft: Draft, bits: int) -> None:
    """Have the dividend so small that there is a chance of a quotient."""
    random = draft.random
    if bits in (0, 8):
        draft.ensure(RAX, random.getrandbits(random.choice((8, 12))))
    else:
        draft.ensure(RDX, random.choice((0, 0, 1, random.getrandbits(4))))


def _frame(draft: Draft, instruction: Instruction) -> None:
    """ENTER of a few levels, off a frame that does not overlap with the new one."""
    random = draft.random
    if RSP not in draft.known or draft.guards:
        raise Impossible
    frame = draft.offset(DATA + random.randrange(64, 3 * PAGE), Register.SS)
    if abs(draft.value(RSP) - draft.ensure(RBP, frame)) < 128:
        raise Impossible
    instruction.set_immediate_u32(1, random.choice((0, 0, 1, 2, 3)))
