"""The default guest: Debian's cloud kernel and its static busybox, as Debian ships them.

They are fetched once through the machine's own apt, and kept in the user's
cache directory (XDG Base Directory Specification) with a record of what they
are.  The record is written last, so a cache is whole or it is fetched again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trivisor.machine.user_cache import user_cache

if TYPE_CHECKING:
    from trivisor.guests.apt import Progress

_RECORD = "guest.json"
_ADVICE = "name a kernel IMAGE and --initrd"


class GuestUnavailable(RuntimeError):
    """The default guest is not in the cache and cannot be fetched; the message is one line for the user."""


class DefaultGuest(NamedTuple):
    """Where the default guest's files are; `version` is that of the kernel's Debian package."""

    kernel: Path
    busybox: Path
    version: str
    digest: bytes
    """SHA-256 of the kernel's file."""
    drivers: tuple[Path, ...] = ()
    """The kernel's modules for our devices, named like "xen-blkfront.ko"."""


def default_guest(progress: Progress = lambda what, part: None, *, drivers: bool = False) -> DefaultGuest:
    """Return the default guest, from the cache or else fetched; raises GuestUnavailable.

    `progress` is called only when it has to be fetched, with what is being done
    and the done part (0 to 1, or None).  Safe against other processes doing the
    same.  With `drivers`, a cache without them (an earlier version's) does not do.
    """
    cache = _cache_directory()
    guest = _cached(cache, drivers)
    if guest is not None:
        return guest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache, progress):
            return _cached(cache, drivers) or _fetch(cache, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise GuestUnavailable(f"cannot keep the default guest in {cache}: {reason}; {_ADVICE}") from error


def cached_guest() -> DefaultGuest | None:
    """The default guest if it is in the cache, whole."""
    try:
        return _cached(_cache_directory())
    except GuestUnavailable:
        return None


def _cache_directory() -> Path:
    try:
        return user_cache() / "debian"
    except RuntimeError as error:
        raise GuestUnavailable(f"no home directory to keep the default guest in; {_ADVICE}") from error


def _cached(cache: Path, drivers: bool = False) -> DefaultGuest | None:
    """Return what the record tells of, if the files still are as they were when their hashes were taken."""
    try:
        record = json.loads((cache / _RECORD).read_bytes())
        paths = []
        of_drivers = record["drivers"] if drivers else record.get("drivers", ())
        for known in (record["kernel"], record["busybox"], *of_drivers):
            path = cache / os.path.basename(known["name"])
            found = path.stat()
            if (found.st_size, found.st_mtime_ns) != (known["size"], known["mtime_ns"]):
                return None
            paths.append(path)
        digest = bytes.fromhex(record["kernel"]["sha256"])
        return DefaultGuest(paths[0], paths[1], str(record["version"]), digest, tuple(paths[2:]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _locked(cache: Path, progress: Progress) -> Iterator[None]:
    """Hold the cache's lock, which the kernel drops should this process die."""
    import fcntl

    with (cache / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another trivisor to fetch the guest", None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(cache: Path, progress: Progress) -> DefaultGuest:
    """Fetch, and move into the cache, the record last."""
    import shutil
    import tempfile

    from trivisor.guests import apt, packages

    if not apt.available():
        raise GuestUnavailable(f"no apt-get here to fetch the default guest with (Debian only): {_ADVICE}")
    for left_over in cache.glob("fetch-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as name:
        try:
            files = packages.fetch_files(Path(name), progress)
        except apt.AptError as error:
            raise GuestUnavailable(f"cannot fetch the default guest: {error}; {_ADVICE}") from error
        record = {
            "version": files.version,
            "kernel": _describe(files.kernel),
            "busybox": _describe(files.busybox),
            "drivers": [_describe(driver) for driver in files.drivers],
        }
        written = Path(name, _RECORD)
        written.write_text(json.dumps(record, indent=1))
        for file in (files.kernel, files.busybox, *files.drivers, written):
            file.replace(cache / file.name)
    guest = _cached(cache, True)
    if guest is None:
        raise GuestUnavailable(f"the files in {cache} do not stay as written; {_ADVICE}")
    return guest


def _describe(file: Path) -> dict[str, str | int]:
    import hashlib

    found = file.stat()
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"name": file.name, "size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": digest}
