"""Instructions that trap and are done for the guest: privileged ones, CPUID by prefix, writes to page tables."""

from __future__ import annotations

import pytest

from trivisor.paravirt.xen import abi, privileged
from trivisor.paravirt.xen.page_table_writes import page_table_write
from trivisor.paravirt.xen.vcpu_state import Trap
from trivisor.x86.exceptions import GENERAL_PROTECTION, INVALID_OPCODE

A = 0x10000
RAX, RCX, RDX, RBX, RSI, RDI = 0, 1, 2, 3, 6, 7


def run(guest, code: str) -> bool:
    """Have the guest get #GP at an instruction, given in hexadecimal; whether it was done."""
    data = bytes.fromhex(code)
    guest.cpu.store(A, data.ljust(16, b"\x90"))
    guest.cpu.rip = A
    done = privileged.execute(guest.domain)
    assert guest.cpu.rip == (A + len(data) if done else A)
    return done


def test_control_registers(guest) -> None:
    registers = guest.cpu.registers
    assert run(guest, "0f20d8")  # mov rax, cr3
    assert registers[RAX] == guest.domain.state.kernel_root << 12
    registers[RAX] = guest.domain.state.cr4 | 1 << 16
    assert run(guest, "0f22e0") and guest.cpu.fsgsbase  # mov cr4, rax
    registers[RAX] = guest.domain.state.cr0 ^ 8
    assert run(guest, "0f22c0") and guest.cpu.fpu_disabled  # mov cr0, rax: TS may change
    assert run(guest, "0f06") and not guest.cpu.fpu_disabled  # clts
    registers[RAX] = guest.domain.state.cr0 ^ 1
    assert not run(guest, "0f22c0")
    registers[RAX] = 0x1000
    assert not run(guest, "0f22d8"), "that frame is no page table"


def test_breakpoints_on_ports(guest) -> None:
    state, registers, io = guest.domain.state, guest.cpu.registers, 0x20700 | 3
    registers[RAX] = io
    assert not run(guest, "0f23f8"), "mov dr7, rax: not without CR4.DE"
    state.cr4 |= 8
    assert run(guest, "0f23f8")
    guest.cpu.dr[0], state.iopl = 0x80, 1
    guest.domain.state.traps[1] = Trap(0xABC000, 0xE033, 0, False)
    registers[4] = A + 0x1000
    guest.cpu.store(A, bytes.fromhex("e681"))  # out 0x81, al
    guest.cpu.rip = A
    assert privileged.execute(guest.domain) and guest.cpu.rip == A + 2
    guest.cpu.store(A, bytes.fromhex("e57e"))  # in eax, 0x7e: it reaches to 0x81
    guest.cpu.rip = A
    assert privileged.execute(guest.domain) and guest.cpu.rip == 0xABC000 and guest.cpu.dr[6] & 15 == 1


def test_model_specific_registers(guest) -> None:
    registers = guest.cpu.registers
    registers[RCX], registers[RAX], registers[RDX] = 0xC0000100, 0x5000, 0
    assert run(guest, "0f30") and guest.cpu.bases[4] == 0x5000  # wrmsr: FS base
    registers[RDX] = 0x00F00000
    assert not run(guest, "0f30"), "not canonical"
    registers[RCX] = 0xC0000080
    assert run(guest, "0f32") and registers[RAX] == 0xD01  # rdmsr: EFER
    registers[RCX] = 0x12345
    assert not run(guest, "0f32") and not run(guest, "0f30")


def test_ports_and_cli_go_by_the_io_privilege_level(guest) -> None:
    state = guest.domain.state
    for in_kernel, level, allowed in ((True, 0, False), (True, 1, True), (False, 1, False), (False, 3, True)):
        state.in_kernel, state.iopl = in_kernel, level
        for code in ("ec", "ee", "fa", "fb"):  # in al, dx; out dx, al; cli; sti
            assert run(guest, code) is allowed
    assert guest.cpu.registers[RAX] & 0xFF == 0xFF
    state.in_kernel, state.iopl = True, 0
    state.assists.add(abi.VMASST_ARCHITECTURAL_IOPL)
    assert run(guest, "ec")
    assert guest.domain.view[guest.events.vcpu_info + 1] == 0, "cli masks no events"


def test_user_mode_has_no_privileged_instructions(guest) -> None:
    guest.domain.state.in_kernel = False
    for code in ("0f20d8", "0f22e0", "0f32", "0f30", "0f06", "f4", "0f09", "0f01d1"):
        assert not run(guest, code)


def test_halt_waits_for_an_event(guest) -> None:
    guest.domain.view[guest.events.vcpu_info + 1] = 1
    assert run(guest, "f4") and guest.domain.halt is not None
    assert guest.domain.view[guest.events.vcpu_info + 1] == 0


def test_cpuid_by_the_prefix(guest) -> None:
    guest.cpu.store(A, abi.FORCED_EMULATION + b"\x0f\xa2")
    guest.cpu.rip = A
    guest.cpu.registers[RAX] = 0x40000000
    guest.domain.exception(INVALID_OPCODE, None, None)
    assert guest.cpu.rip == A + 7
    assert tuple(guest.cpu.registers[r] for r in (RBX, RCX, RDX)) == abi.CPUID_SIGNATURE
    guest.cpu.store(A, abi.FORCED_EMULATION + b"\x90")
    guest.cpu.rip = A
    assert not privileged.forced(guest.domain)


def test_cpuid_hides_ring_0_whatever_stands_in_ecx(guest) -> None:
    """Leaves without subleaves do not look at it; in one that has them, the others are others."""
    for leaf, register, bit in ((1, 2, 21), (1, 3, 9), (0x80000001, 3, 26)):  # x2apic, apic, pdpe1gb
        for subleaf in (0, 5, 0xFFFFFFFF):
            assert not guest.domain.cpuid(leaf, subleaf)[register] >> bit & 1
    answers = [guest.domain.cpuid(7, subleaf) for subleaf in (0, 1)]
    assert answers[0][2:] != answers[1][2:]


def mapped_table(guest) -> tuple[int, int]:
    """(a pinned level-1 table, the linear address that shows it read-only)."""
    frames = guest.frames
    table, shown, middle, upper = (guest.frame() for _ in range(4))
    words = frames.words
    words[shown * 512] = table << 12 | 1
    words[middle * 512], words[upper * 512] = shown << 12 | 7, middle << 12 | 7
    assert guest.extended(abi.MMUEXT_PIN_L1_TABLE, table) == 0
    assert guest.update(guest.domain.state.kernel_root, 1, upper << 12 | 7) == 0
    return table, 1 << 39


@pytest.mark.parametrize(
    "code, before, rax, rcx, after, rax_after",
    [
        ("48890f", 0, 0, 0x1234 << 1, 0x1234 << 1, 0),  # mov [rdi], rcx
        ("48870f", 0x40, 0, 0x80, 0x80, 0),  # xchg [rdi], rcx
        ("f08027fd", 0xFF02, 0, 0, 0xFF00, 0),  # lock and byte [rdi], 0xfd
        ("f048812f00100000", 0, 0, 0, None, 0),  # lock sub: not known
        ("f0480fb10f", 0x10, 0x10, 0x20, 0x20, 0x10),  # lock cmpxchg [rdi], rcx: equal
        ("f0480fb10f", 0x10, 0x18, 0x20, 0x10, 0x10),  # and not
        ("f0480fba3705", 0x20, 0, 0, 0x00, 0),  # lock btr [rdi], 5
    ],
)
def test_writes_to_a_table(guest, code: str, before: int, rax: int, rcx: int, after: int | None, rax_after: int) -> None:
    table, linear = mapped_table(guest)
    words, registers = guest.frames.words, guest.cpu.registers
    words[table * 512 + 3] = before
    data = bytes.fromhex(code)
    guest.cpu.store(A, data.ljust(16, b"\x90"))
    guest.cpu.rip, registers[RDI], registers[RAX], registers[RCX] = A, linear + 24, rax, rcx
    done = page_table_write(guest.domain, linear + 24)
    assert done is (after is not None)
    if after is not None:
        assert words[table * 512 + 3] == after and guest.cpu.rip == A + len(data)
        assert registers[RAX] == rax_after
    if code == "48870f":
        assert registers[RCX] == before


def test_a_write_of_an_entry_that_is_not_allowed_faults(guest) -> None:
    table, linear = mapped_table(guest)
    guest.cpu.store(A, bytes.fromhex("48890f"))
    guest.cpu.rip, guest.cpu.registers[RDI] = A, linear
    for entry in (table << 12 | 3, 0 << 12 | 1, 1 << 51 | 1):
        guest.cpu.registers[RCX] = entry
        assert not page_table_write(guest.domain, linear)
    assert guest.frames.words[table * 512] == 0 and guest.cpu.rip == A
    assert not page_table_write(guest.domain, linear + (1 << 30)), "nothing is mapped there"


def test_a_multicall_ends_where_an_iret_leaves_the_kernel(guest) -> None:
    guest.domain.state.user_root = guest.domain.state.kernel_root
    number = abi.HYPERCALL_NUMBERS
    guest.put("<8Q", number["iret"], 0, 0, 0, 0, 0, 0, 0)
    guest.put("<8Q", number["xen_version"], 0x77, abi.XENVER_PAGESIZE, 0, 0, 0, 0, 0, at=A + 64)
    guest.put("<9Q", 0xAA, 0, 0, 0, 0x7000, 0xE033, 0x202, A + 0x20, 0xE02B, at=A + 0x200)
    guest.cpu.registers[4] = A + 0x200
    assert guest.call("multicall", A, 2) == 0xAA
    assert not guest.domain.state.in_kernel and guest.get("<QQ", at=A + 64)[1] == 0x77


def test_what_is_not_done_is_the_guests_fault(guest) -> None:
    guest.put("<BBHIQ", GENERAL_PROTECTION, 0, 0xE033, 0, 0x5000, at=A + 0x100)
    guest.call("set_trap_table", A + 0x100)
    guest.cpu.store(A, b"\x0f\x01\xd0")
    guest.cpu.rip, guest.cpu.registers[4] = A, A + 0x800
    guest.domain.exception(GENERAL_PROTECTION, 0, None)
    assert guest.cpu.rip == 0x5000 and guest.get("<8Q", at=guest.cpu.registers[4])[3] == A
