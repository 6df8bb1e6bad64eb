"""Loads from linear addresses that the host keeps from ring 3 though the guest's tables lead somewhere (kvm-pvm).

What lies there is the hypervisor's machine-to-physical table, for guests that
have its address built in.  They read it by MOV, which is what is done here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Decoder, Mnemonic, OpKind, Register, RegisterExt

from trivisor.x86.exceptions import GuestException

if TYPE_CHECKING:
    from trivisor.hardware.kvm.direct.guest_memory import RingThreeMemory
    from trivisor.hardware.kvm.direct.registers import RunRegisters

HIDDEN: Final = range(0xFFFF800000000000, 0xFFFF808000000000)
_LONGEST = 15
_WHOLE = (4, 8)
"""Bytes of the registers of which a MOV leaves nothing."""


def load_hidden(registers: RunRegisters, memory: RingThreeMemory, address: int) -> bool:
    """Do the MOV at rip, which loads from `address`; False if there is none or it may not."""
    try:
        code = memory.load(registers.rip, min(_LONGEST, 0x1000 - (registers.rip & 0xFFF)))
    except GuestException:
        return False
    instruction = Decoder(64, code, ip=registers.rip).decode()
    target = instruction.op0_register
    size = RegisterExt.size(target) if target != Register.NONE else 0
    if instruction.mnemonic != Mnemonic.MOV or instruction.op1_kind != OpKind.MEMORY or size not in _WHOLE:
        return False
    try:
        value = memory.load(address, size)
    except GuestException:
        return False
    registers[RegisterExt.full_register(target) - Register.RAX] = int.from_bytes(value, "little")
    registers.rip = instruction.next_ip
    return True
