"""32-bit code with and without paging, compatibility mode, address sizes, and accesses of hundreds of bytes."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import (
    CODE,
    DATA,
    DEVICE,
    KERNEL_CS32,
    KERNEL_DS,
    KERNEL_STACK,
    STACK,
    TABLE_POOL,
    USER_CS32,
    USER_DS,
    USER_STACK,
    Machine,
    Make,
)

HOLE = 0x400000


def legacy_paging(m: Machine, pae: bool) -> int:
    """Identity tables of 32-bit or PAE paging, large pages but for 2 or 4 MiB at HOLE; returns HOLE's entry."""
    memory, size = m.memory, 8 if pae else 4
    state = m.vcpu.state
    top, small = TABLE_POOL, TABLE_POOL + 0x4000
    write = memory.write_u64 if pae else memory.write_u32
    if pae:
        for i in range(4):
            memory.write_u64(top + 8 * i, top + 0x1000 if i == 0 else 0)
        memory.write_u64(top, top + 0x1000 | 1)
        directory, shift = top + 0x1000, 21
    else:
        directory, shift = top, 22
    for i in range(32 if pae else 16):
        write(directory + size * i, i << shift | 0x87)
    write(directory + size * (HOLE >> shift), small | 7)
    for i in range(512 if pae else 1024):
        write(small + size * i, HOLE + (i << 12) | 7)
    state.cr3, state.cr4, state.cr0 = top, state.cr4 | (0x30 if pae else 0x10), state.cr0 | 0x80010000
    m.vcpu.state = state
    return small


@pytest.mark.parametrize("pae", [False, True])
def test_legacy_paging(machine: Make, pae: bool) -> None:
    m = machine("mov eax, [ebx]\n mov [ebx+4], eax\n mov ecx, [ebx+0xffe]\n here: mov eax, [ebx+0x2000]\n hlt", 32)
    entry = legacy_paging(m, pae)
    size = 8 if pae else 4
    write = m.memory.write_u64 if pae else m.memory.write_u32
    write(entry, 0x600000 | 7)
    write(entry + size, 0x800000 | 7)
    write(entry + 2 * size, 0)
    m.memory.write_u32(0x600000, 0x55)
    m.memory.write_u16(0x600FFE, 0x1122)
    m.memory.write_u16(0x800000, 0x3344)
    frame = m.fault(rbx=HOLE)
    assert (frame.vector, frame.error, frame.rip, m.core.cr2) == (14, 0, m.labels["here"], HOLE + 0x2000)
    assert (m["rax"], m["rcx"]) == (0x55, 0x33441122)
    assert m.memory.read_u32(0x600004) == 0x55
    assert m.memory.read_u32(entry) & 0x60 == 0x60
    assert m.memory.read_u32(entry + size) & 0x60 == 0x20


@pytest.mark.parametrize("pae", [False, True])
def test_legacy_paging_invlpg_and_write_protection(machine: Make, pae: bool) -> None:
    m = machine("mov eax, [ebx]\n mov [edi], edx\n invlpg [ebx]\n mov ecx, [ebx]\n here: mov [ebx], eax\n hlt", 32)
    entry = legacy_paging(m, pae)
    m.memory.write_u32(0x600000, 1)
    m.memory.write_u32(HOLE, 2)
    frame = m.fault(rbx=HOLE, rdi=entry, rdx=0x600000 | 5)
    assert (m["rax"], m["rcx"]) == (2, 1)
    assert (frame.vector, frame.error, frame.rip, m.core.cr2) == (14, 3, m.labels["here"], HOLE)


def test_addresses_wrap_at_4_gib_in_32_bit_code(machine: Make) -> None:
    m = machine("mov eax, [ebx+ecx]\n mov edx, [ebx+ecx*2+0x10]\n lea esi, [ebx+ecx]\n mov [ebx+ecx+4], esi\n hlt", 32)
    m.memory.write_u32(DATA, 0x77)
    m.halt(rbx=0xF0000000, rcx=0x10000000 + DATA)
    assert (m["rax"], m["rsi"]) == (0x77, DATA)
    assert m.memory.read_u32(DATA + 4) == DATA


def test_address_sizes_in_64_bit_code(machine: Make) -> None:
    m = machine("mov eax, [ebx+8]\n mov ecx, [ebx+edi]\n mov [esi], ecx\n lea rdx, [ebx-1]\n hlt")
    m.memory.write_u32(DATA + 8, 5)
    m.memory.write_u32(DATA + 0x10, 6)
    high = 0x1234567800000000
    m.halt(rbx=high | DATA, rdi=high | 0x10, rsi=high | DATA + 4)
    assert (m["rax"], m["rdx"]) == (5, DATA - 1)
    assert m.memory.read_u32(DATA + 4) == 6


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("rep movsb", {"rsi": DATA + 6, "rdi": DATA + 0x106, "rcx": 0}),
        ("rep stosw", {"rdi": DATA + 0x10C, "rcx": 0}),
        ("repne scasb", {"rdi": DATA + 0x103, "rcx": 3}),
        ("repe cmpsb", {"rsi": DATA + 4, "rdi": DATA + 0x104, "rcx": 2}),
        ("lodsw", {"rsi": DATA + 2}),
        ("loop $+2", {"rcx": 5}),
    ],
)
@pytest.mark.parametrize("pages", [1, 2])
def test_string_instructions_with_32_bit_addresses_in_64_bit_code(
    machine: Make, code: str, expected: dict[str, int], pages: int
) -> None:
    """Index registers and count are 32 bits wide, whatever lies above; what is written is zero-extended."""
    high, move = 0x1234567800000000, 0 if pages == 1 else 0xFFD
    m = machine(f"db 0x67\n {code}\n hlt")
    m.memory.write(DATA + move, b"abcdef")
    m.memory.write(DATA + move + 0x100, b"abcXef")
    m.halt(
        rsi=high | DATA + move, rdi=high | DATA + move + 0x100, rcx=high | 6, rax=ord("c") if "scas" in code else 0x5A5A
    )
    for register, value in expected.items():
        assert m[register] == value + (move if value >= DATA else 0), register
    assert m.memory.read(DATA + move + 0x100, 6) == {
        "rep movsb": b"abcdef", "rep stosw": b"ZZZZZZ",
    }.get(code, b"abcXef")  # fmt: skip


def test_16_bit_addresses_in_32_bit_code(machine: Make) -> None:
    m = machine(
        "mov esi, 0x12348000\n mov edi, 0x56789000\n mov ecx, 0x9abc0003\n db 0xf3, 0x67\n movsb\n"
        "mov eax, [bx+si]\n db 0x67\n jcxz there\n ud2\n there: hlt",
        32,
    )
    m.memory.write(0x18000 - 0x10000, b"xyz")
    m.memory.write_u32(0x8010, 0x1122)
    m.halt(rbx=0xFFFF000D)
    assert (m["rsi"], m["rdi"], m["rcx"]) == (0x12348003, 0x56789003, 0x9ABC0000)
    assert m.memory.read(0x9000, 3) == b"xyz"
    assert m["rax"] == 0x1122


def test_fs_and_gs_bases(machine: Make) -> None:
    m = machine(
        "mov ecx, 0xc0000100\n mov eax, DATA\n xor edx, edx\n wrmsr\n inc ecx\n mov eax, 0xfffff000\n mov edx, -1\n wrmsr\n"
        "mov eax, [fs:8]\n mov ebx, [gs:DATA+0x1008]\n mov r8, 0x1010\n mov esi, [gs:r8+DATA]\n add dword [fs:r8-0x1000], 1\n"
        "xor edi, edi\n mov rdi, DATA\n here: mov eax, [gs:r9]\n hlt"
    )
    m.memory.write_u32(DATA + 8, 0x31)
    m.memory.write_u32(DATA + 0x10, 0x32)
    frame = m.fault(r9=0x8000_0000_0000 + 0x1000)
    assert (m["rax"], m["rbx"], m["rsi"]) == (0x31, 0x31, 0x32)
    assert m.memory.read_u32(DATA + 0x10) == 0x33
    assert (frame.vector, frame.error, frame.rip) == (13, 0, m.labels["here"])


def test_compatibility_mode_and_back(machine: Make) -> None:
    """64-bit kernel, 32-bit user program with int 0x80; then on in 64-bit mode."""
    m = machine(
        f"push {USER_DS | 3}\n push USER_STACK\n push 2\n push {USER_CS32 | 3}\n mov eax, user\n push rax\n iretq\n"
        "bits 32\n user: mov ebx, 0xffffffff\n inc ebx\n push ebx\n dec dword [esp]\n pop ecx\n db 0x40\n int 0x80\n ud2\n"
        "bits 64\n entry: mov rdx, rsp\n mov r12, [rsp]\n mov r13, [rsp+24]\n hlt"
    )
    m.gate(0x80, "entry", dpl=3)
    m.halt(rax=0)
    assert (m["rbx"], m["rcx"]) == (0, 0xFFFFFFFF)
    assert m["rdx"] == KERNEL_STACK - 40
    assert m["r13"] == USER_STACK
    assert m["rax"] == m.labels["user"] + 1  # 0x40 is INC EAX there, a REX prefix here


def test_a_32_bit_task_s_page_fault_in_long_mode(machine: Make) -> None:
    m = machine("hlt")
    m.map(HOLE, 0, 0)
    state = m.initial_state(3)
    state.cs.selector, state.cs.attributes = USER_CS32 | 3, 0xC0FB
    m.vcpu.state = state
    m.memory.write(CODE, bytes.fromhex("8b8300100000 8903 f4"))  # mov eax, [ebx+0x1000]; mov [ebx], eax
    m.vcpu.memory_written(CODE, 16)
    frame = m.fault(rbx=HOLE)
    assert (frame.vector, frame.error, frame.rip, frame.cs, m.core.cr2) == (14, 6, CODE + 6, USER_CS32 | 3, HOLE)


def test_exceptions_of_32_bit_code(machine: Make) -> None:
    m = machine("here: div ecx\n hlt", 32)
    frame = m.fault(rcx=0)
    assert (frame.vector, frame.rip, frame.cs) == (0, CODE, KERNEL_CS32)
    assert m["rsp"] == STACK - 12  # no stack switch: EIP, CS, EFLAGS alone
    m.restart(3)
    m.put("ud2", CODE)
    frame = m.fault()
    assert (frame.vector, frame.rip, frame.cs, frame.rsp, frame.ss) == (
        6, CODE, USER_CS32 | 3, USER_STACK, USER_DS | 3)  # fmt: skip
    assert m["rsp"] == KERNEL_STACK - 20
    assert m.vcpu.state.ss.selector == KERNEL_DS


def test_16_bit_operands_of_the_stack(machine: Make) -> None:
    for bits in (32, 64):
        m = machine("push ax\n push word 0x1234\n pop bx\n pop cx\n hlt", bits)
        m.halt(rax=0xABCD)
        assert (m["rbx"] & 0xFFFF, m["rcx"] & 0xFFFF, m["rsp"]) == (0x1234, 0xABCD, STACK)


@pytest.mark.parametrize("save", ["fxsave", "xsave"])
def test_large_accesses_across_pages(machine: Make, save: str) -> None:
    """The image lies in two pages of RAM that are not neighbours, and one of them may be missing."""
    m = machine(
        f"movups xmm15, [DATA]\n mov eax, 3\n xor edx, edx\n {save} [rbx]\n xorps xmm15, xmm15\n mov eax, 3\n"
        f"{save.replace('save', 'rstor')} [rbx]\n movups [DATA+16], xmm15\n hlt"
    )
    state = m.initial_state()
    if save == "xsave":
        state.cr4 |= 1 << 18
        state.xcr0 = 3
    m.vcpu.state = state
    linear = 0x10_0000_0000
    m.map(linear, 0x500000)
    m.map(linear + 0x1000, 0x700000)
    m.memory.write(DATA, bytes(range(16)))
    for offset in (64, 192, 448):
        m.memory.write(DATA + 16, bytes(16))
        for page in (0x500000, 0x700000):  # XSAVE writes a part of its header only
            m.memory.write(page, bytes(0x1000))
        m.halt(CODE, rbx=linear + 0x1000 - offset)
        assert m.memory.read(DATA + 16, 16) == bytes(range(16))
        image = m.memory.read(0x501000 - offset, offset) + m.memory.read(0x700000, 512 - offset)
        assert image[400:416] == bytes(range(16))
        assert not any(m.memory.read(0x501000, 16))
    m.map(linear + 0x1000, 0, 0)
    m.flush()
    frame = m.fault(CODE, rbx=linear + 0x1000 - 64, rsp=STACK)
    assert (frame.vector, frame.error, m.core.cr2) == (14, 2, linear + 0x1000)


def test_a_device_behind_fxsave_does_not_bring_the_engine_down(machine: Make) -> None:
    m = machine("fxsave [rbx]\n fxrstor [rbx]\n hlt")
    device = m.record()
    m.run(rbx=DEVICE)
    assert device.log[0][0] == "write"


def test_cmpxchg16b_and_avx_across_pages(machine: Make) -> None:
    m = machine("lock cmpxchg8b [rbx]\n setz cl\n movdqu xmm0, [rbx]\n movdqu [rbx+32], xmm0\n hlt")
    linear = 0x10_0000_0000
    m.map(linear, 0x500000)
    m.map(linear + 0x1000, 0x700000)
    m.halt(rbx=linear + 0xFFC, rax=0, rdx=0, rcx=0x11112222)
    assert m.memory.read_u32(0x700000) == 0x11112222
    assert m["rcx"] & 0xFF == 1


def test_the_stack_pointer_as_operand_and_pop_into_itself(machine: Make) -> None:
    m = machine("mov rbp, rsp\n push rsp\n pop rax\n push 0x1234\n pop qword [rsp-16]\n mov rbx, [rsp-16]\n mov rcx, rsp\n"
                "push STACK-64\n pop rsp\n mov rdx, rsp\n xchg rsp, rbp\n mov rsi, rsp\n hlt")  # fmt: skip
    m.halt()
    assert (m["rax"], m["rbx"], m["rcx"]) == (STACK, 0x1234, STACK)
    assert (m["rdx"], m["rsi"]) == (STACK - 64, STACK)
