"""Where everything lives in the state block that translated code reaches through the host's rsp.

The host's rsp always points at offset 0 of the state block while translated
code runs: the guest's state and the tables lie above it, and the stack of the
native helpers (and of host signal handlers) lies below.  Offsets here are
used as symbols by the native helpers' assembly and by the translator.

Host registers while translated code runs:

* r10 and r11 are scratch (S1 and S2); r15 holds the guest's rsp.
* every other general register holds the guest register of its own name;
* the guest's r10, r11 and r15 live in their slots of `GPR`.
* arithmetic flags and DF are the guest's own; the other bits of RFLAGS are in
  the block (`IF`, `SYSTEM_FLAGS`).
* x87, SSE and AVX state are the guest's own.
"""

from __future__ import annotations

from itertools import count

from trivisor.machine import fast_ports, virtual_apic

STACK_SIZE = 512 * 1024
"""Bytes below the state block; deep enough for the host's signal frames (AMX makes them 11 KiB)."""

TLB_ENTRIES = 1024
TLB_ENTRY_SIZE = 32
EXEC_TLB_ENTRIES = 512
EXEC_TLB_ENTRY_SIZE = 16  # linear page; physical page | global in bit 0
JUMP_CACHE_ENTRIES = 65536
BLOCK_TABLE_ENTRIES = 1 << 18
BLOCK_TABLE_ENTRY_SIZE = 32  # linear address; physical page | mode key; host address of the checked entry; -
FPU_AREA_SIZE = 4096
OPENED_PAGES = 16
LOCAL_ENTRIES = 256
"""TLB entries of pages that are not global that MOV to CR3 knows one by one; of more, it looks at all there are."""
KEYED_PAGES = 16
LARGE_PIECES = 4096
CPUID_ENTRIES = 256
CPUID_SPREAD = 0x1E3779B1
"""What a subleaf's place among them is by: the product's upper byte (multiplicative hashing)."""
AT_ONCE = 3_000
"""Nanoseconds to a timer that no host timer is worth: what is to do meanwhile takes longer."""
KNOWN_DATA_ENTRIES = 16
KNOWN_DATA_SIZE = 64  # selector | CPL << 16; raw descriptor; base; limit; attributes
SITES = 128
"""Site caches of one view: what tuned code keeps of the TLB, for single places in it."""
SITE_SIZE = 16  # tag; the page's distance from linear to host addresses, or from `DISTANT_SITES` on its host address
DISTANT_SITES = SITES // 2
EMPTY_SITE = 0xC000000000000000
"""Both halves of one that has no page: neither is canonical, nor is their sum."""
SAMPLES = 64

OFFSETS: dict[str, int] = {}
"""Offset in bytes from the state pointer of every named field."""


class _Cursor:
    def __init__(self) -> None:
        self.at = 0

    def field(self, name: str, size: int = 8, align: int = 8) -> None:
        self.at = (self.at + align - 1) & -align
        OFFSETS[name] = self.at
        self.at += size


_cursor = _Cursor()

# The first four are within reach of an 8-bit displacement, as are GPR r0 to r11.
_HOT = (
    "POLL",  # address loaded at every poll; kick() makes it unreadable
    "FLAGS_AX",  # flags parked by LAHF; SETO AL while checks clobber the host's
    "MISS",  # address of the TLB miss helper
    "RIP",  # guest rip, exact whenever the engine is outside translated code
)
for _name in _HOT:
    _cursor.field(_name)
_cursor.field("GPR", 16 * 8)

_FIELDS = (
    "FLAGS",  # the host-held guest flags (arithmetic and DF), when outside translated code
    "IF",  # the guest's interrupt flag, in its place: 0 or 0x200
    "SYSTEM_FLAGS",  # the rest of RFLAGS: bit 1, TF, IOPL, NT, RF, VM, AC, VIF, VIP, ID
    "ARMED",  # what POLL becomes when interrupts get enabled: good or bad address
    "POLL_GOOD",
    "POLL_BAD",
    "PENDING",  # nonzero: Python wants control at the next boundary with IF=1
    "EXIT",  # why translated code left (an EXIT_ constant)
    "EXIT_A",  # arguments of the exit
    "EXIT_B",
    "EXIT_C",
    "RESUME",  # where code goes on after the check of an access that needs Python
    "HOST_R10",  # r10 on the way into translated code: the host address of an access that goes on
    "HOST_RSP",
    "HOST_FAULT_IP",  # where in the code cache a host signal struck
    "HOST_FAULT_SIGNAL",
    "HOST_FAULT_CODE",  # the exception's vector on the host
    "LEAVE",  # address of the code that leaves to Python
    "LOOKUP",  # address of the jump cache miss helper
    "CHAIN",  # address of the helper for not yet linked direct jumps
    "SYSCALL",  # addresses of the helpers for these instructions
    "SYSRET",
    "IRET",
    "WRITE_CR3",
    "CROSSED",  # ... that writes back what an access across pages has left in the bounce buffer
    *(f"PREPARED_{n}" for n in range(8)),  # host addresses of accesses that Python has prepared for one instruction
    "CROSS_LOW",  # host addresses and lengths of the two pieces of such an access
    "CROSS_LOW_LENGTH",
    "CROSS_HIGH",
    "CROSS_HIGH_LENGTH",
    "NATIVE_MSRS",  # 1 when nobody watches RDMSR and WRMSR
    "NATIVE_MMIO",  # 1 when nobody watches accesses to devices
    "NATIVE_EVENTS",  # 1 when exceptions, IRET and the like may be done natively
    "MODE_KERNEL",  # mode keys of 64-bit code at CPL 0 and 3
    "MODE_USER",
    "RAM_BASE",  # host address of guest physical 0
    "RAM_LOW_END",  # end of RAM below 4 GiB
    "RAM_HIGH_END",  # end of RAM above 4 GiB (0 when there is none)
    "CODE_LINES",  # host address of 64 bits per physical page: which of its 64-byte lines hold translated code
    "MODE",  # translation mode key of the running code
    "JUMP_CACHE_CURRENT",  # address of the jump cache of the current mode
    "JUMP_CACHE_USED_CURRENT",  # and of its map of used chunks
    "KERNEL_JUMPS_LOCAL",  # nonzero: the kernel's jump cache leads into pages that are not global
    "CALL_OUT",  # address of the helper that has Python do the instruction
    "ESCAPE",  # the same, from the middle of an instruction's code
    "FAULT_GP",  # ... that raises #GP(0), or #SS(0), from there
    "FAULT_SS",
    "FAULT_DE",
    "FAULT_UD",
    "FAULT_NM",
    "INVALIDATE",  # addresses of helpers that instructions call (natives/assists.py): INVLPG
    "PORT_IN",  # IN AL and OUT of AL
    "PORT_OUT",
    "READ_CR8",
    "WRITE_CR8",
    "CPUID",
    "READ_PKRU",
    "WRITE_PKRU",
    "LOAD_SEGMENT",
    "READ_MSR",
    "WRITE_MSR",
    "RAISE",  # ... and of those that end a block: an exception; INT n
    "INTERRUPT",
    "HOST_FAULT_ADDRESS",
    "CR0",
    "CR2",
    "CR3",
    "CR4",
    "EFER",
    "XCR0",
    "STAR",
    "LSTAR",
    "CSTAR",
    "FMASK",
    "KERNEL_GS_BASE",
    "SYSENTER_CS",
    "SYSENTER_ESP",
    "SYSENTER_EIP",
    "TSC_OFFSET",
    "TSC_ADJUST",
    "TSC_AUX",
    "GDTR_BASE",
    "GDTR_LIMIT",
    "IDTR_BASE",
    "IDTR_LIMIT",
    "CPL",
    "SCRATCH_0",
    "SCRATCH_1",
    "SCRATCH_2",
    "SCRATCH_3",  # where helpers go on; not for translated code
    "STRIDE",  # of a string instruction
    "SPILL",
    "SPILL_2",
    "CLOSE",  # address of the helper that does for CLAC what its inline code cannot
    "OPENED_COUNT",  # user pages that the kernel's TLB holds only while RFLAGS.AC is set, under CR4.SMAP
    *(f"OPENED_{n}" for n in range(OPENED_PAGES)),  # host addresses of their entries; of more, all are looked for
    "LOCAL_COUNT",  # how many TLB entries, of data and of fetches, were filled with pages that are not global
    "KEYED_COUNT",  # pages with a protection key but 0 that the TLBs hold
    *(f"KEYED_{n}" for n in range(KEYED_PAGES)),  # host addresses of their entries; of more, all are looked for
    "JUMPED_FROM",  # in the code cache: the end of the last indirect jump of 64-bit code
    "NMI_BLOCKED",  # until the next IRET
    "NMI_WAITING",
    "WATCHING",  # 1 when there are data breakpoints: TLB misses go to Python
    "SAMPLE_COUNT",  # of SAMPLES that wait to be looked at
    "SAMPLED_CODE",  # how often translated code was found running, and native helpers
    "SAMPLED_HELPERS",
    "HELPERS_SIZE",  # bytes of the helpers, with which the code cache begins
    "PAGING_NATIVE",  # 1 when the native walker may be used (long mode, 4-level)
    "PKRU",
    "PKRS",
    "KEYS",  # 1 where protection keys count at all
    "KEYS_USER",  # PKRU and PKRS where CR4 has them count, else 0
    "KEYS_SUPERVISOR",
    "PHYSICAL_LIMIT_MASK",  # reserved physical address bits of a page-table entry
    "KNOWN_CS",  # descriptor that IRET loaded last to user mode, raw; with its selector
    "KNOWN_CS_SELECTOR",
    "KNOWN_SS",
    "KNOWN_SS_SELECTOR",
    "KNOWN_KERNEL_CS",
    "KNOWN_KERNEL_CS_SELECTOR",
    "EVENT",  # what `deliver` delivers: an EVENT_ constant of natives/common.py
    "EVENT_RIP",  # ... and the rip that its frame gets
    "VIRTUAL_APIC",  # host address of machine.virtual_apic.VirtualApic's words
    "CPUID_TABLE",  # host address of cpuid_table.CpuidTable's entries
    "HOST_TIMER",  # the kernel's number of the timer that asks for Python, -1: none (alarm.py)
    "ALARM",  # the host's TSC at which it fires, or what is over
    "ALARM_FOR",  # the guest time (ns) that Python has set it to; -1: another
    "TSC_FREQUENCY",
    "PORTS",  # host address of machine.fast_ports.FastPorts.words
    "PORT_QUEUE",  # host address of bytes written to QUEUE_PORT that its device has not got yet
    "PORT_QUEUED",  # how many they are
    "QUEUE_PORT",
    "SUPERVISED",  # 1 when a hypervisor's own native code is asked first (machine/deprivileged.py)
    "SUPERVISOR_TABLE",
    "GUEST_KERNEL",  # 1 while the kernel of a guest runs that is all in ring 3
    "KEPT_HALF",  # bit 63: the upper half of such a kernel counts as global, and who changes its mappings says so
    "ROOT_USER",  # the page tables that the TLBs of such a guest's user and kernel are of, in this order
    "ROOT_KERNEL",
    "IGNORE_CLI",  # 1: CLI and STI of such a kernel do nothing
    "MISS_DEVICE",  # the physical page of the last miss that needs Python if the native walker found a device's there
    "WALKED_PHYSICAL",  # what the native page walker found for Python
    "WALKED_LEAF",
    "WALKED_RIGHTS",
    "WALKED_NX",
    "WALKED_INFO",
    "COUNT_TLB_MISS",
    "COUNT_LOOKUP",
    "COUNT_LOOKUP_MISS",
    "COUNT_PAGE_FAULT",
    "COUNT_EXCEPTION",  # by EVENT
    "COUNT_SOFTWARE_INTERRUPT",
    "COUNT_EXTERNAL_INTERRUPT",
    "COUNT_SYSCALL",
    "COUNT_SYSRET",
    "COUNT_IRET",
    "COUNT_CR3",
    "COUNT_EXEC_TLB_MISS",
    "COUNT_CODE_PAGE_WRITE",
    "COUNT_CODE_WRITE",  # those of them that hit code
    "COUNT_PAGE_CROSSING",
    "COUNT_INVALIDATION",
    "COUNT_PORT_IN",
    "COUNT_PORT_OUT",
    "COUNT_CPUID",
    "COUNT_CR8",
    "COUNT_APIC",
    "COUNT_PKRU",
    "COUNT_LOAD_SEGMENT",
    "COUNT_READ_MSR",
    "COUNT_WRITE_MSR",
    "COUNT_SUPERVISED",  # calls that a hypervisor's native code has done
    "COUNT_IGNORED_CLI",
    "COUNT_TAKEN_UP",  # blocks made of a template
    "COUNT_COMPOSED",  # blocks put together by natives/compose.py
    "COMPOSED_INSTRUCTIONS",
    "COUNT_LINKED",
    "COUNT_FORGOTTEN",
    "BLOCKS",  # host addresses of the tables of block_tables.py, and how much of them is in use
    "BLOCK_COUNT",
    "LINKS",
    "LINK_COUNT",
    "TEMPLATES",
    "TEMPLATE_COUNT",
    "TEMPLATE_HEADS",
    "PAGE_BLOCKS",
    "USER_ELSEWHERE",  # not 0: another engine runs 64-bit code of ring 3, and there are no blocks of it
    "ARCHIVE",  # host address of an earlier run's images
    "SHAPES",  # ... of shapes.py's tables, or 0 if nothing is to be composed
    "COMPOSER_WANTS",  # what it does not know of a block: a WANTS_ constant of shapes.py, or 0 if it cannot be composed
    "COMPOSER_WANTS_WHAT",  # ... a shape: the instruction's offset in the block; a variant: its shape's record
    "CODE_BASE",  # the code cache: host addresses of its two views, bytes in use, size
    "CODE_WRITABLE",
    "CODE_USED",
    "CODE_SIZE",
)
for _name in _FIELDS:
    _cursor.field(_name)

SEGMENT_ORDER = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
for _segment in SEGMENT_ORDER:
    for _part in ("SELECTOR", "BASE", "LIMIT", "ATTRIBUTES"):
        _cursor.field(f"{_segment}_{_part}")
for _segment in SEGMENT_ORDER[:6]:
    # which offsets 16- and 32-bit code may access: the first, and the last to read and to write (-1: none)
    for _part in ("FIRST", "LAST_READ", "LAST_WRITE"):
        _cursor.field(f"{_segment}_{_part}")

_cursor.field("SLOT", 64, 64)  # an operand on its way
_cursor.field("SLOT_ADDRESS")
_cursor.field("VECTORS", 96, 32)  # data, indexes and mask of an instruction that goes by elements
_cursor.field("ALARM_VALUE", 32)  # struct itimerspec
_cursor.field("LOCAL", 8 * LOCAL_ENTRIES)  # their host addresses; bit 0: of a fetch TLB
_cursor.field("MARKS", 8 * 64)  # free-running counters of inline events, by index
_cursor.field("SAMPLES", 8 * SAMPLES)  # host addresses of code that the tuner's timer has found running
_cursor.field("KNOWN_DATA", KNOWN_DATA_ENTRIES * KNOWN_DATA_SIZE, 64)  # descriptors that data segments had
_cursor.field("SITES_KERNEL", SITES * SITE_SIZE, 64)
_cursor.field("SITES_USER", SITES * SITE_SIZE, 64)
_cursor.field("SITE_MISSES", SITES * 4, 64)  # of both views; they go on to the TLB
_cursor.field("BOUNCE", 4 * 8192, 4096)  # where single accesses to MMIO and across pages happen
_cursor.field("CROSS", 128, 64)  # an access across pages
_cursor.field("ACROSS", 64, 64)  # the guest's bytes where an instruction may run into the next page (natives/adopt.py)
_cursor.field("ACROSS_SECOND")
_cursor.field("FPU", FPU_AREA_SIZE, 64)
_cursor.field("TLB_KERNEL", TLB_ENTRIES * TLB_ENTRY_SIZE, 4096)
_cursor.field("TLB_USER", TLB_ENTRIES * TLB_ENTRY_SIZE, 4096)
_cursor.field("EXEC_TLB_KERNEL", EXEC_TLB_ENTRIES * EXEC_TLB_ENTRY_SIZE, 4096)
_cursor.field("EXEC_TLB_USER", EXEC_TLB_ENTRIES * EXEC_TLB_ENTRY_SIZE, 4096)
_cursor.field("JUMP_PAGES", 65536, 64)  # a byte per linear page (hashed) with jump cache entries
_cursor.field("JUMP_LARGE", 256, 64)  # a byte per GiB (hashed) with jump cache entries that lead into large pages
_cursor.field("LARGE_PIECES", LARGE_PIECES * 8, 64)  # per 2 MiB (hashed), what the TLBs have had of large pages:
# the linear page of the only piece, with bit 0 set; -1 for several; 0 for none
_cursor.field("HUGE_PIECES", 256, 64)  # a byte per GiB (hashed), for larger ones
_cursor.field("JUMP_CACHE_USED", 3 * 128, 64)  # a byte per 4 KiB of jump cache that holds something
_cursor.field("JUMP_CACHE_KERNEL", JUMP_CACHE_ENTRIES * 8, 4096)
_cursor.field("JUMP_CACHE_USER", JUMP_CACHE_ENTRIES * 8, 4096)
_cursor.field("JUMP_CACHE_OTHER", JUMP_CACHE_ENTRIES * 8, 4096)
_cursor.field("BLOCK_TABLE", BLOCK_TABLE_ENTRIES * BLOCK_TABLE_ENTRY_SIZE, 4096)
_cursor.field("BLOCK_NUMBERS", BLOCK_TABLE_ENTRIES * 4, 4096)  # of the blocks in it


def large_place(linear: int) -> int:
    """The index in LARGE_PIECES of a linear address."""
    return (linear >> 21 ^ linear >> 33) % LARGE_PIECES


STATE_SIZE = (_cursor.at + 4095) & -4096

# Offsets within a TLB entry.
TLB_READ = 0  # linear page that may be read, or an address of another set
TLB_WRITE = 8
TLB_HOST = 16  # host address of the page
TLB_INFO = 24  # bit 0: global; bit 1: piece of a large page; bit 2: of one larger than 2 MiB
INFO_OPENED = 0x40  # ... bit 6: opened by AC
INFO_KEYED = 0x80  # ... bit 7: its rights depend on a protection key
BLOCK_SECOND = 24  # of an instruction that runs into another page: that one's physical address | 1; else 0

_exit = count(1)
EXITS: dict[str, int] = {
    name: next(_exit)
    for name in (
        "EXIT_LOOKUP",  # no translation known for RIP
        "EXIT_CHAIN",  # a direct jump wants linking: EXIT_A is the link's number
        "EXIT_SLOW_ACCESS",  # memory access at EXIT_A needs Python; EXIT_B describes it
        "EXIT_EXCEPTION",  # deliver EXIT_A (vector), EXIT_B (error code or -1), CR2 is set
        "EXIT_CALL_OUT",  # the instruction at RIP is done by Python
        "EXIT_STEPPED",  # a single-step block ran to its end
        "EXIT_POLL",  # interrupt window check wanted at RIP
        "EXIT_HOST_FAULT",  # a host signal struck translated code at HOST_FAULT_IP
        "EXIT_UNDEFINED",
        "EXIT_SEGMENT_FAULT",  # EXIT_A (#GP or #SS) of an access, error code 0
        "EXIT_BREAKPOINT",  # an instruction breakpoint at RIP
        "EXIT_SYSTEM_CALL",  # a supervisor is to do SYSCALL at RIP
        "EXIT_INTERRUPT",  # Python is to deliver the external interrupt with vector EXIT_A
    )
}

SYMBOLS: dict[str, int] = {
    **OFFSETS,
    **{f"GUEST_{name}": OFFSETS[name] for name in ("RIP", "CR0", "CR2", "CR3", "CR4")},
    "XCR0_FIELD": OFFSETS["XCR0"],
    **EXITS,
    **{f"GPR_{name.upper()}": OFFSETS["GPR"] + 8 * i for i, name in enumerate(
        ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
         "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"))},
    "TLB_READ": TLB_READ,
    "TLB_WRITE": TLB_WRITE,
    "TLB_HOST": TLB_HOST,
    "TLB_INFO": TLB_INFO,
    "TLB_ENTRIES": TLB_ENTRIES,
    "OPENED_PAGES": OPENED_PAGES,
    "LOCAL_ENTRIES": LOCAL_ENTRIES,
    "KEYED_PAGES": KEYED_PAGES,
    "INFO_OPENED": INFO_OPENED,
    "INFO_KEYED": INFO_KEYED,
    "EXEC_TLB_ENTRIES": EXEC_TLB_ENTRIES,
    "JUMP_CACHE_ENTRIES": JUMP_CACHE_ENTRIES,
    "BLOCK_TABLE_ENTRIES": BLOCK_TABLE_ENTRIES,
    "BLOCK_SECOND": BLOCK_SECOND,
    "APIC_TPR": virtual_apic.TPR,
    "APIC_TPR_FREE": virtual_apic.TPR_FREE,
    "APIC_END": virtual_apic.END,
    "APIC_WINDOW": virtual_apic.WINDOW,
    "APIC_X2APIC": virtual_apic.X2APIC,
    "APIC_COMMAND": virtual_apic.COMMAND,
    "APIC_DESTINATION": virtual_apic.DESTINATION,
    "APIC_IDENTITY": virtual_apic.IDENTITY,
    "END_ASK": virtual_apic.END_ASK,
    "END_READY": virtual_apic.END_READY,
    "END_DONE": virtual_apic.END_DONE,
    "CPUID_ENTRIES": CPUID_ENTRIES,
    "CPUID_SPREAD": CPUID_SPREAD,
    "AT_ONCE": AT_ONCE,
    "KNOWN_DATA_ENTRIES": KNOWN_DATA_ENTRIES,
    "PORT_READS": fast_ports.READS,
    "PORT_LATCHES": fast_ports.LATCHES,
    "PORT_DROPS": fast_ports.DROPS,
    "PORT_QUEUES": fast_ports.QUEUES,
    "PORT_QUEUE_SIZE": fast_ports.QUEUE_SIZE,
}  # fmt: skip
"""Everything the helpers' assembly may name."""
