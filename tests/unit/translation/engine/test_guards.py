"""x87, MMX, SSE, AVX and XSAVE under CR0.TS, EM, MP, CR4.OSFXSR, OSXSAVE and XCR0 (SDM 3A 2.5 and 13.1)."""

from __future__ import annotations

import pytest

from tests.unit.translation.engine.guest import Machine, Make

BP, UD, NM = 3, 6, 7
MP, EM, TS = 2, 4, 8
OSFXSR, OSXSAVE = 1 << 9, 1 << 18
X87, WAIT, MMX, SSE, MMX_OF_SSE, CONTROL, FXSAVE, AVX, XSAVE, FREE, BMI = (
    "fld1", "wait", "paddb mm0, mm1", "addps xmm0, xmm1", "pavgb mm0, mm1", "ldmxcsr [esi]", "fxsave [esi]",
    "vaddps ymm0, ymm0, ymm1", "xsave [esi]", "mfence", "andn eax, ecx, edx",
)  # fmt: skip


def under(machine: Make, code: str, bits: int, cr0: int, cr4: int, xcr0: int, cpl: int = 3) -> Machine:
    """A program of one instruction, with bits of CR0 set, of CR4 cleared, and of XCR0 alone left."""
    m = machine(f"nop\n here: {code}\n int3", bits, cpl=cpl)
    if not m.vcpu.xcr0_supported & 4:
        pytest.skip("the host has no AVX")
    state = m.initial_state(cpl)
    state.cr0 = state.cr0 & ~MP | cr0
    state.cr4 &= ~cr4
    state.xcr0 &= xcr0
    state.gpr[6] = 0x300000
    m.memory.write_u32(0x300000, 0x1F80)
    m.vcpu.state = state
    return m


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize(
    ("code", "cr0", "cr4", "xcr0", "vector"),
    [
        (X87, TS, 0, 7, NM), (X87, EM, 0, 7, NM), (X87, MP, OSFXSR | OSXSAVE, 1, None),
        (WAIT, TS, 0, 7, None), (WAIT, EM, 0, 7, None), (WAIT, TS | MP, 0, 7, NM),
        (MMX, TS, 0, 7, NM), (MMX, EM | TS, 0, 7, UD), (MMX, 0, OSFXSR, 7, None), ("emms", TS, 0, 7, NM),
        (SSE, TS, 0, 7, NM), (SSE, EM | TS, 0, 7, UD), (SSE, TS, OSFXSR, 7, UD), (SSE, 0, OSXSAVE, 1, None),
        (MMX_OF_SSE, TS, OSFXSR, 7, NM), (MMX_OF_SSE, EM, 0, 7, UD), (MMX_OF_SSE, 0, OSFXSR, 7, None),
        (CONTROL, TS, 0, 7, NM), (CONTROL, 0, OSFXSR, 7, UD),
        (FXSAVE, TS, 0, 7, NM), (FXSAVE, EM, 0, 7, NM), (FXSAVE, 0, OSFXSR, 7, None),
        (AVX, TS, 0, 7, NM), (AVX, EM, 0, 7, None), (AVX, TS, OSXSAVE, 7, UD), (AVX, TS, 0, 3, UD),
        (AVX, 0, OSFXSR, 7, None),
        (XSAVE, TS, 0, 7, NM), (XSAVE, 0, OSXSAVE, 7, UD), (XSAVE, 0, OSFXSR, 1, None),
        (FREE, TS | EM, OSFXSR | OSXSAVE, 1, None), (BMI, TS | EM, OSFXSR | OSXSAVE, 1, None),
    ],
)  # fmt: skip
def test_what_faults(machine: Make, bits: int, code: str, cr0: int, cr4: int, xcr0: int, vector: int | None) -> None:
    m = under(machine, code, bits, cr0, cr4, xcr0)
    frame = m.fault()
    if vector is None:
        assert frame.vector == BP
    else:
        assert (frame.vector, frame.error, frame.rip) == (vector, None, m.labels["here"])


def test_nothing_is_asked_when_all_is_on(machine: Make) -> None:
    m = under(machine, SSE, 64, MP, 0, 7)
    assert not m.vcpu.mode.guarded
    assert not m.vcpu.mode.no_avx


def test_flags_live_through_the_look(machine: Make) -> None:
    m = under(machine, "stc\n addps xmm0, xmm1\n setc al", 64, 0, OSXSAVE, 1)
    assert m.fault(rax=0).vector == BP
    assert m["rax"] == 1
    m = under(machine, "stc\n vaddps xmm0, xmm0, xmm1", 64, 0, OSXSAVE, 7)
    assert m.fault().rflags & 1


def test_clts_and_cr4_take_effect_at_once(machine: Make) -> None:
    code = "addps xmm0, xmm1\n int3\n here2: clts\n jmp here"
    m = under(machine, code, 64, TS, 0, 7, cpl=0)
    assert m.fault().vector == NM
    m.core.rip = m.labels["here2"]
    m.vcpu.state = m.vcpu.state
    assert m.fault().vector == BP
