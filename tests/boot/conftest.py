"""What the boot tests share: the default guest, or the reason why there is none."""

from __future__ import annotations

import pytest

from trivisor.guests.debian import DefaultGuest, GuestUnavailable, default_guest


@pytest.fixture(scope="session")
def debian() -> DefaultGuest:
    """Debian's kernel and busybox, from the cache or fetched through apt."""
    try:
        return default_guest()
    except GuestUnavailable as reason:
        pytest.skip(str(reason))
