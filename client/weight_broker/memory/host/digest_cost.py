"""What does it cost on this host to digest everything that is copied, relative to the copy alone?

It depends on the processor, on how many of them share the memory's bandwidth and on what is installed, so it is
measured: once in a process, in the course of its first large transfer. Some of its tasks copy and digest on the way,
others copy first and digest after that; both are timed as far as the comparison goes, and none does what the transfer
would not have done anyway.
"""

from __future__ import annotations

import logging
import time

from weight_broker.digest import DigestAlgorithm
from weight_broker.memory.host import copying

MOST_SHARE = 1 / 3
"""Of the time that the copy alone takes."""
_SCATTER = 0.07
"""By how much a measured share may be too high: a copy has more of the memory's bandwidth beside a thread that digests
than it has in a transfer without digests, and a host has more to do than this. Everything is verified in case of
doubt."""
LEAST_BYTES = 256 << 20
"""Smaller transfers are over soon in any case, and are digested."""
_LEAST_TASK_BYTES = 1 << 20
_SAMPLES = 12
"""Of either kind."""

_logger = logging.getLogger("weight_broker")
_shares: dict[DigestAlgorithm, float] = {}


class AffordableDigests:
    """Copies and digests (a `DigestingCopy`) for as long as digesting everything takes less than a third of the time
    that copying takes. The first large transfer of a process decides for all that follow; if it finds that digests cost
    too much, it and they copy without."""

    def __init__(self, size_bytes: int, algorithm: DigestAlgorithm) -> None:
        """`size_bytes` are copied in all."""
        self._algorithm = algorithm
        self._copy, self._copy_and_digest = copying.functions_for(size_bytes, algorithm)
        self._measures = size_bytes >= LEAST_BYTES
        self._samples = 0
        self._copied: list[float] = []
        self._digested: list[float] = []

    @property
    def are_too_expensive(self) -> bool:
        """True if some of what was copied was not digested, or would not be."""
        share = _shares.get(self._algorithm)
        return self._measures and share is not None and share >= MOST_SHARE + _SCATTER

    def __call__(self, destination: int, source: int, size_bytes: int, block_bytes: int) -> list[int]:
        """The digest of each block, or zeros once digests are too expensive."""
        if self.are_too_expensive:
            self._copy(destination, source, size_bytes)
            return [0] * -(-size_bytes // block_bytes)
        if not self._measures or self._algorithm in _shares or size_bytes < _LEAST_TASK_BYTES:
            return self._copy_and_digest(destination, source, size_bytes, block_bytes)
        self._samples += 1
        return self._sample(destination, source, size_bytes, block_bytes, on_the_way=self._samples % 2 == 0)

    def _sample(
        self, destination: int, source: int, size_bytes: int, block_bytes: int, *, on_the_way: bool
    ) -> list[int]:
        begun = time.perf_counter()
        if on_the_way:
            digests = self._copy_and_digest(destination, source, size_bytes, block_bytes)
            self._digested.append((time.perf_counter() - begun) / size_bytes)
        else:
            self._copy(destination, source, size_bytes)
            self._copied.append((time.perf_counter() - begun) / size_bytes)
            digests = copying.digest_blocks(destination, size_bytes, self._algorithm, block_bytes)
        if min(len(self._copied), len(self._digested)) >= _SAMPLES:
            self._decide()
        return digests

    def _decide(self) -> None:
        # The least of either kind: other work on the host makes samples take longer, never shorter.
        share = max(0.0, min(self._digested) / min(self._copied) - 1.0)
        if _shares.setdefault(self._algorithm, share) is share and self.are_too_expensive:
            _logger.info("digesting everything takes %.2f of the time of copying it here: samples are verified", share)
