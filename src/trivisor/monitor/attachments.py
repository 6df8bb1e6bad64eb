"""Disks, as the owner of a machine names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw disk in a file or a block device of the host's."""

    path: Path
    readonly: bool = False


DiskName = Disk | str | os.PathLike[str]
"""A disk, or "FILE[,readonly]"."""


def parse_disks(names: Sequence[DiskName]) -> tuple[Disk, ...]:
    """The disks so named."""
    return tuple(name if isinstance(name, Disk) else _disk(os.fspath(name)) for name in names)


def _disk(name: str) -> Disk:
    path, comma, option = name.rpartition(",")
    return Disk(Path(path), True) if comma and option == "readonly" else Disk(Path(name))
