"""Where the user's own files that can be made again are kept (XDG Base Directory Specification)."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Our directory in the user's cache, which may not be there yet; RuntimeError without a home directory."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "trivisor"
