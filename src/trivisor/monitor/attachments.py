"""Disks and the network, as the owner of a machine names them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Disk(NamedTuple):
    """A raw disk in a file or a block device of the host's."""

    path: Path
    readonly: bool = False


class Network(NamedTuple):
    """A user-mode network; `forwards` are pairs of a TCP port of the host's loopback and one of the guest's."""

    forwards: tuple[tuple[int, int], ...] = ()


DiskName = Disk | str | os.PathLike[str]
"""A disk, or "FILE[,readonly]"."""


def parse_disks(names: Sequence[DiskName]) -> tuple[Disk, ...]:
    """The disks so named."""
    return tuple(name if isinstance(name, Disk) else _disk(os.fspath(name)) for name in names)


def _disk(name: str) -> Disk:
    path, comma, option = name.rpartition(",")
    return Disk(Path(path), True) if comma and option == "readonly" else Disk(Path(name))


def parse_network(name: Network | str | None) -> Network | None:
    """The network so named, like "user,forward=8080:80"; raises ValueError."""
    if name is None or isinstance(name, Network):
        return name
    kind, *options = name.split(",")
    if kind != "user":
        raise ValueError(f"no network {kind!r}: there is user")
    return Network(tuple(_forward(option) for option in options))


def _forward(option: str) -> tuple[int, int]:
    found = re.fullmatch(r"forward=([0-9]{1,5}):([0-9]{1,5})", option)
    ports = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(0 < port <= 0xFFFF for port in ports):
        raise ValueError(f"{option!r} is not forward=HOSTPORT:GUESTPORT")
    return ports
