"""The NPUs of this host: their processes, the memory that is published on them, what moves it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from weight_broker.errors import BrokerUnavailable
from weight_broker.kinds import MemoryKind
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardError, CardRefused
from weight_brokerd.cards.events import Hooks
from weight_brokerd.core.coordinator import STAGE_INSTEAD
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.copy import CopyPlane
from weight_brokerd.dataplane.datasystem import DatasystemPlane
from weight_brokerd.dataplane.plane import DataPlane, Place
from weight_brokerd.dataplane.staged import Asker, StagedPlane
from weight_brokerd.kinds.device_memory import DeviceMemory, refusal
from weight_brokerd.kinds.kind import KindEvents, KindHealth, WorkerHealth
from weight_brokerd.kinds.npu.place import NpuPlaces
from weight_brokerd.kinds.npu.supervisor import CardSupervisor
from weight_brokerd.kinds.npu.worker import DatasystemWorker
from weight_brokerd.kinds.place_request import PlaceRequest

log = structlog.get_logger()

Connect = Callable[[], Awaitable[CardsConfiguration]]
"""Sees to it that there is a datasystem worker, and says how card processes reach it. Raises OSError, RuntimeError."""
Supervise = Callable[[CardsConfiguration, Hooks], CardSupervisor]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What there is once the worker is known."""

    cards: CardSupervisor
    memory: DeviceMemory
    copy: CopyPlane
    datasystem: DatasystemPlane
    staged: StagedPlane
    worker_address: str


class NpuKind:
    """As `weight_brokerd.kinds.kind.Kind`."""

    name: str = MemoryKind.NPU
    is_served = True  # the settings name a worker for them: there should be some

    def __init__(
        self,
        connect: Connect,
        worker: DatasystemWorker,
        staging: Asker,
        events: KindEvents,
        *,
        path: str = "auto",
        supervise: Supervise = CardSupervisor,
    ) -> None:
        """`staging`: the instances that copy by themselves; `path`: `direct`, `staged` or `auto`."""
        self._connect = connect
        self._worker = worker
        self._staging = staging
        self._events = events
        self._places = NpuPlaces(path, staging)
        self._supervise = supervise
        self._parts: _Parts | None = None
        self._problem = ""
        self._started: asyncio.Task[None] | None = None

    @property
    def health(self) -> KindHealth:
        """Cards and the datasystem worker."""
        parts = self._parts
        if parts is None:
            return KindHealth(problem=self._problem)
        worker = WorkerHealth(
            parts.worker_address, parts.cards.worker_is_there, self._worker.is_managed, self._worker.problem
        )
        memory = parts.memory
        return KindHealth(
            parts.cards.health, self._problem, memory.region_count, memory.region_bytes, workers=(worker,)
        )

    def start(self) -> None:
        """Looks for the worker first, then for cards."""
        self._started = asyncio.get_running_loop().create_task(self._start())

    async def ready(self) -> None:
        """Returns when the cards are known."""
        if self._started is not None:
            await asyncio.shield(self._started)
        if not self.health.devices:
            raise BrokerUnavailable(f"this broker serves no NPU: {self._problem or 'no card was found'}")

    async def close(self) -> None:
        """Ends all card processes."""
        if self._started is not None:
            self._started.cancel()
            await asyncio.gather(self._started, return_exceptions=True)
        if self._parts is not None:
            await self._parts.cards.close()
        await self._worker.close()

    def place(self, request: PlaceRequest) -> Place:
        """Mapped, staged or both, as `cards.path` allows."""
        return self._places.place(request, self.health.device_ids)

    def hold(self, publication: Publication, place: Place) -> asyncio.Future[Place]:
        """Maps the memory in the card's sender. What the card refuses is staged if its owner offered that."""
        return asyncio.ensure_future(self._hold(publication.publication_id, place))

    async def release(self, publication_id: str) -> None:
        """Unmaps it."""
        await self._ready_parts().memory.release(publication_id)

    def grant(self, transfer: Transfer) -> bytes:
        """Nothing: the broker moves the bytes."""
        return b""

    def end(self, transfer: Transfer) -> None:
        """The sender keeps the memory mapped for the next reader."""

    def route(self, source: Place, destination: Place) -> DataPlane:
        """Staged if either side is; else a copy within a card, or the datasystem between two."""
        parts = self._ready_parts()
        if source.is_staged or destination.is_staged:
            return parts.staged
        return parts.copy if source.device_id == destination.device_id else parts.datasystem

    async def _hold(self, publication_id: str, place: Place) -> Place:
        if place.is_staged:
            return place
        try:
            await self._ready_parts().memory.hold(publication_id, place)
        except CardRefused as error:
            if place.stage is not None and self._places.can_copy(place.stage.instance_id):
                log.info("memory_staged", publication_id=publication_id, device=place.device_id, error=str(error))
                return place.as_staged
            raise refusal(place, error, STAGE_INSTEAD if self._places.may_stage else None) from error
        except CardError as error:
            raise refusal(place, error) from error
        return place.as_mapped

    def _ready_parts(self) -> _Parts:
        if self._parts is None:
            raise BrokerUnavailable(f"this broker serves no NPU: {self._problem or 'its cards are not known yet'}")
        return self._parts

    async def _start(self) -> None:
        try:
            configuration = await self._connect()
            # Known before it starts: a broker that stops meanwhile ends what has begun.
            self._parts = self._assemble(configuration)
            cards = self._parts.cards
            await cards.start()
            self._problem = cards.problem or ("" if cards.health else "the driver knows no device")
        except (OSError, RuntimeError) as error:
            self._problem = str(error)
        if self._problem:
            log.error("no_devices", problem=self._problem)
        self._events.health_changed()

    def _assemble(self, configuration: CardsConfiguration) -> _Parts:
        hooks = Hooks(on_region_lost=self._region_lost, on_health_change=self._events.health_changed)
        cards = self._supervise(configuration, hooks)
        may_stage = self._places.may_stage
        datasystem = DatasystemPlane(cards, may_stage=may_stage)
        hooks.on_offers_lost = datasystem.offers_lost
        staged = StagedPlane(
            cards,
            datasystem,
            self._staging,
            staging_bytes=configuration.staging_bytes,
            answer_seconds=configuration.request_seconds,
        )
        address = f"{configuration.worker_host}:{configuration.worker_port}"
        return _Parts(cards, DeviceMemory(cards), CopyPlane(cards, may_stage=may_stage), datasystem, staged, address)

    def _region_lost(self, region_id: str, why: str) -> None:
        if self._parts is not None:
            self._events.memory_lost(self.name, self._parts.memory.holders_of(region_id), why)
