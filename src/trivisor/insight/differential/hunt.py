"""Running many cases, comparing, and shrinking what differs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace

from iced_x86 import (
    CpuidFeature,
    Decoder,
    Formatter,
    FormatterSyntax,
    Instruction,
    MemorySizeExt,
    Mnemonic,
    OpKind,
    RegisterExt,
    RflagsBits,
)

from trivisor.insight.differential.case import DATA, GPR_NAMES, Case, Item, Result, Skipped
from trivisor.insight.differential.generator import LEAVE_FLAGS, MAY_DO_NOTHING, Generator
from trivisor.insight.differential.native import NativeHost
from trivisor.insight.differential.translated import TranslatedGuest
from trivisor.translation.recipe import asm, fragment
from trivisor.translation.vector_access import BYTE_MOVES

_END = -1
_PAGE_FAULT = 14
_RENEW = 4000
"""Cases for one virtual processor."""
_FPU_IGNORED = (slice(6, 24), slice(28, 32), slice(416, 576))
"""x87 operation and its addresses, MXCSR_MASK, unused bytes and XSAVE's header."""
_X87_STATE = slice(2, 160)
"""An MMX instruction that faults may have set the top of stack and the tags already."""
_MXCSR_FLAGS = 24
_X87 = {CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387, CpuidFeature.MMX}
_RFLAGS = {
    RflagsBits.OF: 0x800, RflagsBits.SF: 0x80, RflagsBits.ZF: 0x40, RflagsBits.AF: 0x10, RflagsBits.CF: 1,
    RflagsBits.PF: 4, RflagsBits.DF: 0x400,
}  # fmt: skip
_FLAG_NAMES = {0x800: "OF", 0x400: "DF", 0x80: "SF", 0x40: "ZF", 0x10: "AF", 4: "PF", 1: "CF", 0x40000: "AC",
               0x200000: "ID", 0x4000: "NT", 0x200: "IF"}  # fmt: skip
_COMPARED_FLAGS = 0x244CD5


@dataclass(slots=True)
class Difference:
    """A case that ends differently."""

    seed: str
    case: Case
    lines: list[str]

    def __str__(self) -> str:
        return "\n".join((f"seed {self.seed}", *describe(self.case), *self.lines))


@dataclass(slots=True)
class Report:
    """What a hunt found."""

    cases: int = 0
    instructions: int = 0
    codes: set[int] = field(default_factory=set)
    faults: Counter[int] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.cases / self.seconds if self.seconds else 0
        return (
            f"{self.cases} cases, {self.instructions} instructions, {len(self.codes)} opcodes, "
            f"{rate:.0f} cases a second; faults {dict(self.faults)}; not supported {self.skipped.total()}; "
            f"{len(self.differences)} differences"
        )


class Hunt:
    """Both sides, and the comparison."""

    def __init__(self) -> None:
        self.native = NativeHost.instance()
        self._guest: TranslatedGuest | None = None
        self._age = 0
        self.faults: Counter[int] = Counter()
        """Cases by the exception that they ended with; -1: none."""
        self.generator = Generator(self._renewed().vcpu.blocks.translator.features)

    def _renewed(self) -> TranslatedGuest:
        """The guest; a new one every so often, since it keeps what it made of all code."""
        if self._guest is None or self._age >= _RENEW:
            self.close()
            self._guest = TranslatedGuest()
            self._age = 0
        self._age += 1
        return self._guest

    def close(self) -> None:
        """Give host resources back."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None
            asm.cache_clear()
            fragment.cache_clear()

    def compare(self, case: Case) -> list[str]:
        """Run on both sides; lines that tell the differences.  Raises Skipped."""
        expected = self.native.run(case)
        self.faults[expected.vector] += 1
        try:
            found = self._renewed().run(case)
        except Skipped:
            raise
        except Exception as problem:
            self.close()
            return [f"  translated: {type(problem).__name__}: {problem}"]
        return differences(case, expected, found)

    def shrink(self, case: Case) -> Case:
        """Leave out instructions as long as there is a difference."""
        end = len(case.items)
        while end > 0:
            start = end - 1
            while start and case.items[start - 1].keep:
                start -= 1
            smaller = case
            for at in range(end - 1, start - 1, -1):
                smaller = without(smaller, at)
            try:
                if smaller.items and self.compare(smaller):
                    case = smaller
            except (Skipped, ValueError):
                pass
            end = start
        return case

    def try_one(self, seed: str, report: Report) -> None:
        """One case into the report."""
        case = self.generator.case(seed)
        report.cases += 1
        report.instructions += len(case.items)
        report.codes.update(item.instruction.code for item in case.items)
        report.faults = self.faults
        try:
            if self.compare(case):
                case = self.shrink(case)
                report.differences.append(Difference(seed, case, self.compare(case)))
        except Skipped as skipped:
            report.skipped[str(skipped).split()[0]] += 1


def run(seed: int, count: int, *, seconds: float | None = None, stop_after: int | None = None) -> Report:
    """Try cases `seed:0` to `seed:count-1`, or what can be done in `seconds`."""
    hunt = Hunt()
    report = Report()
    started = time.monotonic()
    try:
        for number in range(count):
            hunt.try_one(f"{seed}:{number}", report)
            if seconds is not None and time.monotonic() - started > seconds:
                break
            if stop_after is not None and len(report.differences) >= stop_after:
                break
    finally:
        hunt.close()
        report.seconds = time.monotonic() - started
    return report


def without(case: Case, number: int) -> Case:
    """The case less one instruction."""
    items = [
        Item(
            item.instruction.copy(),
            item.target if item.target is None or item.target <= number else item.target - 1,
            item.prefix,
            item.keep,
        )
        for at, item in enumerate(case.items)
        if at != number
    ]
    pokes = [(address, n if n <= number else n - 1) for address, n in case.pokes]
    return replace(case, items=items, pokes=pokes)


# -- comparing ----------------------------------------------------------------------------------------------


def differences(case: Case, expected: Result, found: Result) -> list[str]:
    """What is not the same, as lines of text."""
    lines: list[str] = []
    _, addresses = case.layout()
    if _faults_twice(case, expected, found, addresses):
        return lines

    def differ(what: str, native: object, translated: object) -> None:
        lines.append(f"  {what}: native {native}, translated {translated}")

    if (expected.vector, expected.rip) != (found.vector, found.rip):
        differ("end", _end(expected, addresses), _end(found, addresses))
    elif expected.vector == _PAGE_FAULT and not _is_byte_move(case, expected, addresses):
        mask = ~0 if case.user else ~4
        if expected.cr2 >> 63:
            mask &= ~1  # the host may have something there
        where = ~0 if _is_exact(case, expected, addresses) else ~0xFFF
        if (expected.error & mask, expected.cr2 & where) != (found.error & mask, found.cr2 & where):
            differ("page fault", f"{expected.error:#x} at {expected.cr2:#x}", f"{found.error:#x} at {found.cr2:#x}")
    for name, native, translated in zip(GPR_NAMES, expected.gpr, found.gpr, strict=True):
        if native != translated:
            differ(name, f"{native:#x}", f"{translated:#x}")
    mask = _COMPARED_FLAGS & ~_uncertain_flags(case, expected, addresses)
    if (expected.rflags ^ found.rflags) & mask:
        differ("flags", _flags(expected.rflags & mask), _flags(found.rflags & mask))
    one, other = bytearray(expected.fpu), bytearray(found.fpu)
    if _is_gather(case, expected, addresses):
        other = one  # it may have got some of its elements; the translator commits all or none
    for ignored in (*_FPU_IGNORED, _X87_STATE) if _is_mmx(case, expected, addresses) else _FPU_IGNORED:
        one[ignored] = other[ignored] = bytes(ignored.stop - ignored.start)
    if expected.vector == _PAGE_FAULT:
        one[_MXCSR_FLAGS] |= 0x3F  # a conversion that goes to memory may have been done already
        other[_MXCSR_FLAGS] |= 0x3F
    _bytes_differ(lines, "fpu", 0, bytes(one), bytes(other))
    if not _is_enter(case, expected, addresses):
        _bytes_differ(lines, "memory", DATA, expected.data, found.data)
    _bytes_differ(lines, "code page", 0, expected.code_data, found.code_data)
    return lines


def _uncertain_flags(case: Case, expected: Result, addresses: list[int]) -> int:
    """RFLAGS bits that are not compared: those that an instruction of `LEAVE_FLAGS` has left undefined.

    (What other instructions leave undefined is the same on both sides, since they run on the same processor.)

    At a fault also those that the rest of the block would overwrite before anyone could look at them: the
    translator does not keep them.
    """
    ran = addresses.index(expected.rip) if expected.rip in addresses else len(case.items)
    uncertain = skipped_to = 0
    for number, item in enumerate(case.items[:ran]):
        instruction = item.instruction
        skipped_to = max(skipped_to, item.target or 0)
        if number >= skipped_to and instruction.mnemonic not in MAY_DO_NOTHING:
            uncertain &= ~instruction.rflags_modified
        if instruction.mnemonic in LEAVE_FLAGS:
            uncertain |= instruction.rflags_undefined
    if expected.vector != _END:
        read = 0
        for item in case.items[ran:]:
            instruction = item.instruction
            read |= instruction.rflags_read & ~uncertain
            uncertain |= instruction.rflags_modified & ~read
    return sum(bit for flag, bit in _RFLAGS.items() if uncertain & flag)


def _faults_twice(case: Case, expected: Result, found: Result, addresses: list[int]) -> bool:
    """Whether an instruction has two reasons to fault: the translator looks for memory first.

    The others are misaligned vector operands, pending x87 exceptions, and x87 stores that raise one.
    """
    if found.vector != _PAGE_FAULT or found.rip not in addresses[:-1] or expected.vector == _PAGE_FAULT:
        return False
    instruction = case.items[addresses.index(found.rip)].instruction
    if _X87.issuperset(instruction.cpuid_features()):
        return True
    if expected.vector != 13 or expected.rip != found.rip:
        return False
    return _operand_size(case, expected, addresses) >= 16


def _operand_size(case: Case, result: Result, addresses: list[int]) -> int:
    """Bytes of the memory operand of the instruction that faulted."""
    instruction = _faulting(case, result, addresses)
    return 0 if instruction is None else MemorySizeExt.size(instruction.memory_size)


def _faulting(case: Case, result: Result, addresses: list[int]) -> Instruction | None:
    """The instruction that faulted."""
    if result.vector == _END or result.rip not in addresses[:-1]:
        return None
    return case.items[addresses.index(result.rip)].instruction


def _is_exact(case: Case, result: Result, addresses: list[int]) -> bool:
    """Whether the address of a page fault is that of the operand's first byte, rather than the processor's choice."""
    instruction = _faulting(case, result, addresses)
    if instruction is None:
        return True
    size = MemorySizeExt.size(instruction.memory_size)
    return size < 28 and not (size > 10 and _X87.issuperset(instruction.cpuid_features()))


def _is_byte_move(case: Case, result: Result, addresses: list[int]) -> bool:
    instruction = _faulting(case, result, addresses)
    return instruction is not None and instruction.mnemonic in BYTE_MOVES


def _is_gather(case: Case, result: Result, addresses: list[int]) -> bool:
    instruction = _faulting(case, result, addresses)
    return instruction is not None and instruction.is_vsib


def _is_mmx(case: Case, result: Result, addresses: list[int]) -> bool:
    """Whether the instruction that faulted uses an MMX register."""
    instruction = _faulting(case, result, addresses)
    if instruction is None:
        return False
    return any(
        instruction.op_kind(i) == OpKind.REGISTER and RegisterExt.is_mm(instruction.op_register(i))
        for i in range(instruction.op_count)
    )


def _is_enter(case: Case, expected: Result, addresses: list[int]) -> bool:
    """Whether the fault is one of ENTER, which may have written below the stack pointer before."""
    instruction = _faulting(case, expected, addresses)
    return instruction is not None and instruction.mnemonic == Mnemonic.ENTER


def _bytes_differ(lines: list[str], what: str, base: int, native: bytes, translated: bytes) -> None:
    if native == translated:
        return
    at = next(i for i, (a, b) in enumerate(zip(native, translated, strict=True)) if a != b)
    at &= ~7
    last = next(i for i in range(len(native) - 1, -1, -1) if native[i] != translated[i])
    end = min(last + 1, at + 32)
    lines.append(
        f"  {what} {base + at:#x} to {base + last:#x}: native {native[at:end].hex(' ')}, "
        f"translated {translated[at:end].hex(' ')}"
    )


def _end(result: Result, addresses: list[int]) -> str:
    where = f"instruction {addresses.index(result.rip)}" if result.rip in addresses else f"{result.rip:#x}"
    return "ran to its end" if result.vector == _END else f"exception {result.vector} at {where}"


def _flags(value: int) -> str:
    return f"{value:#x} " + " ".join(name for bit, name in _FLAG_NAMES.items() if value & bit)


def describe(case: Case) -> list[str]:
    """The case as lines of text."""
    formatter = Formatter(FormatterSyntax.INTEL)
    code, _ = case.layout()
    lines = [f"  CPL {3 if case.user else 0}, flags {_flags(case.rflags)}"]
    lines.append(f"  fs base {case.fs_base:#x}, gs base {case.gs_base:#x}")
    for at in range(0, 16, 4):
        lines.append("  " + "  ".join(f"{GPR_NAMES[i]:>3} {case.gpr[i]:016x}" for i in range(at, at + 4)))
    decoder = Decoder(64, code, ip=case.rip)
    for instruction in decoder:
        start = instruction.ip - case.rip
        raw = code[start : start + instruction.len].hex()
        lines.append(f"  {instruction.ip:#x}  {raw:<30} {formatter.format(instruction)}")
    return lines


__all__ = ["Difference", "Hunt", "Report", "describe", "differences", "run"]
