"""The suite's list of what to run: `x86/unittests.cfg` (kvm-unit-tests, docs/unittests.md)."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from trivisor.machine.cpuid import OPTIONAL

DEFAULT_TIMEOUT = 90.0
"""Seconds, as in the suite's own runner."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table: a kernel and how it is to be run."""

    name: str
    kernel: Path
    arguments: str
    """The kernel's command line."""
    processors: int
    qemu: tuple[str, ...]
    """QEMU's own options, -cpu and -m among them."""
    architecture: str
    groups: tuple[str, ...]
    accelerator: str
    check: str
    """Host files that must have a value; all are of KVM's modules."""
    timeout: float

    def qemu_option(self, name: str) -> str:
        """The value of one of QEMU's options, or nothing."""
        try:
            return self.qemu[self.qemu.index(name) + 1]
        except (ValueError, IndexError):
            return ""

    @property
    def features(self) -> str:
        """What `-cpu` says of features and vendor, as "+a,-b,vendor=..."; "max" is all that there is."""
        model, *words = self.qemu_option("-cpu").split(",")
        everything = [f"+{name}" for name in sorted(OPTIONAL)] if model == "max" else []
        return ",".join([*everything, *(word for word in words if word.startswith(("+", "-", "vendor=")))])


def read_entries(build: Path) -> list[Entry]:
    """The entries of the build at `build`, in their order; OSError where there is none."""
    directory = build / "x86"
    entries: list[Entry] = []
    name, fields = "", dict[str, str]()
    for line in [*(directory / "unittests.cfg").read_text().splitlines(), "[]"]:
        if (heading := re.fullmatch(r"\[(.*)\]\s*", line)) is not None:
            if fields:
                entries.append(_entry(directory, name, fields))
            name, fields = heading[1], {}
        elif (field := re.fullmatch(r"\s*(\w+)\s*=\s*(.*?)\s*", line)) is not None:
            fields[field[1]] = field[2]
    return entries


def _entry(directory: Path, name: str, fields: dict[str, str]) -> Entry:
    arguments = _unquoted(fields.get("test_args", "")).replace("`date +%s`", str(int(time.time())))
    return Entry(
        name,
        directory / fields["file"],
        arguments,
        int(fields.get("smp", "1")),
        tuple(fields.get("qemu_params", fields.get("extra_params", "")).split()),
        fields.get("arch", ""),
        tuple(fields.get("groups", "").split()),
        fields.get("accel", ""),
        fields.get("check", ""),
        float(fields.get("timeout", DEFAULT_TIMEOUT)),
    )


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
