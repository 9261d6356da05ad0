"""The pieces and rounds of a transfer: the same blobs on both sides, in a form that the engine moves fast.

The engine sends blob by blob, and merges the blobs of a key through its own small buffer if they have 1 MiB or less on
average. So pieces that are neighbours on both sides become one blob, and small pieces are packed into a buffer of the
card process on both sides. Bytes that belong to no tensor never move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from weight_broker.layout import Layout
from weight_brokerd.cards.plan.blobs import Blob, Part
from weight_brokerd.cards.plan.extents import extents

SMALLEST_AVERAGE = 1 << 20
"""The blobs of a round have more bytes than this on average."""
PACK_BELOW = 64 << 10
"""Pieces of fewer bytes are always packed: a copy on the card costs less than a blob."""
PACK_BYTES = 64 << 20
"""The most bytes of a pack: the memory that a transfer needs on both cards besides the weights."""
PADDED_BYTES = SMALLEST_AVERAGE + 4096
"""The least size of a pack; its content may be smaller."""
BLOBS_PER_ROUND = 1024
"""The most blobs of one key; the engine makes one send for each."""

Placement = tuple[int, int]
"""Index of a region, and the offset of a tensor's first byte in it."""


_Member = tuple[Blob, Blob]


class Piece(NamedTuple):
    """Bytes that lie together on both sides."""

    source_region: int
    source_offset: int
    destination_region: int
    destination_offset: int
    size: int


class Round(NamedTuple):
    """One transfer under one key: as many blobs on both sides, of the same sizes."""

    source: tuple[Blob, ...]
    destination: tuple[Blob, ...]


def pieces(layout: Layout, source: Sequence[Placement], destination: Sequence[Placement]) -> list[Piece]:
    """The bytes of all tensors in the order of the source's memory; each once, and together if they lie together on
    both sides. The placements are in the layout's order. Raises `TooScattered`."""
    found = []
    for spec, (source_region, source_at), (destination_region, destination_at) in zip(
        layout, source, destination, strict=True
    ):
        for offset, size in extents(spec):
            found.append(Piece(source_region, source_at + offset, destination_region, destination_at + offset, size))
    return _merged(found)


def rounds(moved: Sequence[Piece]) -> list[Round]:
    """The rounds that move the pieces; several only for very many pieces or very many small pieces."""
    packed = [piece for piece in moved if piece.size < PACK_BELOW]
    direct = [piece for piece in moved if piece.size >= PACK_BELOW]
    parts: list[list[_Member]] = []
    for begin in range(0, len(direct), BLOBS_PER_ROUND):
        large, small = _split(direct[begin : begin + BLOBS_PER_ROUND])
        parts.append([_member([piece], piece.size) for piece in large])
        packed += small
    for index, pack in enumerate(_packs(sorted(packed))):
        if index == len(parts):
            parts.append([])
        parts[index].append(_member(pack, max(sum(piece.size for piece in pack), PADDED_BYTES)))
    return [
        Round(tuple(source for source, _ in members), tuple(destination for _, destination in members))
        for members in parts
        if members
    ]


def _merged(found: list[Piece]) -> list[Piece]:
    """Merges pieces that overlap or touch and have the same distance between source and destination."""
    found.sort(
        key=lambda piece: (
            piece.source_region,
            piece.destination_region,
            piece.destination_offset - piece.source_offset,
            piece.source_offset,
        )
    )
    merged: list[Piece] = []
    for piece in found:
        if merged and _continues(merged[-1], piece):
            last = merged[-1]
            end = max(last.source_offset + last.size, piece.source_offset + piece.size)
            merged[-1] = last._replace(size=end - last.source_offset)
        else:
            merged.append(piece)
    return sorted(merged)


def _continues(last: Piece, piece: Piece) -> bool:
    return (
        last.source_region == piece.source_region
        and last.destination_region == piece.destination_region
        and last.destination_offset - last.source_offset == piece.destination_offset - piece.source_offset
        and piece.source_offset <= last.source_offset + last.size
    )


def _split(group: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """As many of the largest pieces as have more than SMALLEST_AVERAGE bytes on average; and the others."""
    ordered = sorted(group, key=lambda piece: piece.size, reverse=True)
    total, number = 0, 0
    for piece in ordered:
        if total + piece.size <= SMALLEST_AVERAGE * (number + 1):
            break
        total += piece.size
        number += 1
    return sorted(ordered[:number]), ordered[number:]


def _packs(packed: Iterable[Piece]) -> list[list[Piece]]:
    packs: list[list[Piece]] = []
    size = PACK_BYTES
    for piece in packed:
        if size + piece.size > PACK_BYTES:
            packs.append([])
            size = 0
        packs[-1].append(piece)
        size += piece.size
    return packs


def _member(together: Sequence[Piece], size: int) -> _Member:
    """A blob of `size` bytes, on both sides."""
    return (
        Blob(size, tuple(Part(piece.source_region, piece.source_offset, piece.size) for piece in together)),
        Blob(size, tuple(Part(piece.destination_region, piece.destination_offset, piece.size) for piece in together)),
    )
