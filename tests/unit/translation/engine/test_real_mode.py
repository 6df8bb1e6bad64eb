"""Real mode: 16-bit addresses and stacks, segments of 64 KiB, the interrupt vector table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.unit.translation.engine.real_guest import (
    CODE_SEGMENT,
    DATA_SEGMENT,
    EXTRA_SEGMENT,
    REAL_CODE,
    REAL_DATA,
    REAL_EXTRA,
    TOP,
    RealMachine,
)
from trivisor.machine.exits import DebugStop, Shutdown
from trivisor.translation import cpu

Real = Callable[[str], RealMachine]


@pytest.fixture
def real() -> Iterator[Real]:
    made: list[RealMachine] = []

    def make(source: str) -> RealMachine:
        made.append(RealMachine(source))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


def test_16_bit_addresses_wrap_and_keep_what_lies_above(real: Real) -> None:
    m = real("mov ax, [bx+si+4]\n mov [bp+di-2], ax\n lea cx, [bx+si]\n mov dl, [0x1234]\n hlt")
    m.memory.write(REAL_DATA + 0x14, b"\x34\x12")
    m.memory.write_u8(REAL_DATA + 0x1234, 0x77)
    m.halt(rbx=0x1234FFF0, rsi=0x56780020, rbp=0xF000, rdi=0x1002, rax=0xAAAA0000, rcx=0xBBBB0000, rdx=0)
    assert m["rax"] == 0xAAAA1234
    assert m["rcx"] == 0xBBBB0010
    assert m["rdx"] == 0x77
    assert m.memory.read_u16(0x30000 + 0x0000) == 0x1234  # by BP: the stack segment


def test_address_size_prefix(real: Real) -> None:
    m = real("mov ax, [ebx+ecx*2+1]\n mov [eax], eax\n hlt")
    m.memory.write_u16(REAL_DATA + 0x301, 0x4444)
    m.halt(rbx=0x100, rcx=0x100, rax=0)
    assert m.data(0x4444, 4) == 0x4444


def test_stack_of_16_bits_wraps_and_keeps_the_upper_half(real: Real) -> None:
    m = real(
        """
        push ax
        push dword 0x11223344
        push byte -1
        pop cx
        pop edx
        pop word [0x20]
        mov bx, sp
        push sp
        pop si
        pusha
        popa
        push ax
        pushad
        popad
        pop ax
        enter 8, 0
        leave
        hlt
        """
    )
    m.halt(rax=0xBEEF, rsp=0x99990002, rcx=0, rdx=0, rbx=0, rsi=0, rbp=0x55)
    assert (m["rcx"], m["rdx"], m.data(0x20)) == (0xFFFF, 0x11223344, 0xBEEF)
    assert (m["rbx"], m["rsi"], m["rsp"], m["rbp"]) == (2, 2, 0x99990002, 0x55)


def test_calls_and_returns(real: Real) -> None:
    m = real(
        """
        call near_one
        mov si, near_two
        call si
        mov word [0], near_three
        call [0]
        call CODE_SEGMENT:far_one
        mov word [2], far_one
        mov word [4], CODE_SEGMENT
        call far [2]
        db 0x66, 0xe8
        dd wide - $ - 4
        hlt
        near_one: inc ax
        ret
        near_two: inc ax
        ret
        near_three: inc ax
        ret
        far_one: inc bx
        retf
        wide: mov ecx, [esp]
        add bx, 2
        db 0x66
        ret
        """
    )
    m.halt(rax=0, rbx=0, rcx=0)
    assert (m["rax"], m["rbx"], m["rsp"]) == (3, 4, TOP)
    assert 0 < m["rcx"] < 0x100


def test_return_drops_its_parameters(real: Real) -> None:
    m = real("push ax\n push ax\n call f\n hlt\n f: ret 4")
    m.halt()
    assert m["rsp"] == TOP


def test_loops_count_in_cx_or_in_ecx_by_the_address_size(real: Real) -> None:
    m = real(
        """
        mov ecx, 0x10003
        a: inc ax
        loop a
        mov edx, ecx
        mov ecx, 0x10002
        b: inc bx
        cmp bx, 2
        db 0x67, 0xe0, b - $ - 3
        jcxz c
        ud2
        c: mov ecx, 0x10000
        jcxz d
        ud2
        d: jecxz bad
        mov cx, 5
        e: cmp cx, 3
        loopne e
        mov si, cx
        hlt
        bad: ud2
        """
    )
    m.halt(rax=0, rbx=0)
    assert (m["rax"] & 0xFFFF, m["rdx"]) == (3, 0x10000)
    assert m["rbx"] & 0xFFFF == 2
    assert m["rsi"] & 0xFFFF == 2


def test_jumps_wrap_at_64_kib(real: Real) -> None:
    m = real("db 0xe9\n dw 0xf000 - 3")
    m.put("mov ax, 1\n db 0xe9\n dw 0x1040 - 6", 0xF000)
    m.put("hlt", 0x40)
    m.halt(rax=0)
    assert (m["rax"], m.core.rip) == (1, 0x41)


def test_string_instructions(real: Real) -> None:
    m = real(
        """
        mov cx, 5
        rep movsw
        mov al, 'd'
        mov di, 0
        mov cx, 10
        repne scasb
        mov bx, di
        std
        mov di, 8
        mov cx, 3
        rep stosb
        cld
        mov si, 0xfffe
        lodsw
        mov dx, si
        hlt
        """
    )
    m.memory.write(REAL_DATA, b"abcdefghij")
    m.memory.write(REAL_DATA + 0xFFFE, b"yz")
    m.halt(rsi=0x70000, rdi=0x80000, rcx=0x90000)
    assert m.memory.read(REAL_EXTRA, 10) == b"abcdefdddj"
    assert (m["rbx"], m["rdx"], m["rax"] & 0xFFFF) == (4, 0, 0x7A79)
    assert m["rcx"] == 0x90000 + 0
    assert m["rsi"] == 0x70000


def test_string_instructions_with_an_address_size_prefix(real: Real) -> None:
    m = real("a32 rep movsb\n hlt")
    m.memory.write(REAL_DATA + 0x100, b"hello")
    m.halt(rsi=0x100, rdi=0x200, rcx=5)
    assert m.memory.read(REAL_EXTRA + 0x200, 5) == b"hello"
    assert (m["rsi"], m["rdi"], m["rcx"]) == (0x105, 0x205, 0)
    m.restart()
    frame = m.fault(0, rsi=0x100, rdi=0xFFFE, rcx=5)  # the third byte is beyond the segment
    assert (frame.vector, frame.rip) == (13, 0)
    assert (m["rsi"], m["rdi"], m["rcx"]) == (0x102, 0x10000, 3)


@pytest.mark.parametrize(
    ("code", "vector", "registers"),
    [
        ("mov ax, [bx]", 13, {"rbx": 0xFFFF}),
        ("mov [bx], ax", 13, {"rbx": 0xFFFF}),
        ("mov al, [ebx]", 13, {"rbx": 0x10000}),
        ("mov ax, [bp]", 12, {"rbp": 0xFFFF}),
        ("pop dword [0]", 12, {"rsp": 0xFFFE}),
        ("movdqu xmm0, [bx]", 13, {"rbx": 0xFFF1}),
        ("bts [bx], ax", 13, {"rbx": 0xFFFF, "rax": 0}),
        ("lodsw", 13, {"rsi": 0xFFFF}),
        ("jmp eax", 13, {"rax": 0x10000}),
        ("call eax", 13, {"rax": 0x12345}),
        ("div cl", 0, {"rcx": 0}),
        ("vaddps ymm0, ymm1, ymm2", 6, {}),
        ("lldt ax", 6, {}),
    ],
)
def test_faults(real: Real, code: str, vector: int, registers: dict[str, int]) -> None:
    m = real(f"nop\n here: {code}\n hlt")
    frame = m.fault(**registers)
    assert (frame.vector, frame.rip, frame.cs) == (vector, m.labels["here"], CODE_SEGMENT)


def test_a_stack_that_cannot_take_the_frame_of_its_own_fault(real: Real) -> None:
    m = real("push ax")
    assert m.run(rsp=1) == Shutdown(12)


def test_code_ends_at_the_limit(real: Real) -> None:
    m = real("nop")
    m.put("inc ax\n inc ax", 0xFFFE)
    frame = m.fault(0xFFFE, rax=0)
    assert (frame.vector, m["rax"]) == (13, 2)
    m.memory.write(REAL_CODE + 0xFFFF, b"\xb8")  # mov ax, ...: it does not end here
    m.vcpu.memory_written(REAL_CODE + 0xFFFF, 1)
    m.restart()
    frame = m.fault(0xFFFE, rax=0)
    assert (frame.vector, frame.rip, m["rax"]) == (13, 0xFFFF, 1)


def test_segment_registers_are_loaded_without_descriptors(real: Real) -> None:
    m = real(
        """
        mov ax, EXTRA_SEGMENT
        mov ds, ax
        push DATA_SEGMENT
        pop es
        mov bx, [0]
        mov cx, [es:0]
        mov [2], ds
        mov fs, [2]
        mov eax, fs
        mov gs, bx
        mov dx, [gs:0]
        lds si, [es:4]
        push cs
        pop es
        hlt
        """
    )
    m.memory.write(REAL_EXTRA, b"\x00\x20")
    m.memory.write(REAL_DATA, b"\xcd\xab\0\0\x34\x12\x78\x56")
    m.halt(rsi=0)
    assert (m["rbx"], m["rcx"] & 0xFFFF, m["rdx"] & 0xFFFF) == (DATA_SEGMENT, 0xABCD, 0xABCD)
    assert (m["rax"], m["rsi"]) == (EXTRA_SEGMENT, 0x1234)
    state = m.vcpu.state
    assert (state.ds.selector, state.ds.base, state.ds.limit) == (0x5678, 0x56780, 0xFFFF)
    assert (state.es.selector, state.es.base) == (CODE_SEGMENT, REAL_CODE)


def test_far_pointers_and_tables_of_bytes(real: Real) -> None:
    m = real("les bx, [2]\n lfs esi, [6]\n mov al, 0xf0\n mov bx, 0xff80\n xlatb\n mov dl, al\n es xlatb\n hlt")
    m.memory.write(REAL_DATA + 2, b"\x11\x11\x00\x50" + b"\x44\x33\x22\x11\x66\x55")
    m.memory.write_u8(REAL_DATA + 0x70, 0x99)  # 0xff80 + 0xf0 wraps
    m.memory.write_u8(0x50000 + 0x19, 0x42)
    m.halt(rbx=0x77770000, rsi=0, rdx=0, rax=0)
    assert (m["rsi"], m["rdx"], m["rbx"]) == (0x11223344, 0x99, 0x7777FF80)
    assert m["rax"] & 0xFF == 0x42
    state = m.vcpu.state
    assert (state.es.selector, state.es.base, state.fs.base) == (0x5000, 0x50000, 0x55660)


def test_interrupt_shadows(real: Real) -> None:
    """Nothing comes between MOV SS or STI and the next instruction."""
    m = real("sti\n nop\n mov ss, ax\n inc cx\n inc dx\n hlt")
    m.vcpu.interrupt(0x40)
    m.core.rflags = 2
    frame = m.fault(rax=0x3000)
    assert (frame.vector, frame.rip) == (0x40, 2)
    m.restart()
    m.put("mov ss, ax\n mov sp, bx\n hlt", 0x100)
    m.set(rflags=0x202, rip=0x100, rax=0x3000)
    m.step()
    m.vcpu.interrupt(0x41)
    frame = m.fault(rbx=0x7000)
    assert (frame.vector, frame.rip, frame.rsp) == (0x41, 0x104, 0x7000 - 6)


def test_interrupts_through_the_vector_table(real: Real) -> None:
    m = real("sti\n int 0x40\n mov bx, 1\n hlt\n handler: pushf\n pop ax\n mov cx, cs\n iret")
    m.memory.write_u32(0x7000 + 4 * 0x40, CODE_SEGMENT << 16 | m.labels["handler"])
    exit_ = m.run(0, rax=0, rbx=0, rflags=2)
    m.vcpu.kick()
    assert m["rbx"] == 1, exit_
    assert m["rax"] & 0x202 == 2  # IF is off in the handler
    assert m.core.rflags & 0x200
    assert m["rcx"] & 0xFFFF == CODE_SEGMENT
    m = real("into\n int3\n bound ax, [0]\n hlt")
    assert m.fault(rflags=0x802).vector == 4
    m.restart()
    assert m.fault(rflags=2).vector == 3
    m.restart()
    m.memory.write(REAL_DATA, b"\1\0\2\0")
    assert m.fault(2, rax=3).vector == 5


def test_the_bios_ticks(real: Real) -> None:
    """What the board leaves for guests that go back to real mode: the timer's handler counts, and INT 1Ch is called."""
    m = real("sti\n hlt\n hlt\n cli\n hlt")
    m.board.leave_bios_interrupts()
    m.memory.write_u32(4 * 0x1C, CODE_SEGMENT << 16 | 0x100)
    m.put("push ds\n push DATA_SEGMENT\n pop ds\n inc word [0]\n pop ds\n iret", 0x100)
    m.core.idtr_base = 0
    m.memory.write_u32(0x46C, 0xFFFF)
    m.halt()
    ticks = m.memory.read_u32(0x46C) - 0xFFFF
    assert ticks >= 2, "a slow host may see one between the two"
    assert m.data(0) == ticks
    assert m["rsp"] == TOP


def test_smap_means_nothing_without_paging(real: Real) -> None:
    m = real("mov [0], ax\n mov bx, [0]\n hlt")
    state = m.vcpu.state
    state.cr4 |= 1 << 21
    m.vcpu.state = state
    m.halt(rax=0x1234)
    assert m["rbx"] == 0x1234


def test_single_steps(real: Real) -> None:
    m = real("pushf\n or byte [bp-1], 1\n popf\n inc ax\n inc ax\n hlt")
    m.memory.write_u32(0x7000 + 4, CODE_SEGMENT << 16 | 0x100)
    m.put("inc bx\n mov cx, [esp]\n cmp bx, 2\n jb go_on\n and byte [esp+5], 0xfe\n go_on: iret", 0x100)
    m.halt(0, rax=0, rbx=0, rbp=TOP)
    assert (m["rax"], m["rbx"]) == (2, 2)
    m.restart()
    assert m.step() == DebugStop(REAL_CODE + 1)


def test_big_real_mode(real: Real) -> None:
    """A segment loaded in protected mode keeps its limit (SDM 3A 9.9.1 and 9.9.2)."""
    m = real(
        """
        lgdt [0x100]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        mov bx, 8
        mov ds, bx
        and al, 0xfe
        mov cr0, eax
        mov ecx, [esi]
        mov ds, dx
        mov [edi], ecx
        hlt
        """
    )
    m.memory.write(REAL_DATA + 0x100, (15).to_bytes(2, "little") + (REAL_DATA + 0x110).to_bytes(4, "little"))
    m.memory.write_u64(REAL_DATA + 0x118, 0x00CF93000000FFFF)
    m.memory.write_u32(0x300000, 0xCAFEBABE)
    m.halt(rsi=0x300000, rdi=0x12000, rdx=EXTRA_SEGMENT)
    assert m["rcx"] == 0xCAFEBABE
    assert m.memory.read_u32(REAL_EXTRA + 0x12000) == 0xCAFEBABE


def test_more_code_segments_than_there_are_numbers(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MAXIMUM_SEGMENTED", 3)
    m = real("nop")
    for number in range(8):  # each jumps to the next, a paragraph on
        target = CODE_SEGMENT + 0x100 + 0x10 * (number + 1)
        code = b"\x40\xea" + (0).to_bytes(2, "little") + target.to_bytes(2, "little")  # inc ax; jmp
        m.memory.write(REAL_CODE + 0x1000 + 0x100 * number, code)
    m.memory.write(REAL_CODE + 0x1000 + 0x800, b"\xf4")
    for _ in range(2):
        m.restart()
        state = m.vcpu.state
        state.cs.selector, state.cs.base, state.rip = CODE_SEGMENT + 0x100, REAL_CODE + 0x1000, 0
        m.vcpu.state = state
        m.halt(rax=0)
        assert m["rax"] == 8


def test_the_same_bytes_by_another_segment_wrap_elsewhere(real: Real) -> None:
    """A block belongs to its code segment: where its jumps wrap depends on that."""
    m = real("nop")
    m.memory.write(REAL_CODE + 0x1000, b"\xe9\xfd\xdf")  # jmp by -0x2003
    m.memory.write(REAL_CODE + 0xF000, b"\x40\xf4")  # from CS:1000 it wraps
    m.memory.write(REAL_CODE - 0x1000, b"\x43\xf4")  # from 3000 in a segment lower by 2000 it does not
    m.run(0x1000, rax=0, rbx=0)
    assert (m["rax"], m["rbx"]) == (1, 0)
    state = m.initial_state()
    state.cs.selector, state.cs.base, state.rip = 0xE00, 0xE000, 0x3000
    m.vcpu.state = state
    m.run(rax=0, rbx=0)
    assert (m["rax"], m["rbx"]) == (0, 1)


def test_a_processor_after_reset(real: Real) -> None:
    """Code at the top of the address space, where there is nothing, and then a ROM."""
    from trivisor.devices.rom import Rom
    from trivisor.machine.state import CpuState

    m = real("nop")
    m.board.mmio.attach(0xFFFF0000, 0x10000, Rom(bytes(0xFFF0) + b"\xb8\x34\x12\x2e\xa1\xf1\xff\xf4".ljust(16, b"\xf4")))
    m.vcpu.state = CpuState()
    m.halt(rax=0)
    assert m["rax"] == 0x1234  # read back from where it stands, by CS
    assert m.vcpu.state.rip == 0xFFF8
    assert m.core.linear_rip == 0xFFFFFFF8
