"""Guest physical memory: one host mapping, so that a host address is `base` plus the guest's physical one.

RAM is laid out as on every PC: up to 3 GiB from address 0, the hole for
memory-mapped I/O below 4 GiB, and the rest from 4 GiB upward.  The hole is
reserved address space without access, so that an address outside RAM can
never reach another mapping of the host's.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator

GIB = 1 << 30
MIB = 1 << 20
PAGE_SIZE = 4096
MINIMUM_RAM = 16 * MIB
MAXIMUM_RAM = 16 * GIB
LOW_RAM_LIMIT = 3 * GIB
"""RAM below 4 GiB ends here at the latest; the memory-mapped devices live between here and 4 GiB."""
HIGH_RAM_START = 4 * GIB
PHYSICAL_ADDRESS_BITS = 40
"""The width of guest physical addresses, as CPUID tells it under every technique."""

_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_HUGEPAGE = 14
_MARGIN = 2 * MIB
"""Reserved on either side of RAM, lest the kernel make one area of it and a neighbour; as large as a huge page."""


class GuestMemoryError(ValueError):
    """A physical address range that is not wholly RAM."""


def host_map(length: int, protection: int, *, at: int | None = None, descriptor: int = -1) -> int:
    """Map `length` bytes and return the host address; raises OSError.

    The memory is private and anonymous, or the shared memory of a `descriptor`.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE if descriptor < 0 else mmap.MAP_SHARED
    if at is not None:
        flags |= _MAP_FIXED
    address: int | None = _libc.mmap(at, length, protection, flags, descriptor, 0)
    if address is None or address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"cannot map {length >> 20} MiB of host memory")
    return address


def prefer_huge_pages(address: int, length: int) -> None:
    """Have the host back a mapping with large pages where it can: it is used from end to end."""
    _libc.madvise(address, length, _MADV_HUGEPAGE)


def host_unmap(address: int, length: int) -> None:
    """Give back what `host_map` returned."""
    _libc.munmap(address, length)


class GuestMemory:
    """The RAM of one machine.

    Addresses are guest physical byte addresses.  Every access is checked: one
    that leaves RAM raises `GuestMemoryError` and touches nothing.
    """

    def __init__(self, size: int) -> None:
        if not MINIMUM_RAM <= size <= MAXIMUM_RAM:
            raise ValueError(f"memory must be between 16M and 16G, not {size} bytes")
        if size % PAGE_SIZE:
            raise ValueError("memory must be a whole number of 4 KiB pages")
        self.size = size
        self.low_end = min(size, LOW_RAM_LIMIT)
        self.high_end = HIGH_RAM_START + size - self.low_end if size > self.low_end else 0
        self.span = self.high_end or self.low_end
        """Bytes of host address space from `base`, the hole included."""
        self.base = host_map(self.span + 2 * _MARGIN, _PROT_NONE) + _MARGIN
        for start, length in self.regions():
            host_map(length, mmap.PROT_READ | mmap.PROT_WRITE, at=self.base + start)
            prefer_huge_pages(self.base + start, length)
        self._closed = False
        self.view = memoryview((ctypes.c_ubyte * self.span).from_address(self.base)).cast("B")
        """The whole span; touching the hole through it is fatal, so check with `is_ram` first."""

    def close(self) -> None:
        """Give the memory back to the host; the object must not be used afterwards."""
        if not self._closed:
            self._closed = True
            self.view.release()
            host_unmap(self.base - _MARGIN, self.span + 2 * _MARGIN)

    def regions(self) -> Iterator[tuple[int, int]]:
        """Yield (start, length) of each piece of RAM, lowest first."""
        yield 0, self.low_end
        if self.high_end:
            yield HIGH_RAM_START, self.high_end - HIGH_RAM_START

    def is_ram(self, address: int, length: int = 1) -> bool:
        """Whether all of [address, address + length) is RAM."""
        end = address + length
        return 0 <= address <= end <= self.low_end or HIGH_RAM_START <= address <= end <= self.high_end

    def _check(self, address: int, length: int) -> None:
        if not self.is_ram(address, length):
            raise GuestMemoryError(f"guest physical {address:#x}+{length:#x} is not RAM")

    def read(self, address: int, length: int) -> bytes:
        """Return `length` bytes from physical `address`."""
        self._check(address, length)
        return bytes(self.view[address : address + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at physical `address`.

        Engines that keep translations must be told of writes behind their back:
        use `Vcpu.memory_written` after changing memory that may hold code.
        """
        self._check(address, len(data))
        self.view[address : address + len(data)] = data

    def read_u8(self, address: int) -> int:
        self._check(address, 1)
        return self.view[address]

    def read_u16(self, address: int) -> int:
        return int.from_bytes(self.read(address, 2), "little")

    def read_u32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little")

    def read_u64(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def write_u8(self, address: int, value: int) -> None:
        self.write(address, struct.pack("<B", value & 0xFF))

    def write_u16(self, address: int, value: int) -> None:
        self.write(address, struct.pack("<H", value & 0xFFFF))

    def write_u32(self, address: int, value: int) -> None:
        self.write(address, struct.pack("<I", value & 0xFFFFFFFF))

    def write_u64(self, address: int, value: int) -> None:
        self.write(address, struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF))
