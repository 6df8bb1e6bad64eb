"""Theory: an instruction of a feature that the guest's CPUID does not tell of raises #UD in the guest, whatever the
host has, as on a processor without it (Intel SDM 2A, CPUID; 3A 6.15, #UD).

The decoder's own table says which instructions there are and what they need.  Each is put into a slot of its own; the
guest's handler of #UD counts and goes on with the next slot, and an instruction that ran comes to the HLT behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from iced_x86 import Code, Decoder, DecoderOptions, Encoder, Instruction, OpCodeOperandKind, OpKind, Register

from tests.unit.translation.engine.guest import DATA, Machine, Make
from trivisor.machine.cpuid import COPIED
from trivisor.machine.exits import Halt
from trivisor.pc import Pc
from trivisor.translation.cpu import TranslationVcpu
from trivisor.x86.cpuid import CpuChoice

SLOTS, SLOT = 0x400000, 32
HANDLER = """
    hlt
undefined:
    inc {a}
    and {word} [{sp}], -32
    add {word} [{sp}], 32
    {iret}
"""
_WORDS = {
    32: {"a": "eax", "word": "dword", "sp": "esp", "iret": "iretd"},
    64: {"a": "rax", "word": "qword", "sp": "rsp", "iret": "iretq"},
}

_OLDER = ("TZCNT", "LZCNT", "WBNOINVD")
"""Their bytes mean something without the feature too, since F3 before them then says nothing."""
_NOTHING = (
    "NOP", "RESERVEDNOP", "ENDBR64", "ENDBR32", "RDSSPD", "RDSSPQ", "CLDEMOTE",
    *(name.partition("_")[0] for name in vars(Code) if name.startswith("PREFETCH")),
)  # fmt: skip
"""Hints, in the part of the opcode map that has always been no-operations."""
_UNKNOWN_OPERANDS = {
    "MOVDIR64B", "ENQCMD", "ENQCMDS", "MONTMUL", "VMASKMOVDQU", "VPERMIL2PS", "VPERMIL2PD", "VP4DPWSSD", "VP4DPWSSDS",
    "V4FMADDPS", "V4FMADDSS", "V4FNMADDPS", "V4FNMADDSS", "XSTORE", "XSHA1", "XSHA256",
}  # fmt: skip
"""Few, with operands that `_operand` knows nothing of."""
_NEEDED = {"fpu", "tsc", "cx8", "cmov", "mmx", "fxsr", "sse", "sse2"}
"""What 64-bit code cannot be without."""

_REGISTERS = {
    "AL": "AL", "CL": "CL", "AX": "AX", "DX": "DX", "EAX": "EAX", "RAX": "RAX", "ST0": "ST0", "STI": "ST1",
    "R8": "CL", "R16": "CX", "R32": "ECX", "R64": "RCX", "MM": "MM1", "K": "K1", "KP1": "K2", "BND": "BND1",
    "XMM": "XMM{}", "YMM": "YMM{}", "ZMM": "ZMM{}", "TMM": "TMM{}",
}  # fmt: skip
_IMMEDIATES = {
    "IMM8": OpKind.IMMEDIATE8, "IMM16": OpKind.IMMEDIATE16, "IMM32": OpKind.IMMEDIATE32,
    "IMM8SEX16": OpKind.IMMEDIATE8TO16, "IMM8SEX32": OpKind.IMMEDIATE8TO32, "IMM8SEX64": OpKind.IMMEDIATE8TO64,
    "IMM32SEX64": OpKind.IMMEDIATE32TO64,
}  # fmt: skip
_CODES = {name: code for name, code in vars(Code).items() if isinstance(code, int)}
_KINDS = {number: name for name, number in vars(OpCodeOperandKind).items() if isinstance(number, int)}


def _mnemonic(name: str) -> str:
    first, _, rest = name.partition("_")
    return rest.partition("_")[0] if first in ("VEX", "EVEX", "XOP", "D3NOW", "MVEX") else first


def _operand(instruction: Instruction, number: int, kind: str, bits: int) -> None:
    """Give operand `number` some value of its kind, if that is one that is known."""
    first = kind.partition("_")[0]
    if kind in _IMMEDIATES:
        twice = any(instruction.op_kind(i) == OpKind.IMMEDIATE8 for i in range(number))
        instruction.set_op_kind(number, OpKind.IMMEDIATE8_2ND if twice else _IMMEDIATES[kind])
        if not twice:
            instruction.set_immediate_i32(number, 1)
    elif "MEM" in kind:
        instruction.set_op_kind(number, OpKind.MEMORY)
        instruction.memory_base = Register.RBX if bits == 64 else Register.EBX
        if "VSIB" in kind:
            instruction.memory_index = getattr(Register, f"{kind[kind.index('VSIB') + 6]}MM2")
        elif kind == "SIBMEM":
            instruction.memory_index = Register.RCX
    elif first in _REGISTERS:
        instruction.set_op_kind(number, OpKind.REGISTER)
        instruction.set_op_register(number, getattr(Register, _REGISTERS[first].format(number + 1)))
    elif kind.startswith("XBEGIN"):
        instruction.set_op_kind(number, OpKind.NEAR_BRANCH64 if bits == 64 else OpKind.NEAR_BRANCH32)
        instruction.near_branch64 = SLOTS


def _lacking(available: frozenset[int], bits: int) -> Iterator[tuple[str, Instruction]]:
    """One of each instruction that the decoder knows and a processor with these features has not, by name."""
    for name, code in _CODES.items():
        instruction = Instruction()
        instruction.code = code  # type: ignore[assignment]
        info = instruction.op_code()
        if not (info.is_instruction and (info.mode64 if bits == 64 else info.mode32)):
            continue
        if info.decoder_option != DecoderOptions.NONE or _mnemonic(name) in _NOTHING + _OLDER:
            continue
        if available.issuperset(instruction.cpuid_features()):
            continue
        for number, kind in enumerate(info.op_kinds()):
            _operand(instruction, number, _KINDS[int(kind)], bits)
        if info.require_op_mask_register:
            instruction.op_mask = Register.K1
        yield name, instruction


def _encoded(instruction: Instruction, rip: int, bits: int) -> bytes:
    """Its bytes at `rip`; none if they cannot be made or are decoded as something else."""
    encoder = Encoder(bits)
    try:
        encoder.encode(instruction, rip)
    except ValueError:
        return b""
    raw: bytes = encoder.take_buffer()
    return raw if Decoder(bits, raw, ip=rip).decode().code == instruction.code else b""


def _without(*removed: str) -> Callable[[Pc], TranslationVcpu]:
    choice = CpuChoice(removed=frozenset(removed))
    return lambda board: TranslationVcpu(board, choice)


@pytest.mark.parametrize(("bits", "removed"), [(32, set()), (64, COPIED - _NEEDED)], ids=["usual", "least"])
def test_what_cpuid_does_not_tell_of_is_undefined(machine: Make, bits: int, removed: set[str]) -> None:
    m: Machine = machine(HANDLER.format(**_WORDS[bits]), bits, processor=_without(*removed))
    m.gate(6, "undefined")
    names, unmade, at = [], set(), SLOTS
    for name, instruction in _lacking(m.vcpu.blocks.translator.features, bits):
        if raw := _encoded(instruction, at, bits):
            m.memory.write(at, raw.ljust(SLOT, b"\xf4"))
            names.append(name)
            at += SLOT
        else:
            unmade.add(_mnemonic(name))
    m.memory.write(at, b"\xf4")
    m.vcpu.memory_written(SLOTS, at + 1 - SLOTS)
    assert unmade <= _UNKNOWN_OPERANDS
    assert len(names) > 1000, "the decoder knows AVX-512, which is never there"
    ran = []
    where, undefined = SLOTS, 0
    while True:
        assert isinstance(m.run(where, rax=0, rbx=DATA), Halt)
        undefined += m["rax"]
        place = (m.core.linear_rip - 1 - SLOTS) // SLOT
        if place == len(names):
            break
        ran.append(names[place])
        where = SLOTS + SLOT * (place + 1)
    assert not ran
    assert undefined == len(names)


def test_counts_of_zeros_are_bit_scans_without_their_features(machine: Make) -> None:
    """The bytes of TZCNT and LZCNT are BSF's and BSR's with a prefix that says nothing (SDM 2A, LZCNT and TZCNT)."""
    source = f"""
        mov r8d, 0x50
        tzcnt eax, r8d
        lzcnt ecx, r8d
        mov dword [{DATA}], 0x600
        tzcnt edx, [{DATA}]
        lzcnt r10, [{DATA}]
        wbnoinvd
        hlt
    """
    m = machine(source, processor=_without("bmi1", "abm", "wbnoinvd"))
    m.halt()
    assert (m["rax"], m["rcx"], m["rdx"], m["r10"]) == (4, 6, 9, 10)


def test_features_that_every_guest_has_are_there(machine: Make) -> None:
    m = machine(
        """
        mov ecx, 0xc0000103         ; IA32_TSC_AUX
        mov eax, 0x1234567
        xor edx, edx
        wrmsr
        rdpid rbx
        rdpid r11
        serialize
        wbnoinvd
        mov ecx, 1
        xgetbv
        hlt
        """
    )
    m.halt()
    assert (m["rbx"], m["r11"]) == (0x1234567, 0x1234567)
    assert m["rax"] & ~m.core.xcr0 == 0 and m["rdx"] == 0
