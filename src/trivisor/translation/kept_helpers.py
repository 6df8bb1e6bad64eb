"""The native helpers of an earlier run: assembling them takes longer than all else that a start is made of.

The file is machine code, and is taken under the rules of `kept`; its name is the
digest of what it was assembled from and for.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from trivisor.translation import kept
from trivisor.translation.natives import Helpers, assembled_helpers

_SUFFIX = ".helpers"
_LIMIT = 4 << 20


def kept_helpers(directory: Path, xsave_mask: int, supervision: str = "") -> Helpers:
    """`assembled_helpers`, from a file in `directory` if there is one, else with one left there for the next run."""
    identity = hashlib.sha256(kept.translator_version() + b"helpers %d" % xsave_mask + supervision.encode())
    path = directory / (identity.hexdigest()[:32] + _SUFFIX)
    with suppress(OSError, kept.Ignored, ValueError):
        return _read(path)
    made = assembled_helpers(xsave_mask, supervision)
    body = json.dumps(made.labels).encode() + b"\0" + made.code
    with suppress(OSError):  # no place for it: the next run assembles again
        kept.write_checked(path, body)
    return made


def _read(path: Path) -> Helpers:
    """Raises OSError, Ignored or ValueError for what cannot be taken."""
    labels, _, code = kept.read_checked(path, _LIMIT).partition(b"\0")
    return Helpers(code, json.loads(labels))
