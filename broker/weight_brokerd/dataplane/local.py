"""Within an NPU, and between any two GPUs: the receiver maps both sides and copies. The engine does not send from a
card to itself, and does not serve GPUs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from weight_broker.layout import Layout
from weight_brokerd.cards.errors import CardError, ImportRefused
from weight_brokerd.cards.messages import Done, ImportRegion
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.cards.plan.blobs import Blob, BlobList, Part
from weight_brokerd.cards.plan.extents import TooScattered
from weight_brokerd.core.model import FailureCause
from weight_brokerd.dataplane.protocol import MoveFailed, Place


class Cards(Protocol):
    """Cards of one kind."""

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


class LocalPlane:
    """Copies what one process of a card can map."""

    def __init__(self, cards: Cards) -> None:
        self._cards = cards

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> Mapping[str, float]:
        """See `weight_brokerd.dataplane.protocol.BulkPlane`."""
        begun = time.monotonic()
        try:
            pieces = await asyncio.to_thread(plan.pieces, layout, source.placements, destination.placements)
        except TooScattered as error:
            raise MoveFailed(str(error), cause=FailureCause.RECEIVER, touched=False) from error
        if not pieces:
            return {}
        given = _blobs(source.regions, ((one.source_region, one.source_offset, one.size) for one in pieces))
        taken = _blobs(
            destination.regions, ((one.destination_region, one.destination_offset, one.size) for one in pieces)
        )
        regions = {region.region_id: region for region in (*source.regions, *destination.regions)}
        try:
            done = await self._cards.copy(destination.card, given, taken, list(regions.values()), timeout=timeout)
        except CardError as error:
            mine = {region.region_id for region in destination.regions}
            is_mine = isinstance(error, ImportRefused) and error.region_id in mine
            raise MoveFailed(
                str(error),
                cause=FailureCause.RECEIVER if is_mine else FailureCause.SOURCE_UNREACHABLE,
                touched=error.touched,
                quiesced=error.quiesced,
                needs_staging=is_mine,
            ) from error
        copying = done.seconds.get("copy", 0.0)
        return {"map": time.monotonic() - begun - copying, "transfer": copying}


def _blobs(regions: Iterable[ImportRegion], spans: Iterable[tuple[int, int, int]]) -> BlobList:
    parts = (Part(*span) for span in spans)
    return BlobList(tuple(region.region_id for region in regions), tuple(Blob(part.size, (part,)) for part in parts))
