"""String instructions: repeated ones a page at a time on the host's own, the rest by the element."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Instruction, MemorySizeExt, Mnemonic, OpKind

from trivisor.translation.modes import Missing, Repeat, RepeatCompare
from trivisor.translation.translator.recipe import ARITHMETIC, Recipe
from trivisor.translation.translator.registers import (
    SEGMENTS,
    name,
)

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


_SIZES = {"B": 1, "W": 2, "D": 4, "Q": 8}

_UNLESS_ZERO = """
    jrcxz zero
    jmp nonzero
zero:
    jmp done
nonzero:
"""
"""Skip everything when the count is 0; JRCXZ alone does not reach far enough."""


def _string_size(instruction: Instruction) -> int:
    return MemorySizeExt.size(instruction.memory_size)


def _address_registers(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> bool:
    """Whether the string instruction's address size is the mode's own; others are not done inline."""
    wide = {OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_ESRDI} if maker.mode.bits == 64 else {
        OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_ESEDI}  # fmt: skip
    kinds = {instruction.op_kind(i) for i in range(instruction.op_count)} - {OpKind.REGISTER}
    if maker.mode.bits == 16 or not kinds <= wide:
        recipe.ends = Missing()
        return False
    return True


def _linear(maker: InstructionMaker, register: str, segment: str) -> str:
    wide = maker.mode.bits == 64
    text = f"mov r10, {register}\n" if wide else f"mov r10d, e{register[1:]}\n"
    if segment in ("FS", "GS") or (not wide and not maker.mode.flat):
        text += f"mov r11, [rsp+{segment}_BASE]\n lea r10{'' if wide else 'd'}, [r10+r11]\n"
    return text


def _advance(maker: InstructionMaker, register: str, by: str) -> str:
    wide = maker.mode.bits == 64
    return f"lea {register if wide else 'e' + register[1:]}, [{register}+{by}]\n"


def _stride(size: int) -> str:
    """STRIDE = the element's size, negative when DF is set."""
    return f"""
        pushfq
        pop r11
        and r11d, 0x400
        shr r11d, {9 - size.bit_length() + 1}
        neg r11
        add r11, {size}
        mov [rsp+STRIDE], r11
        """


def _step(maker: InstructionMaker, *registers: str) -> str:
    """Move index registers on by the stride."""
    return "mov r11, [rsp+STRIDE]\n" + "".join(_advance(maker, register, "r11") for register in registers)


_POLL = "mov r11, [rsp+POLL]\n mov r11d, [r11]\n"


def _element_loop(instruction: Instruction, recipe: Recipe, size: int, body: str, until: str = "") -> str:
    """`body` once, or as long as the count lasts and `until` does not jump to `done`."""
    if not _repeated(instruction):
        return f"{_stride(size)}\n{body}"
    if recipe.single:
        return f"{_stride(size)}\n{_UNLESS_ZERO}\n{body}\n lea rcx, [rcx-1]\n done:"
    # An interrupt has the instruction start again, so it is looked for only when there is more to do.
    rest = f"lea rcx, [rcx-1]\n {until}\n {_POLL}\n jmp top\n done:"
    return f"{_stride(size)}\n top:\n{_UNLESS_ZERO}\n{body}\n {rest}"


def _repeated(instruction: Instruction) -> bool:
    return bool(instruction.has_rep_prefix or instruction.has_repne_prefix)


def _finish_single(recipe: Recipe, instruction: Instruction) -> None:
    if _repeated(instruction):
        recipe.ends = Repeat()


def _fitting(size: int) -> str:
    """r11 = the elements of the count that fit between offset r11 and the page's end."""
    return f"""
        neg r11d
        add r11d, 4096
        shr r11d, {size.bit_length() - 1}
        cmp r11, rcx
        cmova r11, rcx
        """


def _by_pages(recipe: Recipe, elements: str, page: str) -> None:
    """`page` as long as it leaves a count (and ZF clear); with DF set `elements`, one by one."""
    recipe.clobber(
        f"""
        pushfq
        pop r11
        test r11d, 0x400
        jnz backward
        jrcxz nothing
        jmp pages
        nothing:
        jmp done
        pages:
        {page}
        {_POLL}
        jnz pages
        jmp done
        backward:
        {elements}
        """,
        loops=True,
    )


def stos(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """STOS, alone or a page at a time by the host's own REP."""
    if not _address_registers(maker, recipe, instruction):
        return
    size = _string_size(instruction)
    target = _linear(maker, "rdi", "ES")
    body = f"retry\n {target}\n check write {size}\n mov [r10], {name(0, size)}\n {_step(maker, 'rdi')}"
    elements = _element_loop(instruction, recipe, size, body)
    if not _repeated(instruction) or recipe.single:
        recipe.clobber(elements, loops=True)
        _finish_single(recipe, instruction)
        return
    _by_pages(
        recipe,
        elements,
        f"""
        retry
        {target}
        check write {size} chunk
        mov r11d, r10d
        and r11d, 0xfff
        {_fitting(size)}
        mov [rsp+SCRATCH_0], rcx
        mov [rsp+SCRATCH_1], rdi
        mov rcx, r11
        mov rdi, r10
        rep stos{"bwdq"[size.bit_length() - 1]}
        mov rcx, [rsp+SCRATCH_0]
        mov rdi, [rsp+SCRATCH_1]
        sub rcx, r11
        {_advance(maker, "rdi", f"r11*{size}")}
        """,
    )


def movs(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """MOVS, alone or as much at a time as both pages have."""
    if instruction.op0_kind == OpKind.REGISTER or instruction.op1_kind == OpKind.REGISTER:
        maker.plain(recipe, instruction)  # the SSE2 MOVSD
        return
    if not _address_registers(maker, recipe, instruction):
        return
    size = _string_size(instruction)
    source = _linear(maker, "rsi", SEGMENTS[instruction.memory_segment])
    target = _linear(maker, "rdi", "ES")
    register = name(11, size)
    body = f"""
        retry
        {source}
        check read {size}
        mov {register}, [r10]
        mov [rsp+SLOT], {register}
        retry
        {target}
        check write {size}
        mov {register}, [rsp+SLOT]
        mov [r10], {register}
        {_step(maker, "rsi", "rdi")}
        """
    elements = _element_loop(instruction, recipe, size, body)
    if not _repeated(instruction) or recipe.single:
        recipe.clobber(elements, loops=True)
        _finish_single(recipe, instruction)
        return
    _by_pages(
        recipe,
        elements,
        f"""
        retry
        {source}
        check read {size} chunk
        mov [rsp+SLOT_ADDRESS], r10
        retry
        {target}
        check write {size} chunk
        ; r11 = elements that both pages have: the greater offset decides
        mov [rsp+SCRATCH_0], rcx
        mov [rsp+SCRATCH_1], rdi
        mov [rsp+SCRATCH_2], rsi
        mov rsi, [rsp+SLOT_ADDRESS]
        mov r11d, r10d
        and r11d, 0xfff
        mov edi, esi
        and edi, 0xfff
        cmp r11d, edi
        cmovb r11d, edi
        {_fitting(size)}
        mov rcx, r11
        mov rdi, r10
        rep movs{"bwdq"[size.bit_length() - 1]}
        mov rcx, [rsp+SCRATCH_0]
        mov rdi, [rsp+SCRATCH_1]
        mov rsi, [rsp+SCRATCH_2]
        sub rcx, r11
        {_advance(maker, "rsi", f"r11*{size}")}
        {_advance(maker, "rdi", f"r11*{size}")}
        """,
    )


def element_string(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """LODS, SCAS and CMPS, an element at a time."""
    if instruction.mnemonic == Mnemonic.CMPSD and instruction.op0_kind == OpKind.REGISTER:
        maker.plain(recipe, instruction)  # the SSE2 CMPSD
        return
    if not _address_registers(maker, recipe, instruction):
        return
    size = _string_size(instruction)
    family = _FAMILIES[instruction.mnemonic]
    register = name(11, size)
    accumulator = name(0, size)
    if family == "SCAS":
        work = f"retry\n {_linear(maker, 'rdi', 'ES')} check read {size}\n cmp {accumulator}, [r10]\n"
        moved = _step(maker, "rdi")
    else:
        work = f"retry\n {_linear(maker, 'rsi', SEGMENTS[instruction.memory_segment])} check read {size}\n"
        if family == "LODS":
            work += f"mov {accumulator}, [r10]\n"
            moved = _step(maker, "rsi")
        else:
            work += f"""
                mov {register}, [r10]
                mov [rsp+SLOT], {register}
                retry
                {_linear(maker, "rdi", "ES")}
                check read {size}
                mov {register}, [rsp+SLOT]
                cmp {register}, [r10]
                """
            moved = _step(maker, "rsi", "rdi")
    until = ""
    if family != "LODS":
        # The flags come out parked and are taken from there: those of the last comparison, if there was one.
        recipe.reads |= ARITHMETIC
        work += _PARK
        jump = "jnz" if instruction.has_repne_prefix else "jz"
        until = f"test byte [rsp+FLAGS_AX+1], 0x40\n {jump} done"
    recipe.clobber(_element_loop(instruction, recipe, size, work + moved, until), loops=True)
    if recipe.single and _repeated(instruction):
        recipe.ends = RepeatCompare(bool(instruction.has_repne_prefix)) if family != "LODS" else Repeat()


_PARK = "mov r11, rax\n lahf\n seto al\n mov [rsp+FLAGS_AX], ax\n mov rax, r11\n"


_FAMILIES = {
    getattr(Mnemonic, family + size): family for family in ("LODS", "SCAS", "CMPS") for size in "BWDQ"
}  # fmt: skip
