"""A small multiboot kernel that the project carries, to try a machine without an operating system.

It runs in 32-bit protected mode, reports what the boot loader told it on COM1,
takes ten timer interrupts through the 8259A and ends the run through port
0xf4.  The last word of its command line can ask for another end: `spin` loops
forever, `halt` halts with interrupts off and `triple` ends in a triple fault.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from trivisor.x86.assembler import assemble

STATUS = 43
"""The exit status of a run that goes well: what 21 written to port 0xf4 makes (`devices.debug_exit`)."""
FAILED = 3
"""The exit status after an exception or interrupt that it does not expect (1 written)."""

_ORIGIN = 0x100000
_SCRATCH = 0x4000
"""Bytes after the code and data for the IDT and the stack."""

_SOURCE = """
MAGIC equ 0x1BADB002
FLAGS equ 3                        ; page-aligned modules, memory information
COM1 equ 0x3F8
CODE equ 0x08
DATA equ 0x10
TICKS equ 10

header:
    dd MAGIC, FLAGS, -(MAGIC + FLAGS) & 0xFFFFFFFF

start:
    mov esp, stack_top
    mov ebp, ebx
    cld
    lgdt [gdt_pointer]             ; the loader's own need not last (multiboot 3.2)
    jmp CODE:reloaded
reloaded:
    mov ecx, DATA
    mov ds, cx
    mov es, cx
    mov ss, cx
    cmp eax, 0x2BADB002
    jne failed
    call make_idt

    mov esi, greeting
    call print
    mov esi, [ebp + 16]            ; the command line
    call print
    call new_line
    call print_memory_map
    call print_modules
    call choose_ending
    call count_ticks

    mov esi, ticked
    call print
    mov al, 21
    out 0xF4, al
    jmp failed

; ---- what the loader tells ----

print_memory_map:
    mov ebx, [ebp + 48]
    mov edi, [ebp + 44]
    add edi, ebx
.entry:
    cmp ebx, edi
    jae .done
    mov esi, memory_text
    call print
    mov edx, [ebx + 8]
    call print_hex
    mov edx, [ebx + 4]
    call print_hex
    call print_space
    mov edx, [ebx + 16]
    call print_hex
    mov edx, [ebx + 12]
    call print_hex
    call print_space
    mov edx, [ebx + 20]
    call print_hex
    call new_line
    mov eax, [ebx]
    lea ebx, [ebx + eax + 4]
    jmp .entry
.done:
    ret

print_modules:
    mov edi, [ebp + 20]
    mov ebx, [ebp + 24]
.module:
    test edi, edi
    jz .done
    mov esi, module_text
    call print
    mov edx, [ebx + 4]
    sub edx, [ebx]
    call print_hex
    call print_space
    mov esi, [ebx]                 ; the sum of its bytes
    xor edx, edx
    xor eax, eax
.byte:
    cmp esi, [ebx + 4]
    jae .summed
    lodsb
    add edx, eax
    jmp .byte
.summed:
    call print_hex
    call print_space
    mov esi, [ebx + 8]
    call print
    call new_line
    add ebx, 16
    dec edi
    jmp .module
.done:
    ret

; ---- endings ----

choose_ending:
    mov esi, [ebp + 16]
    mov ebx, esi                   ; where the last word begins
.character:
    lodsb
    cmp al, ' '
    jne .next
    mov ebx, esi
.next:
    test al, al
    jnz .character
    sub esi, ebx
    mov ecx, esi                   ; its length with the zero
    mov eax, endings
.ending:
    mov edi, [eax]
    test edi, edi
    jz .done
    mov esi, ebx
    push ecx
    repe cmpsb
    pop ecx
    je .found
    add eax, 8
    jmp .ending
.found:
    jmp [eax + 4]
.done:
    ret

spin:
    jmp spin

halt:
    cli
    hlt
    jmp failed

triple:
    lidt [no_idt]
    ud2

; ---- interrupts ----

make_idt:
    mov edi, idt
    mov ecx, 256
.gate:
    mov eax, unexpected
    call set_gate
    add edi, 8
    loop .gate
    mov edi, idt + 8 * 0x20
    mov eax, tick
    call set_gate
    lidt [idt_pointer]
    ret

set_gate:                          ; an interrupt gate at edi to eax
    mov word [edi], ax
    mov word [edi + 2], CODE
    mov word [edi + 4], 0x8E00
    shr eax, 16
    mov word [edi + 6], ax
    ret

count_ticks:
    mov esi, pic_set_up
.pic:
    lodsb
    movzx edx, al
    lodsb
    test edx, edx
    jz .pit
    out dx, al
    jmp .pic
.pit:
    mov al, 0x34                   ; channel 0, both bytes, mode 2
    out 0x43, al
    mov al, 11932 & 0xFF           ; 100 Hz
    out 0x40, al
    mov al, 11932 >> 8
    out 0x40, al
    sti
.wait:
    hlt
    cmp dword [ticks], TICKS
    jb .wait
    cli
    ret

tick:
    push eax
    inc dword [ticks]
    mov al, 0x20
    out 0x20, al
    pop eax
    iretd

unexpected:
    mov esi, unexpected_text
    call print
failed:
    mov al, 1
    out 0xF4, al
    cli
    hlt
    jmp failed

; ---- output ----

print:                             ; the text at esi, up to a zero
    lodsb
    test al, al
    jz .done
    call print_character
    jmp print
.done:
    ret

print_hex:                         ; edx
    push ecx
    mov ecx, 8
.digit:
    rol edx, 4
    mov al, dl
    and al, 15
    cmp al, 10
    sbb al, 0x69
    das
    call print_character
    loop .digit
    pop ecx
    ret

new_line:
    mov al, 10
    jmp print_character
print_space:
    mov al, ' '
print_character:                   ; al
    push edx
    push eax
    mov edx, COM1 + 5
.wait:
    in al, dx
    test al, 0x20
    jz .wait
    pop eax
    mov edx, COM1
    out dx, al
    pop edx
    ret

; ---- data ----

greeting: db "trivisor test kernel", 10, "command line: ", 0
memory_text: db "memory: ", 0
module_text: db "module: ", 0
ticked: db "ticks: 10", 10, 0
unexpected_text: db "unexpected interrupt", 10, 0
spin_word: db "spin", 0
halt_word: db "halt", 0
triple_word: db "triple", 0
pic_set_up:                        ; ports and values: vectors 0x20 to 0x2f, IRQ 0 alone unmasked
    db 0x20, 0x11, 0x21, 0x20, 0x21, 0x04, 0x21, 0x01, 0x21, 0xFE
    db 0xA0, 0x11, 0xA1, 0x28, 0xA1, 0x02, 0xA1, 0x01, 0xA1, 0xFF, 0, 0
align 8
endings: dd spin_word, spin, halt_word, halt, triple_word, triple, 0
ticks: dd 0
gdt: dq 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF
gdt_pointer:
    dw 23
    dd gdt
idt_pointer:
    dw 8 * 256 - 1
    dd idt
no_idt:
    dw 0
    dd 0
align 16
idt:
stack_top equ idt + SCRATCH
"""


def build() -> bytes:
    """The kernel as a multiboot ELF file."""
    return multiboot_elf(_SOURCE, {"SCRATCH": _SCRATCH})


def multiboot_elf(source: str, symbols: Mapping[str, int]) -> bytes:
    """32-bit code that begins with a multiboot header and has a label `start`, as an ELF file.

    It stands at 1 MiB, and has `symbols["SCRATCH"]` bytes of memory after it.
    """
    program = assemble(source, bits=32, origin=_ORIGIN, symbols=symbols)
    header_length, offset = 52, 0x1000
    identity = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)  # 32 bits, little-endian, version 1
    entry = program.labels["start"]
    header = identity + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, header_length, 0, 0, 52, 32, 1, 0, 0, 0)
    length = len(program.code)
    header += struct.pack("<8I", 1, offset, _ORIGIN, _ORIGIN, length, length + symbols["SCRATCH"], 7, 0x1000)
    return header.ljust(offset, b"\0") + program.code
