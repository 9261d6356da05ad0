"""Moves bytes between cards: the source's sender offers them under a fresh key, the destination's receiver fetches
them, the sender withdraws the key. A key is a transfer, or one round of it if there are very many tensors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

from weight_broker.layout import Layout
from weight_brokerd.cards import messages
from weight_brokerd.cards.errors import (
    CardError,
    CardLost,
    CardRefused,
    CardTimeout,
    CardUnavailable,
    ImportRefused,
)
from weight_brokerd.cards.offers import OfferEnd, fresh_key
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.cards.plan.blobs import BlobList
from weight_brokerd.cards.plan.extents import TooScattered
from weight_brokerd.cards.receivers import Reserve
from weight_brokerd.core.model import FailureCause
from weight_brokerd.dataplane.plane import Cards, MoveFailed, PhaseSeconds, Place, PlaneName
from weight_brokerd.processes.tasks import uninterrupted


class FetchCall(Protocol):
    """Fetches the bytes under a key, as `Cards.fetch`."""

    def __call__(self, key: str, /, *, reserve: Reserve) -> Coroutine[Any, Any, messages.Done]:
        """`reserve` has the key offered. Raises CardError, and what `reserve` raises."""


class DatasystemPlane:
    """Moves between cards through the datasystem."""

    name = PlaneName.DATASYSTEM

    def __init__(self, cards: Cards, *, may_stage: bool = False) -> None:
        """`may_stage`: whether memory of the receiver that cannot be mapped may be staged instead."""
        self._cards = cards
        self._may_stage = may_stage
        self._readers: dict[str, asyncio.Future[str]] = {}
        """By key; resolved with the reason if the sender of the key has ended."""

    def offers_lost(self, keys: Sequence[str], why: str) -> None:
        """The process that offered the keys has ended: end their readers before the engine notices."""
        for key in keys:
            reader = self._readers.get(key)
            if reader is not None and not reader.done():
                reader.set_result(why)

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> PhaseSeconds:
        """As `weight_brokerd.dataplane.plane.DataPlane`."""
        begun = time.monotonic()
        try:
            pieces = await asyncio.to_thread(plan.pieces, layout, source.placements, destination.placements)
        except TooScattered as error:
            raise MoveFailed(str(error), cause=FailureCause.RECEIVER, touched=False) from error
        rounds = await asyncio.to_thread(plan.rounds, pieces)
        source_ids = tuple(region.region_id for region in source.regions)
        destination_ids = tuple(region.region_id for region in destination.regions)
        moving, touched = 0.0, False
        for blobs in rounds:
            remaining = timeout - (time.monotonic() - begun)
            try:
                fetch = partial(
                    self._cards.fetch,
                    destination.device_id,
                    blobs=BlobList(destination_ids, blobs.destination),
                    regions=destination.regions,
                    timeout=max(remaining, 0.0),
                    peer=peer,
                )
                moving += await self.round(source.device_id, BlobList(source_ids, blobs.source), fetch, peer=peer)
            except MoveFailed as error:
                error.touched = error.touched or touched
                raise
            touched = True
        return {"map": time.monotonic() - begun - moving, "transfer": moving}

    async def round(self, card: str, offered: BlobList, fetch: FetchCall, *, peer: str) -> float:
        """Have the blobs offered on `card` and fetched, under one key. Returns the seconds in which bytes moved. Raises
        MoveFailed; may be cancelled as `fetch` may."""
        key = fresh_key()
        lost = self._readers[key] = asyncio.get_running_loop().create_future()
        end = OfferEnd.UNREAD

        async def reserve() -> None:
            nonlocal end
            try:
                await self._cards.offer(card, key, offered, peer=peer)
            except CardError as error:
                raise MoveFailed(
                    f"the source's card: {error}", cause=FailureCause.SOURCE_UNREACHABLE, touched=False
                ) from error
            end = OfferEnd.ABANDONED  # until the fetch has returned or is known not to have begun

        try:
            done = await _unless(fetch(key, reserve=reserve), lost)
            end = OfferEnd.DELIVERED
            return done.seconds.get("dev_mget", 0.0) + done.seconds.get("unpack", 0.0)
        except (CardRefused, CardUnavailable) as error:  # the fetch has not begun
            end = OfferEnd.UNREAD
            raise self._failed(error, FailureCause.RECEIVER) from error
        except (CardLost, CardTimeout) as error:
            if not error.touched:
                end = OfferEnd.UNREAD
            raise self._failed(error, FailureCause.SOURCE_UNREACHABLE) from error
        finally:
            del self._readers[key]
            await uninterrupted(self._cards.withdraw(card, key, end))

    def _failed(self, error: CardError, cause: FailureCause) -> MoveFailed:
        return MoveFailed(
            str(error),
            cause=cause,
            touched=error.touched,
            quiesced=error.quiesced,
            needs_staging=isinstance(error, ImportRefused) and self._may_stage,
        )


async def _unless(fetch: Coroutine[Any, Any, messages.Done], lost: asyncio.Future[str]) -> messages.Done:
    """Fetch; the fetch is cancelled if its source is lost meanwhile."""
    task = asyncio.ensure_future(fetch)
    try:
        both: set[asyncio.Future[Any]] = {task, lost}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                raise CardLost(lost.result(), touched=True)
        return task.result()
    except asyncio.CancelledError:
        task.cancel()
        await uninterrupted(_ended(task))
        if not task.cancelled() and isinstance(error := task.exception(), CardError) and not error.quiesced:
            raise error from None
        raise


async def _ended(task: asyncio.Task[messages.Done]) -> None:
    await asyncio.wait({task})
