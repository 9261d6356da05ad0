"""Publications in device memory become resident when their card has mapped them, and are gone when it has let go.

Both take a while, and both can fail. An instance that is told that its publication is gone may free the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from weight_broker.errors import PublicationNotFound, PublishRefused, RetractTimeout
from weight_brokerd.cards.errors import CardError, CardRefused
from weight_brokerd.core.coordinator import STAGE_INSTEAD
from weight_brokerd.core.model import Publication
from weight_brokerd.dataplane.protocol import Place
from weight_brokerd.kinds.registry import DeviceKinds

log = structlog.get_logger()


@dataclass(slots=True)
class _Residency:
    publication: Publication
    place: Place
    mapping: asyncio.Task[None]
    unmapping: asyncio.Task[None] | None = None


class DeviceResidency:
    """All publications in device memory that are mapped, being mapped or being unmapped."""

    def __init__(
        self,
        devices: DeviceKinds,
        left: Callable[[Publication], Awaitable[None]],
        on_mapped: Callable[[Publication], None],
        on_refused: Callable[[Publication], None],
    ) -> None:
        """`left` returns when no transfer that was ended reads the publication any more: a receiver that copies within
        a card has it mapped too. `on_refused` leads to `unmap`, as every end of a publication does."""
        self._devices = devices
        self._left = left
        self._on_mapped = on_mapped
        self._on_refused = on_refused
        self._all: dict[str, _Residency] = {}

    def map(self, publication: Publication, place: Place) -> None:
        """Begins to map the memory; `mapped` says how that ends."""
        mapping = asyncio.get_running_loop().create_task(self._map(publication, place))
        mapping.add_done_callback(_retrieved)
        self._all[publication.publication_id] = _Residency(publication, place, mapping)

    async def mapped(self, publication_id: str) -> None:
        """Returns when the memory is mapped; raises `PublishRefused` if it cannot be, `PublicationNotFound` if it was
        retracted meanwhile."""
        residency = self._all.get(publication_id)
        if residency is None:
            return
        await asyncio.wait({residency.mapping})
        if residency.mapping.cancelled():
            raise PublicationNotFound(
                f"publication {publication_id} ended before its memory was mapped",
                metadata={"publication_id": publication_id},
            )
        residency.mapping.result()

    def unmap(self, publication: Publication) -> None:
        """Begins to give the memory up; `unmapped` says how that ends."""
        residency = self._all.get(publication.publication_id)
        if residency is None:
            return
        if residency.mapping is not asyncio.current_task():
            residency.mapping.cancel()
        self._begin_to_unmap(residency)

    def is_unmapping(self, instance_id: str, publication_id: str) -> bool:
        """Whether the publication was this instance's and its memory is still held."""
        residency = self._all.get(publication_id)
        return (
            residency is not None
            and residency.unmapping is not None
            and residency.publication.instance_id == instance_id
        )

    async def unmapped(self, publication_id: str) -> None:
        """Returns when nobody holds the memory any more. Raises `RetractTimeout` if the driver does not let go; the
        next call tries again."""
        residency = self._all.get(publication_id)
        if residency is None or residency.unmapping is None:
            return
        if residency.unmapping.done():
            self._begin_to_unmap(residency)
        await asyncio.shield(residency.unmapping)

    def publication(self, publication_id: str) -> Publication:
        """One that `is_unmapping`."""
        return self._all[publication_id].publication

    async def close(self) -> None:
        """Waits for what is under way. The processes that hold the rest are about to end."""
        tasks = [task for one in self._all.values() for task in (one.mapping, one.unmapping) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin_to_unmap(self, residency: _Residency) -> None:
        residency.unmapping = asyncio.get_running_loop().create_task(self._unmap(residency))
        residency.unmapping.add_done_callback(_retrieved)

    async def _map(self, publication: Publication, place: Place) -> None:
        try:
            memory = self._devices.memory_of(publication.device_kind)
            await memory.hold(publication.publication_id, place.card, place.regions)
        except CardError as error:
            self._on_refused(publication)
            may_stage = isinstance(error, CardRefused) and self._devices.path_of(publication.device_kind) == "auto"
            raise PublishRefused(
                f"card {place.card} cannot map the memory: {error}",
                metadata={"device_id": place.card, **(STAGE_INSTEAD if may_stage else {})},
            ) from error
        self._on_mapped(publication)

    async def _unmap(self, residency: _Residency) -> None:
        publication_id = residency.publication.publication_id
        await asyncio.wait({residency.mapping})
        await self._left(residency.publication)
        try:
            region_ids = [region.region_id for region in residency.place.regions]
            memory = self._devices.memory_of(residency.publication.device_kind)
            await memory.release(publication_id, region_ids)
        except CardError as error:
            log.error("memory_not_released", publication_id=publication_id, error=str(error))
            raise RetractTimeout(
                f"the driver does not let go of the memory of publication {publication_id}: {error}; call again, and "
                "do not free it before",
                metadata={"publication_id": publication_id},
            ) from error
        del self._all[publication_id]


def _retrieved(task: asyncio.Task[None]) -> None:
    """Whoever waits for the task hears of its error; if nobody does, that is no defect."""
    if not task.cancelled():
        task.exception()
