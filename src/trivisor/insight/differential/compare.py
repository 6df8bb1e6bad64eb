"""What is different about two results, less what need not be the same."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from iced_x86 import (
    Decoder,
    Formatter,
    FormatterSyntax,
    Instruction,
    MemorySizeExt,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)
from iced_x86 import RflagsBits as Flag

from trivisor.insight.differential.case import DATA, Case, Layout, Result, State
from trivisor.insight.differential.tables import X87
from trivisor.machine.cpuid import AMD
from trivisor.machine.state import GPR_NAMES
from trivisor.translation.translator.vector_access import BYTE_MOVES
from trivisor.x86.cpuid import EBX, ECX, EDX, host_cpuid

END = -1
_STACK_FAULT, _GENERAL_PROTECTION, _PAGE_FAULT, _FLOATING_POINT = 12, 13, 14, 19
_OPERAND_FAULTS = (_STACK_FAULT, _GENERAL_PROTECTION, _PAGE_FAULT)
_WITH_ERROR_CODE = (10, 11, 12, 13, 17)
_FPU_IGNORED = (slice(6, 24), slice(28, 32), slice(416, 576))
"""x87 operation and its addresses, MXCSR_MASK, unused bytes and XSAVE's header."""
_FPU_COMPARED = (slice(0, 6), slice(24, 28), slice(32, 416), slice(576, 832))
_UPPER_VECTORS = (slice(288, 416), slice(704, 832))
"""XMM8 to XMM15 and their upper halves: VZEROUPPER of 32-bit code zeroes them too in the translator."""
_X87_STATE = slice(2, 160)
_MXCSR_FLAGS = 24
_RFLAGS = {
    Flag.OF: 0x800, Flag.SF: 0x80, Flag.ZF: 0x40, Flag.AF: 0x10, Flag.CF: 1, Flag.PF: 4, Flag.DF: 0x400
}  # fmt: skip
_FLAG_NAMES = {0x800: "OF", 0x400: "DF", 0x80: "SF", 0x40: "ZF", 0x10: "AF", 4: "PF", 1: "CF", 0x40000: "AC",
               0x200000: "ID", 0x4000: "NT", 0x200: "IF"}  # fmt: skip
_COMPARED_FLAGS = 0x244CD5


@cache
def _host_is_amd() -> bool:
    return b"".join(host_cpuid(0)[i].to_bytes(4, "little") for i in (EBX, EDX, ECX)) == AMD.encode()


def differences(case: Case, layout: Layout, expected: Result, found: Result, *, fault_flags: bool) -> list[str]:
    """What is not the same, as lines of text; `fault_flags`: compare also the flags that a fault's frame shows."""
    return _Comparison(case, layout, expected, found, fault_flags).lines


class _Comparison:
    def __init__(self, case: Case, layout: Layout, expected: Result, found: Result, fault_flags: bool) -> None:
        self.case, self.expected, self.found, self.fault_flags = case, expected, found, fault_flags
        self.lines: list[str] = []
        self.addresses = layout.addresses
        self.faulting = self._instruction_at(expected) if expected.vector != END else None
        """The instruction that faulted on the host."""
        if self._has_two_faults() or self._is_of_amd_alone():
            return
        self._compare_ends()
        self._compare_registers()
        self._compare_fpu()
        if not self._may_have_written():
            self._compare_bytes("memory", DATA, expected.data, found.data)
        self._compare_bytes("code page", 0, expected.code_data, found.code_data)

    def _instruction_at(self, result: Result) -> Instruction | None:
        if result.rip not in self.addresses[:-1]:
            return None
        return self.case.items[self.addresses.index(result.rip)].instruction

    def _is(self, *mnemonics: int) -> bool:
        return self.faulting is not None and self.faulting.mnemonic in mnemonics

    def _may_have_written(self) -> bool:
        """Whether an instruction has faulted that stores in several steps, some of which may have been done."""
        return self._is(Mnemonic.ENTER, Mnemonic.PUSHA, Mnemonic.PUSHAD) or self._operand_size() >= 10

    def _is_large(self) -> bool:
        """Whether the operand is a state image, which processors access in an order of their own."""
        return self._operand_size() > 64 or (self._operand_size() > 10 and self._uses_x87())

    def _uses_x87(self) -> bool:
        return self.faulting is not None and _uses_x87(self.faulting)

    def _operand_size(self) -> int:
        return MemorySizeExt.size(self.faulting.memory_size) if self.faulting is not None else 0

    def _has_two_faults(self) -> bool:
        """Whether an instruction has two reasons to fault of which processors differ in what is first.

        That is an operand that is misaligned and beyond its segment's limit, a large operand of which several
        parts fault, one of CMPS's two operands, or a floating-point exception and a store's fault.
        """
        if self.found.vector not in _OPERAND_FAULTS or self.expected.rip != self.found.rip:
            return False
        if self.expected.vector in _OPERAND_FAULTS and (self._has_two_operands() or self._is_large()):
            return True
        misaligned = self.expected.vector == _GENERAL_PROTECTION and self._operand_size() >= 16
        return (misaligned and self.found.vector == _STACK_FAULT) or self.expected.vector == _FLOATING_POINT

    def _is_of_amd_alone(self) -> bool:
        """Whether it is XRSTOR of an image whose XSTATE_BV has bit 63: AMD's processors do not look at that one."""
        if self.found.vector != _GENERAL_PROTECTION or self.expected.rip == self.found.rip or not _host_is_amd():
            return False
        instruction = self._instruction_at(self.found)
        return instruction is not None and instruction.mnemonic in (Mnemonic.XRSTOR, Mnemonic.XRSTOR64)

    # -- the parts ------------------------------------------------------------------------------------------

    def _differ(self, what: str, native: object, translated: object) -> None:
        self.lines.append(f"  {what}: native {native}, translated {translated}")

    def _compare_ends(self) -> None:
        expected, found = self.expected, self.found
        if (expected.vector, expected.rip) != (found.vector, found.rip):
            self._differ("end", self._end(expected), self._end(found))
            return
        if expected.vector != _PAGE_FAULT:
            if expected.vector in _WITH_ERROR_CODE and expected.error != found.error:
                self._differ("error code", f"{expected.error:#x}", f"{found.error:#x}")
            return
        if self._is(*BYTE_MOVES):
            return
        mask = ~0 if self.case.user else ~4
        if expected.cr2 >> 63:
            mask &= ~1  # the host may have something there
        where = ~0 if self._is_exact() else ~0xFFF
        ours, theirs = (expected.error & mask, expected.cr2 & where), (found.error & mask, found.cr2 & where)
        if ours != theirs:
            self._differ("page fault", f"{ours[0]:#x} at {ours[1]:#x}", f"{theirs[0]:#x} at {theirs[1]:#x}")

    def _is_exact(self) -> bool:
        """Whether CR2 is the address of the operand's first missing byte, rather than the processor's choice."""
        if self.faulting is None:
            return True
        size = self._operand_size()
        return 0 < size < 28 and not (size > 10 and _uses_x87(self.faulting))

    def _has_two_operands(self) -> bool:
        """CMPS: which of two that fault does so first is the processor's choice."""
        return self._is(Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ)

    def _compare_registers(self) -> None:
        case, expected, found = self.case, self.expected, self.found
        count, mask = (16, (1 << 64) - 1) if case.bits == 64 else (8, (1 << 32) - 1)
        if self._is(Mnemonic.POPA, Mnemonic.POPAD):
            count = 0  # it may have got some of its registers
        for name, native, translated in zip(GPR_NAMES, expected.gpr[:count], found.gpr[:count], strict=False):
            if (native ^ translated) & mask and not (name == "rsp" and self._loses_stack_pointer()):
                self._differ(name, f"{native & mask:#x}", f"{translated & mask:#x}")
        if expected.selectors != found.selectors:
            self._differ("es, ss, ds, fs, gs", _hexadecimal(expected.selectors), _hexadecimal(found.selectors))
        compared = _COMPARED_FLAGS & ~self._uncertain_flags()
        if (expected.rflags ^ found.rflags) & compared:
            self._differ("flags", flag_text(expected.rflags & compared), flag_text(found.rflags & compared))

    def _loses_stack_pointer(self) -> bool:
        """Whether a floating-point exception struck an instruction that writes to rsp: AMD's family 17h then shows
        rsp as it was before pushes and pops in front of the instruction.
        """
        faulting = self.faulting
        if self.expected.vector != _FLOATING_POINT or faulting is None or faulting.op0_kind != OpKind.REGISTER:
            return False
        return RegisterExt.full_register(faulting.op0_register) == Register.RSP

    def _uncertain_flags(self) -> int:
        """RFLAGS bits that are not compared: at a fault, unless `fault_flags`, those that the rest of the block
        would overwrite before anyone could look at them.  Past a branch it is not known what reads them.
        """
        case, rip = self.case, self.expected.rip
        if self.expected.vector == END or self.fault_flags or rip not in self.addresses:
            return 0
        uncertain = read = 0
        branched = False
        for item in case.items[self.addresses.index(rip) :]:
            instruction = item.instruction
            if not branched:
                read |= instruction.rflags_read & ~uncertain
            branched = branched or item.target is not None
            uncertain |= instruction.rflags_modified & ~read
        return sum(bit for flag, bit in _RFLAGS.items() if uncertain & flag)

    def _compare_fpu(self) -> None:
        native, translated = self.expected.fpu, self.found.fpu
        if all(native[part] == translated[part] for part in _FPU_COMPARED):
            return
        one, other = bytearray(native), bytearray(translated)
        ignored = list(_FPU_IGNORED)
        if self.faulting is not None and self.faulting.is_vsib:
            return  # it may have got some of its elements; the translator commits all or none
        if self.faulting is not None and _uses_mmx(self.faulting):
            ignored.append(_X87_STATE)  # the top of stack and the tags may have been set already
        if self.case.bits != 64:
            ignored += _UPPER_VECTORS
        for part in ignored:
            one[part] = other[part] = bytes(part.stop - part.start)
        if self.expected.vector == _PAGE_FAULT:
            one[_MXCSR_FLAGS] |= 0x3F  # a conversion that goes to memory may have been done already
            other[_MXCSR_FLAGS] |= 0x3F
        self._compare_bytes("fpu", 0, bytes(one), bytes(other))

    def _compare_bytes(self, what: str, base: int, native: bytes, translated: bytes) -> None:
        if native == translated:
            return
        unequal = [i for i, (a, b) in enumerate(zip(native, translated, strict=True)) if a != b]
        start, last = unequal[0] & ~7, unequal[-1]
        end = min(last + 1, start + 32)
        self._differ(
            f"{what} {base + start:#x} to {base + last:#x}",
            native[start:end].hex(" "),
            translated[start:end].hex(" "),
        )

    def _end(self, result: Result) -> str:
        if result.vector == END:
            return "ran to its end"
        known = result.rip in self.addresses
        where = f"instruction {self.addresses.index(result.rip)}" if known else f"{result.rip:#x}"
        return f"exception {result.vector} at {where}"


def _uses_x87(instruction: Instruction) -> bool:
    return not X87.isdisjoint(instruction.cpuid_features()) or _uses_mmx(instruction)


def _uses_mmx(instruction: Instruction) -> bool:
    return any(
        instruction.op_kind(i) == OpKind.REGISTER and RegisterExt.is_mm(instruction.op_register(i))
        for i in range(instruction.op_count)
    )


def _hexadecimal(values: Iterable[int]) -> str:
    return " ".join(f"{value:#x}" for value in values)


def flag_text(value: int) -> str:
    """RFLAGS in hexadecimal and by names."""
    return f"{value:#x} " + " ".join(name for bit, name in _FLAG_NAMES.items() if value & bit)


def describe(case: Case, number: int = 0) -> list[str]:
    """The case as lines of text: the state before its run `number`, and the code."""
    formatter = Formatter(FormatterSyntax.INTEL)
    code, state = case.layout().code, case.states[number]
    lines = [f"  {case.bits}-bit code at CPL {3 if case.user else 0}, flags {flag_text(state.rflags)} {case.manner}"]
    if len(case.states) > 1:
        lines.append(f"  run {number + 1} of {len(case.states)} from different states")
    if case.segments:
        lines += [
            f"  {name} {one.selector:#x}: base {one.base:#x}, limit {one.limit:#x}, {one.attributes:#x}"
            for name, one in case.segments.items()
        ]
    else:
        lines.append(f"  fs base {case.fs_base:#x}, gs base {case.gs_base:#x}")
    lines += _describe_registers(state)
    for instruction in Decoder(case.bits, code, ip=case.rip):
        start = instruction.ip - case.rip
        raw = code[start : start + instruction.len].hex()
        lines.append(f"  {instruction.ip:#x}  {raw:<30} {formatter.format(instruction)}")
    return lines


def _describe_registers(state: State) -> list[str]:
    return [
        "  " + "  ".join(f"{GPR_NAMES[i]:>3} {state.gpr[i]:016x}" for i in range(at, at + 4))
        for at in range(0, 16, 4)
    ]
