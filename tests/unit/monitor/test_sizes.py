"""Memory sizes."""

import pytest

from trivisor.monitor.sizes import parse_memory

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * MIB), ("512", 512 * MIB), ("1G", 1024 * MIB), ("1.5G", 1536 * MIB),
        ("16g", 16384 * MIB), ("65536K", 64 * MIB), ("64MiB", 64 * MIB), ("64MB", 64 * MIB),
        (64 * MIB, 64 * MIB),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "-512M", "512X", "lots", "15M", "17G", "0", "1e3M", "9" * 20 + "G", "16385K", 4096, "٣٢M"],
)
def test_nonsense_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="memory"):
        parse_memory(text)
