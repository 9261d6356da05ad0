"""What does it cost on this host to digest everything that is copied, relative to the copy alone?

It depends on the processor, on how many of them share the memory's bandwidth and on what is installed, so it is
measured: once in a process, on its first large transfer, with a few MiB of that transfer's own memory and on as many
threads. Some pieces are copied, others are copied and digested. The transfer itself comes after that and does all of
it.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial

from weight_broker.digest import DigestAlgorithm
from weight_broker.memory import copying
from weight_broker.memory.address_space import advise_huge_pages
from weight_broker.memory.copying import Piece

MOST_SHARE = 1 / 3
"""Of the time that the copy alone takes."""
LEAST_BYTES = 256 << 20
"""Smaller transfers are over soon in any case."""
_CHUNK_BYTES = 1 << 20
_CHUNKS = 16

_logger = logging.getLogger("weight_broker")
_shares: dict[DigestAlgorithm, float] = {}


def is_affordable(
    pieces: Sequence[Piece], algorithm: DigestAlgorithm, block_bytes: int, *, deadline: float | None = None
) -> bool:
    """Whether digesting everything takes less than a third of the time that copying takes. The first large transfer
    decides for as long as the process lives; it writes to some of the destinations. Raises `DeadlinePassed`."""
    share = _shares.get(algorithm)
    if share is None:
        size_bytes = sum(size for _, _, size in pieces)
        chunks = list(_chunks(pieces))
        if size_bytes < LEAST_BYTES or len(chunks) < _CHUNKS:
            return True
        share = _shares[algorithm] = _measure(chunks, size_bytes, algorithm, block_bytes, deadline)
        if share >= MOST_SHARE:
            _logger.info("digesting everything takes %.2f of the time of copying it here: samples are verified", share)
    return share < MOST_SHARE


def _chunks(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Of large pieces, so many in all, none from where another one is."""
    large = [piece for piece in pieces if piece[2] >= _CHUNK_BYTES][:_CHUNKS]
    of_each = -(-_CHUNKS // max(len(large), 1))
    for destination, source, size in large:
        advise_huge_pages(destination, size)  # before any of its pages is there
        count = min(of_each, size // _CHUNK_BYTES)
        for offset in range(0, count * (size // count), size // count):
            yield destination + offset, source + offset, _CHUNK_BYTES


def _measure(
    chunks: Sequence[Piece], size_bytes: int, algorithm: DigestAlgorithm, block_bytes: int, deadline: float | None
) -> float:
    copy, copy_and_digest = copying.functions_for(size_bytes, algorithm)
    copied: list[float] = []
    digested: list[float] = []

    def timed(chunk: Piece, with_digest: bool) -> None:
        begun = time.perf_counter()
        if with_digest:
            copy_and_digest(*chunk, block_bytes)
        else:
            copy(*chunk)
        (digested if with_digest else copied).append(time.perf_counter() - begun)

    tasks = [partial(timed, chunk, index % 2 == 1) for index, chunk in enumerate(chunks)]
    copying.run(tasks, deadline=deadline)
    return max(0.0, statistics.median(digested) / statistics.median(copied) - 1.0)
