"""The other end of what kinds of memory report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class RecordedEvents:
    """Writes down what kinds tell."""

    lost: list[tuple[str, tuple[str, ...], str]] = field(default_factory=list)
    health_changes: int = 0

    def memory_lost(self, kind: str, publication_ids: Iterable[str], why: str) -> None:
        self.lost.append((kind, tuple(publication_ids), why))

    def health_changed(self) -> None:
        self.health_changes += 1
