"""MULTILINEAR_64: a digest that a device computes with plain integer arithmetic, the same everywhere.

The content is read as 32-bit little-endian words, the last one filled up with zero bytes. With the odd 64-bit
multipliers m0, m1, ... (the sequence of splitmix64 from `SEED`, lowest bit set):

    digest = (length * m0 + word0 * m1 + word1 * m2 + ...) mod 2**64

Every position has its own multiplier, so bytes that arrive at the wrong place count as much as wrong bytes. Words
have half the multipliers' width on purpose: the product of a 64-bit word's highest bit with any odd number is the same,
so that two flipped sign bits would cancel out. It finds errors; it does not resist deliberate collisions.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from typing_extensions import Buffer

SEED = 0x7765696768742062
GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
MASK = (1 << 64) - 1
WORD_BYTES = 4


def multiplier(index: int) -> int:
    """The multiplier m`index`."""
    mixed = (SEED + (index + 1) * GAMMA) & MASK
    for shift, factor in MIX:
        mixed = ((mixed ^ (mixed >> shift)) * factor) & MASK
    return (mixed ^ (mixed >> LAST_SHIFT)) | 1


@cache
def is_available() -> bool:
    """Whether this process can compute it for host memory: NumPy is installed."""
    return find_spec("numpy") is not None


def digest(content: Buffer) -> int:
    """The digest of a block of host memory."""
    import numpy

    octets = numpy.frombuffer(memoryview(content), numpy.uint8)
    whole = octets.size // WORD_BYTES
    factors = _multipliers(1 << max(whole + 2, 1024).bit_length())
    words = octets[: whole * WORD_BYTES].view("<u4")
    total: int = octets.size * int(factors[0]) + int(numpy.dot(words.astype(numpy.uint64), factors[1 : whole + 1]))
    rest = octets[whole * WORD_BYTES :].tobytes()
    total += int.from_bytes(rest, "little") * int(factors[whole + 1])
    return total & MASK


@cache
def _multipliers(count: int) -> numpy.ndarray:
    """m0 to m`count - 1`. Asked for in powers of two, so that few tables are kept."""
    import numpy

    mixed = numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(GAMMA) + numpy.uint64(SEED)
    for shift, factor in MIX:
        mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
    mixed = (mixed ^ (mixed >> numpy.uint64(LAST_SHIFT))) | numpy.uint64(1)
    mixed.setflags(write=False)
    return mixed
