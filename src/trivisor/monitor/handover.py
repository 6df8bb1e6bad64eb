"""A running machine goes on under another technique: its processor is exchanged, all else stays where it is."""

from __future__ import annotations

from trivisor.machine.vcpu import Vcpu
from trivisor.monitor.assembly import Assembly, make_vcpu
from trivisor.monitor.keeping import keeper_for
from trivisor.monitor.plan import Hardware
from trivisor.monitor.techniques import TechniqueUnavailable
from trivisor.pc import Pc
from trivisor.x86.msr import IA32_TIME_STAMP_COUNTER

EXCHANGEABLE = ("translation", "hardware")
"""Techniques whose guests cannot tell one from the other; a PV domain is another machine altogether."""


def change_technique(machine: Assembly, technique: str, hardware: Hardware) -> None:
    """Put a processor of `technique` in the place of the one that is there, which must not be running.

    The new one has the old one's state, time-stamp counter, CPUID and subscribers.
    Raises `TechniqueUnavailable`, and leaves everything as it was, when this host
    cannot go on so.
    """
    old = machine.vcpu
    board = machine.board
    if {old.technique, technique} - {*EXCHANGEABLE} or not isinstance(board, Pc):
        raise TechniqueUnavailable(f"a guest of technique {old.technique} cannot go on under {technique}")
    new = _successor(old, board, technique, hardware, keep=bool(machine.kept_as))
    if machine.keeper is not None:
        machine.keeper.save()
    old.close()
    if machine.keeper is not None:
        machine.keeper.close()
    machine.vcpu = new
    machine.keeper = keeper_for(new, machine.kept_as, machine.booted_as)


def _successor(old: Vcpu, board: Pc, technique: str, hardware: Hardware, *, keep: bool) -> Vcpu:
    """The new processor, in the old one's state and with the board's wires."""
    state = old.state
    del state.msrs[IA32_TIME_STAMP_COUNTER]  # it goes on: the offset to the host's says how, to the cycle
    try:
        new = make_vcpu(technique, board, hardware, old.guest_cpuid, keep=keep)
        try:
            new.observed.update(old.observed)
            new.tsc_offset = old.tsc_offset
            new.state = state
        except BaseException:
            new.close()
            raise
    except ValueError as refusal:
        old.attach()
        raise TechniqueUnavailable(f"the guest cannot go on under {technique}: {refusal}") from None
    except BaseException:
        old.attach()
        raise
    return new
