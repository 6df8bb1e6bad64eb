"""A case in the making: which registers still have known values, and operands in memory that both sides have.

Only registers with known values take part in addresses.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from iced_x86 import (
    Code,
    Decoder,
    Encoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)

from trivisor.insight.differential import tables
from trivisor.insight.differential.case import (
    CODE_DATA,
    CODE_DATA_SIZE,
    DATA,
    DATA_END,
    DATA_PAGES,
    PAGE,
    READ_ONLY,
    Item,
    lay_out,
)

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterNumber

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
_ATTEMPTS = 12
_LARGEST = 1100
"""Bytes that an instruction without REP may write."""
_FORMS16 = ((RBX, RSI), (RBX, RDI), (RBP, RSI), (RBP, RDI), (RSI, None), (RDI, None), (RBP, None), (RBX, None))
"""Base and index of 16-bit addresses."""
_DISPLACED = (4, 5, 10, 11, 13, 15)
"""Registers that the translator or the encoding treats in a way of their own."""

_info = InstructionInfoFactory()


class Impossible(Exception):
    """What was drawn cannot be had here; draw again."""


class Draft:
    """The items of a case so far, and what is known of the state after them."""

    def __init__(self, random: Random, bits: int, linear: int, gpr: list[int], bases: dict[str, int]) -> None:
        """`linear`: address of the code; `bases`: of the segments that are there, by name."""
        self.random = random
        self.bits = bits
        self.linear = linear
        self.rip = linear - bases["cs"]
        self.bases = {getattr(Register, name.upper()): base for name, base in bases.items()}
        self.width = 64 if bits == 64 else 32
        """Bits of a register."""
        self.mask = (1 << self.width) - 1
        self.registers = tables.R64 if bits == 64 else tables.R32[:8]
        """By number, at the width of addresses."""
        self.items: list[Item] = []
        self.known = dict(enumerate(gpr[: len(self.registers)]))
        """Values of registers by number."""
        self.pokes: list[tuple[int, int]] = []
        self.pinned = {RSP}
        """Registers whose values the case relies on: all of its states have them."""
        self.settled: set[int] = set()
        """Registers that were given a value since the innermost loop began."""
        self.relied: set[int] = set()
        """Registers that the innermost loop relies on from before it."""
        self.nests: list[tuple[int, int]] = []
        """(first item, end) of what must not be jumped into."""
        self.depth = 0
        """Nests that are being made."""
        self.guards: list[int] = []
        """Stack slots with return addresses, which nothing else may write to."""
        self.used_x87 = False
        """The x87's instruction and operand pointers are not the same on both sides: they cannot be stored then."""
        self.skipped_to = 0
        """Items before this one may be jumped over."""
        self._encoder = Encoder(bits)

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` needs to take back all that is added from now on."""
        return (len(self.items), len(self.pokes), dict(self.known), set(self.settled), set(self.relied),
                list(self.nests), self.depth, list(self.guards), self.used_x87, self.skipped_to)  # fmt: skip

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Be as it was at the snapshot."""
        items, pokes, self.known, self.settled, self.relied, *rest = snapshot
        self.nests, self.depth, self.guards, self.used_x87, self.skipped_to = rest
        del self.items[items:], self.pokes[pokes:]

    @property
    def may_store_x87(self) -> bool:
        """Whether an instruction can be had that stores all of the x87's state."""
        return not self.used_x87 and not self.depth

    def value(self, number: int) -> int:
        """The known value of a register, which the case relies on from now on."""
        self.pinned.add(number)
        if number not in self.settled:
            self.relied.add(number)
        return self.known[number]

    # -- items ----------------------------------------------------------------------------------------------

    def append(self, instruction: Instruction, target: int | None = None, *, keep: bool = False) -> None:
        """Add an instruction whose effects are the caller's to note."""
        self.items.append(Item(instruction, target, keep=keep))

    def add(self, instruction: Instruction, target: int | None = None, *, keep: bool = False) -> None:
        """Add an instruction, and note what it does to the known registers."""
        moves = instruction.stack_pointer_increment
        if moves:
            if RSP not in self.known:
                raise Impossible
            self.value(RSP)
        self.skipped_to = max(self.skipped_to, target or 0)
        stack = self.known.get(RSP)
        for used in _info.info(instruction).used_registers():
            if used.access in tables.WRITES:
                self.known.pop(tables.NUMBER.get(RegisterExt.full_register(used.register), -1), None)
                self.known.pop(tables.NUMBER.get(used.register, -1), None)
        if moves and stack is not None and instruction.mnemonic not in (Mnemonic.LEAVE, Mnemonic.ENTER):
            popped = instruction.op_count and instruction.op0_kind == OpKind.REGISTER and moves > 0
            if not popped or tables.NUMBER.get(instruction.op0_register) != RSP:
                self.known[RSP] = (stack + moves) & self.mask
                if self.guards and self.known[RSP] + self.bases[Register.SS] > self.guards[-1]:
                    raise Impossible
        self.used_x87 |= not tables.X87.isdisjoint(instruction.cpuid_features())
        decorated = target is None and self.random.random() < 0.08
        self.items.append(
            Item(instruction, target, self._idle_prefixes(instruction) if decorated else b"", keep)
        )

    def _idle_prefixes(self, instruction: Instruction) -> bytes:
        """Prefixes that change nothing about the instruction."""
        random = self.random
        choice = tables.IDLE_PREFIXES[self.bits]
        if self.bits == 64 and instruction.flow_control != FlowControl.NEXT:
            choice = tuple(byte for byte in choice if byte != 0x66)  # on AMD's processors a branch has 16 bits with it
        prefix = bytes(random.choice(choice) for _ in range(random.choice((1, 1, 2))))
        at = lay_out(self.items, self.rip, self.bits)[1][-1]
        self._encoder.encode(instruction, at + len(prefix))
        code = prefix + self._encoder.take_buffer()
        found = Decoder(self.bits, code, ip=at).decode()
        plain = Decoder(self.bits, code[len(prefix) :], ip=at + len(prefix)).decode()
        return prefix if found.len == len(code) and found == plain else b""

    def ensure(self, number: int, value: int) -> int:
        """Have a register hold a value, by a MOV if need be; returns the value."""
        value &= self.mask
        if self.known.get(number) == value:
            return self.value(number)
        register = self.registers[number]
        if self.bits != 64:
            instruction = Instruction.create_reg_u32(Code.MOV_RM32_IMM32, register, value)
        elif fits(value) and self.random.random() < 0.7:
            signed = value - (1 << 64) if value >> 63 else value
            instruction = Instruction.create_reg_i64(Code.MOV_RM64_IMM32, register, signed)
        else:
            instruction = Instruction.create_reg_u64(Code.MOV_R64_IMM64, register, value)
        self.append(instruction, keep=True)
        self.known[number] = value
        self.settled.add(number)
        return value

    def writes(self, start: int, number: int) -> bool:
        """Whether an item from number `start` on may write to a general register."""
        return any(
            used.access in tables.WRITES
            and tables.NUMBER.get(RegisterExt.full_register(used.register)) == number
            for item in self.items[start:]
            for used in _info.info(item.instruction).used_registers()
        )

    # -- places in memory -----------------------------------------------------------------------------------

    def place(self, size: int) -> int:
        """A linear address for an operand of `size` bytes, or somewhat more."""
        place = self._any_place(size)
        if any(-_LARGEST < place - guard < 8 for guard in self.guards):
            raise Impossible
        return place

    def _any_place(self, size: int) -> int:
        random = self.random
        kind = random.random()
        if kind < 0.45:
            align = max(16, min(64, size))
            return DATA + random.randrange(0, 3 * PAGE - size, align)
        if kind < 0.7:
            return DATA + random.randrange(0, 2 * PAGE)
        if kind < 0.88:
            return DATA + random.choice((1, 2)) * PAGE - random.randrange(0, size + 2)
        if self.bits == 16:
            return DATA + random.randrange(-size, DATA_PAGES * PAGE)
        if kind < 0.92:
            return READ_ONLY + random.randrange(-size, PAGE)
        if kind < 0.98:
            code_page = self.linear & ~0xFFF
            return code_page + CODE_DATA + random.randrange(0, CODE_DATA_SIZE - min(size, 512), 4)
        if kind < 0.995 or self.bits != 64:
            before, after = DATA - random.randrange(0, size + 1), DATA_END - random.randrange(0, size + 4)
            return random.choice((before, after))
        return 1 << 47 | random.getrandbits(40)

    def override(self) -> RegisterNumber:
        """A segment override now and then."""
        random = self.random
        kind = random.random()
        choice: tuple[RegisterNumber, ...]
        if kind < 0.2:
            choice = Register.FS, Register.GS
        elif kind < 0.25:
            choice = Register.DS, Register.ES, Register.SS, Register.CS
        else:
            return Register.NONE
        return random.choice([segment for segment in choice if segment in self.bases] or [Register.NONE])

    def offset(self, linear: int, segment: RegisterNumber) -> int:
        """The offset of a linear address in a segment.

        With a base it is canonical here: AMD's processors want that of the offset too, Intel's of the linear
        address alone.
        """
        base = self.bases[segment]
        offset = linear - base & self.mask
        if base and self.bits == 64 and 1 << 47 <= offset < (1 << 64) - (1 << 47):
            raise Impossible
        return offset

    def point(self, instruction: Instruction, linear: int) -> None:
        """Have the memory operand lie at `linear`, by some segment and addressing form."""
        random = self.random
        segment = self.override()
        instruction.segment_prefix = segment
        for _ in range(_ATTEMPTS):
            kind = random.random()
            if kind < 0.12 and self.bits == 64:
                done = self._relative(instruction, self.offset(linear, segment or Register.DS))
            elif kind < 0.2:
                done = self._absolute(instruction, self.offset(linear, segment or Register.DS))
            else:
                done = self._based(instruction, linear, segment, self._address_bits())
            if done:
                return
        raise Impossible

    def _address_bits(self) -> int:
        """The mode's own address size, or the other."""
        if self.random.random() < 0.85:
            return self.bits
        return 16 if self.bits == 32 else 32

    def _relative(self, instruction: Instruction, offset: int) -> bool:
        wide = self.random.random() < 0.8
        if abs(offset - self.rip) > 0x7FFF0000 or (not wide and (self.rip >> 32 or offset >> 32)):
            return False
        instruction.memory_base = Register.RIP if wide else Register.EIP
        instruction.memory_index = Register.NONE
        instruction.memory_displacement = offset
        instruction.memory_displ_size = 8 if wide else 4
        return True

    def _absolute(self, instruction: Instruction, offset: int) -> bool:
        if (self.bits == 64 and not fits(offset)) or (self.bits == 16 and offset >> 16):
            return False
        instruction.memory_base = instruction.memory_index = Register.NONE
        instruction.memory_displacement = offset
        instruction.memory_displ_size = self.bits // 8
        return True

    def _based(self, instruction: Instruction, linear: int, segment: RegisterNumber, bits: int) -> bool:
        """Base and index registers of `bits` bits, as far as they are known."""
        random = self.random
        base: int | None
        index: int | None
        if bits == 16:
            base, index = random.choice(_FORMS16)
            names = tables.R16
        else:
            names = self.registers if bits == self.bits else tables.R32
            candidates = list(self.known)
            if random.random() < 0.4:
                candidates = [n for n in _DISPLACED if n in self.known] or candidates
            if not candidates:
                return False
            base = random.choice(candidates) if random.random() < 0.92 else None
            index = random.choice(candidates) if base is None or random.random() < 0.45 else None
            if index == RSP:
                index = None
        if (base is None and index is None) or any(n is not None and n not in self.known for n in (base, index)):
            return False
        if segment == Register.NONE:
            segment = Register.SS if base in (RSP, RBP) else Register.DS
        offset = self.offset(linear, segment)
        if offset >> bits:
            return False
        scale = random.choice((1, 2, 4, 8)) if index is not None and bits != 16 else 1
        total = (0 if base is None else self.known[base]) + (0 if index is None else self.known[index] * scale)
        displacement = (offset - total) & ((1 << bits) - 1)
        if bits == 64 and not fits(displacement):
            return False
        for number in (base, index):
            if number is not None:
                self.value(number)
        instruction.memory_base = Register.NONE if base is None else names[base]
        instruction.memory_index = Register.NONE if index is None else names[index]
        instruction.memory_index_scale = scale
        instruction.memory_displacement = displacement
        instruction.memory_displ_size = self._displacement_size(base, displacement, bits)
        return True

    def _displacement_size(self, base: int | None, displacement: int, bits: int) -> int:
        if not displacement and base not in (None, RBP, 13):
            return 0
        if bits == 16 and base is None:
            return 2
        short = displacement < 0x80 or displacement >= (1 << bits) - 0x80
        return 1 if short and base is not None and self.random.random() < 0.8 else bits // 8


def fits(value: int) -> bool:
    """Whether a 64-bit value is a sign-extended one of 32 bits."""
    return value < 1 << 31 or value >= (1 << 64) - (1 << 31)
