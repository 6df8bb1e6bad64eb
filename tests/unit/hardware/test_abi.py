"""Our ioctl numbers, constants and layouts against the kernel's own header, where linux-libc-dev is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from ctypes import sizeof
from pathlib import Path

import pytest

from trivisor.hardware.kvm import abi

HEADERS = (Path("/usr/include/linux/kvm.h"), Path("/usr/include/x86_64-linux-gnu/asm/kvm.h"))
PREFIXES = {
    "EXIT_": "KVM_EXIT_", "MEM_LOG_DIRTY_PAGES": "KVM_MEM_LOG_DIRTY_PAGES",
    "CPUID_SIGNIFICANT_INDEX": "KVM_CPUID_FLAG_SIGNIFCANT_INDEX",
    "EVENT_NMI_PENDING_VALID": "KVM_VCPUEVENT_VALID_NMI_PENDING", "EVENT_SHADOW_VALID": "KVM_VCPUEVENT_VALID_SHADOW",
    "SHADOW_MOV_SS": "KVM_X86_SHADOW_INT_MOV_SS", "SHADOW_STI": "KVM_X86_SHADOW_INT_STI",
    "MP_RUNNABLE": "KVM_MP_STATE_RUNNABLE", "MP_HALTED": "KVM_MP_STATE_HALTED",
    "GUESTDBG_ENABLE": "KVM_GUESTDBG_ENABLE", "GUESTDBG_SINGLESTEP": "KVM_GUESTDBG_SINGLESTEP",
    "MSR_EXIT_INVALID": "KVM_MSR_EXIT_REASON_INVAL", "MSR_EXIT_UNKNOWN": "KVM_MSR_EXIT_REASON_UNKNOWN",
    "MSR_EXIT_FILTERED": "KVM_MSR_EXIT_REASON_FILTER", "MSR_FILTER_READ": "KVM_MSR_FILTER_READ",
    "MSR_FILTER_WRITE": "KVM_MSR_FILTER_WRITE", "VCPU_TSC_CTRL": "KVM_VCPU_TSC_CTRL",
    "VCPU_TSC_OFFSET": "KVM_VCPU_TSC_OFFSET", "IRQ_ROUTING_MSI": "KVM_IRQ_ROUTING_MSI", "API_VERSION": "KVM_API_VERSION",
    "INTERNAL_ERROR_EMULATION": "KVM_INTERNAL_ERROR_EMULATION", "IO_OUT": "KVM_EXIT_IO_OUT",
    "EMULATION_HAS_BYTES": "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES",
    "SYNC_REGS": "KVM_SYNC_X86_REGS", "SYNC_SREGS": "KVM_SYNC_X86_SREGS", "SYNC_EVENTS": "KVM_SYNC_X86_EVENTS",
}  # fmt: skip
"""Constants of ours -> the kernel's name."""
EXITS = [name for name in vars(abi) if name.startswith("EXIT_") and name not in ("EXIT_DATA", "EXIT_NAMES")]


@pytest.fixture(scope="module")
def header() -> str:
    if not HEADERS[0].exists():
        pytest.skip("linux-libc-dev is not installed: there is no linux/kvm.h to compare with")
    return "\n".join(path.read_text() for path in HEADERS if path.exists()).replace("\\\n", " ")


def test_ioctl_numbers_directions_and_arguments(header: str) -> None:
    sizes = {f"struct {name}": sizeof(structure) for name, structure in abi.STRUCTURES.items()} | {"__u64": 8}
    directions = {"": 0, "W": 1, "R": 2, "WR": 3}
    assert len(abi.IOCTLS) > 40
    for name, (number, direction, size) in abi.IOCTLS.items():
        match = re.search(rf"#define\s+{name}\s+_IO(W?R?)\(KVMIO,\s*(0x\w+)(?:,\s*([\w ]+))?\)", header)
        assert match, f"{name} is not in the header"
        theirs = directions[match[1]], int(match[2], 16), sizes[match[3]] if match[3] else 0
        assert (direction, number, size) == theirs, name


def test_capabilities(header: str) -> None:
    theirs = dict(re.findall(r"#define\s+KVM_CAP_(\w+)\s+(\d+)", header))
    missing_here = {name for name in abi.CAPABILITIES if name not in theirs}
    assert missing_here <= {"EXIT_ON_EMULATION_FAILURE", "X86_APIC_BUS_CYCLES_NS"}  # newer than some headers
    assert {n: v for n, v in abi.CAPABILITIES.items() if n in theirs} == {
        n: int(v) for n, v in theirs.items() if n in abi.CAPABILITIES
    }


@pytest.fixture(scope="module")
def compiled(header: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler makes of the header: sizes, offsets and constants by expression."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to lay the kernel's structures out with")
    wanted = [f"sizeof(struct {name})" for name in abi.STRUCTURES]
    for name, structure in abi.STRUCTURES.items():
        wanted += [f"offsetof(struct {name}, {field[0]})" for field in structure._fields_]
    wanted += [
        f"offsetof(struct kvm_run, {field})"
        for field in (
            "exit_reason", "ready_for_interrupt_injection", "if_flag", "flags", "cr8", "apic_base", "io", "mmio.len",
            "io.port", "io.count", "io.data_offset", "mmio.is_write", "msr.index", "msr.data", "msr.reason",
            "debug.arch.pc", "debug.arch.dr6", "internal.ndata", "kvm_valid_regs", "kvm_dirty_regs", "s.regs",
        )
    ]  # fmt: skip
    wanted += [PREFIXES.get(name, f"KVM_{name}") for name in EXITS] + [v for k, v in PREFIXES.items() if k != "EXIT_"]
    folder = tmp_path_factory.mktemp("abi")
    lines = "\n".join(f'    printf("%s=%llu\\n", "{one}", (unsigned long long)({one}));' for one in wanted)
    (folder / "abi.c").write_text(
        f"#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\nint main(void) {{\n{lines}\n    return 0;\n}}\n"
    )
    subprocess.run([compiler, "-o", folder / "abi", folder / "abi.c"], check=True, capture_output=True)
    output = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split("=") for line in output.splitlines())}


def test_layouts(compiled: dict[str, int]) -> None:
    for name, structure in abi.STRUCTURES.items():
        assert sizeof(structure) == compiled[f"sizeof(struct {name})"], name
        for field in structure._fields_:
            ours = getattr(structure, field[0]).offset
            assert ours == compiled[f"offsetof(struct {name}, {field[0]})"], (name, field[0])


def test_the_run_structure(compiled: dict[str, int]) -> None:
    at = abi.EXIT_DATA
    ours = {
        **{field: getattr(abi.RunHeader, field).offset for field in (
            "exit_reason", "ready_for_interrupt_injection", "if_flag", "flags", "cr8", "apic_base")},
        "io": at, "io.port": at + abi.RunIo.port.offset, "io.count": at + abi.RunIo.count.offset,
        "io.data_offset": at + abi.RunIo.data_offset.offset,
        "mmio.len": at + abi.RunMmio.len.offset, "mmio.is_write": at + abi.RunMmio.is_write.offset,
        "msr.index": at + abi.RunMsr.index.offset, "msr.data": at + abi.RunMsr.data.offset,
        "msr.reason": at + abi.RunMsr.reason.offset,
        "debug.arch.pc": at + abi.RunDebug.pc.offset, "debug.arch.dr6": at + abi.RunDebug.dr6.offset,
        "internal.ndata": at + abi.RunEmulationFailure.ndata.offset,
        "kvm_valid_regs": abi.RUN_VALID_REGS, "kvm_dirty_regs": abi.RUN_DIRTY_REGS, "s.regs": abi.RUN_SYNC_REGS,
    }  # fmt: skip
    assert ours == {field: compiled[f"offsetof(struct kvm_run, {field})"] for field in ours}


def test_constants(compiled: dict[str, int]) -> None:
    for name in EXITS:
        assert getattr(abi, name) == compiled[f"KVM_{name}"], name
    for name, theirs in PREFIXES.items():
        if name != "EXIT_":
            assert getattr(abi, name) == compiled[theirs], name
