"""The GPUs of this host."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import structlog

from weight_broker.errors import BrokerUnavailable, InvalidArgument
from weight_broker.kinds import MemoryKind
from weight_broker.v1.weight_set_pb2 import Region
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardError
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.copy import CopyPlane
from weight_brokerd.dataplane.plane import DataPlane, Place
from weight_brokerd.kinds.cuda.supervisor import GpuSupervisor
from weight_brokerd.kinds.device_memory import DeviceMemory, refusal
from weight_brokerd.kinds.kind import UNREAD, ContentCheck, KindEvents, KindHealth
from weight_brokerd.kinds.place_request import PlaceRequest, device_of, placements_of, regions_of, require_unstaged

log = structlog.get_logger()
HANDLE_BYTES = 64

Supervise = Callable[[CardsConfiguration, Hooks], GpuSupervisor]


class CudaKind:
    """As `weight_brokerd.kinds.kind.Kind`. Every transfer opens the memory for itself and fails if it cannot, so
    `memory_lost` is never called."""

    name: str = MemoryKind.CUDA

    def __init__(
        self,
        configuration: CardsConfiguration,
        events: KindEvents,
        *,
        is_wanted: bool,
        supervise: Supervise = GpuSupervisor,
    ) -> None:
        """`is_wanted`: the settings ask for GPUs, so a host without GPUs is a problem."""
        self._events = events
        self._is_wanted = is_wanted
        self._gpus = supervise(configuration, Hooks(on_health_change=events.health_changed))
        self._memory = DeviceMemory(self._gpus)
        self._plane = CopyPlane(self._gpus)
        self._started: asyncio.Task[None] | None = None
        self._problem = ""

    @property
    def is_served(self) -> bool:
        """False once this host is known to have no GPU, unless the settings ask for GPUs."""
        is_known = self._started is not None and self._started.done()
        return self._is_wanted or not is_known or bool(self._gpus.health)

    @property
    def health(self) -> KindHealth:
        """No GPU is a problem only where one is expected."""
        problem = self._problem if self._is_wanted else ""
        return KindHealth(self._gpus.health, problem, self._memory.region_count, self._memory.region_bytes)

    def start(self) -> None:
        """Looks for GPUs."""
        self._started = asyncio.get_running_loop().create_task(self._start())

    async def ready(self) -> None:
        """Returns when the GPUs are known."""
        if self._started is not None:
            await asyncio.shield(self._started)
        if self._is_wanted and not self._gpus.health:
            raise BrokerUnavailable(f"this broker serves no GPU: {self._problem}")

    async def close(self) -> None:
        """Ends all processes."""
        if self._started is not None:
            self._started.cancel()
            await asyncio.gather(self._started, return_exceptions=True)
        await self._gpus.close()

    def place(self, request: PlaceRequest) -> Place:
        """Allocations that CUDA IPC can open."""
        require_unstaged(self.name, request)
        device_id = device_of(request, self.health.device_ids)
        regions = _with_exporter(regions_of(self.name, request, _import_region), request.peer)
        return Place(self.name, device_id, regions, placements_of(self.name, request).pairs)

    def hold(self, publication: Publication, place: Place) -> asyncio.Future[Place]:
        """Opens and closes the memory, to check that transfers can."""
        return asyncio.ensure_future(self._hold(publication.publication_id, place))

    async def release(self, publication_id: str) -> None:
        """Waits until no transfer has the memory open."""
        await self._memory.release(publication_id)

    def grant(self, transfer: Transfer) -> bytes:
        """Nothing: the broker moves the bytes."""
        return b""

    async def check(self, publication: Publication, digests: bytes) -> ContentCheck:
        """Not done: the processes that own devices compute no digests."""
        return UNREAD

    def end(self, transfer: Transfer) -> None:
        """The process that copied has closed the memory."""

    def route(self, source: Place, destination: Place) -> DataPlane:
        """One process copies between any two GPUs of a host."""
        return self._plane

    async def _hold(self, publication_id: str, place: Place) -> Place:
        try:
            await self._memory.hold(publication_id, place)
        except CardError as error:
            raise refusal(place, error) from error
        return place

    async def _start(self) -> None:
        await self._gpus.start()
        if self._gpus.health:
            log.info("gpus_found", gpus=[gpu.identity for gpu in self._gpus.health])
        else:
            self._problem = self._gpus.problem or "the driver knows no GPU"
            log.log(40 if self._is_wanted else 10, "no_gpus", problem=self._problem)
        self._events.health_changed()


def _with_exporter(regions: tuple[ImportRegion, ...], peer: PeerCredentials | None) -> tuple[ImportRegion, ...]:
    """The driver may refuse memory because of who exports it."""
    if peer is None:
        return regions
    return tuple(replace(region, exporter_pid=peer.pid, exporter_uid=peer.uid) for region in regions)


def _import_region(field: str, region_id: str, region: Region) -> ImportRegion:
    handle = region.cuda_allocation.ipc_handle
    if len(handle) != HANDLE_BYTES:
        raise InvalidArgument(f"{field}.cuda_allocation.ipc_handle", len(handle), f"{HANDLE_BYTES} bytes")
    return ImportRegion(region_id, region.size_bytes, ipc_handle=handle.hex(), device_id=region.device_id)
