"""Control planes with scripted cards, and a record of what kinds of memory report."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from support.scripted_cards import ScriptedCards
from weight_broker.v1 import attach_pb2
from weight_brokerd.attach.stage import StagingConnections, StagingGone
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.control.control import Control
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.model import Limits
from weight_brokerd.directory.memory import MemoryDirectory
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.kind import Kind, KindEvents
from weight_brokerd.kinds.npu.kind import NpuKind
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


class ServingConnections(StagingConnections):
    """Instances that copy whatever they are asked for."""

    def __init__(self, *instances: str) -> None:
        self.lost: list[tuple[str, str]] = []
        super().__init__(lambda instance_id, why: self.lost.append((instance_id, why)))
        self.instances = set(instances)
        self.asked: list[tuple[str, str]] = []
        """(instance, what) of every request."""
        self.gate: asyncio.Event | None = None
        """No instance copies before it is set."""
        self.moving = 0
        self.is_asked_to_copy = asyncio.Event()

    def has(self, instance_id: str) -> bool:
        return instance_id in self.instances

    def connection_of(self, instance_id: str) -> int:
        if instance_id not in self.instances:
            raise StagingGone("it has no stage connection")
        return 0

    async def ask(self, instance_id: str, request: attach_pb2.StageRequest, timeout: float) -> None:
        if instance_id not in self.instances:
            raise StagingGone("it has no stage connection")
        what = request.WhichOneof("request") or ""
        self.asked.append((instance_id, what))
        if what == "copy_chunk" and self.gate is not None:
            self.is_asked_to_copy.set()
            self.moving += 1
            try:
                await self.gate.wait()
            finally:
                self.moving -= 1
            if instance_id not in self.instances:
                raise StagingGone("its stage connection has ended")

    def cut_off(self) -> None:
        """All connections end, also under those who copy."""
        self.instances.clear()
        if self.gate is not None:
            self.gate.set()


class QuietWorker:
    """A datasystem worker that runs."""

    is_managed = False
    is_ready = True
    problem = ""

    async def start(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def settled(self) -> None:
        """At once."""

    async def look(self) -> None:
        """It is new enough."""

    async def close(self) -> None:
        """It is the operator's."""


async def _connect() -> CardsConfiguration:
    return CardsConfiguration("127.0.0.1", 1)


def npu_kind(
    cards: ScriptedCards,
    staging: StagingConnections,
    events: KindEvents,
    path: str = "auto",
    *,
    peer_copy: bool = False,
) -> NpuKind:
    """NPUs on scripted cards; to be started."""
    worker = QuietWorker()
    return NpuKind(_connect, worker, staging, events, path=path, peer_copy=peer_copy, supervise=cards.supervise)


def control_of(*kinds: Kind, staging: StagingConnections | None = None) -> tuple[Control, Kinds]:
    """A broker without sockets that serves these kinds."""
    served = Kinds(kinds)
    control = Control(
        coordinator=Coordinator(host_id="host", limits=Limits()),
        regions=RegionTable(regions_per_instance=8),
        directory=MemoryDirectory(lease_seconds=60, first_token=1),
        kinds=served,
        staging=staging or ServingConnections(),
    )
    return control, served
