"""Snapshots of a small Xen guest: it goes on where it was, its time too, and what a file says of it does no harm."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.unit.monitor.test_snapshots import HOSTILE, _leaves
from tests.unit.paravirt.engines.conftest import _PRELUDE, CODE, DATA, STACK, _elf
from trivisor import StopReason, VirtualMachine
from trivisor.devices.disk_file import DiskError
from trivisor.devices.user_network import NetworkUnavailable
from trivisor.guests.test_kernel import build
from trivisor.hardware.kvm.direct import vcpu as direct
from trivisor.hardware.kvm.guest_cpuid import kvm_cpuid
from trivisor.machine.cpuid import AVX512
from trivisor.machine.memory import GuestMemory
from trivisor.monitor import TechniqueUnavailable
from trivisor.monitor.snapshot_file import SnapshotError, SnapshotFile, write_snapshot
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.x86.assembler import assemble
from trivisor.x86.msr import IA32_KERNEL_GS_BASE

CHANGES = 40
ENGINES = ("translation", "direct")
ROUNDS = 150
# Each round sleeps 2 ms by a poll with a timeout and prints a dot, or an X when it took a second and more.
SLEEPER = f"""
start:
    xor ebx, ebx
    call now
    mov r12, rax
next:
    lea rax, [r12 + 2000000]
    mov rdi, DATA + 0x200
    lea rcx, [rdi + 0x40]
    mov [rdi], rcx
    mov dword [rdi+8], 1
    mov [rdi+16], rax
    mov dword [rcx], 9
    mov rsi, rdi
    mov edi, {abi.SCHEDOP_POLL}
    mov eax, sched_op
    syscall
    call now
    mov rcx, rax
    sub rcx, r12
    mov r12, rax
    mov al, '.'
    cmp rcx, 1000000000
    jb print
    mov al, 'X'
print:
    mov rdx, DATA + 0x300
    mov [rdx], al
    mov edi, {abi.CONSOLEIO_WRITE}
    mov esi, 1
    mov eax, console_io
    syscall
    inc ebx
    cmp ebx, {ROUNDS}
    jne next
    jmp shutdown
now:
    mov edi, {abi.VCPUOP_GET_RUNSTATE_INFO}
    xor esi, esi
    mov rdx, DATA + 0x100
    mov eax, vcpu_op
    syscall
    mov rax, DATA + 0x100
    mov rax, [rax + 16]
    ret
"""


def options(directory: Path, source: str = SLEEPER, **more: Any) -> dict[str, Any]:
    symbols = {"DATA": DATA - (1 << 64), "STACK": STACK - (1 << 64), **HYPERCALL_NUMBERS}
    code = assemble(_PRELUDE + source, origin=CODE, symbols=symbols).code
    (directory / "kernel").write_bytes(_elf(code))
    (directory / "initrd").write_bytes(b"none")
    return {
        "kernel": directory / "kernel", "initrd": directory / "initrd", "memory": "32M",
        "technique": "paravirt", "engine": "translation", **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def sleeping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A snapshot in the middle of the rounds, and what the guest had printed."""
    directory = tmp_path_factory.mktemp("snapshot")
    with VirtualMachine(**options(directory)) as machine:
        machine.read_until("." * 10, timeout=60)
        machine.snapshot(directory / "file")
        return directory / "file", machine.output


def test_it_goes_on_where_it_was_and_its_time_too(sleeping: tuple[Path, bytes]) -> None:
    path, printed = sleeping
    time.sleep(1.1)
    for technique in ("auto", "paravirt"):
        with VirtualMachine.restore(path, technique=technique) as machine:
            assert machine.technique == "paravirt" and machine.memory_size >= 32 << 20
            assert machine.run(timeout=60).reason is StopReason.POWEROFF
            assert (printed + machine.output) == b"." * ROUNDS


def test_a_snapshot_of_a_restored_one(sleeping: tuple[Path, bytes], tmp_path: Path) -> None:
    path, printed = sleeping
    for number in range(3):
        with VirtualMachine.restore(path) as machine:
            machine.read_until("." * 10, timeout=60)
            path = tmp_path / str(number)
            machine.snapshot(path)
            printed += machine.output
    with VirtualMachine.restore(path) as machine:
        machine.run(timeout=60)
        assert printed + machine.output == b"." * ROUNDS


def test_one_technique_only(sleeping: tuple[Path, bytes]) -> None:
    with pytest.raises(TechniqueUnavailable, match="technique paravirt cannot go on under translation"):
        VirtualMachine.restore(sleeping[0], technique="translation")


# -- engines -------------------------------------------------------------------------------------------------


def machine_on(engine: str, make: Callable[[], VirtualMachine]) -> VirtualMachine:
    """A machine on an engine, if this host has that."""
    try:
        return make()
    except TechniqueUnavailable as reason:
        if engine == "translation":
            raise
        pytest.skip(str(reason))


@pytest.fixture
def no_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's KVM shows programs no AVX-512, or so guests are told; those here do not look."""
    monkeypatch.setattr(direct, "shown_cpuid", kvm_cpuid)


@pytest.mark.usefixtures("no_avx512")
@pytest.mark.parametrize("first", ENGINES)
@pytest.mark.parametrize("second", ENGINES)
def test_a_guest_of_one_engine_goes_on_under_either(tmp_path: Path, first: str, second: str) -> None:
    path, printed = tmp_path / "file", b""
    machine = machine_on(first, lambda: VirtualMachine(**options(tmp_path, engine=first)))
    for engine in (second, first):  # there and back
        with machine:
            machine.read_until("." * 10, timeout=60)
            state, system_time = machine.registers, machine._machine.xen.domain.time.now()  # type: ignore[union-attr]
            machine.snapshot(path)
            printed += machine.output
        time.sleep(0.2)
        machine = machine_on(engine, lambda engine=engine: VirtualMachine.restore(path, engine=engine))  # type: ignore[misc]
        now = machine._machine.xen.domain.time.now()  # type: ignore[union-attr]
        assert 0 <= now - system_time < 190_000_000, "time stood still in the snapshot"
        again = machine.registers
        for name in ("gpr", "rip", "rflags", "cs", "ss", "cr3", "xcr0", "dr", "halted"):
            assert getattr(again, name) == getattr(state, name), name
        assert again.msrs[IA32_KERNEL_GS_BASE] == state.msrs[IA32_KERNEL_GS_BASE]
    with machine:
        assert machine.run(timeout=60).reason is StopReason.POWEROFF
        assert printed + machine.output == b"." * ROUNDS


@pytest.mark.usefixtures("no_avx512")
def test_what_the_guest_was_told_of_and_direct_execution_lacks(sleeping: tuple[Path, bytes], tmp_path: Path) -> None:
    with closing(SnapshotFile(sleeping[0])) as file:
        told = {*file.remembered["cpuid"]["features"]}
    machine_on("direct", lambda: VirtualMachine.restore(sleeping[0], engine="direct")).close()
    path = tmp_path / "made"
    rewritten(sleeping[0], path, lambda remembered: remembered["cpuid"].update(features=sorted(told | {"pks"})))
    with pytest.raises(TechniqueUnavailable, match="KVM lacks pks, which the guest was told of"):
        VirtualMachine.restore(path, engine="direct")
    with VirtualMachine.restore(path) as machine:
        assert machine.engine.startswith("on the translation engine")


def test_a_guest_with_avx512_and_one_without_stay_where_they_are(sleeping: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    with machine_on("direct", lambda: VirtualMachine(**options(tmp_path, engine="direct"))) as machine:
        if not machine.features & AVX512:
            pytest.skip("this host's KVM shows ring 3 no AVX-512 that guests are not told of")
        machine.read_until("." * 10, timeout=60)
        machine.snapshot(path)
        printed = machine.output
    with pytest.raises(TechniqueUnavailable, match="told of AVX-512, which translation does not have"):
        VirtualMachine.restore(path, engine="translation")
    with pytest.raises(TechniqueUnavailable, match="AVX-512, of which the guest's kernel was not told"):
        VirtualMachine.restore(sleeping[0], engine="direct")
    with VirtualMachine.restore(path) as machine:
        assert machine.engine.startswith("direct"), "which is what can be had"
        assert machine.run(timeout=60).reason is StopReason.POWEROFF
        assert printed + machine.output == b"." * ROUNDS


SERIALIZING = """
start:
    mov rcx, 50
next:
    serialize
    loop next
    mov rdx, DATA + 0x300
    mov byte [rdx], 's'
    mov edi, 0
    mov esi, 1
    mov eax, console_io
    syscall
    cmp ebx, 3
    je shutdown
    inc ebx
    jmp start
"""


@pytest.mark.usefixtures("no_avx512")
@pytest.mark.parametrize("engine", ENGINES)
def test_serialize_is_there_for_a_guest_that_was_told_of_it(tmp_path: Path, engine: str) -> None:
    """Translation has it on every host."""
    guest = options(tmp_path, source=SERIALIZING)
    with VirtualMachine(**guest) as machine:
        assert "serialize" in machine.features
        machine.snapshot(tmp_path / "file")
    with machine_on(engine, lambda: VirtualMachine.restore(tmp_path / "file", engine=engine)) as machine:
        assert machine.run(timeout=60).reason is StopReason.POWEROFF
        assert machine.output == b"ssss"


# -- disks and networks --------------------------------------------------------------------------------------


def test_a_guest_is_given_its_disks_again(tmp_path: Path) -> None:
    disk, other, path = tmp_path / "disk", tmp_path / "other", tmp_path / "file"
    disk.write_bytes(bytes(4096))
    other.write_bytes(bytes(8192))
    with VirtualMachine(**options(tmp_path, disks=[disk, f"{other},readonly"])) as machine:
        machine.read_until("." * 10, timeout=60)
        machine.snapshot(path)
        printed = machine.output
    for disks, says in (
        ([], "had xvda, xvdb and is given no device"),
        ([disk], "is given xvda; --disk and --net have to be as they were"),
        ([other, disk], f"xvda had 4096 bytes, and {other} has 8192"),
        ([disk, other], f"xvdb was read-only, and {other} is not"),
    ):
        with pytest.raises(SnapshotError, match=says) as refusal:
            VirtualMachine.restore(path, disks=disks)
        assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)
    with pytest.raises(OSError, match="No such file"):
        VirtualMachine.restore(path, disks=[disk, tmp_path / "nothing"])
    (tmp_path / "odd").write_bytes(bytes(100))
    with pytest.raises(DiskError, match="odd: 100 bytes"):
        VirtualMachine.restore(path, disks=[disk, tmp_path / "odd"])
    for number in range(2):  # of a restored one, too
        with VirtualMachine.restore(path, disks=[disk, f"{other},readonly"]) as machine:
            assert machine.warnings == [] and {"xvda", "xvdb"} <= {*machine.statistics()}
            machine.read_until("." * 10, timeout=60)
            path = tmp_path / f"again {number}"
            machine.snapshot(path)
            printed += machine.output
    time.sleep(0.02)
    disk.write_bytes(b"x" * 4096)
    with VirtualMachine.restore(path, disks=[disk, f"{other},readonly"]) as machine:
        assert machine.warnings == [f"{disk} is not as old as xvda was: what the guest knows of that may be wrong"]
        machine.run(timeout=60)
        assert printed + machine.output == b"." * ROUNDS


def test_a_network_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    try:
        machine = VirtualMachine(**options(tmp_path, network="user"))
    except NetworkUnavailable as reason:
        pytest.skip(str(reason))
    with machine:
        machine.read_until("." * 10, timeout=60)
        machine.snapshot(path)
        printed = machine.output
    with pytest.raises(SnapshotError, match="had eth0 and is given no device"):
        VirtualMachine.restore(path)
    with VirtualMachine.restore(path, network="user") as machine:
        assert machine.run(timeout=60).reason is StopReason.POWEROFF
        assert printed + machine.output == b"." * ROUNDS


def test_devices_that_only_xen_guests_have(tmp_path: Path) -> None:
    kernel, path = tmp_path / "kernel.elf", tmp_path / "file"
    kernel.write_bytes(build())
    with VirtualMachine(kernel, append="spin", memory="16M", technique="translation") as machine:
        machine.run(timeout=0.2)
        machine.snapshot(path)
    with pytest.raises(SnapshotError, match="no Xen guest, and can have no --net"):
        VirtualMachine.restore(path, network="user")


# -- files that somebody made on purpose ---------------------------------------------------------------------


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same snapshot, with something else remembered."""
    with closing(SnapshotFile(source)) as file, closing(GuestMemory(64 << 20)) as memory:
        file.begin_loading(memory).results()
        remembered = json.loads(json.dumps(file.remembered))
        change(remembered)
        write_snapshot(target, remembered, memory)


@pytest.mark.usefixtures("no_avx512")
@pytest.mark.parametrize("engine", ENGINES)
def test_no_value_in_a_file_does_harm(sleeping: tuple[Path, bytes], tmp_path: Path, engine: str) -> None:
    path = tmp_path / "made"
    machine_on(engine, lambda: VirtualMachine.restore(sleeping[0], engine=engine)).close()
    choose = random.Random(13)
    refused = 0
    with closing(SnapshotFile(sleeping[0])) as file, closing(GuestMemory(64 << 20)) as memory:
        file.begin_loading(memory).results()
        for _ in range(CHANGES):
            remembered = json.loads(json.dumps(file.remembered))
            part = choose.choice([remembered, *remembered["board"].values(), remembered["processor"]])
            container, key = choose.choice([*_leaves(part)] or [(remembered["board"], "back_ends")])
            container[key] = value = choose.choice(HOSTILE)
            write_snapshot(path, remembered, memory)
            try:
                machine = VirtualMachine.restore(path, engine=engine, keep_translations=False)
            except SnapshotError as refusal:
                refused += 1
                assert "\n" not in str(refusal)
                continue
            except TechniqueUnavailable:
                assert key in ("technique", "cpuid", "features") or container is remembered["cpuid"]["features"]
                continue
            except BaseException as error:
                error.add_note(f"with {key} {value!r}")
                raise
            try:
                with machine:
                    machine.write("x")
                    machine.run(timeout=0.05)
                    machine.registers  # noqa: B018
            except BaseException as error:
                error.add_note(f"with {key} {value!r}")
                raise
    assert refused > CHANGES // 4
