"""What the native helpers' sources share: constants, and saving and loading the guest's registers.

Convention inside a helper, after `spill`: every guest register is in its slot
of `GPR`, rbp is the state pointer, and all host registers may be used.  rsp is
the state pointer too, so pushes go to the stack below the state block.
"""

from __future__ import annotations

CONSTANTS = """
; access kinds, in a miss's description
KIND_WRITE   equ 1
KIND_USER    equ 2
KIND_PARKED  equ 4
KIND_FETCH   equ 8
KIND_CHUNK   equ 0x100
; of a mode's key (`modes.Mode`): its TLBs are the user's
MODE_IS_USER equ 4
KIND_JUDGED  equ 0x200
HOST_FLAGS   equ 0xcd5
FLAG_TF      equ 0x100
FLAG_IF      equ 0x200
FLAG_NT      equ 0x4000
FLAG_RF      equ 0x10000
FLAG_VM      equ 0x20000
FLAG_AC      equ 0x40000
SYSTEM_MASK  equ 0x3f7100
CR0_WP       equ 0x10000
CR4_PGE      equ 0x80
CR4_SMEP     equ 0x100000
CR4_SMAP     equ 0x200000
CR4_PKE      equ 0x400000
EFER_LMA     equ 0x400
EFER_NXE     equ 0x800
CODE_64      equ 0xa09b
CODE_64_USER equ 0xa0fb
DATA_KERNEL  equ 0xc093
DATA_USER    equ 0xc0f3
; what is delivered through the IDT
EVENT_FAULT     equ 0
EVENT_SOFTWARE  equ 1
EVENT_EXTERNAL  equ 2
"""

SPILLED = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r12", "r13", "r14")
"""Guest registers that live in host registers of the same name."""


def spill(depth: int) -> str:
    """Store the guest's registers, with `depth` bytes pushed on top of the state pointer."""
    lines = [f"mov [rsp+{depth}+GPR_{name.upper()}], {name}" for name in SPILLED]
    return "\n".join([*lines, f"mov [rsp+{depth}+GPR_RSP], r15"])


def fill() -> str:
    """Load the guest's registers again; rsp is the state pointer."""
    lines = [f"mov {name}, [rsp+GPR_{name.upper()}]" for name in SPILLED]
    return "\n".join([*lines, "mov r15, [rsp+GPR_RSP]"])
