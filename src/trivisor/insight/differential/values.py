"""Random operands with a liking for edges."""

from __future__ import annotations

from functools import cache
from random import Random
from struct import pack, pack_into

from trivisor.insight.differential.case import FPU_SIZE

_POOL_SIZE = 1 << 16


def integer(random: Random, bits: int) -> int:
    """An unsigned integer of `bits`; often near a power of two."""
    if random.random() < 0.45:
        return random.getrandbits(bits)
    edge = random.choice((0, 0, 1, 1 << random.randrange(bits), (1 << bits - 1), (1 << bits) - 1))
    return (edge + random.randrange(-2, 3)) & ((1 << bits) - 1)


_DOUBLES = (0.0, -0.0, 1.0, -1.5, 1e300, 1e-310, float("inf"), float("-inf"), float("nan"), 3.25, 2.0**63, -(2.0**31))


@cache
def _pool() -> bytes:
    """Bytes to cut data out of: random ones, integers at edges, and floating-point numbers."""
    random = Random("pool")
    out = bytearray()
    while len(out) < _POOL_SIZE:
        kind = random.random()
        if kind < 0.3:
            out += random.randbytes(16)
        elif kind < 0.5:
            out += pack("<2Q", integer(random, 64), integer(random, 64))
        elif kind < 0.6:
            out += pack("<4I", *(integer(random, 32) for _ in range(4)))
        elif kind < 0.7:
            out += bytes(16)
        elif kind < 0.85:
            out += pack("<2d", random.choice(_DOUBLES), random.uniform(-1e6, 1e6))
        else:
            out += pack("<4f", random.uniform(-100, 100), 1.0, float("nan"), random.choice((0.0, -0.0, 1e-40)))
    return bytes(out[:_POOL_SIZE])


def pool_slice(random: Random, length: int) -> bytes:
    """`length` bytes of the pool."""
    pool = _pool()
    at = random.randrange(0, _POOL_SIZE - length, 8)
    return pool[at : at + length]


def fpu_image(random: Random) -> bytes:
    """An XSAVE area in standard format with x87, SSE and AVX state."""
    image = bytearray(FPU_SIZE)
    control = 0x37F if random.random() < 0.7 else 0x37F & ~random.getrandbits(6) | random.randrange(4) << 10
    status = random.randrange(8) << 11 if random.random() < 0.6 else 0
    if random.random() < 0.3:
        status |= random.getrandbits(4) << 8 & 0x4700
    tags = random.choice((0, 0xFF, random.getrandbits(8)))
    mxcsr = 0x1F80
    if random.random() < 0.3:
        mxcsr = random.getrandbits(16) & 0xFFC0 | 0x1F80
        if random.random() < 0.3:
            mxcsr &= ~(random.getrandbits(6) << 7)
    pack_into("<HHBB", image, 0, control, status, tags, 0)
    pack_into("<II", image, 24, mxcsr, 0xFFFF)
    for number in range(8):
        mantissa, exponent = random.getrandbits(63) | 1 << 63, random.choice((0x3FFF, 0x4000, 0xC005, 0x3FF0))
        if random.random() < 0.25:
            mantissa, exponent = integer(random, 64), random.choice((0, 0x7FFF, 0xFFFF, 0x3FFF))
        pack_into("<QH", image, 32 + 16 * number, mantissa, exponent)
    image[160:416] = pool_slice(random, 256)
    image[576:832] = pool_slice(random, 256)
    pack_into("<Q", image, 512, 7)
    return bytes(image)
