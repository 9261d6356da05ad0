"""The GPUs of this host, for the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import structlog

from weight_broker.errors import BrokerUnavailable
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.health import CardHealth
from weight_brokerd.cards.regions import DeviceMemory
from weight_brokerd.core.model import CUDA_MEMORY, DataPlane
from weight_brokerd.dataplane.local import LocalPlane
from weight_brokerd.dataplane.protocol import BulkPlane
from weight_brokerd.kinds.cuda.supervisor import GpuSupervisor

log = structlog.get_logger()


class CudaDevices:
    """See `weight_brokerd.kinds.registry.DeviceKind`."""

    kind = CUDA_MEMORY

    def __init__(self, configuration: CardsConfiguration, *, is_wanted: bool) -> None:
        """`is_wanted`: somebody said that there are GPUs, so that it is a problem if there are none."""
        self.on_region_lost: Callable[[str, str], None] = lambda _region, _why: None
        """Never called: memory is opened anew for each transfer, and a transfer that cannot is told so."""
        self.on_health_change: Callable[[], None] = lambda: None
        self._configuration = configuration
        self._is_wanted = is_wanted
        self._gpus = GpuSupervisor(configuration, Hooks(on_health_change=self._changed))
        self._memory = DeviceMemory(self._gpus)
        self._planes: dict[DataPlane, BulkPlane] = {DataPlane.LOCAL: LocalPlane(self._gpus)}
        self._started: asyncio.Task[None] | None = None
        self._problem = ""

    def start(self) -> None:
        """Begins to look for GPUs."""
        self._started = asyncio.get_running_loop().create_task(self._start())

    async def ready(self) -> None:
        """Returns when the GPUs are known. Raises `BrokerUnavailable` if there should be some and are none."""
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

    @property
    def problem(self) -> str:
        """Why no GPU can be served; empty if nobody expects one."""
        return self._problem if self._is_wanted else ""

    @property
    def is_absent(self) -> bool:
        """Whether this host has no GPU, and nobody said that it has."""
        is_known = self._started is not None and self._started.done()
        return is_known and not self._is_wanted and not self._gpus.health

    @property
    def memory(self) -> DeviceMemory:
        """What is published."""
        return self._memory

    @property
    def planes(self) -> Mapping[DataPlane, BulkPlane]:
        """What moves it: between any two GPUs of a host, a copy does."""
        return self._planes

    @property
    def health(self) -> Sequence[CardHealth]:
        """Every GPU that was found."""
        return self._gpus.health

    def _changed(self) -> None:
        self.on_health_change()

    async def _start(self) -> None:
        await self._gpus.start()
        if self._gpus.health:
            log.info("gpus_found", gpus=[gpu.identity for gpu in self._gpus.health])
        else:
            self._problem = self._gpus.problem or "the driver knows no GPU"
            log.log(40 if self._is_wanted else 10, "no_gpus", problem=self._problem)
        self.on_health_change()
