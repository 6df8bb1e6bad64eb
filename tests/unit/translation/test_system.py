"""Sensitive instructions done in Python, against the Intel SDM's operation sections (volume 2)."""

from __future__ import annotations

from typing import Any

import pytest

from trivisor.machine.exits import CpuidExit, MsrRead, MsrWrite, Unsupported
from trivisor.machine.vcpu import GeneralProtection
from trivisor.translation.core import FS, GS, RAX, RBX, RCX, RDX
from trivisor.translation.emulator import system
from trivisor.x86.exceptions import GuestException

GP0, UD = (13, 0), (6, None)
KERNEL_TEXT = 0xFFFFFFFF81000000
FLUSH_ALL, FLUSH_KEEP = ("flush", False), ("flush", True)


PRIVILEGED = (
    "rdmsr", "wrmsr", "mov cr0, rax", "mov rax, cr3", "mov dr7, rax", "mov rax, dr0", "lmsw ax", "clts",
    "lgdt [rbx]", "lidt [rbx]", "lldt ax", "ltr ax", "invlpg [rbx]", "wbinvd", "invd", "hlt", "cli", "sti",
    "in al, dx", "out 0x80, al", "swapgs", "sysret", "xsetbv",
)  # fmt: skip


@pytest.mark.parametrize("source", PRIVILEGED)
def test_user_code_gets_general_protection(cpu: Any, source: str) -> None:
    cpu.long_mode(3)
    cpu.core.cr4 |= 1 << 18
    cpu.core.regs[RBX] = 0x10000
    assert cpu.fault(source) == GP0


@pytest.mark.parametrize(
    "code",
    ["0f0b", "0fff00", "0fb900", "0f01c8", "0f01c9", "0f01c1", "0f01c2", "0f01d8", "0f78c0", "0faa", "0f37",
     "0f22c8", "0f24c0"],
)  # fmt: skip
def test_undefined_instructions(cpu: Any, code: str) -> None:
    cpu.long_mode()
    assert cpu.fault(bytes.fromhex(code)) == UD


def test_what_is_not_there_is_named_with_its_address(cpu: Any) -> None:
    cpu.long_mode()
    before = cpu.snapshot()
    result = cpu.do("addps xmm1, [rbx]")
    assert isinstance(result, Unsupported)
    assert "addps" in result.what
    assert result.rip == 0x8000
    assert cpu.snapshot() == before
    assert not system.is_known(cpu.decode("addps xmm1, [rbx]").code)


# CPUID, MSRs, time


def test_cpuid_clears_upper_halves_and_tells_subscribers(cpu: Any) -> None:
    seen: list[CpuidExit] = []
    cpu.long_mode(3)
    cpu.observed[CpuidExit] = [seen.append]
    cpu.core.regs[RAX], cpu.core.regs[RCX] = 0xFFFFFFFF_00000000, 0xABCD_00000002
    cpu.advanced("cpuid")
    assert [cpu.core.regs[i] for i in (RAX, RBX, RCX, RDX)] == [0x1F, 0x756E6547, 0x6C65746E, 0x49656E69]
    assert seen == [CpuidExit(0, 2, (0x1F, 0x756E6547, 0x6C65746E, 0x49656E69))]


def write_msr(cpu: Any, index: int, value: int) -> None:
    cpu.core.regs[RCX], cpu.core.regs[RAX], cpu.core.regs[RDX] = index, value & 0xFFFFFFFF, value >> 32


def test_msrs_of_the_core_the_board_and_the_rest(cpu: Any) -> None:
    cpu.long_mode()
    outside = [7]
    cpu.board.msrs[0x1B] = (lambda: outside[0], lambda value: outside.append(value))
    writes = {0xC0000101: KERNEL_TEXT, 0xC0000082: KERNEL_TEXT, 0x123: 9, 0x1B: 0xFEE00900}
    for index, value in writes.items():
        write_msr(cpu, index, value)
        cpu.advanced("wrmsr")
    assert cpu.core.segments[GS].base == cpu.core.lstar == KERNEL_TEXT
    assert cpu.msrs.values[0x123] == 9
    assert outside[-1] == 0xFEE00900
    cpu.core.regs[RCX] = 0xC0000101
    cpu.advanced("rdmsr")
    assert (cpu.core.regs[RDX], cpu.core.regs[RAX]) == (0xFFFFFFFF, 0x81000000)


def test_bad_msr_accesses(cpu: Any) -> None:
    def refuse(value: int) -> None:
        raise GeneralProtection

    seen: list[Any] = []
    cpu.long_mode()
    cpu.observed[MsrRead] = cpu.observed[MsrWrite] = [seen.append]
    cpu.board.msrs[0x6E0] = (lambda: 0, refuse)
    cpu.core.regs[RCX] = 0x999
    assert cpu.fault("rdmsr") == GP0
    for index, value in (
        (0x999, 0), (0x6E0, 1), (0xC0000082, 1 << 47), (0xC0000100, 1 << 63), (0xC0000103, 1 << 32),
        (0xC0000080, 0xD00 | 1 << 1), (0xC0000080, 0xC01),
    ):  # fmt: skip
        write_msr(cpu, index, value)
        assert cpu.fault("wrmsr") == GP0, hex(index)
    assert seen[0] == MsrRead(0x999, None)
    assert seen[1] == MsrWrite(0x999, 0, False)


def test_efer_keeps_lma_and_flushes_for_nxe(cpu: Any) -> None:
    cpu.long_mode()
    write_msr(cpu, 0xC0000080, 0x101)  # NXE off, LMA not written
    cpu.advanced("wrmsr")
    assert cpu.core.efer == 0x501
    assert cpu.calls == [FLUSH_ALL, "mode"]
    cpu.features.discard("nx")
    write_msr(cpu, 0xC0000080, 0xD01)
    assert cpu.fault("wrmsr") == GP0


def test_writing_the_tsc_moves_it(cpu: Any) -> None:
    cpu.long_mode()
    write_msr(cpu, 0x10, 5)
    cpu.advanced("wrmsr")
    cpu.advanced("rdtsc")
    assert (cpu.core.regs[RDX], cpu.core.regs[RAX]) == (0, 5)
    assert cpu.calls == ["tsc_changed"]


def test_time_stamp_instructions(cpu: Any) -> None:
    core = cpu.long_mode(3).core
    core.tsc_aux = 3
    cpu.advanced("rdtscp")
    assert (core.regs[RDX], core.regs[RAX], core.regs[RCX]) == (0x11223344, 0x55667788, 3)
    cpu.advanced("rdpid rbx")
    assert core.regs[RBX] == 3
    core.cr4 |= 4
    assert cpu.fault("rdtsc") == GP0
    cpu.features.discard("rdtscp")
    assert cpu.fault("rdtscp") == UD
    assert cpu.fault("rdpmc") == GP0


def test_fs_and_gs_bases(cpu: Any) -> None:
    core = cpu.long_mode(3).core
    assert cpu.fault("rdfsbase rax") == UD
    core.cr4 |= 1 << 16
    core.regs[RAX] = KERNEL_TEXT
    cpu.advanced("wrgsbase rax")
    assert core.segments[GS].base == KERNEL_TEXT
    cpu.advanced("wrfsbase eax")
    assert core.segments[FS].base == 0x81000000
    cpu.advanced("rdgsbase ebx")
    assert core.regs[RBX] == 0x81000000
    core.regs[RAX] = 1 << 47
    assert cpu.fault("wrfsbase rax") == GP0


def test_swapgs(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.segments[GS].base, core.kernel_gs_base = 0x1000, KERNEL_TEXT
    cpu.advanced("swapgs")
    assert (core.segments[GS].base, core.kernel_gs_base) == (KERNEL_TEXT, 0x1000)


# control registers


def test_entering_long_mode(cpu: Any) -> None:
    core = cpu.protected().core
    core.cr4, core.efer, core.cr0 = 0x20, 0x100, 0x11
    core.regs[RAX] = 0x80000011
    cpu.advanced("mov cr0, eax")
    assert core.efer == 0x500
    assert cpu.calls == [FLUSH_ALL, "mode"]
    core.regs[RAX] = 0x11
    cpu.do("mov cr0, eax")
    assert core.efer == 0x100


def test_cr0_rules(cpu: Any) -> None:
    core = cpu.protected().core
    core.efer, core.regs[RAX] = 0x100, 0x80000011
    assert cpu.fault("mov cr0, eax") == GP0  # LME without PAE
    core.regs[RAX] = 0x80000000
    assert cpu.fault("mov cr0, eax") == GP0  # PG without PE
    core.regs[RAX] = 0x20000011
    assert cpu.fault("mov cr0, eax") == GP0  # NW without CD
    cpu.long_mode()
    core.regs[RAX] = 0x11
    assert cpu.fault("mov cr0, rax") == GP0  # PG off in 64-bit mode
    core.regs[RAX] = 1 << 32 | 0x80050033
    assert cpu.fault("mov cr0, rax") == GP0
    core.regs[RAX] = 0x80040033 | 1 << 10
    cpu.advanced("mov cr0, rax")
    assert core.cr0 == 0x80040033  # WP off, a reserved bit ignored
    assert FLUSH_ALL in cpu.calls


def test_cr3_and_global_pages(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RAX] = 0x5000
    cpu.advanced("mov cr3, rax")
    core.cr4 |= 1 << 7
    cpu.advanced("mov cr3, rax")
    assert cpu.calls == [FLUSH_ALL, FLUSH_KEEP]
    core.regs[RAX] = 1 << 63 | 0x5000
    assert cpu.fault("mov cr3, rax") == GP0
    core.cr4 |= 1 << 17
    cpu.calls.clear()
    cpu.advanced("mov cr3, rax")
    assert (core.cr3, cpu.calls) == (0x5000, [])
    core.regs[RAX] = 1 << 60
    assert cpu.fault("mov cr3, rax") == GP0
    cpu.advanced("mov rbx, cr3")
    assert core.regs[RBX] == 0x5000


def test_cr4_rules(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RAX] = 0x20 | 1 << 7 | 1 << 20
    cpu.advanced("mov cr4, rax")
    assert core.cr4 == 0x1000A0
    assert cpu.calls == [FLUSH_ALL, "mode"]
    cpu.features.discard("smap")
    for bad in (0, 0x20 | 1 << 21, 0x20 | 1 << 12, 1 << 32 | 0x20, 0x20 | 1 << 15):
        core.regs[RAX] = bad
        assert cpu.fault("mov cr4, rax") == GP0, hex(bad)
    core.cr3 = 1
    core.regs[RAX] = 0x20 | 1 << 17
    assert cpu.fault("mov cr4, rax") == GP0  # PCIDE wants CR3's PCID to be 0


def test_pae_pointers_are_checked(cpu: Any) -> None:
    core = cpu.protected().core
    core.cr4, core.cr0 = 0x20, 0x80000011
    cpu.put(0x6000, 8, 0x7001, 0x7003)
    core.regs[RAX] = 0x6000
    assert cpu.fault("mov cr3, eax") == GP0  # bit 1 of an entry is reserved
    cpu.put(0x6008, 8, 0x8001)
    cpu.advanced("mov cr3, eax")
    assert core.cr3 == 0x6000


def test_cr2_cr8_and_the_missing_ones(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RAX] = 0xF
    cpu.advanced("mov cr8, rax")
    cpu.advanced("mov rbx, cr8")
    assert core.regs[RBX] == 0xF == cpu.board.interrupts.cr8
    core.regs[RAX] = KERNEL_TEXT
    assert cpu.fault("mov cr8, rax") == GP0
    cpu.advanced("mov cr2, rax")
    assert core.cr2 == KERNEL_TEXT


def test_machine_status_word(cpu: Any) -> None:
    core = cpu.protected().core
    core.regs[RAX] = 0xA  # MP stays out, TS and bit 1 come, PE cannot go
    cpu.advanced("lmsw ax")
    assert core.cr0 == 0x1B
    cpu.advanced("smsw ebx")
    assert core.regs[RBX] == 0x1B
    core.regs[RBX] = 0x10000
    cpu.put(0x10000, 4, 0xFFFFFFFF)
    cpu.advanced("smsw [ebx]")
    assert cpu.get(0x10000, 4, 1) == [0xFFFF001B]
    cpu.advanced("clts")
    assert core.cr0 == 0x13
    cpu.protected(3).core.cr4 = 1 << 11
    assert cpu.fault("smsw eax") == GP0


def test_debug_registers(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RAX] = 0xFFFFFFFF
    cpu.advanced("mov dr6, rax")
    core.regs[RAX] = 0x403
    cpu.advanced("mov dr5, rax")  # an alias of DR7
    assert core.dr[6:] == [0xFFFFEFFF, 0x403]
    core.cr4 |= 8
    assert cpu.fault(bytes.fromhex("0f23e8")) == UD
    core.regs[RAX] = 1 << 32
    assert cpu.fault("mov dr7, rax") == GP0
    core.dr[7] |= 1 << 13
    with pytest.raises(GuestException) as caught:
        cpu.do("mov rax, dr0")
    assert caught.value.vector == 1
    assert core.dr[6] & 1 << 13


def test_extended_control_register(cpu: Any) -> None:
    core = cpu.long_mode().core
    assert cpu.fault("xgetbv") == UD
    core.cr4 |= 1 << 18
    core.regs[RAX], core.regs[RCX], core.regs[RDX] = 7, 0, 0
    cpu.advanced("xsetbv")
    assert (core.xcr0, cpu.calls) == (7, ["mode"])
    for bad in (0, 2, 5, 0xE7):
        core.regs[RAX] = bad
        assert cpu.fault("xsetbv") == GP0
    cpu.advanced("xgetbv")
    assert core.regs[RAX] == 7
    core.regs[RCX] = 2
    assert cpu.fault("xgetbv") == GP0


def test_tlb_invalidation(cpu: Any) -> None:
    core = cpu.long_mode().core
    core.regs[RBX] = 0x10000
    cpu.advanced("invlpg [rbx+4]")
    core.regs[RCX] = 1 << 60
    cpu.advanced("invlpg [rcx]")  # not canonical: nothing
    cpu.put(0x10000, 8, 0, 0x7000)
    for kind in range(4):
        core.regs[RAX] = kind
        cpu.advanced("invpcid rax, [rbx]")
    assert cpu.calls == [("invalidate", 0x10004), ("invalidate", 0x7000), FLUSH_KEEP, FLUSH_ALL, FLUSH_KEEP]
    core.regs[RAX] = 4
    assert cpu.fault("invpcid rax, [rbx]") == GP0
    core.regs[RAX] = 0
    cpu.put(0x10000, 8, 1)
    assert cpu.fault("invpcid rax, [rbx]") == GP0  # a PCID without CR4.PCIDE


def test_cache_line_flush_faults_like_a_load(cpu: Any) -> None:
    cpu.long_mode(3)
    cpu.core.regs[RBX] = 0x10000
    cpu.advanced("clflush [rbx]")
    cpu.absent_pages.add(0x10)
    assert cpu.fault("clflush [rbx]") == (14, 4)
