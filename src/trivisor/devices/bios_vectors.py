"""What a BIOS leaves in the interrupt vector table, as far as hardware needs it: handlers of the 16 ISA interrupts.

There are no services: every other vector leads to an IRET.  The timer's handler
counts ticks in the BIOS data area and calls the user's own, INT 1Ch.
"""

from __future__ import annotations

import struct

TIMER_VECTOR = 0x08
MASTER_VECTORS, SLAVE_VECTORS = range(0x08, 0x10), range(0x70, 0x78)
_HANDLERS = """
timer:
    push ds
    push ax
    xor ax, ax
    mov ds, ax
    inc dword [0x46c]
    int 0x1c
    mov al, 0x20
    out 0x20, al
    pop ax
    pop ds
nothing:
    iret
slave:
    push ax
    mov al, 0x20
    out 0xa0, al
    jmp end
master:
    push ax
    mov al, 0x20
end:
    out 0x20, al
    pop ax
    iret
"""


def build(address: int) -> tuple[bytes, bytes]:
    """(the table of 256 vectors, the handlers to lie at `address`, which is a multiple of 16 below 1 MiB)."""
    from trivisor.x86.assembler import assemble  # slow to import, and few guests want a BIOS

    program = assemble(_HANDLERS, bits=16)
    names = dict.fromkeys(range(256), "nothing")
    names |= dict.fromkeys(MASTER_VECTORS, "master") | dict.fromkeys(SLAVE_VECTORS, "slave")
    names[TIMER_VECTOR] = "timer"
    table = b"".join(struct.pack("<HH", program.labels[names[vector]], address >> 4) for vector in range(256))
    return table, program.code
