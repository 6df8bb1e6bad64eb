"""Which instructions become inline code of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Instruction, Mnemonic

from trivisor.translation.translator import (
    control_flow,
    division,
    legacy_flow,
    legacy_frames,
    memory_forms,
    sensitive,
    strings,
)
from trivisor.translation.translator.recipe import Recipe

if TYPE_CHECKING:
    from trivisor.translation.translator.instructions import InstructionMaker

Make = Callable[[Recipe, Instruction], None]


def table(maker: InstructionMaker) -> dict[int, Make]:
    """The inline makers by mnemonic."""

    def bind(function: Callable[[InstructionMaker, Recipe, Instruction], None]) -> Make:
        return lambda recipe, instruction: function(maker, recipe, instruction)

    out: dict[int, Make] = {
        Mnemonic.CLI: bind(sensitive.cli),
        Mnemonic.STI: bind(sensitive.sti),
        Mnemonic.RDTSC: bind(sensitive.rdtsc),
        Mnemonic.STAC: bind(sensitive.stac),
        Mnemonic.CLAC: bind(sensitive.clac),
    }
    for text in ["STOSB", "STOSW", "STOSD", "STOSQ"]:
        out[getattr(Mnemonic, text)] = bind(strings.stos)
    for text in ["MOVSB", "MOVSW", "MOVSQ", "MOVSD"]:
        out[getattr(Mnemonic, text)] = bind(strings.movs)
    for text in """
        LODSB LODSW LODSD LODSQ SCASB SCASW SCASD SCASQ CMPSB CMPSW CMPSQ CMPSD
    """.split():
        out[getattr(Mnemonic, text)] = bind(strings.element_string)
    out[Mnemonic.INVLPG] = bind(sensitive.invlpg)
    out[Mnemonic.CLTS] = bind(sensitive.clts)
    out[Mnemonic.CPUID] = bind(sensitive.cpuid)
    out[Mnemonic.XGETBV] = bind(sensitive.xgetbv)
    out[Mnemonic.RDPKRU] = bind(sensitive.pkru)
    out[Mnemonic.WRPKRU] = bind(sensitive.pkru)
    out[Mnemonic.IN] = bind(sensitive.port)
    out[Mnemonic.OUT] = bind(sensitive.port)
    out[Mnemonic.RDMSR] = bind(sensitive.msr)
    out[Mnemonic.WRMSR] = bind(sensitive.msr)
    out[Mnemonic.DIV] = bind(division.divide)
    out[Mnemonic.IDIV] = bind(division.divide)
    out[Mnemonic.XLATB] = bind(memory_forms.xlat)
    for text in ["CLFLUSH", "CLFLUSHOPT", "CLWB"]:
        out[getattr(Mnemonic, text)] = bind(memory_forms.flush_line)
    if maker.mode.bits != 64:
        legacy = {**legacy_flow.INLINE, **legacy_frames.INLINE}
        out.update({mnemonic: bind(function) for mnemonic, function in legacy.items()})
    else:
        out[Mnemonic.PUSH] = bind(control_flow.push)
        out[Mnemonic.POP] = bind(control_flow.pop)
        out[Mnemonic.LEAVE] = bind(control_flow.leave)
        out[Mnemonic.INT] = bind(sensitive.interrupt)
        out[Mnemonic.INT3] = bind(sensitive.interrupt)
        out[Mnemonic.IRETQ] = bind(sensitive.iret)
        out[Mnemonic.SYSCALL] = bind(sensitive.syscall)
        out[Mnemonic.SYSRETQ] = bind(sensitive.sysret)
        out[Mnemonic.WRFSBASE] = bind(sensitive.write_base)
        out[Mnemonic.WRGSBASE] = bind(sensitive.write_base)
        out[Mnemonic.RDTSCP] = bind(sensitive.rdtsc)
        out[Mnemonic.RDPID] = bind(sensitive.rdpid)
        out[Mnemonic.PUSHFQ] = bind(sensitive.pushf)
        out[Mnemonic.POPFQ] = bind(sensitive.popf)
        out[Mnemonic.SWAPGS] = bind(sensitive.swapgs)
        out[Mnemonic.MOV] = bind(sensitive.mov)
        out[Mnemonic.RDFSBASE] = bind(sensitive.read_base)
        out[Mnemonic.RDGSBASE] = bind(sensitive.read_base)
    return out
