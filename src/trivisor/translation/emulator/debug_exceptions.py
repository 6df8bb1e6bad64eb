"""Debug exceptions: what they leave in DR6 (Intel SDM 3B, 17.2.3)."""

from __future__ import annotations

from trivisor.translation.core import Core
from trivisor.x86.control import DR6_BS
from trivisor.x86.exceptions import DEBUG, GuestException
from trivisor.x86.flags import TF

_HITS = 0xF


def debug_exception(core: Core, bits: int) -> GuestException:
    """#DB for `bits` of DR6: those of the breakpoints are set anew, the others added."""
    core.dr[6] = core.dr[6] & ~_HITS | bits
    return GuestException(DEBUG)


def trap_by_flags_now(core: Core) -> None:
    """SYSCALL and SYSRET trap at their end by the TF that they have loaded, not by the one before."""
    core.debug.step_trap = False
    if core.rflags & TF:
        core.debug.pending |= DR6_BS
