"""Where a publication lies, as its instance told it."""

from __future__ import annotations

from dataclasses import dataclass

from weight_brokerd.dataplane.protocol import Place


@dataclass(frozen=True, slots=True)
class PublishedRegion:
    """A region that a publication lies in."""

    region_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PublishedMemory:
    """Where a publication's tensors lie."""

    regions: tuple[PublishedRegion, ...]
    grant: bytes
    """What an acquire sends of them, as a serialized Granted: nothing here reads it, and as messages it would take ten
    times the memory. Of device memory only the digests: who knows how it is exported could map it."""
    place: Place | None = None
    """Where it is in device memory."""
