"""The chunks of a staged transfer, and the size of the staging buffer.

The content of a weight set is the memory of its tensors, one after the other in the layout's order. It is cut into
chunks, which go through the two halves of a staging buffer in turn.
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from weight_broker.layout import Layout
from weight_brokerd.cards.plan.blobs import Blob, Part
from weight_brokerd.cards.plan.extents import extents
from weight_brokerd.cards.plan.pieces import PADDED_BYTES, Placement

GRANULARITY_BYTES = 2 << 20
"""Halves are multiples of the driver's large pages, and so are more than `PADDED_BYTES`."""


class Chunk(NamedTuple):
    """A part of the content."""

    content_offset: int
    buffer_offset: int
    """Where the chunk begins in a staging buffer, on either side."""
    size: int

    @property
    def blob_bytes(self) -> int:
        """Bytes that the engine moves: small blobs are slow, so they get a tail without meaning."""
        return max(self.size, PADDED_BYTES)


def new_buffer_id() -> str:
    """A region id that is never used twice."""
    return f"staging-{secrets.token_hex(16)}"


def half_bytes(content_bytes: int, staging_bytes: int) -> int:
    """Half the size of a staging buffer for so much content; a whole buffer has at most `staging_bytes`."""
    pages = min(staging_bytes // 2 // GRANULARITY_BYTES, -(-content_bytes // GRANULARITY_BYTES))
    return max(pages, 1) * GRANULARITY_BYTES


def chunks(content_bytes: int, half: int) -> list[Chunk]:
    """The chunks in the order in which they move, alternating between both halves."""
    return [
        Chunk(begin, index % 2 * half, min(half, content_bytes - begin))
        for index, begin in enumerate(range(0, content_bytes, half))
    ]


class DirectContent:
    """The content of a weight set that lies in regions."""

    def __init__(self, layout: Layout, placements: Sequence[Placement]) -> None:
        """Raises `TooScattered`."""
        self._parts = [
            Part(region, at + offset, size)
            for spec, (region, at) in zip(layout, placements, strict=True)
            for offset, size in extents(spec)
        ]
        self._ends = list(accumulate(part.size for part in self._parts))

    def parts(self, chunk: Chunk) -> tuple[Part, ...]:
        """Where a chunk's bytes lie, in order."""
        parts = []
        at, end = chunk.content_offset, chunk.content_offset + chunk.size
        index = bisect_right(self._ends, at)
        while at < end:
            part, part_end = self._parts[index], self._ends[index]
            size = min(end, part_end) - at
            parts.append(Part(part.region, part.offset + part.size - (part_end - at), size))
            at += size
            index += 1
        return tuple(parts)


def buffer_blob(chunk: Chunk) -> Blob:
    """The chunk in a staging buffer that is the only region."""
    return Blob(chunk.blob_bytes, (Part(0, chunk.buffer_offset, chunk.blob_bytes),))


def direct_blob(chunk: Chunk, parts: tuple[Part, ...]) -> Blob:
    """The chunk where it lies in regions."""
    return Blob(chunk.blob_bytes, parts)


def like(parts: tuple[Part, ...], chunk: Chunk) -> tuple[Blob, ...]:
    """The chunk in a staging buffer that is the only region, cut as `parts` is."""
    at = chunk.buffer_offset
    blobs = []
    for part in parts:
        blobs.append(Blob(part.size, (Part(0, at, part.size),)))
        at += part.size
    return tuple(blobs)
