"""Doing one sensitive or rare instruction wholly in Python, as the translator's call-out asks for it."""

from __future__ import annotations

from iced_x86 import Code, Formatter, FormatterSyntax, Instruction

from trivisor.machine.exits import Exit, Unsupported
from trivisor.translation.emulator import (
    control_instructions,
    descriptor_instructions,
    far_transfers,
    interrupt_instructions,
    legacy_instructions,
    msr_instructions,
    strings_io,
    xsave_instructions,
)
from trivisor.translation.emulator.contract import Cpu, Handler, UnsupportedFeature
from trivisor.translation.emulator.operands import invalid_opcode, next_rip

_STRAIGHT: dict[int, Handler] = {
    **msr_instructions.STRAIGHT,
    **control_instructions.STRAIGHT,
    **descriptor_instructions.STRAIGHT,
    **interrupt_instructions.STRAIGHT,
    **strings_io.STRAIGHT,
    **legacy_instructions.STRAIGHT,
    **xsave_instructions.STRAIGHT,
}
"""Handlers after which the next instruction follows."""
_BRANCHES: dict[int, Handler] = {
    **far_transfers.BRANCHES,
    **interrupt_instructions.BRANCHES,
    **strings_io.BRANCHES,
}
"""Handlers that set rip."""


def _undefined(cpu: Cpu, instruction: Instruction) -> None:
    raise invalid_opcode()


_UNDEFINED_STEMS = ("UD0", "UD1_", "UD2", "MONITOR", "MWAIT", "VMX", "VMREAD_", "VMWRITE_", "VMRUN", "GETSEC")
_UNDEFINED = frozenset(
    "INVALID RSM VMCALL VMLAUNCH VMRESUME VMFUNC VMMCALL VMGEXIT VMGEXIT_F2 VMPTRLD_M64 VMPTRST_M64 "
    "VMCLEAR_M64 INVEPT_R32_M128 INVEPT_R64_M128 INVVPID_R32_M128 INVVPID_R64_M128 "
    "VMLOADW VMLOADD VMLOADQ VMSAVEW VMSAVED VMSAVEQ STGI CLGI SKINIT INVLPGAW INVLPGAD INVLPGAQ "
    "MOV_R32_TR MOV_TR_R32".split()
)
"""VT-x, AMD-V and SMX are not there, nor MONITOR; RSM is for system management mode alone."""
for _name, _code in vars(Code).items():
    if _name.startswith(_UNDEFINED_STEMS) or _name in _UNDEFINED:
        _STRAIGHT[_code] = _undefined

_formatter = Formatter(FormatterSyntax.NASM)


def is_known(code: int) -> bool:
    """Whether `execute` does instructions with this `iced_x86.Code`."""
    return code in _STRAIGHT or code in _BRANCHES


def execute(cpu: Cpu, instruction: Instruction) -> Exit | None:
    """Do the instruction at rip, and move rip past it or to its target.

    Returns Halt, or Unsupported with the instruction's text.  Raises
    `GuestException`, before which nothing has changed but what INS and OUTS
    with a repeat prefix have done.  An interrupt shadow ends here, unless the
    instruction makes a new one.
    """
    core = cpu.core
    shadow = core.interrupt_shadow
    core.interrupt_shadow = False
    code = instruction.code
    handler = _STRAIGHT.get(code)
    try:
        if handler is not None:
            following = next_rip(core, instruction)
            result = handler(cpu, instruction)
            core.rip = following
            return result
        branch = _BRANCHES.get(code)
        if branch is not None:
            return branch(cpu, instruction)
        what = ""
    except UnsupportedFeature as missing:
        what = f"{missing}: "
    core.interrupt_shadow = shadow
    return Unsupported(f"{what}{_formatter.format(instruction)}", core.rip)
