"""Memory operands that are more than an address: bit strings and the XSAVE area."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, CpuidFeature, Instruction, Mnemonic, Register

from trivisor.translation.modes import CallOut
from trivisor.translation.translator.recipe import Item, Recipe, asm
from trivisor.translation.translator.registers import (
    BY_SIZE,
    DISPLACED,
    GPR,
    RSP,
    SEGMENTS,
    STACK,
    name,
)
from trivisor.x86.control import XCR0_AVX, XCR0_PKRU

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


def bit_string_address(maker: InstructionMaker, recipe: Recipe, instruction: Instruction, size: int) -> None:
    """BT, BTS, BTR, BTC with a register: the bit number reaches beyond the operand (Intel SDM 2A, BT)."""
    number, width = GPR[instruction.op1_register]
    shift = {2: 4, 4: 5, 8: 6}[width]
    maker.address(recipe, instruction)
    source = f"[rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, width)
    load = {2: f"movsx r11, {'word ' if number in DISPLACED else ''}{source}",
            4: f"movsxd r11, {'dword ' if number in DISPLACED else ''}{source}",
            8: f"mov r11, {source}"}[width]  # fmt: skip
    bits = 64 if maker.mode.bits == 64 else maker.address_bits(instruction)
    narrow = {64: "", 32: "mov r10d, r10d", 16: "movzx r10d, r10w"}[bits]
    recipe.clobber(
        f"""
        {load}
        mov [rsp+SLOT], r11
        and dword [rsp+SLOT], {size * 8 - 1}
        sar r11, {shift}
        lea r10, [r10+r11*{size}]
        {narrow}
        """
    )


def bit_string_op(maker: InstructionMaker, instruction: Instruction) -> bytes:
    """The instruction on the host address in r10, with the bit's number within the operand."""
    host = instruction.copy()
    host.set_op_register(1, BY_SIZE[GPR[instruction.op1_register][1]][11])
    return asm("mov r11d, [rsp+SLOT]") + maker.on_host_address(host, False, False, True, 8, displaced=False)


_COMPACTING = {Mnemonic.XSAVEC, Mnemonic.XSAVEC64}
"""They store components that are in use alone."""
_LEGACY_AREA = 576
"""Bytes of the XSAVE area's legacy region and header."""
_WITHIN_XCR0 = """
    mov r11, [rsp+XCR0_FIELD]
    not r11
    test [r10+512], r11
    jnz unknown
    btr r11, 63
    test [r10+520], r11
    jz known
    unknown:
    fault gp
    known:
"""
"""XRSTOR's #GP for components in the header that the guest's XCR0 does not have; those the host's lacks it finds."""


def _escape_keyed(mask: str) -> str:
    """Have Python do it if XCR0 has PKRU, and so has what `mask` puts into r11d."""
    return f"""
        test dword [rsp+XCR0_FIELD], {XCR0_PKRU}
        jz plain
        {mask}
        test r11d, {XCR0_PKRU}
        jz plain
        escape
        plain:
    """


def _check_area(maker: InstructionMaker, recipe: Recipe, instruction: Instruction, saves: bool) -> None:
    """The check of as much of the area as the instruction accesses: of AVX's part if it is asked for, and is there."""
    maker.address(recipe, instruction, segmented=False)
    segment, kind = SEGMENTS[instruction.memory_segment], "write" if saves else "read"

    def check(size: int) -> str:
        return f"{maker.to_linear(segment, f'{kind} {size}')}\n check {kind} {size} judged\n"

    asked = f"mov r11d, eax\n and r11d, [rsp+XCR0_FIELD]\n test r11d, {XCR0_AVX}"
    if maker.xsave_size == _LEGACY_AREA:
        recipe.clobber(check(_LEGACY_AREA))
    elif saves:
        recipe.clobber(
            f"""
            {asked}
            jz short
            {check(maker.xsave_size)}
            jmp checked
            short:
            {check(_LEGACY_AREA)}
            checked:
            """,
            loops=True,
        )
    else:
        recipe.clobber(
            f"""
            mov [rsp+SLOT], r10
            {check(_LEGACY_AREA)}
            {asked}
            jz checked
            test dword [r10+512], {XCR0_AVX}
            jz checked
            mov r10, [rsp+SLOT]
            {check(maker.xsave_size)}
            checked:
            """,
            loops=True,
        )


def xsave(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """The XSAVE family on the host's own, limited to what the guest's XCR0 has.

    Where PKRU is among the components, which no host register holds, Python does it.
    """
    mnemonic = instruction.mnemonic
    saves = mnemonic not in (Mnemonic.XRSTOR, Mnemonic.XRSTOR64)
    keyed = CpuidFeature.PKU in maker.features
    if saves and keyed:
        recipe.clobber(_escape_keyed("mov r11d, eax"))
    _check_area(maker, recipe, instruction, saves)
    if not saves:
        if keyed:
            recipe.clobber(_escape_keyed("mov r11d, [r10+512]\n or r11d, [r10+520]\n or r11d, eax"))
        recipe.clobber(_WITHIN_XCR0)
    host = instruction.copy()
    # XSAVEOPT may leave out what the processor knows is unchanged; here it does not know, so all is stored.
    host.code = {Code.XSAVEOPT_MEM: Code.XSAVE_MEM, Code.XSAVEOPT64_MEM: Code.XSAVE64_MEM}.get(host.code, host.code)
    recipe.clobber(
        """
        mov [rsp+SPILL], rax
        mov [rsp+SPILL_2], rdx
        and eax, [rsp+XCR0_FIELD]
        xor edx, edx
        """
    )
    body = maker.on_host_address(host, False, saves, True, 64)
    recipe.items.append(Item(False, body))
    if saves:
        asked = "test byte [r10+512], 1" if mnemonic in _COMPACTING else "test al, 1"
        recipe.clobber(f"{asked}\n jz no_x87\n mov qword [r10+8], 0\n mov qword [r10+16], 0\n no_x87:")
    recipe.code("mov rax, [rsp+SPILL]\n mov rdx, [rsp+SPILL_2]")


_POINTERS = {
    **dict.fromkeys((Code.FNSTENV_M14BYTE, Code.FNSAVE_M94BYTE), "mov dword [r10+6], 0\n mov dword [r10+10], 0"),
    **dict.fromkeys(
        (Code.FNSTENV_M28BYTE, Code.FNSAVE_M108BYTE),
        "mov dword [r10+12], 0\n mov word [r10+16], 0\n mov dword [r10+20], 0\n mov word [r10+24], 0",
    ),
    **dict.fromkeys((Code.FXSAVE_M512BYTE, Code.FXSAVE64_M512BYTE), "mov qword [r10+8], 0\n mov qword [r10+16], 0"),
}
"""What takes the x87's last instruction and operand pointers out of a stored state: they are the host's addresses."""


def has_pointers(instruction: Instruction) -> bool:
    """Whether the instruction stores x87 state with pointers to hide."""
    return instruction.code in _POINTERS


def hide_pointers(recipe: Recipe, instruction: Instruction) -> None:
    """After an instruction that has stored x87 state at [r10]."""
    if (source := _POINTERS.get(instruction.code)) is not None:
        recipe.clobber(source)


def xlat(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """XLAT: AL = the byte at (R/E)BX + AL, of the address size (SDM 2D, XLAT)."""
    bits = GPR[instruction.memory_base][1] * 8
    wide = "r10" if bits == 64 else "r10d"
    narrow = "\n movzx r10d, r10w" if bits == 16 else ""
    recipe.code(f"movzx r11d, al\n lea {wide}, [rbx+r11]{narrow}")
    maker.add_segment(recipe, SEGMENTS[instruction.memory_segment])
    recipe.check(1, write=False)
    recipe.code("mov al, [r10]")


def flush_line(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """CLFLUSH and its like: memory is coherent, so all that is left of them is a byte load's faults (SDM 2A)."""
    if instruction.memory_segment == Register.CS and maker.mode.checks("CS"):
        recipe.ends = CallOut()  # the segment may be one for execution alone
        return
    maker.address(recipe, instruction)
    recipe.check(1, write=False)
