"""Sensitive instructions that are inline code on the virtual state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, Mnemonic, OpKind, Register

from trivisor.translation.layout import OFFSETS
from trivisor.translation.modes import CallOut, Indirect, Native
from trivisor.translation.translator.recipe import ARITHMETIC, Recipe
from trivisor.translation.translator.registers import (
    DISPLACED,
    GPR,
    RSP,
    SEGMENTS,
    STACK,
    name,
)
from trivisor.x86.control import CR4_OSXSAVE
from trivisor.x86.flags import AC

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker


def cli(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """CLI at CPL 0 clears the virtual interrupt flag."""
    if maker.mode.guest_kernel:
        _ignored(recipe)
        return
    if maker.mode.user:
        recipe.ends = CallOut()
        return
    recipe.code("mov byte [rsp+IF+1], 0")


def sti(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """STI at CPL 0 sets it; interrupts are looked for one instruction later (Intel SDM 2B, STI).

    Single-stepped, Python does it, who remembers that until the next step.
    """
    if maker.mode.guest_kernel:
        _ignored(recipe)
        return
    if maker.mode.user or recipe.single:
        recipe.ends = CallOut()
        return
    recipe.code("mov byte [rsp+IF+1], 2\n mov r11, [rsp+ARMED]\n mov [rsp+POLL], r11")
    recipe.shadow = True


def _ignored(recipe: Recipe) -> None:
    """CLI or STI of a kernel in ring 3: nothing, where its hypervisor has it so."""
    recipe.clobber(
        """
        cmp byte [rsp+IGNORE_CLI], 0
        jne ignored
        escape
        ignored:
        inc qword [rsp+COUNT_IGNORED_CLI]
        """
    )


def stac(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """STAC at CPL 0."""
    if maker.mode.user:
        recipe.ends = CallOut()
        return
    recipe.clobber(f"or dword [rsp+SYSTEM_FLAGS], {AC}")


def clac(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """CLAC at CPL 0: user pages that were accessed meanwhile leave the TLB again."""
    if maker.mode.user:
        recipe.ends = CallOut()
        return
    recipe.clobber(
        f"""
        and dword [rsp+SYSTEM_FLAGS], {~AC & 0xFFFFFFFF}
        cmp qword [rsp+OPENED_COUNT], 0
        je closed
        call qword [rsp+CLOSE]
        closed:
        """
    )


def pushf(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """PUSHFQ: the host's flags and the virtual ones put together."""
    # No op, but a need for flags: they are parked on the way in and restored on the way out.
    recipe.reads |= ARITHMETIC
    recipe.clobber(
        """
        movzx r11d, byte [rsp+FLAGS_AX+1]
        movzx r10d, byte [rsp+FLAGS_AX]
        shl r10d, 11
        or r11d, r10d
        pushfq
        pop r10
        and r10d, 0x400
        or r11d, r10d
        or r11, [rsp+IF]
        or r11, [rsp+SYSTEM_FLAGS]
        and r11d, 0xfcffff
        mov [rsp+SLOT], r11
        retry
        lea r10, [r15-8]
        check write 8
        mov r11, [rsp+SLOT]
        mov [r10], r11
        lea r15, [r15-8]
        """
    )


def popf(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """POPFQ when the system flags stay as they are; otherwise, and with DF, Python does it.

    At CPL 3 it leaves IF and IOPL alone, unless IOPL is 3 too.
    """
    if maker.mode.user:
        recipe.clobber(
            """
            test dword [rsp+SYSTEM_FLAGS], 0x3000
            jz ordinary
            escape
            ordinary:
            retry
            mov r10, r15
            check read 8
            mov r10, [r10]
            mov r11, r10
            xor r11, [rsp+SYSTEM_FLAGS]
            test r11d, 0x274500
            jz same
            escape
            same:
            lea r15, [r15+8]
            and r10d, 0x8d5
            push r10
            popfq
            """
        )
        recipe.writes |= ARITHMETIC
        return
    recipe.clobber(
        """
        retry
        mov r10, r15
        check read 8
        mov r10, [r10]
        mov r11, r10
        and r11, 0x3f7502
        or r11, 2
        cmp r11, [rsp+SYSTEM_FLAGS]
        je same
        escape
        same:
        lea r15, [r15+8]
        mov r11, r10
        and r11d, 0x200
        mov [rsp+IF], r11
        mov r11, [rsp+ARMED]
        mov [rsp+POLL], r11
        and r10d, 0x8d5
        push r10
        popfq
        """
    )
    recipe.writes |= ARITHMETIC
    recipe.polls = True


def swapgs(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """SWAPGS at CPL 0."""
    if maker.mode.user:
        recipe.ends = CallOut()
        return
    recipe.code(
        """
        mov r10, [rsp+GS_BASE]
        mov r11, [rsp+KERNEL_GS_BASE]
        mov [rsp+GS_BASE], r11
        mov [rsp+KERNEL_GS_BASE], r10
        """
    )


def rdtsc(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """RDTSC: the host's counter and an offset."""
    if maker.mode.user and maker.mode.other & 1:
        recipe.ends = CallOut()
        return
    recipe.clobber(
        """
        rdtsc
        shl rdx, 32
        or rax, rdx
        add rax, [rsp+TSC_OFFSET]
        mov rdx, rax
        shr rdx, 32
        mov eax, eax
        """
    )
    if instruction.mnemonic == Mnemonic.RDTSCP:
        recipe.code("mov ecx, [rsp+TSC_AUX]")


def rdpid(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """RDPID: IA32_TSC_AUX."""
    _store(recipe, GPR[instruction.op0_register][0], "mov r10d, [rsp+TSC_AUX]")


def iret(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """IRETQ.  A paravirtual kernel returns by it to itself, to serialise: a jump with a new rsp and new flags."""
    if not maker.mode.guest_kernel or recipe.single:
        recipe.ends = CallOut() if maker.mode.user else Native("IRET")
        return
    recipe.clobber(
        """
        retry
        mov r10, r15
        check read 40
        mov r11, [r10+8]
        cmp r11, [rsp+CS_SELECTOR]
        jne other
        mov r11, [r10+32]
        cmp r11, [rsp+SS_SELECTOR]
        jne other
        mov r11, [r10]
        sar r11, 47
        inc r11
        cmp r11, 1
        ja other
        mov r11, [r10+16]
        xor r11, [rsp+SYSTEM_FLAGS]
        test r11d, 0x274500
        jz same
        other:
        escape
        same:
        mov r11, [r10]
        mov [rsp+SLOT], r11
        mov r11, [r10+16]
        mov r15, [r10+24]
        and r11d, 0x8d5
        push r11
        popfq
        mov r10, [rsp+SLOT]
        """
    )
    recipe.writes |= ARITHMETIC
    recipe.ends = Indirect()


def syscall(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """SYSCALL."""
    recipe.ends = Native("SYSCALL") if maker.mode.user else CallOut()


def sysret(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """SYSRET to 64-bit code."""
    recipe.ends = CallOut() if maker.mode.user else Native("SYSRET")


def interrupt(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """INT n and INT3."""
    vector = 3 if instruction.mnemonic == Mnemonic.INT3 else instruction.immediate8
    recipe.code(f"mov r10d, {vector}")
    recipe.ends = Native("INTERRUPT")


def invlpg(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """INVLPG at CPL 0, by a flat segment."""
    if maker.mode.user or maker.mode.checks(SEGMENTS[instruction.memory_segment]):
        recipe.ends = CallOut()
        return
    maker.address(recipe, instruction)
    recipe.clobber("assist INVALIDATE")


def clts(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """CLTS at CPL 0, if the flag is clear already."""
    if maker.mode.user or maker.mode.guarded:
        recipe.ends = CallOut()
        return
    recipe.clobber("cmp byte [rsp+CPL], 0\n je allowed\n escape\n allowed:")


def port(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """IN and OUT of AL at CPL 0; Python does the other sizes."""
    reads = instruction.mnemonic == Mnemonic.IN
    if maker.mode.user or instruction.code not in (Code.IN_AL_DX, Code.IN_AL_IMM8, Code.OUT_DX_AL, Code.OUT_IMM8_AL):
        recipe.ends = CallOut()
        return
    by_register = instruction.code in (Code.IN_AL_DX, Code.OUT_DX_AL)
    recipe.clobber(
        f"""
        {"movzx r10d, dx" if by_register else f"mov r10d, {instruction.immediate8}"}
        assist {"PORT_IN" if reads else "PORT_OUT"}
        """
    )


def msr(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """RDMSR and WRMSR of the few that matter, at CPL 0; RDMSR in a kernel in ring 3 too."""
    if maker.mode.user and not (maker.mode.guest_kernel and instruction.mnemonic == Mnemonic.RDMSR):
        recipe.ends = CallOut()
        return
    recipe.clobber(f"assist {'READ_MSR' if instruction.mnemonic == Mnemonic.RDMSR else 'WRITE_MSR'}")


def cpuid(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """CPUID, at any privilege level."""
    recipe.clobber("assist CPUID")


def xgetbv(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """XGETBV of XCR0, at any privilege level; Python does what faults, and other registers."""
    recipe.clobber(
        f"""
        test ecx, ecx
        jnz other
        test dword [rsp+GUEST_CR4], {CR4_OSXSAVE}
        jnz enabled
        other:
        escape
        enabled:
        mov eax, [rsp+XCR0_FIELD]
        mov edx, [rsp+XCR0_FIELD+4]
        """
    )


def pkru(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """RDPKRU and WRPKRU, at any privilege level."""
    recipe.clobber(f"assist {'READ_PKRU' if instruction.mnemonic == Mnemonic.RDPKRU else 'WRITE_PKRU'}")


_LOADABLE = {Register.ES: 0, Register.DS: 3, Register.FS: 4, Register.GS: 5}
"""Segment registers on which no translation of 64-bit code depends, by their place in `layout.SEGMENT_ORDER`."""
_READABLE_CONTROL = {Register.CR0: "CR0", Register.CR2: "CR2", Register.CR3: "CR3", Register.CR4: "CR4"}


def mov(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """MOV; reading a control register or a selector is inline."""
    source = instruction.op1_register if instruction.op1_kind == OpKind.REGISTER else Register.NONE
    target = instruction.op0_register if instruction.op0_kind == OpKind.REGISTER else Register.NONE
    if target == Register.CR3 and not maker.mode.user and maker.mode.bits == 64:
        number = GPR[source][0]
        place = f"[rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, 8)
        recipe.code(f"mov r10, {place}")
        recipe.ends = Native("WRITE_CR3")
    elif target == Register.CR8 and not maker.mode.user and maker.mode.bits == 64:
        number = GPR[source][0]
        place = f"[rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, 8)
        recipe.clobber(f"mov r10, {place}\n assist WRITE_CR8")
    elif source == Register.CR8 and not maker.mode.user and maker.mode.bits == 64:
        recipe.clobber("assist READ_CR8")
        _store(recipe, GPR[target][0], "")
    elif source in _READABLE_CONTROL and not maker.mode.user:
        _store(recipe, GPR[target][0], f"mov r10, [rsp+{OFFSETS[_READABLE_CONTROL[source]]}]")
    elif target in _NULLABLE and source in GPR and maker.mode.guest_kernel and maker.mode.bits == 64:
        _load_null(recipe, SEGMENTS[target], GPR[source][0])
    elif source in SEGMENTS and target in GPR and GPR[target][1] >= 4:
        _store(recipe, GPR[target][0], f"movzx r10d, word [rsp+{SEGMENTS[source]}_SELECTOR]")
    elif source in SEGMENTS and target in GPR:
        number = GPR[target][0]
        place = f"word [rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, 2)
        recipe.code(f"mov r10w, [rsp+{SEGMENTS[source]}_SELECTOR]\n mov {place}, r10w")
    elif source in SEGMENTS and target == Register.NONE:
        maker.address(recipe, instruction)
        recipe.check(2, write=True)
        recipe.code(f"mov r11w, [rsp+{SEGMENTS[source]}_SELECTOR]\n mov [r10], r11w")
    elif target in _LOADABLE and source in GPR and maker.mode.bits == 64:
        number = GPR[source][0]
        place = f"word [rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, 2)
        recipe.clobber(f"movzx r10d, {place}\n or r10d, {_LOADABLE[target] << 16}\n assist LOAD_SEGMENT")
    elif maker.is_sensitive(instruction):
        recipe.ends = CallOut()
    else:
        maker.plain(recipe, instruction)


_NULLABLE = (Register.ES, Register.DS, Register.FS, Register.GS)


def _load_null(recipe: Recipe, segment: str, number: int) -> None:
    """A null selector into a data segment register of a kernel in ring 3; Python loads others."""
    place = f"word [rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, 2)
    recipe.clobber(
        f"""
        movzx r10d, {place}
        test r10d, 0xfffc
        jz null
        escape
        null:
        mov [rsp+{segment}_SELECTOR], r10
        xor r10d, r10d
        mov [rsp+{segment}_BASE], r10
        mov [rsp+{segment}_LIMIT], r10
        mov [rsp+{segment}_ATTRIBUTES], r10
        """
    )


_NEEDS_FSGSBASE = """
        test dword [rsp+GUEST_CR4], 0x10000
        jnz enabled
        escape
        enabled:
        """


def read_base(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """RDFSBASE, RDGSBASE; without CR4.FSGSBASE they fault."""
    recipe.clobber(_NEEDS_FSGSBASE)
    number, size = GPR[instruction.op0_register]
    segment = "FS" if instruction.mnemonic == Mnemonic.RDFSBASE else "GS"
    _store(recipe, number, f"mov {name(10, size)}, [rsp+{segment}_BASE]")


def write_base(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """WRFSBASE, WRGSBASE of a canonical address; the rest is Python's."""
    number, size = GPR[instruction.op0_register]
    place = f"[rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, size)
    segment = "FS" if instruction.mnemonic == Mnemonic.WRFSBASE else "GS"
    recipe.clobber(
        f"""
        {_NEEDS_FSGSBASE}
        mov {name(10, size)}, {place}
        mov r11, r10
        sar r11, 47
        inc r11
        cmp r11, 1
        jbe canonical
        escape
        canonical:
        mov [rsp+{segment}_BASE], r10
        """
    )


def _store(recipe: Recipe, number: int, load: str) -> None:
    """`load` fills r10; put it into guest register `number`."""
    place = f"[rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, 8)
    recipe.code(f"{load}\n mov {place}, r10")
