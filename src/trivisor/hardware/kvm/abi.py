"""KVM's ABI: ioctl numbers, capabilities, exit reasons and structure layouts.

From the kernel's documentation (Documentation/virt/kvm/api.rst), with the
kernel's own names: `STRUCTURES` and `IOCTLS` are compared with linux/kvm.h by
tests/unit/hardware/test_abi.py where that is installed.  Layouts are those of
x86-64.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from typing import Any, ClassVar, Final

API_VERSION: Final = 12

# -- structures ---------------------------------------------------------------------------------------------

STRUCTURES: Final[dict[str, type[Structure]]] = {}
"""Every structure by its name in linux/kvm.h or asm/kvm.h."""


class _Kernel(Structure):
    """Base of the kernel's structures; a subclass names its C one."""

    c_name: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.c_name:
            STRUCTURES[cls.c_name] = cls


class Regs(_Kernel):
    """General registers, in the kernel's order."""

    c_name = "kvm_regs"
    _fields_: ClassVar[Any] = [
        (name, c_uint64)
        for name in (
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
            "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
        )
    ]  # fmt: skip


class Segment(_Kernel):
    c_name = "kvm_segment"
    _fields_: ClassVar[Any] = [
        ("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16), ("type", c_uint8), ("present", c_uint8),
        ("dpl", c_uint8), ("db", c_uint8), ("s", c_uint8), ("l", c_uint8), ("g", c_uint8), ("avl", c_uint8),
        ("unusable", c_uint8), ("padding", c_uint8),
    ]  # fmt: skip


class DescriptorTable(_Kernel):
    c_name = "kvm_dtable"
    _fields_: ClassVar[Any] = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class SpecialRegs(_Kernel):
    c_name = "kvm_sregs"
    _fields_: ClassVar[Any] = [
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", DescriptorTable), ("idt", DescriptorTable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    ]  # fmt: skip


class ExceptionEvent(Structure):
    _fields_: ClassVar[Any] = [
        ("injected", c_uint8), ("nr", c_uint8), ("has_error_code", c_uint8), ("pending", c_uint8),
        ("error_code", c_uint32),
    ]  # fmt: skip


class InterruptEvent(Structure):
    _fields_: ClassVar[Any] = [("injected", c_uint8), ("nr", c_uint8), ("soft", c_uint8), ("shadow", c_uint8)]


class NmiEvent(Structure):
    _fields_: ClassVar[Any] = [("injected", c_uint8), ("pending", c_uint8), ("masked", c_uint8), ("pad", c_uint8)]


class SmiEvent(Structure):
    _fields_: ClassVar[Any] = [
        ("smm", c_uint8), ("pending", c_uint8), ("smm_inside_nmi", c_uint8), ("latched_init", c_uint8),
    ]  # fmt: skip


class VcpuEvents(_Kernel):
    c_name = "kvm_vcpu_events"
    _fields_: ClassVar[Any] = [
        ("exception", ExceptionEvent), ("interrupt", InterruptEvent), ("nmi", NmiEvent),
        ("sipi_vector", c_uint32), ("flags", c_uint32), ("smi", SmiEvent), ("triple_fault", c_uint8),
        ("reserved", c_uint8 * 26), ("exception_has_payload", c_uint8), ("exception_payload", c_uint64),
    ]  # fmt: skip


class SyncRegs(_Kernel):
    """What `KVM_CAP_SYNC_REGS` shows of the registers in the run structure itself."""

    c_name = "kvm_sync_regs"
    _fields_: ClassVar[Any] = [("regs", Regs), ("sregs", SpecialRegs), ("events", VcpuEvents)]


class DebugRegs(_Kernel):
    c_name = "kvm_debugregs"
    _fields_: ClassVar[Any] = [
        ("db", c_uint64 * 4), ("dr6", c_uint64), ("dr7", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 9),
    ]  # fmt: skip


class Xsave(_Kernel):
    """The XSAVE area in standard format."""

    c_name = "kvm_xsave"
    _fields_: ClassVar[Any] = [("region", c_uint8 * 4096)]


class Xcr(_Kernel):
    c_name = "kvm_xcr"
    _fields_: ClassVar[Any] = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class Xcrs(_Kernel):
    c_name = "kvm_xcrs"
    _fields_: ClassVar[Any] = [
        ("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", Xcr * 16), ("padding", c_uint64 * 16),
    ]  # fmt: skip


class MsrEntry(_Kernel):
    c_name = "kvm_msr_entry"
    _fields_: ClassVar[Any] = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class MsrsHeader(_Kernel):
    """Followed by `nmsrs` of `MsrEntry`."""

    c_name = "kvm_msrs"
    _fields_: ClassVar[Any] = [("nmsrs", c_uint32), ("pad", c_uint32)]


class MsrListHeader(_Kernel):
    """Followed by `nmsrs` indices."""

    c_name = "kvm_msr_list"
    _fields_: ClassVar[Any] = [("nmsrs", c_uint32)]


class CpuidEntry(_Kernel):
    c_name = "kvm_cpuid_entry2"
    _fields_: ClassVar[Any] = [
        ("function", c_uint32), ("index", c_uint32), ("flags", c_uint32),
        ("eax", c_uint32), ("ebx", c_uint32), ("ecx", c_uint32), ("edx", c_uint32), ("padding", c_uint32 * 3),
    ]  # fmt: skip


class CpuidHeader(_Kernel):
    """Followed by `nent` of `CpuidEntry`."""

    c_name = "kvm_cpuid2"
    _fields_: ClassVar[Any] = [("nent", c_uint32), ("padding", c_uint32)]


class UserspaceMemoryRegion(_Kernel):
    c_name = "kvm_userspace_memory_region"
    _fields_: ClassVar[Any] = [
        ("slot", c_uint32), ("flags", c_uint32),
        ("guest_phys_addr", c_uint64), ("memory_size", c_uint64), ("userspace_addr", c_uint64),
    ]  # fmt: skip


class DirtyLog(_Kernel):
    """`dirty_bitmap` is the host address of a bit a page of the slot."""

    c_name = "kvm_dirty_log"
    _fields_: ClassVar[Any] = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


class Interrupt(_Kernel):
    c_name = "kvm_interrupt"
    _fields_: ClassVar[Any] = [("irq", c_uint32)]


class SignalMaskHeader(_Kernel):
    """Followed by `len` bytes of signal set."""

    c_name = "kvm_signal_mask"
    _fields_: ClassVar[Any] = [("len", c_uint32)]


class GuestDebugArch(_Kernel):
    c_name = "kvm_guest_debug_arch"
    _fields_: ClassVar[Any] = [("debugreg", c_uint64 * 8)]


class GuestDebug(_Kernel):
    c_name = "kvm_guest_debug"
    _fields_: ClassVar[Any] = [("control", c_uint32), ("pad", c_uint32), ("arch", GuestDebugArch)]


class EnableCap(_Kernel):
    c_name = "kvm_enable_cap"
    _fields_: ClassVar[Any] = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class MsrFilterRange(_Kernel):
    """`bitmap` is a host address: one bit an MSR from `base` on, 0 to deny it."""

    c_name = "kvm_msr_filter_range"
    _fields_: ClassVar[Any] = [("flags", c_uint32), ("nmsrs", c_uint32), ("base", c_uint32), ("bitmap", c_uint64)]


class MsrFilter(_Kernel):
    c_name = "kvm_msr_filter"
    _fields_: ClassVar[Any] = [("flags", c_uint32), ("ranges", MsrFilterRange * 16)]


class DeviceAttr(_Kernel):
    """`addr` is the host address of the value."""

    c_name = "kvm_device_attr"
    _fields_: ClassVar[Any] = [("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64)]


class MpState(_Kernel):
    c_name = "kvm_mp_state"
    _fields_: ClassVar[Any] = [("mp_state", c_uint32)]


class Msi(_Kernel):
    """An interrupt message (Intel SDM 3A 10.11)."""

    c_name = "kvm_msi"
    _fields_: ClassVar[Any] = [
        ("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("flags", c_uint32),
        ("devid", c_uint32), ("pad", c_uint8 * 12),
    ]  # fmt: skip


class RoutingMsi(_Kernel):
    c_name = "kvm_irq_routing_msi"
    _fields_: ClassVar[Any] = [
        ("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("devid", c_uint32),
    ]  # fmt: skip


class _Route(Union):
    _fields_: ClassVar[Any] = [("msi", RoutingMsi), ("pad", c_uint32 * 8)]


class RoutingEntry(_Kernel):
    c_name = "kvm_irq_routing_entry"
    _fields_: ClassVar[Any] = [
        ("gsi", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("pad", c_uint32), ("u", _Route),
    ]  # fmt: skip


class RoutingHeader(_Kernel):
    """Followed by `nr` of `RoutingEntry`."""

    c_name = "kvm_irq_routing"
    _fields_: ClassVar[Any] = [("nr", c_uint32), ("flags", c_uint32)]


class LapicState(_Kernel):
    """The local APIC's register page: register n, 32 bits, at offset 16 n."""

    c_name = "kvm_lapic_state"
    _fields_: ClassVar[Any] = [("regs", c_uint8 * 1024)]


# -- the run structure --------------------------------------------------------------------------------------


class RunHeader(Structure):
    """What `struct kvm_run` begins with; the exit's own data follow, then `SyncRegs`."""

    _fields_: ClassVar[Any] = [
        ("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8),
        ("flags", c_uint16), ("cr8", c_uint64), ("apic_base", c_uint64),
    ]  # fmt: skip


class RunIo(Structure):
    """KVM_EXIT_IO; `data_offset` counts from the start of the run structure."""

    _fields_: ClassVar[Any] = [
        ("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32), ("data_offset", c_uint64),
    ]  # fmt: skip


class RunMmio(Structure):
    _fields_: ClassVar[Any] = [
        ("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8),
    ]  # fmt: skip


class RunDebug(Structure):
    _fields_: ClassVar[Any] = [
        ("exception", c_uint32), ("pad", c_uint32), ("pc", c_uint64), ("dr6", c_uint64), ("dr7", c_uint64),
    ]  # fmt: skip


class RunMsr(Structure):
    _fields_: ClassVar[Any] = [
        ("error", c_uint8), ("pad", c_uint8 * 7), ("reason", c_uint32), ("index", c_uint32), ("data", c_uint64),
    ]  # fmt: skip


class RunEmulationFailure(Structure):
    """KVM_EXIT_INTERNAL_ERROR, suberror emulation; the instruction's bytes if `flags` bit 0 says so."""

    _fields_: ClassVar[Any] = [
        ("suberror", c_uint32), ("ndata", c_uint32), ("flags", c_uint64),
        ("insn_size", c_uint8), ("insn_bytes", c_uint8 * 15),
    ]  # fmt: skip


class RunFailEntry(Structure):
    _fields_: ClassVar[Any] = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


EXIT_DATA: Final = sizeof(RunHeader)
"""Offset in the run structure of the exit's own data."""
_VALID_REGS: Final = EXIT_DATA + 256
RUN_VALID_REGS: Final = _VALID_REGS
RUN_DIRTY_REGS: Final = _VALID_REGS + 8
RUN_SYNC_REGS: Final = _VALID_REGS + 16
"""Offsets of `kvm_valid_regs`, `kvm_dirty_regs` and the registers themselves."""
SYNC_REGS, SYNC_SREGS, SYNC_EVENTS = 1, 2, 4

EXIT_EXCEPTION: Final = 1
EXIT_IO: Final = 2
EXIT_HYPERCALL: Final = 3
EXIT_DEBUG: Final = 4
EXIT_HLT: Final = 5
EXIT_MMIO: Final = 6
EXIT_IRQ_WINDOW_OPEN: Final = 7
EXIT_SHUTDOWN: Final = 8
EXIT_FAIL_ENTRY: Final = 9
EXIT_INTR: Final = 10
EXIT_SET_TPR: Final = 11
EXIT_INTERNAL_ERROR: Final = 17
EXIT_SYSTEM_EVENT: Final = 24
EXIT_IOAPIC_EOI: Final = 26
EXIT_X86_RDMSR: Final = 29
EXIT_X86_WRMSR: Final = 30
EXIT_NAMES: Final = {
    value: name.removeprefix("EXIT_").lower()
    for name, value in dict(globals()).items()
    if name.startswith("EXIT_") and name != "EXIT_DATA"
}
IO_OUT: Final = 1
INTERNAL_ERROR_EMULATION: Final = 1
EMULATION_HAS_BYTES: Final = 1 << 0

# -- ioctls -------------------------------------------------------------------------------------------------

_WRITE, _READ = 1, 2
IOCTLS: Final[dict[str, tuple[int, int, int]]] = {}
"""Name in linux/kvm.h -> (number, direction bits, size of the argument)."""


def _ioctl(name: str, number: int, direction: int = 0, argument: type[Any] | None = None) -> int:
    """The request code (asm-generic/ioctl.h): direction, size of the argument, type 0xAE and number."""
    size = 0 if argument is None else sizeof(argument)
    IOCTLS[name] = (number, direction, size)
    return direction << 30 | size << 16 | 0xAE << 8 | number


GET_API_VERSION: Final = _ioctl("KVM_GET_API_VERSION", 0x00)
CREATE_VM: Final = _ioctl("KVM_CREATE_VM", 0x01)
GET_MSR_INDEX_LIST: Final = _ioctl("KVM_GET_MSR_INDEX_LIST", 0x02, _READ | _WRITE, MsrListHeader)
CHECK_EXTENSION: Final = _ioctl("KVM_CHECK_EXTENSION", 0x03)
GET_VCPU_MMAP_SIZE: Final = _ioctl("KVM_GET_VCPU_MMAP_SIZE", 0x04)
GET_SUPPORTED_CPUID: Final = _ioctl("KVM_GET_SUPPORTED_CPUID", 0x05, _READ | _WRITE, CpuidHeader)
CREATE_VCPU: Final = _ioctl("KVM_CREATE_VCPU", 0x41)
GET_DIRTY_LOG: Final = _ioctl("KVM_GET_DIRTY_LOG", 0x42, _WRITE, DirtyLog)
SET_USER_MEMORY_REGION: Final = _ioctl("KVM_SET_USER_MEMORY_REGION", 0x46, _WRITE, UserspaceMemoryRegion)
SET_TSS_ADDR: Final = _ioctl("KVM_SET_TSS_ADDR", 0x47)
SET_IDENTITY_MAP_ADDR: Final = _ioctl("KVM_SET_IDENTITY_MAP_ADDR", 0x48, _WRITE, c_uint64)
SET_GSI_ROUTING: Final = _ioctl("KVM_SET_GSI_ROUTING", 0x6A, _WRITE, RoutingHeader)
RUN: Final = _ioctl("KVM_RUN", 0x80)
GET_REGS: Final = _ioctl("KVM_GET_REGS", 0x81, _READ, Regs)
SET_REGS: Final = _ioctl("KVM_SET_REGS", 0x82, _WRITE, Regs)
GET_SREGS: Final = _ioctl("KVM_GET_SREGS", 0x83, _READ, SpecialRegs)
SET_SREGS: Final = _ioctl("KVM_SET_SREGS", 0x84, _WRITE, SpecialRegs)
INTERRUPT: Final = _ioctl("KVM_INTERRUPT", 0x86, _WRITE, Interrupt)
GET_MSRS: Final = _ioctl("KVM_GET_MSRS", 0x88, _READ | _WRITE, MsrsHeader)
SET_MSRS: Final = _ioctl("KVM_SET_MSRS", 0x89, _WRITE, MsrsHeader)
SET_SIGNAL_MASK: Final = _ioctl("KVM_SET_SIGNAL_MASK", 0x8B, _WRITE, SignalMaskHeader)
GET_LAPIC: Final = _ioctl("KVM_GET_LAPIC", 0x8E, _READ, LapicState)
SET_LAPIC: Final = _ioctl("KVM_SET_LAPIC", 0x8F, _WRITE, LapicState)
SET_CPUID2: Final = _ioctl("KVM_SET_CPUID2", 0x90, _WRITE, CpuidHeader)
GET_MP_STATE: Final = _ioctl("KVM_GET_MP_STATE", 0x98, _READ, MpState)
SET_MP_STATE: Final = _ioctl("KVM_SET_MP_STATE", 0x99, _WRITE, MpState)
NMI: Final = _ioctl("KVM_NMI", 0x9A)
SET_GUEST_DEBUG: Final = _ioctl("KVM_SET_GUEST_DEBUG", 0x9B, _WRITE, GuestDebug)
GET_VCPU_EVENTS: Final = _ioctl("KVM_GET_VCPU_EVENTS", 0x9F, _READ, VcpuEvents)
SET_VCPU_EVENTS: Final = _ioctl("KVM_SET_VCPU_EVENTS", 0xA0, _WRITE, VcpuEvents)
GET_DEBUGREGS: Final = _ioctl("KVM_GET_DEBUGREGS", 0xA1, _READ, DebugRegs)
SET_DEBUGREGS: Final = _ioctl("KVM_SET_DEBUGREGS", 0xA2, _WRITE, DebugRegs)
ENABLE_CAP: Final = _ioctl("KVM_ENABLE_CAP", 0xA3, _WRITE, EnableCap)
GET_TSC_KHZ: Final = _ioctl("KVM_GET_TSC_KHZ", 0xA3)
GET_XSAVE: Final = _ioctl("KVM_GET_XSAVE", 0xA4, _READ, Xsave)
SET_XSAVE: Final = _ioctl("KVM_SET_XSAVE", 0xA5, _WRITE, Xsave)
GET_XCRS: Final = _ioctl("KVM_GET_XCRS", 0xA6, _READ, Xcrs)
SET_XCRS: Final = _ioctl("KVM_SET_XCRS", 0xA7, _WRITE, Xcrs)
SIGNAL_MSI: Final = _ioctl("KVM_SIGNAL_MSI", 0xA5, _WRITE, Msi)
X86_SET_MSR_FILTER: Final = _ioctl("KVM_X86_SET_MSR_FILTER", 0xC6, _WRITE, MsrFilter)
SET_DEVICE_ATTR: Final = _ioctl("KVM_SET_DEVICE_ATTR", 0xE1, _WRITE, DeviceAttr)
GET_DEVICE_ATTR: Final = _ioctl("KVM_GET_DEVICE_ATTR", 0xE2, _WRITE, DeviceAttr)
HAS_DEVICE_ATTR: Final = _ioctl("KVM_HAS_DEVICE_ATTR", 0xE3, _WRITE, DeviceAttr)

# -- capabilities and other constants -----------------------------------------------------------------------

CAPABILITIES: Final = {
    "IRQCHIP": 0,
    "USER_MEMORY": 3,
    "SET_TSS_ADDR": 4,
    "EXT_CPUID": 7,
    "MP_STATE": 14,
    "COALESCED_MMIO": 15,
    "USER_NMI": 22,
    "SET_GUEST_DEBUG": 23,
    "IRQ_ROUTING": 25,
    "PIT2": 33,
    "VCPU_EVENTS": 41,
    "DEBUGREGS": 50,
    "XSAVE": 55,
    "XCRS": 56,
    "TSC_CONTROL": 60,
    "GET_TSC_KHZ": 61,
    "TSC_DEADLINE_TIMER": 72,
    "SYNC_REGS": 74,
    "SIGNAL_MSI": 77,
    "SPLIT_IRQCHIP": 121,
    "IMMEDIATE_EXIT": 136,
    "NESTED_STATE": 157,
    "X86_USER_SPACE_MSR": 188,
    "X86_MSR_FILTER": 189,
    "EXIT_ON_EMULATION_FAILURE": 204,
    "X86_APIC_BUS_CYCLES_NS": 237,
}
"""Number by name (KVM_CAP_...)."""

MEM_LOG_DIRTY_PAGES: Final = 1 << 0
CPUID_SIGNIFICANT_INDEX: Final = 1 << 0
EVENT_NMI_PENDING_VALID: Final = 1 << 0
EVENT_SHADOW_VALID: Final = 1 << 2
SHADOW_MOV_SS, SHADOW_STI = 1, 2
MP_RUNNABLE, MP_HALTED = 0, 3
GUESTDBG_ENABLE: Final = 1 << 0
GUESTDBG_SINGLESTEP: Final = 1 << 1
MSR_EXIT_INVALID, MSR_EXIT_UNKNOWN, MSR_EXIT_FILTERED = 1 << 0, 1 << 1, 1 << 2
"""Reasons for which an access to an MSR may be handed to the monitor."""
MSR_FILTER_READ, MSR_FILTER_WRITE = 1 << 0, 1 << 1
VCPU_TSC_CTRL, VCPU_TSC_OFFSET = 0, 0
"""Attribute group and attribute of a vCPU's TSC offset."""
IRQ_ROUTING_MSI: Final = 2
INTERNAL_SLOTS_ADDRESS: Final = 0xFFFBD000
"""Where KVM may keep its identity map and TSS (four pages) for real mode: no RAM or device of the board is there."""
