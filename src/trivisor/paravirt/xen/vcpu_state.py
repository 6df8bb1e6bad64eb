"""What a hypervisor remembers of a PV domain's one virtual processor (Xen, struct pv_vcpu)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Trap:
    """The guest's handler of one vector (arch-x86/xen.h, struct trap_info); address 0 is none."""

    address: int = 0
    selector: int = 0
    dpl: int = 0
    clears_events: bool = False


NO_TRAP = Trap()


@dataclass(frozen=True, slots=True)
class Callback:
    """An entry into the guest's kernel (callback.h); address 0 is none."""

    address: int = 0
    masks_events: bool = False


NO_CALLBACK = Callback()


@dataclass(slots=True)
class VcpuState:
    """The virtual processor beside its registers."""

    traps: dict[int, Trap] = field(default_factory=dict)
    event: Callback = NO_CALLBACK
    failsafe: Callback = NO_CALLBACK
    syscall: Callback = NO_CALLBACK
    syscall32: Callback = NO_CALLBACK
    sysenter: Callback = NO_CALLBACK
    nmi: Callback = NO_CALLBACK
    kernel_stack: int = 0
    """Where the guest's stack begins when its kernel is entered from user mode."""
    kernel_stack_selector: int = 0
    in_kernel: bool = True
    kernel_root: int = 0
    """The frame of the level-4 table of the guest's kernel; the processor's reference is to it."""
    user_root: int = 0
    """The same for its user mode; 0 is none."""
    other_gs: int = 0
    """GS base of the mode that is not running: what SWAPGS would bring."""
    gdt_frames: list[int] = field(default_factory=list)
    ldt_base: int = 0
    ldt_entries: int = 0
    iopl: int = 0
    cr0: int = 0
    cr2: int = 0
    cr4: int = 0
    assists: set[int] = field(default_factory=set)
    """Types of vm_assist that are on."""
    runstate_area: int = 0
    """Linear address, 0 for none."""
