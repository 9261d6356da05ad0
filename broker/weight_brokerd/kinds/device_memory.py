"""Device memory of publications: registered with its card once, for as long as a publication needs it. An NPU's sender
has it mapped meanwhile.

Publications share an allocation if an instance publishes several weight sets, or one weight set twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from weight_broker.errors import PublishRefused, RetractTimeout
from weight_brokerd.cards.errors import CardError, CardRefused
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.dataplane.plane import Place

log = structlog.get_logger()


class Registrar(Protocol):
    """Cards, as publishing uses them."""

    async def register(self, card: str, region: ImportRegion) -> None:
        """Makes the region readable for transfers. Idempotent. Raises CardError."""

    async def unregister(self, card: str, region_id: str) -> None:
        """The region may be freed when this returns. Idempotent. Raises CardError."""


@dataclass(slots=True)
class _Mapped:
    card: str
    region: ImportRegion
    holders: set[str] = field(default_factory=set)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


def refusal(place: Place, error: CardError, metadata: dict[str, str] | None = None) -> PublishRefused:
    """The answer to a publisher whose memory the card does not map."""
    return PublishRefused(
        f"card {place.device_id} cannot map the memory: {error}",
        metadata={"device_id": place.device_id, **(metadata or {})},
    )


class DeviceMemory:
    """All regions of one kind of device memory that are published on this host. A region's id names it on the whole
    host; a holder is a publication."""

    def __init__(self, cards: Registrar) -> None:
        self._cards = cards
        self._regions: dict[str, _Mapped] = {}
        self._held: dict[str, tuple[str, ...]] = {}
        """The regions of each holder."""

    @property
    def region_count(self) -> int:
        """Mapped regions."""
        return len(self._regions)

    @property
    def region_bytes(self) -> int:
        """Bytes of the mapped regions."""
        return sum(mapped.region.size_bytes for mapped in self._regions.values())

    def holders_of(self, region_id: str) -> list[str]:
        """The publications that lie in a region."""
        mapped = self._regions.get(region_id)
        return sorted(mapped.holders) if mapped is not None else []

    async def hold(self, holder: str, place: Place) -> None:
        """Maps the regions for a publication, all or none. Raises CardError."""
        self._held[holder] = tuple(region.region_id for region in place.regions)
        try:
            for region in place.regions:
                await self._hold(holder, place.device_id, region)
        except BaseException:
            with suppress(CardError):  # the first error says more
                await self._release_all(holder)
            raise

    async def release(self, holder: str) -> None:
        """Unmaps the regions that no other publication needs. Idempotent. Raises `RetractTimeout` if the driver keeps a
        region; call again."""
        try:
            await self._release_all(holder)
        except CardError as error:
            log.error("memory_not_released", publication_id=holder, error=str(error))
            raise RetractTimeout(
                f"the driver does not let go of the memory of publication {holder}: {error}; call again, and do not "
                "free it before",
                metadata={"publication_id": holder},
            ) from error

    async def _release_all(self, holder: str) -> None:
        failure: CardError | None = None
        for region_id in _unique(self._held.get(holder, ())):
            try:
                await self._release(holder, region_id)
            except CardError as error:
                failure = error
        if failure is not None:
            raise failure
        self._held.pop(holder, None)

    async def _hold(self, holder: str, card: str, region: ImportRegion) -> None:
        mapped = self._regions.setdefault(region.region_id, _Mapped(card, region))
        if mapped.region != region or mapped.card != card:
            raise CardRefused(f"region {region.region_id!r} is other memory")
        mapped.holders.add(holder)
        async with mapped.changing:
            await self._cards.register(card, region)  # again changes nothing

    async def _release(self, holder: str, region_id: str) -> None:
        mapped = self._regions.get(region_id)
        if mapped is None or holder not in mapped.holders:
            return
        async with mapped.changing:
            if mapped.holders == {holder}:
                await self._cards.unregister(mapped.card, region_id)
            mapped.holders.discard(holder)
            if not mapped.holders and self._regions.get(region_id) is mapped:
                del self._regions[region_id]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
