"""The NPUs of this host: their processes, the memory that is published on them, what moves it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from weight_broker.errors import BrokerUnavailable
from weight_broker.kinds import MemoryKind
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardError, CardRefused
from weight_brokerd.cards.events import Hooks
from weight_brokerd.core.answers import STAGE_INSTEAD
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.copy import CopyPlane
from weight_brokerd.dataplane.datasystem import DatasystemPlane
from weight_brokerd.dataplane.peer_copy import PeerCopyPlane
from weight_brokerd.dataplane.plane import DataPlane, Place
from weight_brokerd.dataplane.staged import Asker, StagedPlane
from weight_brokerd.kinds.device_memory import DeviceMemory, refusal
from weight_brokerd.kinds.kind import UNREAD, ContentCheck, KindEvents, KindHealth, WorkerHealth
from weight_brokerd.kinds.npu.place import NpuPlaces
from weight_brokerd.kinds.npu.supervisor import CardSupervisor
from weight_brokerd.kinds.npu.worker import DatasystemWorker
from weight_brokerd.kinds.place_request import PlaceRequest
from weight_brokerd.processes.tasks import Background

log = structlog.get_logger()

SETTLE_SECONDS = 30.0
"""For a worker that is being started."""
FOUND_SECONDS = 5.0
"""For a worker that serves to be asked."""

Connect = Callable[[], Awaitable[CardsConfiguration]]
"""Starts the datasystem worker if the broker runs it; returns how card processes reach it. Raises OSError,
RuntimeError."""
Supervise = Callable[[CardsConfiguration, Hooks], CardSupervisor]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts that need the worker's address."""

    cards: CardSupervisor
    memory: DeviceMemory
    copy: CopyPlane
    peer_copy: PeerCopyPlane
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
        peer_copy: bool = False,
        supervise: Supervise = CardSupervisor,
    ) -> None:
        """`staging`: the instances that copy themselves; `path`: `direct`, `staged` or `auto`; `peer_copy`: whether a
        card may map memory of another one."""
        self._connect = connect
        self._worker = worker
        self._staging = staging
        self._events = events
        self._places = NpuPlaces(path, staging)
        self._offers_peer_copy = peer_copy
        self._supervise = supervise
        self._parts: _Parts | None = None
        self._problem = ""
        self._started: asyncio.Task[None] | None = None
        self._background = Background()

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
        await self._background.close()
        await self._worker.close()

    def place(self, request: PlaceRequest) -> Place:
        """Mapped, staged or both, as `cards.path` allows."""
        return self._places.place(request, self.health.device_ids)

    def hold(self, publication: Publication, place: Place) -> asyncio.Future[Place]:
        """Maps the memory in the card's sender. Memory that the card refuses is staged if its owner offered that."""
        return asyncio.ensure_future(self._hold(publication.publication_id, place))

    async def release(self, publication_id: str) -> None:
        """Unmaps it."""
        await self._ready_parts().memory.release(publication_id)

    def grant(self, transfer: Transfer) -> bytes:
        """Nothing: the broker moves the bytes."""
        return b""

    async def check(self, publication: Publication, digests: bytes) -> ContentCheck:
        """Not done: the processes that own devices compute no digests."""
        return UNREAD

    def end(self, transfer: Transfer) -> None:
        """The sender keeps the memory mapped for the next reader."""

    def route(self, source: Place, destination: Place) -> DataPlane:
        """Staged if either side is; else a copy within a card; between two cards a copy where that is offered and the
        driver has not refused it, or the datasystem."""
        parts = self._ready_parts()
        if source.is_staged or destination.is_staged:
            return parts.staged
        if source.device_id == destination.device_id:
            return parts.copy
        is_peer = self._offers_peer_copy and parts.peer_copy.reaches(source.device_id, destination.device_id)
        return parts.peer_copy if is_peer else parts.datasystem

    async def _hold(self, publication_id: str, place: Place) -> Place:
        if place.is_staged:
            return place
        await self._worker_settled()
        try:
            await self._ready_parts().memory.hold(publication_id, place)
        except CardRefused as error:
            if place.stage is None:
                raise refusal(place, error, STAGE_INSTEAD if self._places.may_stage else None) from error
            self._places.require_connection(place.stage.instance_id)
            log.info("memory_staged", publication_id=publication_id, device=place.device_id, error=str(error))
            return place.as_staged
        except CardError as error:
            raise refusal(place, error) from error
        return place.as_mapped

    async def _worker_settled(self) -> None:
        """A publication while the worker starts is not refused: it waits."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._worker.settled(), SETTLE_SECONDS)
        if self._worker.is_managed and self._worker.is_ready:
            await self._ready_parts().cards.worker_found(FOUND_SECONDS)

    def _ready_parts(self) -> _Parts:
        if self._parts is None:
            raise BrokerUnavailable(f"this broker serves no NPU: {self._problem or 'its cards are not known yet'}")
        return self._parts

    async def _start(self) -> None:
        try:
            configuration = await self._connect()
            # Set before the start: a broker that stops meanwhile must end the processes.
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
        hooks = Hooks(
            on_region_lost=self._region_lost,
            on_worker_found=self._worker_found,
            on_health_change=self._events.health_changed,
            worker_serves=lambda: self._worker.is_ready,
        )
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
        return _Parts(
            cards=cards,
            memory=DeviceMemory(cards),
            copy=CopyPlane(cards, may_stage=may_stage),
            peer_copy=PeerCopyPlane(cards, datasystem, may_stage=may_stage),
            datasystem=datasystem,
            staged=staged,
            worker_address=f"{configuration.worker_host}:{configuration.worker_port}",
        )

    def _worker_found(self) -> None:
        self._background.spawn(self._look_at_worker())

    async def _look_at_worker(self) -> None:
        await self._worker.look()
        self._events.health_changed()

    def _region_lost(self, region_id: str, why: str) -> None:
        if self._parts is not None:
            self._events.memory_lost(self.name, self._parts.memory.holders_of(region_id), why)
