"""Between two NPUs of this host: a receiver of the destination's card maps both sides and copies by the runtime. No
communicator is set up and no port is taken. What the driver refuses to map, the datasystem moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import structlog

from weight_broker.layout import Layout
from weight_brokerd.cards.errors import CardError, ImportRefused
from weight_brokerd.dataplane.copy import Copier, CopyPlane
from weight_brokerd.dataplane.plane import DataPlane, MoveFailed, PhaseSeconds, Place, PlaneName

log = structlog.get_logger()


class PeerCopyPlane(CopyPlane):
    """Copies from another card, where the driver lets both be mapped."""

    name = PlaneName.PEER_COPY

    def __init__(self, cards: Copier, otherwise: DataPlane, *, may_stage: bool = False) -> None:
        """`otherwise` moves what a card refuses to map; `may_stage` as in `CopyPlane`."""
        super().__init__(cards, may_stage=may_stage)
        self._otherwise = otherwise
        self._refused: set[tuple[str, str]] = set()
        """Cards of source and destination between which the driver maps nothing."""

    def reaches(self, source: str, destination: str) -> bool:
        """Whether the second card may map memory of the first, as far as is known."""
        return (source, destination) not in self._refused

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> PhaseSeconds:
        """As `weight_brokerd.dataplane.plane.DataPlane`."""
        regions = tuple(replace(region, device_id=source.device_id) for region in source.regions)
        return await super().move(layout, replace(source, regions=regions), destination, timeout=timeout, peer=peer)

    def _failed(self, error: CardError, source: Place, destination: Place) -> MoveFailed:
        failure = super()._failed(error, source, destination)
        own = {region.region_id for region in destination.regions}
        if isinstance(error, ImportRefused) and error.region_id not in own and failure.quiesced:
            pair = source.device_id, destination.device_id
            failure.instead = _Instead(self._otherwise, lambda: self._remember(pair, str(error)))
        return failure

    def _remember(self, pair: tuple[str, str], why: str) -> None:
        if pair not in self._refused:
            self._refused.add(pair)
            log.warning("peer_copy_refused", source=pair[0], destination=pair[1], why=why)


class _Instead:
    """The other plane. A card also refuses memory of an instance that has died: what was refused is remembered once the
    other plane has read it."""

    def __init__(self, plane: DataPlane, remember: Callable[[], None]) -> None:
        self._plane = plane
        self._remember = remember

    @property
    def name(self) -> PlaneName:
        """The other plane's."""
        return self._plane.name

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> PhaseSeconds:
        """As `weight_brokerd.dataplane.plane.DataPlane`."""
        seconds = await self._plane.move(layout, source, destination, timeout=timeout, peer=peer)
        self._remember()
        return seconds
