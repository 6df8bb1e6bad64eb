"""Firmware from its reset vector through real and protected mode, on the whole machine."""

from __future__ import annotations

from pathlib import Path

from trivisor import VirtualMachine
from trivisor.monitor.outcome import StopReason
from trivisor.x86.assembler import assemble

_FIRMWARE = """
bits 16
BASE equ 0xf0000
start:
    cli
    mov ax, cs
    mov ds, ax
    xor ax, ax
    mov ss, ax
    mov sp, 0x7000
    mov si, hello - BASE
    call print
    mov al, 0x42
    out 0x80, al
    lgdt [table - BASE]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    db 0x66, 0xea
    dd protected
    dw 8
print:
    lodsb
    test al, al
    jz done
    mov dx, 0x3f8
    out dx, al
    jmp print
done: ret
hello: db "real mode", 10, 0
table: dw 23
    dd gdt
    align 8
gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
bits 32
protected:
    mov ax, 16
    mov ds, eax
    mov ss, eax
    mov esp, 0x7000
    mov esi, there
again:
    lodsb
    mov dx, 0x3f8
    out dx, al
    test al, al
    jnz again
    mov al, 21
    out 0xf4, al
    hlt
there: db "protected mode", 10, 0
"""


def test_from_the_reset_vector(tmp_path: Path) -> None:
    code = assemble(_FIRMWARE, bits=16, origin=0xF0000)
    image = code.code.ljust(0xFFF0, b"\0") + b"\xea\0\0\0\xf0".ljust(16, b"\0")  # jmp F000:0000
    (tmp_path / "bios.bin").write_bytes(image)
    with VirtualMachine(firmware=tmp_path / "bios.bin", memory="16M") as machine:
        outcome = machine.run(timeout=20)
        assert outcome.reason is StopReason.DEBUG_EXIT
        assert outcome.status == 43
        assert machine.output == b"real mode\nprotected mode\n\0"
        assert machine.post_code == 0x42
