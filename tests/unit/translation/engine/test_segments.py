"""Segments of protected mode that are not flat: bases, limits, types; 16-bit code and stacks (SDM 3A 5.3 to 5.5)."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import CODE, GDT, KERNEL_CS32, KERNEL_DS, STACK, TSS_SELECTOR, Machine, Make
from trivisor.machine.state import Segment, Table
from trivisor.x86.descriptors import build_segment

WINDOW = 0x300000
"""Linear address of the segments' offset 0."""
DATA, EXPAND_DOWN, READ_ONLY, EXECUTE_ONLY, READABLE_CODE, SMALL_STACK, CODE16, BASED_CODE, NULL = (
    0x50, 0x58, 0x60, 0x68, 0x70, 0x78, 0x80, 0x88, 0,
)  # fmt: skip
_DESCRIPTORS = {
    DATA: (WINDOW, 0x1FF, 0x4093),
    EXPAND_DOWN: (WINDOW, 0x1FF, 0x4097),
    READ_ONLY: (WINDOW, 0x1FF, 0x4091),
    EXECUTE_ONLY: (WINDOW, 0x1FF, 0x4099),
    READABLE_CODE: (WINDOW, 0x1FF, 0x409B),
    SMALL_STACK: (WINDOW, 0xFFFF, 0x0093),
    CODE16: (CODE, 0xFFFF, 0x009B),
    BASED_CODE: (CODE - 0x1000, 0x2FFF, 0x409B),
}


def protected(machine: Make, source: str) -> Machine:
    """A 32-bit guest with these descriptors, and CS, SS, DS and ES flat to begin with."""
    selectors = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)}
    equates = "".join(f"{name}_SELECTOR equ {value}\n" for name, value in selectors.items())
    m = machine(equates + source, 32)
    for selector, (base, limit, attributes) in _DESCRIPTORS.items():
        m.memory.write_u64(GDT + selector, build_segment(base, limit, attributes))
    state = m.vcpu.state
    state.gdtr = Table(GDT, 0x8F)
    m.vcpu.state = state
    return m


@pytest.mark.parametrize(
    ("selector", "code", "offset", "vector"),
    [
        (DATA, "mov eax, [esi]", 0x1FC, None),
        (DATA, "mov eax, [esi]", 0x1FD, 13),
        (DATA, "mov [esi], al", 0x1FF, None),
        (DATA, "mov [esi], al", 0x200, 13),
        (DATA, "mov eax, [esi]", 0xFFFFFFFE, 13),
        (DATA, "rep movsd", 0x1FD, 13),
        (DATA, "push dword [esi]", 0x1FE, 13),
        (DATA, "pop dword [esi]", 0x1FE, 13),
        (DATA, "jmp [esi]", 0x1FD, 13),
        (DATA, "xchg [esi], eax", 0x1FD, 13),
        (DATA, "cmpxchg8b [esi]", 0x1F9, 13),
        (DATA, "les eax, [esi]", 0x1FB, 13),
        (DATA, "lgdt [esi]", 0x1FB, 13),
        (DATA, "fld tword [esi]", 0x1F7, 13),
        (EXPAND_DOWN, "mov eax, [esi]", 0x200, None),
        (EXPAND_DOWN, "mov eax, [esi]", 0x1FF, 13),
        (EXPAND_DOWN, "mov al, [esi]", 0x100, 13),
        (READ_ONLY, "mov eax, [esi]", 0, None),
        (READ_ONLY, "mov [esi], eax", 0, 13),
        (READ_ONLY, "add [esi], eax", 0, 13),
        (READ_ONLY, "cmp [esi], eax", 0, None),
        (READABLE_CODE, "mov eax, [esi]", 0, None),
        (READABLE_CODE, "mov [esi], eax", 0, 13),
        (NULL, "mov eax, [esi]", 0, 13),
        (NULL, "invlpg [esi]", 0, None),
    ],
)
@pytest.mark.parametrize("register", ["ds", "fs"])
def test_limits_and_types(
    machine: Make, selector: int, code: str, offset: int, vector: int | None, register: str
) -> None:
    prefix = "" if register == "ds" else "db 0x64\n"
    m = protected(machine, f"mov {register}, ecx\n mov ecx, 1\n here: {prefix}{code}\n hlt")
    registers = {"rcx": selector, "rsi": offset, "rdi": 0x400000, "rdx": 0}
    if vector is None:
        m.memory.write_u32(WINDOW + offset, 0x12345678)
        m.halt(**registers)
        if code == "mov eax, [esi]":
            assert m["rax"] == 0x12345678
    else:
        frame = m.fault(**registers)
        assert (frame.vector, frame.error, frame.rip) == (vector, 0, m.labels["here"])


def test_execute_only_code_cannot_be_loaded_or_read(machine: Make) -> None:
    m = protected(machine, "here: mov ds, ecx\n hlt")
    assert m.fault(rcx=EXECUTE_ONLY).error == EXECUTE_ONLY
    m = protected(machine, "mov eax, [cs:0x100000]\n jmp 0x90:here\n here: mov eax, [cs:0x100000]\n hlt")
    m.memory.write_u64(GDT + 0x90, build_segment(0, 0xFFFFFFFF, 0xC099))
    state = m.vcpu.state
    state.gdtr = Table(GDT, 0x97)
    m.vcpu.state = state
    frame = m.fault()
    assert (frame.vector, frame.rip) == (13, m.labels["here"])


def test_code_segments_are_not_written(machine: Make) -> None:
    m = protected(machine, "here: mov [cs:esi], eax\n hlt")
    assert m.fault(rsi=0x300000).vector == 13


def test_a_stack_segment_with_base_and_limit(machine: Make) -> None:
    m = protected(machine, "mov ss, ecx\n mov esp, edx\n push eax\n here: pop ebx\n call f\n hlt\n f: pop esi\n jmp esi")
    m.halt(rcx=DATA, rdx=0x200, rax=0x77)
    assert (m["rbx"], m["rsp"]) == (0x77, 0x200)
    assert m.memory.read_u32(WINDOW + 0x1FC) == m.labels["f"] - 1


@pytest.mark.parametrize("code", ["push eax", "call here", "pop eax", "ret", "mov eax, [ebp]", "leave"])
def test_stack_faults(machine: Make, code: str) -> None:
    """A stack that is too small for its own fault's frame makes a double fault, which is no better off."""
    from trivisor.machine.exits import Shutdown

    m = protected(machine, f"mov ss, ecx\n mov esp, edx\n here: {code}\n hlt")
    grows = code in ("push eax", "call here")
    exit_ = m.run(rcx=DATA, rdx=2 if grows else 0x1FE, rbp=0x1FE)
    if grows:
        assert exit_ == Shutdown(12)
    else:
        at = WINDOW + (m["rsp"] & 0xFFFF)
        assert m.core.linear_rip == 0x9000 + 16 * 12 + 1
        assert (m.memory.read_u32(at), m.memory.read_u32(at + 4)) == (0, m.labels["here"])


def test_a_16_bit_stack_under_32_bit_code(machine: Make) -> None:
    m = protected(
        machine, "mov ss, ecx\n mov esp, 0x12340002\n push ax\n push eax\n pop ebx\n call f\n hlt\n f: ret"
    )
    m.halt(rcx=SMALL_STACK, rax=0x11223344)
    assert (m["rbx"], m["rsp"]) == (0x11223344, 0x12340000)
    assert m.memory.read_u16(WINDOW) == 0x3344
    assert m.memory.read_u32(WINDOW + 0xFFFC) == m.labels["f"] - 1


def test_a_code_segment_with_a_base_and_a_limit(machine: Make) -> None:
    m = protected(
        machine,
        """
        jmp BASED_CODE_SELECTOR:there - CODE_SELECTOR + 0x1000
        there: call f
        mov eax, [esp-4]
        mov edx, cs
        mov ebx, g - CODE_SELECTOR + 0x1000
        call ebx
        jmp far [pointer]
        flat: hlt
        f: ret
        g: inc ecx
        ret
        pointer: dd flat
        dw 0x30
        """,
    )
    m.halt(rcx=0)
    assert (m["rax"], m["rdx"], m["rcx"]) == (m.labels["there"] + 5 - CODE + 0x1000, BASED_CODE, 1)
    assert m.core.rip == m.labels["flat"] + 1


@pytest.mark.parametrize("code", ["jmp ebx", "call ebx", "jmp $+0x8000", "call $+0x8000", "xor ecx, ecx\n jz $+0x8000"])
def test_targets_beyond_the_limit(machine: Make, code: str) -> None:
    m = protected(machine, f"jmp BASED_CODE_SELECTOR:there - CODE_SELECTOR + 0x1000\n there: {code}\n hlt")
    frame = m.fault(rbx=0x3000)
    assert (frame.vector, frame.error) == (13, 0)
    assert m.core.regs[4] == STACK - 16  # nothing was pushed before the frame
    assert CODE <= frame.rip + CODE - 0x1000 < CODE + 0x20


def test_a_loop_that_leaves_its_segment_has_not_counted(machine: Make) -> None:
    m = protected(machine, "jmp BASED_CODE_SELECTOR:0x2ff0")
    m.put("loop $+0x20\n hlt", CODE + 0x1FF0)
    frame = m.fault(rcx=5)
    assert (frame.vector, frame.rip, m["rcx"]) == (13, 0x2FF0, 5)


def test_16_bit_protected_mode(machine: Make) -> None:
    m = protected(
        machine,
        """
        mov ss, ecx
        mov esp, 0x100
        db 0xea
        dd start - CODE_SELECTOR
        dw CODE16_SELECTOR
        bits 16
        start: push ax
        pop bx
        call near_one
        returned: mov ax, DATA_SELECTOR
        mov ds, ax
        mov [0x10], bx
        mov si, 0x10
        lodsw
        db 0x67
        lodsb
        db 0x66, 0xea
        dd flat
        dw 0x30
        near_one: mov bp, sp
        mov dx, [bp]
        ret
        bits 32
        flat: hlt
        """,
    )
    m.halt(rcx=SMALL_STACK, rax=0x4321, rbx=0, rdx=0, rsi=0)
    assert (m["rbx"], m["rsp"]) == (0x4321, 0x100)
    assert m["rdx"] == m.labels["returned"] - CODE
    assert m.memory.read_u16(WINDOW + 0x10) == 0x4321
    assert m["rsi"] == 0x13


def test_interrupt_gates_out_of_16_bit_code(machine: Make) -> None:
    """The handler is 32-bit and flat, and IRET goes back to the 16-bit code with its offset."""
    m = protected(
        machine,
        """
        db 0xea
        dd start - CODE_SELECTOR
        dw CODE16_SELECTOR
        bits 16
        start: int 0x40
        inc bx
        hlt
        bits 32
        handler: mov edx, [esp]
        mov ecx, [esp+4]
        iret
        """,
    )
    m.gate(0x40, "handler")
    m.halt(rbx=0)
    assert (m["rbx"], m["rcx"], m["rdx"]) == (1, CODE16, m.labels["start"] + 2 - CODE)


def test_flat_segments_cost_nothing(machine: Make) -> None:
    """A mode without segments that are not flat is one and the same, whatever the selectors."""
    m = protected(machine, "mov ds, ecx\n mov es, ecx\n hlt")
    assert m.vcpu.mode.segmentation is None
    m.halt(rcx=KERNEL_DS)
    assert m.vcpu.mode.segmentation is None
    m.restart()
    m.core.gdtr_limit = 0x8F
    m.halt(rcx=DATA)
    assert m.vcpu.mode.segmentation is not None
    assert m.vcpu.mode.segmentation.checked == {"DS", "ES"}


def test_invlpg_adds_the_base_and_checks_nothing(machine: Make) -> None:
    """INVLPG of a page by a segment with a base, seen by what the TLB still has (SDM 2A, INVLPG)."""
    m = protected(machine, "mov fs, ecx\n db 0x64\n invlpg [esi]\n hlt")
    seen: list[int] = []
    m.vcpu.invalidate_page = seen.append  # type: ignore[method-assign]
    m.halt(rcx=DATA, rsi=0x5000)
    assert seen == [WINDOW + 0x5000]


def test_a_segment_is_checked_again_when_it_changes(machine: Make) -> None:
    """The same code, with another limit in the same register."""
    m = protected(machine, "again: mov ds, ecx\n here: mov eax, [0x1000]\n hlt")
    m.halt(rcx=KERNEL_DS)
    assert m.fault("again", rcx=DATA).vector == 13
    m.restart()
    m.core.gdtr_limit = 0x8F
    m.memory.write_u64(GDT + DATA, build_segment(WINDOW, 0x1003, 0x4093))
    m.memory.write_u32(WINDOW + 0x1000, 0xABCD)
    m.halt("again", rcx=DATA)
    assert m["rax"] == 0xABCD


def test_segment_state_set_from_outside(machine: Make) -> None:
    m = protected(machine, "mov eax, [0x10]\n hlt")
    state = m.vcpu.state
    state.ds = Segment(DATA, WINDOW, 0x12, 0x4093)
    state.cs = Segment(KERNEL_CS32, CODE, 0xFFFF, 0x409B)
    state.rip = 0
    m.vcpu.state = state
    assert m.vcpu.state.rip == 0
    assert m.core.linear_rip == CODE
    assert m.run() is not None
    frame = m.frame()
    assert (frame.vector, frame.rip) == (13, 0)
    assert m.vcpu.state.tr.selector == TSS_SELECTOR
