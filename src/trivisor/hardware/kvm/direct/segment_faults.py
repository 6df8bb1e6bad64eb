"""#SS that should have been #GP: kvm-pvm emulates what faults in ring 3, and its emulator heeds SS prefixes.

In 64-bit code a prefix for ES, CS, SS or DS means nothing; an address that is
not canonical is #SS where it is relative to RSP or RBP and not by FS or GS, and
#GP elsewhere (Intel SDM 1, 3.4.2.1; AMD APM 1, 2.1.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Decoder, Register

from trivisor.x86 import LONGEST_INSTRUCTION
from trivisor.x86.exceptions import GuestException

if TYPE_CHECKING:
    from trivisor.hardware.kvm.direct.guest_memory import RingThreeMemory
    from trivisor.hardware.kvm.direct.registers import RunRegisters

_STACK_BASES: Final = (Register.RSP, Register.RBP, Register.ESP, Register.EBP)


def prefix_made_stack_fault(registers: RunRegisters, memory: RingThreeMemory) -> bool:
    """Whether the 64-bit instruction at rip has an SS prefix that makes no stack access of it."""
    try:
        code = memory.load(registers.rip, min(LONGEST_INSTRUCTION, 0x1000 - (registers.rip & 0xFFF)))
    except GuestException:
        return False
    instruction = Decoder(64, code, ip=registers.rip).decode()
    return instruction.segment_prefix == Register.SS and instruction.memory_base not in _STACK_BASES
