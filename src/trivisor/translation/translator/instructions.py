"""Guest instructions into recipes: what is copied, what is rebuilt around a TLB check, what is done elsewhere.

Nearly every instruction runs as itself.  One with a memory operand gets its
address computed, checked and replaced by [r10]; one that names a register that
lives in a slot gets it through scratch registers; sensitive ones become inline
code on the virtual state or a call-out to Python.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack

from iced_x86 import (
    Code,
    ConstantOffsets,
    Decoder,
    Encoder,
    EncodingKind,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

from trivisor.translation.modes import CallOut, Jump, Missing, Mode, Raise
from trivisor.translation.translator import (
    branches,
    control_flow,
    guards,
    inline,
    legacy_flow,
    memory_forms,
    priority,
    vector_access,
)
from trivisor.translation.translator.recipe import ARITHMETIC, DISPLACEMENT, IMMEDIATE, Form, Recipe, asm
from trivisor.translation.translator.registers import (
    BY_SIZE,
    DISPLACED,
    GPR,
    HIGH_BYTES,
    RSP,
    S1,
    S2,
    SEGMENTS,
    SLOT,
    SLOT_ADDRESS,
    STACK,
    name,
)
from trivisor.x86.iced_types import CodeNumber, RegisterNumber

_CALL_OUTS = {
    getattr(Mnemonic, name)
    for name in """
        CPUID SGDT SIDT SLDT STR SMSW LGDT LIDT LLDT LTR LMSW LAR LSL VERR VERW ARPL IRET IRETD IRETQ INT
        INT3 INTO SYSCALL SYSRET SYSRETQ SYSENTER SYSEXIT SYSEXITQ IN OUT INSB INSW INSD OUTSB OUTSW OUTSD
        RDPMC RDTSCP XGETBV XSETBV CLAC STAC RDMSR WRMSR HLT WBINVD INVD INVLPG INVPCID CLTS LDS LES LFS LGS
        LSS AAA AAS DAA DAS AAM AAD SALC PUSHA PUSHAD POPA POPAD BOUND ENTER XLATB RDPID WRFSBASE WRGSBASE
        LEAVE VMCALL VMMCALL MONITOR MWAIT RSM GETSEC VMXON VMXOFF VMLAUNCH VMRESUME VMREAD VMWRITE VMPTRLD
        VMPTRST VMCLEAR INVEPT INVVPID VMFUNC VMRUN VMLOAD VMSAVE STGI CLGI SKINIT INVLPGA RETF
    """.split()
    if hasattr(Mnemonic, name)
} - {Mnemonic.LEAVE}

_HINTS = {
    getattr(Mnemonic, name)
    for name in (
        "NOP", "RESERVEDNOP", "ENDBR64", "ENDBR32", "RDSSPD", "RDSSPQ", "CLDEMOTE", "PREFETCHW", "PREFETCHWT1",
        "PREFETCH",
        "PREFETCHIT0", "PREFETCHIT1", "BNDMK", "BNDCL", "BNDCU", "BNDCN", "BNDMOV", "BNDLDX", "BNDSTX",
    )
    if hasattr(Mnemonic, name)
}
"""No-operations on every processor, though newer ones make something of them."""

_FLAG_IMAGES = {
    getattr(Mnemonic, name) for name in ("PUSHF", "PUSHFD", "PUSHFQ", "POPF", "POPFD", "POPFQ")
}
"""Those that have no inline code: other sizes, other modes."""

_IGNORED = {
    getattr(Mnemonic, name)
    for name in """
        PREFETCHNTA PREFETCHT0 PREFETCHT1 PREFETCHT2 NOP SERIALIZE
    """.split()
    if hasattr(Mnemonic, name)
}

_OLDER: dict[int, CodeNumber] = {
    Code.WBNOINVD: Code.WBINVD,
    **{
        getattr(Code, f"{newer}_R{bits}_RM{bits}"): getattr(Code, f"{older}_R{bits}_RM{bits}")
        for newer, older in (("TZCNT", "BSF"), ("LZCNT", "BSR"))
        for bits in (16, 32, 64)
    },
}
"""What these are to a processor that does not know them: to it F3 is a prefix that says nothing."""

_SHIFTS = {
    getattr(Mnemonic, name) for name in ("SHL", "SHR", "SAR", "SAL", "ROL", "ROR", "RCL", "RCR", "SHLD", "SHRD")
}

_LEAVE_FLAGS = {
    getattr(Mnemonic, name)
    for name in ("MUL", "IMUL", "DIV", "IDIV", "BT", "BTS", "BTR", "BTC", "BSF", "BSR", "TZCNT", "LZCNT")
}
"""Of the flags that the manuals have undefined after these, processors leave some as they were."""

XSAVE_FAMILY = {
    Mnemonic.XSAVE, Mnemonic.XSAVE64, Mnemonic.XRSTOR, Mnemonic.XRSTOR64,
    Mnemonic.XSAVEOPT, Mnemonic.XSAVEOPT64, Mnemonic.XSAVEC, Mnemonic.XSAVEC64,
}  # fmt: skip

_MOFFS = {
    Code.MOV_AL_MOFFS8: Code.MOV_R8_RM8, Code.MOV_AX_MOFFS16: Code.MOV_R16_RM16,
    Code.MOV_EAX_MOFFS32: Code.MOV_R32_RM32, Code.MOV_RAX_MOFFS64: Code.MOV_R64_RM64,
    Code.MOV_MOFFS8_AL: Code.MOV_RM8_R8, Code.MOV_MOFFS16_AX: Code.MOV_RM16_R16,
    Code.MOV_MOFFS32_EAX: Code.MOV_RM32_R32, Code.MOV_MOFFS64_RAX: Code.MOV_RM64_R64,
}  # fmt: skip

# INC and DEC have one-byte encodings that 64-bit mode lacks, and opcode 82 is another 80.  The 16-bit MOVSXD is a
# MOV, of which AMD's processors read 32 bits.
_IN_64BIT_MODE = {
    Code.MOVSXD_R16_RM16: Code.MOV_R16_RM16,
    Code.INC_R16: Code.INC_RM16, Code.INC_R32: Code.INC_RM32,
    Code.DEC_R16: Code.DEC_RM16, Code.DEC_R32: Code.DEC_RM32,
    **{
        getattr(Code, f"{name}_RM8_IMM8_82"): getattr(Code, f"{name}_RM8_IMM8")
        for name in ("ADD", "OR", "ADC", "SBB", "AND", "SUB", "XOR", "CMP")
    },
}  # fmt: skip

_WRITES = {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
_READS = {
    OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE, OpAccess.COND_WRITE,
}  # fmt: skip


class InstructionMaker:
    """Makes recipes for one mode."""

    def __init__(self, mode: Mode, near: bool, features: frozenset[int], xsave_size: int) -> None:
        """`features`: the CpuidFeature numbers that this processor has; `xsave_size`: bytes of XSAVE's area."""
        self.mode = mode
        self.near = near
        self.features = features
        self.xsave_size = xsave_size
        self._encoder = Encoder(64)
        self._info = InstructionInfoFactory()
        decoder = Decoder(64, b"\x4c\x8d\x14\x08")  # lea r10, [rax+rcx]
        self._lea_template = decoder.decode()
        self._raw = b""
        self._offsets: ConstantOffsets = decoder.get_constant_offsets(self._lea_template)
        self._encoded: tuple[bytes, tuple[int, int] | None] = (b"", None)
        self._baked = False  # a constant went into the code otherwise than by a patch
        self._special: dict[int, Callable[[Recipe, Instruction], None]] = inline.table(self)

    # -- the way in -----------------------------------------------------------------------------------------

    def make(
        self,
        instruction: Instruction,
        raw: bytes,
        offsets: ConstantOffsets,
        prepared: int = 0,
        single: bool = False,
        form: Form | None = None,
    ) -> Recipe:
        """The recipe of one decoded instruction; `raw` are its bytes."""
        recipe = Recipe(
            self.mode.user_view, self.near, length=len(raw), prepared=prepared, single=single, form=form,
            aligned=self.mode.aligned,
        )  # fmt: skip
        self._offsets = offsets
        self._baked = False
        if instruction.code in _OLDER and not self._available(instruction):
            instruction = instruction.copy()
            instruction.code = _OLDER[instruction.code]
            raw = raw.replace(b"\xf3", b"", 1)
        self._raw = raw
        mnemonic = instruction.mnemonic
        if mnemonic in _HINTS:
            pass
        elif instruction.is_invalid or not self._available(instruction):
            recipe.ends = Raise(6)
        elif self.mode.real and instruction.encoding == EncodingKind.VEX:
            recipe.ends = Raise(6)  # SDM 2A 2.5
        else:
            guards.guard(self, recipe, instruction)
            self._made(recipe, instruction)
        recipe.finish()
        return recipe

    def _made(self, recipe: Recipe, instruction: Instruction) -> None:
        mnemonic = instruction.mnemonic
        if mnemonic in self._special:
            self._special[mnemonic](recipe, instruction)
        elif mnemonic in _IGNORED:
            pass
        elif mnemonic in _CALL_OUTS or mnemonic in _FLAG_IMAGES or self.is_sensitive(instruction):
            recipe.ends = CallOut()
        elif instruction.flow_control != FlowControl.NEXT:
            self._control(recipe, instruction)
        else:
            self.plain(recipe, instruction)

    def _available(self, instruction: Instruction) -> bool:
        return all(feature in self.features for feature in instruction.cpuid_features())

    def is_sensitive(self, instruction: Instruction) -> bool:
        if instruction.is_privileged:
            return True
        return any(
            instruction.op_kind(i) == OpKind.REGISTER
            and (
                instruction.op_register(i) in SEGMENTS
                or RegisterExt.is_cr(instruction.op_register(i))
                or RegisterExt.is_dr(instruction.op_register(i))
            )
            for i in range(instruction.op_count)
        )

    # -- flags ----------------------------------------------------------------------------------------------

    def flags(self, recipe: Recipe, instruction: Instruction) -> None:
        """Note which flags the instruction reads and surely writes."""
        reads: int = instruction.rflags_read & ARITHMETIC
        writes: int = instruction.rflags_modified & ARITHMETIC
        if instruction.mnemonic in _LEAVE_FLAGS:
            writes &= ~instruction.rflags_undefined
            if not writes:
                reads |= instruction.rflags_undefined & ARITHMETIC
        if instruction.mnemonic in _SHIFTS:
            # A count of zero leaves every flag as it was.
            last = instruction.op_count - 1
            counted = instruction.op_kind(last) == OpKind.REGISTER
            count = 0 if counted else instruction.immediate(last) & (0x3F if self.mode.bits == 64 else 0x1F)
            if counted or count == 0:
                reads |= writes
                writes = 0
            if instruction.mnemonic in (Mnemonic.RCL, Mnemonic.RCR):
                # By 9 bits of a byte or 17 of a word nothing changes, as the decoder knows, but OF may.
                reads |= RflagsBits.OF | RflagsBits.CF
                writes = 0
        elif instruction.has_rep_prefix or instruction.has_repne_prefix:
            reads |= writes
            writes = 0
        recipe.reads |= reads
        recipe.writes |= writes

    # -- addresses ------------------------------------------------------------------------------------------

    def address(
        self, recipe: Recipe, instruction: Instruction, adjust: int = 0, *, segmented: bool = True
    ) -> None:
        """Put the linear address of the memory operand, plus `adjust`, into r10 (r11 if it is distant); uses r11.

        Where its segment is not flat that is the offset in it, which `Recipe.check` makes linear.
        """
        if recipe.addressed:
            return
        adjust -= recipe.before
        base, index = instruction.memory_base, instruction.memory_index
        segment = SEGMENTS[instruction.memory_segment]
        if instruction.is_ip_rel_memory_operand:
            distance = _signed(instruction.ip_rel_memory_address - instruction.next_ip + adjust, 64)
            recipe.absolute("r10", distance if adjust else None)
        elif base == Register.NONE and index == Register.NONE:
            self._absolute_address(recipe, instruction, adjust)
        else:
            self._sum_address(recipe, instruction, base, index, adjust)
        if segmented:
            self.add_segment(recipe, segment)

    def _absolute_address(self, recipe: Recipe, instruction: Instruction, adjust: int) -> None:
        displacement = instruction.memory_displacement
        if self.mode.bits == 64 and self._offsets.displacement_size == 4 and not adjust:
            recipe.raw(b"\x49\xc7\xc2" + pack("<I", displacement & 0xFFFFFFFF), (3, 4, DISPLACEMENT))
            return
        self._baked = True
        bits = self.address_bits(instruction)
        recipe.code(f"mov r10, {_signed((displacement + adjust) & ((1 << bits) - 1), 64)}")

    def _sum_address(
        self, recipe: Recipe, instruction: Instruction, base: RegisterNumber, index: RegisterNumber, adjust: int
    ) -> None:
        """LEA with the same registers, or those that stand for them, and a displacement of the same width."""
        bits = self.address_bits(instruction)
        lea = self._lea_template
        lea.code = Code.LEA_R64_M if bits == 64 else Code.LEA_R32_M
        lea.op0_register = Register.R11 if recipe.distant else Register.R10 if bits == 64 else Register.R10D
        lea.memory_base = self._address_register(recipe, base, S1)
        lea.memory_index = self._address_register(recipe, index, S2)
        lea.memory_index_scale = instruction.memory_index_scale
        offset = _signed(instruction.memory_displacement, bits) + adjust
        size = self._offsets.displacement_size
        baked = bool(adjust) or size == 2
        if baked:
            self._baked = True
            size = 4
        if recipe.distant and not offset and index == Register.NONE:  # a move, which processors do by renaming
            recipe.code(f"mov r11, {name(GPR[lea.memory_base][0], 8)}")
            return
        lea.memory_displacement = offset & 0xFFFFFFFFFFFFFFFF
        lea.memory_displ_size = 8 if size == 4 else size
        code = self.encode(lea)
        recipe.raw(code, (len(code) - size, size, DISPLACEMENT) if size and not baked else None)
        if bits == 16:
            recipe.code("movzx r10d, r10w")

    def _address_register(self, recipe: Recipe, register: RegisterNumber, scratch: int) -> RegisterNumber:
        if register == Register.NONE:
            return register
        number = GPR[register][0]
        if number in DISPLACED:
            recipe.code(f"mov r{scratch}, [rsp+GPR_R{number}]")
            number = scratch
        elif number == RSP:
            number = STACK
        return BY_SIZE[8][number]

    def address_bits(self, instruction: Instruction) -> int:
        """The width of the memory operand's address."""
        for register in (instruction.memory_base, instruction.memory_index):
            if register in GPR:
                return GPR[register][1] * 8
        size = instruction.memory_displ_size
        return size * 8 if size in (2, 4, 8) and self.mode.bits != 64 else self.mode.bits

    def add_segment(self, recipe: Recipe, segment: str) -> None:
        """Make r10 linear, by adding a base that 64-bit code has, or have the next check do it; uses r11."""
        if self.mode.checks(segment):
            recipe.segment = segment
        elif segment in ("FS", "GS"):
            recipe.code(f"mov r11, [rsp+{segment}_BASE]\n lea r10, [r10+r11]")

    def to_linear(self, segment: str, access: str) -> str:
        """The same as a line for `Recipe.clobber`, before a check of the same access ("read 4")."""
        if self.mode.checks(segment):
            return f"segment {segment} {access}"
        if segment in ("FS", "GS"):
            return f"mov r11, [rsp+{segment}_BASE]\n lea r10, [r10+r11]"
        return ""

    # -- ordinary instructions ------------------------------------------------------------------------------

    def plain(self, recipe: Recipe, instruction: Instruction) -> None:
        """An instruction that runs as itself, on the host's registers and memory."""
        self.flags(recipe, instruction)
        info = self._info.info(instruction)
        if instruction.mnemonic in vector_access.MASKED_MOVES:
            vector_access.masked_move(self, recipe, instruction)
            return
        if instruction.mnemonic in vector_access.BYTE_MOVES:
            vector_access.byte_move(self, recipe, instruction)
            return
        if instruction.is_vsib and instruction.op0_kind == OpKind.REGISTER:
            vector_access.gather(self, recipe, instruction)
            return
        if instruction.is_vsib or any(
            instruction.op_kind(i)
            in (OpKind.MEMORY_SEG_DI, OpKind.MEMORY_SEG_EDI, OpKind.MEMORY_SEG_RDI, OpKind.MEMORY_SEG_SI,
                OpKind.MEMORY_ESDI, OpKind.MEMORY_ESEDI, OpKind.MEMORY_ESRDI, OpKind.MEMORY_SEG_ESI,
                OpKind.MEMORY_SEG_RSI)
            for i in range(instruction.op_count)
        ):  # fmt: skip
            recipe.ends = Missing()
            return
        memory = any(instruction.op_kind(i) == OpKind.MEMORY for i in range(instruction.op_count))
        reads: set[int] = set()
        writes: set[int] = set()
        high = False
        for used in info.used_registers():
            register = used.register
            if register in HIGH_BYTES:
                high = True
            full = RegisterExt.full_register(register)
            if full in GPR:
                number, size = GPR.get(register, (0, 1))
                number = GPR[full][0]
                if used.access in _READS or (used.access in _WRITES and size < 4 and size > 0):
                    reads.add(number)
                if used.access in _WRITES:
                    writes.add(number)
        if self.mode.bits == 64 and not memory and not (reads | writes) & (DISPLACED | {RSP}):
            offsets = self._offsets
            patch = (offsets.immediate_offset, offsets.immediate_size, IMMEDIATE) if offsets.has_immediate else None
            recipe.op(self._raw, patch)
            recipe.shared = not self._counts_flags(instruction)
            return
        is_lea = instruction.mnemonic == Mnemonic.LEA
        if is_lea:
            self._lea(recipe, instruction)
            return
        if high and not memory and RSP in reads | writes:
            self._high_byte_with_rsp(recipe, instruction)
        elif memory:
            operand = next(i for i in range(instruction.op_count) if instruction.op_kind(i) == OpKind.MEMORY)
            access = info.op_access(operand)
            self._with_memory(recipe, instruction, access, high)
        else:
            self._op(recipe, instruction, self._substituted(instruction, reads, writes, (S2, S1)))

    def _lea(self, recipe: Recipe, instruction: Instruction) -> None:
        number, size = GPR[instruction.op0_register]
        target = STACK if number == RSP else number
        if instruction.is_ip_rel_memory_operand and size == 8 and number not in DISPLACED | {RSP}:
            recipe.absolute("r10", None)
            recipe.op(asm(f"mov {name(number, 8)}, r10"))
            recipe.shared = True
            return
        self.address(recipe, instruction, segmented=False)
        recipe.shared = not self._baked
        slot = number in DISPLACED
        if size == 2:
            if slot:
                recipe.op(asm(f"mov [rsp+GPR_R{number}], r10w"))
            else:
                recipe.op(asm(f"mov {name(target, 2)}, r10w"))
        elif slot:
            recipe.op(asm(("mov r10d, r10d\n" if size == 4 else "") + f"mov [rsp+GPR_R{number}], r10"))
        else:
            recipe.op(asm(f"mov {name(target, size)}, {'r10' if size == 8 else 'r10d'}"))

    def _high_byte_with_rsp(self, recipe: Recipe, instruction: Instruction) -> None:
        """MOVZX, MOVSX and CRC32 of AH to BH into rsp: r15 wants a REX prefix, so the byte comes from a slot."""
        host = instruction.copy()
        for i in range(host.op_count):
            register = host.op_register(i)
            if register in HIGH_BYTES:
                recipe.code(f"mov [rsp+SLOT], {_NAMES[HIGH_BYTES[register]]}")
                host.set_op_kind(i, OpKind.MEMORY)
                host.memory_base = Register.RSP
                host.memory_displacement = SLOT + 1
                host.memory_displ_size = 8
        recipe.op(self._substituted(host, set(), set(), ()))

    def _with_memory(self, recipe: Recipe, instruction: Instruction, access: int, high: bool) -> None:
        mnemonic = instruction.mnemonic
        if mnemonic in XSAVE_FAMILY:
            memory_forms.xsave(self, recipe, instruction)
            return
        if access == OpAccess.NO_MEM_ACCESS:
            return
        write = access in _WRITES
        size = MemorySizeExt.size(instruction.memory_size)
        if mnemonic in _BIT_STRING and instruction.op1_kind == OpKind.REGISTER:
            memory_forms.bit_string_address(self, recipe, instruction, size)
            recipe.check(size, write=write)
            recipe.op(memory_forms.bit_string_op(self, instruction))
            return
        else:
            self.address(recipe, instruction)
        if size == 0:
            recipe.ends = Missing()
            return
        recipe.check(size, write=write, judged=priority.may_fault_before(instruction))
        if recipe.distant and not recipe.addressed and instruction.memory_index != Register.NONE:
            self._add_base(recipe, instruction.memory_base)
        slotted = sum(number in DISPLACED for number in self._explicit_registers(instruction))
        recipe.takes_form = slotted <= 1 and not high and not memory_forms.has_pointers(instruction)
        body = self.on_host_address(instruction, high, write, access in _READS, size, recipe)
        self._op(recipe, instruction, body)
        memory_forms.hide_pointers(recipe, instruction)

    def _add_base(self, recipe: Recipe, base: RegisterNumber) -> None:
        """r10, the distance from linear to host addresses, becomes that of the base from the host's."""
        if base != Register.NONE:
            number = GPR[base][0]
            recipe.code(f"lea r10, [r10+{name(STACK if number == RSP else number, 8)}]")

    def _op(self, recipe: Recipe, instruction: Instruction, code: bytes) -> None:
        """Add the instruction as it was encoded last, within `code`, and share the recipe if all constants allow."""
        offsets, raw = self._offsets, self._raw
        patch = None
        if offsets.has_immediate:
            at, size = offsets.immediate_offset, offsets.immediate_size
            encoded, place = self._encoded
            if (
                place is None
                or place[1] != size
                or offsets.has_immediate2
                or encoded[place[0] : place[0] + size] != raw[at : at + size]
            ):
                self._baked = True
            else:
                patch = (code.index(encoded) + place[0], size, IMMEDIATE)
        recipe.op(code, patch)
        recipe.shared = not self._baked and not self._counts_flags(instruction)

    def _counts_flags(self, instruction: Instruction) -> bool:
        """Whether an immediate decides which flags change."""
        return instruction.mnemonic in _SHIFTS and self._offsets.has_immediate

    def on_host_address(
        self,
        instruction: Instruction,
        high: bool,
        write: bool,
        read: bool,
        size: int,
        recipe: Recipe | None = None,
        *,
        displaced: bool = True,
    ) -> bytes:
        """The instruction with its memory operand where the check of `recipe` has it, which is [r10] without one.

        Other operands get r11 where they need it.
        """
        host = instruction.copy()
        if recipe is not None and recipe.distant and host.memory_index != Register.NONE:
            host.memory_base = Register.R10
        elif recipe is not None and recipe.distant:
            host.memory_index = Register.R10
            host.memory_index_scale = 1
            if host.memory_base == Register.RSP:
                host.memory_base = BY_SIZE[8][STACK]
        else:
            host.memory_index_scale = 1
            offset = recipe.before if recipe is not None else 0
            host.memory_base = Register.R10
            host.memory_index = Register.NONE
            host.memory_displacement = offset
            host.memory_displ_size = 8 if offset else 0
        host.segment_prefix = Register.NONE
        if instruction.code in _MOFFS:
            host.code = _MOFFS[instruction.code]
        if not displaced:
            return self.encode(host)
        numbers = self._explicit_registers(instruction)
        slotted = [n for n in numbers if n in DISPLACED]
        written = [n for n in slotted if numbers[n][1]]
        if not high and len(slotted) <= 1:
            reads = {n for n in slotted if numbers[n][0]}
            return self._substituted(host, reads, set(written), (S2,))
        # No register is left, or a high byte register forbids a REX prefix: go through a slot.
        host.memory_base = Register.RSP
        host.memory_displacement = SLOT
        host.memory_displ_size = 8
        before = _copy(size, "r10", f"rsp+{SLOT}") if read or (write and size > 8) else b""
        after = _copy(size, f"rsp+{SLOT}", "r10") if write else b""
        keep = asm(f"mov [rsp+{SLOT_ADDRESS}], r10") if write else b""
        back = asm(f"mov r10, [rsp+{SLOT_ADDRESS}]") if write else b""
        reads = {n for n in slotted if numbers[n][0]}
        body = self._substituted(host, reads, set(written), (S1, S2))
        return before + keep + body + back + after

    def _explicit_registers(self, instruction: Instruction) -> dict[int, tuple[bool, bool]]:
        """Register operands: number -> (read, written)."""
        info = self._info.info(instruction)
        out: dict[int, tuple[bool, bool]] = {}
        for i in range(instruction.op_count):
            if instruction.op_kind(i) != OpKind.REGISTER:
                continue
            register = instruction.op_register(i)
            if register not in GPR:
                continue
            number, size = GPR[register]
            access = info.op_access(i)
            read = access in _READS or size < 4
            write = access in _WRITES
            old = out.get(number, (False, False))
            out[number] = (old[0] or read, old[1] or write)
        return out

    def _substituted(
        self, instruction: Instruction, reads: set[int], writes: set[int], scratch: tuple[int, ...]
    ) -> bytes:
        """Encode with slotted registers in `scratch` registers, loaded before and stored after as needed."""
        host = instruction.copy()
        host.code = _IN_64BIT_MODE.get(host.code, host.code)
        displaced_reads = sorted(reads & DISPLACED)
        displaced_writes = sorted(writes & DISPLACED)
        places: dict[int, int] = {}
        free = list(scratch)
        # A register only read may share with one only written: operands are read before results are written.
        for number in displaced_reads:
            places[number] = free.pop(0)
        shared = [places[n] for n in displaced_reads if n not in displaced_writes]
        for number in displaced_writes:
            if number not in places:
                places[number] = free.pop(0) if free else shared.pop(0)
        for i in range(host.op_count):
            if host.op_kind(i) != OpKind.REGISTER:
                continue
            register = host.op_register(i)
            if register in GPR:
                number, size = GPR[register]
                if number == RSP:
                    host.set_op_register(i, BY_SIZE[size][STACK])
                elif number in places:
                    host.set_op_register(i, BY_SIZE[size][places[number]])
        loads = b"".join(asm(f"mov r{places[n]}, [rsp+GPR_R{n}]") for n in displaced_reads)
        stores = b"".join(asm(f"mov [rsp+GPR_R{n}], r{places[n]}") for n in displaced_writes)
        return loads + self.encode(host) + stores

    def encode(self, instruction: Instruction) -> bytes:
        """The host's encoding; the instruction must not be relative to its address."""
        encoder = self._encoder
        encoder.encode(instruction, 0)
        out: bytes = encoder.take_buffer()
        if self._offsets.has_immediate:
            made = encoder.get_constant_offsets()
            place = (made.immediate_offset, made.immediate_size) if made.has_immediate else None
            self._encoded = (out, place)
        return out

    # -- control transfers ----------------------------------------------------------------------------------

    def _control(self, recipe: Recipe, instruction: Instruction) -> None:
        kind = instruction.flow_control
        flow = control_flow if self.mode.bits == 64 else legacy_flow
        if kind == FlowControl.UNCONDITIONAL_BRANCH and instruction.is_jmp_short_or_near:
            recipe.ends = Jump(branches.is_narrow(instruction))
            recipe.shared = True
        elif kind == FlowControl.CONDITIONAL_BRANCH:
            branches.conditional(self, recipe, instruction)
        elif kind == FlowControl.CALL and instruction.is_call_near:
            flow.call(self, recipe, instruction)
        elif kind in (FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL) and not (
            instruction.is_jmp_far_indirect or instruction.is_call_far_indirect
        ):
            flow.indirect(self, recipe, instruction, call=kind == FlowControl.INDIRECT_CALL)
            recipe.shared = not self._baked
        elif kind == FlowControl.RETURN and instruction.mnemonic == Mnemonic.RET:
            flow.near_return(self, recipe, instruction)
        elif instruction.mnemonic in (Mnemonic.UD0, Mnemonic.UD1, Mnemonic.UD2):
            recipe.ends = Raise(6)
        else:
            recipe.ends = CallOut()


_BIT_STRING = {Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC}

_NAMES = ("rax", "rcx", "rdx", "rbx", "r15", "rbp", "rsi", "rdi")
"""Host names of guest registers 0 to 7 (rsp is in r15)."""

def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _copy(size: int, source: str, target: str) -> bytes:
    """Copy a small operand between two places through r11."""
    lines = []
    for width, part, at in _pieces(size):
        lines.append(f"mov {part}, {width} [{source}+{at}]\n mov {width} [{target}+{at}], {part}")
    return asm("\n".join(lines))


def _pieces(size: int) -> list[tuple[str, str, int]]:
    out, at = [], 0
    for step, width, part in ((8, "qword", "r11"), (4, "dword", "r11d"), (2, "word", "r11w"), (1, "byte", "r11b")):
        while size - at >= step:
            out.append((width, part, at))
            at += step
    return out
