"""XSAVE and its family where PKRU is among the components: no host register holds it, so no host instruction does it.

Intel SDM 1, chapter 13; 2D, XSAVE, XSAVEC, XRSTOR.  The rest of the state is as the way out of translated code left
it, in the state block's own XSAVE area.
"""

from __future__ import annotations

from typing import NamedTuple

from iced_x86 import Code, Instruction

from trivisor.translation.core import RAX, RDX, Core
from trivisor.translation.emulator.contract import Cpu, Handler, has_feature
from trivisor.translation.emulator.control_instructions import write_pkru
from trivisor.translation.emulator.operands import (
    MASK32,
    MASK64,
    general_protection,
    in_64bit_mode,
    memory_address,
)
from trivisor.translation.layout import OFFSETS
from trivisor.x86.control import XCR0_AVX, XCR0_PKRU, XCR0_SSE, XCR0_X87

_HEADER, _LEGACY_AREA, _AVX_AREA = 512, 576, 256
_COMPACT = 1 << 63
_INITIAL_FCW, _INITIAL_MXCSR = 0x37F, 0x1F80
_MXCSR = 24
_MXCSR_MASK = 0xFFBF
"""Where MXCSR_MASK is zero (SDM 1, 11.6.6)."""
_FPU = OFFSETS["FPU"]


class _Piece(NamedTuple):
    """Part of a component: where it is in the area, and in the standard format."""

    component: int
    """Its bit, or bits, of which one has it saved."""
    at: int
    home: int
    length: int


def _requested(core: Core) -> int:
    """RFBM: the components that the instruction is about."""
    requested: int = core.xcr0 & ((core.regs[RDX] & MASK32) << 32 | core.regs[RAX] & MASK32)
    return requested


def _pieces(cpu: Cpu, requested: int, compact: int) -> list[_Piece]:
    """What of the area belongs to `requested`; `compact` is XCOMP_BV, or 0 for the standard format."""
    registers = 16 if in_64bit_mode(cpu.core) else 8
    pieces = [
        _Piece(XCR0_X87, 0, 0, 24),
        _Piece(XCR0_SSE if compact else XCR0_SSE | XCR0_AVX, _MXCSR, _MXCSR, 8),
        _Piece(XCR0_X87, 32, 32, 128),
        _Piece(XCR0_SSE, 160, 160, 16 * registers),
        _Piece(XCR0_AVX, _LEGACY_AREA, _LEGACY_AREA, 16 * registers),
        _Piece(XCR0_PKRU, _pkru_offset(cpu, compact), 0, 8),
    ]
    return [piece for piece in pieces if piece.component & requested]


def _pkru_offset(cpu: Cpu, compact: int) -> int:
    if compact:
        return _LEGACY_AREA + (_AVX_AREA if compact & XCR0_AVX else 0)
    return int(cpu.cpuid(0xD, 9)[1])


def _area(cpu: Cpu, instruction: Instruction, pieces: list[_Piece]) -> int:
    """The area's linear address, which must be aligned."""
    size = max([_LEGACY_AREA, *(piece.at + piece.length for piece in pieces)])
    linear = memory_address(cpu.core, instruction, size)
    if linear % 64:
        raise general_protection()
    return linear


def _own(core: Core, piece: _Piece) -> int:
    """What the processor has of a component; the last x87 instruction's pointers are zero."""
    if piece.component == XCR0_PKRU:
        return int(core.pkru)
    length = 8 if piece.home == 0 else piece.length
    start = _FPU + piece.home
    return int.from_bytes(core.bytes[start : start + length], "little")


def _in_use(core: Core) -> int:
    """XINUSE."""
    start = _FPU + _HEADER
    in_use = int.from_bytes(core.bytes[start : start + 8], "little")
    return in_use | (XCR0_PKRU if core.pkru else 0)


def _xsave(cpu: Cpu, instruction: Instruction) -> None:
    """XSAVE and XSAVEOPT, which may leave out what it knows to be in memory: here that is nothing."""
    core = cpu.core
    requested = _requested(core)
    pieces = _pieces(cpu, requested, 0)
    linear = _area(cpu, instruction, pieces)
    header = cpu.load(linear + _HEADER & MASK64, 8)
    _store(cpu, linear, pieces, header & ~requested | _in_use(core) & requested, 8)


def _xsavec(cpu: Cpu, instruction: Instruction) -> None:
    """The compacted format, of components that are not in their initial state."""
    core = cpu.core
    requested = _requested(core)
    in_use = _in_use(core)
    mxcsr = int.from_bytes(core.bytes[_FPU + _MXCSR : _FPU + _MXCSR + 4], "little")
    in_use = (in_use | (XCR0_SSE if mxcsr != _INITIAL_MXCSR else 0)) & requested
    form = requested | _COMPACT
    pieces = [piece for piece in _pieces(cpu, requested, form) if piece.component & in_use]
    _store(cpu, _area(cpu, instruction, pieces), pieces, form << 64 | in_use, 16)


def _store(cpu: Cpu, linear: int, pieces: list[_Piece], header: int, length: int) -> None:
    """All or nothing."""
    ranges = [(linear + piece.at & MASK64, piece.length, _own(cpu.core, piece)) for piece in pieces]
    ranges.append((linear + _HEADER & MASK64, length, header))
    for address, size, _ in ranges:
        cpu.probe_write(address, size)
    for address, size, value in ranges:
        cpu.store(address, size, value)


def _xrstor(cpu: Cpu, instruction: Instruction) -> None:
    core = cpu.core
    requested = _requested(core)
    linear = _area(cpu, instruction, _pieces(cpu, requested, 0))
    header = cpu.load(linear + _HEADER & MASK64, 64)
    saved, form = header & MASK64, header >> 64 & MASK64
    _check_header(cpu, saved, form, header >> 128)
    pieces = _pieces(cpu, requested, form)
    # MXCSR goes with SSE's bit in the compacted format alone.
    wanted = saved if form else saved | XCR0_SSE
    values = [
        cpu.load(linear + piece.at & MASK64, piece.length)
        if piece.component & saved or (piece.home == _MXCSR and piece.component & wanted)
        else _initial(piece)
        for piece in pieces
    ]
    for piece, value in zip(pieces, values, strict=True):
        if piece.home == _MXCSR and value & MASK32 & ~_mxcsr_mask(core):
            raise general_protection()
    for piece, value in zip(pieces, values, strict=True):
        if piece.component != XCR0_PKRU:
            length = 4 if piece.home == _MXCSR else piece.length
            start = _FPU + piece.home
            core.bytes[start : start + length] = (value & (1 << 8 * length) - 1).to_bytes(length, "little")
        elif value & MASK32 != core.pkru:
            write_pkru(cpu, value & MASK32)
    start = _FPU + _HEADER
    core.bytes[start] |= requested & (XCR0_X87 | XCR0_SSE | XCR0_AVX)  # each has its bytes now, initial or not


def _check_header(cpu: Cpu, saved: int, form: int, rest: int) -> None:
    """Raise #GP for a header that XRSTOR does not take (SDM 1, 13.8)."""
    xcr0 = cpu.core.xcr0
    if form & _COMPACT:
        components = form & ~_COMPACT
        wrong = not has_feature(cpu, "xsavec") or components & ~xcr0 or saved & ~components or rest
    else:
        wrong = saved & ~xcr0 or form or rest & MASK64
    if wrong:
        raise general_protection()


def _initial(piece: _Piece) -> int:
    """The initial state of a component's part."""
    if piece.home == _MXCSR:
        return _INITIAL_MXCSR
    return _INITIAL_FCW if piece.component == XCR0_X87 and piece.home == 0 else 0


def _mxcsr_mask(core: Core) -> int:
    start = _FPU + _MXCSR + 4
    return int.from_bytes(core.bytes[start : start + 4], "little") or _MXCSR_MASK


STRAIGHT: dict[int, Handler] = {
    **dict.fromkeys((Code.XSAVE_MEM, Code.XSAVE64_MEM, Code.XSAVEOPT_MEM, Code.XSAVEOPT64_MEM), _xsave),
    **dict.fromkeys((Code.XSAVEC_MEM, Code.XSAVEC64_MEM), _xsavec),
    **dict.fromkeys((Code.XRSTOR_MEM, Code.XRSTOR64_MEM), _xrstor),
}
