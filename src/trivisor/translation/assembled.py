"""The pieces of code that the engine assembles as it needs them, and what earlier runs have made of them.

A run whose translations are kept (`kept`) still asks for some hundreds of pieces, which take longer to assemble
than all that it has left to translate.  The file is machine code, and is taken under the rules of `kept`; the pieces
are found by digests of their text, since all of them have the same symbols.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trivisor.translation import kept
from trivisor.translation.layout import SYMBOLS

_SUFFIX = ".pieces"
_LIMIT = 16 << 20
_MOST = 4096
"""How many pieces a file has; beyond, those that were not asked for the longest time are left out."""
_WORTH_WRITING = 0.1
"""New pieces, as a share of all, that make it worth writing the file again: some are never asked for twice."""


class Piece(NamedTuple):
    """Machine code that can stand anywhere, and the offsets of its labels."""

    code: bytes
    labels: dict[str, int]


class Pieces:
    """The pieces of one process, by digests of their text."""

    def __init__(self) -> None:
        self._used: dict[str, Piece] = {}
        self._others: dict[str, tuple[str, dict[str, int]]] = {}
        """Those of the file that nobody has asked for in this process, the code in hexadecimal."""
        self._new = 0
        self._kept_in: Path | None = None

    def assembled(self, source: str) -> Piece:
        """64-bit code whose symbols are the state block's fields; raises AssemblyError."""
        key = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
        piece = self._used.get(key)
        if piece is None:
            known = self._others.pop(key, None)
            piece = self._assemble(source) if known is None else Piece(bytes.fromhex(known[0]), known[1])
            self._used[key] = piece
        return piece

    def _assemble(self, source: str) -> Piece:
        from trivisor.x86.assembler import assemble  # slow to import, and not needed when everything is kept

        self._new += 1
        program = assemble(source, bits=64, symbols=SYMBOLS)
        return Piece(program.code, program.labels)

    def take_kept(self, directory: Path) -> None:
        """Know the pieces that are kept in `directory`, once; `keep` adds to them."""
        if self._kept_in == directory:
            return
        self._kept_in = directory
        with suppress(OSError, kept.Ignored, ValueError):
            self._others = json.loads(kept.read_checked(self._file(directory), _LIMIT))

    def keep(self, directory: Path) -> None:
        """Write them down for later runs, if they are kept there and enough of them are new."""
        count = len(self._used) + len(self._others)
        if self._kept_in != directory or self._new <= _WORTH_WRITING * count:
            return
        self._new = 0
        used = {key: (piece.code.hex(), piece.labels) for key, piece in self._used.items()}
        newest = list({**self._others, **used}.items())[-_MOST:]
        with suppress(OSError):  # no place for it: later runs assemble again
            kept.write_checked(self._file(directory), json.dumps(dict(newest)).encode())

    @staticmethod
    def _file(directory: Path) -> Path:
        identity = hashlib.sha256(kept.translator_version() + b"pieces")
        return directory / (identity.hexdigest()[:32] + _SUFFIX)


PIECES = Pieces()
"""This process's."""
assembled = PIECES.assembled
