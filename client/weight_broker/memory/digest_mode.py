"""How much of the content is digested when publishing and verified when receiving.

The caller's choice, the kind of memory and the installed packages decide, never a measurement: two runs of the same
thing verify the same."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from weight_broker.digest import ContentDigests, DigestAlgorithm, DigestCoverage, is_available


class DigestMode(enum.StrEnum):
    """The caller's choice."""

    AUTO = "auto"
    """Everything, if both sides have XXH3, else a sample. Mapped host memory: a sample."""
    FULL = "full"
    """Everything, at any cost."""
    SAMPLED = "sampled"
    """A sample of each tensor."""

    def exported_full_algorithm(self) -> DigestAlgorithm | None:
        """The algorithm for full digests when publishing; None if only a sample is digested."""
        if self is not DigestMode.SAMPLED and is_available(DigestAlgorithm.XXH3_64):
            return DigestAlgorithm.XXH3_64
        return DigestAlgorithm.CRC32 if self is DigestMode.FULL else None

    def choose(self, offered: Sequence[ContentDigests]) -> ContentDigests | None:
        """The digests to verify against; None if this process can use none of the offered."""
        usable = [digests for digests in offered if is_available(digests.algorithm)]
        full = [digests for digests in usable if digests.coverage is DigestCoverage.FULL]
        full.sort(key=lambda digests: digests.algorithm is not DigestAlgorithm.XXH3_64)
        sampled = [digests for digests in usable if digests.coverage is DigestCoverage.SAMPLED]
        quick = [digests for digests in full if digests.algorithm is DigestAlgorithm.XXH3_64]
        order = {
            DigestMode.AUTO: [*quick, *sampled, *full],
            DigestMode.FULL: full,
            DigestMode.SAMPLED: [*sampled, *full],
        }[self]
        return order[0] if order else None
