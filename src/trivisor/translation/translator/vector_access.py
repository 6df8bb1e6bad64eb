"""Vector instructions that access memory element by element: masked moves and gathers.

Elements whose mask bit is clear must not be looked at, since they may lie
where there is no memory.  The elements go through `VECTORS` in the state block,
and registers change only once all of them are there (Intel SDM 2C, VMASKMOV
and VPGATHERDD, let an instruction that faults start again).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import (
    Code,
    Instruction,
    MemoryOperand,
    MemorySizeExt,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)

from trivisor.translation.layout import OFFSETS
from trivisor.translation.translator import priority
from trivisor.translation.translator.recipe import Item, Recipe
from trivisor.translation.translator.registers import SEGMENTS

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterNumber

    from trivisor.translation.translator.instructions import InstructionMaker

_XMM: list[RegisterNumber] = [getattr(Register, f"XMM{n}") for n in range(16)]
_DATA = OFFSETS["VECTORS"]
_INDEX = _DATA + 32
_MASK = _DATA + 64

MASKED_MOVES = frozenset(
    (Mnemonic.VMASKMOVPS, Mnemonic.VMASKMOVPD, Mnemonic.VPMASKMOVD, Mnemonic.VPMASKMOVQ)
)
BYTE_MOVES = frozenset((Mnemonic.MASKMOVQ, Mnemonic.MASKMOVDQU, Mnemonic.VMASKMOVDQU))


def masked_move(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """VMASKMOVPS, VMASKMOVPD, VPMASKMOVD and VPMASKMOVQ."""
    stores = instruction.op0_kind == OpKind.MEMORY
    size = MemorySizeExt.element_size(instruction.memory_size)
    count = MemorySizeExt.size(instruction.memory_size) // size
    maker.address(recipe, instruction, segmented=False)
    recipe.code("mov [rsp+SLOT_ADDRESS], r10")
    access = f"{'write' if stores else 'read'} {size}"
    to_linear = maker.to_linear(SEGMENTS[instruction.memory_segment], access)
    _save(maker, recipe, instruction.op1_register, _MASK)
    if stores:
        _save(maker, recipe, instruction.op2_register, _DATA)
    else:
        recipe.code("\n".join(f"mov qword [rsp+{_DATA + at}], 0" for at in range(0, 32, 8)))
    scratch = "r11" if size == 8 else "r11d"
    lines = []
    for number in range(count):
        move = (
            f"mov {scratch}, [rsp+{_DATA + number * size}]\n mov [r10], {scratch}" if stores
            else f"mov {scratch}, [r10]\n mov [rsp+{_DATA + number * size}], {scratch}"
        )  # fmt: skip
        lines.append(
            f"""
            test byte [rsp+{_MASK + (number + 1) * size - 1}], 0x80
            jz skip_{number}
            retry
            mov r10, [rsp+SLOT_ADDRESS]
            lea {_linear(maker)}, [r10+{number * size}]
            {to_linear}
            check {access}
            {move}
            skip_{number}:
            """
        )
    recipe.clobber("".join(lines), loops=True)
    if not stores:
        _load(maker, recipe, instruction.op0_register, _DATA)


def gather(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """The gathers of AVX2: destination, index vector in the address, mask."""
    target, index, mask = instruction.op0_register, instruction.memory_index, instruction.op2_register
    size = MemorySizeExt.size(instruction.memory_size)
    wide = instruction.mnemonic in _QUADWORD_INDEX
    count = min(RegisterExt.size(target) // size, RegisterExt.size(index) // (8 if wide else 4))
    base = instruction.copy()
    base.memory_index = Register.NONE
    maker.address(recipe, base, segmented=False)
    recipe.code("mov [rsp+SLOT_ADDRESS], r10")
    for register, place in ((target, _DATA), (index, _INDEX), (mask, _MASK)):
        _save(maker, recipe, register, place)
    if count * size == 8:
        recipe.code(f"mov qword [rsp+{_DATA + 8}], 0")  # there is no smaller register to load
    segment = SEGMENTS[instruction.memory_segment]
    to_linear = maker.to_linear(segment, f"read {size}")
    narrow = RegisterExt.size(instruction.memory_base) == 4 or maker.mode.bits != 64
    scratch = "r11" if size == 8 else "r11d"
    lines = []
    for number in range(count):
        load = f"mov r10, [rsp+{_INDEX + 8 * number}]" if wide else f"movsxd r10, dword [rsp+{_INDEX + 4 * number}]"
        lines.append(
            f"""
            test byte [rsp+{_MASK + (number + 1) * size - 1}], 0x80
            jz skip_{number}
            retry
            {load}
            mov r11, [rsp+SLOT_ADDRESS]
            lea {"r10d" if narrow else "r10"}, [r11+r10*{instruction.memory_index_scale}]
            {to_linear}
            check read {size}
            mov {scratch}, [r10]
            mov [rsp+{_DATA + number * size}], {scratch}
            skip_{number}:
            """
        )
    recipe.clobber("".join(lines), loops=True)
    _load(maker, recipe, target if count * size > 16 else _low_half(target), _DATA)
    zero = _low_half(mask)
    _append(maker, recipe, Instruction.create_reg_reg_reg(Code.VEX_VPXOR_XMM_XMM_XMMM128, zero, zero, zero))


_QUADWORD_INDEX = frozenset(
    (Mnemonic.VPGATHERQD, Mnemonic.VPGATHERQQ, Mnemonic.VGATHERQPS, Mnemonic.VGATHERQPD)
)


def byte_move(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """MASKMOVQ and MASKMOVDQU, on the host's rdi.

    Bytes that are masked off may fault as well (Intel SDM 2B, MASKMOVDQU: implementation-specific).
    """
    recipe.code(_FROM_DI[instruction.op0_kind])
    maker.add_segment(recipe, SEGMENTS[instruction.memory_segment])
    recipe.check(MemorySizeExt.size(instruction.memory_size), write=True, judged=priority.waits(instruction))
    if instruction.mnemonic == Mnemonic.MASKMOVQ:
        _append(maker, recipe, _WAIT)  # a pending x87 exception must strike while rdi is the guest's
    host = instruction.copy()
    host.set_op_kind(0, OpKind.MEMORY_SEG_RDI)
    host.segment_prefix = Register.NONE
    recipe.code("mov [rsp+SPILL], rdi\n mov rdi, r10")
    _append(maker, recipe, host)
    recipe.code("mov rdi, [rsp+SPILL]")


_FROM_DI = {
    OpKind.MEMORY_SEG_RDI: "mov r10, rdi",
    OpKind.MEMORY_SEG_EDI: "mov r10d, edi",
    OpKind.MEMORY_SEG_DI: "movzx r10d, di",
}
_WAIT = Instruction.create(Code.WAIT)


def _linear(maker: InstructionMaker) -> str:
    return "r10" if maker.mode.bits == 64 else "r10d"


def _low_half(register: RegisterNumber) -> RegisterNumber:
    """The XMM register that is the low half of a YMM register; an XMM register is itself."""
    return _XMM[RegisterExt.number(register)]


def _append(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    recipe.items.append(Item(False, maker.encode(instruction)))


def _save(maker: InstructionMaker, recipe: Recipe, register: RegisterNumber, place: int) -> None:
    """Store a vector register in the state block."""
    code = Code.VEX_VMOVDQU_YMMM256_YMM if RegisterExt.is_ymm(register) else Code.VEX_VMOVDQU_XMMM128_XMM
    _append(maker, recipe, Instruction.create_mem_reg(code, _block(place), register))


def _load(maker: InstructionMaker, recipe: Recipe, register: RegisterNumber, place: int) -> None:
    """Load one from there; the rest of a wider register becomes 0."""
    code = Code.VEX_VMOVDQU_YMM_YMMM256 if RegisterExt.is_ymm(register) else Code.VEX_VMOVDQU_XMM_XMMM128
    _append(maker, recipe, Instruction.create_reg_mem(code, register, _block(place)))


def _block(place: int) -> MemoryOperand:
    return MemoryOperand(Register.RSP, displ=place, displ_size=8)
