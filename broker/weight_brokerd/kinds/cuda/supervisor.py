"""All GPUs of this host.

A GPU needs no sender: the process that fills memory opens the source's memory too, for one transfer. Between transfers
nothing is open, so no process keeps memory from its owner.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from weight_brokerd.cards import messages
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardError, CardTimeout, CardUnavailable
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.health import CardHealth, CardState
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.plan.blobs import BlobList
from weight_brokerd.cards.probe import Device, find_devices
from weight_brokerd.cards.receivers import ReceiverSide, TransferRequest
from weight_brokerd.cards.worker_watch import NoWorker
from weight_brokerd.processes.tasks import uninterrupted


@dataclass(slots=True)
class _Gpu:
    device: Device
    receivers: ReceiverSide
    regions: set[str] = field(default_factory=set)
    """Ids of published regions."""


class GpuSupervisor:
    """Starts, uses and replaces the processes that own GPUs. GPUs are named by their UUIDs."""

    def __init__(self, configuration: CardsConfiguration, hooks: Hooks | None = None) -> None:
        self._configuration = configuration
        self._hooks = hooks or Hooks()
        self._gpus: dict[str, _Gpu] = {}
        self._open: Counter[str] = Counter()
        """Number of transfers that have a region open, by region."""
        self._stuck: set[str] = set()
        """Regions that may still be open: the driver does not let a killed process end."""
        self._closed = asyncio.Condition()
        self.problem = ""
        """The driver's words if it could not be asked for its GPUs."""

    async def start(self) -> None:
        """Finds the GPUs. Failures show in `health` and `problem`; nothing is raised for them."""
        devices, self.problem = await find_devices(self._configuration)
        for device in devices:
            receivers = ReceiverSide(device, self._configuration, NoWorker(), self._hooks)
            self._gpus[device.identity] = _Gpu(device, receivers)

    async def close(self) -> None:
        """Ends all processes. Cancel running copies first."""
        await asyncio.gather(*(gpu.receivers.close() for gpu in self._gpus.values()))

    async def register(self, card: str, region: ImportRegion) -> None:
        """Opens and closes a region of a publication, to check that transfers can. Idempotent. Raises CardError; then
        the region is not registered."""
        gpu = self._gpu(card)
        if region.region_id in gpu.regions:
            return
        gpu.regions.add(region.region_id)
        try:
            await self._run(gpu, messages.Ping(), [region], self._configuration.transfer_seconds)
        except BaseException:
            gpu.regions.discard(region.region_id)
            raise

    async def unregister(self, card: str, region_id: str) -> None:
        """Waits until no transfer has the region open: it may be freed when this returns. Idempotent. Raises CardError
        with `quiesced` False if the driver keeps a process that has it open."""
        async with self._closed:
            await self._closed.wait_for(lambda: not self._open[region_id])
        if region_id in self._stuck:
            raise CardTimeout(f"the driver does not let go of region {region_id!r}", quiesced=False)
        gpu = self._gpus.get(card)
        if gpu is not None:
            gpu.regions.discard(region_id)

    async def copy(
        self,
        card: str,
        source: BlobList,
        destination: BlobList,
        regions: Sequence[ImportRegion],
        *,
        timeout: float,
    ) -> messages.Done:
        """Fills `destination`, which is on `card`, from `source`, on any GPU of this host; `regions` are those of both.
        Nothing writes after this returns or raises, unless the error has `quiesced` False. A cancellation costs the
        process. Raises CardError."""
        return await self._run(self._gpu(card), messages.CopyWithinCard(source, destination), regions, timeout)

    @property
    def health(self) -> list[CardHealth]:
        """Every GPU."""
        return [_health(gpu) for gpu in self._gpus.values()]

    async def _run(
        self, gpu: _Gpu, request: TransferRequest, regions: Sequence[ImportRegion], timeout: float
    ) -> messages.Done:
        opened = Counter(region.region_id for region in regions)
        self._open += opened
        try:
            return await gpu.receivers.run(request, regions, timeout)
        except CardError as error:
            if not error.quiesced:
                self._stuck.update(opened)
            raise
        finally:
            self._open -= opened
            await uninterrupted(self._tell_closed())

    async def _tell_closed(self) -> None:
        async with self._closed:
            self._closed.notify_all()

    def _gpu(self, identity: str) -> _Gpu:
        gpu = self._gpus.get(identity)
        if gpu is None:
            known = ", ".join(self._gpus) or self.problem or "none"
            raise CardUnavailable(f"this host has no GPU {identity!r}; it has: {known}")
        return gpu


def _health(gpu: _Gpu) -> CardHealth:
    device, receivers = gpu.device, gpu.receivers
    problem = device.problem or receivers.problem
    return CardHealth(
        identity=device.identity,
        device_index=device.index,
        soc=device.soc,
        state=CardState.DEGRADED if problem else CardState.READY,
        problem=problem,
        sender_pid=0,
        retiring_pids=(),
        receiver_pids=tuple(child.pid for child in [*receivers.idle, *receivers.busy]),
        regions=len(gpu.regions),
        offers=0,
        fetches=len(receivers.busy),
    )
