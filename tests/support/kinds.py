"""A driver with host memory only, and who hears what kinds of memory tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from weight_brokerd.attach.stage import Stages
from weight_brokerd.control.broker import Driver
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.model import Limits
from weight_brokerd.directory.memory import MemoryDirectory
from weight_brokerd.kinds.host.kind import HostKind
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.registry import Kinds


@dataclass
class RecordedEvents:
    """Writes down what kinds tell."""

    lost: list[tuple[str, tuple[str, ...], str]] = field(default_factory=list)
    health_changes: int = 0

    def memory_lost(self, kind: str, publication_ids: Iterable[str], why: str) -> None:
        self.lost.append((kind, tuple(publication_ids), why))

    def health_changed(self) -> None:
        self.health_changes += 1


def memory_directory() -> MemoryDirectory:
    """The directory of one host."""
    return MemoryDirectory(host_id="host", lease_seconds=60, first_token=1)


def host_driver(
    *,
    limits: Limits | None = None,
    regions: RegionTable | None = None,
    directory: MemoryDirectory | None = None,
) -> Driver:
    """A broker without sockets that serves host memory."""
    table = regions or RegionTable(regions_per_instance=8)
    return Driver(
        coordinator=Coordinator(host_id="host", limits=limits or Limits()),
        regions=table,
        directory=directory or memory_directory(),
        kinds=Kinds([HostKind(table)]),
        stages=Stages(lambda _instance_id, _why: None),
    )
