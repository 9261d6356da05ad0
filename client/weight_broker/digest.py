"""Content digests, by which the bytes that arrived are compared with the published bytes.

A digest covers a tensor block by block and then the block digests in order, so that a flipped bit, two exchanged
blocks and two exchanged tensors all change it. Full coverage uses XXH3 where the xxhash package is installed: hashing
a block that a copy has just brought into the cache costs a fraction of the copy (benchmarks/ has the ratio). Without
it, CRC-32 from the standard library covers a sample. Device memory is digested in place, with MULTILINEAR_64.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weight_broker import multilinear

if TYPE_CHECKING:
    from typing_extensions import Buffer

_xxh3_64: Callable[[Buffer], int] | None
try:
    from xxhash import xxh3_64_intdigest as _xxh3_64
except ImportError:  # the base installation has grpcio and protobuf only
    _xxh3_64 = None

FULL_BLOCK_BYTES = 512 * 1024
SAMPLE_BLOCK_BYTES = 4096
SAMPLE_BLOCKS = 8
GLANCE_BLOCK_BYTES = 64
"""Block of a sample that only shows whether anything was written."""


class DigestAlgorithm(enum.StrEnum):
    XXH3_64 = "xxh3_64"
    CRC32 = "crc32"
    MULTILINEAR_64 = "multilinear_64"


class DigestCoverage(enum.StrEnum):
    """How much of each tensor is covered."""

    FULL = "full"
    SAMPLED = "sampled"


@dataclass(frozen=True, slots=True)
class ContentDigests:
    """Digests of all tensors of a layout, in its order; 0 for aliases and tensors without elements."""

    algorithm: DigestAlgorithm
    coverage: DigestCoverage
    block_bytes: int
    values: tuple[int, ...]


def is_available(algorithm: DigestAlgorithm) -> bool:
    """True if this process can compute `algorithm` for host memory."""
    if algorithm is DigestAlgorithm.MULTILINEAR_64:
        return multilinear.is_available()
    return algorithm is DigestAlgorithm.CRC32 or _xxh3_64 is not None


def block_function(algorithm: DigestAlgorithm) -> Callable[[Buffer], int]:
    """The function over one block (anything with the buffer protocol)."""
    if algorithm is DigestAlgorithm.XXH3_64:
        if _xxh3_64 is None:
            raise RuntimeError("XXH3 digests need the xxhash package")
        return _xxh3_64
    if algorithm is DigestAlgorithm.MULTILINEAR_64:
        if not multilinear.is_available():
            raise RuntimeError("MULTILINEAR_64 digests of host memory need NumPy")
        return multilinear.digest
    return zlib.crc32


def combine(algorithm: DigestAlgorithm, blocks: Sequence[int]) -> int:
    """The digest of a tensor from the digests of its blocks in order."""
    return block_function(algorithm)(struct.pack(f"<{len(blocks)}Q", *blocks))


def sampled_blocks(content_bytes: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the blocks of a sample: all of a small tensor; else the first, the last and evenly spaced
    blocks between them."""
    count = -(-content_bytes // block_bytes)
    if count <= SAMPLE_BLOCKS:
        indices: Sequence[int] = range(count)
    else:
        indices = [index * (count - 1) // (SAMPLE_BLOCKS - 1) for index in range(SAMPLE_BLOCKS)]
    for index in indices:
        offset = index * block_bytes
        yield offset, min(block_bytes, content_bytes - offset)
