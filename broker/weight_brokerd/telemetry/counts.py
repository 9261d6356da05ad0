"""Numbers of instances, publications and all else that the broker has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers at one moment."""

    instances: int
    publications: int
    regions: int
    region_bytes: int
    running_transfers: int
    waiting_acquisitions: int
    cold_load_leases: int
    cards: Mapping[str, int] = field(default_factory=dict)
    """By state."""
    transfers: Mapping[str, int] = field(default_factory=dict)
    """That succeeded since the broker started, by data plane."""
