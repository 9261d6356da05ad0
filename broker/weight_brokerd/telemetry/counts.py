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
    acquisitions: Mapping[str, int] = field(default_factory=dict)
    """That ended since the broker started, by outcome."""
    log_lines_dropped: int = 0
    datasystem_workers: Mapping[str, int] = field(default_factory=dict)
    """That answer, and that do not."""
    damage_reports: Mapping[str, int] = field(default_factory=dict)
    """Since the broker started, by what a check of the source found."""
    suspect_receivers: int = 0
    """Processes whose reports of damage keep proving false."""
