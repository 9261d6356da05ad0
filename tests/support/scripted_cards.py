"""Cards that do what a test says, without processes: what is registered, what may be imported, what was moved."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardError, CardRefused, CardTimeout, ImportRefused
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.health import CardHealth, CardState
from weight_brokerd.cards.messages import Done, ImportRegion, Request
from weight_brokerd.cards.offers import OfferEnd
from weight_brokerd.cards.plan.blobs import BlobList
from weight_brokerd.cards.plan.chunks import new_buffer_id
from weight_brokerd.cards.receivers import Reserve

T = TypeVar("T")


def staging_buffer(size: int) -> ImportRegion:
    """A staging buffer of a card."""
    return ImportRegion(new_buffer_id(), size, export_key="6b6579")


@dataclass
class BorrowedCard:
    """A receiver that a job has to itself."""

    cards: ScriptedCards
    buffer: ImportRegion | None
    is_busy: bool = False

    keeps_buffer: bool = False

    async def lend_staging_buffer(self, connection: int) -> None:
        assert self.buffer is not None
        self.cards.lent.append(self.buffer.region_id)

    async def ask(self, request: Request, timeout: float) -> Done:
        self.cards.moved.append(type(request).__name__)
        await self.cards.pause()
        return Done()


class ScriptedCards:
    """A supervisor of cards, for an NpuKind or a CudaKind."""

    def __init__(self, *identities: str) -> None:
        self.identities = identities
        self.registered: dict[str, str] = {}
        """Card of each registered region."""
        self.refused: set[str] = set()
        """Regions that the driver does not let a card import."""
        self.peers_refused: set[str] = set()
        """Regions that it does not let another card import."""
        self.imported: list[ImportRegion] = []
        self.clinging: set[str] = set()
        """Regions that the driver does not let go of."""
        self.gate: asyncio.Event | None = None
        """Nothing moves before it is set."""
        self.failure: CardError | None = None
        """How the next movements end."""
        self.moved: list[str] = []
        """What was moved, by the name of the call, in order."""
        self.moving = 0
        self.buffers: set[str] = set()
        self.lent: list[str] = []
        """Staging buffers that an instance was allowed to map, in order."""
        self.hooks = Hooks()
        self.problem = ""
        self.is_closed = False
        self.worker_is_there = True

    def supervise(self, _: CardsConfiguration, hooks: Hooks) -> Any:
        """As the supervisor's constructor."""
        self.hooks = hooks
        return self

    @property
    def health(self) -> list[CardHealth]:
        """Every card is well."""
        return [
            CardHealth(name, index, "soc", CardState.READY, "", 0, (), (), len(self.registered), 0, 0)
            for index, name in enumerate(self.identities)
        ]

    async def start(self) -> None:
        """The cards are there."""

    async def close(self) -> None:
        self.is_closed = True

    async def register(self, card: str, region: ImportRegion) -> None:
        await asyncio.sleep(0)
        if region.region_id in self.refused:
            raise CardRefused("507899: the driver refuses")
        self.registered[region.region_id] = card

    async def unregister(self, card: str, region_id: str) -> None:
        await asyncio.sleep(0)
        if region_id in self.clinging:
            raise CardTimeout(f"the driver does not let go of region {region_id!r}", quiesced=False)
        self.registered.pop(region_id, None)

    async def pause(self) -> None:
        """While bytes move."""
        if self.failure is not None:
            raise self.failure
        self.moving += 1
        try:
            await (self.gate.wait() if self.gate is not None else asyncio.sleep(0))
        finally:
            self.moving -= 1

    async def offer(self, card: str, key: str, blobs: BlobList, *, peer: str = "") -> Done:
        return Done()

    async def withdraw(self, card: str, key: str, end: OfferEnd) -> Done:
        return Done()

    async def fetch(
        self,
        card: str,
        key: str,
        blobs: BlobList,
        regions: Sequence[ImportRegion],
        *,
        timeout: float,
        peer: str = "",
        reserve: Reserve | None = None,
    ) -> Done:
        self._import(regions)
        if reserve is not None:
            await reserve()
        await self._move("fetch", timeout)
        return Done({"dev_mget": 0.5})

    async def copy(
        self, card: str, source: BlobList, destination: BlobList, regions: Sequence[ImportRegion], *, timeout: float
    ) -> Done:
        self._import(regions)
        await self._move("copy", timeout)
        return Done({"copy": 0.5})

    async def lend(
        self,
        card: str,
        job: Callable[[Any], Awaitable[T]],
        regions: Sequence[ImportRegion],
        *,
        buffer_bytes: int = 0,
        timeout: float,
    ) -> T:
        self._import(regions)
        try:
            async with asyncio.timeout(timeout):
                return await job(BorrowedCard(self, staging_buffer(buffer_bytes) if buffer_bytes else None))
        except TimeoutError:
            raise CardTimeout("it was not done in time") from None

    async def make_staging_buffer(self, card: str, size: int) -> ImportRegion:
        buffer = staging_buffer(size)
        self.buffers.add(buffer.region_id)
        return buffer

    async def lend_staging_buffer(self, card: str, region_id: str, connection: int) -> None:
        self.lent.append(region_id)

    async def close_staging_buffer(self, card: str, region_id: str) -> None:
        self.buffers.discard(region_id)

    def lose(self, region_id: str) -> None:
        """A fresh process could not import a region again."""
        self.registered.pop(region_id, None)
        self.hooks.on_region_lost(region_id, "it is gone")

    def _import(self, regions: Sequence[ImportRegion]) -> None:
        for region in regions:
            if region.region_id in self.refused or (region.device_id and region.region_id in self.peers_refused):
                raise ImportRefused("507899: the driver refuses", region.region_id)
            self.imported.append(region)

    async def _move(self, name: str, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self.pause()
        except TimeoutError:
            raise CardTimeout("it was not done in time", touched=True) from None
        self.moved.append(name)
