"""Instructions that become inline code of their own: stack, control transfer, strings, and the virtual flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, MemorySizeExt, Mnemonic, OpKind, Register

from trivisor.translation.layout import OFFSETS
from trivisor.translation.modes import Branch, CallOut, Indirect, Missing, Native, Repeat, RepeatCompare
from trivisor.translation.translator.recipe import ARITHMETIC, Item, Recipe, asm
from trivisor.translation.translator.registers import BY_SIZE, DISPLACED, GPR, RSP, SEGMENTS, STACK

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker

SLOT = OFFSETS["SLOT"]
SLOT_ADDRESS = OFFSETS["SLOT_ADDRESS"]

Make = Callable[[Recipe, Instruction], None]

_LOW = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")


def name(number: int, size: int) -> str:
    """The host's name of general register `number` at a size in bytes."""
    if number >= 8:
        return f"r{number}" + {1: "b", 2: "w", 4: "d", 8: ""}[size]
    return {1: ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil")[number],
            2: _LOW[number], 4: "e" + _LOW[number], 8: "r" + _LOW[number]}[size]  # fmt: skip


WORD = {1: "byte", 2: "word", 4: "dword", 8: "qword"}


def table(maker: InstructionMaker) -> dict[int, Make]:
    """The inline makers by mnemonic."""

    def bind(function: Callable[[InstructionMaker, Recipe, Instruction], None]) -> Make:
        return lambda recipe, instruction: function(maker, recipe, instruction)

    out: dict[int, Make] = {
        Mnemonic.PUSH: bind(push),
        Mnemonic.POP: bind(pop),
        Mnemonic.LEAVE: bind(leave),
        Mnemonic.CLI: bind(cli),
        Mnemonic.STI: bind(sti),
        Mnemonic.RDTSC: bind(rdtsc),
    }
    for text in ["STOSB", "STOSW", "STOSD", "STOSQ"]:
        out[getattr(Mnemonic, text)] = bind(stos)
    for text in ["MOVSB", "MOVSW", "MOVSQ", "MOVSD"]:
        out[getattr(Mnemonic, text)] = bind(movs)
    for text in """
        LODSB LODSW LODSD LODSQ SCASB SCASW SCASD SCASQ CMPSB CMPSW CMPSQ CMPSD
    """.split():
        out[getattr(Mnemonic, text)] = bind(element_string)
    if maker.mode.bits == 64:
        out[Mnemonic.IRETQ] = bind(iret)
        out[Mnemonic.SYSCALL] = bind(syscall)
        out[Mnemonic.SYSRETQ] = bind(sysret)
        out[Mnemonic.WRFSBASE] = bind(write_base)
        out[Mnemonic.WRGSBASE] = bind(write_base)
        out[Mnemonic.RDTSCP] = bind(rdtsc)
        out[Mnemonic.PUSHFQ] = bind(pushf)
        out[Mnemonic.POPFQ] = bind(popf)
        out[Mnemonic.SWAPGS] = bind(swapgs)
        out[Mnemonic.MOV] = bind(mov)
        out[Mnemonic.RDFSBASE] = bind(read_base)
        out[Mnemonic.RDGSBASE] = bind(read_base)
    return out


# -- the stack ----------------------------------------------------------------------------------------------


def _stack_address(maker: InstructionMaker, recipe: Recipe, offset: int) -> None:
    """r10 = the linear address of the guest's stack pointer plus `offset`."""
    width = "r10" if maker.mode.bits == 64 else "r10d"
    recipe.code(f"lea {width}, [r15+({offset})]")
    if maker.mode.bits != 64 and not maker.mode.flat:
        recipe.code("mov r11, [rsp+SS_BASE]\n lea r10d, [r10+r11]")


def _move_stack(maker: InstructionMaker, recipe: Recipe, by: int) -> None:
    recipe.code(f"lea {'r15' if maker.mode.bits == 64 else 'r15d'}, [r15+({by})]")


def _stack_supported(maker: InstructionMaker, recipe: Recipe) -> bool:
    if maker.mode.stack_bits == 16 or maker.mode.bits == 16:
        recipe.ends = Missing()
        return False
    return True


def push(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """PUSH of a register, an immediate or memory."""
    if not _stack_supported(maker, recipe):
        return
    size = -instruction.stack_pointer_increment
    kind = instruction.op0_kind
    if kind == OpKind.REGISTER and instruction.op0_register in SEGMENTS:
        recipe.code(f"movzx r11d, word [rsp+{SEGMENTS[instruction.op0_register]}_SELECTOR]\n mov [rsp+{SLOT}], r11")
        kind = OpKind.MEMORY
    elif kind == OpKind.MEMORY:
        maker.address(recipe, instruction)
        recipe.check(size, write=False)
        register = name(11, size)
        recipe.clobber(f"mov {register}, [r10]\n mov [rsp+{SLOT}], {register}\n retry")
    _stack_address(maker, recipe, -size)
    recipe.check(size, write=True)
    width = WORD[size]
    if kind == OpKind.REGISTER:
        number = GPR[instruction.op0_register][0]
        if number in DISPLACED:
            recipe.code(f"mov r11, [rsp+GPR_R{number}]")
            number = 11
        recipe.code(f"mov {width} [r10], {name(STACK if number == RSP else number, size)}")
    elif kind == OpKind.MEMORY:
        recipe.code(f"mov {name(11, size)}, [rsp+{SLOT}]\n mov [r10], {name(11, size)}")
    else:
        value = instruction.immediate(0) & ((1 << 8 * size) - 1)
        if value >> 63:
            value -= 1 << 64
        recipe.code(f"mov {width} [r10], {value}")
    _move_stack(maker, recipe, -size)


def pop(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """POP to a register or memory."""
    if not _stack_supported(maker, recipe):
        return
    size = instruction.stack_pointer_increment
    if instruction.op0_kind == OpKind.REGISTER:
        if instruction.op0_register in SEGMENTS:
            recipe.ends = CallOut()
            return
        _stack_address(maker, recipe, 0)
        recipe.check(size, write=False)
        number = GPR[instruction.op0_register][0]
        if number == RSP:
            if size == 2:
                recipe.code("lea r15, [r15+2]\n mov r15w, [r10]")
            else:
                recipe.code("mov r15, [r10]" if size == 8 else "mov r15d, [r10]")
            return
        if number in DISPLACED:
            if size == 2:
                recipe.code(f"mov r11w, [r10]\n mov [rsp+GPR_R{number}], r11w")
            else:
                recipe.code(f"mov {name(11, size)}, [r10]\n mov [rsp+GPR_R{number}], r11")
        else:
            recipe.code(f"mov {name(number, size)}, [r10]")
        _move_stack(maker, recipe, size)
        return
    _stack_address(maker, recipe, 0)
    recipe.check(size, write=False)
    register = name(11, size)
    recipe.clobber(f"mov {register}, [r10]\n mov [rsp+{SLOT}], {register}\n retry")
    # An address based on rsp uses its value after the pop.
    maker.address(recipe, instruction, size if instruction.memory_base in _STACK_POINTERS else 0)
    recipe.check(size, write=True)
    recipe.code(f"mov {register}, [rsp+{SLOT}]\n mov [r10], {register}")
    _move_stack(maker, recipe, size)


_STACK_POINTERS = {BY_SIZE[8][RSP], BY_SIZE[4][RSP]}


def leave(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """LEAVE."""
    size = 8 if maker.mode.bits == 64 else 4
    if not _stack_supported(maker, recipe):
        return
    if instruction.code == Code.LEAVEW:
        size = 2
    wide = maker.mode.bits == 64
    recipe.code("mov r10, rbp" if wide else "mov r10d, ebp")
    if not wide and not maker.mode.flat:
        recipe.code("mov r11, [rsp+SS_BASE]\n lea r10d, [r10+r11]")
    recipe.check(size, write=False)
    recipe.code(f"lea {'r15' if wide else 'r15d'}, [rbp+{size}]\n mov {name(5, size)}, [r10]")


# -- control transfers --------------------------------------------------------------------------------------


def push_return(maker: InstructionMaker, recipe: Recipe) -> None:
    """Push the address of the next instruction."""
    if not _stack_supported(maker, recipe):
        return
    size = 8 if maker.mode.bits == 64 else 4
    _stack_address(maker, recipe, -size)
    recipe.check(size, write=True)
    recipe.absolute("r11", 0)
    recipe.code(f"mov [r10], {name(11, size)}")
    _move_stack(maker, recipe, -size)


def indirect(maker: InstructionMaker, recipe: Recipe, instruction: Instruction, *, call: bool) -> None:
    """Near JMP and CALL through a register or memory."""
    size = 8 if maker.mode.bits == 64 else 4
    if instruction.op0_kind == OpKind.REGISTER:
        number, width = GPR[instruction.op0_register]
        if width == 2:
            recipe.ends = Missing()
            return
        source = f"[rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, width)
        recipe.code(f"mov {name(10, width)}, {source}")
    else:
        if MemorySizeExt.size(instruction.memory_size) != size:
            recipe.ends = Missing()
            return
        maker.address(recipe, instruction)
        recipe.check(size, write=False)
        recipe.code(f"mov {name(10, size)}, [r10]")
    if call:
        recipe.clobber(f"mov [rsp+{SLOT}], r10\n retry")
        push_return(maker, recipe)
        recipe.code(f"mov r10, [rsp+{SLOT}]")
    recipe.ends = recipe.ends or Indirect()


def near_return(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """Near RET, with or without bytes to drop."""
    if not _stack_supported(maker, recipe):
        return
    size = 8 if maker.mode.bits == 64 else 4
    if instruction.code in (Code.RETNW, Code.RETNW_IMM16):
        recipe.ends = Missing()
        return
    drop = instruction.immediate16 if instruction.op_count else 0
    _stack_address(maker, recipe, 0)
    recipe.check(size, write=False)
    recipe.code(f"mov {name(10, size)}, [r10]")
    _move_stack(maker, recipe, size + drop)
    recipe.ends = Indirect()


def conditional(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """Jcc, JCXZ and LOOP."""
    recipe.shared = True
    if instruction.is_jcc_short_or_near:
        recipe.reads |= instruction.rflags_read & ARITHMETIC
        recipe.ends = Branch(instruction.condition_code - 1)
        return
    if instruction.code in _CX:
        recipe.ends = Missing()
        return
    wide = instruction.code not in _ECX
    counter = "rcx" if wide else "ecx"
    jump = b"\xe3" if wide else b"\x67\xe3"
    if instruction.is_jcx_short:
        recipe.ends = Branch(0, jump + b"\0")
        return
    # taken: counter not zero (and ZF as asked); the prelude ends in a short jump to the taken way
    decrement = asm(f"lea {counter}, [rcx-1]")
    skip = jump + b"\x02"
    mnemonic = instruction.mnemonic
    if mnemonic == Mnemonic.LOOP:
        prelude = decrement + skip + b"\xeb\0"
    else:
        recipe.reads |= instruction.rflags_read & ARITHMETIC
        prelude = decrement + skip + (b"\x74\0" if mnemonic == Mnemonic.LOOPE else b"\x75\0")
    recipe.ends = Branch(0, prelude)


_CX = {
    getattr(Code, n)
    for n in dir(Code)
    if n.startswith(("JCXZ_", "LOOP")) and ("_CX" in n or n.startswith("JCXZ"))
}


_ECX = {getattr(Code, n) for n in dir(Code) if n.startswith(("JECXZ", "LOOP")) and "RCX" not in n and "_CX" not in n}


# -- string instructions ------------------------------------------------------------------------------------

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
        retry
        {target}
        check write {size} chunk
        mov r11d, r10d
        and r11d, 0xfff
        neg r11d
        add r11d, 4096
        shr r11d, {size.bit_length() - 1}
        cmp r11, rcx
        cmova r11, rcx
        mov [rsp+SCRATCH_0], rcx
        mov [rsp+SCRATCH_1], rdi
        mov rcx, r11
        mov rdi, r10
        rep stos{"bwdq"[size.bit_length() - 1]}
        mov rcx, [rsp+SCRATCH_0]
        mov rdi, [rsp+SCRATCH_1]
        sub rcx, r11
        {_advance(maker, "rdi", f"r11*{size}")}
        {_POLL}
        jnz pages
        jmp done
        backward:
        {elements}
        """,
        loops=True,
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
        neg r11d
        add r11d, 4096
        shr r11d, {size.bit_length() - 1}
        cmp r11, rcx
        cmova r11, rcx
        mov rcx, r11
        mov rdi, r10
        rep movs{"bwdq"[size.bit_length() - 1]}
        mov rcx, [rsp+SCRATCH_0]
        mov rdi, [rsp+SCRATCH_1]
        mov rsi, [rsp+SCRATCH_2]
        sub rcx, r11
        {_advance(maker, "rsi", f"r11*{size}")}
        {_advance(maker, "rdi", f"r11*{size}")}
        {_POLL}
        jnz pages
        jmp done
        backward:
        {elements}
        """,
        loops=True,
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


# -- the virtual flags --------------------------------------------------------------------------------------


def cli(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """CLI at CPL 0 clears the virtual interrupt flag."""
    if maker.mode.user:
        recipe.ends = CallOut()
        return
    recipe.code("mov byte [rsp+IF+1], 0")


def sti(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """STI at CPL 0 sets it; interrupts are looked for one instruction later (Intel SDM 2B, STI).

    Single-stepped, Python does it, who remembers that until the next step.
    """
    if maker.mode.user or recipe.single:
        recipe.ends = CallOut()
        return
    recipe.code("mov byte [rsp+IF+1], 2\n mov r11, [rsp+ARMED]\n mov [rsp+POLL], r11")
    recipe.shadow = True


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
    """POPFQ at CPL 0 when the system flags stay as they are; otherwise, and with DF, Python does it."""
    if maker.mode.user:
        recipe.ends = CallOut()
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


def iret(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """IRETQ."""
    recipe.ends = CallOut() if maker.mode.user else Native("IRET")


def syscall(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """SYSCALL."""
    recipe.ends = Native("SYSCALL") if maker.mode.user else CallOut()


def sysret(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """SYSRET to 64-bit code."""
    recipe.ends = CallOut() if maker.mode.user else Native("SYSRET")


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
    elif source in _READABLE_CONTROL and not maker.mode.user:
        _store(recipe, GPR[target][0], f"mov r10, [rsp+{OFFSETS[_READABLE_CONTROL[source]]}]")
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
    elif maker.is_sensitive(instruction):
        recipe.ends = CallOut()
    else:
        maker.plain(recipe, instruction)


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


# -- odd memory operands ------------------------------------------------------------------------------------


def bit_string_address(maker: InstructionMaker, recipe: Recipe, instruction: Instruction, size: int) -> None:
    """BT, BTS, BTR, BTC with a register: the bit number reaches beyond the operand (Intel SDM 2A, BT)."""
    number, width = GPR[instruction.op1_register]
    shift = {2: 4, 4: 5, 8: 6}[width]
    maker.address(recipe, instruction)
    source = f"[rsp+GPR_R{number}]" if number in DISPLACED else name(STACK if number == RSP else number, width)
    load = {2: f"movsx r11, {'word ' if number in DISPLACED else ''}{source}",
            4: f"movsxd r11, {'dword ' if number in DISPLACED else ''}{source}",
            8: f"mov r11, {source}"}[width]  # fmt: skip
    narrow = "" if maker.mode.bits == 64 else "mov r10d, r10d"
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


def xsave(maker: InstructionMaker, recipe: Recipe, instruction: Instruction) -> None:
    """The XSAVE family on the host's own, limited to what the guest's XCR0 has."""
    mnemonic = instruction.mnemonic
    saves = mnemonic not in (Mnemonic.XRSTOR, Mnemonic.XRSTOR64)
    recipe.items.clear()
    maker.address(recipe, instruction)
    recipe.check(maker.xsave_size, write=saves)
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
    recipe.code("mov rax, [rsp+SPILL]\n mov rdx, [rsp+SPILL_2]")
