"""Memory slots of a KVM machine: what the guest wrote, and that a look at its page tables leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trivisor.hardware.kvm import abi, probe
from trivisor.hardware.kvm.system import KvmUnavailable, System
from trivisor.hardware.kvm.vcpu import VcpuHandle
from trivisor.hardware.kvm.vm import _SPARE_ADDRESS, Vm
from trivisor.machine.memory import MIB, GuestMemory
from trivisor.x86.assembler import assemble

CODE = probe._ORIGIN


@pytest.fixture
def vm() -> Iterator[Vm]:
    try:
        system = System()
    except KvmUnavailable as reason:
        pytest.skip(str(reason))
    memory = GuestMemory(16 * MIB)
    with system, Vm(system, memory) as made:
        made.memory = memory
        yield made
    memory.close()


def run(vm: Vm, source: str) -> VcpuHandle:
    """Run flat 32-bit code until its first exit."""
    vm.memory.write(CODE, assemble(source, bits=32, origin=CODE).code)
    vcpu = VcpuHandle(vm)
    probe._start(vcpu)
    vcpu.control(abi.RUN)
    return vcpu


def test_pages_that_the_guest_wrote_are_told_once(vm: Vm) -> None:
    vm.watch_writes()
    last = 16 * MIB - 4096
    with run(vm, f"mov eax, [0x7000]\n mov [0x5ffe], eax\n mov [{last}], eax\n hlt") as vcpu:
        assert vcpu.header.exit_reason == abi.EXIT_HLT
        assert set(vm.written_pages()) == {0x5000, 0x6000, last}
        assert not list(vm.written_pages())


def test_what_we_write_ourselves_is_not_told(vm: Vm) -> None:
    vm.watch_writes()
    vm.memory.write_u32(0x5000, 1)
    assert not list(vm.written_pages())


def test_no_slot_is_left_behind(vm: Vm) -> None:
    for _ in range(3):
        vm.forget_mappings()
    with run(vm, f"mov eax, [{_SPARE_ADDRESS:#x}]\n hlt") as vcpu:
        assert vcpu.header.exit_reason == abi.EXIT_MMIO
