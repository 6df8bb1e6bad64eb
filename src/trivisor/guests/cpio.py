"""Writer for cpio archives in the "newc" format, which the kernel unpacks into its first root file system.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import NamedTuple

_HEADER = b"070701" + b"%08X" * 13
"""Magic, and the fields: inode, mode, owner, group, links, time, size, two devices, length of the name, checksum."""
_TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """One file of the archive; `mode` holds type and permissions as in stat(2)."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""


def directory(name: str, permissions: int = 0o755) -> Entry:
    """Return a directory; its parent must come earlier in the archive."""
    return Entry(name, stat.S_IFDIR | permissions)


def regular(name: str, data: bytes, permissions: int = 0o644) -> Entry:
    """Return a regular file."""
    return Entry(name, stat.S_IFREG | permissions, data)


def symlink(name: str, target: str) -> Entry:
    """Return a symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """Return a character device node."""
    return Entry(name, stat.S_IFCHR | permissions, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive: owned by root, dated 1970, so that equal input gives equal bytes."""
    parts: list[bytes] = []
    for inode, entry in enumerate(entries, 1):
        parts += _record(entry, inode)
    parts += _record(Entry(_TRAILER, 0), 0)
    return b"".join(parts)


def _record(entry: Entry, inode: int) -> list[bytes]:
    name = entry.name.encode() + b"\0"
    major, minor = entry.device
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
    header = _HEADER % fields + name
    return [header, _padding(len(header)), entry.data, _padding(len(entry.data))]


def _padding(length: int) -> bytes:
    return bytes(-length % 4)
