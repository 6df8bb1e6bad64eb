"""The guest programs, by theme; each opens with the theory that it tests (sections are of Intel SDM 3A)."""

from __future__ import annotations

from tests.conformance.machine import PORTS, Guest, Program
from tests.unit.translation.engine.guest import DATA, DEVICE, HANDLERS, PML4, STACK, USER_STACK, P, U, W
from trivisor.machine.exits import PortOut
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.x86 import exceptions as x

A1, A2, A4, A8 = 0xA0, 0xA1A0, 0xA3A2A1A0, 0xA7A6A5A4A3A2A1A0
LINEAR = 0x10_0000_0000
NO_SYSCALL = "SYSCALL of a guest's ring 3 stays there"


def _reading(offset: int, size: int) -> tuple[str, int, int, int]:
    return "read", offset, size, int.from_bytes(bytes(0xA0 + (offset + i) % 64 for i in range(size)), "little")


def _wrote(offset: int, size: int, value: int) -> tuple[str, int, int, int]:
    return "write", offset, size, value


# -- ports and devices --------------------------------------------------------------------------------------

PORT_IO = [
    Program(
        f"in and out of {size}",
        "IN and OUT move as many bytes as the operand has; a narrow IN leaves the rest of RAX alone.",
        f"mov rax, 0x1122334455667788\n mov edx, {PORTS}\n out dx, {name}\n mov rax, -1\n in {name}, dx\n hlt",
        ports=[_wrote(0, size, 0x55667788 & (1 << 8 * size) - 1), _reading(0, size)],
        registers={"rax": value},
    )
    for size, name, value in ((1, "al", (1 << 64) - 256 | A1), (2, "ax", (1 << 64) - 65536 | A2), (4, "eax", A4))
]
STRING_IO = [
    Program(
        f"rep ins{letter} and outs{letter}",
        "INS and OUTS move (R)CX units between DX and memory, and leave RCX at zero and the pointers behind the last.",
        f"mov edx, {PORTS}\n mov edi, DATA\n mov ecx, 5\n rep ins{letter}\n mov esi, DATA\n mov ecx, 3\n"
        f" rep outs{letter}\n hlt",
        ports=[*[_reading(0, size)] * 5, *[_wrote(0, size, (A1, A2, 0, A4)[size - 1])] * 3],
        registers={"rcx": 0, "rdi": DATA + 5 * size, "rsi": DATA + 3 * size},
    )
    for size, letter in ((1, "b"), (2, "w"), (4, "d"))
] + [
    Program(
        "rep ins backwards",
        "With DF set the pointers go down.",
        f"std\n mov edx, {PORTS}\n mov edi, DATA+8\n mov ecx, 3\n rep insw\n cld\n hlt",
        registers={"rcx": 0, "rdi": DATA + 2},
        ports=[_reading(0, 2)] * 3,
        memory={DATA + 4: A2 << 16 | A2},
    )
]
MMIO = [
    Program(
        f"device register of {size} bytes",
        "Loads and stores outside of RAM reach the device once, with the size that the instruction has.",
        f"mov rax, 0x1122334455667788\n mov ebx, {DEVICE}\n mov [rbx+8], {name}\n xor eax, eax\n mov {name}, [rbx]\n hlt",
        device=[_wrote(8, size, 0x1122334455667788 & (1 << 8 * size) - 1), _reading(0, size)],
        registers={"rax": (A1, A2, 0, A4, 0, 0, 0, A8)[size - 1]},
    )
    for size, name in ((1, "al"), (2, "ax"), (4, "eax"), (8, "rax"))
] + [
    Program(
        "read, change and write a device register",
        "An instruction with a memory destination reads the device and then writes it.",
        f"mov ebx, {DEVICE}\n or byte [rbx+4], 0x0f\n add dword [rbx], 1\n hlt",
        device=[_reading(4, 1), _wrote(4, 1, 0xAF), _reading(0, 4), _wrote(0, 4, A4 + 1)],
    ),
    Program(
        "string move from a device",
        "MOVS reads the device as often as it writes memory.",
        f"mov esi, {DEVICE}\n mov edi, DATA\n mov ecx, 4\n rep movsd\n hlt",
        device=[_reading(4 * i, 4) for i in range(4)],
        registers={"rcx": 0, "rsi": DEVICE + 16, "rdi": DATA + 16},
        memory={DATA: A4},
    ),
]

# -- the processor's identity and registers -----------------------------------------------------------------

IDENTITY = [
    Program(
        f"cpuid {leaf:#x}.{subleaf}",
        "CPUID answers the same under every technique (the processor's model belongs to the machine).",
        f"mov eax, {leaf}\n mov ecx, {subleaf}\n cpuid\n hlt",
        unless_emulated="CPUID shows the host's own features" if leaf in (1, 7) else "",
    )
    for leaf, subleaf in ((0, 0), (1, 0), (4, 1), (7, 0), (0xB, 0), (0x15, 0), (0x40000000, 0), (0x80000001, 0),
                          (0x80000002, 0), (0x80000008, 0))
] + [
    Program(
        f"msr {index:#x}",
        "What WRMSR wrote RDMSR reads.",
        f"mov ecx, {index}\n mov eax, {value & 0xFFFFFFFF}\n mov edx, {value >> 32}\n wrmsr\n xor eax, eax\n xor edx, edx\n"
        " rdmsr\n hlt",
        registers={"rax": value & 0xFFFFFFFF, "rdx": value >> 32},
    )
    for index, value in (
        (0xC0000081, 0x00230008_00000000), (0xC0000082, 0xFFFFFFFF81000000), (0xC0000084, 0x47700),
        (0xC0000102, 0xFFFF888000000000), (0x174, 0x10), (0x175, 0xFFFFFE0000001000), (0x176, 0xFFFFFFFF81001000),
        (0x277, 0x0007010600070106), (0x2FF, 0xC06), (0x200, 0xC0000000),
    )
] + [
    Program(
        f"{what} of an MSR that is not there",
        "RDMSR and WRMSR of an unknown index are #GP(0).",
        f"mov ecx, 0x12345678\n here: {what}\n hlt",
        vector=x.GENERAL_PROTECTION,
        error=0,
        at="here",
    )
    for what in ("rdmsr", "wrmsr")
] + [
    Program(
        "fs and gs bases are MSRs",
        "FS_BASE and GS_BASE are the hidden parts of FS and GS; SWAPGS exchanges GS_BASE and KERNEL_GS_BASE.",
        "mov ecx, 0xc0000101\n mov eax, DATA\n xor edx, edx\n wrmsr\n mov ecx, 0xc0000102\n mov eax, DATA+64\n wrmsr\n"
        " mov dword [gs:0], 1\n swapgs\n mov dword [gs:0], 2\n hlt",
        memory={DATA: 1, DATA + 64: 2},
    ),
    Program(
        "syscall and sysret",
        "SYSCALL enters at LSTAR with rip in RCX and RFLAGS in R11 masked by FMASK; SYSRET goes back to ring 3 (5.8.8).",
        "mov ecx, 0xc0000081\n xor eax, eax\n mov edx, 0x00180008\n wrmsr\n mov ecx, 0xc0000082\n mov eax, 0x80000000 + entry - CODE\n"
        " mov edx, -1\n wrmsr\n mov ecx, 0xc0000084\n mov eax, 0x200\n xor edx, edx\n wrmsr\n mov ecx, user\n mov r11d, 0x202\n"
        " o64 sysret\n user: mov ebx, 5\n syscall\n after: hlt\n entry: cmp ebx, 5\n jne bad\n inc dword [DATA]\n hlt\n bad: ud2",
        setup=lambda guest: [guest.map(0xFFFFFFFF_80000000, 0x100000, P | W)][0] and None,
        memory={DATA: 1},
        unless_emulated=NO_SYSCALL,
    ),
]

# -- exceptions ---------------------------------------------------------------------------------------------

_FAULTS: list[tuple[str, str, int, int | None]] = [
    ("divide error", "xor ecx, ecx\n here: div ecx", x.DIVIDE_ERROR, None),
    ("invalid opcode", "here: ud2", x.INVALID_OPCODE, None),
    ("segment not present", "mov eax, 0x48\n here: mov ds, eax", x.SEGMENT_NOT_PRESENT, 0x48),
    ("general protection: a selector beyond the GDT", "mov eax, 0x1f8\n here: mov ds, eax", x.GENERAL_PROTECTION, 0x1F8),
    ("general protection: a reserved bit of CR4", "mov rax, 0x80000620\n here: mov cr4, rax", x.GENERAL_PROTECTION, 0),
    ("general protection: not canonical", "mov rax, 0x800000000000\n here: mov [rax], eax", x.GENERAL_PROTECTION, 0),
    ("stack fault: not canonical", "mov rbp, 0x800000000000\n here: mov [rbp], eax", x.STACK_FAULT, 0),
    ("page fault: not present, read", f"mov rax, {LINEAR}\n here: mov eax, [rax]", x.PAGE_FAULT, 0),
    ("page fault: not present, write", f"mov rax, {LINEAR}\n here: mov [rax], eax", x.PAGE_FAULT, 2),
]
EXCEPTIONS = [
    Program(
        name,
        "A fault's frame holds the address of the instruction itself, and the error code of its kind (6.15).",
        f"{source}\n ud2\n hlt",
        vector=vector,
        error=error,
        at="here",
        setup=lambda guest: guest.memory.write_u64(0x6000 + 0x48, 0x00CF13000000FFFF),
        start=lambda state: setattr(state, "gdtr", Table(0x6000, 0x57)),
    )
    for name, source, vector, error in _FAULTS
] + [
    Program(
        "breakpoint",
        "INT3 is a trap: its frame points behind it.",
        "int3\n here: ud2",
        vector=x.BREAKPOINT,
        at="here",
    ),
    Program(
        "software interrupt",
        "INT n goes through gate n without an error code, and its frame points behind it.",
        "int 0x80\n here: ud2",
        vector=0x80,
        at="here",
    ),
    Program(
        "device not available",
        "With CR0.TS set, an x87 instruction is #NM.",
        "mov rax, cr0\n or eax, 8\n mov cr0, rax\n here: fld1\n hlt",
        vector=x.DEVICE_NOT_AVAILABLE,
        at="here",
    ),
    Program(
        "alignment check in ring 3",
        "With CR0.AM and RFLAGS.AC a misaligned access of ring 3 is #AC(0).",
        "pushfq\n or dword [rsp], 0x40000\n popfq\n mov ebx, DATA+1\n here: mov eax, [rbx]\n ud2",
        cpl=3,
        start=lambda state: setattr(state, "cr0", state.cr0 | 1 << 18),
        vector=x.ALIGNMENT_CHECK,
        error=0,
        at="here",
    ),
    Program(
        "a privileged instruction in ring 3",
        "HLT at CPL 3 is #GP(0), taken on the stack that the TSS names.",
        "here: hlt",
        cpl=3,
        vector=x.GENERAL_PROTECTION,
        error=0,
        at="here",
    ),
    Program(
        "ports in ring 3",
        "IN at CPL > IOPL without a permission bit is #GP(0).",
        "here: in al, 0x80",
        cpl=3,
        vector=x.GENERAL_PROTECTION,
        error=0,
        at="here",
    ),
    Program(
        "a supervisor page from ring 3",
        "An access of ring 3 to a supervisor page is #PF with the bits P and U/S.",
        f"mov rax, {LINEAR}\n here: mov eax, [rax]\n ud2",
        cpl=3,
        setup=lambda guest: [guest.map(LINEAR, 0x500000, P | W)][0] and None,
        vector=x.PAGE_FAULT,
        error=5,
        at="here",
    ),
    Program(
        "a fault while a fault is delivered",
        "#GP whose gate is not present becomes a double fault (table 6-5), error code 0.",
        "mov rax, 0x800000000000\n mov [rax], eax\n hlt",
        setup=lambda guest: guest.memory.write_u64(0x7000 + 16 * 13, 0),
        vector=x.DOUBLE_FAULT,
        error=0,
    ),
]

# -- interrupts ---------------------------------------------------------------------------------------------


def _deliver(vector: int) -> object:
    """Have the local APIC get an interrupt when the guest writes to port 0x80."""

    def setup(guest: Guest) -> None:
        guest.board.local_apic.enter_virtual_wire_mode()
        guest.on_port(lambda exit_: guest.interrupt(vector))

    return setup


def _nmi(guest: Guest) -> None:
    def come(exit_: PortOut) -> None:
        guest.board.interrupts.on_nmi()

    guest.on_port(come)


LATE = "the emulator looks for an interrupt window only now and then"
INTERRUPTS = [
    Program(
        "an interrupt comes at once with IF set",
        "Between two instructions, the first one after it was raised (6.3).",
        "sti\n nop\n out 0x80, al\n here: inc ebx\n hlt",
        setup=_deliver(0x51),  # type: ignore[arg-type]
        vector=0x51,
        at="here",
        registers={"rbx": 0},
    ),
    Program(
        "an interrupt waits for IF",
        "With IF clear it waits; STI lets it in only after the instruction that follows (6.8.3).",
        "cli\n out 0x80, al\n inc ebx\n inc ebx\n sti\n inc ebx\n here: inc ebx\n hlt",
        setup=_deliver(0x52),  # type: ignore[arg-type]
        unless_emulated=LATE,
        vector=0x52,
        at="here",
        registers={"rbx": 3},
    ),
    Program(
        "an interrupt waits for POPF",
        "POPF that sets IF lets it in at once, without a shadow.",
        "pushfq\n or dword [rsp], 0x200\n out 0x80, al\n inc ebx\n popfq\n here: inc ebx\n hlt",
        setup=_deliver(0x53),  # type: ignore[arg-type]
        unless_emulated=LATE,
        vector=0x53,
        at="here",
        registers={"rbx": 1},
    ),
    Program(
        "hlt wakes for an interrupt",
        "HLT ends with the interrupt, whose frame points behind it.",
        "out 0x80, al\n sti\n hlt\n here: ud2",
        setup=_deliver(0x54),  # type: ignore[arg-type]
        vector=0x54,
        at="here",
    ),
    Program(
        "hlt wakes for the timer",
        "The local APIC's timer in one-shot mode.",
        "mov eax, 0xfee00000\n mov dword [rax+0xf0], 0x1ff\n mov dword [rax+0x3e0], 0xb\n mov dword [rax+0x320], 0x55\n"
        " mov dword [rax+0x380], 20000\n sti\n hlt\n here: ud2",
        vector=0x55,
        at="here",
    ),
    Program(
        "a spinning guest is interrupted by the timer",
        "A loop without exits is left for an interrupt all the same.",
        "mov eax, 0xfee00000\n mov dword [rax+0xf0], 0x1ff\n mov dword [rax+0x3e0], 0xb\n mov dword [rax+0x320], 0x56\n"
        " mov dword [rax+0x380], 200000\n sti\n here: jmp here",
        vector=0x56,
        at="here",
    ),
    Program(
        "the task priority holds an interrupt back",
        "CR8 is bits 7:4 of the APIC's TPR: what is not above it waits (10.8.6).",
        "mov eax, 6\n mov cr8, rax\n sti\n out 0x80, al\n inc ebx\n inc ebx\n xor eax, eax\n mov cr8, rax\n"
        " here: inc ebx\n hlt",
        setup=_deliver(0x57),  # type: ignore[arg-type]
        unless_emulated=LATE,
        vector=0x57,
        at="here",
        registers={"rbx": 2},
    ),
    Program(
        "nmi comes with IF clear",
        "A non-maskable interrupt minds no flag and has vector 2 (6.7).",
        "cli\n nop\n out 0x80, al\n here: inc ebx\n hlt",
        setup=_nmi,
        vector=2,
        at="here",
        registers={"rbx": 0},
    ),
    Program(
        "two interrupts by priority",
        "The higher vector first; the other waits for EOI and IF (10.8.3).",
        "cli\n out 0x80, al\n sti\n nop\n nop\n ud2\n first: mov dword [DATA], 1\n mov eax, 0xfee00000\n"
        " mov dword [rax+0xb0], 0\n iretq",
        setup=lambda guest: (
            guest.board.local_apic.enter_virtual_wire_mode(),
            guest.on_port(lambda exit_: (guest.interrupt(0x41), guest.interrupt(0x61))),  # type: ignore[func-returns-value, arg-type, return-value]
            guest.gate(0x61, "first"),
        )[0],  # type: ignore[func-returns-value]
        unless_emulated=LATE,
        vector=0x41,
        memory={DATA: 1},
    ),
]

# -- memory -------------------------------------------------------------------------------------------------


def _pages(guest: Guest) -> None:
    """LINEAR and the page after it lead to 0x500000 and 0x501000; [DATA+16] has the first entry's address."""
    entry = guest.map(LINEAR, 0x500000)
    guest.map(LINEAR + 0x1000, 0x501000)
    guest.memory.write_u64(DATA + 16, entry)
    guest.memory.write_u32(0x500000, 0x1111)
    guest.memory.write_u32(0x501000, 0x2222)


PAGING = [
    Program(
        "a changed mapping after invlpg",
        "INVLPG makes a change of the page's entry visible (4.10.4.1).",
        f"mov rbx, {LINEAR}\n mov r8d, [rbx]\n mov rdi, [DATA+16]\n mov qword [rdi], 0x501007\n invlpg [rbx]\n"
        " mov r9d, [rbx]\n hlt",
        setup=_pages,
        registers={"r8": 0x1111, "r9": 0x2222},
    ),
    Program(
        "a changed mapping after mov to cr3",
        "MOV to CR3 forgets what is not global.",
        f"mov rbx, {LINEAR}\n mov r8d, [rbx]\n mov rdi, [DATA+16]\n mov qword [rdi], 0x501007\n mov rax, cr3\n"
        " mov cr3, rax\n mov r9d, [rbx]\n hlt",
        setup=_pages,
        registers={"r8": 0x1111, "r9": 0x2222},
    ),
    Program(
        "accessed and dirty",
        "A read sets A in the page's entry, a write D as well (4.8).",
        f"mov rbx, {LINEAR}\n mov rdi, [DATA+16]\n mov qword [rdi], 0x500007\n invlpg [rbx]\n mov eax, [rbx]\n"
        " mov r8d, [rdi]\n mov [rbx], eax\n mov r9d, [rdi]\n hlt",
        setup=_pages,
        registers={"r8": 0x500027, "r9": 0x500067},
    ),
    Program(
        "write protection of the supervisor",
        "With CR0.WP a write of ring 0 to a read-only page is #PF(3); its address is in CR2.",
        f"mov rbx, {LINEAR}\n mov rdi, [DATA+16]\n mov qword [rdi], 0x500005\n invlpg [rbx]\n mov eax, [rbx]\n"
        " here: mov [rbx+4], eax\n ud2",
        setup=_pages,
        vector=x.PAGE_FAULT,
        error=3,
        at="here",
    ),
    Program(
        "without write protection",
        "With CR0.WP clear ring 0 writes to read-only pages.",
        f"mov rax, cr0\n and eax, ~0x10000\n mov cr0, rax\n mov rbx, {LINEAR}\n mov rdi, [DATA+16]\n"
        " mov qword [rdi], 0x500005\n invlpg [rbx]\n mov dword [rbx], 0x3333\n mov r8d, [rbx]\n hlt",
        setup=_pages,
        registers={"r8": 0x3333},
    ),
    Program(
        "no execution",
        "With EFER.NXE, fetching from a page with bit 63 is #PF with the bits P and I/D.",
        f"mov rbx, {LINEAR}\n mov rdi, [DATA+16]\n mov rax, 0x8000000000500007\n mov [rdi], rax\n invlpg [rbx]\n jmp rbx",
        setup=_pages,
        vector=x.PAGE_FAULT,
        error=0x11,
    ),
    Program(
        "an access across two pages",
        "The bytes come from both pages, wherever they lie.",
        f"mov rbx, {LINEAR}\n mov rax, 0x1122334455667788\n mov [rbx+0xffc], rax\n mov rcx, [rbx+0xffc]\n hlt",
        setup=_pages,
        registers={"rcx": 0x1122334455667788},
        memory={0x500FFC: 0x55667788, 0x501000: 0x11223344},
    ),
    Program(
        "self-modifying code",
        "A store into the instructions ahead is seen when they run (8.1.3).",
        "mov ecx, 3\n again: mov byte [patch+1], cl\n jmp patch\n patch: mov al, 0\n add ebx, eax\n xor eax, eax\n dec ecx\n"
        " jnz again\n hlt",
        registers={"rbx": 6},
    ),
    Program(
        "code through another mapping",
        "A store through another linear address changes the code all the same.",
        f"mov rbx, {LINEAR}\n mov byte [rbx], 0xb0\n mov word [rbx+1], 0xc307\n call rbx\n mov r8d, eax\n"
        " mov byte [0x500001], 0x09\n call rbx\n mov r9d, eax\n hlt",
        setup=_pages,
        registers={"r8": 7, "r9": 9},
    ),
]

# -- debugging ----------------------------------------------------------------------------------------------

DEBUG = [
    Program(
        "the trap flag in ring 3",
        "With TF, #DB follows each instruction, DR6.BS set; the frame points behind it (17.3.1.4).",
        "pushfq\n or dword [rsp], 0x100\n popfq\n inc ebx\n here: inc ebx\n ud2",
        cpl=3,
        vector=x.DEBUG,
        at="here",
        registers={"rbx": 1},
    ),
    Program(
        "debug registers keep what was written",
        "DR0 to DR3 hold linear addresses, DR7 its enable bits with bit 10 set.",
        "mov eax, 0x12345000\n mov dr0, rax\n mov eax, 0x55\n mov dr3, rax\n mov rcx, dr0\n mov rdx, dr3\n mov rbx, dr7\n hlt",
        registers={"rcx": 0x12345000, "rdx": 0x55, "rbx": 0x400},
    ),
]

# -- 32 and 16 bits -----------------------------------------------------------------------------------------


def _real(state: CpuState) -> None:
    """Real-address mode at 0000:8000 (linear 0x8000 is the TSS's page: the program stands at 0x18000)."""
    state.cr0, state.cr4, state.efer = 0x10, 0, 0
    state.cs = Segment(0x1800, 0x18000, 0xFFFF, 0x9B)
    for name in ("ds", "es", "ss", "fs", "gs"):
        setattr(state, name, Segment(0x3000, 0x30000, 0xFFFF, 0x93))
    state.gdtr, state.idtr = Table(), Table(0, 0x3FF)
    state.rip, state.gpr[4] = 0, 0xFFFE


def _put_real(guest: Guest) -> None:
    """What stands at the program's origin goes to 0x18000; vector 0x21 of the table leads to 1800:0100."""
    guest.memory.write(0x18000, guest.memory.read(guest.origin, 0x200))
    guest.memory.write_u32(4 * 0x21, 0x18000100)
    guest.memory.write_u32(4 * 0, 0x18000180)


MODES = [
    Program(
        "32-bit protected mode",
        "Operands and addresses are 32 bits wide, and the stack moves by 4.",
        "mov eax, 0x12345678\n push eax\n pusha\n popa\n pop ebx\n mov ecx, esp\n inc eax\n hlt",
        bits=32,
        registers={"rax": 0x12345679, "rbx": 0x12345678, "rcx": STACK},
    ),
    Program(
        "a fault in 32-bit protected mode",
        "The frame has 32-bit words.",
        "xor ecx, ecx\n here: div ecx\n hlt",
        bits=32,
        vector=x.DIVIDE_ERROR,
        at="here",
    ),
    Program(
        "segment limits in 32-bit protected mode",
        "An access beyond a data segment's limit is #GP(0).",
        "mov eax, 0x50\n mov es, eax\n mov eax, [es:0xffc]\n here: mov eax, [es:0xffd]\n hlt",
        bits=32,
        setup=lambda guest: guest.memory.write_u64(0x6000 + 0x50, 0x0040930000000FFF),
        start=lambda state: setattr(state, "gdtr", Table(0x6000, 0x57)),
        vector=x.GENERAL_PROTECTION,
        error=0,
        at="here",
    ),
    Program(
        "32-bit code under 64-bit mode",
        "A far return to a code segment without L runs in compatibility mode, where INC is one byte.",
        "push KERNEL_CS32\n lea rax, [rel there]\n push rax\n o64 retf\n bits 32\n there: mov eax, 5\n db 0x40\n hlt",
        registers={"rax": 6},
    ),
    Program(
        "real-address mode",
        "Addresses are segment * 16 + offset, operands 16 bits wide (20.1).",
        "bits 16\n mov ax, 0x1234\n mov [0x10], ax\n push ax\n pop bx\n mov cx, sp\n inc ax\n hlt",
        bits=32,
        setup=_put_real,
        start=_real,
        registers={"rax": 0x1235, "rbx": 0x1234, "rcx": 0xFFFE},
        memory={0x30010: 0x1234},
    ),
    Program(
        "an interrupt in real-address mode",
        "INT n pushes FLAGS, CS and IP and goes where the table at 0 says; IRET comes back (20.1.4).",
        "bits 16\n mov ax, 1\n int 0x21\n inc bx\n hlt\n times 0x100-($-$$) nop\n add ax, 7\n iret",
        bits=32,
        setup=_put_real,
        start=_real,
        registers={"rax": 8, "rbx": 1, "rsp": 0xFFFE},
    ),
    Program(
        "from real-address to protected mode",
        "MOV to CR0 that sets PE, and a far jump that loads CS (9.9.1).",
        "bits 16\n mov bx, 0x5555\n mov eax, cr0\n or al, 1\n mov cr0, eax\n o32 jmp 0x30:0x18080\n"
        " times 0x80-($-$$) nop\n bits 32\n mov eax, 0x10\n mov ds, eax\n mov dword [DATA], 0xabcd\n hlt",
        bits=32,
        setup=_put_real,
        start=lambda state: (_real(state), setattr(state, "gdtr", Table(0x6000, 0x4F)))[0],  # type: ignore[func-returns-value]
        memory={DATA: 0xABCD},
    ),
]

NATIVE = "ring 3 has the host's control registers"


def _fill_table(guest: Guest) -> None:
    """Every entry of the level-4 table leads to the identity map."""
    for entry in range(1, 512):
        guest.memory.write_u64(PML4 + 8 * entry, guest.memory.read_u64(PML4))


# -- between ring 3 and ring 0 ------------------------------------------------------------------------------

_TO_RING_3 = (
    "mov ecx, 0xc0000081\n xor eax, eax\n mov edx, 0x00180008\n wrmsr\n mov ecx, 0xc0000082\n mov eax, entry\n xor edx, edx\n"
    " wrmsr\n mov ecx, 0xc0000084\n mov eax, 0x200\n wrmsr\n mov ecx, user\n mov r11d, 0x202\n o64 sysret\n user: "
)
RINGS = [
    Program(
        "ring 3 sees a mapping that ring 0 has changed",
        "After INVLPG the new entry counts, at any privilege level (4.10.4.1).",
        f"{_TO_RING_3} mov rbx, {LINEAR}\n mov r8d, [rbx]\n syscall\n mov r9d, [rbx]\n syscall\n"
        " entry: inc r12d\n cmp r12d, 2\n je done\n mov rdi, [DATA+16]\n mov qword [rdi], 0x501007\n invlpg [rbx]\n"
        " o64 sysret\n done: hlt",
        setup=_pages,
        registers={"r8": 0x1111, "r9": 0x2222, "r12": 2},
        unless_emulated=NO_SYSCALL,
    ),
    Program(
        "ring 0 runs what ring 3 has written",
        "Code that another privilege level writes is executed as it stands (11.6).",
        f"{_TO_RING_3} syscall\n mov byte [changed+1], 2\n syscall\n"
        " entry: inc r12d\n changed: mov al, 1\n movzx eax, al\n add r13d, eax\n cmp r12d, 2\n je done\n"
        " o64 sysret\n done: hlt",
        registers={"r13": 3},
        unless_emulated=NO_SYSCALL,
    ),
    Program(
        "vector registers go to ring 0 and back",
        "Nothing but the instructions themselves changes XMM registers.",
        f"{_TO_RING_3} mov eax, 7\n movd xmm3, eax\n syscall\n movd r9d, xmm3\n movd r10d, xmm4\n syscall\n"
        " entry: inc r12d\n cmp r12d, 2\n je done\n movd r8d, xmm3\n mov eax, 9\n movd xmm4, eax\n"
        " o64 sysret\n done: hlt",
        registers={"r8": 7, "r9": 7, "r10": 9},
        unless_emulated=NO_SYSCALL,
    ),
    Program(
        "fs and gs bases that ring 3 sets",
        "WRFSBASE and WRGSBASE set the hidden parts under CR4.FSGSBASE; ring 0 finds them.",
        f"{_TO_RING_3} mov eax, DATA\n wrfsbase rax\n add eax, 64\n wrgsbase rax\n mov dword [fs:0], 1\n syscall\n"
        " entry: mov dword [gs:0], 2\n rdfsbase r8\n rdgsbase r9\n hlt",
        start=lambda state: setattr(state, "cr4", state.cr4 | 1 << 16),
        registers={"r8": DATA, "r9": DATA + 64},
        memory={DATA: 1, DATA + 64: 2},
        unless_emulated=NO_SYSCALL,
    ),
    Program(
        "a level-4 table without a free entry",
        "Nothing of it shows in ring 3.",
        f"{_TO_RING_3} inc r12d\n syscall\n entry: inc r12d\n hlt",
        setup=_fill_table,
        registers={"r12": 2},
        unless_emulated=NO_SYSCALL,
    ),
    Program(
        "rdtsc in ring 3 under CR4.TSD",
        "It is #GP(0) (2.5).",
        "here: rdtsc",
        cpl=3,
        start=lambda state: setattr(state, "cr4", state.cr4 | 4),
        vector=x.GENERAL_PROTECTION,
        error=0,
        at="here",
        unless_emulated=NATIVE,
    ),
] + [
    Program(
        f"{name} in ring 3",
        "It goes to ring 0 by the gate, with the stack that the TSS has (6.14).",
        f"mov ebx, 5\n {code}",
        cpl=3,
        vector=vector,
        error=error,
        at=at,
        unless_emulated="the emulator knows no INT n from ring 3" if vector == 0x80 else "",
    )
    for name, code, vector, error, at in (
        ("breakpoint", "int3\n here: nop", x.BREAKPOINT, None, "here"),
        ("INT n", "int 0x80\n here: nop", 0x80, None, "here"),
        ("invalid opcode", "here: ud2", x.INVALID_OPCODE, None, "here"),
        ("divide error", "xor ecx, ecx\n here: div ecx", x.DIVIDE_ERROR, None, "here"),
        ("privileged instruction", "here: hlt", x.GENERAL_PROTECTION, 0, "here"),
        ("page fault", f"mov rax, {LINEAR}\n here: mov [rax], eax", x.PAGE_FAULT, 6, "here"),
    )
]

PROGRAMS = [
    *PORT_IO, *STRING_IO, *MMIO, *IDENTITY, *EXCEPTIONS, *INTERRUPTS, *PAGING, *DEBUG, *MODES, *RINGS,
]  # fmt: skip
__all__ = ["HANDLERS", "PROGRAMS", "USER_STACK", "U"]
