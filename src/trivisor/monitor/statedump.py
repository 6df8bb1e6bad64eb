"""The processor's state in text, for the report of a crash."""

from __future__ import annotations

from collections.abc import Iterator

from trivisor.machine.memory import GuestMemory
from trivisor.machine.state import GPR_NAMES, CpuState
from trivisor.monitor.linear import read_linear

_FLAGS = (
    (0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"), (11, "OF"),
    (14, "NT"), (16, "RF"), (17, "VM"), (18, "AC"), (21, "ID"),
)  # fmt: skip
_LINE_LENGTH = 16
_LINES_OF_CODE = 6


def dump_state(state: CpuState, memory: GuestMemory, block: tuple[int, int] | None = None) -> str:
    """Registers, control registers, segments, the last block (address, length) and the code at rip, as lines."""
    lines = [*_general(state), *_control(state), *_segments(state), *_code(state, memory)]
    if block is not None:
        lines += _block(state, memory, *block)
    return "\n".join(lines)


def _general(state: CpuState) -> Iterator[str]:
    for row in range(0, 16, 4):
        yield "  ".join(f"{GPR_NAMES[i]:>3}={state.gpr[i]:016x}" for i in range(row, row + 4))
    flags = " ".join(name for bit, name in _FLAGS if state.rflags >> bit & 1)
    halted = "  halted" if state.halted else ""
    yield f"rip={state.rip:016x}  rflags={state.rflags:08x} [{flags}]  cpl={state.cs.selector & 3}{halted}"


def _control(state: CpuState) -> Iterator[str]:
    yield f"cr0={state.cr0:016x}  cr2={state.cr2:016x}  cr3={state.cr3:016x}"
    yield f"cr4={state.cr4:016x}  cr8={state.cr8:016x}  efer={state.efer:08x}  xcr0={state.xcr0:x}"


def _segments(state: CpuState) -> Iterator[str]:
    for name, segment in {**state.segments(), "tr": state.tr, "ldt": state.ldtr}.items():
        yield (
            f"{name:>3}={segment.selector:04x}  base={segment.base:016x}  limit={segment.limit:08x}  "
            f"attributes={segment.attributes:04x}"
        )
    for name, table in (("gdt", state.gdtr), ("idt", state.idtr)):
        yield f"{name}       base={table.base:016x}  limit={table.limit:04x}"


def code_bits(state: CpuState) -> int:
    """The operating width of the code segment: 16, 32 or 64 (Intel SDM 3A 3.4.5)."""
    if state.efer & 1 << 10 and state.cs.attributes & 1 << 13:
        return 64
    return 32 if state.cs.attributes & 1 << 14 else 16


def _code(state: CpuState, memory: GuestMemory) -> Iterator[str]:
    address = state.rip if code_bits(state) == 64 else state.cs.base + state.rip & 0xFFFFFFFF
    data = read_linear(memory, state, address, _LINE_LENGTH * _LINES_OF_CODE)
    if not data:
        yield f"code at {address:#x}: not mapped"
        return
    yield f"code at {address:#x}: {data[:_LINE_LENGTH].hex(' ')}"
    yield from _disassembly(data, code_bits(state), address)


def _block(state: CpuState, memory: GuestMemory, address: int, length: int) -> Iterator[str]:
    """The run of code that led to rip."""
    data = read_linear(memory, state, address, length)
    yield f"last block at {address:#x}, {length} bytes:"
    yield from _disassembly(data, code_bits(state), address, length)


def _disassembly(data: bytes, bits: int, address: int, most: int = _LINES_OF_CODE) -> Iterator[str]:
    from iced_x86 import Decoder, Formatter, FormatterSyntax

    formatter = Formatter(FormatterSyntax.NASM)
    decoder = Decoder(bits, data, ip=address)
    for _ in range(most):
        if not decoder.can_decode:
            return
        instruction = decoder.decode()
        if instruction.is_invalid:
            yield f"  {instruction.ip:016x}  (bad)"
            return
        yield f"  {instruction.ip:016x}  {formatter.format(instruction)}"
