"""A multiboot kernel that brings the processor into 64-bit mode, for a benchmark to be put behind it.

It sets up 4-level paging, the kernel's descriptors, a TSS, an IDT and the
system-call MSRs, and calls `kernel_main`, which the benchmark has.  A program
for ring 3 is mapped in 4 KiB pages at `USER`; everything else is the kernel's,
in global 2 MiB pages.  An exception that nobody expects is printed, with its
vector, error code, rip and CR2, and ends the machine.
"""

from __future__ import annotations

from trivisor.guests.test_kernel import multiboot_elf

USER = 0x40000000
"""Linear address of the program in ring 3: its code and data."""
USER_SIZE = 16 << 20
STACK_SIZE = 0x4000
_TABLES_SIZE = 0x6000 + (USER_SIZE >> 21) * 0x1000
_SCRATCH = _TABLES_SIZE + STACK_SIZE + USER_SIZE + 0x1000

_SOURCE = """
KERNEL_CS equ 0x08
USER32_CS equ 0x18                 ; SYSRET takes the two after it
TSS equ 0x30
PRESENT equ 1
WRITABLE equ 2
USER_PAGE equ 4
UNCACHED equ 0x10
LARGE equ 0x80
GLOBAL equ 0x100
EFER equ 0xC0000080
STAR equ 0xC0000081
LSTAR equ 0xC0000082
SFMASK equ 0xC0000084

header:
    dd 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFFFFFF

start:
    mov esp, stack_top
    cld
    mov eax, pdpt + (PRESENT | WRITABLE | USER_PAGE)
    mov [pml4], eax
    mov eax, kernel_directory + (PRESENT | WRITABLE | USER_PAGE)
    mov [pdpt], eax
    mov eax, user_directory + (PRESENT | WRITABLE | USER_PAGE)
    mov [pdpt + 8], eax
    mov eax, device_directory + (PRESENT | WRITABLE | USER_PAGE)
    mov [pdpt + 24], eax
    mov eax, PRESENT | WRITABLE | LARGE | GLOBAL
    mov edi, kernel_directory
.kernel_page:
    mov [edi], eax
    add eax, 0x200000
    add edi, 8
    cmp edi, kernel_directory + 32 * 8
    jne .kernel_page
    mov dword [device_directory + (0xFEE00000 >> 21 & 511) * 8], 0xFEE00000 + (PRESENT | WRITABLE | LARGE | UNCACHED)
    mov eax, user_tables + (PRESENT | WRITABLE | USER_PAGE)
    mov edi, user_directory
.user_table:
    mov [edi], eax
    add eax, 0x1000
    add edi, 8
    cmp edi, user_directory + (USER_SIZE >> 21) * 8
    jne .user_table
    mov eax, user_memory + (PRESENT | WRITABLE | USER_PAGE)
    mov edi, user_tables
.user_page:
    mov [edi], eax
    add eax, 0x1000
    add edi, 8
    cmp edi, user_tables + (USER_SIZE >> 12) * 8
    jne .user_page
    mov esi, user_image
    mov edi, user_memory
    mov ecx, USER_IMAGE_SIZE
    rep movsb

    mov eax, 0x6A0                 ; PAE, PGE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, 1
    xor ecx, ecx
    cpuid
    mov [features], ecx
    bt ecx, 26
    jnc .no_xsave
    mov eax, cr4
    or eax, 0x40000                ; OSXSAVE
    mov cr4, eax
    xor ecx, ecx
    xgetbv
    or eax, 3
    bt dword [features], 28
    jnc .no_avx
    or eax, 7
.no_avx:
    xsetbv
.no_xsave:
    mov eax, pml4
    mov cr3, eax
    mov ecx, EFER
    mov eax, 0x101                 ; LME, SCE
    xor edx, edx
    wrmsr
    mov eax, 0x80010033            ; PG, WP, NE, ET, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    jmp KERNEL_CS:in_long_mode

bits 64
in_long_mode:
    mov eax, KERNEL_CS + 8
    mov ss, eax
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov rsp, stack_top
    mov eax, TSS
    ltr ax
    mov rdi, idt
    mov rax, exception_stubs
.gate:
    mov rsi, rax
    call set_gate.at
    lea rax, [rsi + 8]
    add rdi, 16
    cmp rdi, idt + 32 * 16
    jne .gate
    lidt [idt_pointer]
    mov ecx, STAR
    xor eax, eax
    mov edx, USER32_CS << 16 | KERNEL_CS
    wrmsr
    mov ecx, SFMASK
    mov eax, 0x700                 ; TF, IF, DF
    xor edx, edx
    wrmsr
    call kernel_main
    mov al, 21
    jmp end

set_lstar:                         ; rax = where SYSCALL leads
    mov ecx, LSTAR
    mov rdx, rax
    shr rdx, 32
    wrmsr
    ret

set_gate:                          ; edi = vector, rax = handler; an interrupt gate, which ring 3 may use too
    shl edi, 4
    add rdi, idt
.at:
    mov [rdi], ax
    mov word [rdi + 2], KERNEL_CS
    mov word [rdi + 4], 0xEE00
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], rax
    ret

enter_user:                        ; rcx = rip, rsp is ring 3's own; SYSCALL is the way back
    mov r11d, 2
    sysretq

align 8
exception_stubs:
VECTORS
exception:                         ; on the stack: vector, then either an error code or rip
    mov rsi, exception_text
    call print
    mov rbx, 5
.word:
    pop rax
    call print_hex
    dec rbx
    jnz .word
    mov rax, cr2
    call print_hex
    call new_line
    mov al, 0
end:                               ; al = the status to write
    out 0xF4, al
    cli
    hlt
    jmp end

print:                             ; the text at rsi, up to a zero
    lodsb
    test al, al
    jz .done
    call print_character
    jmp print
.done:
    ret

print_hex:                         ; rax, and a space; keeps the registers that C keeps
    push rbx
    push r12
    mov rbx, rax
    mov r12d, 16
.digit:
    rol rbx, 4
    mov eax, ebx
    and eax, 15
    mov rsi, digits
    mov al, [rsi + rax]
    call print_character
    dec r12d
    jnz .digit
    pop r12
    pop rbx
    mov al, ' '
    jmp print_character
new_line:
    mov al, 10
print_character:                   ; al
    mov ecx, eax
    mov edx, 0x3FD
.wait:
    in al, dx
    test al, 0x20
    jz .wait
    mov edx, 0x3F8
    mov eax, ecx
    out dx, al
    ret

digits: db "0123456789abcdef"
exception_text: db "exception ", 0
align 8
gdt:
    dq 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
    dq 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF
    dw 103, tss & 0xFFFF
    dd 0x00008900 | (tss >> 16 & 0xFF) | (tss >> 24 << 24)
    dq 0
gdt_pointer:
    dw 8 * 8 - 1
    dd gdt
    dd 0
idt_pointer:
    dw 256 * 16 - 1
    dq idt
features: dd 0
align 8
tss:
    dd 0
    dq stack_top                   ; rsp0
    times 23 dd 0
idt: times 512 dq 0
"""

_LAYOUT = """
align 4096
scratch:
pml4 equ scratch
pdpt equ scratch + 0x1000
kernel_directory equ scratch + 0x2000
user_directory equ scratch + 0x3000
device_directory equ scratch + 0x4000
spare_tables equ scratch + 0x5000  ; a page for the benchmark's own use
user_tables equ scratch + 0x6000
user_memory equ user_tables + (USER_SIZE >> 21) * 0x1000
stack_top equ user_memory + USER_SIZE + STACK_SIZE
"""


def long_mode_kernel(kernel_main: str, user_image: bytes, symbols: dict[str, int]) -> bytes:
    """The kernel as a multiboot ELF file.

    `kernel_main` is 64-bit source that has that label; `user_image` is put at `USER`, and the memory up to
    `USER_SIZE` after it is zero.  `symbols` are constants for `kernel_main`.
    """
    stubs = "\n".join(f"align 8\npush {vector}\njmp exception" for vector in range(32))
    data = "\n".join(
        "db " + ", ".join(map(str, user_image[at : at + 32])) for at in range(0, len(user_image), 32)
    )
    source = "\n".join(
        [_SOURCE.replace("VECTORS", stubs), kernel_main, "align 16\nuser_image:", data, "align 4096", _LAYOUT]
    )
    sizes = {
        "USER": USER,
        "USER_SIZE": USER_SIZE,
        "USER_IMAGE_SIZE": len(user_image),
        "STACK_SIZE": STACK_SIZE,
        "SCRATCH": _SCRATCH,
    }
    return multiboot_elf(source, sizes | symbols)
