"""The three techniques, and which of them this version has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Technique:
    """One way to virtualise; `missing` says why it cannot be used, and is empty when it can."""

    name: str
    what: str
    missing: str = ""

    @property
    def available(self) -> bool:
        return not self.missing


TECHNIQUES = {
    technique.name: technique
    for technique in (
        Technique("translation", "full virtualization by binary translation"),
        Technique("hardware", "hardware-assisted virtualization"),
        Technique("paravirt", "paravirtualization (Xen PV guests)"),
    )
}


class TechniqueUnavailable(Exception):
    """The technique asked for is not in this version, or not on this host."""


def choose(name: str) -> Technique:
    """The technique to use for `name`, which may be "auto".

    ValueError for a name that is none; `TechniqueUnavailable` for one that
    cannot be had here.
    """
    if name == "auto":
        return next(technique for technique in TECHNIQUES.values() if technique.available)
    technique = TECHNIQUES.get(name)
    if technique is None:
        raise ValueError(f"technique {name!r} is none of auto, {', '.join(TECHNIQUES)}")
    if not technique.available:
        raise TechniqueUnavailable(f"technique {name}: {technique.missing}")
    return technique
