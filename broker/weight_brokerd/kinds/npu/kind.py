"""The NPUs of this host, for the daemon: their processes, the memory that is published on them, what moves it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import structlog

from weight_broker.errors import BrokerUnavailable
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.health import CardHealth
from weight_brokerd.cards.regions import DeviceMemory
from weight_brokerd.core.model import DataPlane
from weight_brokerd.dataplane.datasystem import DatasystemPlane
from weight_brokerd.dataplane.local import LocalPlane
from weight_brokerd.dataplane.protocol import BulkPlane
from weight_brokerd.dataplane.staged import Asker, StagedPlane
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

log = structlog.get_logger()

Connect = Callable[[], Awaitable[CardsConfiguration]]
"""Sees to it that there is a datasystem worker, and says how card processes reach it. Raises OSError, RuntimeError."""


class Worker(Protocol):
    """The datasystem worker, whoever runs it."""

    @property
    def is_managed(self) -> bool:
        """Whether the broker started it and owns it."""

    @property
    def problem(self) -> str:
        """Why it is not there, where that is known; empty otherwise."""

    async def close(self) -> None:
        """Ends it if it is managed."""


class NpuDevices:
    """See `weight_brokerd.kinds.registry.DeviceKind`."""

    kind = "npu"

    def __init__(self, connect: Connect, worker: Worker, stages: Asker) -> None:
        """`stages`: the instances that copy by themselves."""
        self.staged: BulkPlane | None = None
        """What moves memory that is staged; set once the cards are known."""
        self._stages = stages
        self.problem = ""
        """Why no card can be served, if none can."""
        self.on_region_lost: Callable[[str, str], None] = lambda _region, _why: None
        """(region, why): a publication's memory cannot be reached any more."""
        self.on_health_change: Callable[[], None] = lambda: None
        self.worker_address = ""
        """HOST:PORT of the datasystem worker; empty until it is known."""
        self.worker = worker
        self._connect = connect
        self._cards: CardSupervisor | None = None
        self._memory: DeviceMemory | None = None
        self._planes: dict[DataPlane, BulkPlane] = {}
        self._started: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look for cards; `ready` waits for that. The daemon serves host memory meanwhile."""
        self._started = asyncio.get_running_loop().create_task(self._start())

    async def ready(self) -> None:
        """Returns when the cards are known. Raises `BrokerUnavailable` if there are none to be served."""
        if self._started is not None:
            await asyncio.shield(self._started)
        if self._cards is None or not self._cards.health:
            raise BrokerUnavailable(f"this broker serves no NPU: {self.problem or 'no card was found'}")

    async def close(self) -> None:
        """Ends all card processes; nothing may move any more."""
        if self._started is not None:
            self._started.cancel()
            await asyncio.gather(self._started, return_exceptions=True)
        if self._cards is not None:
            await self._cards.close()
        await self.worker.close()

    @property
    def memory(self) -> DeviceMemory | None:
        """What is published; None before `ready`."""
        return self._memory

    @property
    def planes(self) -> Mapping[DataPlane, BulkPlane]:
        """What moves it; filled once the cards are known."""
        return self._planes

    @property
    def health(self) -> Sequence[CardHealth]:
        """Every card that was found."""
        return self._cards.health if self._cards is not None else ()

    @property
    def is_absent(self) -> bool:
        """Somebody has configured a worker for them: they are not."""
        return False

    @property
    def worker_is_there(self) -> bool:
        """Whether the datasystem worker answers."""
        return self._cards is not None and self._cards.worker_is_there

    async def _start(self) -> None:
        try:
            configuration = await self._connect()
            hooks = Hooks(
                on_region_lost=self.on_region_lost,
                on_health_change=self.on_health_change,
            )
            cards = CardSupervisor(configuration, hooks)
            datasystem = DatasystemPlane(cards)
            hooks.on_offers_lost = datasystem.offers_lost
            self.staged = StagedPlane(
                cards,
                datasystem,
                self._stages,
                staging_bytes=configuration.staging_bytes,
                answer_seconds=configuration.request_seconds,
            )
            self._planes |= {DataPlane.LOCAL: LocalPlane(cards), DataPlane.DATASYSTEM: datasystem}
            self._memory = DeviceMemory(cards)
            self.worker_address = f"{configuration.worker_host}:{configuration.worker_port}"
            self._cards = cards  # before it starts: a broker that stops meanwhile ends what it has begun
            await cards.start()
            self.problem = cards.problem or ("" if cards.health else "the driver knows no device")
        except (OSError, RuntimeError) as error:
            self.problem = str(error)
        if self.problem:
            log.error("no_devices", problem=self.problem)
        self.on_health_change()
