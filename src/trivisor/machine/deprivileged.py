"""The seam between an engine that runs ring-3 code and a hypervisor whose guest kernel is run there.

A paravirtual guest's kernel and its programs both run at CPL 3.  What the
architecture would do in ring 0 about an exception, SYSCALL, INT n or an
interrupt is the hypervisor's: it is the `Supervisor`, the engine calls it, and
it acts on the processor through `DeprivilegedCpu`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from trivisor.machine.exits import Exit

ES, CS, SS, DS, FS, GS = range(6)
"""Segment registers in encoding order."""


class Registers(Protocol):
    """Something like a list of integers."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class NativeSupervision(NamedTuple):
    """What a supervisor does about its most frequent calls without Python: machine code on the engine's processor.

    `source` is assembly for the engine's native helpers.  The engine jumps to
    `supervisor_call` for SYSCALL by the guest's kernel, with rbp at its state
    and the guest's registers in it (GPR_RAX and so on, GUEST_RIP at the
    instruction, FLAGS, FS_BASE, GS_BASE, GUEST_CR2, RAM_BASE); to
    `supervisor_user_call` for SYSCALL by its user, and to
    `supervisor_exception` for an exception (EXIT_A: vector, EXIT_B: error code
    or -1); to `supervisor_instruction` for one of the kernel's instructions at
    GUEST_RIP that Python is to do, such as IN and OUT; and to
    `supervisor_interrupt` instead of calling `Supervisor.interrupt`.  Every host
    register but rbp is free.  It goes on by a jump:

    * `supervised_leave`: Python is to do it; nothing may have changed yet;
    * `supervised_following`: after the SYSCALL, whose RCX and R11 are set;
    * `supervised_resume`: at GUEST_RIP, whatever was put there;
    * `supervised_interrupt`: the same, once `Supervisor.interrupt` was called.

    It may call `guest_page` (r13: linear address, r12d: 0 to read or 1 to
    write; ZF set and rdi: its host address, good to the page's end; rbx, rbp,
    r12, r13 and r15 are kept), `supervised_enter` (rdi: root, esi: 1 for the
    kernel, as `DeprivilegedCpu.enter_space`; rbx, rbp and r12 to r15 are
    kept), `supervised_flush` (the same), `supervised_flush_lower` (all but the
    upper half of the kernel's space; the same), `supervised_changed` (rdi:
    host address of an entry, r10: what it was, as
    `DeprivilegedCpu.entry_changed` of one of level 1: eax; rbx, rbp and r10 to
    r15 are kept), `supervised_changed_upper` (of one of another level; the same,
    rdx too), `supervised_table` (rcx: a frame that has become a page table; all
    but rax and flags are kept), `supervised_alarm` (rdi: have the surroundings' timers looked at in so many
    ns at the latest; rbx, rbp and r12 to r15 are kept), `guest_cpuid` (CPUID in
    the guest's registers, as `Supervisor.cpuid`; ZF set if it was done) and
    `gather_flags` (rax = RFLAGS).  The constant FORGETS_AT_ONCE is
    `DeprivilegedCpu.forgets_at_once`.

    `table` is the host address of memory that the two sides share, which
    the code finds in SUPERVISOR_TABLE.

    `ring_3` is assembly for an engine on whose processor SYSCALL stays in
    ring 3.  It begins where SYSCALL goes, with rcx and r11 as SYSCALL leaves
    them, on a page that the guest can run and read but not write.  Byte
    `in_kernel` is 1 while the guest's kernel runs.  It goes on by a jump to
    `ring_3_call`, where the call is made after all, with nothing changed but
    flags; or at its label `ring_3_push` it pushes r11 on the guest's stack,
    and then it may change rax, for a jump to `ring_3_answered`.  Up to that
    push the engine may make the call instead.  The guest can jump to any of it.
    It may note something at `notes`, eight words that ring 3 can write, of which
    one of the first two is not zero then.  When the kernel is left, and at the
    latest before anything else is done for it, the engine calls
    `supervisor_notes` of `source` with rsi at their host address (rbp is kept),
    and sets those two to zero.  What the guest's user writes there is dropped.
    """

    source: str
    table: int
    ring_3: str


class DeprivilegedCpu(Protocol):
    """What a hypervisor does to a processor that its guest runs on; only from calls of its `Supervisor` methods.

    Linear addresses and values are unsigned 64-bit.
    """

    @property
    def registers(self) -> Registers:
        """The sixteen general registers in encoding order."""

    rip: int
    rflags: int
    dr: list[int]
    """The debug registers DR0 to DR7; to be changed by `set_debug_register` alone."""
    xcr0: int
    fsgsbase: bool
    """CR4.FSGSBASE: RDFSBASE and its like do not raise #UD."""

    @property
    def xcr0_supported(self) -> int:
        """The bits that XCR0 may have."""

    other_gs: int
    """GS base of the guest's other mode, kernel or user: what RDMSR of IA32_KERNEL_GS_BASE gives."""
    fpu_disabled: bool
    """CR0.TS: x87, SSE and AVX instructions raise #NM."""

    @property
    def forgets_at_once(self) -> bool:
        """Whether it uses no translation that the page tables do not have, unless `entry_changed` says that it may.

        Of entries that are not changed but lost with their table, only those count that the kernel's space has or the
        user's had when it was entered last.
        """

    interrupt_flag_ignored: bool
    """CLI and STI by the guest's kernel do nothing; else they raise #GP."""

    def selector(self, segment: int) -> int:
        """A segment register's selector."""

    def load_segment(self, segment: int, selector: int) -> None:
        """MOV to the segment register, by the descriptor tables; raises `GuestException`.  CS too, at CPL 3."""

    def set_flat(self, code: int, stack: int) -> None:
        """Load CS and SS with these selectors and what flat 64-bit ring-3 segments have behind them."""

    def base(self, segment: int) -> int:
        """The base address of FS or GS."""

    def set_base(self, segment: int, base: int) -> None:
        """Change the base of FS or GS; canonical."""

    def set_descriptor_tables(self, gdt: int, gdt_limit: int, ldt: int, ldt_limit: int) -> None:
        """Linear addresses and limits in bytes; an LDT limit of -1 is no LDT."""

    def enter_space(self, root: int, kernel: bool) -> None:
        """Go on in the address space of the page table at physical `root`, as the guest's kernel or as its user.

        Translations of the kernel's and of the user's space are kept apart: going from one to the other and
        back forgets nothing, as long as each is entered with the root it had before.
        """

    def flush(self) -> None:
        """Forget all translations of linear addresses."""

    def invalidate(self, linear: int) -> None:
        """Forget the translation of one linear address."""

    def entry_changed(self, address: int, level: int, old: int, new: int) -> bool:
        """The page-table entry at physical `address`, of a table of `level`, was present as `old` and is `new` now.

        An engine may forget what it knows by the entry at once.  True if it may use it on until the next `flush`.
        """

    def load(self, linear: int, size: int) -> bytes:
        """Guest memory in the space that was entered, with ring 3's rights; raises `GuestException`."""

    def store(self, linear: int, data: bytes) -> None:
        """Write all of `data`, page by page; raises `GuestException` at the first page that cannot be written."""

    def memory_written(self, address: int, length: int) -> None:
        """Physical memory was changed behind the processor's back."""

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """The processor's own CPUID: (eax, ebx, ecx, edx)."""

    def guest_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """The same as the guest sees it, by `Supervisor.cpuid`."""

    def set_debug_register(self, number: int, value: int) -> None:
        """MOV to a debug register, of a value that it may have."""

    def read_msr(self, index: int) -> int:
        """The processor's own model-specific register; raises `machine.vcpu.GeneralProtection`."""

    def write_msr(self, index: int, value: int) -> None:
        """Change it; raises `machine.vcpu.GeneralProtection`."""

    def tsc(self) -> int:
        """What RDTSC gives now."""

    def set_tsc_offset(self, offset: int) -> bool:
        """Have RDTSC give the host's TSC plus `offset`; False where ring 3 reads the host's itself."""

    def attention(self) -> None:
        """Have the engine ask for interrupts soon; from the vCPU's own thread."""


class Supervisor(Protocol):
    """The hypervisor, as an engine calls it: at instruction boundaries, with rip at the instruction in question.

    Each method may return an exit for the monitor; `Halt(True)` has the engine wait for an interrupt.
    """

    @property
    def native(self) -> NativeSupervision:
        """What of it needs no call; an engine that can do nothing with it calls for everything."""

    def watched(self) -> bool:
        """Whether somebody wants to see every call, so that none may be done natively."""

    def exception(self, vector: int, error_code: int | None, address: int | None) -> Exit | None:
        """The instruction at rip raised an exception; `address` is a page fault's."""

    def system_call(self, following: int) -> Exit | None:
        """SYSCALL; the next instruction is at `following`."""

    def software_interrupt(self, vector: int, following: int) -> Exit | None:
        """INT n, INT3 or INTO."""

    def interrupt(self) -> Exit | None:
        """The surroundings' interrupt controller has something pending."""

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """CPUID as the guest sees it: (eax, ebx, ecx, edx).

        The same for as long as `DeprivilegedCpu.cpuid` gives the same; leaves 0x40000100 to 0x4FFFFFFF are as there.
        """
