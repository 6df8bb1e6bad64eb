"""String instructions: repeated ones a page at a time on the host's own, the rest by the element."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Instruction, MemorySizeExt, Mnemonic, OpKind

from trivisor.translation.modes import Repeat, RepeatCompare
from trivisor.translation.translator.recipe import ARITHMETIC, Recipe
from trivisor.translation.translator.registers import (
    SEGMENTS,
    name,
)

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


_SIZES = {"B": 1, "W": 2, "D": 4, "Q": 8}

_ADDRESS_BITS = {
    OpKind.MEMORY_SEG_RSI: 64, OpKind.MEMORY_ESRDI: 64,
    OpKind.MEMORY_SEG_ESI: 32, OpKind.MEMORY_ESEDI: 32,
    OpKind.MEMORY_SEG_SI: 16, OpKind.MEMORY_ESDI: 16,
}  # fmt: skip


def _address_bits(instruction: Instruction) -> int:
    """The width of SI, DI and the count."""
    return next(
        bits for i in range(instruction.op_count) if (bits := _ADDRESS_BITS.get(instruction.op_kind(i))) is not None
    )


def _unless_zero(bits: int) -> str:
    """Skip everything when the count is 0; JRCXZ alone does not reach far enough."""
    if bits == 16:
        return "movzx r11d, cx\n test r11d, r11d\n jz done\n"
    return f"{'jrcxz' if bits == 64 else 'jecxz'} zero\n jmp nonzero\n zero:\n jmp done\n nonzero:\n"


def _count_down(bits: int) -> str:
    """One less to do."""
    return {64: "lea rcx, [rcx-1]", 32: "lea ecx, [rcx-1]", 16: "lea r10d, [rcx-1]\n mov cx, r10w"}[bits]


def _string_size(instruction: Instruction) -> int:
    return MemorySizeExt.size(instruction.memory_size)


def _linear(maker: InstructionMaker, bits: int, register: str, segment: str, access: str) -> str:
    """r10 = the linear address of an index register in its segment, checked if that is not flat."""
    short = register[1:]
    move = {64: f"mov r10, {register}", 32: f"mov r10d, e{short}", 16: f"movzx r10d, {short}"}[bits]
    return f"{move}\n {maker.to_linear(segment, access)}\n"


def _advance(bits: int, register: str, by: str) -> str:
    if bits == 16:
        return f"lea r10d, [{register}+{by}]\n mov {register[1:]}, r10w\n"
    return f"lea {register if bits == 64 else 'e' + register[1:]}, [{register}+{by}]\n"


def _whole_pages(maker: InstructionMaker, bits: int, *segments: str) -> bool:
    """Whether a page at a time can be done: no limit to mind, and no 16-bit register to wrap."""
    return bits != 16 and not any(maker.mode.checks(segment) for segment in segments)


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


def _step(bits: int, *registers: str) -> str:
    """Move index registers on by the stride."""
    return "mov r11, [rsp+STRIDE]\n" + "".join(_advance(bits, register, "r11") for register in registers)


_POLL = "mov r11, [rsp+POLL]\n mov r11d, [r11]\n"


def _element_loop(
    instruction: Instruction, recipe: Recipe, bits: int, size: int, body: str, until: str = ""
) -> str:
    """`body` once, or as long as the count lasts and `until` does not jump to `done`."""
    if not _repeated(instruction):
        return f"{_stride(size)}\n{body}"
    if recipe.single:
        return f"{_stride(size)}\n{_unless_zero(bits)}\n{body}\n {_count_down(bits)}\n done:"
    # An interrupt has the instruction start again, so it is looked for only when there is more to do.
    rest = f"{_count_down(bits)}\n {until}\n {_POLL}\n jmp top\n done:"
    return f"{_stride(size)}\n top:\n{_unless_zero(bits)}\n{body}\n {rest}"


def _repeated(instruction: Instruction) -> bool:
    return bool(instruction.has_rep_prefix or instruction.has_repne_prefix)


def _finish_single(recipe: Recipe, instruction: Instruction, bits: int) -> None:
    if recipe.single and _repeated(instruction):
        recipe.ends = Repeat(bits)


def _fitting(bits: int, size: int) -> str:
    """r11 = the elements of the count that fit between offset r11 and the page's end."""
    count = "r11, rcx" if bits == 64 else "r11d, ecx"
    return f"""
        neg r11d
        add r11d, 4096
        shr r11d, {size.bit_length() - 1}
        cmp {count}
        cmova {count}
        """


def _unless_straddling(size: int) -> str:
    """Go to `straddling` if the element at linear r10 runs into the next page."""
    if size == 1:
        return ""
    return f"mov r11d, r10d\n and r11d, 0xfff\n cmp r11d, {4096 - size}\n ja straddling\n"


def _straddling(bits: int, size: int, body: str, *registers: str) -> str:
    """One element by itself, upwards, and on with the rest a page at a time."""
    if size == 1:
        return ""
    moved = "".join(_advance(bits, register, str(size)) for register in registers)
    return f"straddling:\n {body}\n {moved}\n sub {'rcx' if bits == 64 else 'ecx'}, 1\n jmp paged\n"


def _by_pages(recipe: Recipe, bits: int, elements: str, page: str, straddling: str) -> None:
    """`page` as long as it leaves a count (and ZF clear); with DF set `elements`, one by one."""
    recipe.clobber(
        f"""
        pushfq
        pop r11
        test r11d, 0x400
        jnz backward
        {"jrcxz" if bits == 64 else "jecxz"} nothing
        jmp pages
        nothing:
        jmp done
        pages:
        {page}
        paged:
        {_POLL}
        jnz pages
        jmp done
        {straddling}
        backward:
        {elements}
        """,
        loops=True,
    )


def stos(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """STOS, alone or a page at a time by the host's own REP."""
    size, bits = _string_size(instruction), _address_bits(instruction)
    target = _linear(maker, bits, "rdi", "ES", f"write {size}")
    body = f"retry\n {target}\n check write {size}\n mov [r10], {name(0, size)}\n stored\n"
    elements = _element_loop(instruction, recipe, bits, size, body + _step(bits, "rdi"))
    if not _repeated(instruction) or recipe.single or not _whole_pages(maker, bits, "ES"):
        recipe.clobber(elements, loops=True)
        _finish_single(recipe, instruction, bits)
        return
    _by_pages(
        recipe,
        bits,
        elements,
        f"""
        retry
        {target}
        {_unless_straddling(size)}
        check write {size} chunk
        mov r11d, r10d
        and r11d, 0xfff
        {_fitting(bits, size)}
        mov [rsp+SCRATCH_0], rcx
        mov [rsp+SCRATCH_1], rdi
        mov rcx, r11
        mov rdi, r10
        rep stos{"bwdq"[size.bit_length() - 1]}
        mov rcx, [rsp+SCRATCH_0]
        mov rdi, [rsp+SCRATCH_1]
        sub {'rcx, r11' if bits == 64 else 'ecx, r11d'}
        {_advance(bits, "rdi", f"r11*{size}")}
        """,
        _straddling(bits, size, body, "rdi"),
    )


def movs(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """MOVS, alone or as much at a time as both pages have."""
    if instruction.op0_kind == OpKind.REGISTER or instruction.op1_kind == OpKind.REGISTER:
        maker.plain(recipe, instruction)  # the SSE2 MOVSD
        return
    size, bits = _string_size(instruction), _address_bits(instruction)
    segment = SEGMENTS[instruction.memory_segment]
    source = _linear(maker, bits, "rsi", segment, f"read {size}")
    target = _linear(maker, bits, "rdi", "ES", f"write {size}")
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
        stored
        """
    elements = _element_loop(instruction, recipe, bits, size, body + _step(bits, "rsi", "rdi"))
    if not _repeated(instruction) or recipe.single or not _whole_pages(maker, bits, "ES", segment):
        recipe.clobber(elements, loops=True)
        _finish_single(recipe, instruction, bits)
        return
    _by_pages(
        recipe,
        bits,
        elements,
        f"""
        retry
        {source}
        {_unless_straddling(size)}
        check read {size} chunk
        mov [rsp+SLOT_ADDRESS], r10
        retry
        {target}
        {_unless_straddling(size)}
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
        {_fitting(bits, size)}
        mov rcx, r11
        mov rdi, r10
        rep movs{"bwdq"[size.bit_length() - 1]}
        mov rcx, [rsp+SCRATCH_0]
        mov rdi, [rsp+SCRATCH_1]
        mov rsi, [rsp+SCRATCH_2]
        sub {'rcx, r11' if bits == 64 else 'ecx, r11d'}
        {_advance(bits, "rsi", f"r11*{size}")}
        {_advance(bits, "rdi", f"r11*{size}")}
        """,
        _straddling(bits, size, body, "rsi", "rdi"),
    )


def element_string(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """LODS, SCAS and CMPS, an element at a time."""
    if instruction.mnemonic == Mnemonic.CMPSD and instruction.op0_kind == OpKind.REGISTER:
        maker.plain(recipe, instruction)  # the SSE2 CMPSD
        return
    size, bits = _string_size(instruction), _address_bits(instruction)
    family = _FAMILIES[instruction.mnemonic]
    register = name(11, size)
    accumulator = name(0, size)
    access = f"read {size}"
    if family == "SCAS":
        work = f"retry\n {_linear(maker, bits, 'rdi', 'ES', access)} check {access}\n cmp {accumulator}, [r10]\n"
        moved = _step(bits, "rdi")
    else:
        source = _linear(maker, bits, "rsi", SEGMENTS[instruction.memory_segment], access)
        work = f"retry\n {source} check {access}\n"
        if family == "LODS":
            work += f"mov {accumulator}, [r10]\n"
            moved = _step(bits, "rsi")
        else:
            work += f"""
                mov {register}, [r10]
                mov [rsp+SLOT], {register}
                retry
                {_linear(maker, bits, "rdi", "ES", access)}
                check {access}
                mov {register}, [rsp+SLOT]
                cmp {register}, [r10]
                """
            moved = _step(bits, "rsi", "rdi")
    until = ""
    if family != "LODS":
        # The flags come out parked and are taken from there: those of the last comparison, if there was one.
        recipe.reads |= ARITHMETIC
        work += _PARK
        jump = "jnz" if instruction.has_repne_prefix else "jz"
        until = f"test byte [rsp+FLAGS_AX+1], 0x40\n {jump} done"
    recipe.clobber(_element_loop(instruction, recipe, bits, size, work + moved, until), loops=True)
    if recipe.single and _repeated(instruction):
        compares = family != "LODS"
        recipe.ends = RepeatCompare(bool(instruction.has_repne_prefix), bits) if compares else Repeat(bits)


_PARK = "mov r11, rax\n lahf\n seto al\n mov [rsp+FLAGS_AX], ax\n mov rax, r11\n"


_FAMILIES = {
    getattr(Mnemonic, family + size): family for family in ("LODS", "SCAS", "CMPS") for size in "BWDQ"
}  # fmt: skip
