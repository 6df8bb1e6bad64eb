"""Snapshots of a small Xen guest: it goes on where it was, its time too, and what a file says of it does no harm."""

from __future__ import annotations

import json
import random
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.unit.monitor.test_snapshots import HOSTILE, _leaves
from tests.unit.paravirt.engines.conftest import _PRELUDE, CODE, DATA, STACK, _elf
from trivisor import StopReason, VirtualMachine
from trivisor.machine.memory import GuestMemory
from trivisor.monitor import TechniqueUnavailable
from trivisor.monitor.snapshot_file import SnapshotError, SnapshotFile, write_snapshot
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import HYPERCALL_NUMBERS
from trivisor.x86.assembler import assemble

CHANGES = 40
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


def options(directory: Path, **more: Any) -> dict[str, Any]:
    symbols = {"DATA": DATA - (1 << 64), "STACK": STACK - (1 << 64), **HYPERCALL_NUMBERS}
    code = assemble(_PRELUDE + SLEEPER, origin=CODE, symbols=symbols).code
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


def test_what_cannot_be_put_into_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    machine = VirtualMachine(**options(tmp_path, disks=[tmp_path / "disk"]))
    with machine, pytest.raises(TechniqueUnavailable, match="with --disk cannot"):
        machine.snapshot(tmp_path / "file")
    for more in ({"disks": [tmp_path / "disk"]}, {"engine": "direct"}):
        with pytest.raises(TechniqueUnavailable, match="cannot be put into a snapshot"):
            VirtualMachine(technique="paravirt", waiting=True, **more)  # type: ignore[arg-type]
    assert not (tmp_path / "file").exists()


def test_no_value_in_a_file_does_harm(sleeping: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "made"
    choose = random.Random(13)
    refused = 0
    with closing(SnapshotFile(sleeping[0])) as file, closing(GuestMemory(64 << 20)) as memory:
        file.begin_loading(memory).results()
        for _ in range(CHANGES):
            remembered = json.loads(json.dumps(file.remembered))
            part = choose.choice([remembered, *remembered["board"].values(), remembered["processor"]])
            container, key = choose.choice([*_leaves(part)])
            container[key] = value = choose.choice(HOSTILE)
            write_snapshot(path, remembered, memory)
            try:
                machine = VirtualMachine.restore(path, keep_translations=False)
            except SnapshotError as refusal:
                refused += 1
                assert "\n" not in str(refusal)
                continue
            except TechniqueUnavailable:
                assert key == "technique"
                continue
            try:
                with machine:
                    machine.write("x")
                    machine.run(timeout=0.05)
                    machine.registers  # noqa: B018
            except BaseException as error:
                error.add_note(f"with {key} {value!r}")
                raise
    assert refused > CHANGES // 4
