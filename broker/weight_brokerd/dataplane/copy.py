"""Copies within an NPU and between any two GPUs: the receiver maps both sides and copies. The datasystem does not send
from a card to itself, and does not serve GPUs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from weight_broker.layout import Layout
from weight_brokerd.cards.errors import CardError, ImportRefused
from weight_brokerd.cards.messages import Done, ImportRegion
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.cards.plan.blobs import Blob, BlobList, Part
from weight_brokerd.cards.plan.extents import TooScattered
from weight_brokerd.core.model import FailureCause
from weight_brokerd.dataplane.plane import MoveFailed, PhaseSeconds, Place, PlaneName


class Copier(Protocol):
    """Devices that one process of a device can copy between."""

    async def copy(
        self,
        card: str,
        source: BlobList,
        destination: BlobList,
        regions: Sequence[ImportRegion],
        *,
        timeout: float,
    ) -> Done:
        """Fills `destination` on `card` from `source`. Raises CardError."""
        ...


class CopyPlane:
    """Copies between memory that one process of a card can map."""

    name = PlaneName.COPY

    def __init__(self, cards: Copier, *, may_stage: bool = False) -> None:
        """`may_stage`: whether memory of the receiver that cannot be mapped may be staged instead."""
        self._cards = cards
        self._may_stage = may_stage

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> PhaseSeconds:
        """As `weight_brokerd.dataplane.plane.DataPlane`."""
        begun = time.monotonic()
        try:
            pieces = await asyncio.to_thread(plan.pieces, layout, source.placements, destination.placements)
        except TooScattered as error:
            raise MoveFailed(str(error), cause=FailureCause.RECEIVER, touched=False) from error
        if not pieces:
            return {}
        source_blobs = _blobs(
            source.regions, ((piece.source_region, piece.source_offset, piece.size) for piece in pieces)
        )
        destination_blobs = _blobs(
            destination.regions, ((piece.destination_region, piece.destination_offset, piece.size) for piece in pieces)
        )
        regions = {region.region_id: region for region in (*source.regions, *destination.regions)}
        try:
            done = await self._cards.copy(
                destination.device_id, source_blobs, destination_blobs, list(regions.values()), timeout=timeout
            )
        except CardError as error:
            raise self._failed(error, source, destination) from error
        copying = done.seconds.get("copy", 0.0)
        return {"map": time.monotonic() - begun - copying, "transfer": copying}

    def _failed(self, error: CardError, source: Place, destination: Place) -> MoveFailed:
        own = {region.region_id for region in destination.regions}
        is_receivers = isinstance(error, ImportRefused) and error.region_id in own
        return MoveFailed(
            str(error),
            cause=FailureCause.RECEIVER if is_receivers else FailureCause.SOURCE_UNREACHABLE,
            touched=error.touched,
            quiesced=error.quiesced,
            needs_staging=is_receivers and self._may_stage,
        )


def _blobs(regions: Iterable[ImportRegion], spans: Iterable[tuple[int, int, int]]) -> BlobList:
    parts = (Part(*span) for span in spans)
    return BlobList(tuple(region.region_id for region in regions), tuple(Blob(part.size, (part,)) for part in parts))
