"""Keeping one processor's translations: taking those of earlier runs, and writing down this one's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trivisor.translation import kept
from trivisor.translation.assembled import PIECES
from trivisor.translation.block_store import BlockStore

WORTH_WRITING, WORTH_WRITING_RESTORED = 1000, 100
"""Translated blocks of a run that make it worth writing a file, if they are also...  Restored guests are in a hurry."""
WORTH_REWRITING = 0.02
"""... this share of those that the file has."""


class Keeper:
    """The translations of one guest in a directory of such files; the guest has not run yet."""

    def __init__(self, blocks: BlockStore, directory: Path, guest: bytes, booted: bytes = b"") -> None:
        """`guest`: a digest of what is booted.

        Of a restored guest it is another, and `booted` is that of its boot, whose
        translations serve until there is a file of its own.  That one has what was
        used alone, without the boot, and so is read in less time.
        """
        self._blocks = blocks
        translator = blocks.translator
        features = sorted(map(int, translator.features))
        host = hashlib.sha256(f"{features} {translator.xsave_size} {blocks.native.xsave_mask}".encode()).digest()
        self._file = kept.file_for(directory, guest, host)
        self._identity = kept.identity(guest, host)
        self._archive: kept.Archive | None = None
        self._written = 0
        self._worth = WORTH_WRITING_RESTORED if booted else WORTH_WRITING
        self._borrowed = False
        """The archive is that of the boot."""
        try:
            self._archive = kept.load(self._file, self._identity)
            if self._archive is None and booted:
                self._archive = kept.load(kept.file_for(directory, booted, host), kept.identity(booted, host))
                self._borrowed = self._archive is not None
            self.state = "none yet" if self._archive is None else f"{self._archive.count - 1} blocks"
        except kept.Ignored as reason:
            self.state = f"ignored: {reason}"
        if self._archive is not None:
            blocks.adopt(self._archive)

    def save(self) -> None:
        """Write this run's translations down, if they are worth it; `state` tells if that cannot be done."""
        PIECES.keep()
        blocks = self._blocks
        new = blocks.made - self._written
        before = self._archive.count if self._archive is not None else 0
        if not self._borrowed and (new < self._worth or new < WORTH_REWRITING * before):
            return
        self._written = blocks.made
        try:
            kept.save(self._file, self._identity, *blocks.collect(0 if self._borrowed else kept.LIMIT))
        except OSError as error:
            self.state = f"{self.state}; cannot be written: {error.strerror or error}"

    def close(self) -> None:
        """Give the archive's memory back; after the processor's end."""
        if self._archive is not None:
            self._archive.close()
