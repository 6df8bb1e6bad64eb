"""A running guest changes its technique again and again, and comes to the same result.

The guest computes in ring 3 with integers, x87, SSE and AVX where there is one, in registers
and in memory, calls its kernel for port I/O (by UD2: a KVM that emulates ring 0 does SYSCALL and INT wrong), and is
interrupted by the local APIC's timer all the while.  Where it stands when it is
stopped is chance: in ring 3, in the kernel, in a handler.  What it prints at the
end depends on every step of the computation and on nothing else.
"""

from __future__ import annotations

import random
import re

import pytest

from bench.guests.long_mode import long_mode_kernel
from tests.conformance.machine import UNAVAILABLE
from trivisor import VirtualMachine
from trivisor.guests.test_kernel import STATUS
from trivisor.monitor import TechniqueUnavailable
from trivisor.monitor.outcome import StopReason
from trivisor.x86.assembler import assemble
from trivisor.x86.exceptions import INVALID_OPCODE

ROUNDS = 1_000_000
CHANGES = 40
TIMER, SERVICE = 0x40, INVALID_OPCODE

USER = """
bits 64
    mov rbx, ROUNDS
    mov r12, 0x9E3779B97F4A7C15
    mov r13, 1
    fld1
    mov rax, 1
    cvtsi2sd xmm1, rax
    cvtsi2sd xmm2, rax
    movq xmm3, r12
round:
    mov ebp, 40                    ; integers: a generator of numbers, into a table
step:
    imul r13, r12
    rol r13, 13
    xor r13, rbx
    mov rdi, r13
    and edi, 0xFF8
    add [TABLE + rdi], r13
    adc r14, [TABLE + rdi]
    dec ebp
    jnz step
    mov [TABLE + 0x1000], rbx      ; x87: a running product that stays near 1
    fild qword [TABLE + 0x1000]
    fsqrt
    fld1
    faddp
    fdivr st1
    fxch st1
    fstp st0
    fst qword [TABLE + 0x1008]
    add r14, [TABLE + 0x1008]
    cvtsi2sd xmm4, rbx             ; SSE: a sum of square roots
    sqrtsd xmm4, xmm4
    addsd xmm1, xmm4
    movq rax, xmm1
    xor r14, rax
    movq xmm5, r14
    pxor xmm3, xmm5
    paddq xmm3, xmm5
    bt dword [TABLE + 0x2000], 28  ; AVX: the upper halves of registers
    jnc no_avx
    vinsertf128 ymm6, ymm6, xmm3, 1
    vaddpd ymm7, ymm6, ymm6
    vextractf128 xmm8, ymm7, 1
    movq rax, xmm8
    add r15, rax
no_avx:
    mov eax, ebx                   ; a service: the byte goes out by a port, and comes back
    ud2
    add r14, rax
    dec rbx
    jnz round
    movq rax, xmm3
    xor r14, rax
    xor r14, r15
    mov eax, -1
    mov rdi, r14
    ud2
"""

KERNEL = """
bits 64
APIC equ 0xFEE00000
USER_CS equ 0x2B
USER_SS equ 0x23
kernel_main:
    mov al, 0xFF                   ; both 8259A are masked
    out 0x21, al
    out 0xA1, al
    mov edi, TIMER
    mov rax, tick
    call set_gate
    mov edi, SERVICE
    mov rax, service
    call set_gate
    mov edi, APIC
    mov dword [rdi + 0xF0], 0x1FF
    mov dword [rdi + 0x3E0], 3     ; the crystal by 16
    mov dword [rdi + 0x320], 0x20000 | TIMER
    mov dword [rdi + 0x380], 1500
    mov eax, [features]
    mov [USER + 0x12000], eax
    push USER_SS
    push 0
    push 0x202                     ; with interrupts
    push USER_CS
    push USER
    iretq

tick:
    push rax
    push rdi
    inc dword [ticks]
    mov edi, APIC
    mov dword [rdi + 0xB0], 0
    pop rdi
    pop rax
    iretq

service:                           ; eax = a byte to send, or -1: rdi is the result
    sti
    cmp eax, -1
    je finish
    mov edx, 0x80
    out dx, al
    xor eax, eax
    in al, dx
    cli
    add qword [rsp], 2             ; behind the UD2
    iretq

finish:
    cli
    push rdi
    mov rax, [rsp]
    call print_hex
    mov eax, [ticks]
    call print_hex
    call new_line
    mov al, 21
    jmp end

align 8
ticks: dd 0
"""


def image() -> bytes:
    user = assemble(USER, origin=0x40000000, bits=64, symbols={"TABLE": 0x40010000, "ROUNDS": ROUNDS})
    return long_mode_kernel(KERNEL, user.code, {"TIMER": TIMER, "SERVICE": SERVICE})


def result(machine: VirtualMachine) -> tuple[str, int]:
    """(the computation's result, timer interrupts)."""
    found = re.search(rb"([0-9a-f]{16}) ([0-9a-f]{16})", machine.output)
    assert found is not None, machine.output
    return found[1].decode(), int(found[2], 16)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    path = tmp_path_factory.mktemp("guest") / "kernel.elf"
    path.write_bytes(image())
    return path


@pytest.fixture(scope="module")
def expected(kernel) -> str:
    with VirtualMachine(kernel, memory="64M", technique="translation", keep_translations=False) as machine:
        assert machine.run(timeout=120).status == STATUS, machine.output
        checksum, ticks = result(machine)
        assert ticks > 3
        return checksum


@pytest.mark.skipif("hardware" in UNAVAILABLE, reason=UNAVAILABLE.get("hardware", ""))
def test_a_guest_changes_its_technique_all_the_time(kernel, expected: str) -> None:
    choose = random.Random(3)
    with VirtualMachine(
        kernel, memory="64M", technique="translation", cpu="-avx512f", keep_translations=False
    ) as machine:
        changes = 0
        names = ["hardware", "translation"]
        outcome = machine.run(timeout=0.1)
        while outcome.reason is StopReason.TIMEOUT:
            machine.change_technique(names[changes % 2])
            assert machine.technique == names[changes % 2]
            changes += 1
            longest = 0.06 if machine.technique == "hardware" else 0.008
            outcome = machine.run(timeout=choose.uniform(0.001, longest) if changes < CHANGES else 120)
        assert outcome.status == STATUS, (outcome, machine.output)
        checksum, ticks = result(machine)
        assert changes >= CHANGES, "the guest ended too soon for the test"
        assert checksum == expected
        assert ticks > 3
        exits = machine.statistics()["exits"]
        assert {"signal", "poll"} & {*exits}, exits


@pytest.mark.skipif("hardware" in UNAVAILABLE, reason=UNAVAILABLE.get("hardware", ""))
def test_nothing_changes_under_a_running_machine_or_to_what_is_not_there(kernel) -> None:
    with VirtualMachine(kernel, memory="64M", technique="translation") as machine:
        with pytest.raises(ValueError, match="none of"):
            machine.change_technique("magic")
        with pytest.raises(TechniqueUnavailable, match="paravirt"):
            machine.change_technique("paravirt")
        machine.change_technique("translation")
        assert machine.technique == "translation"
        assert machine.run(timeout=120).status == STATUS


@pytest.mark.skipif("hardware" in UNAVAILABLE, reason=UNAVAILABLE.get("hardware", ""))
def test_a_guest_goes_through_files_from_technique_to_technique(kernel, expected: str, tmp_path) -> None:
    path = tmp_path / "snapshot"
    choose = random.Random(5)
    with VirtualMachine(kernel, memory="64M", technique="translation", keep_translations=False) as machine:
        assert machine.run(timeout=0.1).reason is StopReason.TIMEOUT
        machine.snapshot(path)
    for technique in ("hardware", "translation") * 3:
        try:
            restored = VirtualMachine.restore(path, technique=technique, keep_translations=False)
        except TechniqueUnavailable as reason:  # programs would see what the guest was not told of
            pytest.skip(str(reason))
        with restored as machine:
            assert machine.run(timeout=choose.uniform(0.001, 0.01)).reason is StopReason.TIMEOUT
            machine.snapshot(path)
    with VirtualMachine.restore(path, technique="translation", keep_translations=False) as machine:
        assert machine.run(timeout=120).status == STATUS, machine.output
        checksum, ticks = result(machine)
    assert checksum == expected and ticks > 3
