"""MMIO of every size and form against a recording device, port I/O, and accesses across pages of every kind."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.unit.translation.engine.guest import DATA, DEVICE, STACK, TSS, Make, Recorder
from trivisor.machine.exits import MmioRead, MmioWrite, PortIn, PortOut

VALUE = 0x1122334455667788
A3A0, A7A0 = 0xA3A2A1A0, 0xA7A6A5A4A3A2A1A0


def read(offset: int, size: int) -> tuple[str, int, int, int]:
    return "read", offset, size, int.from_bytes(bytes(0xA0 + (offset + i) % 64 for i in range(size)), "little")


def write(offset: int, size: int, value: int) -> tuple[str, int, int, int]:
    return "write", offset, size, value & (1 << 8 * size) - 1


_FORMS: list[tuple[str, list[tuple[str, int, int, int]], dict[str, int]]] = [
    ("mov al, [rbx]", [read(0, 1)], {"rax": VALUE & ~0xFF | 0xA0}),
    ("mov ax, [rbx+2]", [read(2, 2)], {"rax": VALUE & ~0xFFFF | 0xA3A2}),
    ("mov eax, [rbx]", [read(0, 4)], {"rax": A3A0}),
    ("mov rax, [rbx]", [read(0, 8)], {"rax": A7A0}),
    ("mov r8d, [rbx]", [read(0, 4)], {"r8": A3A0}),
    ("mov r10d, [rbx]", [read(0, 4)], {"r10": A3A0}),
    ("mov r15d, [rbx+4]", [read(4, 4)], {"r15": 0xA7A6A5A4}),
    ("movzx eax, byte [rbx+1]", [read(1, 1)], {"rax": 0xA1}),
    ("movsx rax, word [rbx]", [read(0, 2)], {"rax": 0xFFFFFFFFFFFFA1A0}),
    ("movsxd rax, dword [rbx]", [read(0, 4)], {"rax": 0xFFFFFFFFA3A2A1A0}),
    ("mov [rbx], al", [write(0, 1, VALUE)], {}),
    ("mov [rbx+1], ah", [write(1, 1, VALUE >> 8)], {}),
    ("mov [rbx], ax", [write(0, 2, VALUE)], {}),
    ("mov [rbx], eax", [write(0, 4, VALUE)], {}),
    ("mov [rbx+8], rax", [write(8, 8, VALUE)], {}),
    ("mov byte [rbx], 0x12", [write(0, 1, 0x12)], {}),
    ("mov word [rbx], 0x1234", [write(0, 2, 0x1234)], {}),
    ("mov dword [rbx], 0x12345678", [write(0, 4, 0x12345678)], {}),
    ("mov qword [rbx], -2", [write(0, 8, -2)], {}),
    ("mov [rbx], r11d", [write(0, 4, 0xBBBB)], {}),
    ("mov [rbx], esp", [write(0, 4, STACK)], {}),
    ("movnti [rbx], eax", [write(0, 4, VALUE)], {}),
    ("add [rbx], ecx", [read(0, 4), write(0, 4, A3A0 + 3)], {}),
    ("add ecx, [rbx]", [read(0, 4)], {"rcx": A3A0 + 3}),
    ("or byte [rbx+4], 0x0f", [read(4, 1), write(4, 1, 0xAF)], {}),
    ("not qword [rbx]", [read(0, 8), write(0, 8, ~A7A0)], {}),
    ("shl dword [rbx], 4", [read(0, 4), write(0, 4, A3A0 << 4)], {}),
    ("lock inc dword [rbx]", [read(0, 4), write(0, 4, A3A0 + 1)], {}),
    ("xchg [rbx], ecx", [read(0, 4), write(0, 4, 3)], {"rcx": A3A0}),
    ("xadd [rbx], ecx", [read(0, 4), write(0, 4, A3A0 + 3)], {"rcx": A3A0}),
    ("bts dword [rbx], 0", [read(0, 4), write(0, 4, A3A0 | 1)], {}),
    ("bt dword [rbx], 5", [read(0, 4)], {}),
    ("cmp byte [rbx], 0xa0", [read(0, 1)], {}),
    ("test dword [rbx+4], 1", [read(4, 4)], {}),
    ("setc [rbx]", [write(0, 1, 0)], {}),
    ("push qword [rbx]", [read(0, 8)], {"rsp": STACK - 8}),
    ("imul eax, [rbx], 2", [read(0, 4)], {"rax": A3A0 * 2 & 0xFFFFFFFF}),
    ("cmovz eax, [rbx]", [read(0, 4)], {}),
    ("lodsb", [read(0, 1)], {"rsi": DEVICE + 1}),
    ("lodsd", [read(0, 4)], {"rsi": DEVICE + 4}),
    ("stosw", [write(0, 2, VALUE)], {"rdi": DEVICE + 2}),
    ("scasb", [read(0, 1)], {"rdi": DEVICE + 1}),
    ("movups xmm0, [rbx]", [read(0, 8), read(8, 8)], {}),
    ("movd [rbx], xmm1", [write(0, 4, 0)], {}),
    ("movq xmm0, [rbx]", [read(0, 8)], {}),
    ("fild dword [rbx]", [read(0, 4)], {}),
    ("fnstcw [rbx]", [write(0, 2, 0x37F)], {}),
    ("mov ecx, 3\n rep stosd", [write(4 * i, 4, VALUE) for i in range(3)], {"rdi": DEVICE + 12, "rcx": 0}),
    ("mov edi, DATA\n mov ecx, 4\n rep movsb", [read(i, 1) for i in range(4)], {"rdi": DATA + 4, "rcx": 0}),
    ("mov esi, DATA\n mov ecx, 2\n rep movsw", [write(0, 2, 0), write(2, 2, 0)], {"rsi": DATA + 4, "rcx": 0}),
    ("movsd", [read(0, 4), write(0, 4, A3A0)], {"rsi": DEVICE + 4, "rdi": DEVICE + 4}),
    ("cmpsb", [read(0, 1), read(0, 1)], {}),
    ("mov eax, [rbx+1]", [read(1, 4)], {"rax": 0xA4A3A2A1}),
    ("mov ax, [rbx+0x31f]", [read(0x31F, 2)], {}),
    ("mov eax, 0xa3a2a1a0\n lock cmpxchg [rbx], ecx", [read(0, 4), write(0, 4, 3)], {}),
    ("std\n lodsw\n cld", [read(0, 2)], {"rsi": DEVICE - 2}),
]


def test_every_form_and_size(machine: Make) -> None:
    m = machine("hlt")
    device = m.record()
    for code, log, registers in _FORMS:
        for stepping in (False, True):
            device.log.clear()
            m.restart()
            m.put(f"{code}\n hlt", m.origin)
            m.memory.write(DATA, bytes(64))
            m.set(rax=VALUE, rbx=DEVICE, rcx=3, rsi=DEVICE, rdi=DEVICE, r11=0xBBBB)
            if stepping:
                for _ in range(12):
                    if m.memory.read_u8(m.core.rip) == 0xF4:
                        break
                    m.step()
            else:
                m.halt()
            assert device.log == log, code
            for name, value in registers.items():
                assert m[name] == value, (code, name, hex(m[name]))


def test_subscribers_see_device_accesses(machine: Make) -> None:
    m = machine("mov eax, [rbx]\n mov [rbx+4], eax\n mov al, [rbx+1]\n hlt")
    m.record()
    seen: list[object] = []
    m.vcpu.observed[MmioRead] = [seen.append]
    m.vcpu.observed[MmioWrite] = [seen.append]
    m.halt(rbx=DEVICE)
    assert seen == [MmioRead(DEVICE, 4, A3A0), MmioWrite(DEVICE + 4, 4, A3A0), MmioRead(DEVICE + 1, 1, 0xA1)]


def test_what_nobody_answers_reads_as_ones(machine: Make) -> None:
    m = machine("mov rax, [rbx]\n mov [rbx], rax\n in eax, dx\n mov ecx, eax\n out dx, eax\n hlt")
    m.halt(rbx=DEVICE, rdx=0x5000)
    assert m["rcx"] == 0xFFFFFFFF


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_accesses_across_pages(machine: Make, size: int, apart: bool) -> None:
    """RAM to RAM that lies elsewhere, RAM to a device, a device to RAM, a device to itself."""
    register = {2: "ax", 4: "eax", 8: "rax", 16: "xmm0"}[size]
    move = "movdqu" if size == 16 else "mov"
    m = machine(f"{move} {register}, [rbx]\n {move} [rcx], {register}\n hlt\n rmw: add [rbx], {'eax' if size == 16 else register}\n hlt")
    device = m.record()
    linear = 0x10_0000_0000
    kinds = {"ram": (0x500000, 0x700000), "other": (0x600000, 0x504000)}
    if not apart:
        kinds = {name: (low, low + 0x1000) for name, (low, _) in kinds.items()}
    for first in ("ram", "device"):
        for second in ("ram", "device"):
            low = kinds["ram"][0] if first == "ram" else DEVICE
            high = kinds["ram"][1] if second == "ram" else DEVICE + 0x1000
            m.map(linear, low)
            m.map(linear + 0x1000, high)
            m.map(linear + 0x2000, kinds["other"][0])
            m.map(linear + 0x3000, kinds["other"][1])
            m.flush()
            for offset in range(1, size):
                data = bytes(range(1, size + 1))
                expected = bytearray(data)
                if first == "ram":
                    m.memory.write(low + 0x1000 - offset, data[:offset])
                else:
                    expected[:offset] = bytes(0xA0 + (0x1000 - offset + i) % 64 for i in range(offset))
                if second == "ram":
                    m.memory.write(high, data[offset:])
                else:
                    expected[offset:] = bytes(0xA0 + i for i in range(size - offset))
                m.halt(m.origin, rbx=linear + 0x1000 - offset, rcx=linear + 0x3000 - offset)
                there = kinds["other"]
                got = m.memory.read(there[0] + 0x1000 - offset, offset) + m.memory.read(there[1], size - offset)
                assert got == expected, (first, second, offset)
                if first == second == "ram" and size < 16:
                    m.halt("rmw", rbx=linear + 0x1000 - offset, rax=1)
                    got = m.memory.read(low + 0x1000 - offset, offset) + m.memory.read(high, size - offset)
                    assert int.from_bytes(got, "little") == int.from_bytes(data, "little") + 1
                elif size < 16:
                    device.log.clear()
                    m.halt("rmw", rbx=linear + 0x1000 - offset, rax=1)
                    assert any(kind == "write" for kind, *_ in device.log)


def test_a_string_that_runs_from_ram_into_a_device(machine: Make) -> None:
    m = machine("rep movsb\n hlt")
    linear = 0x10_0000_0000
    device = m.record()
    m.map(linear, 0x500000)
    m.map(linear + 0x1000, DEVICE)
    m.memory.write(DATA, bytes(range(32)))
    m.halt(rsi=DATA, rdi=linear + 0xFF8, rcx=32)
    assert m.memory.read(0x500FF8, 8) == bytes(range(8))
    assert device.log == [write(i, 1, 8 + i) for i in range(24)]


# -- ports --------------------------------------------------------------------------------------------------


class _Ports(Recorder):
    """Sixteen ports."""


def test_port_input_and_output_of_every_form(machine: Make) -> None:
    m = machine(
        """
        mov edx, 0x500
        in al, dx
        mov [DATA], al
        in ax, dx
        mov [DATA+2], ax
        in eax, dx
        mov [DATA+4], eax
        mov eax, 0x12345678
        out dx, al
        out dx, ax
        out dx, eax
        in al, 0xe8
        out 0xe8, ax
        mov edi, DATA+16
        mov ecx, 3
        rep insw
        mov esi, DATA+16
        mov ecx, 2
        rep outsd
        std
        outsb
        cld
        insd
        hlt
        """
    )
    ports, low = _Ports(), _Ports()
    m.board.ports.attach(0x500, 16, ports)
    m.board.ports.attach(0xE8, 4, low)
    m.halt()
    assert ports.log == [
        read(0, 1), read(0, 2), read(0, 4), write(0, 1, 0x78), write(0, 2, 0x5678), write(0, 4, 0x12345678),
        read(0, 2), read(0, 2), read(0, 2), write(0, 4, 0xA1A0A1A0), write(0, 4, 0xA1A0), write(0, 1, 0), read(0, 4),
    ]  # fmt: skip
    assert low.log == [read(0, 1), write(0, 2, 0x56A0)]
    assert m.memory.read(DATA, 8) == bytes.fromhex("a000a0a1a0a1a2a3")
    assert (m["rsi"], m["rdi"]) == (DATA + 23, DATA + 26)


def test_port_counts_are_exact(machine: Make) -> None:
    m = machine("mov ecx, 1000\n top: out 0x80, al\n in al, 0x80\n out 0x80, al\n dec ecx\n jnz top\n hlt")
    seen: Counter[type] = Counter()
    for kind in (PortIn, PortOut):
        m.vcpu.observed[kind] = [lambda exit_: seen.update([type(exit_)])]
    m.halt()
    counts = m.vcpu.statistics()["instructions done by Python"]
    assert (counts["out"], counts["in"]) == (2000, 1000)
    assert (seen[PortOut], seen[PortIn]) == (2000, 1000)


def test_statistics_add_up(machine: Make) -> None:
    m = machine("mov ecx, 50\n top: cpuid\n mov ecx, r8d\n dec r8d\n jnz top\n mov eax, [DATA]\n hlt")
    m.halt(r8=50)
    statistics = m.vcpu.statistics()
    assert statistics["instructions done by Python"] == {"cpuid": 50, "hlt": 1}
    assert statistics["exits"]["call_out"] == 51
    assert statistics["native helpers"]["tlb_miss"] == 1
    assert 0 < statistics["translation"]["instructions"] < 20
    assert statistics["translation"]["blocks"] <= 5
    assert all(value >= 0 for value in statistics["seconds"].values())


def test_the_permission_bitmap_in_ring_3(machine: Make) -> None:
    m = machine("out 0x80, al\n here: out 0x81, al\n ud2", cpl=3)
    m.memory.write_u16(TSS + 102, 0x68)
    bitmap = bytearray(b"\xff" * 0x30)
    bitmap[0x10] = 0xFE
    m.memory.write(TSS + 0x68, bytes(bitmap))
    state = m.initial_state(3)
    state.tr.limit = 0x68 + 0x2F
    m.vcpu.state = state
    frame = m.fault()
    assert (frame.vector, frame.error, frame.rip) == (13, 0, m.labels["here"])
