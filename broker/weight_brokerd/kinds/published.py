"""What the broker keeps of a publication besides the core's record."""

from __future__ import annotations

from dataclasses import dataclass

from weight_brokerd.dataplane.plane import Place


@dataclass(frozen=True, slots=True)
class PublishedMemory:
    """Where a publication's tensors lie, and the digests of their content."""

    place: Place
    digests: bytes
    """As a serialized Granted: the broker does not read them, and as messages they would take ten times the memory."""
