"""The translation engine's processor for ring 0 alone; see `machine.ring_zero`."""

from __future__ import annotations

from trivisor.machine.ring_zero import Controls, UserRegisters
from trivisor.machine.state import Segment
from trivisor.translation.core import CS, SS
from trivisor.translation.cpu import TranslationVcpu
from trivisor.translation.layout import OFFSETS
from trivisor.x86.flags import AC

_COUNT_CR3, _COUNT_INVALIDATION = (OFFSETS[name] // 8 for name in ("COUNT_CR3", "COUNT_INVALIDATION"))
_FPU = OFFSETS["FPU"]


class RingZero:
    """`vcpu`, which from now on comes back for 64-bit code of ring 3."""

    def __init__(self, vcpu: TranslationVcpu) -> None:
        self.vcpu = vcpu
        self._core = vcpu.core
        vcpu.stop_in_ring_3 = True
        self._core.words[OFFSETS["USER_ELSEWHERE"] // 8] = 1

    @property
    def user(self) -> UserRegisters:
        core = self._core
        segments = [Segment(v.selector, v.base, v.limit, v.attributes) for v in core.segments[:6]]
        xsave = bytes(core.bytes[_FPU : _FPU + self.vcpu.xsave_size])
        return UserRegisters(list(core.regs), core.linear_rip, core.rflags, segments, xsave)

    @user.setter
    def user(self, user: UserRegisters) -> None:
        core, segments = self._core, self._core.segments
        for index, value in enumerate(user.gpr):
            core.regs[index] = value
        changed = (core.rflags ^ user.rflags) & AC
        for number, (view, new) in enumerate(zip(segments, user.segments, strict=False)):
            changed |= number in (CS, SS) and view.attributes != new.attributes
            view.set(new.selector, new.base, new.limit, new.attributes)
        core.rflags, core.linear_rip = user.rflags, user.rip
        core.bytes[_FPU : _FPU + len(user.xsave)] = user.xsave
        if changed:
            self.vcpu.mode_changed()

    @property
    def controls(self) -> Controls:
        core = self._core
        return Controls(core.cr0, core.cr3, core.cr4, core.efer, core.xcr0)

    @property
    def interrupt_flag(self) -> bool:
        return bool(self._core.interrupt_flag)

    @property
    def interrupt_waits(self) -> bool:
        vcpu = self.vcpu
        return bool(vcpu.injected or vcpu.core.nmi_waiting or vcpu.board.interrupts.pending())

    @property
    def tlb_flushes(self) -> int:
        words = self._core.words
        return words[_COUNT_CR3] + words[_COUNT_INVALIDATION] + self.vcpu.flushes
