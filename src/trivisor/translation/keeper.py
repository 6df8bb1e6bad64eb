"""Keeping one processor's translations: taking those of earlier runs, and writing down this one's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trivisor.machine.jobs import Jobs
from trivisor.translation import kept
from trivisor.translation.assembled import PIECES
from trivisor.x86.cpuid import xsave_area

if TYPE_CHECKING:
    from trivisor.translation.block_store import BlockStore

WORTH_WRITING, WORTH_WRITING_RESTORED = 1000, 100
"""Translated blocks of a run that make it worth writing a file, if they are also...  Restored guests are in a hurry."""
WORTH_REWRITING = 0.02
"""... this share of those that the file has."""


def host_kind(features: Collection[str], xcr0: int) -> bytes:
    """A digest of what translations depend on of the host.

    `features` are those of the guest's processor, and `xcr0` has the components that are in the host's registers.
    """
    return hashlib.sha256(f"{sorted(features)} {xcr0} {xsave_area(xcr0)}".encode()).digest()


class _Found(NamedTuple):
    """What there is of earlier runs."""

    guest: bytes
    archive: kept.Archive | None
    borrowed: bool
    """The archive is that of the boot."""
    state: str


class Keeper:
    """The translations of one guest in a directory of such files, read while all else is made."""

    def __init__(self, directory: Path, host: bytes, guest: Callable[[], bytes], booted: bytes = b"") -> None:
        """`host` is its kind (`host_kind`); `guest` gives a digest of what is booted, and is called in another thread.

        Of a restored guest it is another, and `booted` is that of its boot, whose
        translations serve until there is a file of its own.  That one has what was
        used alone, without the boot, and so is read in less time.
        """
        kept.translator_version()  # looks into many files: too often in want of the GIL for another thread
        self._directory = directory
        self._host = host
        self._booted = booted
        self._reading = Jobs([lambda: self._read(guest())])
        self._worth = WORTH_WRITING_RESTORED if booted else WORTH_WRITING
        self._written = 0
        self._found: _Found | None = None
        self._blocks: BlockStore | None = None
        self.state = ""
        """What was found of earlier runs, in a few words."""

    def _read(self, guest: bytes) -> _Found:
        archive, borrowed = None, False
        try:
            archive = kept.load(self._file(guest), self._identity(guest))
            if archive is None and self._booted:
                archive = kept.load(self._file(self._booted), self._identity(self._booted))
                borrowed = archive is not None
        except kept.Ignored as reason:
            return _Found(guest, None, False, f"ignored: {reason}")
        return _Found(guest, archive, borrowed, "none yet" if archive is None else f"{archive.count - 1} blocks")

    def _file(self, guest: bytes) -> Path:
        return kept.file_for(self._directory, guest, self._host)

    def _identity(self, guest: bytes) -> bytes:
        return kept.identity(guest, self._host)

    def serve(self, blocks: BlockStore) -> bytes:
        """Have a processor that has not run yet begin with what was found; the guest's digest.

        Raises what `guest` has raised.
        """
        (found,) = self._reading.results()
        self._found, self._blocks, self.state = found, blocks, found.state
        if found.archive is not None:
            blocks.adopt(found.archive)
        return found.guest

    def save(self) -> None:
        """Write this run's translations down, if they are worth it; `state` tells if that cannot be done."""
        PIECES.keep(self._directory)
        found, blocks = self._found, self._blocks
        assert found is not None
        assert blocks is not None
        new = blocks.made - self._written
        before = found.archive.count if found.archive is not None else 0
        if not found.borrowed and (new < self._worth or new < WORTH_REWRITING * before):
            return
        self._written = blocks.made
        what = blocks.collect(0 if found.borrowed else kept.LIMIT)
        try:
            kept.save(self._file(found.guest), self._identity(found.guest), *what)
        except OSError as error:
            self.state = f"{self.state}; cannot be written: {error.strerror or error}"

    def close(self) -> None:
        """Give the archive's memory back; after the processor's end."""
        for found in self._reading.cancel():
            if found.archive is not None:
                found.archive.close()
