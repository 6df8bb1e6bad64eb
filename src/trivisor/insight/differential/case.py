"""What a comparison is made of: where things lie, what goes in, what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from iced_x86 import Code, Encoder, Instruction, OpKind

if TYPE_CHECKING:
    from trivisor.insight.differential.segments import Descriptor

PAGE = 4096
DATA = 0x20000000
DATA_PAGES = 4
"""The last one is read-only; the pages before and after are not mapped."""
READ_ONLY = DATA + (DATA_PAGES - 1) * PAGE
DATA_END = DATA + DATA_PAGES * PAGE
CODE_NEAR = 0x30000000
CODE_FAR = 0x600000000000
CODE_PAGES = 2
CODE_DATA = 0x800
"""Offset in the first code page of bytes that serve as data; `CODE_DATA_SIZE` of them."""
CODE_DATA_SIZE = 0x400
ROUNDS = 8
"""States that a case is run from."""
MANNERS = ("", "", "", "tuned", "tuned", "tuned", "stepped", "on a device", "polled")
"""As it is; as hot code is translated; one instruction at a time; with a data page that is a device's; with an
interrupt check that fires.
"""
DEVICE_PAGE = 1
"""The data page that may be a device's, one that remembers what is written to it like memory."""
FPU_SIZE = 832
"""x87, SSE and AVX state in XSAVE's standard format (Intel SDM 1, 13.4)."""

_PLACEHOLDER_DISTANCE = 0x10


@dataclass(slots=True)
class Item:
    """One instruction.

    A branch leads to the item of number `target` (one past the last is the
    end), as does an instruction that makes the address for an indirect one.
    """

    instruction: Instruction
    target: int | None = None
    prefix: bytes = b""
    keep: bool = False
    """The next one cannot do without it."""
    group: int = 0
    """Not 0: all items with this number make sense only together."""


@dataclass(slots=True)
class State:
    """What one run of the code starts from."""

    gpr: list[int]
    """Sixteen; of the first eight only the low half, in 32-bit code."""
    rflags: int
    fpu: bytes
    data: bytes
    code_data: bytes


@dataclass(slots=True)
class Case:
    """The code, and the states that it is run from, one after the other."""

    bits: int
    """Of the code: 16, 32 or 64."""
    items: list[Item]
    states: list[State]
    """They agree in the registers that addresses depend on.  All but the first find the code translated."""
    segments: dict[str, Descriptor]
    """What the segment registers hold in 16- and 32-bit code; empty in 64-bit code."""
    fs_base: int
    gs_base: int
    """In 64-bit code."""
    code_page: int
    code_offset: int
    user: bool
    manner: str = ""
    """How the translated side runs: see `MANNERS`."""
    pokes: list[tuple[int, int]] = field(default_factory=list)
    """(address in the data pages, item number): the item's address is stored there beforehand."""

    @property
    def rip(self) -> int:
        """Of the first instruction: an offset in the code segment."""
        return self.code_page + self.code_offset - (self.segments["cs"].base if self.segments else 0)

    def layout(self) -> Layout:
        """The code's bytes and the address of every item and of the end."""
        return Layout(*lay_out(self.items, self.rip, self.bits))

    def memory(self, state: State, layout: Layout) -> bytes:
        """The data pages beforehand."""
        if not self.pokes:
            return state.data
        size = self.bits // 8
        out = bytearray(state.data)
        for at, number in self.pokes:
            out[at - DATA : at - DATA + size] = layout.addresses[number].to_bytes(size, "little")
        return bytes(out)


class Layout(NamedTuple):
    """The code of a case as bytes."""

    code: bytes
    addresses: list[int]
    """Of every item and of the end."""


def lay_out(items: Sequence[Item], rip: int, bits: int) -> tuple[bytes, list[int]]:
    """Encode items one after the other from `rip`; raises ValueError for what cannot be encoded there."""
    encoder = Encoder(bits)
    addresses = [rip]
    code = bytearray()
    for item in items:
        at = addresses[-1]
        if item.target is not None:
            _aim(item.instruction, at + _PLACEHOLDER_DISTANCE)
        encoder.encode(item.instruction, at + len(item.prefix))
        code += item.prefix + encoder.take_buffer()
        addresses.append(rip + len(code))
    if any(item.target is not None for item in items):
        code.clear()
        for item, at in zip(items, addresses, strict=False):
            if item.target is not None:
                _aim(item.instruction, addresses[min(item.target, len(items))])
            encoder.encode(item.instruction, at + len(item.prefix))
            code += item.prefix + encoder.take_buffer()
    return bytes(code), addresses


def _aim(instruction: Instruction, address: int) -> None:
    """Have a branch, or what makes the address for an indirect one, name `address`."""
    code = instruction.code
    if code == Code.LEA_R64_M:
        instruction.memory_displacement = address
    elif code == Code.MOV_R32_IMM32:
        instruction.immediate32 = address
    elif code == Code.PUSHQ_IMM32:
        instruction.immediate32to64 = address
    elif code == Code.PUSHD_IMM32:
        instruction.immediate32 = address
    elif code == Code.PUSH_IMM16:
        instruction.immediate16 = address & 0xFFFF
    elif instruction.op0_kind == OpKind.NEAR_BRANCH16:
        instruction.near_branch16 = address & 0xFFFF
    elif code == Code.MOV_RM32_IMM32:
        # The immediate of a MOV, after two bytes with REX and one without.
        instruction.memory_displacement = address + (2 if instruction.memory_displ_size == 8 else 1)
    elif instruction.op0_kind == OpKind.NEAR_BRANCH32:
        instruction.near_branch32 = address
    else:
        instruction.near_branch64 = address


@dataclass(slots=True)
class Result:
    """The state after.  `vector` is -1 when the code ran to its end."""

    gpr: list[int]
    rip: int
    rflags: int
    fpu: bytes
    data: bytes
    code_data: bytes
    vector: int = -1
    error: int = 0
    cr2: int = 0
    selectors: tuple[int, ...] = ()
    """ES, SS, DS, FS and GS, after 16- and 32-bit code."""


class Skipped(Exception):
    """The engine does not have the instruction (its text is the argument)."""


class Endless(Exception):
    """The code does not come to an end on the host."""
