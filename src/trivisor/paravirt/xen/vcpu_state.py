"""What a hypervisor remembers of a PV domain's one virtual processor (Xen, struct pv_vcpu)."""

from __future__ import annotations

from typing import NamedTuple

from trivisor.machine.saved_values import flag, number, number_list, rows
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.abi import VMASST_ARCHITECTURAL_IOPL, VMASST_TYPES
from trivisor.paravirt.xen.shared_table import INDEX, SharedFlag, SharedTable, SharedWord
from trivisor.x86.exceptions import PAGE_FAULT
from trivisor.x86.paging import is_canonical


class Trap(NamedTuple):
    """The guest's handler of one vector (arch-x86/xen.h, struct trap_info); address 0 is none."""

    address: int = 0
    selector: int = 0
    dpl: int = 0
    clears_events: bool = False


NO_TRAP = Trap()


class Callback(NamedTuple):
    """An entry into the guest's kernel (callback.h); address 0 is none."""

    address: int = 0
    masks_events: bool = False


NO_CALLBACK = Callback()


_CALLBACKS = ("event", "failsafe", "syscall", "syscall32", "sysenter", "nmi")
_NUMBERS = {
    "kernel_stack": 64, "kernel_stack_selector": 16, "iopl": 2, "cr2": 64, "cr4": 64, "runstate_area": 64,
    "time_area": 64,
}  # fmt: skip
"""Their widths in bits."""


class VcpuState(Remembers):
    """The virtual processor beside its registers; a part of it is in a table that native code shares.

    Who changes `traps`, `event`, `syscall` or `assists` calls `entries_changed`.
    """

    kernel_stack = SharedWord("KERNEL_STACK")
    """Where the guest's stack begins when its kernel is entered from user mode."""
    kernel_stack_selector = SharedWord("KERNEL_STACK_SELECTOR")
    in_kernel = SharedFlag("IN_KERNEL")
    kernel_root = SharedWord("KERNEL_ROOT")
    """The frame of the level-4 table of the guest's kernel; the processor's reference is to it."""
    user_root = SharedWord("USER_ROOT")
    """The same for its user mode; 0 is none."""
    iopl = SharedWord("IOPL")
    cr2 = SharedWord("CR2")

    def __init__(self, table: SharedTable) -> None:
        self.table = table
        self.traps: dict[int, Trap] = {}
        self.event = self.failsafe = self.syscall = NO_CALLBACK
        self.syscall32 = self.sysenter = self.nmi = NO_CALLBACK
        self.in_kernel = True
        self.gdt_frames: list[int] = []
        self.ldt_base = 0
        self.ldt_entries = 0
        self.cr0 = 0
        self.cr4 = 0
        self.assists: set[int] = set()
        """Types of vm_assist that are on."""
        self.runstate_area = 0
        self.time_area = 0
        """Linear addresses of places of the guest's own, 0 for none."""

    def save(self) -> Saved:
        """All but what page tables and descriptors are used: those are the frames' (`saved_memory.py`)."""
        return {
            "traps": [
                [vector, trap.address, trap.selector, trap.dpl, int(trap.clears_events)]
                for vector, trap in self.traps.items()
            ],
            "callbacks": [[getattr(self, name).address, int(getattr(self, name).masks_events)] for name in _CALLBACKS],
            "assists": sorted(self.assists),
            "in_kernel": self.in_kernel,
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load(self, saved: Saved) -> None:
        """ValueError for what no hypercall could have set."""
        traps = rows(saved, "traps", [8, 64, 16, 2, 1], 256)
        callbacks = rows(saved, "callbacks", [64, 1], len(_CALLBACKS))
        if len(callbacks) != len(_CALLBACKS):
            raise ValueError("callbacks are missing")
        entries = [*(row[1] for row in traps), *(row[0] for row in callbacks)]
        if not all(is_canonical(address) for address in entries):
            raise ValueError("the guest's kernel cannot be entered at what is no address")
        self.traps = {
            vector: Trap(address, selector | 3, dpl, bool(clears)) for vector, address, selector, dpl, clears in traps
        }
        for name, (address, masks) in zip(_CALLBACKS, callbacks, strict=True):
            setattr(self, name, Callback(address, bool(masks)))
        self.assists = set(number_list(saved, "assists", 6))
        if not self.assists <= VMASST_TYPES:
            raise ValueError("there are no such assists")
        self.in_kernel = flag(saved, "in_kernel")
        for name, bits in _NUMBERS.items():
            setattr(self, name, number(saved.get(name), name, bits))
        self.kernel_stack_selector |= 3
        self.entries_changed()

    def entries_changed(self) -> None:
        """Tell the native code where the guest's kernel is entered now."""
        words = self.table.words
        fault = self.traps.get(PAGE_FAULT, NO_TRAP)
        entries = {
            "EVENT": self.event,
            "SYSCALL": self.syscall,
            "PAGE_FAULT": Callback(fault.address, fault.clears_events),
        }
        for name, entry in entries.items():
            words[INDEX[f"{name}_ADDRESS"]] = entry.address
            words[INDEX[f"{name}_MASKS"]] = int(entry.masks_events)
        words[INDEX["IOPL_IN_FRAMES"]] = int(VMASST_ARCHITECTURAL_IOPL in self.assists)
