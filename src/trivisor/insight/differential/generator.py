"""Random cases: sequences of instructions whose memory operands lie where both sides have memory.

The generator follows which general registers still have their known initial
value; only those take part in addresses.
"""

from __future__ import annotations

from random import Random

from iced_x86 import (
    Code,
    CpuidFeature,
    Decoder,
    Encoder,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpCodeOperandKind,
    OpKind,
    Register,
    RegisterExt,
)

from trivisor.insight.differential.case import (
    CODE_DATA,
    CODE_DATA_SIZE,
    CODE_FAR,
    CODE_NEAR,
    DATA,
    DATA_END,
    DATA_PAGES,
    PAGE,
    READ_ONLY,
    Case,
    Item,
    lay_out,
)
from trivisor.insight.differential.catalogue import SCALAR, VECTOR, X87, catalogue
from trivisor.insight.differential.values import fpu_image, integer, pool_slice
from trivisor.x86.iced_types import CodeNumber, OpKindNumber, RegisterNumber

MASK64 = (1 << 64) - 1
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)

_NAMES8 = "AL CL DL BL SPL BPL SIL DIL R8L R9L R10L R11L R12L R13L R14L R15L AH CH DH BH".split()
_NAMES16 = "AX CX DX BX SP BP SI DI R8W R9W R10W R11W R12W R13W R14W R15W".split()
_NAMES32 = "EAX ECX EDX EBX ESP EBP ESI EDI R8D R9D R10D R11D R12D R13D R14D R15D".split()
_NAMES64 = "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15".split()


def _registers(names: list[str]) -> list[RegisterNumber]:
    return [getattr(Register, name) for name in names]


_R8, _R16, _R32, _R64 = map(_registers, (_NAMES8, _NAMES16, _NAMES32, _NAMES64))
_XMM = _registers([f"XMM{i}" for i in range(16)])
_YMM = _registers([f"YMM{i}" for i in range(16)])
_MM = _registers([f"MM{i}" for i in range(8)])
_ST = _registers([f"ST{i}" for i in range(8)])
_NUMBER = {register: i % 16 for registers in (_R16, _R32, _R64) for i, register in enumerate(registers)}

_K = OpCodeOperandKind
_FILES: dict[int, list[RegisterNumber]] = {}
_MEMORY_TOO: set[int] = set()
for _prefix, _file in (("R8", _R8), ("R16", _R16), ("R32", _R32), ("R64", _R64), ("XMM", _XMM), ("YMM", _YMM),
                       ("MM", _MM)):  # fmt: skip
    for _suffix in ("OR_MEM", "REG", "RM", "OPCODE", "VVVV", "IS4", "IS5"):
        _kind = getattr(_K, f"{_prefix}_{_suffix}", None)
        if _kind is not None:
            _FILES[_kind] = _file
            if _suffix == "OR_MEM":
                _MEMORY_TOO.add(_kind)
_FIXED: dict[int, RegisterNumber] = {
    _K.AL: Register.AL, _K.CL: Register.CL, _K.AX: Register.AX, _K.DX: Register.DX, _K.EAX: Register.EAX,
    _K.RAX: Register.RAX, _K.ST0: Register.ST0, _K.FS: Register.FS, _K.GS: Register.GS,
}  # fmt: skip
_IMMEDIATES: dict[int, tuple[OpKindNumber, int]] = {
    _K.IMM8: (OpKind.IMMEDIATE8, 8), _K.IMM8SEX16: (OpKind.IMMEDIATE8TO16, 8),
    _K.IMM8SEX32: (OpKind.IMMEDIATE8TO32, 8), _K.IMM8SEX64: (OpKind.IMMEDIATE8TO64, 8),
    _K.IMM16: (OpKind.IMMEDIATE16, 16), _K.IMM32: (OpKind.IMMEDIATE32, 32),
    _K.IMM32SEX64: (OpKind.IMMEDIATE32TO64, 32), _K.IMM64: (OpKind.IMMEDIATE64, 64),
}  # fmt: skip
_QUADWORD_INDEX = {Mnemonic.VPGATHERQD, Mnemonic.VPGATHERQQ, Mnemonic.VGATHERQPS, Mnemonic.VGATHERQPD}
_VSIB: dict[int, list[RegisterNumber]] = {
    _K.MEM_VSIB32X: _XMM, _K.MEM_VSIB64X: _XMM, _K.MEM_VSIB32Y: _YMM, _K.MEM_VSIB64Y: _YMM,
}  # fmt: skip
_STRING: dict[int, tuple[int, OpKindNumber, OpKindNumber]] = {
    _K.SEG_RSI: (RSI, OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_SEG_ESI),
    _K.ES_RDI: (RDI, OpKind.MEMORY_ESRDI, OpKind.MEMORY_ESEDI),
    _K.SEG_RDI: (RDI, OpKind.MEMORY_SEG_RDI, OpKind.MEMORY_SEG_EDI),
}
_STRING_KINDS = {kind for _, *kinds in _STRING.values() for kind in kinds}
_BIT_STRING = {Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC}
_SAVES_X87 = {getattr(Mnemonic, n) for n in ("FNSTENV", "FNSAVE", "FXSAVE", "FXSAVE64", "FSTENV", "FSAVE")}
_LEGACY_STRING = ("MOVSB", "MOVSW", "MOVSD", "MOVSQ", "STOSB", "STOSW", "STOSD", "STOSQ", "LODSB", "LODSW", "LODSD",
                  "LODSQ", "SCASB", "SCASW", "SCASD", "SCASQ", "CMPSB", "CMPSW", "CMPSD", "CMPSQ")  # fmt: skip
_STRINGS = {getattr(Mnemonic, name) for name in _LEGACY_STRING}
_ALL_FLAGS = {Mnemonic.PUSHF, Mnemonic.PUSHFQ, Mnemonic.LAHF}
DIVIDES = {Mnemonic.DIV, Mnemonic.IDIV}
SHIFTS = {
    getattr(Mnemonic, name) for name in ("SHL", "SHR", "SAR", "SAL", "ROL", "ROR", "RCL", "RCR", "SHLD", "SHRD")
}
LEAVE_FLAGS = DIVIDES | _BIT_STRING | SHIFTS | {Mnemonic.BSF, Mnemonic.BSR, Mnemonic.MUL, Mnemonic.IMUL}
"""Instructions that may leave flags as they were where the manuals have them undefined."""
MAY_DO_NOTHING = SHIFTS | _STRINGS
"""Instructions that leave all flags as they were when their count is 0."""
_NO_ACCESS = {Mnemonic.CLFLUSH, Mnemonic.CLFLUSHOPT, Mnemonic.CLWB}
"""Those that the translator does nothing for, not even fault."""
_WRITES = {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
_X87_FEATURES = {CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387}
_JCC = [getattr(Code, f"J{c}_REL{size}_64") for c in "O NO B AE E NE BE A S NS P NP L GE LE G".split()
        for size in (8, 32)] + [Code.JRCXZ_REL8_64, Code.JECXZ_REL8_64]  # fmt: skip
_LOOPS = [getattr(Code, f"{name}_REL8_64_{c}") for name in ("LOOP", "LOOPE", "LOOPNE") for c in ("RCX", "ECX")]


_PREFIXES = (0x66, 0xF2, 0xF3, 0x2E, 0x3E, 0x26, 0x36, *range(0x40, 0x50))


class Impossible(Exception):
    """What was drawn cannot be had here; draw again."""


class Generator:
    """Makes cases from seeds, for a processor with the decoder's `features`."""

    def __init__(self, features: frozenset[int]) -> None:
        self._groups = catalogue(features)
        self._info = InstructionInfoFactory()
        self._encoder = Encoder(64)

    @property
    def codes(self) -> int:
        """How many of the decoder's codes are in play."""
        return sum(len(codes) for group in self._groups.values() for codes in group)

    def case(self, seed: str) -> Case:
        """The case that belongs to `seed`."""
        return _Draw(self, Random(seed)).case()


class _Draw:
    """The drawing of one case."""

    def __init__(self, generator: Generator, random: Random) -> None:
        self.generator = generator
        self.random = random
        self.items: list[Item] = []
        self.known: dict[int, int] = {}
        self.skippers: list[tuple[Item, int]] = []
        self.pokes: list[tuple[int, int]] = []
        self.used_x87 = False
        self.undefined_flags = 0
        self.skipped_to = 0
        """Items before this one may be jumped over."""
        self._narrow = False

    def case(self) -> Case:
        random = self.random
        self.fs_base, self.gs_base = (self._segment_base() for _ in range(2))
        gpr = [self._initial() for _ in range(16)]
        gpr[RSP] = DATA + random.choice((0x1800, 0x1000, 0x2000, 0x1004, random.randrange(64, 0x2FC0)))
        self.known = dict(enumerate(gpr))
        page = CODE_NEAR if random.random() < 0.7 else CODE_FAR
        offset = random.randrange(0, 0x400)
        if random.random() < 0.15:
            offset = random.randrange(0xF80, 0x1000)
        self.code = page + offset
        self.code_page = page
        length = random.choice((1, 1, 2, 2, 3, 3, 4, 5, 6, 8))
        drawn = 0
        attempts = 0
        while drawn < length and attempts < 60:
            attempts += 1
            before = len(self.items), dict(self.known), self.used_x87, len(self.pokes), self.undefined_flags
            try:
                self._one()
                lay_out(self.items, self.code)
                drawn += 1
                if before[0] < self.skipped_to:  # it may not run
                    self.known = {n: value for n, value in self.known.items() if before[1].get(n) == value}
            except (Impossible, ValueError):
                del self.items[before[0] :]
                self.known, self.used_x87, self.undefined_flags = before[1], before[2], before[4]
                del self.pokes[before[3] :]
        for number, item in enumerate(self.items):
            target = item.target
            while target and number < target < len(self.items) and not item.keep and self.items[target - 1].keep:
                item.target = target = target + 1  # not into the middle of what belongs together
        flags = random.getrandbits(12) & 0x8D5 | 0x202 | (0x400 if random.random() < 0.2 else 0)
        return Case(
            self.items, gpr, flags, self.fs_base, self.gs_base, fpu_image(random),
            pool_slice(random, DATA_PAGES * PAGE), pool_slice(random, CODE_DATA_SIZE),
            page, offset, random.random() < 0.5, self.pokes,
        )  # fmt: skip

    def _segment_base(self) -> int:
        random = self.random
        return random.choice((0, DATA, DATA + 0x123, 0x1000, random.getrandbits(31), (1 << 47) - 0x2000,
                              0xFFFF800000000000 | random.getrandbits(30)))  # fmt: skip

    def _initial(self) -> int:
        random = self.random
        kind = random.random()
        if kind < 0.4:
            return DATA + random.randrange(-64, DATA_PAGES * PAGE + 64)
        if kind < 0.6:
            return random.randrange(-40, 70) & MASK64
        return integer(random, 64)

    # -- one instruction ------------------------------------------------------------------------------------

    def _one(self) -> None:
        """Add an instruction, with what it needs before it."""
        random = self.random
        kind = random.random()
        if kind < 0.07:
            self._branch()
            return
        if kind < 0.12:
            self._special()
            return
        group = SCALAR if kind < 0.68 else VECTOR if kind < 0.9 else X87
        codes = random.choice(self.generator._groups[group])
        self._ordinary(random.choice(codes))

    def _add(self, instruction: Instruction, target: int | None = None, *, keep: bool = False) -> None:
        self.items.append(Item(instruction, target, keep=keep))

    def _ordinary(self, code: CodeNumber) -> None:
        random = self.random
        instruction = Instruction()
        instruction.code = code
        info = instruction.op_code()
        mnemonic = info.mnemonic
        if mnemonic in _SAVES_X87 and self.used_x87:
            raise Impossible
        if mnemonic in DIVIDES and random.random() < 0.8:
            self._tame_divide(info.operand_size)
        kinds = info.op_kinds()
        self._narrow = random.random() < 0.06
        memory: int | None = None
        for number, kind in enumerate(kinds):
            if self._is_memory(kind):
                memory = number
                instruction.set_op_kind(number, OpKind.MEMORY)
            elif kind in _STRING:
                self._string_operand(instruction, number, kind, info)
            elif kind == _K.SEG_RBX_AL:
                self._xlat(instruction, number)
            else:
                self._plain_operand(instruction, number, kind)
        if memory is not None:
            if kinds[memory] in _VSIB:
                self._gather_operand(instruction, _VSIB[kinds[memory]])
            elif kinds[memory] == _K.MEM_OFFS:
                self._offset_operand(instruction)
            else:
                self._memory_operand(instruction, memory)
            if info.can_use_lock_prefix and memory == 0 and random.random() < 0.4:
                instruction.has_lock_prefix = True
        if info.can_use_rep_prefix and mnemonic in _STRINGS and random.random() < 0.7:
            self._repeat(instruction, info.can_use_repne_prefix)
        self._finish(instruction)

    def _is_memory(self, kind: int) -> bool:
        if kind in _MEMORY_TOO:
            return self.random.random() < 0.6
        return kind in (_K.MEM, _K.MEM_OFFS) or kind in _VSIB

    def _plain_operand(self, instruction: Instruction, number: int, kind: int) -> None:
        random = self.random
        if kind in _FILES:
            file = _FILES[kind]
            if file in (_R16, _R32, _R64, _R8) and random.random() < 0.45:
                register = file[random.choice((4, 10, 11, 15))]
            else:
                register = random.choice(file)
            instruction.set_op_kind(number, OpKind.REGISTER)
            instruction.set_op_register(number, register)
        elif kind in _FIXED:
            instruction.set_op_kind(number, OpKind.REGISTER)
            instruction.set_op_register(number, _FIXED[kind])
        elif kind == _K.STI_OPCODE:
            instruction.set_op_kind(number, OpKind.REGISTER)
            instruction.set_op_register(number, random.choice(_ST))
        elif kind == _K.IMM8_CONST_1:
            instruction.set_op_kind(number, OpKind.IMMEDIATE8)
            instruction.set_immediate_u32(number, 1)
        elif kind == _K.IMM4_M2Z:
            instruction.set_op_kind(number, OpKind.IMMEDIATE8)
            instruction.set_immediate_u32(number, random.getrandbits(4))
        elif kind in _IMMEDIATES:
            op_kind, bits = _IMMEDIATES[kind]
            if number and instruction.op_kind(number - 1) == OpKind.IMMEDIATE8:
                op_kind = OpKind.IMMEDIATE8_2ND
            if number and instruction.op_kind(number - 1) == OpKind.IMMEDIATE16:
                op_kind = OpKind.IMMEDIATE8_2ND
            instruction.set_op_kind(number, op_kind)
            value = integer(random, bits)
            value -= (value >> (bits - 1)) << bits
            if op_kind in (OpKind.IMMEDIATE8, OpKind.IMMEDIATE8_2ND, OpKind.IMMEDIATE16, OpKind.IMMEDIATE32):
                instruction.set_immediate_u32(number, value & ((1 << bits) - 1))
            else:
                instruction.set_immediate_i64(number, value)
        else:
            raise Impossible

    def _finish(self, instruction: Instruction, target: int | None = None, *, keep: bool = False) -> None:
        """Add it, and note what it does to the known registers."""
        random = self.random
        moves = instruction.stack_pointer_increment
        if moves and RSP not in self.known:
            raise Impossible
        if instruction.mnemonic == Mnemonic.ENTER:
            if abs(self.known[RSP] - self._ensure(RBP, DATA + random.randrange(64, 3 * PAGE))) < 128:
                raise Impossible  # the frame pointers that it reads are among those that it writes
            instruction.set_immediate_u32(1, random.choice((0, 0, 1, 2, 3)))
        if instruction.mnemonic in (Mnemonic.LDMXCSR, Mnemonic.VLDMXCSR) and random.random() < 0.5:
            raise Impossible
        # What these leave undefined is not touched on some processors, but the translator does not keep it.
        if instruction.rflags_read & self.undefined_flags or (
            self.undefined_flags and instruction.mnemonic in _ALL_FLAGS
        ):
            raise Impossible
        self.skipped_to = max(self.skipped_to, target or 0)
        may_do_nothing = instruction.mnemonic in MAY_DO_NOTHING or len(self.items) < self.skipped_to
        if not instruction.rflags_read and not may_do_nothing:
            self.undefined_flags &= ~instruction.rflags_modified
        if instruction.mnemonic in LEAVE_FLAGS:
            self.undefined_flags |= instruction.rflags_undefined
        stack = self.known.get(RSP)
        for used in self.generator._info.info(instruction).used_registers():
            if used.access in _WRITES:
                self.known.pop(_NUMBER.get(RegisterExt.full_register(used.register), -1), None)
        if moves and stack is not None and instruction.mnemonic not in (Mnemonic.LEAVE, Mnemonic.ENTER):
            popped = instruction.op_count and instruction.op0_kind == OpKind.REGISTER and moves > 0
            if not popped or _NUMBER.get(instruction.op0_register) != RSP:
                self.known[RSP] = (stack + moves) & MASK64
        if not _X87_FEATURES.isdisjoint(instruction.cpuid_features()):
            self.used_x87 = True
        prefix = self._idle_prefixes(instruction) if target is None and random.random() < 0.08 else b""
        self.items.append(Item(instruction, target, prefix, keep))

    def _idle_prefixes(self, instruction: Instruction) -> bytes:
        """Prefixes that change nothing about the instruction."""
        _, addresses = lay_out(self.items, self.code)
        prefix = bytes(self.random.choice(_PREFIXES) for _ in range(self.random.choice((1, 1, 2))))
        at = addresses[-1]
        encoder = self.generator._encoder
        encoder.encode(instruction, at + len(prefix))
        code = prefix + encoder.take_buffer()
        found = Decoder(64, code, ip=at).decode()
        plain = Decoder(64, code[len(prefix) :], ip=at + len(prefix)).decode()
        return prefix if found.len == len(code) and found == plain else b""

    # -- memory ---------------------------------------------------------------------------------------------

    def _target(self, size: int) -> int:
        """A linear address for an operand of `size` bytes."""
        random = self.random
        kind = random.random()
        if kind < 0.45:
            align = max(16, min(64, size))
            return DATA + random.randrange(0, 3 * PAGE - size, align) // align * align
        if kind < 0.7:
            return DATA + random.randrange(0, PAGE) + random.randrange(0, 2) * PAGE
        if kind < 0.88:
            return DATA + random.choice((1, 2)) * PAGE - random.randrange(0, size + 2)
        if kind < 0.92:
            return READ_ONLY + random.randrange(-size, PAGE)
        if kind < 0.98:
            return self.code_page + CODE_DATA + random.randrange(0, CODE_DATA_SIZE - min(size, 512), 4)
        if kind < 0.995:
            return random.choice((DATA - random.randrange(0, size + 1), DATA_END - random.randrange(0, size + 4)))
        return 1 << 47 | random.getrandbits(40)

    def _memory_operand(self, instruction: Instruction, number: int) -> None:
        """Choose an addressing form that leads to a random target."""
        random = self.random
        size = MemorySizeExt.size(instruction.memory_size) or 16
        target = self._target(size)
        if instruction.mnemonic in _NO_ACCESS:
            target = DATA + random.randrange(PAGE)
        if instruction.mnemonic in _BIT_STRING and instruction.op_kind(1) == OpKind.REGISTER:
            target = self._bit_string_target(instruction, target, size)
        base = 0
        segment = Register.NONE
        kind = random.random()
        if kind < 0.2:
            segment = random.choice((Register.FS, Register.GS))
            base = self.fs_base if segment == Register.FS else self.gs_base
        elif kind < 0.25:
            segment = random.choice((Register.DS, Register.ES, Register.SS, Register.CS))
        instruction.segment_prefix = segment
        self._address(instruction, (target - base) & MASK64, Register.NONE)

    def _address(self, instruction: Instruction, offset: int, index: int) -> None:
        """Set base, index and displacement so that the effective address is `offset`."""
        random = self.random
        for _ in range(12):
            kind = random.random()
            if kind < 0.12:
                instruction.memory_base = Register.RIP if random.random() < 0.8 else Register.EIP
                if abs(offset - self.code) > 0x7FFF0000:
                    continue
                if instruction.memory_base == Register.EIP and (self.code >> 32 or offset >> 32):
                    continue
                instruction.memory_index = Register.NONE
                instruction.memory_displacement = offset
                instruction.memory_displ_size = 8 if instruction.memory_base == Register.RIP else 4
                return
            if kind < 0.2:
                if not _fits(offset, 32):
                    continue
                instruction.memory_base = instruction.memory_index = Register.NONE
                instruction.memory_displacement = offset
                instruction.memory_displ_size = 8
                return
            narrow = random.random() < 0.15
            if narrow and offset >> 32:
                continue
            if self._based(instruction, offset, narrow):
                return
        raise Impossible

    def _based(self, instruction: Instruction, offset: int, narrow: bool) -> bool:
        random = self.random
        names = _R32 if narrow else _R64
        bits = 32 if narrow else 64
        candidates = list(self.known)
        if random.random() < 0.4:
            candidates = [n for n in (4, 10, 11, 15, 5, 13) if n in self.known] or candidates
        if not candidates:
            return False
        base = random.choice(candidates) if random.random() < 0.92 else None
        index = random.choice(candidates) if base is None or random.random() < 0.45 else None
        if index == RSP:
            index = None
            if base is None:
                return False
        scale = random.choice((1, 2, 4, 8)) if index is not None else 1
        total = (self.known[base] if base is not None else 0) + (self.known[index] * scale if index is not None else 0)
        displacement = (offset - total) & ((1 << bits) - 1)
        if not narrow and not _fits(displacement, 32):
            return False
        short = displacement < 0x80 or displacement >= (1 << bits) - 0x80
        instruction.memory_base = names[base] if base is not None else Register.NONE
        instruction.memory_index = names[index] if index is not None else Register.NONE
        instruction.memory_index_scale = scale
        instruction.memory_displacement = displacement
        instruction.memory_displ_size = (
            0 if not displacement and base not in (None, 5, 13)
            else 1 if short and base is not None and random.random() < 0.8 else bits // 8
        )  # fmt: skip
        return True

    def _offset_operand(self, instruction: Instruction) -> None:
        """MOV with a 64-bit offset (moffs)."""
        size = MemorySizeExt.size(instruction.memory_size)
        target = self._target(size)
        segment = self.random.choice((Register.NONE, Register.NONE, Register.FS, Register.GS))
        base = {Register.FS: self.fs_base, Register.GS: self.gs_base}.get(segment, 0)
        instruction.segment_prefix = segment
        instruction.memory_base = instruction.memory_index = Register.NONE
        offset = (target - base) & MASK64
        narrow = not offset >> 32 and self.random.random() < 0.3
        instruction.memory_displacement = offset
        instruction.memory_displ_size = 4 if narrow else 8

    def _gather_operand(self, instruction: Instruction, file: list[RegisterNumber]) -> None:
        """An index vector with known, small elements, loaded from the code page; base and scale lead to the data."""
        random = self.random
        numbers = random.sample(range(16), 3)
        index = file[numbers[0]]
        for operand, number in ((0, numbers[1]), (2, numbers[2])):
            own = _YMM if RegisterExt.is_ymm(instruction.op_register(operand)) else _XMM
            instruction.set_op_register(operand, own[number])
        wide = instruction.mnemonic in _QUADWORD_INDEX
        # Index elements: a broadcast of one, then small differences by an arithmetic right shift of random data.
        code = Code.VEX_VPSRAD_YMM_YMM_IMM8 if not wide else Code.VEX_VPSRLQ_YMM_YMM_IMM8
        bits = random.choice((4, 7, 8, 8, 11))
        source = random.choice(_YMM)
        whole = _YMM[numbers[0]]
        self._add(
            Instruction.create_reg_reg_u32(code, whole, source, (64 if wide else 32) - bits), keep=True
        )
        target = DATA + random.choice((0x800, 0x1000, 0x1800, 0x2000, 0x2800, 0x3000))
        base = random.choice([n for n in self.known if n != RSP] or [RAX])
        scale = random.choice((1, 2, 4, 8))
        segment = random.choice((Register.NONE, Register.NONE, Register.FS, Register.GS))
        offset = target - {Register.FS: self.fs_base, Register.GS: self.gs_base}.get(segment, 0) & MASK64
        displacement = random.choice((0, 4, random.randrange(-200, 200)))
        self._ensure(base, (offset - displacement) & MASK64)
        instruction.segment_prefix = segment
        instruction.memory_base = _R64[base]
        instruction.memory_index = index
        instruction.memory_index_scale = scale
        instruction.memory_displacement = displacement & MASK64
        instruction.memory_displ_size = 8

    def _bit_string_target(self, instruction: Instruction, target: int, size: int) -> int:
        """Where the operand must be for the bit of a known register to lie at `target`."""
        register = instruction.op_register(1)
        number = _NUMBER[register]
        if number not in self.known:
            raise Impossible
        bits = 8 * size
        value = self.known[number] & ((1 << bits) - 1)
        value -= (value >> (bits - 1)) << bits
        return (target - (value >> bits.bit_length() - 1) * size) & MASK64

    # -- strings --------------------------------------------------------------------------------------------

    def _string_operand(self, instruction: Instruction, number: int, kind: int, info: object) -> None:
        random = self.random
        register, wide, narrow = _STRING[kind]
        size = MemorySizeExt.size(instruction.memory_size) or 8
        segment_base = 0
        if kind == _K.SEG_RSI and random.random() < 0.2:
            segment = random.choice((Register.FS, Register.GS))
            instruction.segment_prefix = segment
            segment_base = self.fs_base if segment == Register.FS else self.gs_base
        target = self._target(size * random.choice((1, 1, 8, 24)))
        if not DATA - PAGE <= target < DATA_END:
            target = DATA  # what is beside the data in the code page is not the same on both sides
        offset = (target - segment_base) & MASK64
        if self._narrow and offset >> 32:
            raise Impossible
        self._ensure(register, offset | (random.getrandbits(32) << 32 if self._narrow else 0))
        instruction.set_op_kind(number, narrow if self._narrow else wide)

    def _repeat(self, instruction: Instruction, repne_too: bool) -> None:
        random = self.random
        count = random.choice((0, 1, 2, 3, random.randrange(30), random.randrange(30), random.randrange(700)))
        if random.random() < 0.03:
            count = random.randrange(5000)
        self._ensure(RCX, count | (random.getrandbits(32) << 32 if self._narrow else 0))
        if repne_too and random.random() < 0.5:
            instruction.has_repne_prefix = True
        else:
            instruction.has_rep_prefix = True

    def _xlat(self, instruction: Instruction, number: int) -> None:
        self._ensure(RBX, self._target(1) - 255 & MASK64)
        self._ensure(RAX, self.random.getrandbits(64) | 0xFF)
        instruction.set_op_kind(number, OpKind.MEMORY)
        instruction.memory_base = Register.RBX
        instruction.memory_index = Register.AL

    def _ensure(self, number: int, value: int) -> int:
        """Have a register hold a value: add a MOV before the instruction.  Returns the value."""
        if self.known.get(number) == value:
            return value
        if _fits(value, 32) and self.random.random() < 0.7:
            signed = value - (1 << 64) if value >> 63 else value
            instruction = Instruction.create_reg_i64(Code.MOV_RM64_IMM32, _R64[number], signed)
        else:
            instruction = Instruction.create_reg_u64(Code.MOV_R64_IMM64, _R64[number], value)
        self._add(instruction, keep=True)
        self.known[number] = value
        return value

    # -- specials -------------------------------------------------------------------------------------------

    def _tame_divide(self, bits: int) -> None:
        random = self.random
        if bits == 0 or bits == 8:
            self._ensure(RAX, random.getrandbits(random.choice((8, 12))))
        else:
            self._ensure(RDX, random.choice((0, 0, 1, random.getrandbits(4))))

    def _branch(self) -> None:
        """A conditional jump over the next one or two instructions, a CALL to the next, or an indirect jump."""
        random = self.random
        here = len(self.items)
        kind = random.random()
        if kind < 0.08:
            self._loop()
        elif kind < 0.15:
            self._modify_code()
        elif kind < 0.5:
            instruction = Instruction.create_branch(random.choice(_JCC), 0)
            self._finish(instruction, here + 1 + random.choice((0, 1, 1, 2)))
            self.known.pop(RSP, None)  # what is jumped over may move it
        elif kind < 0.6:
            code = random.choice(_LOOPS)
            if random.random() < 0.5:
                self._ensure(RCX, random.choice((0, 1, 2, 1 << 32, (1 << 32) + 1)))
            here = len(self.items)
            self._finish(Instruction.create_branch(code, 0), here + 1 + random.choice((0, 1)))
            self.known.pop(RSP, None)
        elif kind < 0.7:
            code = random.choice((Code.JMP_REL8_64, Code.JMP_REL32_64))
            self._finish(Instruction.create_branch(code, 0), here + 1 + random.choice((0, 1)))
            self.known.pop(RSP, None)
        elif kind < 0.8:
            if RSP not in self.known:
                raise Impossible
            self._finish(Instruction.create_branch(Code.CALL_REL32_64, 0), here + 1)
            self.known[RSP] = self.known[RSP]
        elif kind < 0.9:
            self._indirect()
        else:
            self._return()

    def _loop(self) -> None:
        """One instruction a few times."""
        random = self.random
        self.known.pop(RCX, None)
        self._ensure(RCX, random.randrange(1, 5))
        start, known = len(self.items), dict(self.known)
        self._ordinary(random.choice(random.choice(self.generator._groups[random.choice((SCALAR, VECTOR))])))
        body = self.items[-1].instruction
        changed = {number for number in known if number not in self.known or self.known[number] != known[number]}
        address = {_NUMBER.get(r) for r in (body.memory_base, body.memory_index)}
        if len(self.items) != start + 1 or changed & (address | {RCX, RSP}) or self.undefined_flags:
            raise Impossible
        if any(body.op_kind(i) != OpKind.MEMORY and body.op_kind(i) in _STRING_KINDS for i in range(body.op_count)):
            raise Impossible
        self.items[-1].keep = True
        self._finish(Instruction.create_branch(Code.LOOP_REL8_64_RCX, 0), start)

    def _modify_code(self) -> None:
        """A store into the immediate of the instruction after it."""
        random = self.random
        store = Instruction()
        store.code = Code.MOV_RM32_IMM32
        store.set_op_kind(0, OpKind.MEMORY)
        store.memory_base = Register.RIP
        store.memory_displ_size = 8
        store.set_op_kind(1, OpKind.IMMEDIATE32)
        store.set_immediate_u32(1, random.getrandbits(32))
        self._add(store, len(self.items) + 1, keep=True)
        number = random.choice((0, 3, 6, 10, 13))
        self.known.pop(number, None)
        self._add(Instruction.create_reg_u64(Code.MOV_R64_IMM64, _R64[number], random.getrandbits(64)))

    def _indirect(self) -> None:
        """JMP or CALL to the next instruction through a register or memory."""
        random = self.random
        call = random.random() < 0.5
        if call and RSP not in self.known:
            raise Impossible
        if random.random() < 0.5:
            register = random.choice(_R64)
            if register == Register.RSP:
                raise Impossible
            lea = Instruction()
            lea.code = Code.LEA_R64_M
            lea.set_op_kind(0, OpKind.REGISTER)
            lea.set_op_register(0, register)
            lea.set_op_kind(1, OpKind.MEMORY)
            lea.memory_base = Register.RIP
            lea.memory_displ_size = 8
            self._add(lea, len(self.items) + 2, keep=True)
            self.known.pop(_NUMBER[register], None)
            jump = Instruction.create_reg(Code.CALL_RM64 if call else Code.JMP_RM64, register)
            self._finish(jump)
            return
        jump = Instruction()
        jump.code = Code.CALL_RM64 if call else Code.JMP_RM64
        jump.set_op_kind(0, OpKind.MEMORY)
        target = DATA + random.randrange(0, 2 * PAGE, 4)
        if RSP in self.known and abs(target - self.known[RSP]) < 64:
            raise Impossible
        if len(self.items) > 2:
            raise Impossible  # what ran before might have written there
        self._address(jump, target, Register.NONE)
        self._finish(jump)
        self.pokes.append((target, len(self.items)))

    def _return(self) -> None:
        """RET to the next instruction, whose address a PUSH has put on the stack."""
        if RSP not in self.known or self.code >> 31:
            raise Impossible
        random = self.random
        drop = random.random() < 0.4
        self._finish(Instruction.create_i32(Code.PUSHQ_IMM32, 0), len(self.items) + 2, keep=True)
        if drop:
            self._finish(Instruction.create_i32(Code.RETNQ_IMM16, random.randrange(0, 64)))
        else:
            ret = Instruction()
            ret.code = Code.RETNQ
            self._finish(ret)

    def _special(self) -> None:
        """POPF and PUSHF, DF, flags at any time."""
        random = self.random
        kind = random.random()
        instruction = Instruction()
        if kind < 0.3:
            instruction.code = random.choice((Code.PUSHFQ, Code.PUSHFQ, Code.PUSHFW))
        elif kind < 0.6:
            if RSP not in self.known:
                raise Impossible
            value = random.getrandbits(12) & 0x8D5 | 0x200 | (0x400 if random.random() < 0.2 else 0)
            value |= 0x200000 if random.random() < 0.1 else 0
            self._finish(Instruction.create_i32(Code.PUSHQ_IMM32, value), keep=True)
            instruction.code = Code.POPFQ
        elif kind < 0.75:
            instruction.code = random.choice((Code.STD, Code.CLD))
        else:
            instruction.code = random.choice((Code.CLC, Code.STC, Code.CMC, Code.LAHF, Code.SAHF))
        self._finish(instruction)


def _fits(value: int, bits: int) -> bool:
    """Whether a 64-bit value is a sign-extended one of `bits`."""
    return value < 1 << (bits - 1) or value >= (1 << 64) - (1 << (bits - 1))
